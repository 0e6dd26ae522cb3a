"""Checkpoints without pickle: tensors in safetensors, the rest in JSON, committed by a rename.

The order of the data is a function of the step, so a checkpoint is the weights, the optimiser's state and one number.
States are gathered whole and saved by rank 0, so a run can go on with another number of ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from teacher_cache.manifest import CacheError

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_LOAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False, strict=False, ignore_frozen_params=True)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, facts: dict[str, Any], main: bool) -> None:
    """``folder/step-00000020``: every rank must call it; only the ``main`` one writes. The previous one is removed
    after the new one is complete."""
    weights, state = cast("tuple[dict[str, Any], dict[str, Any]]", get_state_dict(model, optimizer, options=_FULL))
    if not main:
        return
    target = folder / f"step-{facts['step']:08d}"
    if target.is_dir():  # the last step's, when a run is finished again
        return
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, temporary / "weights.safetensors")
    tensors, plain = _flatten(state["state"])
    save_file(tensors, temporary / "optimizer.safetensors")
    text = json.dumps({**facts, "optimizer": plain, "groups": state["param_groups"]}, sort_keys=True)
    (temporary / "state.json").write_text(text, encoding="utf-8")
    temporary.rename(target)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, frozen ones too, on the CPU of rank 0 (nothing on the others); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


def latest_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, fingerprint: str) -> dict[str, Any]:
    """Put weights and optimiser back and return the facts saved beside them.

    Raises
    ------
    CacheError
        The checkpoint belongs to a run with other settings or another cache.
    """
    facts: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if facts["fingerprint"] != fingerprint:
        raise CacheError(
            f"{path}: a checkpoint of a run with other settings or another cache (fingerprint "
            f"{facts['fingerprint'][:12]}, expected {fingerprint[:12]}). Choose another output, or delete the folder"
        )
    state = _unflatten(load_file(path / "optimizer.safetensors"), facts["optimizer"])
    set_state_dict(
        model,
        optimizer,
        model_state_dict=load_file(path / "weights.safetensors"),
        optim_state_dict={"state": state, "param_groups": facts["groups"]},
        options=_LOAD,
    )
    return facts


def _flatten(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the rest of a tree of dictionaries, by their path (8-bit optimisers nest a level deeper)."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            below = _flatten(value, f"{prefix}{name}|")
            tensors, plain = tensors | below[0], plain | below[1]
        elif isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.contiguous().clone()
        else:
            plain[prefix + name] = value
    return tensors, plain


def _unflatten(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for path, value in {**tensors, **plain}.items():
        *parents, name = path.split("|")
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return state
