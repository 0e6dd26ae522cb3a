"""The training loop: ours, short, on Accelerate."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from student_train.config import FitConfig, check_fit_config
from student_train.feed.loader import MicroBatches, make_loader, on_device, with_own_images
from student_train.feed.plain import PlainSource
from student_train.feed.skipped import SkippedFile, check_share
from student_train.feed.sources import CacheSource, open_sources
from student_train.feed.step_plan import MicroBatch, StepPlan
from student_train.students.chat_reader import ChatReader
from student_train.students.export import save_student
from student_train.students.reader import prepare_reader
from student_train.students.student import load_student, merge_adapters
from student_train.training.checkpoint import load_checkpoint, newest_sound, save_checkpoint, whole_weights
from student_train.training.exchange import Agreed, exchange
from student_train.training.inputs import (
    cache_facts,
    check_packing,
    side_of,
    skipped_file,
    tower_features,
)
from student_train.training.objective import DistilledStudent
from student_train.training.output import FitSummary, output_lock, peak_megabytes, write_json
from student_train.training.schedule import learning_rate_factor, step_seed
from student_train.training.settings import run_settings
from student_train.training.setup import check_tracker, make_accelerator, make_optimizer, start_tracker
from teacher_cache.config import as_plain
from teacher_cache.errors import TrainingError
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.parts import parts_of
from teacher_cache.progress import Style, note, stage
from teacher_cache.stopping import Stop, Stopped, stopping
from teacher_cache.terminal import without_secrets_in

_SHOWN = 16
"""Samples that an error names."""
_KEPT = ("step", "samples", "seconds", "cpu_seconds", "waiting", "last", "ended")
"""What a checkpoint says of a :class:`Run` beside its tensors and settings."""


def fit(config: FitConfig, style: Style = "auto", stop: Stop | None = None) -> FitSummary:
    """Train one student and export it to ``output/model``; goes on from the last checkpoint of the same settings.

    A signal ends it after the step in progress, with a checkpoint; ``stop``: the caller's handling of signals, if it
    has one.

    Raises
    ------
    ConfigError, CacheError, DataError
        Before the first step, saying what to change.
    TrainingError
        At a step whose numbers are not finite; the last checkpoint stands and nothing is exported.
    Stopped
        A signal came.

    Examples
    --------
    >>> from student_train import FitConfig, SourceConfig, StudentConfig, TrainConfig, fit
    >>> source = SourceConfig(cache="runs/tiny/cache", image_folder="runs/tiny/world/images")
    >>> student, train = StudentConfig(model="runs/tiny/students/0"), TrainConfig(max_steps=2, global_batch=4)
    >>> fit(FitConfig("runs/two-steps", (source,), student, train=train), style="quiet").steps
    2
    """
    check_fit_config(config)
    check_tracker(config.train.tracker)
    handled = contextlib.nullcontext(stop) if stop is not None else stopping()
    with output_lock(config.output), handled as asked:
        run = Run.prepare(config, asked)
        run.restore(style)
        run.train(style)
        return run.finish()


@dataclass
class Run:
    """A prepared run: everything that is open while training."""

    config: FitConfig
    accelerator: Accelerator
    student: nn.Module
    processor: Any
    ends: list[int]
    """The tokens that end the student's answers."""
    optimizer: torch.optim.Optimizer
    plan: StepPlan
    dataset: MicroBatches
    folder: Path
    settings: dict[str, Any]
    caches: list[dict[str, Any]]
    stop: Stop
    skipped: SkippedFile
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    waiting: float = 0.0
    last: dict[str, float] | None = None
    ended: bool = False
    """By ``max_seconds``, before the last step of the plan."""

    @classmethod
    def prepare(cls, config: FitConfig, stop: Stop | None = None) -> Run:
        train = config.train
        if train.threads:
            torch.set_num_threads(train.threads)
        accelerator = make_accelerator(config)
        model, processor = load_student(config.student, train.seed)
        reader, ends = prepare_reader(model, processor, config)
        check_packing(config, model)
        sources = open_sources(config, reader)
        reader = with_own_images(config, sources, reader)
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        plan = StepPlan(sources, config.sources, train, reader.image_tokens)
        if not isinstance(reader, ChatReader):  # which looks at each sample that it writes
            plan.check_positions(position_limit(model.config))
        features = tower_features(config, model, sources, reader, accelerator)
        teachers = [side_of(config, source, model, accelerator.device) for source in sources]
        student = DistilledStudent(
            model, config.losses, teachers, head_rows=train.head_rows, image_tokens=reader.image_tokens
        )
        optimizer = make_optimizer(student, train, student.multimodal_projector, accelerator.device.type == "cuda")
        student, optimizer = accelerator.prepare(student, optimizer)
        start_tracker(accelerator, config)
        return cls(
            config=config,
            accelerator=accelerator,
            student=student,
            processor=processor,
            ends=ends,
            optimizer=optimizer,
            plan=plan,
            dataset=MicroBatches(sources, reader, features, train.pixel_cache, train.pack),
            folder=folder,
            settings=run_settings(config, sources),
            caches=[cache_facts(c) for s in sources if isinstance(s, CacheSource) for c in s.caches],
            stop=stop or Stop(),
            skipped=skipped_file(folder, sources, accelerator.is_main_process),
        )

    def restore(self, style: Style = "auto") -> None:
        """Weights, optimiser and step of the last sound checkpoint, if there is one."""
        main = self.accelerator.is_main_process
        path = newest_sound(self.folder / "checkpoints", main, lambda text: note(text, style))
        if path is None:
            return
        facts = load_checkpoint(path, self.student, self.optimizer, self.settings)
        for name in _KEPT:
            setattr(self, name, facts[name])

    def train(self, style: Style = "auto") -> None:
        accelerator, train, plan = self.accelerator, self.config.train, self.plan
        steps = range(self.step, self.step if self.ended else plan.steps)
        place = accelerator.process_index, accelerator.num_processes
        pin = accelerator.device.type == "cuda"
        loader = make_loader(self.dataset, plan, steps, *place, train.workers, pin)
        self.student.train()
        model = accelerator.unwrap_model(self.student).model
        if (tower := parts_of(model).tower) and not self.config.student.train_vision:  # frozen: in evaluation mode
            model.get_submodule(tower).eval()
        begin, cpu_begin, mark = time.monotonic(), time.process_time(), time.monotonic()
        made: list[tuple[MicroBatch, dict[str, torch.Tensor]]] = []
        with contextlib.ExitStack() as opened:
            opened.enter_context(self.stop.between_steps())
            log = opened.enter_context((self.folder / "log.jsonl").open("a", encoding="utf-8"))
            shown_style: Style = style if accelerator.is_main_process else "quiet"
            shown = opened.enter_context(stage("training", len(steps), "steps", shown_style))
            for micro, batch in on_device(loader, accelerator.device):
                self.waiting += time.monotonic() - mark
                self._note_skipped(micro)
                if not made:  # what a model draws (dropout) is a function of the step, so that resuming is exact
                    torch.manual_seed(step_seed(train.seed, accelerator.process_index, micro.step))
                made.append((micro, self._backward(batch, micro.source, micro.last)))
                if micro.last:
                    agreed = self._update(made, self.cpu_seconds + time.process_time() - cpu_begin)
                    made = []
                    self.samples += len(plan.global_batch(micro.step))
                    self.step = micro.step + 1
                    self.seconds += time.monotonic() - begin
                    self.cpu_seconds += time.process_time() - cpu_begin
                    begin, cpu_begin = time.monotonic(), time.process_time()
                    self._log(agreed, log)
                    shown.advance(1, loss=agreed.parts["loss"], waiting=f"{100 * self._waiting_share:.1f} %")
                    # The mean of the ranks: one that went on alone would wait for the others for ever.
                    self.ended = 0 < train.max_seconds <= agreed.cpu_seconds
                    self._after_step(agreed)
                    if self.ended:
                        break
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
            waiting_share=self._waiting_share,
            peak_megabytes=peak_megabytes(self.accelerator.device),
            loss=last.pop("loss", float("nan")),
            parts=last,
            model=str(model),
        )
        if self.accelerator.is_main_process:
            facts = {"config": without_secrets_in(as_plain(self.config)), "caches": self.caches, "steps": self.step}
            write_json(self.folder / "run.json", facts, allow_nan=False)
            write_json(self.folder / "summary.json", as_plain(summary), allow_nan=False)
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
        save_student(model.to(getattr(torch, self.config.student.dtype)), self.processor, folder, self.ends)

    def _note_skipped(self, micro: MicroBatch) -> None:
        """Name samples whose image turned out damaged, each once; too many of them end the run."""
        for sample in self.skipped.add(micro.skipped):
            note(f"{sample.sample_id}: {sample.reason}. It is left out: its weight is zero")
            config, source = self.config.sources[micro.source], self.dataset.sources[micro.source]
            if isinstance(source, PlainSource):  # a cache leaves none out
                source.skipped.append(sample)
                check_share(config, source.total, source.skipped)

    def _backward(self, batch: Any, source: int, last: bool) -> dict[str, torch.Tensor]:
        """This micro-batch's part of the loss and of each term, detached."""
        accelerator = self.accelerator
        context = contextlib.nullcontext() if last else accelerator.no_sync(self.student)
        with context:
            loss, parts = self.student(batch, source)
            # DDP and FSDP average gradients over ranks; the loss is already divided by the global batch.
            accelerator.backward(loss * accelerator.num_processes)
        return {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def _update(self, made: list[tuple[MicroBatch, dict[str, torch.Tensor]]], cpu_seconds: float) -> Agreed:
        """One step of the optimiser, if every number of the step is finite.

        Raises ``TrainingError``: on every rank, before any weight is changed.
        """
        train = self.config.train
        factor = learning_rate_factor(self.step, self.plan.steps, train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), train.clip_norm or math.inf)
        sums: dict[str, torch.Tensor] = {}
        for _, parts in made:
            for name, value in parts.items():
                sums[name] = sums[name] + value if name in sums else value
        agreed = exchange(self.accelerator, sums, norm, cpu_seconds, self.stop.asked)
        if fault := agreed.fault():
            self._refuse(fault, agreed, made)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return agreed

    def _refuse(self, fault: str, agreed: Agreed, made: list[tuple[MicroBatch, dict[str, torch.Tensor]]]) -> None:
        """Say where the numbers went wrong: in the micro-batches whose own loss did, else anywhere in the step."""
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(agreed.parts["loss"]) and scaler.get_scale() > 1:
            return  # float16's gradients overflowed: the scaler leaves the step out by itself and halves its scale
        own = [micro for micro, parts in made if not bool(parts["loss"].isfinite())]
        names: list[str] = gather_object([name for micro in own for name in self.dataset.names_of(micro)])
        names = sorted(set(names or gather_object([n for micro, _ in made for n in self.dataset.names_of(micro)])))
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise TrainingError(
            f"step {self.step + 1:,}: {fault}. It was not taken, nothing is exported, and the last checkpoint in "
            f"{self.folder / 'checkpoints'} stands. The samples: {shown}. Lower train.learning_rate, set "
            "train.clip_norm, or look at their signals (teacher-cache verify --deep)"
        )

    def _after_step(self, agreed: Agreed) -> None:
        """Checkpoint where one is due.

        Raises ``Stopped``: a rank was sent a signal; the checkpoint is written.
        """
        every = self.config.train.checkpoint_every
        if agreed.signal:
            path = self._checkpoint()
            done = f"Step {self.step:,} of {self.plan.steps:,} is kept in {path}; the same command goes on from there."
            raise Stopped(agreed.signal, done)
        if not self.ended and every and self.step % every == 0:
            self._checkpoint()

    def _log(self, agreed: Agreed, log: Any) -> None:
        self.last = agreed.parts
        wanted = self.step % self.config.train.log_every == 0 or self.step == self.plan.steps
        if not wanted or not self.accelerator.is_main_process:
            return
        line = {"step": self.step, "seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 3)}
        rate = self.optimizer.param_groups[0]["lr"]
        log.write(json.dumps({**line, "learning_rate": rate, "gradient_norm": agreed.norm, **agreed.parts}) + "\n")
        log.flush()
        if self.config.train.tracker:
            self.accelerator.log({**agreed.parts, "learning_rate": rate}, step=self.step)

    def _checkpoint(self) -> Path:
        self._check_weights()
        facts = {name: getattr(self, name) for name in _KEPT} | {"settings": self.settings}
        main = self.accelerator.is_main_process
        return save_checkpoint(self.folder / "checkpoints", self.student, self.optimizer, facts, main)

    def _check_weights(self) -> None:
        """A finite gradient can still make a weight that is none (a learning rate of 1e38): keep no such checkpoint."""
        own = [p.to_local() if hasattr(p, "to_local") else p for p in self.student.parameters() if p.requires_grad]
        wrong = torch.stack([(~p.detach().isfinite()).any() for p in own]).sum().float()
        if bool(self.accelerator.reduce(wrong, "sum") > 0):
            raise TrainingError(
                f"step {self.step:,}: weights that are not finite after it. Nothing is exported, and the last "
                f"checkpoint in {self.folder / 'checkpoints'} stands. Lower train.learning_rate"
            )

    @property
    def _waiting_share(self) -> float:
        return self.waiting / max(self.seconds, 1e-9)
