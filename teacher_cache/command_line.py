"""What both command lines share: how an error and the end by a signal are shown."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

import typer
from rich.console import Console
from rich.markup import escape

from teacher_cache.errors import UserError
from teacher_cache.progress import silence_libraries
from teacher_cache.stopping import Stop, Stopped, stopping
from teacher_cache.terminal import printable, say


@contextlib.contextmanager
def calm_errors(kept: str = "") -> Iterator[Stop]:
    """Errors that say what to do are shown as they are, since a traceback would bury them; all others are tracebacks.

    A file that the system does not let us open is the user's to mend too. After a signal, ``kept`` says what stands
    (else the sentence of the work itself does), and the status is the one that a shell gives.
    """
    silence_libraries()
    sys.excepthook = _say_traceback  # for a fault of ours
    try:
        with stopping() as stop:
            yield stop
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.filename is None:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/]", escape(printable(error)))
        raise typer.Exit(1) from error
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        say(f"stopped by {name}; {kept}" if kept else stopped, err=True)
        raise typer.Exit(stopped.status) from None


def _say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), err=True)
