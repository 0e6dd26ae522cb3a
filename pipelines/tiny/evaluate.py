"""Scores a tiny LLaVA on a split of a written world: accuracy by question type, hallucinated objects in captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pipelines.tiny.questions import VISUAL_QUESTIONS, parse_caption
from pipelines.tiny.tokenizer import IMAGE, prompt_text
from student_train.evaluation.metrics import hallucination

LONGEST_ANSWER = 24  # four objects of three words, three "and", `</s>`, and room to go wrong


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1]. `accuracy` is exact match, by question type; captions count as right if they state all objects
    and nothing else, in any order."""

    accuracy: dict[str, float]
    questions: dict[str, int]
    hallucinated: float  # of the objects that captions state
    missed: float  # of the objects that are there

    @property
    def vqa(self) -> float:
        """Exact match over all visual questions, captions and facts left out."""
        counts = {name: self.questions[name] for name in VISUAL_QUESTIONS if name in self.questions}
        return sum(self.accuracy[name] * count for name, count in counts.items()) / sum(counts.values())


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[dict[str, Any]],
    image_folder: Path,
    *,
    batch: int = 128,
) -> list[str]:
    """Greedy answers to the first question of each sample, in order. Samples without an image are batched apart."""
    answers: dict[int, str] = {}
    for with_image in (True, False):
        chosen = [index for index, sample in enumerate(samples) if ("image" in sample) == with_image]
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            questions = [samples[i]["conversations"][0]["value"].removeprefix(f"{IMAGE}\n") for i in part]
            texts = [prompt_text(question, image=with_image) for question in questions]
            images = [Image.open(image_folder / samples[i]["image"]) for i in part] if with_image else None
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            answers.update(zip(part, processor.batch_decode(new, skip_special_tokens=True), strict=True))
    return [answers[index] for index in range(len(samples))]


def score(samples: Sequence[dict[str, Any]], answers: Sequence[str]) -> Score:
    """Compare answers with the truth in the samples of a dev or test split."""
    truths = [sample["conversations"][1]["value"] for sample in samples]
    kinds = [sample["question_type"] for sample in samples]
    asked = Counter(kinds)
    right = Counter(
        kind for kind, truth, given in zip(kinds, truths, answers, strict=True) if _is_right(kind, truth, given)
    )
    captions = [i for i, kind in enumerate(kinds) if kind == "describe"]
    objects = hallucination([parse_caption(answers[i]) for i in captions], [parse_caption(truths[i]) for i in captions])
    accuracy = {name: right[name] / count for name, count in asked.items()}
    return Score(accuracy, dict(asked), objects.hallucinated, objects.missed)


def _is_right(kind: str, truth: str, given: str) -> bool:
    return sorted(given.split(" and ")) == sorted(truth.split(" and ")) if kind == "describe" else given == truth


def score_world(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path, split: str) -> Score:
    """Answer and score the dev or test split of a world written by `write_world`."""
    samples = json.loads((Path(folder) / f"{split}.json").read_text())
    return score(samples, answer(model, processor, samples, Path(folder) / "images"))
