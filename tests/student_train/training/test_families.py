"""A student of every family: what it learns from a cache is what it would learn from the live teacher."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig, TrainConfig
from student_train.evaluation.answers import Student, answer_questions
from student_train.feed.batch import StudentBatch
from student_train.feed.loader import make_loader
from student_train.feed.step_plan import MicroBatch
from student_train.students.chat_reader import ChatReader
from student_train.training.trainer import Run
from teacher_cache.data.conversations import Conversation, pieces, turn_by_turn
from teacher_cache.data.conversations import Image as ShownImage
from teacher_cache.data.logit_rule import LogitRule
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.models.collate import to_model
from teacher_cache.models.generation import Decoding, generate
from teacher_cache.models.parts import media_tokens, parts_of
from teacher_cache.models.pretrained import load_model
from tests.fixtures.families import FAMILIES
from tests.fixtures.family_cache import (
    conversations,
    template_of,
    write_cache,
    write_pictures,
)
from tests.fixtures.rounding import EXACT, MODEL, rounding
from tests.fixtures.threads import THREADS

LOSSES = (LossSpec("cross_entropy"), LossSpec("forward_kl", source="exact"))


@dataclass(frozen=True)
class Made:
    """A family's folder, and a cache that it made as a teacher."""

    name: str
    folder: Path
    cache: Path
    states: dict[str, torch.Tensor]
    pictures: Path

    def config(self, output: Path, *, student: Made | None = None, **settings: Any) -> FitConfig:
        own = student or self
        return FitConfig(
            output=str(output),
            sources=(SourceConfig(cache=str(self.cache), image_folder=str(self.pictures)),),
            student=StudentConfig(
                model=str(own.folder),
                template_kwargs=FAMILIES[own.name].template_kwargs,
                **{"chat_template": template_of(own.name), **settings},
            ),
            losses=LOSSES,
            train=TrainConfig(max_steps=1, global_batch=8, micro_batch=8, threads=THREADS),
        )


@pytest.fixture(scope="module")
def made(family_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    base, kept = tmp_path_factory.mktemp("caches"), dict[str, Made]()
    pictures = write_pictures(base / "pictures")

    def make(name: str, images: bool = True) -> Made:
        family, key = FAMILIES[name], f"{name}{images}"
        if "video_processor" in family.parts:
            pytest.importorskip("torchvision", reason="its processor needs the extra vlm")
        if key not in kept:
            folder, cache = family_folder(name), base / key
            states = write_cache(cache, name, folder, pictures, conversations(family.sees and images))
            kept[key] = Made(name, folder, cache, states, pictures)
        return kept[key]

    return make


ROUNDS = ("qwen3_5", "gemma3", "gemma4", "gemma2", "cohere2")
"""Families whose classes form norms or states in float32, whatever they are given."""


def exact(run: Run, name: str) -> Run:
    """In float64; but for Gemma 2, whose padded positions are NaN there (its attention is cast to float32)."""
    if name != "gemma2":
        run.student.double()
    for number, side in enumerate(run.student._teachers):
        run.student._teachers[number] = dataclasses.replace(side, head=side.head.double())
    return run


def offline(run: Run) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the first global batch, and its gradients."""
    run.student.zero_grad()
    loss = loss_of(run)
    loss.backward()
    return float(loss.detach()), gradients(run)


def loss_of(run: Run) -> torch.Tensor:
    micros = run.plan.micro_batches(0, 0, 1)
    return torch.stack([run.student(read(run, micro), micro.source)[0] for micro in micros]).sum()


def read(run: Run, micro: MicroBatch) -> StudentBatch:
    """With weights in float64."""
    torch.set_default_dtype(EXACT)
    try:
        return run.dataset[micro][1]
    finally:
        torch.set_default_dtype(torch.float32)


def gradients(run: Run) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in run.student.named_parameters() if p.grad is not None}


def online(run: Run, teacher: Made, student: str) -> float:
    """The same without a cache and without our reading: a sample alone, as its processor writes it, all logits."""
    live = load_model("t", str(teacher.folder), dtype=torch.float32)
    head, rule = live.get_output_embeddings().weight.detach().double(), LogitRule.of(live.config)
    samples = conversations(FAMILIES[teacher.name].sees and FAMILIES[student].sees)
    if alone := FAMILIES[teacher.name].rewrites:
        samples = [part for whole in samples for part in turn_by_turn(whole)]
    values: list[torch.Tensor] = []
    run.student.zero_grad()
    for asked in samples:
        each = alone or FAMILIES[student].rewrites
        rows, answers = [], []
        for part in turn_by_turn(asked) if each and not alone else [asked]:
            fields, at, ids = written(run.processor, part, student, teacher.pictures, each)
            fields = to_model(fields, run.student.model)
            rows.append(run.student.model(**fields, use_cache=False).logits[0, at])
            answers.append(ids)
        expected = rule.apply(teacher.states[asked.sample_id].double() @ head.T)
        q = torch.cat(rows)
        shared = min(q.shape[1], expected.shape[1])
        p, own = (logits[:, :shared].log_softmax(-1) for logits in (expected, q))
        values.append(F.cross_entropy(q, torch.cat(answers), reduction="none") + (p.exp() * (p - own)).sum(-1))
    loss = torch.cat(values).mean()
    loss.backward()
    return float(loss.detach())


def written(
    processor: Any, asked: Conversation, name: str, pictures: Path, only_last: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """What ``processor`` writes of a conversation, (R,) the positions that predict its answers, and those' ids.

    ``only_last``: the last answer stands behind the prompt for it, which some templates write otherwise in between.
    """
    tokenizer, sees = getattr(processor, "tokenizer", processor), FAMILIES[name].sees
    images = iter(Image.open(pictures / image.path).convert("RGB") for image in asked.images)
    messages: list[dict[str, Any]] = []
    for question, answer in zip(asked.questions, asked.answers, strict=True):
        parts: list[dict[str, Any]] = []
        for number, text in enumerate(pieces(question)):
            parts += [{"type": "image", "image": next(images)}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": "user", "content": parts if sees else question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if sees else answer})
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    end = int(tokenizer.convert_tokens_to_ids(FAMILIES[name].end))
    if only_last:
        made = dict(processor.apply_chat_template(messages[:-1], add_generation_prompt=True, **how))
        own = torch.tensor([[*tokenizer(asked.answers[-1], add_special_tokens=False)["input_ids"], end]])
        more = {"input_ids": own, "attention_mask": torch.ones_like(own)}
        for field in (field for field in made if field in more or field.endswith("token_type_ids")):
            made[field] = torch.cat([made[field], more.get(field, torch.zeros_like(own))], 1)
        length = made["input_ids"].shape[1]
        return made, torch.arange(length - own.shape[1], length) - 1, own[0]
    made = dict(processor.apply_chat_template(messages, **how))
    ids, rows, at = made["input_ids"][0].tolist(), list[int](), 0
    for answer in asked.answers:
        texts = (answer, f" {answer}")  # sentencepiece's "A" behind a word is "\u2581A"
        of = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
        pairs = ((place, own) for place in range(at, len(ids)) for own in of)
        first, length = next((place, len(own)) for place, own in pairs if ids[place : place + len(own)] == own)
        rows, at = [*rows, *range(first - 1, first - 1 + length)], first + length
    return made, torch.tensor(rows), torch.tensor(ids)[torch.tensor(rows) + 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_offline_equals_online_and_every_trained_tensor_gets_a_gradient(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    """All samples of the cache in one padded batch, against each alone; decoder, projector and tower are trained."""
    teacher = made(name)
    run = exact(Run.prepare(teacher.config(tmp_path / "run", train_vision=FAMILIES[name].sees)), name)
    ours, theirs = equal(run, teacher, name)
    assert ours.keys() == theirs.keys()
    tower = f"model.{parts_of(run.student.model).tower}."
    without = [n for n, p in run.student.named_parameters() if p.requires_grad and n not in ours]
    assert all(n.startswith(tower) for n in without), without  # what lies behind the layer that the projector reads


PAIRS = [
    ("qwen2_5_vl", "qwen2_vl"),
    ("qwen2_5_vl", "qwen3_vl"),
    ("qwen2_5_vl", "internvl"),
    ("internvl", "qwen2_5_vl"),
    ("qwen2_5_vl", "llava_onevision"),
    ("llava_onevision", "qwen2_vl"),
    ("qwen2_5_vl", "qwen3"),
    ("qwen3", "qwen2_5_vl"),
]
"""Of one base vocabulary, with templates, image tokens, added tokens and paddings of their own; the sixth and the
eighth have a sample a turn, the fifth and the seventh a line a turn."""


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_student_learns_from_another_familys_cache(
    teacher: str, student: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    both = made(teacher, FAMILIES[teacher].sees and FAMILIES[student].sees), made(student)
    run = exact(Run.prepare(both[0].config(tmp_path / "run", student=both[1])), student)
    equal(run, both[0], student)


def equal(run: Run, teacher: Made, student: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Compare loss and gradients with the live teacher's; return both gradients."""
    digits = torch.float32 if student in ROUNDS else EXACT
    loss, ours = offline(run)
    assert loss == pytest.approx(online(run, teacher, student), rel=rounding(digits, MODEL))
    theirs = gradients(run)
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for parameter, gradient in theirs.items():
        assert float((ours[parameter] - gradient).abs().max()) < rounding(digits, 2 * MODEL) * scale, parameter
    return ours, theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_student_loads_with_the_auto_classes_and_answers_the_same_tokens(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    """Its adapters merged; asked by its own processor's template, without a setting of ours."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    own, sees = made(name), FAMILIES[name].sees
    run = Run.prepare(own.config(tmp_path / "run", train="lora"))
    targets = lora_targets_of(run)
    assert targets
    assert all(target.startswith(f"{parts_of(run.student.model).decoder}.") for target in targets)
    loss, grads = offline(run)
    trained = {n for n, p in run.student.named_parameters() if p.requires_grad}
    assert trained == grads.keys()
    torch.manual_seed(0)
    for parameter, weight in run.student.named_parameters():
        if "lora_B" in parameter:
            weight.data.normal_(0, 0.05)
    changed = float(loss_of(run).detach())
    assert changed != pytest.approx(loss, rel=1e-3)
    run.export(tmp_path / "model")
    assert float(loss_of(run).detach()) == pytest.approx(changed, rel=rounding(operations=MODEL))
    kind, reads = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    model, processor = kind.from_pretrained(tmp_path / "model").eval(), reads.from_pretrained(tmp_path / "model")
    for parameter, weight in run.student.model.named_parameters():
        assert torch.equal(model.get_parameter(parameter), weight), parameter
    student = Student.load(tmp_path / "model")
    for asked in conversations(sees)[:2]:
        first = dataclasses.replace(asked, answers=asked.answers[:1])
        fields, rows, _ = written(processor, first, name, own.pictures, only_last=True)
        a_token = [n for n in fields if n in ("input_ids", "attention_mask") or n.endswith("token_type_ids")]
        prompt = {**fields, **{n: fields[n][:, : int(rows[0]) + 1] for n in a_token}}
        never = [[token] for token in media_tokens(model.config)] or None
        out = model.generate(**prompt, do_sample=False, max_new_tokens=8, bad_words_ids=never)
        theirs = out[0, prompt["input_ids"].shape[1] :]
        pictures = [Image.open(own.pictures / image.path).convert("RGB") for image in asked.images]
        assert isinstance(student.reader, ChatReader)
        fields_of = student.reader.prompt(asked, pictures)
        assert torch.equal(fields_of["input_ids"], prompt["input_ids"][0])
        how = Decoding(student.reader.chat.end, student.reader.pad, 8, media_tokens(model.config))
        (ours,) = generate(student.model, [fields_of], how)
        assert ours == theirs.tolist()[: len(ours or ())]


def lora_targets_of(run: Run) -> list[str]:
    return [n for n, module in run.student.model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.sees])
def test_a_projector_is_trained_alone_and_reached_by_a_batch_without_images(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    own = made(name)
    config = own.config(tmp_path / "run", train="projector", gradient_checkpointing=True)
    run = Run.prepare(dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=1)))
    parts = parts_of(run.student.model)
    trained = {n for n, p in run.student.named_parameters() if p.requires_grad}
    names = tuple(f"model.{part}" for part in (*parts.projector, *parts.parameters))
    assert trained == {n for n, _ in run.student.named_parameters() if n.startswith(names)}
    seen = []
    for micro in run.plan.micro_batches(0, 0, 1):
        run.student.zero_grad()
        loss, _ = run.student(read(run, micro), 0)
        loss.backward()
        grads = gradients(run)
        assert grads.keys() == trained or run.dataset.sources[0].image_counts[micro.indices[0]]
        seen.append(any(bool(gradient.any()) for gradient in grads.values()))
    assert {True, False} == set(seen)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma4"])
def test_a_student_of_every_second_layer_is_the_teacher_without_the_others(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    own = made(name)
    config = own.config(tmp_path / "run")
    cut = dataclasses.replace(config.student, model="", layers_from=str(own.folder), layers=1)
    run = Run.prepare(dataclasses.replace(config, student=cut))
    loss, _ = offline(run)
    run.export(tmp_path / "model")
    saved = dataclasses.replace(config.student, model=str(tmp_path / "model"))
    again = Run.prepare(dataclasses.replace(config, student=saved))
    decoder: Any = again.student.model.get_submodule(parts_of(again.student.model).decoder)
    assert len(decoder.layers) == 1
    assert float(loss_of(again).detach()) == pytest.approx(loss, rel=rounding(operations=MODEL))


@pytest.mark.parametrize("name", [*FAMILIES])
def test_a_sample_that_is_too_long_for_the_student_is_found_before_the_first_step(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    """One position too few for the longest."""
    own = made(name)
    run = Run.prepare(own.config(tmp_path / "run"))
    lengths = [run.dataset.batch([index]).input_ids.shape[1] for index in range(len(run.dataset.sources[0]))]
    longest, name_of = max(lengths), run.dataset.sources[0].name_of(int(np.argmax(lengths)))
    for positions in (longest, longest - 1):
        folder = tmp_path / str(positions)
        shutil.copytree(own.folder, folder)
        config = json.loads((folder / "config.json").read_text())
        config.get("text_config", config)["max_position_embeddings"] = positions
        (folder / "config.json").write_text(json.dumps(config))
        changed = own.config(tmp_path / "run", student=dataclasses.replace(own, folder=folder))
        if positions == longest:
            Run.prepare(changed)
            continue
        with pytest.raises(ConfigError, match=rf"{name_of}: {longest} positions, and the student has {positions}"):
            Run.prepare(changed)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].sees and name != "llava"])
def test_no_sample_takes_more_positions_than_a_student_is_taken_to_need(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    run = Run.prepare(made(name).config(tmp_path / "run"))
    source, reader = run.dataset.sources[0], run.dataset.reader
    assert isinstance(reader, ChatReader)
    most = reader.most_positions(source.lengths, source.rows, source.image_counts)
    lengths = np.array([run.dataset.batch([index]).input_ids.shape[1] for index in range(len(source))])
    assert (lengths <= most).all()
    assert np.isfinite(most).all() == (name != "smolvlm")  # whose processor does not say; all are read


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen3"])
def test_plain_data_are_shown_as_a_cache_of_their_answers_is(
    name: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    """By a loader process, too. The third rewrites earlier turns: a line a turn of plain data, a sample a turn cached.
    Images stand in any turn."""
    own, lines = made(name), list[dict[str, Any]]()
    for asked in conversations(FAMILIES[name].sees):
        turns = zip(asked.questions, asked.answers, strict=True)
        said = [(who, text) for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
        line = {"id": asked.sample_id, "conversations": [{"from": who, "value": text} for who, text in said]}
        if names := [image.path for image in asked.images]:
            line["image"] = names if len(names) > 1 else names[0]
        lines.append(line)
    (tmp_path / "data.json").write_text(json.dumps(lines))
    cached = dataclasses.replace(own.config(tmp_path / "cached"), losses=LOSSES[:1])
    plain = SourceConfig(data=str(tmp_path / "data.json"), image_folder=str(own.pictures))
    runs = [Run.prepare(dataclasses.replace(cached, sources=(source,))) for source in (*cached.sources, plain)]
    one, other = (float(loss_of(run).detach()) for run in runs)
    assert one == pytest.approx(other, rel=rounding(operations=MODEL))
    run = runs[1]
    ((micro, batch),) = make_loader(run.dataset, run.plan, range(1), 0, 1, 1, False)
    assert float(run.student(batch, micro.source)[0].detach()) == pytest.approx(one, rel=rounding(operations=MODEL))


CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_a_student_of_a_tower_and_a_language_model_learns_from_another_familys_cache(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    """TinyLLaVA's shape: SigLIP and Qwen's language model, taught by Qwen-VL."""
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    SiglipVisionModel(tower).save_pretrained(tmp_path / "tower")
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "tower")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    teacher = made("qwen2_5_vl")
    config = teacher.config(tmp_path / "run")
    student = StudentConfig(
        language_model=str(made("qwen3").folder),
        vision_tower=str(tmp_path / "tower"),
        chat_template=str(tmp_path / "chatml.jinja"),
    )
    run = Run.prepare(dataclasses.replace(config, student=student))
    (micro,) = run.plan.micro_batches(0, 0, 1)
    _, batch = run.dataset[micro]
    raw = run.dataset.sources[0].read(micro.indices)
    cached = [token for ids, mask in zip(raw.input_ids, raw.loss_mask, strict=True) for token in ids[mask].tolist()]
    assert batch.answer_ids.tolist() == cached
    assert int((batch.input_ids == run.student.model.config.image_token_id).sum()) == 3 * 4
    loss, grads = offline(run)
    assert loss == pytest.approx(float(loss_of(run).detach()))
    assert all(bool(grads[f"model.{name}.linear_1.weight"].any()) for name in parts_of(run.student.model).projector)
    run.export(tmp_path / "model")
    again = Student.load(tmp_path / "model")
    line = {"id": "a", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}
    line["conversations"] += [{"from": "gpt", "value": "A square."}]
    (tmp_path / "asked.json").write_text(json.dumps([line]))
    answers = answer_questions(again, tmp_path / "asked.json", teacher.pictures, max_new_tokens=8)
    reader = run.dataset.reader
    assert isinstance(reader, ChatReader)
    asked = Conversation("a", ("<image>What is it?",), ("",), (ShownImage("0.png", "0.png"),))
    prompt = reader.prompt(asked, [Image.open(teacher.pictures / "0.png").convert("RGB")])
    beyond = range(len(reader.tokenizer), run.student.model.get_output_embeddings().out_features)
    how = Decoding(reader.chat.end, reader.pad, 8, (*media_tokens(run.student.model.config), *beyond))
    (ids,) = generate(run.student.model.eval(), [prompt], how)
    assert answers == [reader.tokenizer.decode(ids, skip_special_tokens=True).strip()]


REFUSED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "packed token types": ("gemma3", "gemma3", {}, {"pack": True}, "this student reads token types"),
    "packed linear layers": ("qwen3_5", "qwen3_5", {}, {"pack": True}, "layers of linear_attention"),
    "features": ("gemma3", "gemma3", {"vision_features": "cache"}, {}, "student.vision_features=cache: the tower"),
    "text projector": ("llama3", "llama3", {"train": "projector"}, {}, "reads text only and has no vision tower"),
    "text student": ("qwen2_5_vl", "qwen3", {}, {}, "2 of 3 samples .* show images, and the student reads text only"),
    "vocabulary": ("llama3", "granite", {}, {}, "another base vocabulary"),
    "end token": ("idefics3", "llama3", {}, {}, "ends its answers with token"),
    "cut inputs": ("gemma4", "gemma4", {"layers": 1}, {}, "an input of its own for every layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused_before_the_first_step(
    case: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    teacher, student, settings, train, text = REFUSED[case]
    config = made(teacher, images=case != "end token").config(tmp_path / "run", student=made(student), **settings)
    if "layers" in settings:
        cut = dataclasses.replace(config.student, model="", layers_from=config.student.model)
        config = dataclasses.replace(config, student=cut)
    with pytest.raises((ConfigError, CacheError), match=text):
        Run.prepare(dataclasses.replace(config, train=dataclasses.replace(config.train, **train)))


def test_losses_on_all_text_need_the_teachers_own_rendering(made: Callable[..., Made], tmp_path: Path) -> None:
    text = (LossSpec("hidden_mse", tokens="text"),)
    for student, refused in (("qwen2_vl", False), ("internvl", True)):
        config = made("qwen2_5_vl").config(tmp_path / student, student=made(student))
        run = Run.prepare(dataclasses.replace(config, losses=text))
        (micro,) = run.plan.micro_batches(0, 0, 1)
        if refused:
            with pytest.raises(CacheError, match=r"sample [abc]: the student reads other tokens than its teacher did"):
                run.dataset[micro]
        else:
            loss, _ = run.student(run.dataset[micro][1], 0)
            assert float(loss.detach()) > 0
