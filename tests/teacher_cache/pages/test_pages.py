"""The two pages in a real headless Chromium: what they show, and that they need nothing and leak nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, expect
from typer.testing import CliRunner

from pipelines.chromium import NoChromiumError, find_chromium, open_browser
from pipelines.tiny.prepare import TEACHER
from student_train.studies.report import write_report
from student_train.studies.runs import AblationConfig, ArmConfig
from student_train.studies.table import draw, make_table
from teacher_cache.build.build import build_cache
from teacher_cache.cli import app
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.data.rows import turns
from teacher_cache.errors import CacheError, ReportError
from teacher_cache.pages import view_overview
from teacher_cache.pages.charts import Dot, scatter_chart
from teacher_cache.pages.info import cache_info
from teacher_cache.pages.page import clean
from teacher_cache.pages.view import write_view
from teacher_cache.pages.view_overview import answer_type
from teacher_cache.pages.view_samples import LEAST_SHARE, percent
from teacher_cache.store.reader import TeacherCache
from tests.fixtures.store import signals, synthetic_cache

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\x1b[2J\x07"
HOSTILE_SHOWN = HOSTILE.replace("\x1b", "␛").replace("\x07", "␇")
HOSTILE_NAME = "<img src=x onerror=\"document.title='owned'\">&amp;"
ROOT = Path(__file__).parents[3]
SAMPLE = "train-000001-caption"
Opened = Callable[..., Page]
PATIENCE_MILLISECONDS = 300_000
expect.set_options(timeout=PATIENCE_MILLISECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        with open_browser() as opened:
            yield opened
    except NoChromiumError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opened]:
    """Open a file; at the end nothing may have been asked from outside, logged or thrown."""
    contexts, trouble = [], []

    def opened(path: Path, width: int = 1280, scheme: str = "light", script: bool = True) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MILLISECONDS)
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url))
        page.on("console", lambda m: trouble.append(m.text))
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not trouble


@pytest.fixture(scope="module")
def view_page(cache_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = [SAMPLE, "train-000000-fact", "train-000002-qa"]
    output = tmp_path_factory.mktemp("view") / "cache.html"
    return write_view(cache_folder, output, image_folder=world / "images", ids=ids, tokenizer=str(TEACHER))


@pytest.fixture(scope="module")
def ablation(cache_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation as ``student-train ablate`` leaves it: two arms, three seeds, predictions on the dev questions."""
    folder = tmp_path_factory.mktemp("ablation")
    arms = {"baseline": ArmConfig(note="cross-entropy"), HOSTILE_NAME: ArmConfig(note=HOSTILE)}
    results = {}
    for number, arm in enumerate(arms):
        for seed in range(3):
            run = folder / "runs" / f"{arm}-seed{seed}"
            results[arm, seed] = _write_run(run, cache_folder, world, bool(number), seed)
    config = AblationConfig(title="Two arms", arms=arms, baseline="baseline", metrics=("vqa", "kl"))
    table = make_table(config, results) | {"teacher": {"answer_seconds": 90.0, "score_seconds": 30.0, "bytes": 2.5e6}}
    (folder / "table.json").write_text(json.dumps(table))
    return folder


def _write_run(run: Path, cache: Path, world: Path, distilled: bool, seed: int) -> dict[str, Any]:
    run.mkdir(parents=True)
    losses = [{"name": "cross_entropy"}, {"name": "forward_kl"}][: 1 + distilled]
    tree = {"sources": [{"cache": str(cache), "image_folder": str(world / "images")}], "losses": losses}
    (run / "job.json").write_text(json.dumps({"tree": tree}))
    lines = []
    for step in range(10, 110, 10):
        parts = {"cross_entropy": 2 / step + 0.01 * seed, **({"forward_kl": 1 / step} if distilled else {})}
        lines.append({"step": step, "seconds": step, "learning_rate": 0.1, **parts, "loss": sum(parts.values())})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs = {"steps": 100, "samples": 120, "seconds": 20.0 + seed, "cpu_seconds": 18.0, "peak_megabytes": 500.0}
    (run / "summary.json").write_text(json.dumps(costs))
    samples = json.loads((world / "dev.json").read_text())
    predictions = []
    for number, sample in enumerate(samples):
        truth = sample["conversations"][1]["value"]
        predictions.append(
            {
                "id": sample["id"],
                "question": sample["conversations"][0]["value"],
                "reference": truth,
                "teacher": truth,
                "answer": HOSTILE if number == 0 else truth if distilled or number % 2 else "nothing",
                "question_type": sample["question_type"],
                "image": sample.get("image", ""),
            }
        )
    (run / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
    scores = {"vqa": 80.0 + 5 * distilled + 0.1 * seed, "kl": 0.5 - 0.2 * distilled + 0.01 * seed}
    (run / "metrics.json").write_text(json.dumps({"metrics": scores, "settings": ""}))
    return {**costs, "metrics": scores}


@pytest.fixture(scope="module")
def report_page(ablation: Path, world: Path, cache_folder: Path) -> Path:
    return write_report(ablation, ablation / "report.html", str(world / "images"), str(cache_folder))


def test_a_missing_browser_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoChromiumError, match=r"Install one: sh pipelines/install_chromium\.sh"):
        find_chromium()


# --- the view ---------------------------------------------------------------------------------------------------------


def test_view_shows_what_the_cache_holds(open_page: Opened, view_page: Path, cache_folder: Path) -> None:
    page = open_page(view_page)
    with TeacherCache.open(cache_folder) as cache:
        record = cache[cache.find(SAMPLE)]
        counts = cache.manifest.counts
        expect(page.locator(".tiles")).to_contain_text(f"{counts['rows']:,}")
        expect(page.locator(".overview")).to_contain_text(cache.manifest.fingerprint[:16])
        expect(page.locator(".overview")).to_contain_text(f"Measured on all {len(cache)} samples")
    for title in ("Answer tokens a sample", "Probability within the stored top-k", "Entropy by type of answer (nats)"):
        expect(page.get_by_role("heading", name=title)).to_be_visible()
    sample = page.locator(".sample").first
    expect(sample).to_contain_text(record.questions[0])
    expect(sample.locator(".text")).to_have_text(record.original_answers[0])
    words = sample.locator(".tokens").inner_text().replace("\n", " ").removesuffix("</s>").strip()
    assert words == record.answers[0]
    assert sample.locator("img").evaluate("image => image.naturalWidth") == 32


def test_panel_shows_the_cached_probabilities(open_page: Opened, view_page: Path, cache_folder: Path) -> None:
    page = open_page(view_page)
    with TeacherCache.open(cache_folder) as cache:
        arrays = cache[cache.find(SAMPLE)].arrays
    for row in (0, 3):
        page.locator(".sample").first.locator(".tokens .t").nth(row).hover()
        shown = page.locator("#inspector li:not(.rest) b").all_inner_texts()
        probabilities = np.exp(arrays["topk_logprobs"][row].astype(np.float64))
        assert shown == [percent(p) for p in probabilities if p >= LEAST_SHARE]
    page.get_by_role("heading", name="Overview").hover()
    expect(page.locator("#inspector")).to_be_hidden()


def test_tokens_are_reached_by_keyboard(open_page: Opened, view_page: Path) -> None:
    page = open_page(view_page)
    tokens = page.locator(".sample").first.locator(".tokens .t")
    panel = page.locator("#inspector")
    while not page.evaluate("document.activeElement.matches('.tokens .t')"):
        page.keyboard.press("Tab")
    expect(tokens.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tokens.nth(1)).to_have_attribute("aria-describedby", "inspector")
    expect(panel.locator("p b")).to_have_text("␣" + tokens.nth(1).inner_text())
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()


def test_without_script_every_token_can_be_read(open_page: Opened, view_page: Path) -> None:
    page = open_page(view_page, script=False)
    sample = page.locator(".sample").first
    expect(sample.locator(".question")).to_be_visible()
    expect(sample.locator("table")).to_be_hidden()
    sample.locator("summary").click()
    expect(sample.locator("table")).to_be_visible()
    assert sample.locator("tbody tr").count() == sample.locator(".tokens .t").count()
    expect(page.locator("#inspector")).to_be_hidden()


def test_panel_is_a_sheet_on_a_narrow_screen(open_page: Opened, view_page: Path) -> None:
    page = open_page(view_page, width=390)
    token = page.locator(".tokens .t").nth(2)
    token.click()
    box, at = page.locator("#inspector").bounding_box(), token.bounding_box()
    assert box is not None
    assert at is not None
    assert (box["x"], box["width"], box["y"] + box["height"]) == (0, 390, 900)
    assert at["y"] + at["height"] <= box["y"], "the sheet covers its token"


def test_text_from_data_stays_text(
    open_page: Opened, cache_config: CacheConfig, teacher: Any, world: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": HOSTILE}, {"from": "gpt", "value": HOSTILE}]
    lines = [{"id": HOSTILE, "conversations": turns}, {"id": f"2{HOSTILE}", "conversations": turns[:1]}]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    data = DataConfig(path=str(tmp_path / "data.json"), image_folder=str(world / "images"), regenerate="none")
    cache = tmp_path / "cache"
    build_cache(replace(cache_config, data=data, output=str(cache)), teacher=teacher, style="quiet")
    page = open_page(write_view(cache, tmp_path / "cache.html", tokenizer=str(TEACHER)))
    assert page.title() == "teacher · teacher cache"
    expect(page.locator(".sample h3")).to_have_text(HOSTILE_SHOWN)
    expect(page.locator(".sample .question")).to_have_text(HOSTILE_SHOWN)
    expect(page.locator(".sample .text")).to_have_count(0)  # the original answer was kept: it stands in the tokens
    expect(page.locator(".card.wide")).to_contain_text(f"2{HOSTILE_SHOWN}")
    assert page.locator("script").count() == 1


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("\ud83d\x00\x1b\x9b31m\ufffe</svg><script>'\"&amp;")
def test_any_text_in_a_chart_is_that_text_and_well_formed(text: str) -> None:
    drawn = scatter_chart([Dot(text, 1.0, 2.0)], text, text)
    texts = [element.text or "" for element in ElementTree.fromstring(drawn).iter("text")]
    shown = clean(text).replace("\r\n", "\n").replace("\r", "\n")
    assert texts.count(shown) >= 3
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", clean(text))


def test_nothing_but_charts_style_and_script_is_taken_as_html() -> None:
    packages = [ROOT / name for name in ("teacher_cache", "student_train", "pipelines")]
    made = {p.name for root in packages for p in root.rglob("*.py") if re.search(r"\bMarkup\(.", p.read_text())}
    assert made == {"charts.py", "page.py"}
    templates = [p for root in packages for p in root.rglob("templates/*.html")]
    assert len(templates) > 3
    assert not [p for p in templates if re.search(r"\|\s*safe\b|autoescape", p.read_text())]


def test_images_embedded_in_parquet_files_are_shown(
    open_page: Opened, cache_config: CacheConfig, teacher: Any, world: Path, tmp_path: Path
) -> None:
    samples = [s for s in json.loads((world / "train.json").read_text()) if s.get("image")][:4]
    for number, part in enumerate((samples[:2], samples[2:])):
        lines = [s | {"image": {"bytes": (world / "images" / s["image"]).read_bytes(), "path": None}} for s in part]
        pq.write_table(pa.Table.from_pylist(lines), tmp_path / f"train-0000{number}-of-00002.parquet")
    files = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    cache = tmp_path / "cache"
    data = DataConfig(path=tuple(files), regenerate="none")
    build_cache(replace(cache_config, data=data, output=str(cache)), teacher=teacher, style="quiet")
    for images in (files, str(tmp_path), [str(tmp_path / "train-*.parquet")]):
        page = open_page(write_view(cache, tmp_path / "cache.html", image_folder=images))
        assert page.locator(".sample img").evaluate_all("all => all.map(i => i.naturalWidth)") == [32] * 4
    page = open_page(write_view(cache, tmp_path / "cache.html"))
    expect(page.locator(".no-image").first).to_have_text("embedded in a data file: name it with --image-folder")


def test_view_of_ids_says_what_is_missing(open_page: Opened, cache_folder: Path, tmp_path: Path) -> None:
    page = open_page(write_view(cache_folder, tmp_path / "cache.html", samples=2, seed=1))
    expect(page.locator("main")).to_contain_text("name the teacher’s folder with --tokenizer")
    assert re.fullmatch(r"#\d+", page.locator(".tokens .t").first.inner_text())
    expect(page.locator(".no-image").first).to_have_text("no image folder was given")
    assert page.locator(".sample").count() == 2


def test_view_of_a_cache_without_topk(open_page: Opened, tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache", config=replace(signals(), top_k=0))
    page = open_page(write_view(made.storage.url, tmp_path / "cache.html", samples=3))
    assert page.locator(".t.c1, .t.c2, .t.c3").count() == 3, "only the legend is coloured"
    page.locator(".tokens .t").first.hover()
    expect(page.locator("#inspector")).to_contain_text("no top-k stored")


def test_overview_is_measured_on_a_bounded_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache", samples=20)
    monkeypatch.setattr(view_overview, "MAX_SHARDS", 2)
    monkeypatch.setattr(view_overview, "MAX_SAMPLES_A_SHARD", 3)
    text = write_view(made.storage.url, tmp_path / "cache.html", samples=1).read_text()
    assert re.search(r"Measured on 6 of 19 samples \(\d+ answer tokens, from 2 of 5 shards\)", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": ["sample-99"]}, "no sample 'sample-99'"),
        ({"samples": 0}, "expected at least 1, found 0"),
        ({"tokenizer": str(TEACHER)}, "not the tokenizer of toy"),
        ({"tokenizer": "/nowhere"}, "no tokenizer can be loaded"),
    ],
)
def test_view_refuses_what_it_cannot_show(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    made = synthetic_cache(tmp_path / "cache")
    with pytest.raises(CacheError, match=re.escape(message)):
        write_view(made.storage.url, tmp_path / "cache.html", **options)
    assert not (tmp_path / "cache.html").exists()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no teacher cache here"),
        (b"[1]", "not a manifest"),
        (b"\xff\xfe", "not a manifest"),
        (b"{}", "not a manifest"),
    ],
)
def test_info_says_calmly_that_there_is_no_cache(tmp_path: Path, manifest: bytes | None, message: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest)
    refused(["info", str(tmp_path)], message)


def test_info_and_view_refuse_places_that_hold_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for command in ("info", "view"):
        refused([command, str(tmp_path / "file")], "file")
        refused([command, "nowhere://cache"], "nowhere://cache: Protocol not known")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def refused(command: list[str], message: str) -> None:
    """The command ends with 1 and one sentence, not with a traceback."""
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert re.match(f"error: .*{re.escape(message)}", result.output)


def test_info_of_a_cache_that_lost_shards_does_not_call_it_complete(tmp_path: Path) -> None:
    made = synthetic_cache(tmp_path / "cache")
    facts = dict(cache_info(made.storage))
    assert facts["state"].startswith("complete, ")
    shutil.rmtree(tmp_path / "cache/shards/00001")
    assert dict(cache_info(made.storage))["state"].startswith("not whole (run teacher-cache verify), ")


def test_answers_are_runs_of_supervised_tokens() -> None:
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 1], bool)
    assert turns(mask) == [slice(0, 2), slice(2, 3), slice(3, 6)]
    assert turns(np.zeros(4, bool)) == []
    answers = ("Yes.", "1,024", "A red car", "The car is red and it stands in front of a house", "word " * 30)
    assert [answer_type(a) for a in answers] == list(view_overview.TYPES)


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_shows_the_ablation(open_page: Opened, report_page: Path) -> None:
    page = open_page(report_page, script=False)
    expect(page.locator("h1")).to_have_text("Two arms")
    row = page.locator(".results tbody tr").nth(1)
    expect(row).to_contain_text("85.1 ± 0.1")
    expect(row.locator("td").nth(0).locator(".better")).to_have_text("+5 ± 0")
    expect(row.locator("td").nth(1).locator(".better")).to_contain_text("-0.2 ±")
    for title in ("cross entropy", "forward kl", "loss", "vqa against CPU seconds of a student"):
        expect(page.get_by_role("heading", name=title, exact=True)).to_be_visible()
    curves = page.locator(".card", has=page.get_by_role("heading", name="cross entropy", exact=True))
    assert curves.locator("polyline").count() == 2 + 6, "a mean and three seeds for each of two arms"
    expect(page.locator("main")).to_contain_text("90.0 s of answering")
    expect(row.locator("th")).to_have_text(HOSTILE_NAME + HOSTILE_SHOWN)
    expect(page.locator(".key li").nth(1)).to_have_text(HOSTILE_NAME)


def test_a_tables_picture_follows_light_and_dark(open_page: Opened, ablation: Path, tmp_path: Path) -> None:
    table = json.loads((ablation / "table.json").read_text())
    table["arms"][1]["seeds"]["0"]["kl"] = math.nan
    draw(table, tmp_path / "table.svg")
    drawn = ElementTree.parse(tmp_path / "table.svg")
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"vqa", "kl", "baseline", HOSTILE_NAME} <= set(texts)
    circles = list(drawn.iter("{http://www.w3.org/2000/svg}circle"))
    assert sum(c.attrib["class"].startswith("single") for c in circles) == 2 * 2 * 3 - 1, "a seed without a number"
    fills = []
    for scheme in ("light", "dark"):
        page = open_page(tmp_path / "table.svg", scheme=scheme)
        fills.append(page.locator(".frame").evaluate("element => getComputedStyle(element).fill"))
        assert page.locator("script, image, a, foreignObject").count() == 0
    assert fills == ["rgb(255, 255, 255)", "rgb(26, 28, 32)"]


def test_report_shows_where_students_disagree(open_page: Opened, report_page: Path, world: Path) -> None:
    page = open_page(report_page)
    worst = page.locator(".worst .card").first
    expect(worst).to_contain_text(HOSTILE_SHOWN)
    expect(worst).to_contain_text("(×3)")
    sample = json.loads((world / "dev.json").read_text())[0]
    expect(worst.locator("h3")).to_have_text(sample["id"])
    assert worst.locator("img").evaluate("image => image.naturalWidth") == 32
    assert page.locator("script").count() == 0
    assert page.title() == "Two arms · report"


def test_report_of_single_runs_needs_only_their_log(open_page: Opened, ablation: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    line = {"step": 1, "loss": math.nan, "cross_entropy": 1.0}
    bare.joinpath("log.jsonl").write_text(f'{json.dumps(line)}\n{{"step": 2, "loss": 1.0}}\n{{"step": 3, "lo')
    page = open_page(write_report([bare, ablation / "runs" / f"{HOSTILE_NAME}-seed1"], tmp_path / "report.html"))
    expect(page.locator("main")).to_contain_text("cannot be told from chance")
    assert page.locator(".results tbody tr").count() == 2
    expect(page.locator(".results tbody tr").first).to_contain_text("–")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("log.jsonl", '{"step": 1}\n{"loss": 1}\n', "log.jsonl: line 2: expected a step"),
        ("log.jsonl", '{"step": 1}\nstep\n', "log.jsonl: line 2: not JSON"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("metrics.json", "[]", "metrics.json: expected an object, found list"),
        ("predictions.jsonl", '{"id": 1}\n', "predictions.jsonl: line 1: without answer, question, reference"),
        ("table.json", '{"arms": []}', "table.json: without baseline, metrics, seeds, teacher"),
    ],
)
def test_report_names_the_malformed_file(tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / file).write_text(text)
    with pytest.raises(ReportError, match=re.escape(message)):
        write_report(tmp_path, tmp_path / "report.html")


def test_report_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run here"):
        write_report(tmp_path, tmp_path / "report.html")


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["view_page", "report_page"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_in_light_and_dark(
    open_page: Opened, name: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(name), scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(n) for n in re.findall(r"\d+", background)[:3]) / 3
    assert (brightness < 60) == (scheme == "dark")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    result = Axe().run(page)
    assert result.violations_count == 0, result.generate_report()


@pytest.mark.parametrize("name", ["view_page", "report_page"])
def test_pages_fit_a_narrow_screen(open_page: Opened, name: str, request: pytest.FixtureRequest) -> None:
    page = open_page(request.getfixturevalue(name), width=390)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("body").evaluate("body => parseFloat(getComputedStyle(body).fontSize)") >= 16
