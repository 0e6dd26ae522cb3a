"""A cache of every family's teacher, from data to `verify --deep`: images anywhere, its own template and processor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PillowImage

from teacher_cache.build.build import build_cache
from teacher_cache.config import (
    CacheConfig,
    DataConfig,
    GenerationConfig,
    LayoutConfig,
    SignalsConfig,
    SpeedConfig,
    TeacherConfig,
)
from teacher_cache.data.rows import turns
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import CacheError, DataError, TeacherError, TemplateError
from teacher_cache.models.chat import Chat
from teacher_cache.models.collate import collate
from teacher_cache.pages.info import cache_info
from teacher_cache.pages.view import write_view
from teacher_cache.plan.cache_plan import plan_cache
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.records import TeacherRecord
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.trust.rescore import rescore_cache
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.families import FAMILIES
from tests.fixtures.rounding import MODEL, within
from tests.teacher_cache.build.test_build import contents

Folder = Callable[[str], Path]
ANSWER = 5


def data(folder: Path, sees: bool) -> DataConfig:
    """Three conversations; where the model sees: one image, two in one question, one inside the second question."""
    random = np.random.default_rng(0)
    for name, size in (("a", (40, 60)), ("b", (64, 30)), ("c", (28, 28))):
        pixels = random.integers(0, 255, (*size, 3), dtype=np.uint8)
        PillowImage.fromarray(pixels).save(folder / f"{name}.png")
    said = ["A red square near the wall.", "Yes, it is"]
    lines = [
        (["<image>\nWhat is in this picture?"], ["a.png"]),
        (["<image>Left <image> right?", "And the other one?"], ["b.png", "c.png"]),
        (["Are you there?", "Is the <image> thing large?"], ["c.png"]),
    ]
    written = []
    for number, (asked, images) in enumerate(lines):
        shown = asked if sees else [question.replace("<image>", "") for question in asked]
        turns = [t for q, a in zip(shown, said, strict=False) for t in (("human", q), ("gpt", a))]
        line: dict[str, Any] = {"id": f"s{number}", "conversations": [{"from": f, "value": v} for f, v in turns]}
        written.append(line | ({"image": images} if sees else {}))
    (folder / "data.json").write_text(json.dumps(written))
    return DataConfig(path=str(folder / "data.json"), image_folder=str(folder) if sees else "")


def config_of(name: str, model: Path, folder: Path, **signals: Any) -> CacheConfig:
    family = FAMILIES[name]
    stored = {"preset": "standard", "top_k": 8, "hidden": "rows", "codec": "float32"} | signals
    return CacheConfig(
        output=str(folder / "cache"),
        data=data(folder, family.sees),
        teacher=TeacherConfig(
            model=str(model),
            backend="torch",
            dtype="float32",
            chat_template="vicuna_v1" if name == "llava" else "",
            template_kwargs=family.template_kwargs,
        ),
        generation=GenerationConfig(max_new_tokens=ANSWER),
        signals=SignalsConfig(**stored),
        layout=LayoutConfig(shard_samples=2),
        speed=SpeedConfig(device="cpu"),
    )


@pytest.fixture
def opened(request: pytest.FixtureRequest, family_folder: Folder, tmp_path: Path) -> tuple[CacheConfig, TorchTeacher]:
    config = config_of(request.param, family_folder(request.param), tmp_path)
    return config, TorchTeacher(config.teacher, config.generation, config.speed)


@pytest.mark.parametrize("opened", FAMILIES, indirect=True)
def test_a_cache_holds_what_a_plain_forward_pass_of_the_model_gives(
    opened: tuple[CacheConfig, TorchTeacher], tmp_path: Path
) -> None:
    config, teacher = opened
    summary = build_cache(config, teacher=teacher, style="quiet")
    report = verify_cache(Storage(config.output), deep=True)
    assert report.ok, report.lines()
    family = FAMILIES[Path(config.teacher.model).name]
    one_sequence = teacher.chat.one_sequence
    assert one_sequence != family.rewrites
    assert (summary.samples, summary.skipped) == (3 if one_sequence else 5, 0)
    with TeacherCache.open(config.output) as cache:
        head = torch.from_numpy(cache.head)
        by_id = {s.sample_id: s for s in read_conversations(config.data, by_turn=not one_sequence)}
        for record in (cache[i] for i in range(len(cache))):
            states, logits = plain(teacher, record, by_id[record.sample_id], config)
            torch.testing.assert_close(torch.from_numpy(record.arrays["hidden"]), states, **within(operations=MODEL))
            exact = logits.double().log_softmax(-1)
            ids = torch.from_numpy(record.arrays["topk_ids"].astype(np.int64))
            kept = torch.from_numpy(record.arrays["topk_logprobs"]).double()
            torch.testing.assert_close(exact.gather(-1, ids), kept, **within(torch.float16, 2))
            rebuilt = cache.manifest.logit_rule.apply(torch.from_numpy(record.arrays["hidden"]) @ head.T)
            torch.testing.assert_close(rebuilt, logits, **within(operations=MODEL))
            assert len(turns(record.arrays["loss_mask"])) == (len(record.questions) if one_sequence else 1)
    assert rescore_cache(config, 2, teacher=teacher, tolerance=1e-3).ok


def plain(teacher: TorchTeacher, record: TeacherRecord, sample: Any, config: CacheConfig) -> tuple[Any, Any]:
    """(R, d) final states and (R, V) logits of the model alone, one sample at a time, its own classes' way."""
    ids, mask = record.arrays["input_ids"].astype(np.int64), record.arrays["loss_mask"]
    answers = [tuple(ids[mask][part].tolist()) for part in turns(mask)]
    if not teacher.chat.one_sequence:
        answers = [*map(teacher.chat.original, record.answers[:-1]), *answers]
    images = [PillowImage.open(Path(config.data.image_folder) / image.path).convert("RGB") for image in sample.images]
    read = teacher.chat.sample(sample, answers, images)
    with torch.inference_mode():
        out = teacher._model(
            **collate([{"input_ids": torch.from_numpy(read.input_ids), **read.model}], 0, "right"),
            output_hidden_states=True,
        )
    rows = np.flatnonzero(read.loss_mask) - 1
    return out.hidden_states[-1][0][rows], out.logits[0][rows]


FIRST_SHARD = """
import os, signal, sys
from teacher_cache.build import shards
from teacher_cache.cli import app
commit = shards._commit
def killed(*rest):
    commit(*rest)
    os.kill(os.getpid(), signal.SIGKILL)
shards._commit = killed
app(["build", sys.argv[1], "--json"])
"""


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3"])
def test_a_build_that_was_killed_behind_its_first_shard_ends_with_the_same_bytes(
    name: str, family_folder: Folder, tmp_path: Path
) -> None:
    config = config_of(name, family_folder(name), tmp_path)
    path = tmp_path / "cache.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", FIRST_SHARD, str(path)], capture_output=True, env=environment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert [p.parent.name for p in (tmp_path / "cache/shards").glob("*/index.parquet")] == ["00000"]
    build_cache(config, style="quiet", break_lock=True)
    whole = replace(config, output=str(tmp_path / "whole"))
    build_cache(whole, style="quiet")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_text_alone_is_planned_built_verified_and_shown(family_folder: Folder, tmp_path: Path) -> None:
    config = config_of("llama3", family_folder("llama3"), tmp_path)
    config = replace(config, data=replace(config.data, regenerate="none"))
    plan = plan_cache(config)
    assert plan.images == 0
    assert not any("image" in note for note in plan.notes)
    summary = build_cache(config, style="quiet")
    assert (plan.samples, plan.rows) == (summary.samples, summary.rows)
    assert verify_cache(Storage(config.output), deep=True).ok
    assert dict(cache_info(Storage(config.output)))["template, images"] == "own, no images"


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "mistral3", "gemma3"])
def test_a_plan_counts_runs_and_positions_as_they_are_written(name: str, family_folder: Folder, tmp_path: Path) -> None:
    config = config_of(name, family_folder(name), tmp_path)
    config = replace(config, data=replace(config.data, regenerate="none"))
    plan, summary = plan_cache(config), build_cache(config, style="quiet")
    assert (plan.samples, plan.rows) == (summary.samples, summary.rows)
    with TeacherCache.open(config.output) as cache:
        assert plan.tokens == pytest.approx(cache.manifest.counts["tokens"], rel=0.1)
        assert plan.positions == pytest.approx(cache.manifest.counts["positions"], rel=0.1)


def test_visual_signals_of_images_that_are_not_alone_are_refused_at_open(family_folder: Folder, tmp_path: Path) -> None:
    config = config_of("qwen2_5_vl", family_folder("qwen2_5_vl"), tmp_path, visual="states")
    with pytest.raises(DataError, match=r"sample s1: 2 images; expected one image in front.*Set signals\.visual=none"):
        build_cache(config, style="quiet")


def test_another_setting_of_the_processor_is_another_cache(family_folder: Folder, tmp_path: Path) -> None:
    config = config_of("qwen2_5_vl", family_folder("qwen2_5_vl"), tmp_path)
    build_cache(config, style="quiet")
    size = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    teacher = replace(config.teacher, image_processor=size)
    with pytest.raises(CacheError, match=r"teacher\.processor\.image\.size\.longest_edge: 4704 in the cache, 3136 now"):
        build_cache(replace(config, teacher=teacher), style="quiet")
    with pytest.raises(TeacherError, match="has no sizes; it has"):
        build_cache(replace(config, teacher=replace(teacher, image_processor={"sizes": 1})), style="quiet")


def test_a_reading_that_is_not_the_processors_own_is_refused_before_anything_is_written(
    family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(self: Chat, *given: Any, **named: Any) -> Any:
        sample = read(self, *given, **named)
        types = {name: field * 0 for name, field in sample.model.items() if name.endswith("token_type_ids")}
        return replace(sample, model=sample.model | types)

    read = Chat.sample
    monkeypatch.setattr(Chat, "sample", typed)
    config = config_of("gemma3", family_folder("gemma3"), tmp_path)
    with pytest.raises(
        TemplateError, match=r"sample s0: token_type_ids is not what the model's own processor .*1 there"
    ):
        build_cache(config, style="quiet")
    assert not (tmp_path / "cache/manifest.json").exists()


def test_the_first_shard_is_read_again_and_a_false_one_is_removed(
    family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teacher_cache.teachers import torch_teacher

    pick = torch_teacher.pick
    monkeypatch.setattr(torch_teacher, "pick", lambda where, *rest: pick(replace(where, rows=where.rows - 1), *rest))
    config = config_of("llama3", family_folder("llama3"), tmp_path)
    with pytest.raises(
        TeacherError, match=r"greedy answer tokens are the most likely id of their row.*nothing was kept"
    ):
        build_cache(config, style="quiet")
    assert not list((tmp_path / "cache/shards").glob("*/index.parquet"))


def test_a_conversation_page_of_a_template_that_rewrites_turns_shows_its_last_turn(
    family_folder: Folder, tmp_path: Path
) -> None:
    config = config_of("qwen3", family_folder("qwen3"), tmp_path)
    build_cache(config, style="quiet")
    with TeacherCache.open(config.output) as cache:
        assert [cache[i].sample_id for i in range(len(cache))] == ["s0", "s1", "s1@2", "s2", "s2@2"]
        assert cache[2].questions == ("Left  right?", "And the other one?")
        assert len(turns(cache[2].arrays["loss_mask"])) == 1
    page = tmp_path / "view.html"
    write_view(config.output, page, samples=5)
    assert "And the other one?" in page.read_text()
