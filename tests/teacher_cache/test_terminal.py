"""No control character and no secret of others reaches a terminal or a file."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from teacher_cache.cli import app
from teacher_cache.progress import note, stage
from teacher_cache.store.storage import Storage
from teacher_cache.terminal import printable, without_secrets
from tests.fixtures.forged import edit_index, seal
from tests.fixtures.store import synthetic_cache

ROOT = Path(__file__).parents[2]
ESCAPES = "\x1b]0;owned title\x07\x1b[2J\x1b]52;c;cm0gLXJmIH4=\x07\x9b31m\u202e\ud800"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_control_characters_are_made_visible() -> None:
    shown = printable("llava" + ESCAPES)
    assert not CONTROL.search(shown)
    assert shown.startswith("llava\\x1b]0;owned title\\x07")
    assert printable("naïve 模型 😀\n\ttab a\u00a0b") == "naïve 模型 😀\n\ttab a\u00a0b"


@pytest.mark.parametrize(
    "address",
    [
        "http://alice:S3CRET@host/c",
        "https://S3CRET@host/c",
        "https://b.s3.amazonaws.com/c?X-Amz-Signature=S3CRET&X-Amz-Credential=S3CRET%2Fus",
        "https://x.blob.core.windows.net/c?sv=S3CRET&sig=S3CRET",
        "https://host/c?a=1&token=S3CRET",
        "https://host/c?access_token=S3CRET",
    ],
)
def test_secrets_in_an_address_are_blotted_out(address: str) -> None:
    assert "S3CRET" not in without_secrets(f"{address}: missing")
    assert "S3CRET" not in printable(address)
    assert any(host in without_secrets(address) for host in ("host", "b.s3", "x.blob"))


def test_a_storage_says_its_address_without_the_secret_and_still_uses_it() -> None:
    storage = Storage("http://alice:S3CRET@127.0.0.1:9/cache")
    assert "S3CRET" not in storage.url
    assert "alice:S3CRET" in storage.path("manifest.json")
    assert "alice:S3CRET" in storage.__getstate__()["url"]


def test_an_address_without_a_secret_is_said_as_it_is() -> None:
    address = "s3://bucket/a@b/key=value?x=1"
    assert without_secrets(address) == address


@pytest.mark.parametrize("command", ["info", "verify", "view"])
def test_a_hostile_cache_sends_no_escape_to_a_terminal(tmp_path: Path, command: str) -> None:
    hostile = ESCAPES[:-1]  # JSON keeps no lone surrogate
    synthetic_cache(tmp_path / "c")
    edit_index(tmp_path / "c", "shards/00000", rows=lambda lines: lines[1].update(sample_id="x" + hostile))
    seal(tmp_path / "c", lambda plain: plain["teacher"].update(model="llava" + hostile))
    more = ["--output", str(tmp_path / "v.html")] if command == "view" else []
    found = CliRunner().invoke(app, [command, str(tmp_path / "c"), *more])
    assert found.output
    assert not CONTROL.search(found.output), found.output
    assert found.exit_code in (0, 1)


def test_an_error_that_names_a_hostile_file_sends_no_escape(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["info", str(tmp_path / ("none" + ESCAPES[:-1]))])
    assert found.exit_code == 1
    assert "no teacher cache here" in found.output
    assert not CONTROL.search(found.output)


@pytest.mark.parametrize("style", ["lines", "json"])
def test_notes_and_progress_send_no_escape(capsys: pytest.CaptureFixture[str], style) -> None:
    note("shard of " + ESCAPES[:-1] + " at http://a:S3CRET@h/c", style)
    with stage("caching", 1, "samples", style) as progress:
        progress.advance(1, sample=ESCAPES[:-1])
    printed = capsys.readouterr().err
    assert printed
    assert not CONTROL.search(printed)
    assert "S3CRET" not in printed
    if style == "json":
        assert [json.loads(line) for line in printed.splitlines()]


def test_both_command_lines_print_through_one_place() -> None:
    for path in (ROOT / "teacher_cache/cli.py", ROOT / "student_train/cli.py", ROOT / "teacher_cache/command_line.py"):
        text = path.read_text(encoding="utf-8")
        assert "typer.echo" not in text, path
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
