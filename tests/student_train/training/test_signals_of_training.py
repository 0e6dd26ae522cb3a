"""SIGINT, SIGTERM and SIGHUP end training commands and whatever they started, with a sentence and a checkpoint."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from student_train.config import FitConfig
from student_train.training.trainer import fit
from teacher_cache.config import as_plain
from tests.fixtures.training import kept, tiny_fit, weights

ROOT = Path(__file__).parents[3]
LONG = {"max_steps": 100_000, "checkpoint_every": 0, "log_every": 1}


def started(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams, **options)  # type: ignore[call-overload]


def written(config: FitConfig) -> Path:
    path = Path(f"{config.output}.yaml")
    path.write_text(yaml.safe_dump(as_plain(config)), encoding="utf-8")
    return path


def wait_for_steps(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the log has a line: the run is in its steps."""
    log = folder / "log.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]


def living(mark: str) -> Iterator[int]:
    """Processes with ``mark`` in their command line."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes().decode(errors="replace"):
                yield int(entry.name)
        except OSError:
            continue


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_fit_ends_with_a_sentence_a_checkpoint_and_its_status_and_goes_on(
    tmp_path: Path, cache_folder: Path, world: Path, number: signal.Signals
) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, "stopped", **LONG)
    process = started("student_train.cli", "fit", str(written(config)))
    wait_for_steps(process, Path(config.output))
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, error
    sentences = [line for line in error.splitlines() if "stopped by" in line]
    assert len(sentences) == 1
    assert sentences[0].startswith(f"stopped by {number.name}. Step ")
    assert "Traceback" not in error
    assert not (Path(config.output) / "model").exists()
    (checkpoint,) = kept(config)
    step = json.loads((Path(config.output) / "checkpoints" / checkpoint / "state.json").read_text())["step"]
    logged = [json.loads(line)["step"] for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, step + 1))


def test_a_stopped_run_goes_on_to_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, cache_folder: Path, world: Path
) -> None:
    settings = {"max_steps": 60, "checkpoint_every": 0, "log_every": 1}
    whole, stopped = (tiny_fit(tmp_path, cache_folder, world, name, **settings) for name in ("whole", "stopped"))
    process = started("student_train.cli", "fit", str(written(stopped)))
    wait_for_steps(process, Path(stopped.output))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    for config in (whole, stopped):
        fit(config, "quiet")
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(stopped).items())


@pytest.mark.slow
def test_a_rank_that_is_told_to_end_ends_all_with_one_checkpoint(
    tmp_path: Path, cache_folder: Path, world: Path
) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, "ranks", **LONG)
    path = written(config)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "student_train.cli")
    process = started(*torchrun, "fit", str(path))
    wait_for_steps(process, Path(config.output))
    ranks = [pid for pid in living(str(path)) if pid != process.pid]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert "Step " in error
    assert len(kept(config)) == 1
    assert not list(living(str(path)))


@pytest.mark.parametrize(
    "launcher", [pytest.param("torch.distributed.run", marks=pytest.mark.slow), "accelerate.commands.launch"]
)
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path, cache_folder: Path, world: Path, launcher: str) -> None:
    config = tiny_fit(tmp_path, cache_folder, world, "orphans", **LONG)
    path = written(config)
    options = ("--nproc-per-node", "1") if launcher.startswith("torch") else ("--cpu", "--num_processes", "1")
    process = started(launcher, *options, "-m", "student_train.cli", "fit", str(path))
    wait_for_steps(process, Path(config.output))
    process.kill()
    process.communicate(timeout=120)  # returns when the last process that holds the pipe is gone
    assert len(kept(config)) == 1
    assert not list(living(str(path)))


@pytest.fixture
def ablation(tmp_path: Path, cache_folder: Path, world: Path) -> Path:
    config = tiny_fit(tmp_path, cache_folder, world, "unused", **LONG)
    plain = as_plain(config)
    base = {name: plain[name] for name in ("sources", "student", "losses", "train")}
    tree = {"output": str(tmp_path / "out"), "base": base, "arms": {"a": {}, "b": {}}, "seeds": [0], "workers": 1}
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_ablate_alone_ends_its_runs_with_their_checkpoints(
    ablation: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = started("student_train.cli", "ablate", str(ablation))
    run = tmp_path / "out/runs/a-seed0"
    wait_for_steps(process, run)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number, error
    assert f"stopped by {number.name}. 0 of 2 runs are done" in error
    assert "Traceback" not in error
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    assert f"stopped by {number.name}. Step " in (run / "output.txt").read_text()
    assert not (tmp_path / "out/runs/b-seed0/log.jsonl").exists()
    assert not list(living(str(tmp_path)))


@pytest.mark.slow
def test_a_run_does_not_outlive_a_killed_ablate(ablation: Path, tmp_path: Path) -> None:
    process = started("student_train.cli", "ablate", str(ablation))
    run = tmp_path / "out/runs/a-seed0"
    wait_for_steps(process, run)
    (child,) = [pid for pid in living(str(run)) if pid != process.pid]
    handle = os.pidfd_open(child)
    process.kill()
    process.communicate(timeout=120)
    assert select.select([handle], [], [], 120)[0], "the run went on without its parent"
    os.close(handle)
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
