"""Signals end a command between two steps; a second one, and a launcher's echo of the first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from teacher_cache.stopping import SIGNALS, Stopped, stopping
from tests.fixtures.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


def work(number: signal.Signals) -> None:
    """Two steps; the signal comes in the second."""
    steps = 0
    with stopping() as stop:
        with stop.between_steps():
            while not stop.asked:
                steps += 1
                if steps == 2:
                    signal.raise_signal(number)
        stop.check(f"Steps: {steps}.")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_steps_is_remembered_and_says_its_status(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=f"stopped by {number.name}. Steps: 2.") as stopped:
        work(number)
    assert stopped.value.status == 128 + number


def stopped_at_once() -> None:
    with stopping():
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")


def test_a_signal_where_nothing_can_be_lost_stops_at_once_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped):
        stopped_at_once()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_library_that_makes_a_plain_interrupt_of_it_changes_nothing() -> None:
    def waiting_in_a_library() -> None:
        with stopping():
            try:
                signal.raise_signal(signal.SIGTERM)
            except KeyboardInterrupt:
                raise KeyboardInterrupt from None

    with pytest.raises(Stopped) as stopped:
        waiting_in_a_library()
    assert stopped.value.status == 128 + signal.SIGTERM


def test_the_same_signal_sent_on_by_a_launcher_is_no_second_one() -> None:
    with stopping() as stop, stop.between_steps():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGINT


def test_other_threads_leave_signals_as_they_are() -> None:
    found = []

    def listen() -> None:
        with stopping() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [0]


CHILD = """
import os, signal, sys, time
from teacher_cache.stopping import stopping
with stopping() as stop, stop.between_steps():
    {before}
    print("ready", flush=True)
    while not {until}:
        time.sleep(0.01)
print("asked", stop.asked, flush=True)
sys.stdin.read()
"""


def child(before: str = "pass", until: str = "stop.asked", **options: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(before=before, until=until)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_the_process_and_what_it_started() -> None:
    process = child("stop.at_once = lambda: print('children', flush=True)", until="False")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE)[0] == "children\n"
    assert process.returncode in (-signal.SIGTERM, -signal.SIGINT)  # whichever the system delivers last


def test_an_ignored_signal_stays_ignored() -> None:
    with child(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == f"asked {int(signal.SIGTERM)}\n"


def test_a_process_whose_parent_is_gone_is_asked_to_end() -> None:
    """The middle process is killed; what it started has another parent then."""
    code = CHILD.format(before="stop.follow_parent()", until="stop.asked").replace("sys.stdin.read()", "")
    middle = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.stdout.readline() == f"asked {int(signal.SIGHUP)}\n"


def test_helpers_leave_signals_to_their_parent() -> None:
    process = child("from teacher_cache.stopping import left_to_parent; left_to_parent()", until="sys.stdin.readline()")
    for number in SIGNALS:
        process.send_signal(number)
    assert process.communicate("end\n", timeout=PATIENCE)[0] == "asked 0\n"
