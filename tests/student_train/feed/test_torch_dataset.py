"""A cache in anybody's own loop: any sampler and subset, any number of workers, every form of a loss; wrong input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

import teacher_cache as tc
from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from student_train.feed.teacher import Batch, Labels
from student_train.feed.torch_dataset import CacheDataset
from student_train.losses.catalogue import LossSpec
from student_train.training.trainer import Run
from teacher_cache.config import SignalsConfig
from teacher_cache.errors import CacheError, ConfigError, DataError, LossError, UserError
from tests.fixtures.families import FAMILIES
from tests.fixtures.family_cache import conversations, of_processor, template_of, write_cache, write_pictures
from tests.fixtures.online import build, exact_cache, fit_config, student_folder, world
from tests.fixtures.rounding import EXACT, MODEL, rounding, within

LOSSES = [
    "cross_entropy",
    {"name": "forward_kl", "weight": 2.0, "temperature": 0.7},
    LossSpec("reverse_kl", source="exact", rows="llavadi"),
    LossSpec("logit_mse", weight=0.1),
]


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(student_folder(), backend="pil")


@pytest.fixture(scope="module")
def data(processor: Any) -> CacheDataset:
    with tc.open(exact_cache(), tokenizer=processor.tokenizer) as cache:
        return cache.torch(processor, images=world() / "images", signals=["topk", "exact"])


@pytest.fixture(scope="module")
def student() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(student_folder()).double()


def test_a_batch_is_what_our_own_trainer_reads(data: CacheDataset, tmp_path: Path) -> None:
    run = Run.prepare(fit_config([LossSpec("forward_kl"), LossSpec("reverse_kl", source="exact")], tmp_path))
    micro = run.plan.micro_batches(0, 0, 1)[0]
    ours, batch = run.dataset[micro][1], data.collate(micro.indices)
    assert batch.inputs.keys() == ours.fields.keys()
    for name, field in ours.fields.items():
        assert torch.equal(batch[name], field), name
    for name, array in ours.arrays.items():
        assert torch.equal(batch.teacher.rows.arrays[name], array), name
    assert torch.equal(batch.teacher.answer_ids, ours.answer_ids)
    assert torch.equal(torch.stack(batch.teacher.positions), torch.stack((ours.row_sample, ours.row_position)))


def test_labels_are_the_answers_where_they_stand_and_rows_predict_them(data: CacheDataset) -> None:
    batch = data.collate([0, 1, 2])
    labels, (lines, positions) = batch["labels"], batch.teacher.positions
    assert torch.equal(labels[labels != -100], batch["input_ids"][labels != -100])
    assert torch.equal(labels[lines, positions + 1], batch.teacher.answer_ids)
    assert int(labels[..., 1:].ne(-100).sum()) == len(batch.teacher)
    assert type(labels) is Labels
    assert type(labels[..., 1:]) is torch.Tensor


@pytest.mark.parametrize("workers", [0, 2])
def test_any_sampler_and_number_of_workers_give_the_same_batches(data: CacheDataset, workers: int) -> None:
    order = np.random.default_rng(1).permutation(len(data)).tolist()
    loader = DataLoader(Subset(data, order), batch_size=5, num_workers=workers, collate_fn=data.collate)
    for place, batch in enumerate(loader):
        expected = data.collate(order[5 * place : 5 * place + 5])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert torch.equal(
            batch.teacher.row_loss("forward_kl", _uniform(batch)),
            expected.teacher.row_loss("forward_kl", _uniform(batch)),
        )
    assert isinstance(batch, Batch)


def _uniform(batch: Batch) -> torch.Tensor:
    with tc.open(exact_cache()) as cache:
        return torch.zeros(len(batch.teacher), cache.manifest.shape.vocabulary)


def test_chunks_without_logits_equal_all_logits_in_value_and_gradient(data: CacheDataset, student: Any) -> None:
    found = []
    for chunked in (False, True):
        student.zero_grad()
        batch = data.collate([3, 0, 11])
        if chunked:
            states = student.base_model(**batch.inputs).last_hidden_state
            loss = batch.teacher.head_loss(LOSSES, states, student)
        else:
            loss = tc.distillation(LOSSES)(student(**batch.inputs), batch["labels"])
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    (dense, gradients), (chunks, others) = found
    assert torch.allclose(dense, chunks, **within(EXACT, MODEL))
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], **within(EXACT, 2 * MODEL, gradient.abs().max())), name


def test_losses_of_rows_are_what_their_definitions_say(data: CacheDataset, student: Any) -> None:
    batch = data.collate([1, 5])
    with torch.no_grad():
        logits = student(**batch.inputs).logits
    log_q = logits[batch.teacher.positions].log_softmax(-1)
    entropy = -log_q.gather(-1, batch.teacher.answer_ids[:, None]).squeeze(-1)
    assert torch.allclose(batch.teacher.row_loss("cross_entropy", logits), entropy, **within(EXACT, 100))
    with tc.open(exact_cache()) as cache:
        log_p = (batch.teacher.states().double() @ torch.from_numpy(cache.head.copy()).double().T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    exact = batch.teacher.row_loss({"name": "forward_kl", "source": "exact"}, logits)
    assert torch.allclose(exact, kl, **within(EXACT, MODEL, kl.max()))
    assert bool((batch.teacher.row_loss("forward_kl", logits) <= kl + rounding(torch.float16, 8)).all())


def test_the_mean_is_over_the_global_batch_however_it_is_cut(data: CacheDataset, student: Any) -> None:
    compute_loss = tc.distillation(["cross_entropy", "forward_kl"])
    parts = [data.collate(numbers) for numbers in ([0, 1], [2, 3, 4])]
    items = sum(len(part.teacher) for part in parts)
    with torch.no_grad():
        whole = data.collate([0, 1, 2, 3, 4])
        expected = compute_loss(student(**whole.inputs), whole["labels"])
        cut = sum(compute_loss(student(**part.inputs), part["labels"], items) for part in parts)
    assert torch.allclose(cut, expected, **within(EXACT, MODEL))


def test_the_teacher_goes_where_the_labels_go(data: CacheDataset) -> None:
    batch = data.collate([0])
    moved = type(batch)({name: value.to("meta") for name, value in batch.items()})  # as Trainer moves a mapping
    assert moved.teacher.answer_ids.device.type == batch.to("meta").teacher.answer_ids.device.type == "meta"
    assert batch.teacher.answer_ids.device.type == "cpu"


def test_the_processor_that_was_given_is_not_changed(processor: Any) -> None:
    before = copy.deepcopy((processor.chat_template, processor.image_processor.to_dict()))
    with tc.open(exact_cache()) as cache:
        data = cache.torch(processor, images=world() / "images")
    assert (processor.chat_template, processor.image_processor.to_dict()) == before
    assert data.processor.chat_template


def test_images_may_lie_in_parquet_files(processor: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = world() / "images"
    turns = [{"from": "human", "value": "<image>\nis there a circle"}, {"from": "gpt", "value": "yes"}]
    rows = [
        {"id": path.stem, "conversations": turns, "image": {"bytes": path.read_bytes(), "path": path.name}}
        for path in sorted(pictures.glob("train-*.png"))[:4]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    cache_folder = build(SignalsConfig(top_k=4, hidden="none", visual="none"), path=str(tmp_path / "data.parquet"))
    with tc.open(cache_folder) as cache:
        data = cache.torch(processor, images=tmp_path / "data.parquet")
        assert data.collate([0, 1])["pixel_values"].shape[0] == 2
        with pytest.raises(DataError, match=r"^images: no image of digest"):
            cache.torch(processor, images=pictures)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3"])
def test_students_of_every_family_read_by_their_own_processor(
    name: str, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    family, folder = FAMILIES[name], family_folder(name)
    if "video_processor" in family.parts:
        pytest.importorskip("torchvision", reason="its processor needs the extra vlm")
    pictures = write_pictures(tmp_path / "pictures")
    states = write_cache(tmp_path / "cache", name, folder, pictures, conversations(family.sees))
    processor, tokenizer = of_processor(name, folder)
    with tc.open(tmp_path / "cache", tokenizer=tokenizer) as cache:
        data = cache.torch(processor, images=pictures, signals=["exact"], chat_template=template_of(name))
        names = list(cache.sample_ids())
    batch = data.collate(range(len(data)))
    expected = torch.cat([states[sample] for sample in names])
    assert torch.equal(batch.teacher.states(), expected)
    assert torch.equal(batch["input_ids"][batch["labels"] != -100], batch.teacher.answer_ids)


@pytest.fixture(scope="module")
def lean() -> str:
    """Answers and top-k alone."""
    return build(SignalsConfig(top_k=4, hidden="none", visual="none"))


def _other_tokenizer(tmp_path: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.add_tokens(["surplus"])
    vocabulary = tokenizer.backend_tokenizer.to_str().replace('"circle"', '"elcric"')
    (tmp_path / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text((TEACHER / "tokenizer_config.json").read_text())
    return AutoTokenizer.from_pretrained(tmp_path)


class OtherProcessor:
    """Of another family than LLaVA's."""

    image_processor, tokenizer = None, None


WRONG: dict[str, tuple[Callable[..., Any], type[UserError], str]] = {
    "tokenizer": (
        lambda cache, given: tc.open(cache.storage.url, tokenizer=given["other"]),
        CacheError,
        "made with the tokenizer of .*another base vocabulary",
    ),
    "signal nobody knows": (
        lambda cache, given: cache.torch(given["processor"], images=given["images"], signals=["top-k"]),
        ConfigError,
        "signals: 'top-k' is none of topk, sampled, exact, advantage",
    ),
    "signal that the cache lacks": (
        lambda cache, given: cache.torch(given["processor"], images=given["images"], signals=["sampled"]),
        CacheError,
        "need sampled_counts, sampled_ids, which this cache does not hold",
    ),
    "processor of another family": (
        lambda cache, given: cache.torch(OtherProcessor(), images=given["images"], model=given["student"]),
        ConfigError,
        r"a OtherProcessor, but the student \(llava\) reads by a LlavaProcessor",
    ),
    "images missing": (
        lambda cache, given: cache.torch(given["processor"], images=given["nowhere"]),
        DataError,
        "^images: .* holds no train-.*Set it to the folder",
    ),
    "no images": (
        lambda cache, given: cache.torch(given["processor"]),
        DataError,
        "^images: not set, but the source names train-",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_when_the_data_set_is_made(
    case: str, lean: str, processor: Any, tmp_path: Path
) -> None:
    make, kind, text = WRONG[case]
    (tmp_path / "nothing").mkdir()
    given = {
        "processor": processor,
        "images": world() / "images",
        "nowhere": tmp_path / "nothing",
        "student": student_folder(),
        "other": _other_tokenizer(tmp_path) if case == "tokenizer" else None,
    }
    with tc.open(lean) as cache, pytest.raises(kind, match=text):
        make(cache, given)


def test_samples_longer_than_the_student_are_refused_when_the_data_set_is_made(lean: str, tmp_path: Path) -> None:
    write_student(tmp_path / "short", teacher=TEACHER, seed=0)
    student = LlavaForConditionalGeneration.from_pretrained(tmp_path / "short")
    student.config.text_config.max_position_embeddings = 12
    processor = AutoProcessor.from_pretrained(tmp_path / "short", backend="pil")
    with tc.open(lean) as cache, pytest.raises(ConfigError, match="it has 12 positions"):
        cache.torch(processor, images=world() / "images", model=student)


REFUSED = {
    "signals=": {"name": "forward_kl", "source": "sampled"},
    "more than the logits of answer rows": {"name": "hidden_mse"},
    "all text|more than": {"name": "forward_kl", "source": "exact", "tokens": "text"},
    "advantage_share reads": {"name": "forward_kl", "advantage_share": 0.5},
    "average: sample": {"name": "forward_kl", "average": "sample"},
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_loss_that_the_batch_cannot_have_is_refused(text: str, data: CacheDataset) -> None:
    batch = data.collate([0])
    with pytest.raises(LossError, match=text):
        batch.teacher.row_loss(REFUSED[text], _uniform(batch))


def test_labels_of_another_collate_are_refused(data: CacheDataset) -> None:
    compute_loss = tc.distillation(["cross_entropy"])
    for labels in (None, torch.zeros(1, 3)):
        with pytest.raises(LossError, match=r"no predicting rows.*data_collator=data.collate"):
            compute_loss({"logits": torch.zeros(1, 3, 5)}, labels)
    with pytest.raises(ConfigError, match="a column 'sample'"):
        data.collate([{"input_ids": [1]}])


@pytest.mark.parametrize("losses", [[], "forward_kl", ["forward_kl", {"name": "forward_kl", "weight": 2}], ["kl"]])
def test_losses_are_checked_before_any_batch(losses: Any) -> None:
    with pytest.raises(ConfigError, match=r"losses: |no loss is called kl"):
        tc.distillation(losses)


def test_there_is_no_sample_beyond_the_last(data: CacheDataset) -> None:
    assert data[-1] == data[len(data) - 1]
    with pytest.raises(IndexError, match=f"there are {len(data)}"):
        data[len(data)]
    assert data.conversation(0).questions


def test_another_cache_in_the_place_of_the_first_is_refused(data: CacheDataset, lean: str) -> None:
    import dataclasses

    batch = data.collate([0])
    origin = dataclasses.replace(batch.teacher.origin, address=lean)
    with pytest.raises(CacheError, match="another cache than the one the batch was read from"):
        dataclasses.replace(batch.teacher, origin=origin).row_loss("cross_entropy", _uniform(batch))
