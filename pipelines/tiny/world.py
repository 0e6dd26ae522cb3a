"""Writes the tiny world as a LLaVA data set: a folder of PNG images and three JSON files.

Training answers are the noisy ones (see `questions`); dev and test carry the truth, one question per sample.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.tiny.questions import (
    CAPTION_QUESTIONS,
    FACTS,
    VISUAL_QUESTIONS,
    Turn,
    ask,
    ask_existence,
    ask_facts,
    ask_several,
    blind_answers,
    blind_caption,
    caption_objects,
    describe,
    parse_caption,
)
from pipelines.tiny.scenes import Scene, load_glyphs, render, sample_scene

__all__ = ["caption_objects", "parse_caption", "split_scenes", "write_world"]

SPLITS = ("train", "dev", "test")
TRAIN_TURNS = (4, 7)
EXISTENCE_QUESTIONS = 3  # about an image of dev and test
IMAGES_PER_FACT_SAMPLE = 8

Sample = dict[str, Any]


def write_world(folder: Path, *, train_images: int, dev_images: int, test_images: int, seed: int) -> None:
    """Write `images/*.png`, `train.json`, `dev.json` and `test.json` (LLaVA JSON) into `folder`.

    Each image depends on the seed, its split and its number only: a larger world starts with the smaller one's images.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (train_images, dev_images, test_images), strict=True):
        scenes = split_scenes(split, count, seed)
        samples: list[Sample] = []
        for number, (scene, pixels) in enumerate(zip(scenes, render(scenes), strict=True)):
            name = f"{split}-{number:06d}"
            Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
            rng = _rng(seed, split, number, "questions")
            samples += _train_samples(scene, name, number, rng) if split == "train" else _test_samples(scene, name, rng)
        if split != "train":
            samples += _fact_samples(split)
        (folder / f"{split}.json").write_text(json.dumps(samples, indent=1) + "\n")


def split_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """The first `count` scenes of a split: drawn with its own random numbers and its own handwriting."""
    glyphs = load_glyphs(split)
    return [sample_scene(_rng(seed, split, number, "scene"), glyphs) for number in range(count)]


def _rng(seed: int, split: str, number: int, purpose: str) -> np.random.Generator:
    """An independent generator for each image and purpose, so that no count or order can shift another's numbers."""
    return np.random.default_rng([seed, SPLITS.index(split), number, ("scene", "questions").index(purpose)])


def _train_samples(scene: Scene, name: str, number: int, rng: np.random.Generator) -> list[Sample]:
    """A conversation and a caption about the image; beside every eighth image also a text-only conversation."""
    questions = ask_several(scene, int(rng.integers(TRAIN_TURNS[0], TRAIN_TURNS[1] + 1)), rng)
    caption = blind_caption(scene, str(rng.choice(CAPTION_QUESTIONS)), rng)
    samples = [
        _sample(f"{name}-qa", blind_answers(questions, rng), f"{name}.png"),
        _sample(f"{name}-caption", [caption], f"{name}.png"),
    ]
    if number % IMAGES_PER_FACT_SAMPLE == 0:
        samples.append(_sample(f"{name}-fact", ask_facts(int(rng.integers(1, 4)), rng), None))
    return samples


def _test_samples(scene: Scene, name: str, rng: np.random.Generator) -> list[Sample]:
    """A sample for each question type with the true answer, and more existence questions (``exist_more``): POPE's F1
    wants several an image, accuracy over the types one of each."""
    samples = []
    turns = [ask(scene, question_type, rng) for question_type in VISUAL_QUESTIONS]
    for turn in turns:
        samples.append(_sample(f"{name}-{turn.type}", [turn], f"{name}.png") | {"question_type": turn.type})
    asked = {turn.question for turn in turns}
    more = [turn for turn in ask_existence(scene, EXISTENCE_QUESTIONS, rng) if turn.question not in asked]
    for number, turn in enumerate(more[: EXISTENCE_QUESTIONS - 1]):
        samples.append(_sample(f"{name}-exist-{number}", [turn], f"{name}.png") | {"question_type": "exist_more"})
    turn = describe(scene, str(rng.choice(CAPTION_QUESTIONS)), rng)
    objects = [" ".join(map(str, thing)) for thing in caption_objects(scene)]
    caption = _sample(f"{name}-describe", [turn], f"{name}.png")
    return [*samples, caption | {"question_type": "describe", "things": objects}]


def _fact_samples(split: str) -> list[Sample]:
    """Every fact once: the set is closed, so dev and test ask the same ones."""
    return [
        _sample(f"{split}-fact-{number:02d}", [Turn(question, answer, "fact")], None) | {"question_type": "fact"}
        for number, (question, answer) in enumerate(FACTS.items())
    ]


def _sample(sample_id: str, turns: list[Turn], image: str | None) -> Sample:
    """LLaVA JSON; `question_types` is ours and ignored by other readers."""
    conversation = []
    for index, turn in enumerate(turns):
        placeholder = "<image>\n" if image and index == 0 else ""
        conversation.append({"from": "human", "value": placeholder + turn.question})
        conversation.append({"from": "gpt", "value": turn.answer})
    sample: Sample = {"id": sample_id, "conversations": conversation, "question_types": [turn.type for turn in turns]}
    return sample | {"image": image} if image else sample
