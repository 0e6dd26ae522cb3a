"""``teacher-cache``: phase one from the command line. Every command is a few lines over functions of this package."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teacher_cache.command_line import calm_errors
from teacher_cache.config import CacheConfig, load_config, schema
from teacher_cache.data.conversations import Format
from teacher_cache.errors import ConfigError
from teacher_cache.progress import Style
from teacher_cache.stopping import Stop
from teacher_cache.store.storage import Storage
from teacher_cache.terminal import printable, say

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="YAML file of the cache, for example pipelines/tiny/cache.yaml")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the file, for example signals.top_k=32")]
BreakLock = Annotated[
    bool, typer.Option("--break-lock", help="take over an output in an object store whose writer is known to be dead")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for machines")]


@app.command()
def plan(
    config: Config,
    sets: Sets = None,
    like: Annotated[str, typer.Option(help="a finished cache of this teacher: count with the time that it took")] = "",
    read_rate: Annotated[float, typer.Option(help="tokens a second that one GPU reads (with --write-rate)")] = 0.0,
    write_rate: Annotated[float, typer.Option(help="tokens a second that one GPU writes")] = 0.0,
    answer_factor: Annotated[float, typer.Option(help="new answers are this much longer than the original ones")] = 1.0,
    as_json: Json = False,
) -> None:
    """What the cache will hold and cost, before anything runs; needs no weights."""
    from teacher_cache.plan.cache_plan import plan_cache
    from teacher_cache.plan.cost import Throughput, measured_throughput

    with _errors():
        if bool(read_rate) != bool(write_rate) or (like and read_rate):
            raise ConfigError("give --read-rate and --write-rate together, or --like, or none of them")
        rate = Throughput(read_rate, write_rate) if read_rate else None
        rate = measured_throughput(Storage(like)) if like else rate
        settings = load_config(CacheConfig, config, sets or [])
        planned = plan_cache(settings, answer_factor=answer_factor, throughput=rate)
    _show(planned.as_rows(), planned, as_json, "plan")


@app.command()
def build(
    config: Config,
    sets: Sets = None,
    as_json: Json = False,
    workers: int = 1,
    break_lock: BreakLock = False,
    redo_skipped: Annotated[
        bool, typer.Option(help="make shards again that left out samples, for instance since images were missing")
    ] = False,
) -> None:
    """Answer, score and write the whole cache; goes on where an earlier run stopped."""
    from teacher_cache.build.build import build_cache

    with _errors():
        settings = load_config(CacheConfig, config, sets or [])
        if workers > 1:
            from teacher_cache.build.cluster import build_on_ray

            summary = build_on_ray(
                settings, workers=workers, style=_style(as_json), break_lock=break_lock, redo_skipped=redo_skipped
            )
        else:
            summary = build_cache(settings, style=_style(as_json), break_lock=break_lock, redo_skipped=redo_skipped)
    rows = [(n.replace("_", " "), _number(v)) for n, v in dataclasses.asdict(summary).items()]
    _show([*rows, ("bytes per row", f"{summary.bytes_per_row:,.1f}")], summary, as_json, f"cache {settings.output}")


@app.command()
def answer(config: Config, sets: Sets = None, as_json: Json = False, break_lock: BreakLock = False) -> None:
    """Only write the answers (answers/part-*.parquet); ``score`` or ``build`` goes on from them."""
    from teacher_cache.build.build import answer_only

    with _errors():
        settings = load_config(CacheConfig, config, sets or [])
        answered = answer_only(settings, style=_style(as_json), break_lock=break_lock)
    _show([("shards answered", _number(answered))], {"shards": answered}, as_json, "answers")


@app.command()
def score(config: Config, sets: Sets = None, as_json: Json = False, break_lock: BreakLock = False) -> None:
    """Score the answers that are there and write the shards; refuses when answers are missing."""
    from teacher_cache.build.build import build_cache, check_answered

    with _errors():
        settings = load_config(CacheConfig, config, sets or [])
        check_answered(settings)
        summary = build_cache(settings, style=_style(as_json), break_lock=break_lock)
    rows = [(n.replace("_", " "), _number(v)) for n, v in dataclasses.asdict(summary).items()]
    _show(rows, summary, as_json, f"cache {settings.output}")


@app.command()
def info(cache: str, as_json: Json = False) -> None:
    """What is in a cache."""
    from teacher_cache.pages.info import cache_info

    with _errors():
        rows = cache_info(Storage(cache))
    _show(rows, dict(rows), as_json, f"cache {cache}")


@app.command()
def verify(
    cache: str,
    deep: Annotated[bool, typer.Option(help="also every checksum, every number and the row rule")] = False,
    rescore: Annotated[int, typer.Option(help="let the teacher score this many samples again (needs --config)")] = 0,
    repair: Annotated[bool, typer.Option(help="remove the shards at fault, so that build makes them again")] = False,
    config: Annotated[Path | None, typer.Option(help="the YAML the cache was made with")] = None,
    sets: Sets = None,
) -> None:
    """Check a cache; exits with 1 and names the shard, sample and file at fault when something is wrong."""
    from teacher_cache.store.locks import locked
    from teacher_cache.trust.verify import repair_cache, rescore_cache, verify_cache

    with _errors():
        report = verify_cache(Storage(cache), deep=deep or repair)
        if rescore and config is None:
            raise typer.BadParameter("--rescore needs --config, the YAML the cache was made with")
        for line in report.lines():
            say(line)
        agrees = True
        if rescore and config is not None:
            rescored = rescore_cache(load_config(CacheConfig, config, sets or []), rescore)
            say(rescored)
            agrees = rescored.ok
        if repair and report.repairable:
            with locked(Storage(cache)):
                removed = repair_cache(Storage(cache), report)
            say(f"removed {len(removed)} shards; run teacher-cache build with the same configuration")
        ok = agrees and (report.ok or (repair and report.repairable))
    raise typer.Exit(0 if ok else 1)


@app.command()
def fidelity(
    cache: str,
    samples: int = 256,
    config: Annotated[
        Path | None, typer.Option(help="the YAML the cache was made with: the teacher scores the samples again")
    ] = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """How close the stored signals are to the teacher's exact distribution, by answer type and position.

    Without --config the stored states stand for the teacher: then their own error is not seen, only the top-k's.
    """
    from teacher_cache.trust.fidelity import cache_fidelity

    with _errors():
        settings = load_config(CacheConfig, config, sets or []) if config is not None else None
        report = cache_fidelity(Storage(cache), samples, config=settings)
    _show(report.as_rows(), report, as_json, f"fidelity of {cache}")


@app.command()
def view(
    cache: str,
    output: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("cache.html"),
    samples: Annotated[int, typer.Option(help="how many samples to show")] = 24,
    image_folder: Annotated[
        list[str] | None, typer.Option(help="where the images lie: a folder, or the Parquet files that hold them")
    ] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="show this sample_id (repeatable)")] = None,
    tokenizer: Annotated[str, typer.Option(help="folder or name of the teacher, for the text of single tokens")] = "",
    seed: int = 0,
) -> None:
    """A self-contained page to look into a cache: no server, no network."""
    from teacher_cache.pages.view import write_view

    with _errors():
        written = write_view(cache, output, samples, image_folder or [], ids or [], tokenizer, seed)
    say(f"{written}: open it in any browser")


@app.command("export-answers")
def export_answers(
    cache: str,
    output: Annotated[Path, typer.Option(help="the file to write: *.json, *.jsonl or *.parquet")],
    form: Annotated[
        Format, typer.Option("--format", help="LLaVA; ms-swift and LLaMA-Factory; LLaMA-Factory; TRL")
    ] = "llava",
    image_folder: Annotated[
        list[str] | None, typer.Option(help="put the images into the Parquet file, from their folder or data files")
    ] = None,
) -> None:
    """The regenerated instruction set for other trainers."""
    from teacher_cache.pages.answers import export_answers as export

    with _errors():
        samples = export(Storage(cache), output, form, image_folder or [])
    say(f"{output}: {samples:,} samples")


@app.command()
def demo(
    short: Annotated[bool, typer.Option(help="a small world and a few steps: does it all run?")] = False,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the demo's ablation file")] = None,
) -> None:
    """Both phases on the tiny world that comes with the package, one table and two pages, in ./runs."""
    # By name: the packages import nothing of what is built with them, as an ablation names its measure.
    importlib.import_module("pipelines.tiny.demo").demo(short, sets or [])


@app.command(name="schema")
def print_schema() -> None:
    """The JSON schema of configuration files, with which editors complete and check them."""
    say(json.dumps(schema(CacheConfig), indent=1))


def _errors() -> contextlib.AbstractContextManager[Stop]:
    return calm_errors("committed shards stand, run the same command again to go on")


def _show(rows: Sequence[tuple[str, ...]], plain: Any, as_json: bool, title: str) -> None:
    if as_json:
        plain = dataclasses.asdict(plain) if dataclasses.is_dataclass(plain) else plain  # type: ignore[arg-type]
        say(json.dumps(plain, indent=1, default=str))
        return
    table = Table(title=escape(printable(title)), show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    Console().print(table)


def _style(as_json: bool) -> Style:
    return "json" if as_json else "auto"


def _number(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    app()
