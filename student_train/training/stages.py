"""Several stages of training in one file, each with its own data and losses, the checkpoint handed on.

LLaVA's two stages (projector, then everything) and LLaVA-KD's three (distilled pre-training, supervised fine-tuning,
distilled fine-tuning) are such files. Every stage resumes by itself; a finished one is not run again, and one that was
begun with other settings, from other data or from another student is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from student_train.config import FitConfig, FitTree
from student_train.training.checkpoint import latest_checkpoint
from student_train.training.origin import Origin, changed, model_digest, sources_origin
from student_train.training.output import FitSummary, output_lock, read_json, write_json
from student_train.training.settings import deciding_settings
from student_train.training.trainer import fit
from teacher_cache.config import CHECKED, build_config, load_config
from teacher_cache.errors import ConfigError
from teacher_cache.progress import Style, note
from teacher_cache.stopping import Stop
from teacher_cache.store.manifest import digest


@dataclass(frozen=True)
class StagesConfig:
    """``stages``: name → a FitConfig tree over ``base``. Each stage's student is the one before it, its output a
    folder of that name in ``output``."""

    __pydantic_config__ = CHECKED
    output: str = ""
    """Folder of all stages."""
    base: FitTree = field(default_factory=dict)
    stages: dict[str, FitTree] = field(default_factory=dict)
    """By name, in the order in which they are trained."""


def fit_file(path: Path, overrides: Sequence[str], style: Style = "auto", stop: Stop | None = None) -> list[FitSummary]:
    """Train what the file describes: one stage, or all of ``stages`` in their order."""
    if "stages" not in sections(path):
        return [fit(load_config(FitConfig, path, overrides), style, stop)]
    config = load_config(StagesConfig, path, overrides)
    stages = stage_configs(config)
    with output_lock(config.output):
        return _fit_stages(stages, style, stop)


def _fit_stages(stages: Sequence[tuple[str, FitConfig]], style: Style, stop: Stop | None) -> list[FitSummary]:
    summaries: list[FitSummary] = []
    for name, config in stages:
        note(f"stage {name}: {', '.join(f'{loss.weight:g}·{loss.label}' for loss in config.losses)}", style)
        _check_begun(name, config)
        done = Path(config.output) / "summary.json"
        if done.is_file() and (Path(config.output) / "model").is_dir():
            summaries.append(FitSummary(**read_json(done)))
            continue
        summaries.append(fit(config, style, stop))
    return summaries


def stage_origin(config: FitConfig) -> Origin:
    """What decides the result of a stage: its settings, its data, and the student that it starts from."""
    student = config.student.model
    return {
        "settings": digest(deciding_settings(config)),
        **sources_origin(config.sources),
        f"student.model ({student})": model_digest(student),
    }


def _check_begun(name: str, config: FitConfig) -> None:
    """Record what the stage is made from (``origin.json``), or compare: once a step of it is kept, that must stand.

    Raises ``ConfigError``: it was begun with something else.
    """
    folder = Path(config.output)
    now, path = stage_origin(config), folder / "origin.json"
    if (folder / "summary.json").is_file() or latest_checkpoint(folder / "checkpoints") is not None:
        then = read_json(path) if path.is_file() else {}
        if other := changed(then, now):
            raise ConfigError(
                f"{folder}: stage {name} was begun with other {', '.join(other)}, or that was not recorded. Delete "
                "the folder, and those of the stages after it, to run it anew, or choose another output"
            )
        return
    write_json(path, now)


def sections(path: Path) -> set[str]:
    """The keys of a configuration file, by which one of stages (or of arms) is known."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return set()  # load_config says what is wrong with the file
    return set(tree) if isinstance(tree, dict) else set()


def stage_configs(config: StagesConfig) -> list[tuple[str, FitConfig]]:
    """(name, settings) of each stage; a later one starts from the model of the one before unless it names another."""
    if not config.output or not config.stages:
        raise ConfigError("a file with stages needs output and at least one stage")
    out: list[tuple[str, FitConfig]] = []
    previous = ""
    for name, tree in config.stages.items():
        merged = merge(config.base, tree)
        merged["output"] = str(Path(config.output) / name)
        if previous:
            student = {k: v for k, v in merged.get("student", {}).items() if k not in _ORIGIN}
            merged["student"] = {**student, "model": tree.get("student", {}).get("model", previous)}
        out.append((name, build_config(FitConfig, merged, f"stages.{name}")))
        previous = str(Path(merged["output"]) / "model")
    return out


_ORIGIN = ("model", "language_model", "vision_tower", "layers_from", "layers")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, everything else is replaced."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out
