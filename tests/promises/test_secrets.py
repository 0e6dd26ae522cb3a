"""A password, token or signature in an address reaches no file, page or log, and still opens what it opened."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from student_train.studies.ablate import ablate
from student_train.studies.report import write_report
from student_train.studies.runs import AblationConfig
from student_train.training.settings import deciding_settings
from student_train.training.stages import fit_file
from student_train.training.trainer import fit
from teacher_cache.build.build import build_cache
from teacher_cache.command_line import calm_errors
from teacher_cache.config import CacheConfig, as_plain, build_config
from teacher_cache.pages.view import write_view
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.terminal import without_secrets_in
from tests.fixtures.training import tiny_fit

SECRET = "S3CRET"


class Guarded(SimpleHTTPRequestHandler):
    """Gives files only to whoever knows the password and the token."""

    refused = 0

    def send_head(self) -> Any:
        known = f"Basic {b64encode(f'alice:{SECRET}'.encode()).decode()}"
        if self.headers.get("Authorization") != known:
            type(self).refused += 1
            self.send_error(401)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def guarded(cache_folder: Path) -> Iterator[str]:
    """The address of the tiny cache, with a password."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Guarded, directory=str(cache_folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://alice:{SECRET}@127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def leaks(folder: Path) -> list[str]:
    """Files below with the secret, and names with it."""
    return [str(p) for p in written(folder) if SECRET.encode() in p.read_bytes() or SECRET in str(p)]


def test_a_run_from_an_address_with_a_password_keeps_no_password_and_goes_on(guarded, world, tmp_path, capfd) -> None:
    config = tiny_fit(tmp_path, Path("cache"), world, max_steps=4, checkpoint_every=2)
    source = replace(config.sources[0], cache=guarded, prefetch_folder=str(tmp_path / "copies"))
    config = replace(config, sources=(source,))
    fit(config)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    (tmp_path / "run/run.json").unlink()
    assert fit(config).steps == 4
    write_report(tmp_path / "run", tmp_path / "report.html")
    assert (tmp_path / "run/run.json").is_file()
    assert "***@127.0.0.1" in (tmp_path / "run/run.json").read_text()
    assert not leaks(tmp_path)
    assert SECRET not in "".join(capfd.readouterr())


def test_an_ablation_from_an_address_with_a_password_keeps_none_and_is_done_once(
    guarded, world, tmp_path, capfd
) -> None:
    def config(address: str) -> AblationConfig:
        plain = as_plain(tiny_fit(tmp_path, Path("cache"), world, max_steps=2, checkpoint_every=0))
        plain["sources"][0]["cache"] = address
        del plain["output"]
        arms = {"a": {"set": {"losses": [{"name": "cross_entropy"}]}}}
        tree = {"output": str(tmp_path / "study"), "base": plain, "arms": arms, "seeds": [0], "workers": 1}
        return build_config(AblationConfig, tree, "test")

    ablate(config(guarded), "quiet")
    job = json.loads((tmp_path / "study/runs/a-seed0/job.json").read_text())
    assert job["tree"]["sources"][0]["cache"] == guarded.replace(f"alice:{SECRET}", "***")
    before = {path: path.read_bytes() for path in written(tmp_path / "study/runs")}
    ablate(config(guarded), "quiet")
    assert before == {path: path.read_bytes() for path in written(tmp_path / "study/runs")}
    assert not leaks(tmp_path)
    assert SECRET not in "".join(capfd.readouterr())


def test_a_stage_records_where_it_read_without_the_password(guarded, world, tmp_path, tmp_path_factory) -> None:
    config = tiny_fit(tmp_path, Path("cache"), world, max_steps=1, checkpoint_every=0)
    base = as_plain(replace(config, sources=(replace(config.sources[0], cache=guarded),)))
    del base["output"]
    file = Path(tmp_path_factory.mktemp("given") / "stages.yaml")
    file.write_text(json.dumps({"output": str(tmp_path / "run"), "base": base, "stages": {"only": {}}}))
    fit_file(file, [], "quiet")
    assert "***@127.0.0.1" in (tmp_path / "run/only/origin.json").read_text()
    assert not leaks(tmp_path)


def test_a_cache_built_at_an_address_with_a_password_does_not_hold_it(
    cache_config: CacheConfig, teacher: TorchTeacher, tmp_path, capfd
) -> None:
    address = f"memory://alice:{SECRET}@{tmp_path.name}/cache"
    line = {"image": f"https://host/p.png?X-Amz-Signature={SECRET}", "conversations": []}
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a circle"}]
    lines = json.loads(Path(str(cache_config.data.path)).read_text())[:4]
    lines.append({"id": "fetched", **line, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(lines))
    data = replace(cache_config.data, path=str(tmp_path / "data.json"), max_skipped=1.0)
    summary = build_cache(replace(cache_config, output=address, data=data), teacher=teacher)
    assert (summary.samples, summary.skipped) == (4, 1)
    storage = Storage(address)
    kept = {name: storage.read(name) for name in storage.sizes("") if name}
    assert b"https://host/p.png?X-Amz-Signature=***" in kept["skipped.jsonl"]
    assert [name for name, content in kept.items() if SECRET.encode() in content] == []
    write_view(address, tmp_path / "page.html")
    assert SECRET not in (tmp_path / "page.html").read_text()
    assert SECRET not in "".join(capfd.readouterr())


def test_a_traceback_shows_no_secret(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as fault, calm_errors():
        raise RuntimeError(f"http://alice:{SECRET}@host/c?sig={SECRET} operands could not be broadcast")
    sys.excepthook(fault.type, fault.value, fault.tb)
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: http://***@host/c?sig=*** operands" in said
    assert f"{SECRET}@" not in said.rpartition("RuntimeError:")[2]


def test_a_tree_without_secrets_is_itself(tmp_path, world) -> None:
    plain = deciding_settings(tiny_fit(tmp_path, Path("cache"), world))
    assert without_secrets_in(plain) == plain
    assert without_secrets_in({f"a://u:{SECRET}@h": [f"a://u:{SECRET}@h", 1, None]}) == {
        "a://***@h": ["a://***@h", 1, None]
    }


def test_the_server_of_these_tests_gives_nothing_without_the_password(guarded) -> None:
    before = Guarded.refused
    with pytest.raises(Exception, match=r"manifest\.json|401"):
        Storage(guarded.replace(f"alice:{SECRET}@", "")).read("manifest.json")
    assert Guarded.refused > before
    assert Storage(guarded).read("manifest.json")
