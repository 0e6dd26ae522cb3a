"""What phase two is compared with: the live teacher on the same samples, dense, one sample at a time, plain loops.

No cache arrays are read but the token ids and the answer mask (and the draws of Random Sampling KD, which are random
numbers, not something a teacher could be asked for). What the cache stores in float16 is rounded to float16 here too.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pipelines.tiny.student import write_student
from pipelines.tiny.world import write_world
from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig, TrainConfig
from teacher_cache.config import CacheConfig, DataConfig, GenerationConfig, LayoutConfig, SignalsConfig, TeacherConfig
from teacher_cache.reader import TeacherCache
from teacher_cache.score import build_cache
from tests.threads import THREADS

TEACHER = Path(__file__).parents[1] / "pipelines" / "tiny" / "teacher"
IMAGES = 12
TOP_K = 8


@functools.cache
def world() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="world-"))
    write_world(folder, train_images=IMAGES, dev_images=6, test_images=2, seed=3)
    return folder


@functools.cache
def student_folder(seed: int = 0) -> str:
    folder = Path(tempfile.mkdtemp(prefix="student-")) / "student"
    write_student(folder, teacher=TEACHER, seed=seed)
    return str(folder)


def build(
    signals: SignalsConfig, image_mode: Literal["pad", "crop"] = "pad", teacher: str | Path = TEACHER, **data: Any
) -> str:
    """A cache of the tiny world with these signals, in a new folder."""
    output = tempfile.mkdtemp(prefix="cache-") + "/cache"
    build_cache(
        CacheConfig(
            output=output,
            data=DataConfig(**{"path": str(world() / "train.json"), "image_folder": str(world() / "images"), **data}),
            teacher=TeacherConfig(
                model=str(teacher),
                backend="torch",
                dtype="float32",
                template="tiny",
                image_mode=image_mode,
                max_length=256,
            ),
            generation=GenerationConfig(max_new_tokens=40),
            signals=signals,
            layout=LayoutConfig(shard_samples=8),
        ),
        style="quiet",
    )
    return output


EXACT = SignalsConfig(
    preset="full",
    top_k=TOP_K,
    hidden="text",
    visual="states",
    codec="float32",
    second_last=True,
    attention=True,
    sampled=12,
)


@functools.cache
def exact_cache() -> str:
    """Every signal, states in float32."""
    return build(EXACT)


def fit_config(
    losses: Sequence[LossSpec], output: str | Path, *, cache: str = "", attention: str = "eager", **train: Any
) -> FitConfig:
    settings = {
        "max_steps": 20,
        "global_batch": 10,
        "micro_batch": 4,
        "learning_rate": 1e-3,
        "threads": THREADS,
        "log_every": 1,
    }
    return FitConfig(
        output=str(output),
        sources=(SourceConfig(cache=cache or exact_cache(), image_folder=str(world() / "images")),),
        student=StudentConfig(model=student_folder(), attention=attention),
        losses=tuple(losses),
        train=TrainConfig(**{**settings, **train}),
    )


@dataclass(frozen=True)
class Sample:
    """One sample as a model reads it: ids with the image expanded, positions that predict answer tokens, …"""

    ids: Tensor  # (S,)
    rows: list[int]
    text: list[int]
    image: list[int]
    pixels: Tensor | None
    drawn: tuple[Tensor, Tensor]  # ids (R, n), counts (R, n)
    first: list[bool]
    """For each row: whether it predicts the first token of an answer."""


class Oracle:
    """The live teacher, and the losses written from their definitions."""

    def __init__(self, cache: str, *, folder: Path = TEACHER, dtype: torch.dtype = torch.float32) -> None:
        self.cache = TeacherCache.open(cache)
        self.teacher = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        self.teacher.eval()
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.token = self.cache.manifest.image_token
        self.image_tokens = self.cache.manifest.shape.image_tokens
        self._asked: dict[int, tuple[Sample, States]] = {}

    def asked(self, number: int) -> tuple[Sample, States]:
        """A sample and the teacher's states, computed once: they do not change while a student trains."""
        if number not in self._asked:
            sample = self.sample(number)
            with torch.no_grad():
                self._asked[number] = sample, states_of(self.teacher, sample)
        return self._asked[number]

    def sample(self, number: int) -> Sample:
        record = self.cache[number]
        ids: list[int] = []
        answer: list[bool] = []
        for token, is_answer in zip(
            record.arrays["input_ids"].tolist(), record.arrays["loss_mask"].tolist(), strict=True
        ):
            copies = self.image_tokens if token == self.token else 1
            ids += [token] * copies
            answer += [is_answer] * copies
        rows = [p for p in range(len(ids) - 1) if answer[p + 1]]
        pixels = None
        if record.image_id:
            with Image.open(world() / "images" / record.image_id) as image:
                shown = image.convert("RGB")
            pixels = self.processor.image_processor([shown], return_tensors="pt")["pixel_values"]
        draws = [torch.from_numpy(np.asarray(record.arrays.get(n, np.zeros(0)), np.int64)) for n in _DRAWS]
        return Sample(
            ids=torch.tensor(ids),
            rows=rows,
            text=[p for p in range(len(ids) - 1) if ids[p] != self.token],
            image=[p for p in range(len(ids)) if ids[p] == self.token],
            pixels=pixels,
            drawn=(draws[0], draws[1]),
            first=[not answer[p] for p in rows],
        )

    def loss(
        self,
        model: LlavaForConditionalGeneration,
        projectors: Any,
        specs: Sequence[LossSpec],
        numbers: Sequence[int],
    ) -> Tensor:
        """The batch's loss: per term, the mean over its rows (tokens, images), or over samples of the sample's mean."""
        samples, teachers = zip(*(self.asked(n) for n in numbers), strict=True)
        students = [states_of(model, s) for s in samples]
        total = torch.zeros(())
        for spec in specs:
            values = [
                self.values(spec, sample, teacher, student, projectors)
                for sample, teacher, student in zip(samples, teachers, students, strict=True)
            ]
            if spec.average == "sample":
                means = [v.sum() / max(n, 1) for v, n in values]
                term = sum(means) / len(means)
            else:
                term = sum(v.sum() for v, _ in values) / max(sum(n for _, n in values), 1)
            total = total + spec.weight * term
        return total

    def values(
        self, spec: LossSpec, sample: Sample, teacher: States, student: States, projectors: Any
    ) -> tuple[Tensor, int]:
        """(one value per unit, the number of units that the mean is over)."""
        if spec.name in ("hidden_mse", "hidden_cosine"):
            return self._hidden(spec, sample, teacher, student, projectors)
        if spec.name == "attention_mse":
            return self._attention(sample, teacher, student), len(sample.rows)
        if spec.name == "similarity_mse":
            return self._similarity(spec, sample, teacher, student)
        if spec.name in ("visual_kl", "relation"):
            return self._visual(spec, sample, teacher, student), int(bool(sample.image))
        places = {"answer": sample.rows, "text": sample.text, "all": sample.text + sample.image}[spec.tokens]
        t, s = teacher.logits[places].double(), student.logits[places].double()
        if spec.name == "cross_entropy":
            targets = sample.ids[[p + 1 for p in places]]
            return torch.stack([-F.log_softmax(s[r], -1)[targets[r]] for r in range(len(places))]), len(places)
        shared = min(t.shape[-1], s.shape[-1])  # checkpoints of one tokenizer may be padded to different sizes
        s = s[:, :shared]
        if spec.source == "sampled":
            value = sampled_kl(t, s, *sample.drawn)
        elif spec.source == "topk":
            value = torch.stack([topk_loss(spec, t[r], s[r]) for r in range(len(places))])
        else:
            value = torch.stack([dense_loss(spec, t[r, :shared], s[r]) for r in range(len(places))])
        if spec.rows == "llavadi":
            value = value * torch.tensor([not f for f in sample.first])
        return value, len(places)

    def _hidden(
        self, spec: LossSpec, sample: Sample, teacher: States, student: States, projectors: Any
    ) -> tuple[Tensor, int]:
        places = {"answer": sample.rows, "text": sample.text, "all": sample.text + sample.image}[spec.tokens]
        last = spec.layer == "last"
        t = (teacher.last if last else teacher.second_last)[places].double()
        s = projectors[spec.layer]((student.last if last else student.second_last)[places]).double()
        if spec.name == "hidden_mse":
            value = ((t - s) ** 2).sum(-1) / t.shape[-1]
        else:
            value = 1 - (t * s).sum(-1) / (t.norm(dim=-1) * s.norm(dim=-1))
        if spec.rows == "llavadi":
            value = value * torch.tensor([not f for f in sample.first])
        return value, len(places)

    def _attention(self, sample: Sample, teacher: States, student: States) -> Tensor:
        if not sample.image:
            return torch.zeros(1)
        t = teacher.attention.mean(0)[sample.rows][:, sample.image].half().double()
        s = student.attention.mean(0)[sample.rows][:, sample.image].double()
        return ((t - s) ** 2).mean(-1)

    def _similarity(self, spec: LossSpec, sample: Sample, teacher: States, student: States) -> tuple[Tensor, int]:
        places = sample.rows if spec.tokens == "answer" else sample.text
        if not sample.image:
            return torch.zeros(1), len(places)
        sides = []
        for states in (teacher, student):
            text, image = states.last[places].double(), states.last[sample.image].double()
            sides.append((text @ image.T) / (text.norm(dim=-1)[:, None] * image.norm(dim=-1)[None]))
        return ((sides[0] - sides[1]) ** 2).mean(-1), len(places)

    def _visual(self, spec: LossSpec, sample: Sample, teacher: States, student: States) -> Tensor:
        if not sample.image:
            return torch.zeros(1)
        if spec.name == "visual_kl":
            t, s = teacher.logits[sample.image].double(), student.logits[sample.image].double()
            t, s = t[:, : s.shape[-1]], s[:, : t.shape[-1]]
            return torch.stack([dense_loss(spec, t[n], s[n]) for n in range(len(t))]).mean()[None]
        states = ("logits" if spec.space == "logits" else "last",) * 2
        t, s = (getattr(side, n)[sample.image].double() for side, n in zip((teacher, student), states, strict=True))
        if spec.space == "logits":
            t, s = t[:, : s.shape[-1]], s[:, : t.shape[-1]]
        gram_t, gram_s = t @ t.T, s @ s.T
        return (1 - (gram_t * gram_s).sum() / (gram_t.norm() * gram_s.norm()))[None]


_DRAWS = ("sampled_ids", "sampled_counts")


@dataclass(frozen=True)
class States:
    """Of one sample, all S positions."""

    last: Tensor  # (S, d) after the final norm
    second_last: Tensor  # (S, d) before the last layer
    logits: Tensor  # (S, V)
    attention: Tensor  # (heads, S, S), last layer


def states_of(model: LlavaForConditionalGeneration, sample: Sample) -> States:
    out = model(
        input_ids=sample.ids[None],
        pixel_values=None if sample.pixels is None else sample.pixels.to(model.dtype),
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    last = out.hidden_states[-1][0]
    return States(last, out.hidden_states[-2][0], out.logits[0], out.attentions[-1][0])


def dense_loss(spec: LossSpec, t: Tensor, s: Tensor) -> Tensor:
    """One row, all V logits."""
    if spec.name == "logit_mse":
        return (((s - t) / spec.temperature) ** 2).mean()
    if spec.name == "forward_kl_standardised":
        t, s = ((x - x.mean()) / (x.std(correction=0) + 1e-7) for x in (t, s))
    p, q = F.softmax(t / spec.temperature, -1), F.softmax(s / spec.temperature, -1)
    return divergence(spec, p, q)


def topk_loss(spec: LossSpec, t: Tensor, s: Tensor) -> Tensor:
    """One row from what the cache keeps of it: k log-probabilities in float16, one bucket for the rest. Ids that the
    student does not have are left out, and the others scaled to mass 1."""
    logprobs, ids = F.log_softmax(t, -1).topk(TOP_K)
    logprobs = logprobs.half().double()
    own = ids < len(s)
    ids, logits = ids[own], (logprobs + t.logsumexp(-1))[own]
    if spec.name == "logit_mse":
        return (((s[ids] - logits) / spec.temperature) ** 2).mean()
    head = logprobs.exp()
    if spec.temperature != 1:
        raw = logprobs + t.logsumexp(-1)
        head = (raw / spec.temperature - (t / spec.temperature).logsumexp(-1)).exp()
    head = head[own] / (1 - head[~own].sum())
    tail = (
        1 - head.float().sum()
    )  # a difference of nearly equal numbers: float32 here as there, or its logarithm differs
    tail = min(tail, (len(s) - len(ids)) * head.min().float())
    tail = tail if tail > 0 else head.min()
    q = F.softmax(s / spec.temperature, -1)
    rest = torch.ones_like(q, dtype=torch.bool)
    rest[ids] = False
    return divergence(spec, torch.cat([head, tail[None]]), torch.cat([q[ids], q[rest].sum()[None]]))


def divergence(spec: LossSpec, p: Tensor, q: Tensor) -> Tensor:
    kl: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a * (a.log() - b.log())).sum()  # noqa: E731
    if spec.name == "reverse_kl":
        return kl(q, p)
    if spec.name == "jsd":
        m = spec.beta * p + (1 - spec.beta) * q
        return spec.beta * kl(p, m) + (1 - spec.beta) * kl(q, m)
    return kl(p, q)


def sampled_kl(t: Tensor, s: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
    """−Σ count / N · log q − H(p), a row at a time."""
    values = []
    for r in range(len(t)):
        p, log_q = F.softmax(t[r], -1), F.log_softmax(s[r], -1)
        own = ids[r] < s.shape[-1]
        share = counts[r][own].double() / counts[r][own].sum()
        values.append(-(share * log_q[ids[r][own]]).sum() + (p * p.log()).sum())
    return torch.stack(values)


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """Warm-up, then half a cosine: LLaVA's schedule, written again."""
    warmup = math.ceil(train.warmup_share * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
