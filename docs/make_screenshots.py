"""Takes the pictures of the two pages for the docs: python docs/make_screenshots.py, after make demo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from playwright.sync_api import Page

from pipelines.chromium import open_browser
from student_train.studies.report import write_report
from teacher_cache.pages.view import write_view
from teacher_cache.store.reader import TeacherCache

MOST_KILOBYTES = 300
SIZE = {"width": 1180, "height": 880}


def main(
    cache: Path = Path("runs/tiny/cache"),
    image_folder: Path = Path("runs/tiny/world/images"),
    tokenizer: Path = Path("pipelines/tiny/teacher"),
    ablation: Annotated[Path, typer.Option(help="an output folder of student-train ablate")] = Path("runs/demo"),
    output: Path = Path("docs/images"),
) -> None:
    """Write view.png and report.png."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        ids = doubtful_samples(cache, 3)
        view = write_view(
            cache, Path(folder) / "view.html", image_folder=image_folder, ids=ids, tokenizer=str(tokenizer)
        )
        page.goto(view.as_uri())
        show_samples(page)
        take(page, output / "view.png")
        page.goto(write_report(ablation, Path(folder) / "report.html").as_uri())
        take(page, output / "report.png")


def doubtful_samples(folder: Path, count: int) -> list[str]:
    """Samples whose answer the teacher changed, those with its least certain token first: they show the page best."""
    doubt = {}
    with TeacherCache.open(folder) as cache:
        for index in range(len(cache)):
            record = cache[index]
            if record.image_ids and len(record.answers) == 1 and record.answers != record.original_answers:
                doubt[record.sample_id] = float(np.min(record.arrays["topk_logprobs"][:, 0]))
    return sorted(doubt, key=lambda sample_id: doubt[sample_id])[:count]


def show_samples(page: Page) -> None:
    """The samples, with the panel open on the first token the teacher doubts."""
    page.evaluate("document.getElementById('samples').scrollIntoView()")
    page.locator(".sample").first.locator(".t.c2, .t.c3, .t.c4").first.hover()


def take(page: Page, path: Path) -> None:
    """A picture that is small enough for a repository."""
    page.screenshot(path=path)
    kilobytes = path.stat().st_size / 1024
    if kilobytes > MOST_KILOBYTES:
        raise ValueError(f"{path}: {kilobytes:,.0f} KB, more than {MOST_KILOBYTES}; make the window smaller")
    typer.echo(f"{path}: {kilobytes:,.0f} KB")


if __name__ == "__main__":
    typer.run(main)
