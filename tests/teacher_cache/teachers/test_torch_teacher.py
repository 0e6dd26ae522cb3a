"""Teachers by torch that are not LLaVA-1.5: text alone, logits that are scaled or capped, models that are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.tiny.prepare import TEACHER
from student_train.losses.targets import TeacherSide
from teacher_cache.build.build import build_cache
from teacher_cache.config import CacheConfig, DataConfig, SignalsConfig, TeacherConfig
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.data.rows import rows_among_text
from teacher_cache.errors import DataError, TeacherError
from teacher_cache.models.pretrained import load_model
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from teacher_cache.trust.fidelity import cache_fidelity
from teacher_cache.trust.rescore import rescore_cache
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.families import FAMILIES, make_family
from tests.fixtures.rounding import MODEL, within

QUESTIONS = [
    ["What is in this picture?", "A red square near the wall."],
    ["Is it large?", "Yes, it is.", "How many colors do you see?", "Two blue circles."],
    ["Describe the objects in it.", "A green triangle; not large."],
]


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "granite"])
def text_config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    """A causal language model of text alone, with ChatML's control tokens, and conversations without images."""
    folder = tmp_path_factory.mktemp(request.param)
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    family = replace(
        FAMILIES[request.param], control=chatml, end="<|im_end|>", begin="", tokenizer_begins=False, template=""
    )
    make_family(family, folder / "model")
    samples = [
        {
            "id": str(number),
            "conversations": [
                {"from": "gpt" if turn % 2 else "human", "value": text} for turn, text in enumerate(conversation)
            ],
        }
        for number, conversation in enumerate(QUESTIONS)
    ]
    (folder / "data.json").write_text(json.dumps(samples))
    config = CacheConfig(
        data=DataConfig(path=str(folder / "data.json")),
        teacher=TeacherConfig(model=str(folder / "model"), backend="torch", dtype="float32", chat_template="chatml"),
        signals=SignalsConfig(preset="full", top_k=8, hidden="text", codec="float32"),
        output=str(folder / "cache"),
    )
    config = replace(config, generation=replace(config.generation, max_new_tokens=12))
    return replace(config, speed=replace(config.speed, device="cpu"))


@pytest.fixture(scope="module")
def text_cache(text_config: CacheConfig) -> CacheConfig:
    build_cache(text_config, style="quiet")
    return text_config


def test_a_text_models_rows_are_its_own_logits(text_cache: CacheConfig) -> None:
    """Of the model itself, called on the stored ids; and of the stored states and head, by the manifest's rule."""
    model = load_model("m", text_cache.teacher.model, dtype=torch.float32).eval()
    with TeacherCache.open(text_cache.output) as cache:
        assert cache.manifest.logit_rule == LogitRule.of(model.config)
        assert len(cache) == len(QUESTIONS)
        for record in (cache[i] for i in range(len(cache))):
            arrays = record.arrays
            ids, mask = torch.from_numpy(arrays["input_ids"].astype(np.int64)), arrays["loss_mask"]
            with torch.inference_mode():
                logits = model(input_ids=ids[None]).logits[0]
            rows = logits[np.flatnonzero(mask[1:])].log_softmax(-1)
            at = torch.from_numpy(arrays["topk_ids"].astype(np.int64))
            stored = torch.from_numpy(arrays["topk_logprobs"].astype(np.float32))
            torch.testing.assert_close(rows.gather(-1, at), stored, **within(torch.float16, 2))
            assert (at[:, 0] == ids[mask]).all()
            rebuilt = cache.manifest.logit_rule.apply(arrays["hidden"] @ np.asarray(cache.head, np.float32).T)
            np.testing.assert_allclose(rebuilt, logits[:-1].numpy(), **within(operations=MODEL, scale=10))


def test_a_student_is_given_the_teachers_own_logits(text_cache: CacheConfig) -> None:
    with TeacherCache.open(text_cache.output) as cache:
        arrays, image = cache[1].arrays, cache.manifest.image_token
        side = TeacherSide.of(cache, cache.manifest.shape.vocabulary, torch.device("cpu"), torch.float32, head=True)
        rows = torch.from_numpy(rows_among_text(arrays["input_ids"], arrays["loss_mask"], image))
        targets = side.rows({name: torch.from_numpy(array) for name, array in arrays.items()}, None, rows)
    exact = targets.exact_logits(slice(None)).log_softmax(-1)
    assert targets.topk_ids is not None
    assert targets.topk_logprobs is not None
    torch.testing.assert_close(exact.gather(-1, targets.topk_ids), targets.topk_logprobs, **within(torch.float16, 2))


def test_whoever_forms_logits_from_states_applies_the_rule(text_cache: CacheConfig) -> None:
    storage = Storage(text_cache.output)
    assert verify_cache(storage, deep=True).ok
    assert rescore_cache(text_cache, 3, tolerance=1e-3).ok
    for config in (None, text_cache):
        assert all(group.states_kl < 1e-4 for group in cache_fidelity(storage, 3, config=config).groups)


def test_an_image_before_a_text_model_is_refused(
    text_config: CacheConfig, cache_config: CacheConfig, tmp_path: Path
) -> None:
    config = replace(text_config, data=cache_config.data, output=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="48 × an image, but the model reads text only"):
        build_cache(config, style="quiet")


def test_a_teacher_whose_logits_are_not_what_its_configuration_says_is_refused_before_anything_is_written(
    cache_config: CacheConfig, tmp_path: Path
) -> None:
    """LLaVA's class knows no cap: with one in the language model's settings it runs, and caps nothing."""
    folder = Path(shutil.copytree(TEACHER, tmp_path / "model"))
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    settings["text_config"]["final_logit_softcapping"] = 5.0
    (folder / "config.json").write_text(json.dumps(settings))
    teacher = replace(cache_config.teacher, model=str(folder))
    with pytest.raises(TeacherError, match=r"is not the model's own logit: .* against .*, allowed difference"):
        build_cache(replace(cache_config, teacher=teacher, output=str(tmp_path / "cache")), style="quiet")
    assert not (tmp_path / "cache" / "manifest.json").exists()
