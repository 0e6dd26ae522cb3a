"""Losses on image positions of any family: of equal processors what the live models give, else refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig, TrainConfig
from student_train.training.trainer import Run
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
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.models.collate import to_model
from teacher_cache.models.pretrained import load_model
from tests.fixtures.rounding import MODEL, rounding
from tests.fixtures.threads import THREADS

ONE_SIZE, SEVERAL = ((56, 84), (56, 84), (56, 84)), ((56, 84), (56, 56), (84, 56))
"""Height and width of three pictures: 2 x 3 positions each, or another number for each."""
LOSSES = (
    LossSpec("visual_kl"),
    LossSpec("relation", space="hidden"),
    LossSpec("forward_kl", source="exact", tokens="all"),
)
Make = Callable[[tuple[tuple[int, int], ...]], FitConfig]


@pytest.fixture(scope="module")
def made(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Qwen2.5-VL's cache of pictures of these sizes, and a student of its first layer."""
    pytest.importorskip("torchvision", reason="its processor needs the extra vlm")
    model, kept = family_folder("qwen2_5_vl"), dict[Any, FitConfig]()

    def make(sizes: tuple[tuple[int, int], ...]) -> FitConfig:
        if sizes not in kept:
            folder = tmp_path_factory.mktemp("qwen")
            build_cache(cache_config(model, folder, sizes), style="quiet")
            kept[sizes] = FitConfig(
                output=str(folder / "run"),
                sources=(SourceConfig(cache=str(folder / "cache"), image_folder=str(folder)),),
                student=StudentConfig(layers_from=str(model), layers=1),
                losses=LOSSES,
                train=TrainConfig(max_steps=1, global_batch=8, micro_batch=8, threads=THREADS),
            )
        return kept[sizes]

    return make


def cache_config(model: Path, folder: Path, sizes: tuple[tuple[int, int], ...]) -> CacheConfig:
    asked = ("What is it?", "Is the thing on the left large?", "Red?")
    lines: list[dict[str, Any]] = [
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "Are you?"}, {"from": "gpt", "value": "Yes."}],
        }
    ]
    for number, (size, question) in enumerate(zip(sizes, asked, strict=True)):
        noise = np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "A red square."}]
        lines.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(lines))
    return CacheConfig(
        output=str(folder / "cache"),
        data=DataConfig(path=str(folder / "data.json"), image_folder=str(folder), regenerate="none"),
        teacher=TeacherConfig(model=str(model), backend="torch", dtype="float32"),
        generation=GenerationConfig(max_new_tokens=4),
        signals=SignalsConfig(preset="full", top_k=8, hidden="text", visual="states", codec="float32"),
        layout=LayoutConfig(shard_samples=4),
        speed=SpeedConfig(device="cpu"),
    )


@torch.no_grad()
def test_losses_on_image_positions_are_those_of_the_two_live_models(made: Make) -> None:
    """Sample by sample, all logits: of each picture's positions, and of all positions that predict a token."""
    config = made(ONE_SIZE)
    run = Run.prepare(config)
    teacher = load_model("t", config.student.layers_from, dtype=torch.float32).eval()
    (micro,) = run.plan.micro_batches(0, 0, 1)
    _, parts = run.student(run.dataset[micro][1], 0)
    visual, relation, everywhere = list[Tensor](), list[Tensor](), list[Tensor]()
    for index in range(4):
        fields = to_model(run.dataset.batch([index]).fields, teacher)
        shown = (fields["input_ids"][0] == teacher.config.image_token_id).nonzero().squeeze(-1)
        both = [m(**fields, output_hidden_states=True, use_cache=False) for m in (teacher, run.student.model)]
        p, q = (out.logits[0].double().log_softmax(-1) for out in both)
        divergence = (p.exp() * (p - q)).sum(-1)  # (S,)
        everywhere.append(divergence[:-1])
        if len(shown):
            assert len(shown) == 6
            visual.append(divergence[shown].mean())
            t, s = (out.hidden_states[-1][0, shown].double() for out in both)
            relation.append(1 - torch.nn.functional.cosine_similarity((t @ t.T).flatten(), (s @ s.T).flatten(), dim=0))
    expected = {
        "visual_kl": torch.stack(visual).mean(),
        "relation": torch.stack(relation).mean(),
        "forward_kl": torch.cat(everywhere).mean(),
    }
    for name, value in expected.items():
        assert float(parts[name]) == pytest.approx(float(value), rel=rounding(torch.float32, 4 * MODEL)), name


def test_pictures_of_several_sizes_are_refused_for_losses_on_their_positions(made: Make) -> None:
    config = made(SEVERAL)
    for loss in LOSSES:
        with pytest.raises(CacheError, match=r"its images have 4 to 6 positions, expected as many for each\. Drop"):
            Run.prepare(dataclasses.replace(config, losses=(loss,)))
    Run.prepare(dataclasses.replace(config, losses=(LossSpec("forward_kl", source="exact", tokens="text"),)))


def test_another_processor_than_the_teachers_is_refused_by_its_setting_and_may_be_set(
    made: Make, tmp_path: Path
) -> None:
    config = made(ONE_SIZE)
    shutil.copytree(config.student.layers_from, tmp_path / "student")
    path = tmp_path / "student" / "processor_config.json"
    own = json.loads(path.read_text())
    size = dict(own["image_processor"]["size"])
    own["image_processor"]["size"] = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    path.write_text(json.dumps(own))
    student = dataclasses.replace(config.student, layers_from=str(tmp_path / "student"))
    smaller = dataclasses.replace(config, student=student)
    with pytest.raises(CacheError, match=r"processor has size: .*4704.*, the student's .*3136.*student\.image_p"):
        Run.prepare(smaller)
    Run.prepare(dataclasses.replace(smaller, losses=(LossSpec("forward_kl"),)))
    run = Run.prepare(
        dataclasses.replace(smaller, student=dataclasses.replace(student, image_processor={"size": size}))
    )
    run.export(tmp_path / "model")
    exported = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    assert exported["image_processor"]["size"] == size


REFUSED = {
    "losses: relation with pool: 1: .*only a square one can be pooled": {
        "losses": (LossSpec("relation", space="hidden", pool=1),)
    },
    r"train\.pack: this student reads token types": {"train": {"pack": True}, "losses": LOSSES[:1]},
    r"vision_features=cache: .*Set student\.vision_features=compute": {"student": {"vision_features": "cache"}},
}


@pytest.mark.parametrize("error", REFUSED)
def test_what_would_be_wrong_on_image_positions_is_refused_with_what_to_set(error: str, made: Make) -> None:
    config, changed = made(ONE_SIZE), dict[str, Any]()
    for name, value in REFUSED[error].items():
        section = getattr(config, name)
        changed[name] = dataclasses.replace(section, **value) if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=error):
        Run.prepare(dataclasses.replace(config, **changed))
