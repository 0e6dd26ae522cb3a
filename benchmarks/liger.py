"""The loss without the logits beside Liger Kernel's fused linear losses: time, peak memory, and whether numbers agree.

    python -m benchmarks.head_loss --device cuda

Forward and backward of head and loss alone, bfloat16 products, float32 sums. The teacher's side is its states and its
head on both sides: int8 states as a cache keeps them for ours, decoded beforehand for Liger's, whose JSD at beta 0 is
the forward KL. Liger's are Triton kernels; without CUDA, or without Liger, ours runs alone at a small size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.head_loss import peak, reset_peak
from student_train.config import LossSpec
from student_train.losses.head_loss import head_losses
from student_train.losses.targets import RowTargets, StoredStates, scales_on
from teacher_cache.store.codecs import encode, fit_channel_scales

LOSSES = {
    "cross-entropy": LossSpec("cross_entropy"),
    "forward KL, exact": LossSpec("forward_kl", source="exact"),
    "JSD, exact": LossSpec("jsd", source="exact"),
}
ROUNDS = 5


@dataclass(frozen=True)
class Size:
    rows: int
    vocabulary: int
    width: int
    teacher_width: int


FULL = [
    Size(rows, *shape) for shape in ((32_000, 2560, 5120), (152_000, 2048, 3584)) for rows in (4096, 16_384)
]  # LLaVA 13B to 2.7B, Qwen2.5-VL 7B to 3B
SMALL = [Size(256, 2_000, 64, 128)]


@dataclass(frozen=True)
class Inputs:
    """student (R, d) and head (V, d) with gradients; targets as of a cache; teacher (R, d_t): its states decoded."""

    student: Tensor
    head: Tensor
    targets: RowTargets
    teacher: Tensor

    @classmethod
    def make(cls, size: Size, device: str, dtype: torch.dtype) -> Inputs:
        torch.manual_seed(0)
        states = torch.randn(size.rows, size.teacher_width, device=device)
        scales = fit_channel_scales(states[:64].cpu().numpy(), "int8")
        stored = StoredStates(*encode(states, "int8", scales_on(scales, device)), "int8", scales_on(scales, device))

        def head(width: int) -> Tensor:
            return (torch.randn(size.vocabulary, width, device=device) * 2 * width**-0.5).to(dtype)

        return cls(
            student=torch.randn(size.rows, size.width, device=device, dtype=dtype).requires_grad_(),
            head=head(size.width).requires_grad_(),
            targets=RowTargets(
                answer_ids=torch.randint(0, size.vocabulary, (size.rows,), device=device),
                hidden=stored,
                head=head(size.teacher_width),
            ),
            teacher=stored.decode(slice(None)).to(dtype),
        )


Loss = Callable[[str, Inputs], Tensor]
"""The sum over the rows of the loss of this name."""


def ours(name: str, inputs: Inputs) -> Tensor:
    ones = torch.ones(len(inputs.student), device=inputs.student.device)
    spec = LOSSES[name]
    return head_losses(inputs.student, inputs.head, inputs.targets, [spec], {spec.name: 1.0}, ones)[0]


def ligers() -> Loss | str:
    """Liger's; or why it cannot run here."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
    except ImportError as error:
        return f"Liger Kernel cannot be imported ({error}); pip install liger-kernel"

    def loss(name: str, inputs: Inputs) -> Tensor:
        sums: Any = {"accum_dtype": torch.float32}
        if name == "cross-entropy":
            entropy = LigerFusedLinearCrossEntropyLoss(reduction="sum", **sums)
            return entropy(inputs.head, inputs.student, inputs.targets.answer_ids)
        mean = LigerFusedLinearJSD(jsd_beta=0.0 if "KL" in name else 0.5, **sums)
        return mean(inputs.student, inputs.head, inputs.teacher, inputs.targets.head, None) * len(inputs.student)

    return loss


@dataclass(frozen=True)
class Measured:
    """Seconds of forward and backward, bytes beyond inputs and gradients, and what came out."""

    seconds: float
    peak: int
    loss: float
    gradients: tuple[Tensor, Tensor]


def measure(loss: Loss, name: str, inputs: Inputs) -> Measured:
    device, seconds = inputs.student.device.type, []
    for _ in range(1 + ROUNDS):
        inputs.student.grad = inputs.head.grad = None
        before, begin = reset_peak(device), time.perf_counter()
        total = loss(name, inputs)
        total.backward()
        value = total.item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    assert inputs.student.grad is not None
    assert inputs.head.grad is not None
    gradients = inputs.student.grad, inputs.head.grad
    held = sum(g.numel() * g.element_size() for g in gradients)
    return Measured(statistics.median(seconds[1:]), peak(device) - before - held, value, gradients)


def difference(one: Measured, other: Measured) -> str:
    """Of the loss, and of both gradients, relative to the first's."""
    parts = [abs(one.loss - other.loss) / abs(one.loss)]
    for mine, theirs in zip(one.gradients, other.gradients, strict=True):
        parts.append(float((mine.float() - theirs.float()).norm() / mine.float().norm()))
    return ", ".join(f"{part:.1e}" for part in parts)


def table(device: str, dtype: torch.dtype) -> Iterator[str]:
    """Lines of Markdown, each when it is known."""
    other = ligers()
    sizes = FULL
    if isinstance(other, str):
        yield f"Without Liger Kernel, and at a small size: {other}."
        yield ""
        sizes, device = SMALL, device if torch.cuda.is_available() else "cpu"
    yield "| rows | V | loss | ours | Liger | ours beyond its inputs | Liger | differ: loss, d states, d head |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for size in sizes:
        inputs = Inputs.make(size, device, dtype)
        for name in LOSSES:
            mine = measure(ours, name, inputs)
            theirs = None if isinstance(other, str) else measure(other, name, inputs)
            yield (
                f"| {size.rows:,} | {size.vocabulary:,} | {name} | "
                + " | ".join(
                    [
                        f"{mine.seconds * 1e3:.1f} ms",
                        f"{theirs.seconds * 1e3:.1f} ms" if theirs else "–",
                        f"{mine.peak / 2**20:,.0f} MiB",
                        f"{theirs.peak / 2**20:,.0f} MiB" if theirs else "–",
                        difference(mine, theirs) if theirs else "–",
                    ]
                )
                + " |"
            )
        del inputs
