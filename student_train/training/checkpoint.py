"""Checkpoints without pickle: tensors in safetensors, the rest in JSON, committed by a rename.

The order of the data is a function of the step, so a checkpoint is the weights, the optimiser's state and one number.
States are gathered whole and saved by rank 0, so a run can go on with another number of ranks.

A checkpoint is a folder ``step-00000020``. It is written under another name, every file is flushed to the disk, a file
of digests (``files.json``) last, and then the folder is renamed; it loses the name before it is removed: there is no
moment at which half of one has it.
It is believed only when every file has its digest; a damaged newest one gives way to the one before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from student_train.training.settings import differences
from teacher_cache.errors import CacheError
from teacher_cache.files import flush

KEPT = 2
"""Checkpoints of a run: the newest, and the one before in case that the newest is damaged."""
WEIGHTS, OPTIMIZER, STATE, DIGESTS = "weights.safetensors", "optimizer.safetensors", "state.json", "files.json"

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_OWN = StateDictOptions(ignore_frozen_params=True)
_LOAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False, strict=False, ignore_frozen_params=True)


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, facts: dict[str, Any], main: bool) -> Path:
    """``folder/step-00000020``: every rank must call it; only the ``main`` one writes. All but the last :data:`KEPT`
    are removed after the new one is complete."""
    weights, state = cast("tuple[dict[str, Any], dict[str, Any]]", get_state_dict(model, optimizer, options=_FULL))
    target = folder / f"step-{facts['step']:08d}"
    if not main:
        return target
    if fault(target):  # sound already: the last step's, when a run is finished again
        _write(target, weights, {**facts, "groups": state["param_groups"]}, state["state"])
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        old.rename(_unnamed(old))  # a folder that is removed file by file would be half of one under its name
    for left in folder.glob(_unnamed(folder / "step-*").name):
        shutil.rmtree(left)
    return target


def _unnamed(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _write(target: Path, weights: dict[str, torch.Tensor], facts: dict[str, Any], state: dict[str, Any]) -> None:
    temporary = _unnamed(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.contiguous().clone() for k, v in weights.items()}, temporary / WEIGHTS)
    tensors, plain = _flatten(state)
    save_file(tensors, temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps({**facts, "optimizer": plain}, sort_keys=True), encoding="utf-8")
    digests = {name: _digest(temporary / name) for name in (WEIGHTS, OPTIMIZER, STATE)}
    (temporary / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for name in (*digests, DIGESTS, "."):
        flush(temporary / name)
    shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
    temporary.rename(target)
    flush(target.parent)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, frozen ones too, on the CPU of rank 0 (nothing on the others); every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest one, sound or not."""
    found = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return found[-1] if found else None


def newest_sound(folder: Path, main: bool, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files have their digests; None where there is none at all. The ``main`` rank looks,
    the others hear what it found. ``note`` gets a sentence for each damaged one that is passed over.

    Raises ``CacheError``: there are checkpoints, and all are damaged.
    """
    answer: list[Any] = [None, []]
    if main:
        for path in sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []:
            if not (wrong := fault(path)):
                answer[0] = str(path)
                break
            answer[1].append(f"{path}: {wrong}")
    found, faults = broadcast_object_list(answer)
    if found is None and faults:
        raise CacheError(
            f"{'; '.join(faults)}. No checkpoint of this run is sound. Delete {folder} to begin anew, or restore it"
        )
    for damaged in faults:
        note(f"{damaged}. Going on from the one before, {Path(found).name}")
    return None if found is None else Path(found)


def fault(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty where all have their digests."""
    try:
        digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
        wrong = [name for name in (WEIGHTS, OPTIMIZER, STATE) if _digest(path / name) != digests.get(name)]
    except FileNotFoundError as error:
        return f"damaged: {Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        return f"damaged: {DIGESTS} is no list of digests"
    return f"damaged: {wrong[0]} is not the file that was written (its digest differs)" if wrong else ""


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put weights and optimiser of a sound checkpoint back and return the facts saved beside them.

    Raises ``CacheError``: the checkpoint belongs to a run with other settings, another cache or another model.
    """
    facts: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    if other := differences(facts["settings"], settings):
        raise CacheError(
            f"{path}: a checkpoint of a run with other settings or another cache: {'; '.join(other)}. Set them back, "
            "choose another output, or delete the folder"
        )
    weights, tensors = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    _check_tensors(path, model, weights, tensors)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=cast(dict[str, Any], weights),
        optim_state_dict={"state": _unflatten(tensors, facts["optimizer"]), "param_groups": facts["groups"]},
        options=_LOAD,
    )
    return facts


def _check_tensors(
    path: Path, model: nn.Module, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> None:
    """Frozen weights are in no checkpoint, so that nothing may be missing among the others."""
    own = cast(dict[str, torch.Tensor], get_model_state_dict(model, options=_OWN))
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    moments = {n.split("|")[0]: tuple(t.shape) for n, t in state.items() if n.rpartition("|")[2] == "exp_avg"}
    for name in sorted(wanted.keys() | found.keys() | moments.keys()):
        have = found.get(name), moments.get(name, wanted.get(name))
        if have != (wanted.get(name), wanted.get(name)):
            raise CacheError(
                f"{path}: a checkpoint of another model: {name} has shape {wanted.get(name, 'none')} in the student, "
                f"{found.get(name, 'none')} in the checkpoint. Choose another output, or delete the folder"
            )


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
