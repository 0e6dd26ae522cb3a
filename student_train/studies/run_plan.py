"""Steps, memory and hours of a run before anything is loaded: from configurations and the cache's counts alone.

Models are built on PyTorch's ``meta`` device, so parameters are counted, not estimated, and no weights are needed. What
is estimated says so: activations, and hours at an assumed throughput. A cache that is not there yet is replaced by what
its phase-one file (``made_with``) would store for ``expected`` samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from student_train.config import FitConfig, StudentConfig, check_fit_config
from student_train.losses.catalogue import States
from student_train.losses.head_loss import default_chunk_rows
from student_train.losses.needs import check_grids, check_losses
from student_train.losses.row_losses import HiddenProjector
from student_train.students.on_meta import student_on_meta
from student_train.students.processor import check_image_mode, image_mode
from student_train.studies.plan_sources import distils, epoch_of, source_manifest
from teacher_cache.data.images import image_tokens_of
from teacher_cache.data.units import bytes_text
from teacher_cache.models.model_sizes import CARD, NF4, parameter_bytes
from teacher_cache.models.parts import lora_targets, parts_of
from teacher_cache.store.manifest import Manifest

SHARDED_OVER = 8
ACTIVATION_BYTES, CHECKPOINTED_BYTES = 34, 2
"""Per layer, token and channel, in 16-bit and without attention scores: Korthikanti et al., 2022, sections 4 and 5."""
TRAINED_BYTES = 4
"""A trained weight, its gradient, each of Adam's two moments: float32 whatever student.dtype is."""


@dataclass(frozen=True)
class RunPlan:
    """One run. Bytes are those of one GPU holding everything; ``cache_bytes`` is what one run reads of its caches."""

    samples: int
    steps: int
    tokens: float
    """A step's, image positions counted."""
    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    head_bytes: int
    """The chunk of logits, and the teacher's head where a loss forms exact logits."""
    cache_bytes: int
    flops: float
    teacher_flops: float
    """What an online teacher's forward passes would add to this run; from a cache they cost nothing."""
    width: int
    layers: int
    vocabulary: int
    image_tokens: int
    half: bool
    """Whether products are formed in bf16 or float16."""

    @property
    def state_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + self.head_bytes

    @property
    def sharded_bytes(self) -> int:
        """With weights, gradients and optimiser states sharded over eight GPUs (FSDP)."""
        return self.state_bytes // SHARDED_OVER + self.activation_bytes + self.head_bytes

    @property
    def gpu_hours(self) -> float:
        return self.flops / (CARD.half_flops if self.half else CARD.float32_flops) / 3600

    @property
    def online_hours(self) -> float:
        return self.teacher_flops / CARD.half_flops / 3600

    def lines(self) -> list[tuple[str, Any]]:
        shape = f"width {self.width:,}, {self.layers} layers, {self.vocabulary:,} ids, {self.image_tokens} image tokens"
        one_gpu = f"{bytes_text(self.memory_bytes)}; sharded over {SHARDED_OVER}: {bytes_text(self.sharded_bytes)}"
        return [
            ("student", shape),
            ("parameters", self.parameters),
            ("  trained", self.trained),
            ("samples an epoch", self.samples),
            ("steps", self.steps),
            ("tokens a step", f"{self.tokens:,.0f}"),
            ("memory: weights", bytes_text(self.weight_bytes)),
            ("memory: gradients", bytes_text(self.gradient_bytes)),
            ("memory: optimiser states", bytes_text(self.optimizer_bytes)),
            ("memory: activations, estimated", bytes_text(self.activation_bytes)),
            ("memory: logits in chunks, teacher's head", bytes_text(self.head_bytes)),
            ("memory of one GPU", one_gpu),
            ("bytes read of the caches", bytes_text(self.cache_bytes)),
            ("GPU hours, estimated", f"{self.gpu_hours:,.1f}{'' if self.half else IN_FLOAT32}"),
            ("  an online teacher would add", f"{self.online_hours:,.1f}"),
        ]


ASSUMPTION = (
    "assumption",
    f"{CARD.half_flops / 1e12:.0f} TFLOP/s a GPU in 16 bits, {CARD.float32_flops / 1e12:g} in float32 ({CARD.basis}); "
    "2, 4 and 2 FLOP a parameter and token forward, backward and for checkpointing; no loss, loader or evaluation time",
)
IN_FLOAT32 = " in float32 (train.mixed_precision=bf16 takes a sixteenth)"


def plan_fit(config: FitConfig, known: Mapping[str, StudentConfig] | None = None) -> RunPlan:
    """One run; ``known``: what the models that other runs of the same file will write were made from."""
    check_fit_config(config)
    student = origin(config.student, known or {})
    parts = student.language_model and not (Path(student.model) / "config.json").is_file()
    model = student_on_meta(dataclasses.replace(student, model="") if parts else student)
    manifests = [source_manifest(s) for s in config.sources]
    mode = image_mode(student, {s.cache: m for s, m in zip(config.sources, manifests, strict=True) if s.cache})
    for source, manifest in zip(config.sources, manifests, strict=True):
        if distils(source):
            check_image_mode(config.losses, mode, manifest, source.cache)
            check_losses(config.losses, manifest, source.cache)
            check_grids(config.losses, manifest.image_tokens, _image_tokens(model, [manifest]))
    projectors = _projector_parameters(config, model, manifests)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + projectors
    image_tokens, text = _image_tokens(model, manifests), model.config.get_text_config()
    epoch = [epoch_of(config, s, m, image_tokens) for s, m in zip(config.sources, manifests, strict=True)]
    samples = sum(e.samples for e in epoch)
    mean_tokens = sum(e.tokens for e in epoch) / max(samples, 1)
    batch = config.train.global_batch
    steps = config.train.max_steps or max(round(config.train.epochs * -(-samples // batch)), 1)
    seen = steps * batch if config.train.max_steps else max(round(config.train.epochs * samples), 1)
    seen = min(seen, steps * batch)
    epochs = seen / max(samples, 1)
    bytes_each = int(parameter_bytes(config.student.dtype))
    return RunPlan(
        samples=samples,
        steps=steps,
        tokens=mean_tokens * batch,
        parameters=sum(p.numel() for p in model.parameters()) + projectors,
        trained=trained,
        weight_bytes=_weight_bytes(model, config.student, bytes_each) + projectors * TRAINED_BYTES,
        gradient_bytes=trained * TRAINED_BYTES,
        optimizer_bytes=trained * (2 if config.train.optimizer == "adamw_8bit" else 2 * TRAINED_BYTES),
        activation_bytes=_activation_bytes(config, text, max(e.longest for e in epoch)),
        head_bytes=_head_bytes(config, text, manifests, bytes_each),
        cache_bytes=int(epochs * sum(e.cache_bytes for e in epoch)),
        flops=_flops(config, model) * mean_tokens * seen,
        teacher_flops=epochs * sum(e.teacher_flops for e in epoch),
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        image_tokens=image_tokens,
        half=_in_half(config),
    )


def _image_tokens(model: Any, manifests: Sequence[Manifest]) -> int:
    """Positions of an image; where the student makes them of its size, the mean of its teachers'."""
    if model.config.model_type == "llava":
        return image_tokens_of(model.config)
    runs = sum(m.counts.get("runs", 0) for m in manifests)
    return round(sum(m.counts.get("image_positions", 0) for m in manifests) / max(runs, 1))


def _in_half(config: FitConfig) -> bool:
    """``auto`` counts as float32: what ``accelerate launch`` will be told is not known here."""
    return config.train.mixed_precision in ("bf16", "fp16") or config.student.dtype != "float32"


def _projector_parameters(config: FitConfig, model: Any, manifests: Sequence[Manifest]) -> int:
    layers = {loss.layer for loss in config.losses if isinstance(loss.entry, States)}
    if not layers:
        return 0
    with torch.device("meta"):
        projector = HiddenProjector(model.config.get_text_config().hidden_size, manifests[0].shape.hidden_size)
    return len(layers) * sum(p.numel() for p in projector.parameters())


def _weight_bytes(model: Any, config: StudentConfig, bytes_each: int) -> int:
    total = sum(p.numel() * (TRAINED_BYTES if p.requires_grad else bytes_each) for p in model.parameters())
    if not config.load_in_4bit:
        return int(total)
    packed = sum(model.get_submodule(n).weight.numel() for n in lora_targets(model) if ".lora_" not in n)
    return int(total - packed * (bytes_each - NF4))


def _activation_bytes(config: FitConfig, text: Any, longest: float) -> int:
    tokens = config.train.micro_batch * longest * (1 if _in_half(config) else 2)
    if not config.student.gradient_checkpointing:
        return int(ACTIVATION_BYTES * text.num_hidden_layers * tokens * text.hidden_size)
    return int((CHECKPOINTED_BYTES * text.num_hidden_layers + ACTIVATION_BYTES) * tokens * text.hidden_size)


def _head_bytes(config: FitConfig, text: Any, manifests: Sequence[Manifest], bytes_each: int) -> int:
    """Three float32 buffers of a chunk's logits (student, gradient, teacher), and the teachers' heads."""
    rows = config.train.head_rows or default_chunk_rows(text.vocab_size, torch.device("cuda"))
    chunk = 3 * 4 * rows * text.vocab_size
    needed = any(loss.needs_head for loss in config.losses)
    heads = sum(m.shape.vocabulary * m.shape.hidden_size for m in manifests) if needed else 0
    return int(chunk + heads * bytes_each)


def _flops(config: FitConfig, model: Any) -> float:
    """A token's: 2 a weight forward, 2 backward through it, 2 for the gradient of a trained one, 2 for checkpointing.

    The vision tower reads about as many positions as the language model does image tokens; it is counted likewise.
    """
    name = parts_of(model).tower
    tower = sum(p.numel() for p in model.get_submodule(name).parameters()) if name else 0
    language = sum(p.numel() for p in model.parameters()) - tower
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    again = 2 if config.student.gradient_checkpointing else 0
    cached = config.student.vision_features == "cache"
    return (4 + again) * language + 2 * trained + (0 if cached else 2) * tower


def origin(student: StudentConfig, known: Mapping[str, StudentConfig]) -> StudentConfig:
    """``student`` with the parts of the run that will write its model, where that is not there yet."""
    source = known.get(student.model)
    if source is None or (Path(student.model) / "config.json").is_file():
        return student
    parts = ("model", "language_model", "vision_tower", "tokenizer", "layers_from", "layers")
    return dataclasses.replace(student, **{name: getattr(source, name) for name in parts})


def output_model(fit: FitConfig) -> str:
    return str(Path(fit.output) / "model")
