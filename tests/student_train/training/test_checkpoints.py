"""Checkpoints: complete or not there, believed only with their digests, two of them, and of this model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from student_train.training import checkpoint
from student_train.training.checkpoint import KEPT, fault, load_checkpoint, newest_sound, save_checkpoint
from student_train.training.trainer import fit
from teacher_cache.errors import CacheError
from tests.fixtures.training import kept, tiny_fit, weights

SETTINGS = {"train": {"seed": 0}}


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A frozen layer and a trained one, after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int) -> None:
    model, optimizer = small()
    model[1].weight.data.fill_(step)
    save_checkpoint(folder, model, optimizer, {"step": step, "settings": SETTINGS}, True)


def go_on(folder: Path, notes: list[str] | None = None) -> int:
    """The step of the checkpoint that a run goes on from; its weights and moments are back."""
    path = newest_sound(folder, True, (notes if notes is not None else []).append)
    assert path is not None
    model, optimizer = small()
    step = int(load_checkpoint(path, model, optimizer, SETTINGS)["step"])
    assert bool((model[1].weight == step).all())
    assert all(state["exp_avg"].abs().sum() > 0 for state in optimizer.state.values())
    return step


OPERATIONS = [
    *((checkpoint, name) for name in ("save_file", "_digest", "flush")),
    *((Path, name) for name in ("mkdir", "write_text", "rename")),
    *((os, name) for name in ("unlink", "rmdir")),
]


def dying_at(count: int, work: Callable[[], None]) -> int:
    """``work`` in a child that ends by ``kill -9`` before its ``count``-th operation on files; the status it had."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done = 0

    def dies_before(operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return counted

    for place, name in OPERATIONS:
        setattr(place, name, dies_before(getattr(place, name)))
    work()
    os._exit(0)


def test_a_run_killed_at_any_moment_of_writing_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    """Before every single operation on files; the checkpoint before is there until the new one is, and
    an older one is whole or gone."""
    steps = []
    for count in range(1, 100):
        folder = tmp_path / str(count)
        for step in (10, 20):
            save(folder, step)
        status = dying_at(count, lambda folder=folder: save(folder, 30))  # type: ignore[misc]
        notes: list[str] = []
        steps.append(go_on(folder, notes))
        assert not notes
        assert not [path.name for path in folder.glob("step-*") if fault(path)]
        save(folder, 30)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (20, 30)
    assert len(steps) > 12


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert KEPT == 2


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": changed,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "files.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_with_a_sentence(
    tmp_path: Path, name: str, damage: str
) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    DAMAGE[damage](tmp_path / "step-00000020" / name)
    notes: list[str] = []
    assert go_on(tmp_path, notes) == 10
    assert len(notes) == 1
    assert f"{tmp_path / 'step-00000020'}: damaged: " in notes[0]
    assert notes[0].endswith("Going on from the one before, step-00000010")
    save(tmp_path, 20)  # the run comes there again
    assert go_on(tmp_path) == 20


def test_a_run_with_damaged_checkpoints_only_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 10)
    changed(tmp_path / "step-00000010" / "weights.safetensors")
    with pytest.raises(CacheError, match=r"weights.safetensors is not the file that was written .* Delete .* anew"):
        newest_sound(tmp_path, True, print)
    assert newest_sound(tmp_path / "none", True, print) is None


@pytest.mark.parametrize("lost", ["weights", "optimizer"])
def test_a_checkpoint_of_another_model_is_refused_even_with_good_digests(tmp_path: Path, lost: str) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, 10)
    path = tmp_path / "step-00000010"
    tensors = load_file(path / f"{lost}.safetensors")
    name = next(n for n in tensors if n.startswith("1.weight") and not n.endswith("|step"))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path / f"{lost}.safetensors")
    digests = {n: checkpoint._digest(path / n) for n in json.loads((path / "files.json").read_text())}
    (path / "files.json").write_text(json.dumps(digests))
    assert fault(path) == ""
    with pytest.raises(CacheError, match=r"another model: 1\.weight has shape \(2, 4\) in the student"):
        go_on(tmp_path)


def test_a_run_goes_on_from_the_one_before_to_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, cache_folder: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 4, "checkpoint_every": 1}
    whole, damaged = (tiny_fit(tmp_path, cache_folder, world, name, **settings) for name in ("whole", "damaged"))
    for config in (whole, damaged):
        fit(config, "quiet")
    assert kept(damaged) == ["step-00000003", "step-00000004"]
    shutil.rmtree(Path(damaged.output) / "model")
    changed(Path(damaged.output) / "checkpoints/step-00000004/weights.safetensors")
    fit(damaged, "lines")
    assert "step-00000004: damaged: weights.safetensors" in capsys.readouterr().err
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(damaged).items())
