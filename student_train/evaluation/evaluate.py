"""What a student can do: its answers to questions with known answers, and how close it is to the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from student_train.config import LossSpec, SourceConfig
from student_train.evaluation.questions import read_questions, template_name
from student_train.evaluation.scores import YES_NO, plain_answer, vqa_accuracy, yes_no_scores
from student_train.feed.batch import Weights, collate
from student_train.feed.sources import CacheSource
from student_train.losses.shared_ids import shared_count, shared_topk
from student_train.losses.targets import row_loss, row_targets
from student_train.students.preprocessor import Preprocessor, preprocessor_of
from student_train.training.objective import needed_arrays, teacher_side
from teacher_cache.data.conversations import IMAGE_TAG, Conversation
from teacher_cache.data.rows import expand
from teacher_cache.data.tokenization import end_token_id, template_by_name, tokenize_prompt
from teacher_cache.errors import ConfigError
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.pretrained import load_llava, read_processor
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage


@dataclass(frozen=True)
class Agreement:
    """Student against teacher on the answer rows of a held-out cache.

    kl: mean KL(teacher ‖ student) in nats, exact where the cache has states, else top-k + tail (a lower bound) ·
    top1, top5: share of rows where the student's (five) most likely ids hold the teacher's most likely one.
    """

    kl: float
    top1: float
    top5: float
    rows: int


@dataclass(frozen=True)
class Student:
    """A student folder, loaded to be looked at."""

    model: LlavaForConditionalGeneration
    processor: Any
    preprocessor: Preprocessor

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "float32", device: str = "cpu") -> Student:
        model = load_llava("student", str(folder), dtype=getattr(torch, dtype)).to(device).eval()
        processor = read_processor("student", str(folder))
        return cls(model, processor, preprocessor_of(model, processor))


def answer_questions(
    student: Student,
    data: str | Path,
    image_folder: str | Path,
    template: str = "",
    *,
    max_new_tokens: int = 64,
    batch: int = 64,
) -> list[str]:
    """Greedy answers to the first question of every sample of a LLaVA file, in order. ``template``: to be compared with
    the student's own, in which it is asked."""
    conversations, template = read_questions(data), template_name(student.processor, template)
    answers: list[str] = [""] * len(conversations)
    order = sorted(range(len(conversations)), key=lambda i: (conversations[i].image is None, i))
    for has_image in (True, False):
        group = [i for i in order if (conversations[i].image is not None) == has_image]
        for start in range(0, len(group), batch):
            places = group[start : start + batch]
            chosen = [conversations[i] for i in places]
            for i, text in zip(places, _generate(student, chosen, image_folder, template, max_new_tokens), strict=True):
                answers[i] = text
    return answers


@torch.inference_mode()
def _generate(
    student: Student, conversations: Sequence[Conversation], image_folder: str | Path, template: str, limit: int
) -> list[str]:
    form, tokenizer, prepare = template_by_name(template), student.processor.tokenizer, student.preprocessor
    prompts = []
    for conversation in conversations:
        segment = np.asarray(tokenize_prompt(conversation, form, tokenizer).segments[0])
        prompts.append(expand(segment, prepare.image_token, prepare.image_tokens))
    length, positions = max(len(p) for p in prompts), position_limit(student.model.config)
    if positions is not None and length + limit > positions:
        raise ConfigError(
            f"a question of {length} tokens and an answer of {limit} (max_new_tokens) do not fit into the student's "
            f"{positions} positions. Set max_new_tokens to at most {positions - length}, or leave that question out"
        )
    ids = torch.full((len(prompts), length), prepare.pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, length - len(prompt) :] = 1
    device = student.model.device
    images = [prepare.pixels(c.image, str(image_folder)) for c in conversations if c.image is not None]
    shown = {"pixel_values": torch.stack(images).to(device, student.model.dtype)} if images else {}
    out = student.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        **shown,
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        eos_token_id=end_token_id(tokenizer, form),
        pad_token_id=prepare.pad,
        suppress_tokens=[
            prepare.image_token,
            *range(len(tokenizer), student.model.get_output_embeddings().out_features),
        ],
    )[:, length:]
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


@torch.inference_mode()
def agreement(student: Student, source: SourceConfig, batch: int = 32) -> Agreement:
    """How close the student's distributions are to the cached teacher's, row by row."""
    manifest = read_manifest(Storage(source.cache))
    exact = manifest.signals["hidden"] != "none"
    spec = LossSpec("forward_kl", source="exact" if exact else "topk")
    names, _ = needed_arrays([spec], manifest)
    opened = CacheSource(source, student.processor.tokenizer, names, [])
    model, prepare = student.model, student.preprocessor
    vocabulary = model.get_output_embeddings().weight.shape[0]
    teacher = teacher_side(opened.cache, vocabulary, model.device, model.dtype, exact)
    totals = np.zeros(4)
    for start in range(0, len(opened), batch):
        raw = opened.read(range(start, min(start + batch, len(opened))))
        images = [prepare.pixels(i, source.image_folder) for i in raw.images if i is not None]
        made = collate(
            raw,
            [Weights(1.0, 1.0, 1.0, 1.0, 1.0)] * len(raw.input_ids),
            image_token=prepare.image_token,
            image_tokens=prepare.image_tokens,
            pad=prepare.pad,
            pixel_values=torch.stack(images) if images else None,
        ).to(model.device)
        states = model.model(
            input_ids=made.input_ids, attention_mask=made.attention_mask, pixel_values=made.pixel_values
        ).last_hidden_state[made.row_sample, made.row_position]
        logits = model.get_output_embeddings()(states).float()
        side = (teacher.signals, teacher.scales, teacher.head, made.row_index, teacher.vocabulary)
        targets = row_targets(made.arrays, made.answer_ids, *side)
        totals += _compare(targets, logits, spec)
    return Agreement(totals[0] / totals[3], totals[1] / totals[3], totals[2] / totals[3], int(totals[3]))


def _compare(targets: Any, logits: torch.Tensor, spec: LossSpec) -> np.ndarray:
    rows, shared = slice(0, len(logits)), shared_count(targets.vocabulary, logits.shape[-1])
    if spec.source == "exact":
        best = targets.exact_logits(rows, shared).argmax(-1)
    else:
        ids, logprobs, _ = shared_topk(targets.topk_ids, targets.topk_logprobs, targets.vocabulary, shared)
        best = ids.gather(-1, logprobs.argmax(-1, keepdim=True)).squeeze(-1)
    top5 = logits[:, :shared].topk(min(5, shared), -1).indices
    kl = row_loss(spec, targets, logits, rows).sum()
    hit1, hit5 = (top5[:, 0] == best).sum(), (top5 == best.unsqueeze(-1)).any(-1).sum()
    return np.array([float(kl), float(hit1), float(hit5), len(logits)])


def evaluate_model(
    model: Path,
    data: Path,
    image_folder: Path,
    template: str,
    output: Path | None = None,
    cache: str = "",
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """What ``student-train evaluate`` prints: accuracy by ``question_type``, POPE's figures on yes/no questions, and
    with a held-out ``cache`` the agreement with its teacher. ``data``: one question a sample, with its true answer."""
    questions, student = read_questions(data), Student.load(model)
    answers = answer_questions(student, data, image_folder, template, max_new_tokens=max_new_tokens)
    if output is not None:
        write_predictions(output, questions, answers, teacher_answers(cache) if cache else None)
    references = [question.answers[0] for question in questions]
    found = vqa_accuracy(answers, references, [question.kind or "all" for question in questions])
    facts: dict[str, Any] = {"questions": len(questions), "accuracy": found.overall}
    facts |= {f"accuracy of {name}": value for name, value in found.per_type.items()}
    closed = [(a, plain_answer(r)) for a, r in zip(answers, references, strict=True) if plain_answer(r) in YES_NO]
    if closed:
        facts |= {"yes/no questions": len(closed)}
        facts |= yes_no_scores([a for a, _ in closed], [r for _, r in closed]).as_dict()
    if cache:
        facts |= as_facts(agreement(student, SourceConfig(cache=cache, image_folder=str(image_folder))))
    return facts


TeacherAnswers = Mapping[tuple[str, str], str]
"""(sample_id, first question without the image tag) → what the teacher answered."""


def teacher_answers(cache: str) -> TeacherAnswers:
    """The first answers of a cache that its teacher gave itself."""
    with TeacherCache.open(cache) as opened:
        return {(t.sample_id, _bare(t.questions[0])): t.answers[0] for t in opened.texts() if t.source == "teacher"}


def write_predictions(
    path: Path, questions: Sequence[Conversation], answers: Sequence[str], teacher: TeacherAnswers | None = None
) -> None:
    """One JSON line per sample: id, question, reference, answer, and the teacher's answer where it is known."""
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        asked, image = question.questions[0], question.image
        line = {
            "id": question.sample_id,
            "question": asked if image is None else f"{IMAGE_TAG}\n{asked}",
            "reference": question.answers[0],
            "answer": answer,
            "question_type": question.kind,
            "image": "" if image is None else image.image_id,
        }
        said = (teacher or {}).get((question.sample_id, asked))
        lines.append(json.dumps(line if said is None else line | {"teacher": said}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _bare(question: str) -> str:
    return question.replace(IMAGE_TAG, "").strip()


def as_facts(agreement_: Agreement) -> dict[str, float]:
    """For tables: kl, top1, top5."""
    plain = asdict(agreement_)
    plain.pop("rows")
    return plain
