"""Settings of phase one, and the YAML loader that both phases share.

A setting reaches the code in one order: the dataclass's default, then the YAML file, then ``--set a.b=c``. Sections
whose fields change what the cache holds (``data``, ``teacher``, ``generation``, ``signals``) enter the fingerprint;
``speed`` does not, so that a run can be resumed with another batch size or on another number of GPUs.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from teacher_cache.errors import ConfigError as ConfigError

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

    path: str | tuple[str, ...] = ""
    image_folder: str = ""
    regenerate: Literal["all", "none", "ids"] = "all"
    regenerate_ids: str = ""
    """With ``regenerate: ids``: a text file, one sample_id a line; all other samples keep their answers."""
    regenerate_share: float = 1.0
    """Part of the samples that ``regenerate`` picks, chosen by a digest of their ids; the others keep their answers."""
    history: Literal["teacher", "original"] = "teacher"
    """Whose earlier answers stand before a later question of the same conversation."""
    duplicate_ids: Literal["error", "number"] = "error"
    """LLaVA's 665K mix repeats ids; ``number`` renames the second ``x`` to ``x#2``."""
    max_samples: int = 0
    """0 caches all of them."""


@dataclass(frozen=True)
class TeacherConfig:
    model: str = ""
    revision: str = ""
    backend: Literal["auto", "torch", "vllm"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    template: str = "vicuna_v1"
    image_mode: Literal["pad", "crop"] = "pad"
    """``pad``: to a square with the mean colour, as LLaVA-1.5; ``crop``: the Hugging Face processor's default."""
    max_length: int = 2048
    """Tokens of a whole conversation, image tokens counted; a longer sample is skipped with its length. Torch counts no
    further than the model's own positions; vLLM refuses to start where they are too few for the samples."""
    answerer: str = ""
    """A student (folder or hub name, same tokenizer) that writes the new answers in the teacher's place; the teacher
    scores them. LLAVADI's "data from student"."""
    trust_remote_code: bool = False
    quantization: str = ""
    """A quantisation name that the backend knows (``awq``, ``gptq``, ``bitsandbytes``); empty for none."""


@dataclass(frozen=True)
class GenerationConfig:
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    """With temperature > 0 each answer is drawn from a generator seeded by (seed, sample_id, turn)."""


@dataclass(frozen=True)
class SignalsConfig:
    """What is stored for each answer token (row), text position and image."""

    preset: Literal["small", "compact", "standard", "full", "llava_kd"] = "standard"
    top_k: int = 64
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0, 2.0, 4.0)
    """The log-sum-exp is stored at each of these, so top-k and tail mass are exact there."""
    hidden: Literal["none", "rows", "text"] = "rows"
    second_last: bool = False
    """Also the states before the last layer (LLAVADI, table 1: "last two layers")."""
    codec: Literal["float32", "float16", "bfloat16", "int8", "int4"] = "int8"
    """``float32`` keeps a float32 teacher's states exactly, for tests of offline against online."""
    pca: int = 0
    """Keep this many principal components of the hidden states before the codec; 0 keeps all."""
    calibration_samples: int = 64
    """Samples on which channel scales (int8, int4) and principal components are fitted."""
    sampled: int = 0
    """Random Sampling KD: this many draws with replacement a row (Anshumann et al., ACL 2025); 0 stores none."""
    sampled_from: Literal["all", "tail"] = "all"
    """``tail`` draws outside the top-k only: exact head + unbiased tail."""
    visual: Literal["none", "states", "topk", "gram"] = "none"
    """Per distinct image: final-layer states, a top-k of the logits, or the relation Gram (LLaVA-KD) alone."""
    visual_top_k: int = 32
    attention: bool = False
    """Attention of answer rows over the image positions in the last layer, mean over heads (LLAVADI, table 3)."""


@dataclass(frozen=True)
class LayoutConfig:
    shard_samples: int = 512
    chunk_kilobytes: int = 1024
    compression: Literal["none", "zstd"] = "none"


@dataclass(frozen=True)
class SpeedConfig:
    """Nothing here enters the fingerprint: a cache may be finished on another machine or with another batch size.

    With the same ``speed``, libraries and kind of machine a resumed cache is the same byte for byte. Batch sizes
    (``answer_batch``, ``score_batch_tokens``, ``head_rows``) change the last bits of the teacher's sums, so of
    ``stats`` and states; an id changes only where two tie to the rounding of the teacher's dtype.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    answer_batch: int = 32
    score_batch_tokens: int = 16384
    head_rows: int = 2048
    """Rows whose logits (rows × vocabulary, float32) exist at once."""
    gpu_memory_share: float = 0.9
    tensor_parallel: int = 1
    loader_threads: int = 4


@dataclass(frozen=True)
class CacheConfig:
    """Phase one, whole."""

    output: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    signals: SignalsConfig = field(default_factory=SignalsConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)


ConfigT = TypeVar("ConfigT")


def load_config(cls: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` (YAML) over the defaults of ``cls``, then apply ``a.b=c`` overrides, left to right.

    Raises
    ------
    ConfigError
        naming the file, the key and the nearest key that exists, or the type that was expected.
    """
    tree: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
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
        _put(tree, key.split("."), yaml.safe_load(text), override)
    return build_config(cls, _with_preset(cls, tree), where)


def build_config(cls: type[ConfigT], tree: Mapping[str, Any], where: str, prefix: str = "") -> ConfigT:
    """Make the dataclass ``cls`` from plain data; unknown keys and wrong types are a :class:`ConfigError`."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {name}; {hint}")
        values[key] = _parse(hints[key], value, where, name)
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {prefix.rstrip('.') or cls.__name__}: {error}") from error


def as_plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON-ready data (tuples become lists)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return as_plain(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


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


def _parse(hint: Any, value: Any, where: str, name: str) -> Any:
    """``value`` as the annotated type ``hint``; ints pass as floats, lists as tuples, nothing else is bent."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {name}: expected a section, found {value!r}")
        return build_config(typing.cast(type[Any], hint), value, where, f"{name}.")
    if origin in (typing.Union, types.UnionType):
        return _parse_union(arguments, value, where, name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {name}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: {name}: expected a list, found {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_parse(arguments[0], v, where, f"{name}[{i}]") for i, v in enumerate(value))
        return tuple(_parse(a, v, where, f"{name}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {name}: expected a mapping, found {value!r}")
        return {str(k): _parse(arguments[1], v, where, f"{name}.{k}") for k, v in value.items()}
    return _parse_scalar(hint, value, where, name)


def _parse_union(arguments: tuple[Any, ...], value: Any, where: str, name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    errors = []
    for argument in arguments:
        try:
            return _parse(argument, value, where, name)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(errors[-1])


def _parse_scalar(hint: Any, value: Any, where: str, name: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{where}: {name}: expected a number, found {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and value is None:
        return ""
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: {name}: expected {hint.__name__}, found {value!r} ({type(value).__name__})")
    return value
