"""What a run stands on: processes and precision (Accelerate), the optimiser, the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from student_train.config import FitConfig, TrainConfig
from student_train.losses.catalogue import Answers, Logits
from teacher_cache.config import as_plain
from teacher_cache.errors import ConfigError
from teacher_cache.terminal import without_secrets_in


def make_accelerator(config: FitConfig) -> Accelerator:
    """One process, DDP or FSDP, as ``torchrun`` or ``accelerate launch`` started us.

    Parameters that no loss reaches (the end of a trained tower, the output head without a loss on it) must be looked
    for by DDP; elsewhere there are none, and looking costs a pass over the graph. Accelerate keeps the precision of the
    first run in a process for all; a later stage has its own.

    Raises ``ConfigError``: float16 without a GPU.
    """
    head = any(isinstance(loss.entry, (Answers, Logits)) for loss in config.losses)
    unused = config.student.train_vision or not head
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)]
    AcceleratorState._reset_state()
    precision = computed_in(config)
    if precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError(
            "float16 products need a GPU (their gradients are scaled there), and none was found. Set "
            "student.dtype=bfloat16 or float32, and train.mixed_precision=auto"
        )
    return Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),  # unless told so, Accelerate overlooks torchrun on a CPU
        log_with=config.train.tracker or None,
        project_dir=config.output,
        kwargs_handlers=handlers,
    )


def computed_in(config: FitConfig) -> str | None:
    """Accelerate's name of the numbers in which products are formed; None leaves it to ``accelerate launch``."""
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(config.student.dtype)
    precision = config.train.mixed_precision
    return half or (None if precision == "auto" else precision)


def check_tracker(name: str) -> None:
    """Refuse a tracker that would track nothing: Accelerate leaves out, with a warning, what is not installed.

    Raises ``ConfigError``.
    """
    known = sorted(str(kind) for kind in LOGGER_TYPE_TO_CLASS)
    if name and name not in known:
        raise ConfigError(f"train.tracker: expected one of {', '.join(known)}, found {name!r}")
    if name and name not in [str(kind) for kind in get_available_trackers()]:
        package = name.replace("_", "-")
        raise ConfigError(
            f"train.tracker={name} needs {package}. Install it (pip install {package}), or set train.tracker=''"
        )


def start_tracker(accelerator: Accelerator, config: FitConfig) -> None:
    """Tell the tracker, if there is one, the settings of the run; no password among them."""
    if config.train.tracker:
        settings = without_secrets_in(as_plain(config))
        flat = {f"{part}.{name}": v for part in ("student", "train") for name, v in settings[part].items()}
        name = Path(config.output).name
        accelerator.init_trackers(name, {name: v for name, v in flat.items() if not isinstance(v, list)})


def make_optimizer(
    student: nn.Module, train: TrainConfig, projectors: Sequence[str] = (), fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW over what needs a gradient; the multimodal projector (``projectors``: names of its modules and parameters
    in the model) may have a rate of its own, as in LLaVA.

    ``fused``: one kernel for all weights, for a GPU, where torch's other way needs room for a copy of them (11 GB of a
    2.7B student) in every step.
    """
    own = tuple(f"model.{name}." for name in projectors)
    trained = [(f"{name}.", p) for name, p in student.named_parameters() if p.requires_grad]
    projector = [p for name, p in trained if name.startswith(own)]
    rest = [p for name, p in trained if not name.startswith(own)]
    rate = train.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": rate, "base_lr": rate},
        {"params": projector, "lr": rate, "base_lr": train.projector_learning_rate or rate},
    ]
    groups = [g for g in groups if g["params"]]
    if train.optimizer == "adamw_8bit":
        try:
            import bitsandbytes.optim as quantized
        except ImportError as error:
            raise ConfigError(
                "train.optimizer=adamw_8bit needs bitsandbytes. Install it (pip install bitsandbytes), or set "
                "train.optimizer=adamw"
            ) from error
        return quantized.AdamW8bit(groups, lr=rate, betas=train.betas, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=train.betas, weight_decay=train.weight_decay, fused=fused or None)
