"""Fits that get ``kill -9`` while they compute features, train and write checkpoints; flipped bits in what they keep.

Half of the fits die at a random moment, half at a random file operation. After each, every checkpoint and every folder
of features that has its final name is whole, none that was there is lost without a newer one, and a run that reaches
its end has the uninterrupted one's weights, byte for byte. Between two runs a bit of the newest checkpoint may flip:
that is found, and the one before is gone on from.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos_builds import Stage
from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig, TrainConfig
from student_train.feed import features
from student_train.feed.features import ImageFeatures
from student_train.training import checkpoint, trainer
from student_train.training.checkpoint import DIGESTS, OPTIMIZER, STATE, WEIGHTS, fault, newest_sound
from student_train.training.trainer import fit
from teacher_cache.errors import DataError

STEPS = 8


@dataclass
class FitStage:
    """The uninterrupted run and its weights; every other run reads the same cache and the same untrained student."""

    folder: Path
    config: FitConfig
    weights: bytes
    random: random.Random
    seconds: float

    @classmethod
    def make(cls, stage: Stage) -> FitStage:
        folder = stage.folder / "fits"
        write_student(folder / "student", teacher=TEACHER, seed=0)
        config = FitConfig(
            output=str(folder / "whole/run"),
            sources=(SourceConfig(cache=stage.config.output, image_folder=stage.config.data.image_folder),),
            student=StudentConfig(model=str(folder / "student"), vision_features="cache"),
            losses=(LossSpec("cross_entropy"), LossSpec("forward_kl")),
            train=TrainConfig(
                max_steps=STEPS, global_batch=4, micro_batch=4, learning_rate=1e-3, checkpoint_every=1, threads=1
            ),
        )
        begin = time.monotonic()
        _in_a_process(config, 0)
        return cls(folder, config, weights_of(config), stage.random, time.monotonic() - begin)

    def named(self, name: str) -> FitConfig:
        """The same run elsewhere; features lie beside a run, so each has a folder for both."""
        return replace(self.config, output=str(self.folder / name / "run"))


def weights_of(config: FitConfig) -> bytes:
    return (Path(config.output) / "model/model.safetensors").read_bytes()


def killed_fits(stage: FitStage, runs: int) -> str:
    """``runs`` fits that are killed; raises ``AssertionError`` at the first broken promise."""
    config, killed, finished, flipped, resumed = stage.named("killed"), 0, 0, 0, set[int]()
    checkpoints = Path(config.output) / "checkpoints"
    while killed < runs:
        before, damaged = _sound_and_damaged(checkpoints)
        if len(before) > 1 and stage.random.random() < 0.3:
            damaged.append(before.pop())
            _flip(stage, checkpoints / f"step-{damaged[-1]:08d}")
            flipped += 1
        resumed.add(before[-1] if before else 0)
        if _run(stage, config):
            assert weights_of(config) == stage.weights, "a finished run has other weights than the uninterrupted one"
            finished += 1
            shutil.rmtree(Path(config.output).parent)
            continue
        killed += 1
        _check_kept(checkpoints, before, damaged)
    if not (Path(config.output) / "model").exists():
        _in_a_process(config, 0)
        finished += 1
    assert weights_of(config) == stage.weights, "the run that went on to its end has other weights"
    return (
        f"fits: {killed} killed, {finished} reached their end, all with the uninterrupted run's weights byte for byte; "
        f"gone on from {len(resumed)} different steps; {flipped} times a bit of the newest checkpoint had flipped"
    )


def _check_kept(checkpoints: Path, before: list[int], flipped: list[int]) -> None:
    """``before``, ``flipped``: the steps of the sound ones, and of those with a flipped bit, when the run began."""
    sound, damaged = _sound_and_damaged(checkpoints)
    assert set(damaged) <= set(flipped), f"half written: steps {damaged}, of which a bit was flipped in {flipped}"
    assert not before or sound[-1] >= before[-1], f"step {before[-1]} was saved, and now it is {sound[-1:]}"
    for path in checkpoints.parents[1].glob("vision-features-*"):
        found = ImageFeatures(path)
        found.read(list(found._line))


def _sound_and_damaged(checkpoints: Path) -> tuple[list[int], list[int]]:
    """Their steps, in order."""
    found: tuple[list[int], list[int]] = [], []
    for path in sorted(checkpoints.glob("step-*")):
        found[bool(fault(path))].append(int(path.name.removeprefix("step-")))
    return found


def _run(stage: FitStage, config: FitConfig) -> bool:
    """Whether a run that is to be killed reached its end nevertheless."""
    if stage.random.random() < 0.5:
        return _in_a_process(config, stage.random.randrange(1, 150)) == 0
    return _in_a_process(config, 0, stage.random.uniform(0, 1.1 * stage.seconds)) == 0


def _in_a_process(config: FitConfig, operation: int, seconds: float | None = None) -> int:
    """Status of a forked ``fit``, killed after ``seconds`` or at its n-th ``operation`` on files (0: not)."""
    process = multiprocessing.get_context("fork").Process(target=_fit, args=(config, operation))
    process.start()
    process.join(seconds)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    status = process.exitcode
    assert status == 0 or (status == -signal.SIGKILL and (operation or seconds is not None)), f"it ended with {status}"
    return status


def _fit(config: FitConfig, operation: int) -> None:
    small_batches()
    left = [operation]
    if operation:
        for owner, names in (
            (checkpoint, ("save_file", "_digest", "flush")),
            (features.google_crc32c, ("value",)),
            (Path, ("mkdir", "write_text", "rename")),
            (os, ("unlink", "rmdir")),
        ):
            for name in names:
                setattr(
                    owner,
                    name,
                    partial(_deadly, left, getattr(owner, name)) if owner is not Path else _method(left, name),
                )
    fit(config, "quiet")


def small_batches() -> None:
    """Features come in many pieces, so that a run can end between two of them."""
    trainer.compute_features = partial(features.compute_features, batch=2)  # type: ignore[attr-defined]


def _deadly(left: list[int], function: Any, *arguments: Any, **options: Any) -> Any:
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)


def _method(left: list[int], name: str) -> Any:
    function = getattr(Path, name)
    return lambda self, *arguments, **options: _deadly(left, function, self, *arguments, **options)


def flipped_checkpoints(stage: FitStage, count: int) -> str:
    """A bit of the newest of two checkpoints: found, and the one before is what a run goes on from."""
    checkpoints = stage.folder / "flipped"
    shutil.copytree(Path(stage.config.output) / "checkpoints", checkpoints)
    before, newest = sorted(checkpoints.glob("step-*"))
    for _ in range(count):
        path, whole = _flip(stage, newest)
        notes: list[str] = []
        assert newest_sound(checkpoints, True, notes.append) == before, f"{path}: a flipped bit is not found"
        assert "damaged" in notes[0]
        path.write_bytes(whole)
    assert newest_sound(checkpoints, True, print) == newest
    shutil.rmtree(checkpoints)
    return f"checkpoints: {count} of {count} flipped bits found, and the one before taken each time"


def _flip(stage: FitStage, folder: Path) -> tuple[Path, bytes]:
    """Flip one bit of one file; which, and what it held."""
    path = stage.random.choice([folder / name for name in (WEIGHTS, OPTIMIZER, STATE, DIGESTS)])
    whole = path.read_bytes()
    place, bit = stage.random.randrange(len(whole)), 1 << stage.random.randrange(8)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    return path, whole


def flipped_features(stage: FitStage, count: int) -> str:
    """A bit of the kept features of images: refused, or what is read is what was written. Every other flip hits what
    describes them (names, checksums, the array's header), which is small and where it does most."""
    (folder,) = Path(stage.config.output).parent.glob("vision-features-*")
    whole = ImageFeatures(folder)
    keys = list(whole._line)
    wanted, refused = whole.read(keys), 0
    for number in range(count):
        path = stage.random.choice(sorted(folder.iterdir()))
        data = path.read_bytes()
        place = stage.random.randrange(min(len(data), 128) if number % 2 else len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << stage.random.randrange(8)]) + data[place + 1 :])
        try:
            found = ImageFeatures(folder).read(keys)
            assert found.dtype == wanted.dtype, f"{path.name}, byte {place}: read as data"
            assert torch.equal(found, wanted), f"{path.name}, byte {place}: read as data"
        except DataError:
            refused += 1
        path.write_bytes(data)
    return f"features: {refused} of {count} flipped bits met and refused, none returned as data"
