"""Shared by the vLLM tests: the tiny world, the tiny teacher under torch, and one running engine for the session.

An engine takes 20 to 40 seconds to start on two cores, so the tests share one wherever its settings allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.tiny.world import write_world
from teacher_cache.config import CacheConfig, build_config
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.models.weights import rename_vision_weights
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.teachers.vllm.jobs import VllmOptions
from teacher_cache.teachers.vllm.vllm_teacher import VllmTeacher
from tests.fixtures.families import FAMILIES, LINES, Family, make_family

TEACHER = Path(__file__).resolve().parents[2] / "pipelines" / "tiny" / "teacher"
TEXT_ONLY_EACH = 10


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """As ``family_folder``, with one head of 32: the attention of vLLM's CPU build knows none of 8."""
    base, made = tmp_path_factory.mktemp("wide"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_family(wide(FAMILIES[name]), base / name)
            rename_vision_weights(made[name])
        return made[name]

    return folder


def wide(family: Family) -> Family:
    text: dict[str, Any] = {**family.text, "head_dim": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    if "mrope_section" in (rope := text.get("rope_parameters", {})):
        text["rope_parameters"] = {**rope, "mrope_section": [4, 4, 8]}
    lines = LINES if family.name == "gemma3" else ()  # vLLM's class looks them up in the vocabulary
    return replace(family, text=text, control=family.control + lines)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, train_images=480, dev_images=4, test_images=4, seed=3)
    return folder


@pytest.fixture(scope="session")
def config(world: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    return make_config(world, tmp_path_factory.mktemp("cache"))


def make_config(world: Path, output: Path, **sections: dict[str, Any]) -> CacheConfig:
    """The tiny teacher in float32; ``teacher={...}`` and so on change single fields."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"path": str(world / "train.json"), "image_folder": str(world / "images")},
        "teacher": {"model": str(TEACHER), "dtype": "float32", "chat_template": "tiny", "max_length": 200},
        "generation": {"max_new_tokens": 24},
        "speed": {"answer_batch": 128},
    }
    merged = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
    return build_config(CacheConfig, {"output": str(output), **merged}, "the test")


@pytest.fixture(scope="session")
def conversations(config: CacheConfig) -> list[Conversation]:
    """1,000 conversations of 1 to 4 turns, one in ten or so without an image."""
    samples = [s for s in read_conversations(config.data) if isinstance(s, Conversation)]
    assert len(samples) >= 1000
    cut = [_first_turns(sample, 1 + place % 4) for place, sample in enumerate(samples[:1000])]
    assert {len(c.questions) for c in cut} == {1, 2, 3, 4}
    assert 20 < sum(c.image is None for c in cut) < 500
    return cut


def _first_turns(sample: Conversation, turns: int) -> Conversation:
    return replace(sample, questions=sample.questions[:turns], answers=sample.answers[:turns])


@pytest.fixture(scope="session")
def hard_conversations(config: CacheConfig) -> list[Conversation]:
    """48 conversations of 5 to 7 turns, which fill several cache blocks of 32 tokens and share their first ones; and
    48 prompts of 28 tokens whose answers outgrow a block, all at the same time."""
    samples = [s for s in read_conversations(config.data) if isinstance(s, Conversation)]
    long = [s for s in samples if len(s.questions) >= 5][:48]
    captions = [s for s in samples if s.sample_id.endswith("-caption")][:48]
    return long + [replace(s, questions=(" ".join(["describe the image"] * 7),)) for s in captions]


@pytest.fixture(scope="session")
def torch_teacher(config: CacheConfig) -> TorchTeacher:
    return TorchTeacher(config.teacher, config.generation, config.speed)


@pytest.fixture(scope="session")
def vllm_teacher(config: CacheConfig, conversations: Sequence[Conversation]) -> Iterator[VllmTeacher]:
    with VllmTeacher(config, conversations, VllmOptions(cache_bytes=256 << 20)) as teacher:
        yield teacher
