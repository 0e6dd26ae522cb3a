"""Peak memory of LLaVA-KD's visual losses, from cached visual states, beside the naive way that forms all logits.

    python -m benchmarks.visual_loss               # V = 32,000, 576 image tokens, batch 8, widths 2560 and 5120
    python -m benchmarks.visual_loss --small       # seconds, any machine
    python -m benchmarks.visual_loss --device cuda

Each way is measured in a fresh process: forward and backward of the loss alone, beyond its inputs and the gradients
that stay. The naive way is what the released code does, in the same dtype: student and teacher logits of all image
positions at once, softmax by autograd; for the relation loss the Gram of those logits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.head_loss import peak, reset_peak
from student_train.losses import image_losses as relations
from student_train.losses.by_source import exact_loss
from student_train.losses.catalogue import LossSpec
from student_train.losses.head_loss import head_losses
from student_train.losses.targets import ImageTargets, StoredStates, scales_on
from teacher_cache.store.codecs import encode, fit_channel_scales


@dataclass(frozen=True)
class Sizes:
    images: int
    tokens: int
    vocabulary: int
    width: int
    teacher_width: int


KL = LossSpec("forward_kl", source="exact")
FULL = Sizes(images=8, tokens=576, vocabulary=32_000, width=2560, teacher_width=5120)
SMALL = Sizes(images=2, tokens=16, vocabulary=4_000, width=64, teacher_width=128)


@dataclass(frozen=True)
class Inputs:
    """student (B, N, d) and head (V, d) with gradients; the teacher's states as a cache keeps them, and its head."""

    student: Tensor
    head: Tensor
    images: ImageTargets

    @classmethod
    def make(cls, sizes: Sizes, device: str, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        scales = fit_channel_scales(torch.randn(64, sizes.teacher_width, generator=generator).numpy(), "int8")
        parts = [
            encode(torch.randn(sizes.tokens, sizes.teacher_width, generator=generator), "int8", scales)
            for _ in range(sizes.images)
        ]
        codes, row_scales = (torch.stack([p[n] for p in parts]).to(device) for n in (0, 1))
        teacher_head = normal(sizes.vocabulary, sizes.teacher_width) * sizes.teacher_width**-0.5
        states = StoredStates(codes, row_scales, "int8", scales_on(scales, device))
        square = relations.head_square(teacher_head)  # once a run, so not part of a step's memory
        images = ImageTargets(sizes.tokens, states=states, head=teacher_head, head_square=square)
        student = normal(sizes.images, sizes.tokens, sizes.width).requires_grad_()
        return cls(student, (normal(sizes.vocabulary, sizes.width) * sizes.width**-0.5).requires_grad_(), images)


def visual_kl(inputs: Inputs) -> Tensor:
    rows = inputs.student.flatten(0, 1)
    ones = torch.ones(len(rows), device=rows.device)
    value, _ = head_losses(rows, inputs.head, relations.visual_rows(inputs.images), [KL], {KL.name: 1.0}, ones)
    return value


def visual_kl_naive(inputs: Inputs) -> Tensor:
    return exact_loss(KL, _teacher_logits(inputs), (inputs.student @ inputs.head.T).flatten(0, 1)).sum()


def relation(inputs: Inputs) -> Tensor:
    return relations.relation(inputs.images, inputs.student, inputs.head).sum()


def relation_naive(inputs: Inputs) -> Tensor:
    teacher = _teacher_logits(inputs).unflatten(0, inputs.student.shape[:2]).float()
    student = (inputs.student @ inputs.head.T).float()
    return relations.relation_loss(teacher @ teacher.mT, student @ student.mT).sum()


def _teacher_logits(inputs: Inputs) -> Tensor:
    """(B·N, V), as a live teacher hands them out."""
    states, head = inputs.images.states, inputs.images.head
    assert states is not None
    assert head is not None
    return states.flatten().decode(slice(None)).to(head.dtype) @ head.T


WAYS: dict[str, tuple[Callable[[Inputs], Tensor], Callable[[Inputs], Tensor]]] = {
    "visual forward KL": (visual_kl, visual_kl_naive),
    "relation of logits": (relation, relation_naive),
}


def measure(name: str, naive: bool, sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes above those held before, less the gradients that stay; and the loss, which both ways must agree on."""
    WAYS[name][naive](Inputs.make(SMALL, device, dtype)).backward()  # libraries allocate their own on first use
    inputs = Inputs.make(sizes, device, dtype)
    before = reset_peak(device)
    loss = WAYS[name][naive](inputs)
    loss.backward()
    kept = sum(t.grad.numel() * t.grad.element_size() for t in (inputs.student, inputs.head) if t.grad is not None)
    return {"bytes": peak(device) - before - kept, "loss": float(loss.detach())}


def in_fresh_process(name: str, way: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.visual_loss", "--measure", name, way, "--device", arguments.device]
    command += ["--dtype", arguments.dtype, *(["--small"] if arguments.small else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes, dtype = SMALL if arguments.small else FULL, getattr(torch, arguments.dtype)
    if arguments.measure:
        name, way = arguments.measure
        print(json.dumps(measure(name, way == "naive", sizes, arguments.device, dtype)))
        return
    print(
        f"V = {sizes.vocabulary:,}, {sizes.tokens} image tokens, batch {sizes.images}, student width {sizes.width:,}, "
        f"teacher width {sizes.teacher_width:,}, {arguments.dtype}, {arguments.device}"
    )
    for name in WAYS:
        ours, naive = (in_fresh_process(name, way, arguments) for way in ("ours", "naive"))
        print(
            f"  {name:20s} all logits {naive['bytes'] / 2**20:8,.0f} MiB   here {ours['bytes'] / 2**20:6,.0f} MiB   "
            f"1/{naive['bytes'] / max(ours['bytes'], 1):.1f}   loss {naive['loss']:.5g} and {ours['loss']:.5g}"
        )


if __name__ == "__main__":
    main()
