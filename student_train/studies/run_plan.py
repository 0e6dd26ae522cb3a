"""Steps, memory and hours of a run before anything is loaded: from configurations and the cache's counts alone.

Models are built on PyTorch's ``meta`` device, so parameters are counted, not estimated, and no weights are needed. What
is estimated says so: activations, and hours at an assumed throughput. A cache that is not there yet is replaced by what
its phase-one file (``made_with``) would store for ``expected`` samples.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from student_train.config import (
    HIDDEN_LOSSES,
    LOGIT_LOSSES,
    FitConfig,
    LossSpec,
    SourceConfig,
    StudentConfig,
    check_fit_config,
)
from student_train.losses import image_losses as relations
from student_train.losses.head_loss import default_chunk_rows
from student_train.losses.row_losses import HiddenProjector
from student_train.students.on_meta import student_on_meta
from student_train.students.processor import check_image_mode, image_mode
from student_train.students.student import LORA_TARGETS
from student_train.studies.runs import AblationConfig, plan_runs
from student_train.training.objective import check_losses, needed_arrays
from student_train.training.stages import StagesConfig, stage_configs
from teacher_cache.config import CacheConfig, build_config, load_config
from teacher_cache.data.images import image_tokens_of
from teacher_cache.data.rows import expanded_length, text_positions
from teacher_cache.data.units import bytes_text
from teacher_cache.errors import ConfigError
from teacher_cache.models.model_config import load_model_config
from teacher_cache.models.model_sizes import FLOAT32_FLOPS, HALF_FLOPS, NF4, parameter_bytes, size_of
from teacher_cache.store.manifest import MANIFEST, Manifest, new_manifest, read_manifest
from teacher_cache.store.records import TeacherShape
from teacher_cache.store.storage import Storage

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
        return self.flops / (HALF_FLOPS if self.half else FLOAT32_FLOPS) / 3600

    @property
    def online_hours(self) -> float:
        return self.teacher_flops / HALF_FLOPS / 3600

    def rows(self) -> list[tuple[str, Any]]:
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
    f"{HALF_FLOPS / 1e12:.0f} TFLOP/s a GPU in 16 bits, {FLOAT32_FLOPS / 1e12:g} in float32 (an A100 at 40 %); 2, 4 "
    "and 2 FLOP a parameter and token forward, backward and for checkpointing; no loss, loader or evaluation time",
)
IN_FLOAT32 = " in float32 (train.mixed_precision=bf16 takes a sixteenth)"


def plan_file(path: Path, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """What ``student-train plan`` prints: (fact, value) lines of a fit, a stages or an ablation file.

    Raises
    ------
    ConfigError, CacheError
        Settings that contradict each other, losses that the cache cannot serve, a model without configuration.
    """
    if "arms" in _sections(path):
        return _ablation_rows(load_config(AblationConfig, path, overrides))
    if "stages" in _sections(path):
        return _stage_rows(load_config(StagesConfig, path, overrides))
    return [*plan_fit(load_config(FitConfig, path, overrides)).rows(), ASSUMPTION]


def plan_stages(config: StagesConfig) -> dict[str, RunPlan]:
    """Each stage by name; a stage whose model is another's output has that one's shape."""
    known: dict[str, StudentConfig] = {}
    plans = {}
    for name, fit in stage_configs(config):
        plans[name] = plan_fit(fit, known)
        known[_output_model(fit)] = _origin(fit.student, known)
    return plans


def plan_ablation(config: AblationConfig) -> dict[str, RunPlan]:
    """Each arm by name (its first seed; the others are the same)."""
    known: dict[str, StudentConfig] = {}
    plans = {}
    for run in plan_runs(config):
        fit = build_config(FitConfig, run.tree, f"arms.{run.arm}")
        known[_output_model(fit)] = _origin(fit.student, known)
        if run.arm not in plans:
            plans[run.arm] = plan_fit(fit, known)
    return plans


def plan_fit(config: FitConfig, known: Mapping[str, StudentConfig] | None = None) -> RunPlan:
    """One run; ``known``: what the models that other runs of the same file will write were made from."""
    check_fit_config(config)
    student = _origin(config.student, known or {})
    parts = student.language_model and not (Path(student.model) / "config.json").is_file()
    model = student_on_meta(dataclasses.replace(student, model="") if parts else student)
    manifests = [source_manifest(s) for s in config.sources]
    mode = image_mode(student, {s.cache: m for s, m in zip(config.sources, manifests, strict=True) if s.cache})
    for source, manifest in zip(config.sources, manifests, strict=True):
        if _distils(source):
            check_image_mode(config.losses, mode, manifest, source.cache)
            check_losses(config.losses, manifest, source.cache)
            _check_fit(config.losses, manifest, image_tokens_of(model.config))
    projectors = _projector_parameters(config, model, manifests)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + projectors
    image_tokens, text = image_tokens_of(model.config), model.config.get_text_config()
    epoch = [_epoch(config, s, m, image_tokens) for s, m in zip(config.sources, manifests, strict=True)]
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


def _in_half(config: FitConfig) -> bool:
    """``auto`` counts as float32: what ``accelerate launch`` will be told is not known here."""
    return config.train.mixed_precision in ("bf16", "fp16") or config.student.dtype != "float32"


def source_manifest(source: SourceConfig) -> Manifest:
    """The manifest of a finished cache; else the one that ``made_with`` will write, with expected counts.

    Raises
    ------
    ConfigError
        neither is there.
    CacheError
        a cache is there that may not be used: of another format, changed.
    """
    if source.cache and Storage(source.cache).exists(MANIFEST):
        manifest = read_manifest(Storage(source.cache))
        if manifest.complete:
            return manifest
    expected = source.expected
    if not expected.samples:
        raise ConfigError(
            f"{source.cache or source.data}: not there yet (or not complete), and sources[…].expected says nothing of "
            "its size. Make it, or give expected: {samples, rows_per_sample, tokens_per_sample, images} (and "
            "made_with: for a cache)"
        )
    phase_one = load_config(CacheConfig, source.made_with or None)
    facts: dict[str, Any] = {"shape": {"hidden_size": 1, "vocabulary": 1, "image_tokens": 0}}
    if source.made_with:
        teacher = load_model_config(phase_one.teacher.model, phase_one.teacher.revision)
        text = teacher.get_text_config()
        shape = TeacherShape(text.hidden_size, text.vocab_size, image_tokens_of(teacher))
        facts = {"shape": dataclasses.asdict(shape), "model": phase_one.teacher.model}
    counts = {
        "samples": expected.samples,
        "rows": round(expected.samples * expected.rows_per_sample),
        "tokens": round(expected.samples * expected.tokens_per_sample),
        "positions": round(expected.samples * float(text_positions(expected.tokens_per_sample, expected.image_share))),
        "images": expected.images,
        "with_image": round(expected.samples * expected.image_share),
    }
    manifest = new_manifest(phase_one, facts, {}, expected.samples)
    return dataclasses.replace(manifest, counts=counts)


def _sections(path: Path) -> set[str]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return set()  # load_config says what is wrong with the file
    return set(tree) if isinstance(tree, dict) else set()


def _ablation_rows(config: AblationConfig) -> list[tuple[str, Any]]:
    plans, seeds = plan_ablation(config), len(config.seeds)
    rows: list[tuple[str, Any]] = [("runs", f"{len(plans) * seeds}: {len(plans)} arms × {seeds} seeds")]
    for name, plan in plans.items():
        arm = config.arms[name]
        prepared = f", {arm.prepare['call']} before it (not in the hours)" if arm.prepare else ""
        rows.append(
            (
                f"{arm.table}: {name}" if arm.table else name,
                f"{seeds} × {plan.steps:,} steps, {plan.trained:,} trained, {bytes_text(plan.memory_bytes)} a GPU "
                f"({bytes_text(plan.sharded_bytes)} sharded), reads {bytes_text(plan.cache_bytes)}, "
                f"{plan.gpu_hours:,.1f} GPU hours{'' if plan.half else IN_FLOAT32}{prepared}",
            )
        )
    rows.append(("steps, all", sum(p.steps for p in plans.values()) * seeds))
    rows.append(("most memory of one GPU", bytes_text(max(p.memory_bytes for p in plans.values()))))
    rows.append(("GPU hours, all", f"{sum(p.gpu_hours for p in plans.values()) * seeds:,.1f}"))
    rows.append(("  an online teacher would add", f"{sum(p.online_hours for p in plans.values()) * seeds:,.1f}"))
    return [*rows, ASSUMPTION]


def _stage_rows(config: StagesConfig) -> list[tuple[str, Any]]:
    plans = plan_stages(config)
    rows = [(f"{stage}: {name.strip()}", value) for stage, plan in plans.items() for name, value in plan.rows()]
    return [*rows, ("GPU hours, all", f"{sum(p.gpu_hours for p in plans.values()):,.1f}"), ASSUMPTION]


@dataclass(frozen=True)
class _Epoch:
    """What an epoch takes of one source. tokens: of all its samples, image positions counted · longest: tokens of the
    longest sample to expect · cache_bytes: of the arrays that the losses need, an image's once for each sample ·
    teacher_flops: of an online teacher's forward passes, 2 a weight and token."""

    samples: int
    tokens: float
    longest: float
    cache_bytes: float = 0.0
    teacher_flops: float = 0.0


def _epoch(config: FitConfig, source: SourceConfig, manifest: Manifest, image_tokens: int) -> _Epoch:
    counts = manifest.counts
    whole, tokens = max(counts["samples"], 1), counts["tokens"]
    samples = int(source.share * min(source.max_samples or whole, counts["samples"]))
    images = counts.get("with_image", tokens - counts["samples"] - counts["positions"])
    mean = expanded_length(tokens, images, images * image_tokens) / whole
    longest = max(mean, float(manifest.teacher.get("max_length", 0)) if source.cache else 0.0)
    if not _distils(source):
        return _Epoch(samples, samples * mean, longest)
    lines = {"token": tokens, "row": counts["rows"], "position": counts["positions"], "image": images}
    names, visual = needed_arrays(config.losses, manifest)
    wanted = {"input_ids", "loss_mask", *names, *visual}
    arrays = [spec for spec in (*manifest.arrays, *manifest.image_arrays) if spec.name in wanted]
    flops = 0.0
    if any(loss.name != "cross_entropy" for loss in config.losses):
        read = expanded_length(tokens, images, images * manifest.shape.image_tokens)
        flops = 2.0 * _teacher_parameters(str(manifest.teacher.get("model", ""))) * read
    part = samples / whole
    return _Epoch(
        samples, samples * mean, longest, part * sum(s.line_bytes * lines[s.axis] for s in arrays), part * flops
    )


def _distils(source: SourceConfig) -> bool:
    return bool(source.cache) and source.answers == "cached"


def _check_fit(specs: Sequence[LossSpec], manifest: Manifest, image_tokens: int) -> None:
    for spec in specs:
        if spec.tokens == "all" or spec.name in ("visual_kl", "relation", "similarity_mse", "attention_mse"):
            relations.pooled_grid(manifest.shape.image_tokens, image_tokens, spec.pool)


def _projector_parameters(config: FitConfig, model: Any, manifests: Sequence[Manifest]) -> int:
    layers = {loss.layer for loss in config.losses if loss.name in HIDDEN_LOSSES}
    if not layers:
        return 0
    with torch.device("meta"):
        projector = HiddenProjector(model.config.get_text_config().hidden_size, manifests[0].shape.hidden_size)
    return len(layers) * sum(p.numel() for p in projector.parameters())


def _weight_bytes(model: Any, config: StudentConfig, bytes_each: int) -> int:
    total = sum(p.numel() * (TRAINED_BYTES if p.requires_grad else bytes_each) for p in model.parameters())
    if not config.load_in_4bit:
        return int(total)
    packed = sum(
        p.numel() for n, p in model.named_parameters() if re.match(LORA_TARGETS + r"(\.base_layer)?\.weight", n)
    )
    return int(total - packed * (bytes_each - NF4))


def _activation_bytes(config: FitConfig, text: Any, longest: float) -> int:
    tokens = config.train.micro_batch * longest * (1 if _in_half(config) else 2)
    if not config.student.gradient_checkpointing:
        return int(ACTIVATION_BYTES * text.num_hidden_layers * tokens * text.hidden_size)
    return int((CHECKPOINTED_BYTES * text.num_hidden_layers + ACTIVATION_BYTES) * tokens * text.hidden_size)


def _head_bytes(config: FitConfig, text: Any, manifests: Sequence[Manifest], bytes_each: int) -> int:
    """Three float32 buffers of a chunk's logits (student, gradient, teacher), and the heads of the exact losses."""
    rows = config.train.head_rows or default_chunk_rows(text.vocab_size, torch.device("cuda"))
    chunk = 3 * 4 * rows * text.vocab_size
    exact = any(
        (loss.name in LOGIT_LOSSES and loss.source == "exact") or loss.name in ("visual_kl", "relation")
        for loss in config.losses
    )
    heads = sum(m.shape.vocabulary * m.shape.hidden_size for m in manifests) if exact else 0
    return int(chunk + heads * bytes_each)


def _flops(config: FitConfig, model: Any) -> float:
    """A token's: 2 a weight forward, 2 backward through it, 2 for the gradient of a trained one, 2 for checkpointing.

    The vision tower reads about as many positions as the language model does image tokens; it is counted likewise.
    """
    language = sum(p.numel() for n, p in model.named_parameters() if "vision_tower" not in n)
    tower = sum(p.numel() for n, p in model.named_parameters() if "vision_tower" in n)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    again = 2 if config.student.gradient_checkpointing else 0
    cached = config.student.vision_features == "cache"
    return (4 + again) * language + 2 * trained + (0 if cached else 2) * tower


def _teacher_parameters(name: str) -> int:
    """0 for a teacher whose configuration is not at hand: a cache does not need it."""
    try:
        return size_of(load_model_config(name)).all
    except ConfigError:
        return 0


def _origin(student: StudentConfig, known: Mapping[str, StudentConfig]) -> StudentConfig:
    """``student`` with the parts of the run that will write its model, where that is not there yet."""
    source = known.get(student.model)
    if source is None or (Path(student.model) / "config.json").is_file():
        return student
    parts = ("model", "language_model", "vision_tower", "tokenizer", "layers_from", "layers")
    return dataclasses.replace(student, **{name: getattr(source, name) for name in parts})


def _output_model(fit: FitConfig) -> str:
    return str(Path(fit.output) / "model")
