"""A run folder of a stranger: nothing is fetched, nothing outside is read, only what the user names is embedded."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from student_train.studies.report import write_report
from teacher_cache.errors import CacheError, ReportError


@pytest.fixture
def beacon():
    """(address, requests) of a server that counts who asks."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/beacon?who=victim", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    return folder


def test_a_report_asks_no_server_and_embeds_no_picture_because_a_run_folder_says_so(run, beacon, tmp_path):
    """attack/06: ``job.json`` named a cache at the stranger's server and ``/`` as the image folder."""
    url, asked = beacon
    (tmp_path / "private").mkdir()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "private/passport.png")
    name = str(tmp_path / "private/passport.png").lstrip("/")
    line = {"id": "1", "question": "q", "reference": "r", "answer": "a", "teacher": "t", "image": name}
    (run / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    (run / "job.json").write_text(json.dumps({"tree": {"sources": [{"image_folder": "/", "cache": url}]}}))
    page = write_report(run, tmp_path / "report.html").read_text()
    assert asked == []
    assert "data:image" not in page
    assert "127.0.0.1" not in page


@pytest.mark.parametrize("name", ["job.json", "summary.json", "predictions.jsonl"])
def test_a_link_in_a_run_folder_is_not_followed_out_of_it(run, tmp_path, name):
    (tmp_path / "secret").write_text('{"secret": 1}\n')
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CacheError, match="a link that leads out"):
        write_report(run, tmp_path / "report.html")


def test_an_arm_whose_name_is_a_place_elsewhere_is_refused(tmp_path):
    costs = {"cpu_seconds": 1.0, "peak_megabytes": 1.0, "seconds": 1.0, "steps": 1, "samples": 1}
    arm = {"name": "../../elsewhere", "seeds": 1, "mean": {}, "deviation": {}, "difference": {}, **costs}
    table = {"arms": [arm], "metrics": [], "baseline": "", "seeds": [0], "teacher": {}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.raises(ReportError, match="a place outside"):
        write_report(tmp_path, tmp_path / "report.html")
