"""Settings of phase one, and the YAML loader that both phases share.

A setting reaches the code in one order: the dataclass's default, then the YAML file, then ``--set a.b=c``. Sections
whose fields change what the cache holds (``data``, ``teacher``, ``generation``, ``signals``) enter the fingerprint;
``speed`` does not, so that a run can be resumed with another batch size or on another number of GPUs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from teacher_cache.errors import ConfigError
from teacher_cache.files import read_yaml

CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
"""Of every section of a configuration: unknown keys, other types and infinite numbers are refused."""
AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden": "rows", "visual": "none", "pca": 44, "top_k": 12, "temperatures": (1.0,)},
    "compact": {"hidden": "none", "visual": "none"},
    "standard": {"hidden": "rows", "visual": "none"},
    "full": {"hidden": "text", "visual": "states"},
    "llava_kd": {"hidden": "rows", "visual": "gram"},
}
"""What each preset of ``signals`` stores; a field set beside it in the YAML wins over the preset."""


@dataclass(frozen=True)
class DataConfig:
    """Which conversations are cached, and which of their answers the teacher writes anew."""

    __pydantic_config__ = CHECKED
    path: str | tuple[str, ...] = ""
    """A file, a folder, a pattern, a data set of the hub (``hf://datasets/OWNER/NAME``), or several of them."""
    image_folder: str = ""
    """What the paths of images start from; images inside the data need none."""
    regenerate: Literal["all", "none", "ids"] = "all"
    """Whose answers are cached: the teacher writes all anew, none, or those of ``regenerate_ids``."""
    regenerate_ids: str = ""
    """With ``regenerate: ids``: a text file, one sample_id a line; all other samples keep their answers."""
    regenerate_share: Share = 1.0
    """Part of the samples that ``regenerate`` picks, chosen by a digest of their ids; the others keep their answers."""
    history: Literal["teacher", "original"] = "teacher"
    """Whose earlier answers stand before a later question of the same conversation."""
    duplicate_ids: Literal["error", "number"] = "error"
    """LLaVA's 665K mix repeats ids; ``number`` renames the second ``x`` to ``x#2``."""
    max_samples: AtLeast0 = 0
    """0 caches all of them."""
    max_skipped: Share = 0.1
    """Share of the samples that may be skipped before a build stops: most often a wrong setting or a missing folder.
    The first 16 are always allowed."""


@dataclass(frozen=True)
class TeacherConfig:
    __pydantic_config__ = CHECKED
    model: str = ""
    """Folder or hub name of a model with its processor (or tokenizer) and chat template."""
    revision: str = ""
    """Branch, tag or commit on the hub; empty is its main branch."""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    """``auto``: vLLM for LLaVA-1.5 where it is installed, else torch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """In which numbers the teacher is run."""
    chat_template: str = ""
    """Empty: the model's own. A paper's by name (``vicuna_v1`` for LLaVA, ``plain``, ``chatml``) or a Jinja file."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the template is given, for example ``{enable_thinking: false}``."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """Settings in place of its image processor's own: ``{size: {shortest_edge: 3136, longest_edge: 602112}}``.
    LLaVA-1.5 as in its paper, padded to a square, is ``{image_processor_type: LlavaImageProcessor, do_pad: true}``."""
    max_length: AtLeast1 = 2048
    """Tokens of a whole conversation, image tokens counted; a longer sample is skipped with its length. No more
    than the model's own positions count, under vLLM three less."""
    answerer: str = ""
    """A student (folder or hub name, same tokenizer) that writes the new answers in the teacher's place; the teacher
    scores them. LLAVADI's "data from student"."""
    trust_remote_code: bool = False
    """Run code that comes with the model. It can do all that you can do."""
    quantization: str = ""
    """A quantisation name that the backend knows (``awq``, ``gptq``, ``bitsandbytes``); empty for none."""


@dataclass(frozen=True)
class GenerationConfig:
    __pydantic_config__ = CHECKED
    temperature: NotNegative = 0.0
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With temperature > 0: draw from the likeliest tokens that hold this much of the probability."""
    max_new_tokens: AtLeast1 = 512
    """Tokens of an answer; a longer one ends there."""
    seed: Seed = 0
    """With temperature > 0 each answer is drawn from a generator seeded by (seed, sample_id, turn)."""


@dataclass(frozen=True)
class SignalsConfig:
    """What is stored for each answer token (row), text position and image."""

    __pydantic_config__ = CHECKED
    preset: Literal["small", "compact", "standard", "full", "llava_kd"] = "standard"
    """A set of the settings below; what is written beside it wins over it."""
    top_k: AtLeast0 = 64
    """Likeliest tokens kept a row, with their log-probabilities; 0 keeps none."""
    temperatures: tuple[Positive, ...] = (0.5, 0.7, 1.0, 2.0, 4.0)
    """The log-sum-exp is stored at each of these, so top-k and tail mass are exact there."""
    hidden: Literal["none", "rows", "text"] = "rows"
    """Final-layer states of no position, of the answer rows, or of every text position."""
    second_last: bool = False
    """Also the states before the last layer (LLAVADI, table 1: "last two layers")."""
    codec: Literal["float32", "float16", "bfloat16", "int8", "int4"] = "int8"
    """``float32`` keeps a float32 teacher's states exactly, for tests of offline against online."""
    pca: AtLeast0 = 0
    """Keep this many principal components of the hidden states before the codec; 0 keeps all."""
    calibration_samples: AtLeast1 = 64
    """Samples on which channel scales (int8, int4) and principal components are fitted."""
    sampled: Annotated[int, Field(ge=0, le=255)] = 0
    """Random Sampling KD: draws with replacement a row (Anshumann et al., ACL 2025); counts are bytes. 0: none."""
    sampled_from: Literal["all", "tail"] = "all"
    """``tail`` draws outside the top-k only: exact head + unbiased tail."""
    visual: Literal["none", "states", "topk", "gram"] = "none"
    """Per distinct image: final-layer states, a top-k of the logits, or the relation Gram (LLaVA-KD) alone."""
    visual_top_k: AtLeast1 = 32
    """With ``visual: topk``: tokens kept for an image position."""
    attention: bool = False
    """Attention of answer rows over the image positions in the last layer, mean over heads (LLAVADI, table 3)."""
    advantage: Literal["none", "blurred", "without"] = "none"
    """How much likelier the image makes each answer token (arXiv:2605.21924): samples with an image are scored a second
    time, with it blurred or ``without`` it. Two bytes a row."""


@dataclass(frozen=True)
class LayoutConfig:
    __pydantic_config__ = CHECKED
    shard_samples: AtLeast1 = 512
    """Samples of a shard: what a kill loses, what is read ahead, what one worker makes."""
    chunk_kilobytes: AtLeast1 = 1024
    """Size of the chunks inside an array, which other Zarr readers fetch at once."""
    compression: Literal["none", "zstd"] = "none"
    """Of the arrays; quantised states hardly compress."""


@dataclass(frozen=True)
class SpeedConfig:
    """Nothing here enters the fingerprint: a cache may be finished on another machine or with another batch size.

    With the same ``speed``, libraries and kind of machine a resumed cache is the same byte for byte. Batch sizes
    (``answer_batch``, ``score_batch_tokens``, ``head_rows``) change the last bits of the teacher's sums, so of
    ``stats`` and states; an id changes only where two tie to the rounding of the teacher's dtype.
    """

    __pydantic_config__ = CHECKED
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU where there is one."""
    answer_batch: AtLeast1 = 32
    """Conversations answered together."""
    score_batch_tokens: AtLeast1 = 16384
    """Tokens scored together, padding counted."""
    head_rows: AtLeast1 = 2048
    """Rows whose logits (rows × vocabulary, float32) exist at once."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """vLLM: share of the memory of a GPU that it may take."""
    tensor_parallel: AtLeast1 = 1
    """vLLM: GPUs that share one copy of the teacher."""
    loader_threads: AtLeast1 = 4
    """Threads that read and decode images ahead."""


@dataclass(frozen=True)
class CacheConfig:
    """Phase one, whole; ``load_config`` reads a file of it, and whoever uses it checks it (``ConfigError``).

    >>> CacheConfig(output="runs/mine").signals.top_k
    64
    """

    __pydantic_config__ = CHECKED
    output: str = ""
    """Folder of the cache, or its address in an object store (``s3://bucket/cache``)."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)


ConfigT = TypeVar("ConfigT")


def load_config(cls: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` (YAML) over the defaults of ``cls``, then apply ``a.b=c`` overrides, left to right.

    Raises ``ConfigError``: naming the file, the key and the nearest key that exists, or the type that was expected.

    >>> load_config(CacheConfig, "pipelines/tiny/cache.yaml", ["signals.top_k=4"]).signals.top_k
    4
    """
    tree, where = dict[str, Any](), "the command line"
    if path is not None:
        where = str(path)
        try:
            tree = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file. Configurations lie under pipelines/.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML ({error})") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, for example --set signals.top_k=32")
        _put(tree, key.split("."), read_yaml(text), override)
    return build_config(cls, _with_preset(cls, tree), where)


def build_config(cls: type[ConfigT], tree: Mapping[str, Any], where: str) -> ConfigT:
    """Make the dataclass ``cls`` from plain data; an empty value leaves the default, ints pass as floats.

    Raises ``ConfigError``: unknown keys, other types and numbers out of bounds, with the key, what was expected and
    what was found.
    """
    try:
        made: ConfigT = _adapter(cls).validate_json(json.dumps(_filled_in(tree), default=str), strict=True)
        return made
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explained(cls, error.errors(include_url=False)[0])}") from error


def check_settings(config: Any) -> None:
    """What a file's settings are checked for, of a configuration that was made in Python."""
    build_config(type(config), as_plain(config), type(config).__name__)


def schema(cls: type[Any]) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the files that :func:`load_config` reads as ``cls``, for editors."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_adapter(cls).json_schema()}
    text = json.dumps(made).replace('"schema file":', '"$ref":')  # pydantic takes a reference for one of its own
    found: dict[str, Any] = json.loads(text)
    return found


_adapter: Any = functools.cache(TypeAdapter)


def _filled_in(tree: Any) -> Any:
    """Without the keys whose value is empty."""
    if isinstance(tree, Mapping):
        return {str(key): _filled_in(value) for key, value in tree.items() if value is not None}
    return [_filled_in(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


_EXPECTED = {
    "int_type": "int",
    "int_from_float": "int",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "str",
    "bool_type": "true or false",
    "dataclass_type": "a section",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
}


def _explained(cls: type[Any], error: Any) -> str:
    """One of pydantic's errors in our words: the key, what was expected and what was found."""
    keys = [k for k in error["loc"] if not str(k).startswith(("str", "tuple[", "function-", "tag:"))]
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
    if isinstance(error.get("ctx", {}).get("error"), ConfigError):
        return f"{name}: {error['ctx']['error']}"
    if error["type"] == "unexpected_keyword_argument":
        known = {f.name for f in dataclasses.fields(_section(cls, keys[:-1]))}
        near = difflib.get_close_matches(str(keys[-1]), known, n=1)
        prefix = name.removesuffix(str(keys[-1]))
        hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys: {', '.join(sorted(known))}"
        return f"unknown key {name}; {hint}"
    context = {
        key: f"{value:g}" if isinstance(value, float) else str(value).replace("'", "").replace(" or ", ", ")
        for key, value in error.get("ctx", {}).items()
    }
    expected = _EXPECTED[error["type"]].format(**context) if error["type"] in _EXPECTED else error["msg"]
    found = error["input"]
    return f"{name}: expected {expected}, found {found!r} ({type(found).__name__})"


def _section(hint: Any, keys: Sequence[str | int]) -> Any:
    """The dataclass at ``keys`` below ``hint``."""
    for key in keys:
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint)[str(key)]
        else:
            hint = typing.get_args(hint)[0 if isinstance(key, int) else 1]
    return hint


def as_plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready data (tuples become lists)."""
    plain: dict[str, Any] = _adapter(type(config)).dump_python(config, mode="json", warnings=False)
    return plain


def _with_preset(cls: type[Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Put the preset's fields under those of the YAML, so that an explicit field wins."""
    signals = tree.get("signals")
    if cls is not CacheConfig or not isinstance(signals, dict):
        return tree
    preset = signals.get("preset", SignalsConfig.preset)
    if preset not in PRESETS:
        raise ConfigError(f"signals.preset: {preset!r} is none of {', '.join(PRESETS)}")
    return {**tree, "signals": {**PRESETS[preset], **signals}}


def _put(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {key} is not a section")
    tree[keys[-1]] = value
