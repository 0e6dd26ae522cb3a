"""An output has one writer: the second is refused and told who the first is, and no lock outlives its process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from student_train.studies.ablate import ablate
from student_train.studies.runs import AblationConfig, ArmConfig
from student_train.training.trainer import fit
from teacher_cache.build.build import answer_only, build_cache
from teacher_cache.config import CacheConfig
from teacher_cache.store.locks import LOCK, Holder, LockedError, locked
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.s3_server import S3Server
from tests.fixtures.training import tiny_fit


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path / "new" / "output")
    return Storage(f"{s3.bucket('locks-' + tmp_path.name.replace('_', '-').lower()[-40:])}/output", s3.options)


HOLD = """
import json, sys
from teacher_cache.store.storage import Storage
from teacher_cache.store.locks import locked
url, options = json.loads(sys.argv[1])
with locked(Storage(url, options)):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(output: Storage) -> subprocess.Popen[str]:
    """A process of its own that has the lock by the time this returns."""
    arguments = json.dumps([output.url, output.options])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_dies_with_it(output: Storage) -> None:
    holder = hold(output)
    with pytest.raises(LockedError, match=rf"process {holder.pid}, since 20\d\d-.*\(-c '\["), locked(output):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert output.exists(LOCK)
    with locked(output):
        assert json.loads(output.read(LOCK))["pid"] == os.getpid()
    assert not output.exists(LOCK)


def test_a_lock_is_free_again_when_its_holder_leaves(output: Storage) -> None:
    holder = hold(output)
    holder.communicate()
    with locked(output), pytest.raises(LockedError), locked(output):
        pass
    with locked(output):
        pass
    assert output.local is None or not output.local.parent.exists()  # made for the lock alone


def of_another(**fields: Any) -> bytes:
    return dataclasses.replace(Holder.me(), pid=2**22 + 1, token="other", **fields).bytes()


@pytest.mark.parametrize("name", ["host", "place"])
@pytest.mark.parametrize("value", ["node-17", ""])
def test_a_lock_of_another_host_or_container_is_broken_only_by_hand(s3: S3Server, name: str, value: str) -> None:
    output = Storage(f"{s3.bucket(f'other-{name}-{value}1')}/o", s3.options)
    output.write(LOCK, [of_another(**{name: value})])
    advice = r"process 4194305, .* is dead, run the same command with --break-lock"
    with pytest.raises(LockedError, match=advice), locked(output):
        pass
    with locked(output, break_lock=True):
        pass
    assert not output.exists(LOCK)


def test_who_lost_the_lock_object_does_not_remove_that_of_its_follower(s3: S3Server) -> None:
    output = Storage(f"{s3.bucket('follower')}/o", s3.options)
    with locked(output):
        output.write(LOCK, [of_another(host="node-17")])
    assert b"node-17" in output.read(LOCK)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"host": 1}'])
def test_a_lock_object_that_says_nothing_is_refused_all_the_same(s3: S3Server, text: bytes) -> None:
    output = Storage(f"{s3.bucket(f'silent-{len(text)}')}/o", s3.options)
    output.write(LOCK, [text])
    with pytest.raises(LockedError, match="does not say which"), locked(output):
        pass


def test_of_many_that_come_and_go_never_two_are_inside(tmp_path: Path) -> None:
    inside, worst, entered = [0], [0], [0]
    guard = threading.Lock()

    def visit() -> None:
        for _ in range(60):
            try:
                with locked(Storage(tmp_path / "o")):
                    with guard:
                        inside[0] += 1
                        entered[0] += 1
                        worst[0] = max(worst[0], inside[0])
                    with guard:
                        inside[0] -= 1
            except LockedError:
                pass

    threads = [threading.Thread(target=visit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1]
    assert entered[0] > 0


@pytest.mark.parametrize("what", ["build", "answer", "fit", "ablate"])
def test_what_writes_into_a_held_output_is_refused_before_it_begins(
    what: str, tmp_path: Path, cache_config: CacheConfig, cache_folder: Path, world: Path, teacher: TorchTeacher
) -> None:
    output = tmp_path / "held"
    config = replace(cache_config, output=str(output))
    missing = tiny_fit(tmp_path, tmp_path / "no-cache", world, name="held")
    study = AblationConfig(
        output=str(output), arms={"a": ArmConfig()}, base={"sources": [{"cache": "c"}], "student": {"model": "s"}}
    )
    run: Callable[[], object] = {
        "build": lambda: build_cache(config, teacher=teacher, style="quiet"),
        "answer": lambda: answer_only(config, "quiet"),
        "fit": lambda: fit(missing, "quiet"),
        "ablate": lambda: ablate(study, "quiet"),
    }[what]
    with locked(Storage(output)), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        run()
    assert not output.exists()
