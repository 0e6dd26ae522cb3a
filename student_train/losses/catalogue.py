"""The losses: one entry each, from which everything else follows.

An entry is a function (in ``row_losses`` or ``image_losses``) in the kind that says what the function is given. The
kind knows which arrays of a cache that takes and which settings it reads; checks, what is loaded, what a plan counts
and the JSON schema are derived from it. No other module names a loss.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic_core import core_schema
from torch import Tensor

from student_train.losses import image_losses, row_losses
from teacher_cache.config import CHECKED, AtLeast0, AtLeast1, NotNegative, Positive, Share, SignalsConfig
from teacher_cache.errors import ConfigError


@dataclass(frozen=True)
class LossSpec:
    """One term of the loss: (R,) values. Raises ``ConfigError``: no such loss, or a setting that it does not read.
    >>> hot = LossSpec("forward_kl", temperature=2.0)  # of that loss's own settings class
    """

    name: str
    weight: float = field(default=1.0, metadata={"description": "What the term is multiplied with."})

    # Of a loss that has no such setting:
    average = "row"
    tokens = "answer"
    rows = "predicting"
    layer = "last"
    source = "answers"
    temperature = 1.0
    temperature_squared = False
    pool = 0
    advantage_share = 0.0
    density = False

    if TYPE_CHECKING:  # each loss has its own settings

        def __init__(self, name: str, weight: float = 1.0, **settings: Any) -> None: ...

    def __new__(cls, name: str = "", *_: Any, **settings: Any) -> LossSpec:
        if cls is LossSpec:
            check_written({"name": name, **settings})
            cls = SPECS[name]
        return object.__new__(cls)

    @property
    def entry(self) -> Entry:
        return CATALOGUE[self.name]

    @property
    def label(self) -> str:
        """How the term is called in logs: its name, and what sets it apart from a second one of that name."""
        return self.name if self.layer == "last" else f"{self.name}_{self.layer}"

    @property
    def on_images(self) -> bool:
        """Whether it compares image positions."""
        return self.entry.on_images or self.tokens == "all"

    @property
    def needs_head(self) -> bool:
        """Whether the teacher's output head must be in memory."""
        return self.source == "exact" or isinstance(self.entry, Images)

    def own(self) -> dict[str, Any]:
        """The settings that its function alone knows, by their names."""
        return {name: getattr(self, name) for name in self.entry.own}

    def as_plain(self) -> dict[str, Any]:
        """JSON-ready: the settings that are read."""
        return {name: getattr(self, name) for name in _read(type(self), vars(self))}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        written = core_schema.plain_serializer_function_ser_schema(lambda loss: loss.as_plain())
        if cls is not LossSpec:
            return core_schema.no_info_after_validator_function(
                lambda loss: loss, handler(source), serialization=written
            )
        choices = {f"tag:{name}": handler.generate_schema(spec) for name, spec in SPECS.items()}
        tagged = core_schema.tagged_union_schema(choices, _tag)
        return core_schema.no_info_before_validator_function(check_written, tagged, serialization=written)


def _tag(loss: Any) -> str:
    return f"tag:{loss['name'] if isinstance(loss, Mapping) else loss.name}"


def check_written(tree: Any) -> Any:
    """``tree`` as it is: settings of one loss by name.

    Raises ``ConfigError``: a loss that does not exist, or a setting that it does not read: it would train something
    else than it says.
    """
    if not isinstance(tree, Mapping) or "name" not in tree:
        raise ConfigError(f"expected a loss, for example {{name: {next(iter(CATALOGUE))}}}, found {tree!r}")
    name = str(tree["name"])
    if name not in SPECS:
        raise ConfigError(f"no loss is called {name}; {_nearest(name, SPECS)}")
    known = {f.name: f for f in fields(SPECS[name])}
    for key in tree:
        if key not in known:
            raise ConfigError(f"{name} has no setting {key}; {_nearest(str(key), known)}")
        if key not in _read(SPECS[name], tree):
            other, needed = known[key].metadata["when"]
            raise ConfigError(
                f"{name} does not read {key} with {other}: {tree.get(other, known[other].default)}, found {key}: "
                f"{tree[key]}. Leave {key} out, or set {other}: {' or '.join(needed)}"
            )
    return tree


def _read(spec: type[LossSpec], values: Mapping[str, Any]) -> list[str]:
    """Names of the settings that are read where these have been set."""
    default = {f.name: f.default for f in fields(spec)}
    when = {f.name: f.metadata.get("when") for f in fields(spec)}
    return [name for name, w in when.items() if w is None or values.get(w[0], default[w[0]]) in w[1]]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


@dataclass(frozen=True)
class Setting:
    """kind: its type · when: (another setting, the values of that with which this one is read); of a loss that has not
    that other setting, or none of these values of it, it is always read."""

    kind: Any
    default: Any
    text: str
    when: tuple[str, tuple[str, ...]] = ("", ())


SETTINGS = {
    "source": Setting(
        Literal["topk", "sampled", "exact"],
        "topk",
        "topk: top-k and one tail bucket; sampled: Random Sampling KD; exact: hidden states × the teacher's head.",
    ),
    "temperature": Setting(Positive, 1.0, "Divides both sides' logits.", ("source", ("topk", "exact"))),
    "temperature_squared": Setting(
        bool, False, "Multiplies the loss by the temperature's square.", ("source", ("topk", "exact"))
    ),
    "tokens": Setting(
        Literal["answer", "text", "all"],
        "answer",
        "Answer rows, all text positions, or text and image positions.",
        ("source", ("exact",)),
    ),
    "rows": Setting(
        Literal["predicting", "llavadi"],
        "predicting",
        "predicting is the row rule; llavadi leaves out the first token of every answer, as LLAVADI's code does by "
        "comparing one position late. (In exchange it distils what follows the end token, for which a cache has no "
        "row.) The average is still over all rows.",
        ("tokens", ("answer",)),
    ),
    "layer": Setting(Literal["last", "second_last"], "last", "Whose states.", ("tokens", ("answer", "text"))),
    "pool": Setting(
        AtLeast0,
        0,
        "Where the student has fewer image positions: the side its grid has, to which the teacher's is mean-pooled.",
        ("tokens", ("all",)),
    ),
    "average": Setting(
        Literal["row", "sample"],
        "row",
        "row: every row (position, image) of the global batch weighs the same; sample: every sample does, as LLAVADI's "
        "code divides its distillation losses. Cross-entropy is the mean over rows there and here.",
    ),
    "density": Setting(
        bool, False, "Positions of an image weigh by how unlike its others they are: HEED.", ("tokens", ("all",))
    ),
    "advantage_share": Setting(
        Share, 0.0, "Of a sample's rows, those that its image helps most, to weigh half of it.", ("tokens", ("answer",))
    ),
    "beta": Setting(Share, 0.5, "The teacher's share of the mean distribution."),
    "head_ids": Setting(AtLeast1, 10, "How many of the teacher's most likely ids are the head."),
    "tail_weight": Setting(NotNegative, 1.0, "What the divergence among all other ids is multiplied with."),
    "smoothing": Setting(Share, 0.0, "The share of the target that all ids get alike (label smoothing)."),
    "space": Setting(
        Literal["logits", "hidden"], "logits", "The Gram of the logits (LLaVA-KD's code) or of the final hidden states."
    ),
}


# Kinds: what the function is given


@dataclass(frozen=True)
class Entry:
    """function: teacher first, (R,) out · own: settings that the function alone knows; it gets them by name ·
    visual: what ``signals.visual`` must be, one of these."""

    function: Callable[..., Tensor]
    own: tuple[str, ...] = ()
    visual: tuple[str, ...] = ()

    usual: ClassVar[tuple[str, ...]] = ()
    """Settings of every loss of the kind."""
    row_arrays: ClassVar[frozenset[str]] = frozenset()
    on_images: ClassVar[bool] = False
    whole_lines: ClassVar[bool] = False
    """Whether it needs a line to be one sample."""

    def settings(self) -> dict[str, Setting]:
        return {name: SETTINGS[name] for name in (*self.usual, *self.own)}

    def arrays(self, spec: LossSpec, signals: SignalsConfig) -> frozenset[str]:
        """Names of the cache's arrays that it reads, without those of images."""
        return self.row_arrays


class Answers(Entry):
    """(answer ids (R,), student logits (R, V)): all that asks nothing more of a teacher than its answers."""

    usual = ("advantage_share",)


_OF_PLACES = ("tokens", "rows", "pool", "density", "average", "advantage_share")


class Logits(Entry):
    """(teacher logits, student logits, temperature, which count): (R, V), or those of the kept ids (R, k)."""

    usual = ("source", "temperature", "temperature_squared", *_OF_PLACES)
    sources: ClassVar[Any] = Literal["topk", "exact"]

    def settings(self) -> dict[str, Setting]:
        return super().settings() | {"source": dataclasses.replace(SETTINGS["source"], kind=self.sources)}

    def arrays(self, spec: LossSpec, signals: SignalsConfig) -> frozenset[str]:
        """Of coarse states ``exact`` takes the tail alone: the head is the stored top-k's (``targets.exact_logits``). A
        cache has a top-k for answer rows only."""
        kept = {"topk_ids", "topk_logprobs", "stats"}
        if spec.source == "topk":
            return frozenset(kept)
        if spec.source == "sampled":
            draws = {"sampled_ids", "sampled_counts", "stats"}
            return frozenset(draws | (kept if signals.sampled_from == "tail" else set()))
        coarse = signals.codec == "int4" or signals.pca > 0
        return frozenset({"hidden"} | (kept if coarse and signals.top_k and spec.tokens == "answer" else set()))


@dataclass(frozen=True)
class Distributions(Logits):
    """Log-probabilities (R, buckets) of the teacher and of the student. standardised: of z-scored logits."""

    standardised: bool = False


class Parted(Distributions):
    """Treats ids apart, by their rank: its function is given how many of the buckets are ids, too."""


@dataclass(frozen=True)
class Drawable(Distributions):
    """Forward KL: linear in the teacher's distribution, so that draws serve it (``draws``: by which function), and with
    a gradient that ``closed_form`` has."""

    draws: Callable[..., Tensor] = row_losses.forward_kl_of_draws
    sources = Literal["topk", "sampled", "exact"]


class States(Entry):
    """(teacher states (R, d), projected student states (R, d))."""

    usual = ("layer", *_OF_PLACES)

    def arrays(self, spec: LossSpec, signals: SignalsConfig) -> frozenset[str]:
        return frozenset({"hidden" if spec.layer == "last" else "hidden_second_last"})


class Attention(Entry):
    """(teacher attention (R, N), the student's (R, N)): of answer rows over an image, mean over heads."""

    usual, row_arrays = ("average",), frozenset({"attention"})
    on_images = whole_lines = True


class ImagesAndText(Entry):
    """(teacher image (N, d), teacher text (R, d), student image, student text) of one sample."""

    usual, row_arrays = ("tokens", "pool", "average"), frozenset({"hidden"})
    on_images = whole_lines = True

    def settings(self) -> dict[str, Setting]:
        return super().settings() | {"tokens": dataclasses.replace(SETTINGS["tokens"], kind=Literal["answer", "text"])}


class Images(Entry):
    """(the teacher's ``ImageTargets``, student states (B, N, d), student head (V, d), how to pool) → (B,)."""

    usual: ClassVar[tuple[str, ...]] = ("pool", "average")
    on_images = True


@dataclass(frozen=True)
class ImageLogits(Images):
    """What the loss called ``of`` is given, at every image position."""

    of: str = ""
    usual = ("temperature", "temperature_squared", "pool", "density", "average")


CATALOGUE: dict[str, Entry] = {
    "cross_entropy": Answers(row_losses.cross_entropy, own=("smoothing",)),
    "forward_kl": Drawable(row_losses.forward_kl),
    "reverse_kl": Distributions(row_losses.reverse_kl),
    "jsd": Distributions(row_losses.jsd, own=("beta",)),
    "logit_mse": Logits(row_losses.logit_mse),
    "forward_kl_standardised": Distributions(row_losses.forward_kl_standardised, standardised=True),
    "tail_aware_kl": Parted(row_losses.tail_aware_kl, own=("head_ids", "tail_weight")),
    "hidden_mse": States(row_losses.hidden_mse),
    "hidden_cosine": States(row_losses.hidden_cosine),
    "attention_mse": Attention(row_losses.attention_mse),
    "similarity_mse": ImagesAndText(row_losses.similarity_mse, visual=("states",)),
    "visual_kl": ImageLogits(row_losses.forward_kl, visual=("states", "topk"), of="forward_kl"),
    "relation": Images(image_losses.relation, own=("space",), visual=("states", "gram")),
}
MEASURED_BY = "forward_kl"
"""By which loss an evaluation says how far a student is from its teacher."""


def _spec_class(name: str, entry: Entry) -> type[LossSpec]:
    """One loss's own settings: a member of the union that a file's ``losses`` are read as."""
    settings = entry.settings()
    columns: list[Any] = [("name", Literal[name])]
    for key, setting in settings.items():
        other, values = setting.when
        bound = other in settings and set(values) & set(get_args(settings[other].kind))
        about = {"description": setting.text} | ({"when": setting.when} if bound else {})
        columns.append((key, setting.kind, field(default=setting.default, metadata=about)))
    namespace = {"__pydantic_config__": CHECKED, "__doc__": str(entry.function.__doc__).split("\n\n")[0]}
    return dataclasses.make_dataclass(name, columns, bases=(LossSpec,), frozen=True, namespace=namespace)


SPECS = {name: _spec_class(name, entry) for name, entry in CATALOGUE.items()}
DEFAULT_LOSS = LossSpec(next(iter(CATALOGUE)))
