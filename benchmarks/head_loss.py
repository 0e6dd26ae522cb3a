"""What distilling adds to a step, and what the loss without the logits saves: time, then peak memory.

    python -m benchmarks.head_loss                 # a 100M-parameter student, V = 32,000, 4,096 rows for the memory
    python -m benchmarks.head_loss --small         # seconds, any machine
    python -m benchmarks.head_loss --device cuda   # on a GPU: beside Liger Kernel's fused losses (benchmarks/liger.py)

All variants run in one process, interleaved; memory is measured in a fresh process a
variant. Targets are as a cache stores them: top-64 in float16, states of a teacher twice as wide in int8.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from student_train.config import LossSpec
from student_train.losses.head_loss import dense_row_losses, head_losses, losses_of
from student_train.losses.row_losses import HiddenProjector, hidden_mse
from student_train.losses.targets import RowTargets, StoredStates, scales_on
from teacher_cache.build.signals import row_signals
from teacher_cache.store.codecs import encode, fit_channel_scales

CE = LossSpec("cross_entropy")
LOSSES: dict[str, list[LossSpec]] = {
    "cross-entropy": [CE],
    "cross-entropy + forward KL (top-k)": [CE, LossSpec("forward_kl", source="topk")],
    "cross-entropy + forward KL (exact)": [CE, LossSpec("forward_kl", source="exact")],
    "visual forward KL (exact)": [LossSpec("forward_kl", source="exact")],
}
GRID = (1.0,)


@dataclass(frozen=True)
class Sizes:
    """A student of d ``width``, ``layers``; ``samples`` of ``length`` tokens, ``answers`` of them rows."""

    width: int
    layers: int
    vocabulary: int
    teacher_width: int
    samples: int
    length: int
    answers: int
    memory_rows: int
    visual_rows: int
    rounds: int


FULL = Sizes(640, 12, 32_000, 1280, 4, 256, 64, 4096, 8 * 576, 7)
SMALL = Sizes(64, 2, 2_000, 128, 2, 64, 16, 256, 128, 2)


def targets_of(rows: int, sizes: Sizes, device: str, dtype: torch.dtype) -> RowTargets:
    """Random teacher states and head, stored and read back as a cache would."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, sizes.teacher_width, generator=generator)
    head = torch.randn(sizes.vocabulary, sizes.teacher_width, generator=generator) * 2 * sizes.teacher_width**-0.5
    scales = fit_channel_scales(states[:64].numpy(), "int8")
    codes, scale = encode(states, "int8", scales)
    parts = [row_signals(chunk @ head.T, 64, GRID) for chunk in states.split(256)]
    stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    stats = dict(zip(("lse@1", "mean", "std", "entropy"), stored["stats"].to(device).unbind(-1), strict=True))
    assert scale is not None
    return RowTargets(
        answer_ids=torch.randint(0, sizes.vocabulary, (rows,), generator=generator).to(device),
        topk_ids=stored["topk_ids"].to(device),
        topk_logprobs=stored["topk_logprobs"].float().to(device),
        stats=stats,
        hidden=StoredStates(codes.to(device), scale.to(device), "int8", scales_on(scales, device)),
        head=head.to(device, dtype),
    )


# Time


class Student(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.width * 27 // 10,
            num_hidden_layers=sizes.layers,
            num_attention_heads=max(1, sizes.width // 64),
            max_position_embeddings=sizes.length,
        )
        self.trunk = LlamaModel(config)
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        self.projector = HiddenProjector(sizes.width, sizes.teacher_width)


class Trainer:
    """A student, its optimiser and one batch, which all variants share: what the weights are costs no time."""

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.student = Student(sizes).to(device, dtype)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)
        self.input_ids = torch.randint(0, sizes.vocabulary, (sizes.samples, sizes.length), device=device)
        self.rows, self.answers = sizes.samples * sizes.answers, sizes.answers
        self.targets = targets_of(self.rows, sizes, device, dtype)

    def step(self, specs: list[LossSpec], match: bool = False, dense: bool = False) -> float:
        """One optimiser step; ``match`` adds hidden MSE, ``dense`` forms all logits as plain fine-tuning code does."""
        self.optimizer.zero_grad()
        states = self.student.trunk(input_ids=self.input_ids).last_hidden_state
        rows = states[:, -self.answers :].flatten(0, 1)
        weights, ones = {spec.name: 1.0 for spec in specs}, torch.ones(self.rows, device=rows.device)
        head = self.student.lm_head.weight
        if dense:
            total, _ = dense_row_losses(rows, head, losses_of(specs, self.targets), weights, ones)
        else:
            total, _ = head_losses(rows, head, self.targets, specs, weights, ones)
        if match:
            assert self.targets.hidden is not None
            teacher = self.targets.hidden.decode(slice(0, self.rows))
            total = total + hidden_mse(teacher, self.student.projector(rows)).sum()
        (total / self.rows).backward()
        self.optimizer.step()
        return total.item()


class HeadOnly:
    """Head and losses, forward and backward, without a student below them."""

    def __init__(self, rows: int, sizes: Sizes, specs: list[LossSpec], device: str, dtype: torch.dtype, dense: bool):
        torch.manual_seed(0)
        self.hidden = torch.randn(rows, sizes.width, device=device, dtype=dtype).requires_grad_()
        head = torch.randn(sizes.vocabulary, sizes.width, device=device) * sizes.width**-0.5
        self.head = head.to(dtype).requires_grad_()
        self.targets, self.specs, self.dense = targets_of(rows, sizes, device, dtype), specs, dense
        self.ones, self.weights = torch.ones(rows, device=device), {spec.name: 1.0 for spec in specs}

    def __call__(self) -> float:
        self.hidden.grad = self.head.grad = None
        if self.dense:
            losses = losses_of(self.specs, self.targets)
            total, _ = dense_row_losses(self.hidden, self.head, losses, self.weights, self.ones)
        else:
            total, _ = head_losses(self.hidden, self.head, self.targets, self.specs, self.weights, self.ones)
        total.backward()
        return total.item()


def compare(title: str, variants: dict[str, Callable[[], float]], rounds: int, device: str) -> None:
    """Print seconds per call and their ratio to the first variant's: medians over interleaved rounds.

    On a CPU they are the process's CPU seconds, which other processes on the machine disturb least; on a GPU wall
    seconds (``.item()`` waits for it).
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            start = clock()
            call()
            if number:  # the first is a warm-up
                seconds[name].append(clock() - start)
    print(f"\n{title}")
    base = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:58s} {middle * 1e3:8.1f} ms (best {min(values) * 1e3:8.1f})   {middle / base:5.2f}")


def step_times(sizes: Sizes, device: str, dtype: torch.dtype) -> None:
    topk, exact = LOSSES["cross-entropy + forward KL (top-k)"], LOSSES["cross-entropy + forward KL (exact)"]
    trainer = Trainer(sizes, device, dtype)
    variants = {
        "cross-entropy": lambda: trainer.step([CE]),
        "cross-entropy, all logits at once": lambda: trainer.step([CE], dense=True),
        "cross-entropy + forward KL (top-k) + hidden MSE": lambda: trainer.step(topk, match=True),
        "cross-entropy + forward KL (exact)": lambda: trainer.step(exact),
        "cross-entropy + forward KL (exact) + hidden MSE": lambda: trainer.step(exact, match=True),
    }
    parts = (trainer.student.trunk, trainer.student.lm_head)
    millions = sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    title = (
        f"One step, {millions:.0f}M-parameter student, V = {sizes.vocabulary:,}, "
        f"{sizes.samples * sizes.length:,} tokens, "
        f"{sizes.samples * sizes.answers:,} rows (ratio to cross-entropy)"
    )
    compare(title, variants, sizes.rounds, device)


def head_times(sizes: Sizes, device: str, dtype: torch.dtype) -> None:
    rows = sizes.memory_rows // 4
    names = [name for name in LOSSES if name.startswith("cross")]
    chunked = {name: HeadOnly(rows, sizes, LOSSES[name], device, dtype, False) for name in names}
    dense = {f"{name}, all at once": HeadOnly(rows, sizes, LOSSES[name], device, dtype, True) for name in names}
    title = f"Head and losses alone, {rows:,} rows (ratio to cross-entropy)"
    compare(title, {**chunked, **dense}, sizes.rounds, device)


# Memory


def memory_table(sizes: Sizes, arguments: argparse.Namespace) -> None:
    print(f"\nPeak memory of head and losses beyond inputs and the parameters' gradients, V = {sizes.vocabulary:,}")
    for name in LOSSES:
        if name == "cross-entropy":
            continue
        chunked, dense = (peak_in_fresh_process(name, way, arguments) for way in ("chunked", "dense"))
        rows = sizes.visual_rows if name.startswith("visual") else sizes.memory_rows
        print(
            f"  {name:42s} {rows:6,} rows   all at once {dense / 2**20:8.0f} MiB   "
            f"chunked {chunked / 2**20:6.0f} MiB   1/{dense / max(chunked, 1):.1f}"
        )


def peak_in_fresh_process(name: str, way: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.head_loss", "--measure", name, way]
    command += ["--device", arguments.device, "--dtype", arguments.dtype, *(["--small"] if arguments.small else [])]
    # glibc keeps what it took for blocks of up to 32 MiB; then memory used while making inputs would hide the peak.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return int(json.loads(out.splitlines()[-1])["bytes"])


def measure(name: str, way: str, sizes: Sizes, device: str, dtype: torch.dtype) -> int:
    """Bytes above those held before, less the gradients that stay."""
    rows = sizes.visual_rows if name.startswith("visual") else sizes.memory_rows
    HeadOnly(8, sizes, LOSSES[name], device, dtype, way == "dense")()  # libraries allocate their own on first use
    call = HeadOnly(rows, sizes, LOSSES[name], device, dtype, way == "dense")
    before = reset_peak(device)
    call()
    gradients = [g.numel() * g.element_size() for g in (call.hidden.grad, call.head.grad) if isinstance(g, Tensor)]
    return peak(device) - before - sum(gradients)


def reset_peak(device: str) -> int:
    """Forget the peak so far; bytes held now. On a CPU: the process's resident memory (Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--measure", nargs=2, metavar=("LOSS", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes, dtype = SMALL if arguments.small else FULL, getattr(torch, arguments.dtype)
    if arguments.measure:
        print(json.dumps({"bytes": measure(*arguments.measure, sizes, arguments.device, dtype)}))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, {arguments.dtype} products, float32 sums")
    if arguments.device == "cuda":
        from benchmarks.liger import table  # which measures as we do here

        for line in table("cuda", dtype):
            print(line, flush=True)
        return
    step_times(sizes, arguments.device, dtype)
    head_times(sizes, arguments.device, dtype)
    memory_table(sizes, arguments)


if __name__ == "__main__":
    main()
