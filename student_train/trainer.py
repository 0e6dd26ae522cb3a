"""The training loop: ours, short, on Accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import nn

from student_train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, whole_weights
from student_train.config import LOGIT_LOSSES, FitConfig, TrainConfig, check_fit_config
from student_train.dataset import CacheSource, Source, check_images, open_source
from student_train.evaluate import preprocessor_of
from student_train.export import save_student
from student_train.features import ImageFeatures, compute_features
from student_train.loader import MicroBatches, Preprocessor, StepPlan, make_loader, on_device
from student_train.objective import (
    DistilledStudent,
    TeacherSide,
    check_losses,
    needed_arrays,
    teacher_side,
    vision_features,
)
from student_train.processor import prepare_processor
from student_train.relations import head_square
from student_train.student import load_student, merge_adapters
from student_train.training.output import output_lock
from teacher_cache.config import ConfigError, as_plain
from teacher_cache.manifest import digest, read_manifest
from teacher_cache.progress import Style, stage
from teacher_cache.reader import TeacherCache
from teacher_cache.storage import Storage
from teacher_cache.tokenization import Template
from teacher_cache.writer import HEAD


@dataclass(frozen=True)
class FitSummary:
    """What a run cost and where it ended. ``waiting_share``: part of the time in which the loop had no batch yet."""

    steps: int
    samples: int
    seconds: float
    cpu_seconds: float
    waiting_share: float
    peak_megabytes: float
    loss: float
    parts: dict[str, float]
    model: str


def fit(config: FitConfig, style: Style = "auto") -> FitSummary:
    """Train one student and export it to ``output/model``; goes on from the last checkpoint of the same settings.

    Raises
    ------
    ConfigError, CacheError, DataError
        before the first step, saying what to change.
    """
    check_fit_config(config)
    with output_lock(config.output):
        run = Run.prepare(config)
        run.restore()
        run.train(style)
        return run.finish()


@dataclass
class Run:
    """A prepared run: everything that is open while training."""

    config: FitConfig
    accelerator: Accelerator
    student: nn.Module
    processor: Any
    template: Template
    optimizer: torch.optim.Optimizer
    plan: StepPlan
    dataset: MicroBatches
    folder: Path
    fingerprint: str
    caches: list[dict[str, Any]]
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    waiting: float = 0.0
    last: dict[str, float] | None = None
    ended: bool = False
    """By ``max_seconds``, before the last step of the plan."""

    @classmethod
    def prepare(cls, config: FitConfig) -> Run:
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        accelerator = make_accelerator(config)
        model, processor = load_student(config.student, train.seed)
        template = prepare_processor(processor, config)
        sources = _open_sources(config, processor.tokenizer)
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        preprocessor = preprocessor_of(model, processor)
        plan = StepPlan(sources, [s.share for s in config.sources], train, preprocessor.image_tokens)
        features = _features(config, model, sources, preprocessor, accelerator)
        teachers = [_teacher_side(config, source, model, accelerator.device) for source in sources]
        student = DistilledStudent(
            model, config.losses, teachers, head_rows=train.head_rows, image_tokens=preprocessor.image_tokens
        )
        optimizer = make_optimizer(student, train)
        student, optimizer = accelerator.prepare(student, optimizer)
        if train.tracker:
            accelerator.init_trackers(folder.name)
        return cls(
            config=config,
            accelerator=accelerator,
            student=student,
            processor=processor,
            template=template,
            optimizer=optimizer,
            plan=plan,
            dataset=MicroBatches(sources, preprocessor, features, train.pixel_cache, train.pack),
            folder=folder,
            fingerprint=run_fingerprint(config, sources),
            caches=[_cache_facts(s.cache) for s in sources if isinstance(s, CacheSource)],
        )

    def restore(self) -> None:
        """Weights, optimiser and step of the last checkpoint, if there is one."""
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return
        facts = load_checkpoint(path, self.student, self.optimizer, self.fingerprint)
        self.step, self.samples = facts["step"], facts["samples"]
        self.seconds, self.cpu_seconds, self.waiting = facts["seconds"], facts["cpu_seconds"], facts["waiting"]
        self.last, self.ended = facts["last"], facts.get("ended", False)

    def train(self, style: Style = "auto") -> None:
        accelerator, train, plan = self.accelerator, self.config.train, self.plan
        steps = range(self.step, self.step if self.ended else plan.steps)
        loader = make_loader(
            self.dataset,
            plan,
            steps,
            accelerator.process_index,
            accelerator.num_processes,
            train.workers,
            accelerator.device.type == "cuda",
        )
        self.student.train()
        self._accelerated_eval()
        log = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        begin, cpu_begin, mark = time.monotonic(), time.process_time(), time.monotonic()
        sums: dict[str, torch.Tensor] = {}
        with log, stage("training", len(steps), "steps", style if accelerator.is_main_process else "quiet") as shown:
            for micro, batch in on_device(loader, accelerator.device):
                self.waiting += time.monotonic() - mark
                if not sums:  # what a model draws (dropout) is a function of the step, so that resuming is exact
                    torch.manual_seed(step_seed(train.seed, accelerator.process_index, micro.step))
                self._backward(batch, micro.source, micro.last, sums)
                if micro.last:
                    self._update(plan.steps)
                    self.samples += len(plan.global_batch(micro.step))
                    self.step = micro.step + 1
                    self.seconds += time.monotonic() - begin
                    self.cpu_seconds += time.process_time() - cpu_begin
                    begin, cpu_begin = time.monotonic(), time.process_time()
                    if self.step % train.log_every == 0 or self.step == plan.steps:
                        self._log(sums, log)
                    sums = {}
                    shown.advance(1, **({"loss": self.last["loss"]} if self.last else {}), waiting=self._waiting())
                    self.ended = self._out_of_time()
                    if self.ended:
                        break
                    if train.checkpoint_every and self.step % train.checkpoint_every == 0:
                        self._checkpoint()
                del batch  # its memory is given back here, not while the next one is waited for
                mark = time.monotonic()

    def finish(self) -> FitSummary:
        """Checkpoint, export and summary."""
        self._checkpoint()
        model = self.folder / "model"
        self.export(model)
        self.accelerator.wait_for_everyone()
        if self.config.train.tracker:
            self.accelerator.end_training()
        last = dict(self.last or {})
        summary = FitSummary(
            steps=self.step,
            samples=self.samples,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            waiting_share=self.waiting / max(self.seconds, 1e-9),
            peak_megabytes=peak_megabytes(self.accelerator.device),
            loss=last.pop("loss", float("nan")),
            parts=last,
            model=str(model),
        )
        if self.accelerator.is_main_process:
            facts = {"config": as_plain(self.config), "caches": self.caches, "steps": self.step}
            (self.folder / "run.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            text = json.dumps(as_plain(summary), indent=1)
            (self.folder / "summary.json").write_text(text, encoding="utf-8")
        return summary

    def export(self, folder: Path) -> None:
        """The plain student as a Hugging Face folder: no projectors, no optimiser, adapters merged.

        Every rank must call it; the main process writes.
        """
        model = self.accelerator.unwrap_model(self.student).model
        if self.accelerator.distributed_type == DistributedType.FSDP:
            weights = whole_weights(self.student)  # collected from all ranks, on the main process only
            if self.accelerator.is_main_process:
                model, _ = load_student(self.config.student, self.config.train.seed)
                model.load_state_dict({n.removeprefix("model."): w for n, w in weights.items() if n[:6] == "model."})
        if not self.accelerator.is_main_process:
            return
        if self.config.student.train == "lora":
            merge_adapters(model)
        if self.config.student.load_in_4bit:
            model = model.dequantize()
        save_student(model, self.processor, folder, self.template)

    def _backward(self, batch: Any, source: int, last: bool, sums: dict[str, torch.Tensor]) -> None:
        accelerator = self.accelerator
        context = contextlib.nullcontext() if last else accelerator.no_sync(self.student)
        with context:
            loss, parts = self.student(batch, source)
            # DDP and FSDP average gradients over ranks; the loss is already divided by the global batch.
            accelerator.backward(loss * accelerator.num_processes)
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()

    def _update(self, steps: int) -> None:
        train = self.config.train
        factor = learning_rate_factor(self.step, steps, train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if train.clip_norm:
            self.accelerator.clip_grad_norm_(self.student.parameters(), train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _log(self, sums: dict[str, torch.Tensor], log: Any) -> None:
        names = sorted(sums)
        values = torch.stack([sums[n].float() for n in names])
        self.last = dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.step, "seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 3)}
        rate = self.optimizer.param_groups[0]["lr"]
        log.write(json.dumps({**line, "learning_rate": rate, **self.last}) + "\n")
        log.flush()
        if self.config.train.tracker:
            self.accelerator.log({**self.last, "learning_rate": rate}, step=self.step)

    def _checkpoint(self) -> None:
        facts = {
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "waiting": self.waiting,
            "last": self.last,
            "ended": self.ended,
            "fingerprint": self.fingerprint,
        }
        main = self.accelerator.is_main_process
        save_checkpoint(self.folder / "checkpoints", self.student, self.optimizer, facts, main)

    def _out_of_time(self) -> bool:
        """The same answer on every rank: one that went on alone would wait for the others for ever."""
        limit = self.config.train.max_seconds
        if not limit:
            return False
        used = torch.tensor(self.cpu_seconds, device=self.accelerator.device)
        return bool(self.accelerator.reduce(used, "mean") >= limit)

    def _waiting(self) -> str:
        return f"{100 * self.waiting / max(self.seconds, 1e-9):.1f} %"

    def _accelerated_eval(self) -> None:
        """A frozen tower stays in evaluation mode."""
        student = self.accelerator.unwrap_model(self.student)
        if not self.config.student.train_vision:
            student.model.model.vision_tower.eval()


def make_accelerator(config: FitConfig) -> Accelerator:
    """One process, DDP or FSDP, as ``torchrun`` or ``accelerate launch`` started us.

    Parameters that no loss reaches (the end of a trained tower, the output head without a loss on it) must be looked
    for by DDP; elsewhere there are none, and looking costs a pass over the graph. Accelerate keeps the precision of the
    first run in a process for all; a later stage has its own.
    """
    head = any(loss.name in ("cross_entropy", *LOGIT_LOSSES) for loss in config.losses)
    unused = config.student.train_vision or not head
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)]
    AcceleratorState._reset_state()
    precision = config.train.mixed_precision
    return Accelerator(
        mixed_precision=None if precision == "auto" else precision,
        cpu=not torch.accelerator.is_available(),  # unless told so, Accelerate overlooks torchrun on a CPU
        log_with=config.train.tracker or None,
        project_dir=config.output,
        kwargs_handlers=handlers,
    )


def step_seed(seed: int, rank: int, step: int) -> int:
    """63 bits that no two (seed, rank, step) share but by chance, however large they are."""
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0] >> 1)


def learning_rate_factor(step: int, steps: int, train: TrainConfig) -> float:
    """Share of the base rate at ``step`` (from 0): linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(train.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(student: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what needs a gradient; the multimodal projector may have a rate of its own, as in LLaVA."""
    projector = [p for n, p in student.named_parameters() if p.requires_grad and "multi_modal_projector" in n]
    rest = [p for n, p in student.named_parameters() if p.requires_grad and "multi_modal_projector" not in n]
    rate = train.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": rate, "base_lr": rate},
        {"params": projector, "lr": rate, "base_lr": train.projector_learning_rate or rate},
    ]
    groups = [g for g in groups if g["params"]]
    if train.optimizer == "adamw_8bit":
        try:
            import bitsandbytes.optim as quantized
        except ImportError as error:
            raise ConfigError(
                "train.optimizer=adamw_8bit needs bitsandbytes. Install it (pip install bitsandbytes), or set "
                "train.optimizer=adamw"
            ) from error
        return quantized.AdamW8bit(groups, lr=rate, betas=train.betas, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=train.betas, weight_decay=train.weight_decay)


def run_fingerprint(config: FitConfig, sources: list[Source]) -> str:
    """A digest of what decides the result: settings and the caches' content."""
    caches = [s.cache.manifest.fingerprint if isinstance(s, CacheSource) else len(s) for s in sources]
    return digest([deciding_settings(config), caches])


def deciding_settings(config: FitConfig) -> dict[str, Any]:
    """Plain data: the settings, without those that say where or how fast it runs."""
    plain: dict[str, Any] = as_plain(config)
    plain.pop("output")
    for name in (
        "micro_batch",
        "pack",
        "head_rows",
        "workers",
        "pixel_cache",
        "checkpoint_every",
        "log_every",
        "tracker",
        "threads",
    ):
        plain["train"].pop(name)
    for name in ("gradient_checkpointing", "vision_features"):
        plain["student"].pop(name)
    for source in plain["sources"]:
        for name in ("image_folder", "cache", "prefetch_folder", "prefetch_gigabytes", "made_with", "expected"):
            source.pop(name)
    return plain


def _cache_facts(cache: TeacherCache) -> dict[str, Any]:
    """What a model card says of a cache."""
    manifest = cache.manifest
    return {"teacher": manifest.teacher["model"], "fingerprint": manifest.fingerprint, "samples": len(cache)}


def peak_megabytes(device: torch.device) -> float:
    """Peak memory of the run: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _open_sources(config: FitConfig, tokenizer: Any) -> list[Source]:
    sources = []
    for source in config.sources:
        names: list[str] = []
        visual: list[str] = []
        if source.cache and source.answers == "cached":
            manifest = read_manifest(Storage(source.cache))
            check_losses(config.losses, manifest, source.cache)
            names, visual = needed_arrays(config.losses, manifest)
        opened = open_source(source, tokenizer, names, visual)
        check_images(opened)
        sources.append(opened)
    return sources


def _features(
    config: FitConfig, model: Any, sources: list[Source], preprocessor: Preprocessor, accelerator: Accelerator
) -> ImageFeatures | None:
    """Features of a frozen tower, once per image; listed and computed by the main process, read by all."""
    if config.student.vision_features == "compute":
        return None
    if config.student.train_vision:
        raise ConfigError("student.vision_features=cache needs a frozen tower; set student.train_vision=false")
    llava = model.model.to(accelerator.device)

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        return vision_features(llava, pixels.to(accelerator.device, model.dtype))

    folder = [""]
    if accelerator.is_main_process:
        images = ((image, source.image_folder) for source in sources for image in source.images())
        weights = digest([[n, float(p.float().sum())] for n, p in llava.vision_tower.named_parameters()])
        seen_as = digest([weights, preprocessor.image_mode])
        folder = [str(compute_features(Path(config.output).parent, images, tower, preprocessor.pixels, seen_as))]
    return ImageFeatures(Path(broadcast_object_list(folder)[0]))


def _teacher_side(config: FitConfig, source: Source, model: Any, device: torch.device) -> TeacherSide | None:
    if not isinstance(source, CacheSource):
        return None
    names = {loss.name for loss in config.losses}
    head = any(s.name in LOGIT_LOSSES and s.source == "exact" for s in config.losses) or bool(
        names & {"visual_kl", "relation"}
    )
    vocabulary = model.get_output_embeddings().weight.shape[0]
    side = teacher_side(source.cache, vocabulary, device, model.dtype, head and HEAD in source.cache.manifest.files)
    if side.head is None or side.signals.visual != "states" or "relation" not in names:
        return side
    return dataclasses.replace(side, head_square=head_square(side.head))
