"""One progress line for every long step: bars in a terminal, plain lines in a log, JSON lines for machines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from teacher_cache.terminal import printable, without_secrets

Style = Literal["auto", "bar", "lines", "json", "quiet"]
_SECONDS_BETWEEN_LINES = 10.0


class Stage(Protocol):
    """One long step that is under way."""

    def advance(self, count: int = 1, **facts: Any) -> None:
        """``count`` more units are done; ``facts`` (loss, share of waiting …) stand beside the rate."""
        ...


@contextlib.contextmanager
def stage(name: str, total: int, unit: str, style: Style = "auto") -> Iterator[Stage]:
    """Show a step of ``total`` units: rate, time left and the latest facts."""
    if style == "auto":
        style = "bar" if sys.stderr.isatty() else "lines"
    if style == "bar":
        with _bar(name, total, unit) as shown:
            yield shown
        return
    lines = _Lines(name, total, unit, style)
    yield lines
    lines.show()


def note(text: str, style: Style = "auto") -> None:
    """One line of news: a choice that was made for the user, and why."""
    if style == "json":
        print(json.dumps({"note": without_secrets(text)}), file=sys.stderr, flush=True)
    elif style != "quiet":
        print(printable(text), file=sys.stderr, flush=True)


def silence_libraries() -> None:
    """Transformers shows a bar for every file it loads or writes; ours say more."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class _Lines:
    def __init__(self, name: str, total: int, unit: str, style: str) -> None:
        self._name, self._total, self._unit, self._style = name, total, unit, style
        self._done, self._begin, self._shown, self._facts = 0, time.monotonic(), time.monotonic(), {}  # type: ignore[var-annotated]

    def advance(self, count: int = 1, **facts: Any) -> None:
        self._done += count
        self._facts.update(facts)
        if time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        if self._style == "quiet":
            return
        seconds = self._shown - self._begin
        rate = self._done / seconds if seconds else 0.0
        left = (self._total - self._done) / rate if rate else 0.0
        if self._style == "json":
            plain = {"stage": self._name, "done": self._done, "total": self._total, "unit": self._unit}
            line = json.dumps(plain | {"per_second": round(rate, 3), "seconds_left": round(left, 1)} | self._facts)
        else:
            facts = "".join(f"  {k} {_short(v)}" for k, v in self._facts.items())
            done = f"{self._done:,}/{self._total:,} {self._unit}"
            line = f"{self._name}: {done}  {rate:,.1f}/s  {left:,.0f} s left{facts}"
        print(printable(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(name: str, total: int, unit: str) -> Iterator[Stage]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{name} ({unit})", total=total, facts="", rate="")
        shown: dict[str, Any] = {}

        class _Bar:
            def advance(self, count: int = 1, **facts: Any) -> None:
                shown.update(facts)
                text = "  ".join(f"{k} {_short(v)}" for k, v in shown.items())
                speed = progress.tasks[0].speed
                progress.update(task, advance=count, facts=text, rate=f"{speed:,.1f}/s" if speed else "")

        yield _Bar()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
