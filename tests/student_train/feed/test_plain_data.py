"""Plain data with images that are missing or damaged: left out with phase one's reasons, counted, never a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from student_train.config import FitConfig, LossSpec, SourceConfig
from student_train.feed.batch import NOTHING
from student_train.feed.step_plan import MicroBatch
from student_train.training.trainer import Run, fit
from teacher_cache.data.conversations import Image
from teacher_cache.data.images import load_image
from teacher_cache.data.rows import expand
from teacher_cache.errors import DataError
from tests.fixtures.training import largest_difference, tiny_fit

SETTINGS: dict[str, Any] = {"max_steps": 4, "global_batch": 16, "micro_batch": 4, "checkpoint_every": 2}


def plain(folder: Path, world: Path, cache: Path, name: str, lines: list[dict[str, Any]], **source: Any) -> FitConfig:
    data = folder / f"{name}.json"
    data.write_text(json.dumps(lines))
    config = tiny_fit(folder, cache, world, name, **SETTINGS)
    settings = {"data": str(data), "image_folder": str(world / "images"), **source}
    student = replace(config.student, chat_template="tiny")
    return replace(config, student=student, sources=(SourceConfig(**settings),), losses=(LossSpec("cross_entropy"),))


def left_out(config: FitConfig) -> dict[str, str]:
    lines = (Path(config.output) / "skipped.jsonl").read_text().splitlines()
    found = {line["sample_id"]: line["reason"] for line in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


@pytest.fixture
def lines(world: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((world / "train.json").read_text())
    return [{**line, "id": f"s{number}"} for number, line in enumerate(found)]


def test_missing_images_and_lines_that_are_none_are_left_out_before_the_first_step(
    tmp_path: Path, cache_folder: Path, world: Path, lines: list[dict[str, Any]]
) -> None:
    pictures = [n for n, line in enumerate(lines) if "image" in line]
    missing, open_end = pictures[5], next(n for n in range(len(lines)) if n != pictures[5])
    good = [line for n, line in enumerate(lines) if n not in (missing, open_end)]
    lines[missing] = {**lines[missing], "image": "ocr_vqa/1.jpg"}
    lines[open_end] = {**lines[open_end], "conversations": lines[open_end]["conversations"][:-1]}
    config = plain(tmp_path, world, cache_folder, "all", lines)
    assert fit(config, "quiet").steps == 4
    reasons = left_out(config)
    assert reasons[f"s{missing}"] == "image ocr_vqa/1.jpg: no such file in the image folder"
    assert reasons.keys() == {f"s{missing}", f"s{open_end}"}
    without = plain(tmp_path, world, cache_folder, "good", good)
    fit(without, "quiet")
    assert largest_difference(config, without) == 0


def test_too_many_of_them_stop_the_run_with_their_reasons(
    tmp_path: Path, cache_folder: Path, world: Path, lines: list[dict[str, Any]]
) -> None:
    lines = [{**line, "image": "gone.png"} if "image" in line else line for line in lines]
    config = plain(tmp_path, world, cache_folder, "gone", lines)
    with pytest.raises(
        DataError, match=r"max_skipped=0\.1 allows \(\d+ × an image: no such file in the image folder; the first"
    ):
        fit(config, "quiet")
    assert fit(plain(tmp_path, world, cache_folder, "meant", lines, max_skipped=1.0), "quiet").steps == 4


@pytest.mark.parametrize("kept", ["compute", "cache"])
def test_an_image_that_turns_out_damaged_has_no_weight_and_a_line(
    tmp_path: Path,
    cache_folder: Path,
    world: Path,
    lines: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    kept: Literal["compute", "cache"],
) -> None:
    """Where the tower's features are computed first, it is known before the first step."""
    images = tmp_path / "images"
    images.mkdir()
    for file in (world / "images").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    (images / "damaged.png").write_bytes((world / "images" / lines_image(lines)).read_bytes()[:60])
    chosen = lines[:16]
    place = next(n for n, line in enumerate(chosen) if "image" in line)
    chosen[place] = {**chosen[place], "image": "damaged.png"}
    config = plain(tmp_path, world, cache_folder, "damaged", chosen, image_folder=str(images))
    config = replace(config, student=replace(config.student, vision_features=kept))
    run = Run.prepare(config)
    for micro in run.plan.micro_batches(0, 0, 1):
        made, batch = run.dataset[micro]
        if place not in micro.indices:
            assert not made.skipped
            continue
        assert [s.sample_id for s in made.skipped] == [f"s{place}"]
        line = micro.indices.index(place)
        assert not batch.row_weight[batch.row_sample == line].any()
        assert batch.row_weight[batch.row_sample != line].all()
        loss, _ = run.student(batch, 0)
        loss.backward()
        assert bool(torch.isfinite(loss))
    fit(config, "quiet")
    fit(replace(config, output=config.output), "quiet")  # a finished one: nothing is written twice
    reasons = left_out(config)
    assert reasons.keys() == {f"s{place}"}
    assert reasons[f"s{place}"].startswith("image damaged.png: cannot be decoded")
    assert capsys.readouterr().err.count(f"s{place}: image damaged.png") == (kept == "compute")


def test_more_damaged_images_than_allowed_are_found_before_the_first_step(
    tmp_path: Path, cache_folder: Path, world: Path, lines: list[dict[str, Any]]
) -> None:
    """By ``vision_features: cache``, which looks at every image first."""
    (tmp_path / "damaged.png").write_bytes(b"<html>")
    lines = [{**line, "image": "damaged.png"} if "image" in line else line for line in lines]
    config = plain(tmp_path, world, cache_folder, "damaged", lines, image_folder=str(tmp_path))
    with pytest.raises(DataError, match=r"samples are skipped, .* × an image: cannot be decoded"):
        Run.prepare(replace(config, student=replace(config.student, vision_features="cache")))


def test_images_stand_anywhere_and_what_the_template_has_no_place_for_is_left_out(
    tmp_path: Path, cache_folder: Path, world: Path, lines: list[dict[str, Any]]
) -> None:
    """Two images in one turn, one in a later turn: to a LLaVA-1.5 student, too. A paper's template has no system."""
    names = [str(line["image"]) for line in lines if "image" in line][:3]
    said = [("human", "<image>\n<image>\nwhat is it"), ("gpt", "red"), ("human", "and here <image>"), ("gpt", "no")]
    anywhere = {"id": "anywhere", "image": names, "conversations": [{"from": w, "value": v} for w, v in said]}
    system = [{"from": "system", "value": "be brief"}, *lines[0]["conversations"]]
    chosen = [anywhere, {**lines[0], "id": "system", "conversations": system}, *lines[1:8]]
    run = Run.prepare(plain(tmp_path, world, cache_folder, "anywhere", chosen, max_skipped=1.0))
    assert left_out(run.config) == {
        "system": "the chat template refuses it: this template has one fixed opening: only the roles user and "
        "assistant are known"
    }
    (source,) = run.dataset.sources
    assert source.image_counts[0] == 3
    _, batch = run.dataset[MicroBatch(0, 0, (0,), (NOTHING,), last=True)]
    tokenizer, image = run.dataset.reader.tokenizer, run.dataset.reader.image_token
    turns = "USER: <image>\n<image>\nwhat is it ASSISTANT: red</s>USER: <image>\nand here ASSISTANT: no</s>"
    ids = np.array(tokenizer("<s>" + turns)["input_ids"])
    assert batch.input_ids[0].tolist() == expand(ids, image, run.dataset.reader.image_tokens).tolist()
    shown = [load_image(Image(name, path=name), world / "images") for name in names]
    pixels = run.processor.image_processor(shown, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.fields["pixel_values"], pixels)
    assert bool(torch.isfinite(run.student(batch, 0)[0]))


def lines_image(lines: list[dict[str, Any]]) -> str:
    return str(next(line["image"] for line in lines if "image" in line))
