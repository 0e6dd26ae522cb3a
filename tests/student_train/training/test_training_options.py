"""Options that must not change what is learnt: packing, loader processes, cached features, recomputed activations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from student_train.config import FitConfig, LossSpec, StudentConfig, TrainConfig, check_fit_config
from student_train.feed.batch import StudentBatch, pack_lines
from student_train.feed.loader import make_loader, on_device
from student_train.feed.step_plan import MicroBatch
from student_train.training.schedule import step_seed
from student_train.training.setup import make_optimizer
from student_train.training.trainer import Run, fit
from teacher_cache.errors import ConfigError
from tests.fixtures.rounding import MODEL, rounding, within
from tests.fixtures.training import largest_difference, tiny_fit, weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path, world: Path) -> FitConfig:
    return tiny_fit(
        tmp_path_factory.mktemp("options"), cache_folder, world, max_steps=3, global_batch=12, micro_batch=6
    )


def variant(config: FitConfig, name: str, *, losses: Any = None, train: Any = None, **student: Any) -> FitConfig:
    return replace(
        config,
        output=str(Path(config.output).with_name(name)),
        losses=losses or config.losses,
        train=replace(config.train, **(train or {})),
        student=replace(config.student, **student),
    )


def batches(run: Run, workers: int = 0) -> Iterator[tuple[MicroBatch, StudentBatch]]:
    return iter(make_loader(run.dataset, run.plan, range(run.plan.steps), 0, 1, workers, False))


def losses_and_gradients(run: Run) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Each term of every micro-batch, and the gradients of their sum."""
    terms = []
    for micro, batch in batches(run):
        loss, parts = run.student(batch, micro.source)
        loss.backward()
        terms.append({"loss": loss.item(), **{name: float(value) for name, value in parts.items()}})
    gradients = {n: p.grad for n, p in run.student.named_parameters() if p.grad is not None}
    return terms, gradients


def assert_same(config: FitConfig, other: FitConfig) -> None:
    (terms, gradients), (other_terms, other_gradients) = (losses_and_gradients(Run.prepare(c)) for c in (config, other))
    for one, two in zip(terms, other_terms, strict=True):
        assert one == pytest.approx(two, rel=rounding(operations=MODEL), abs=1e-7)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        close = within(operations=2 * MODEL, scale=gradient.abs().max())
        torch.testing.assert_close(other_gradients[name], gradient, **close)


def tensors(batch: StudentBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.gpu
def test_batches_arrive_on_the_device_as_the_loader_made_them(config: FitConfig, device: str) -> None:
    run = Run.prepare(variant(config, "arrived"))
    loader = make_loader(run.dataset, run.plan, range(run.plan.steps), 0, 1, 0, device == "cuda")
    for (micro, arrived), (asked, made) in zip(on_device(loader, torch.device(device)), batches(run), strict=True):
        assert micro == asked
        for there, here in zip(tensors(arrived), tensors(made), strict=True):
            assert there.device.type == device
            assert torch.equal(there.cpu(), here)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_wait_for_the_device_in_pinned_memory(config: FitConfig, cuda: str, workers: int) -> None:
    run = Run.prepare(variant(config, f"pinned-{workers}"))
    for _, batch in make_loader(run.dataset, run.plan, range(run.plan.steps), 0, 1, workers, True):
        assert all(tensor.is_pinned() for tensor in tensors(batch) if tensor.numel())


ALL_TOKENS = (
    LossSpec("cross_entropy"),
    LossSpec("forward_kl", source="exact", tokens="all"),
    LossSpec("hidden_cosine", tokens="all"),
    LossSpec("relation"),
)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("losses", [None, ALL_TOKENS], ids=["answers", "all tokens"])
def test_packed_samples_have_the_losses_and_gradients_of_padded_ones(
    config: FitConfig, attention: str, losses: Any
) -> None:
    plain = variant(config, "padded", losses=losses, attention=attention)
    packed = variant(plain, "packed", train={"pack": True})
    padded_lines, packed_lines = (sum(len(b.input_ids) for _, b in batches(Run.prepare(c))) for c in (plain, packed))
    assert packed_lines < padded_lines
    assert_same(plain, packed)


def test_packed_lines_hold_samples_in_order_and_are_no_longer_than_the_longest() -> None:
    assert pack_lines([7, 3, 4, 2, 1, 6]) == [(0, 0), (1, 0), (1, 3), (2, 0), (2, 2), (3, 0)]
    assert pack_lines([5]) == [(0, 0)]


def test_losses_over_whole_lines_refuse_packing(config: FitConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.pack: attention_mse"):
        check_fit_config(
            variant(config, "refused", losses=(LossSpec("attention_mse"),), train={"pack": True}, attention="eager")
        )


def test_loader_processes_give_the_batches_of_the_loader_thread(config: FitConfig) -> None:
    run = Run.prepare(config)
    for (micro, one), (other_micro, other) in zip(batches(run), batches(run, workers=1), strict=True):
        assert micro == other_micro
        assert one.fields.keys() == other.fields.keys()
        assert all(torch.equal(one.fields[name], other.fields[name]) for name in one.fields)
        for name in ("row_position", "row_weight", "visual_start"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert all(torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_cached_features_of_the_frozen_tower_give_its_losses(config: FitConfig) -> None:
    """Features are kept in float16: eleven bits, in the middle of the student."""
    computed = variant(config, "computed")
    cached = variant(config, "cached", vision_features="cache")
    (terms, gradients), (other_terms, other) = (losses_and_gradients(Run.prepare(c)) for c in (computed, cached))
    for one, two in zip(terms, other_terms, strict=True):
        assert one == pytest.approx(two, rel=rounding(torch.float16, 4))
    for name, gradient in gradients.items():
        assert float((other[name] - gradient).norm() / gradient.norm().clamp(min=1e-8)) < rounding(torch.float16, 10), (
            name
        )


def test_gradient_checkpointing_gives_the_same_gradients(config: FitConfig) -> None:
    assert_same(variant(config, "stored"), variant(config, "recomputed", gradient_checkpointing=True))


def test_mixed_precision_is_each_runs_own(config: FitConfig) -> None:
    """Also after a run with another one in the same process, as stages may have them. Weights stay in float32."""
    found = []
    for precision in ("auto", "bf16", "auto"):
        run = Run.prepare(variant(config, "precision", losses=ALL_TOKENS, train={"mixed_precision": precision}))
        assert {p.dtype for p in run.student.parameters()} == {torch.float32}
        found.append(losses_and_gradients(run)[0])
    plain, mixed, again = found
    assert plain == again
    for one, two in zip(plain, mixed, strict=True):
        assert one != two
        assert one == pytest.approx(two, rel=rounding(torch.bfloat16, 4), abs=1e-3)


def test_frozen_tower_keeps_no_activations(config: FitConfig) -> None:
    """What autograd keeps is counted, with the tower frozen and with it trained."""

    def kept_inside_the_tower(run: Run) -> int:
        tower = run.accelerator.unwrap_model(run.student).model.model.vision_tower
        kept, depth = [], []
        tower.register_forward_pre_hook(lambda *_: depth.append(1))
        tower.register_forward_hook(lambda *_: depth.pop() and None)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if depth:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            micro, batch = next(batches(run))
            run.student(batch, micro.source)
        return sum(kept)

    assert kept_inside_the_tower(Run.prepare(variant(config, "frozen"))) == 0
    assert kept_inside_the_tower(Run.prepare(variant(config, "trained", train_vision=True))) > 0


def test_lora_trains_adapters_only_and_exports_a_plain_model(config: FitConfig) -> None:
    full = variant(config, "full")
    adapted = replace(config.student, train="lora", gradient_checkpointing=True)
    lora = replace(variant(config, "lora"), student=adapted)
    run = Run.prepare(lora)
    trained = [n for n, p in run.student.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "projector" in n for n in trained)
    fit(lora, "quiet")
    fit(full, "quiet")
    assert weights(lora).keys() == weights(full).keys()
    assert largest_difference(lora, full) > 0


def test_eight_bit_optimizer_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        make_optimizer(nn.Linear(2, 2), TrainConfig(optimizer="adamw_8bit"))


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "typo"])
def test_a_tracker_that_would_track_nothing_is_refused_before_anything_is_loaded(
    config: FitConfig, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    """Accelerate warns, and a run of days is tracked nowhere."""
    monkeypatch.setattr("student_train.training.setup.get_available_trackers", lambda: [])  # as if none were installed
    expected = f"train.tracker={tracker} needs {tracker}. Install it .pip install {tracker}."
    wanted = "train.tracker: expected one of .*wandb.*, found 'typo'" if tracker == "typo" else expected
    with pytest.raises(ConfigError, match=wanted):
        fit(variant(replace(config, student=StudentConfig(model="not there")), "tracked", train={"tracker": tracker}))


def test_eight_bit_optimizer_goes_on_from_its_checkpoint(config: FitConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"optimizer": "adamw_8bit", "max_steps": 4, "checkpoint_every": 2}
    whole, parts = (variant(config, name, train=train) for name in ("eight", "eight-in-parts"))
    fit(whole, "quiet")
    backward = Run._backward

    def stop(run: Run, *arguments: Any) -> Any:
        if run.step == 3:
            raise KeyboardInterrupt
        return backward(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_backward", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(parts, "quiet")
    fit(parts, "quiet")
    assert largest_difference(whole, parts) == 0


@pytest.mark.parametrize("origin", [{"layers_from": "a"}, {"language_model": "a", "vision_tower": "b"}])
def test_four_bit_needs_a_folder(config: FitConfig, origin: dict[str, str]) -> None:
    student = StudentConfig(**origin, train="lora", load_in_4bit=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"load_in_4bit: only a folder .* found layers_from or language_model"):
        check_fit_config(replace(config, student=student))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("log_every", 0, "train.log_every: expected at least 1, found 0"),
        ("global_batch", 0, "train.global_batch: expected at least 1, found 0"),
        ("seed", -1, "train.seed: expected at least 0, found -1"),
    ],
)
def test_settings_outside_their_range_are_refused(config: FitConfig, name: str, value: int, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        check_fit_config(variant(config, "refused", train={name: value}))


def test_a_date_is_a_seed_and_every_step_and_rank_draws_its_own(config: FitConfig) -> None:
    assert fit(variant(config, "dated", train={"seed": 20260101, "max_steps": 1}), "quiet").steps == 1
    seeds = {step_seed(seed, rank, step) for seed in (0, 1, 2**24, 2**63 - 1) for rank in (0, 1) for step in (0, 1, 9)}
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_run_that_time_ended_is_finished_again_without_a_step(config: FitConfig) -> None:
    timed = variant(config, "timed", train={"max_seconds": 1e-6})
    assert fit(timed, "quiet").steps == 1
    before = weights(timed)
    assert fit(timed, "quiet").steps == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(timed).items())


def test_four_bit_student_is_trained_by_adapters_and_exported_in_full(config: FitConfig) -> None:
    four = replace(variant(config, "four"), student=replace(config.student, train="lora", load_in_4bit=True))
    fit(four, "quiet")
    plain = variant(config, "four-plain")
    fit(plain, "quiet")
    assert {n: w.shape for n, w in weights(four).items()} == {n: w.shape for n, w in weights(plain).items()}
