"""A build that SIGINT, SIGTERM or SIGHUP ends keeps its shards, says so, and has a status that tells which."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig
from teacher_cache.stopping import SIGNALS, Stopped, handlers_kept, stopping
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.teacher_cache.build.test_build import contents

BUILD = """
import sys
from teacher_cache.build import shards
from teacher_cache.cli import app
score_shard = shards.score_shard
def stuck(build, number, *rest):
    if number == 2:
        print("in the third shard", flush=True)
        sys.stdin.read()
    return score_shard(build, number, *rest)
shards.score_shard = stuck
app(["build", sys.argv[1], "--json"])
"""


def test_handlers_that_a_library_puts_in_do_not_stay() -> None:
    with stopping():
        ours = signal.getsignal(signal.SIGTERM)
        with handlers_kept():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) == ours
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_build_that_is_stopped_keeps_its_shards_and_goes_on(
    number: int, tmp_path: Path, cache_config: CacheConfig, cache_folder: Path, teacher: TorchTeacher
) -> None:
    config = replace(cache_config, output=str(tmp_path / "cache"))
    path = tmp_path / "cache.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))), encoding="utf-8")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(path)], text=True, env=environment, **pipes)
    assert build.stdout is not None
    assert build.stdout.readline() == "in the third shard\n"
    build.send_signal(number)
    _, said = build.communicate()
    assert build.returncode == 128 + number, said
    assert f"stopped by {signal.Signals(number).name}; committed shards stand" in said
    assert "Traceback" not in said
    assert [p.parent.name for p in sorted((tmp_path / "cache/shards").glob("*/index.parquet"))][:1] == ["00000"]
    assert not (tmp_path / "cache/.lock").exists()
    build_cache(config, teacher=teacher, style="quiet")
    assert contents(tmp_path / "cache") == contents(cache_folder)
