"""Every way that the vLLM backend takes with a family, on vLLM's real CPU build; the torch teacher is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from vllm import LLM, SamplingParams

from student_train.students.export import save_student
from teacher_cache.build import shards
from teacher_cache.build.build import build_cache
from teacher_cache.build.prove import prove
from teacher_cache.config import CacheConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.logit_rule import AS_THEY_ARE
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import TeacherError
from teacher_cache.models.open_chat import load_processor, open_chat
from teacher_cache.models.parts import media_tokens
from teacher_cache.models.pretrained import load_model, model_class
from teacher_cache.store.storage import Storage
from teacher_cache.teachers.vllm.choice import choose
from teacher_cache.teachers.vllm.jobs import VllmOptions
from teacher_cache.teachers.vllm.processes import environment
from teacher_cache.teachers.vllm.vllm_teacher import VllmTeacher
from teacher_cache.trust.verify import verify_cache
from tests.fixtures.building import asked
from tests.fixtures.families import FAMILIES, make_config, make_tokenizer
from tests.fixtures.vllm_ways import REFUSED, WAYS
from tests.teacher_cache.build.test_build import contents
from tests.teacher_cache.build.test_families import config_of
from tests.vllm.caches import assert_same_caches

Folder = Callable[[str], Path]


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_says_which_way_a_family_takes_and_why(name: str, tmp_path: Path) -> None:
    """Of a configuration alone; each has its line in the table of ways."""
    settings = make_config(FAMILIES[name], make_tokenizer(FAMILIES[name]))
    settings.save_pretrained(tmp_path)
    config = config_of(name, tmp_path, tmp_path)
    choice = choose(replace(config, teacher=replace(config.teacher, backend="auto")))
    way = ("one pass" if choice.one_pass else "two passes") if choice.use_vllm else "torch"
    assert way == WAYS[name], choice.reason
    assert model_class("", "", settings).__name__ in choice.reason
    assert choice.reason.startswith({"one pass": "one pass: ", "two passes": "vLLM answers, then"}.get(way, "torch"))


ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""In this process: an engine that hands out inner states cannot run there, any other starts in a fifth of the time."""


class Interrupted(Exception):
    pass


SEEING, SCALED = ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"], ["granite"]
"""One pass, one pass, two passes; one pass of a text model that scales its logits. LLaVA-1.5 has a file of its own."""


@pytest.fixture(scope="module")
def opened(
    request: pytest.FixtureRequest, wide_folder: Folder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CacheConfig, VllmTeacher]]:
    """Three conversations: one image, two of different shapes in one question, one inside the second question."""
    config = config_of(request.param, wide_folder(request.param), tmp_path_factory.mktemp(request.param))
    config = replace(config, teacher=replace(config.teacher, backend="auto", max_length=400))
    samples, one_pass = list(read_conversations(config.data)), WAYS[request.param] == "one pass"
    with VllmTeacher(config, samples, VllmOptions(environment={} if one_pass else ALONE)) as teacher:
        prove(config, teacher, samples)
        yield config, teacher


@pytest.mark.parametrize("opened", SEEING + SCALED, indirect=True)
def test_a_cache_by_vllm_equals_torchs_and_goes_on_where_it_was_interrupted(
    opened: tuple[CacheConfig, VllmTeacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, teacher = opened
    ours, theirs = replace(config, output=str(tmp_path / "vllm")), replace(config, output=str(tmp_path / "torch"))
    assert teacher.one_pass == (WAYS[Path(config.teacher.model).name] == "one pass")
    commit = shards._commit

    def interrupted(*given: Any) -> None:
        commit(*given)
        raise Interrupted

    monkeypatch.setattr(shards, "_commit", interrupted)
    with pytest.raises(Interrupted):
        build_cache(ours, teacher=teacher, style="quiet")
    monkeypatch.setattr(shards, "_commit", commit)
    first = {name: data for name, data in contents(tmp_path / "vllm").items() if "00000" in name}
    assert first
    assert build_cache(ours, teacher=teacher, style="quiet").shards_made == 1
    assert first.items() <= contents(tmp_path / "vllm").items()
    build_cache(replace(theirs, teacher=replace(theirs.teacher, backend="torch")), style="quiet")
    assert_same_caches(tmp_path / "vllm", tmp_path / "torch")
    assert verify_cache(Storage(ours.output), deep=True).ok


@pytest.mark.parametrize("opened", SEEING, indirect=True)
def test_an_engine_that_reads_other_tokens_than_the_models_processor_writes_is_refused(
    opened: tuple[CacheConfig, VllmTeacher],
) -> None:
    config, teacher = opened
    sample = next(s for s in read_conversations(config.data) if isinstance(s, Conversation) and s.images)
    request = asked(teacher, sample, folder=config.data.image_folder)
    more = request.shown.sample.runs + np.asarray([1, 0])  # a position more of each run
    other = replace(request, shown=replace(request.shown, sample=replace(request.shown.sample, runs=more)))
    for captures in {False, teacher.one_pass}:
        with pytest.raises(TeacherError, match=r"s0, turn 0: the engine read \d+ tokens, expected \d+; first"):
            teacher.answer([replace(other, capture=captures)])


@pytest.mark.parametrize("opened", SCALED, indirect=True)
def test_logits_that_are_not_the_states_by_the_models_rule_are_refused(
    opened: tuple[CacheConfig, VllmTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = opened[1]
    monkeypatch.setattr(teacher, "_description", replace(teacher.description, logit_rule=AS_THEY_ARE))
    with pytest.raises(TeacherError, match="the captured state does not give the engine's logits"):
        teacher.answer([asked(teacher, Conversation("a", ("Are you there?",), ("",)), capture=True)])


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_whose_states_or_tokens_are_not_torchs_is_refused_before_a_build(
    name: str, wide_folder: Folder, tmp_path: Path
) -> None:
    config = config_of(name, wide_folder(name), tmp_path)
    config = replace(config, teacher=replace(config.teacher, backend="vllm", max_length=400))
    samples = list(read_conversations(config.data))
    with (
        VllmTeacher(config, samples, VllmOptions(environment=ALONE)) as teacher,
        pytest.raises(TeacherError, match=rf"{REFUSED[name]}.*\bSet teacher\.backend=torch"),
    ):
        prove(config, teacher, samples)


@pytest.mark.parametrize("name", ["qwen2_vl", "llama3"])
def test_an_exported_student_answers_the_same_tokens_in_vllm_as_in_transformers(
    name: str, wide_folder: Folder, tmp_path: Path
) -> None:
    config = config_of(name, wide_folder(name), tmp_path)
    made, (processor, tokenizer) = load_model("m", config.teacher.model), load_processor(config.teacher)
    save_student(made, processor, tmp_path / "student", [open_chat(config.teacher, processor).end])
    sees, folder, count = FAMILIES[name].sees, tmp_path / "student", 12
    kind, reads = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    model, reader = kind.from_pretrained(folder, dtype=torch.float32), reads.from_pretrained(folder)
    never = [[token] for token in media_tokens(model.config)] or None
    prompts, in_transformers = [], []
    for picture in ("a.png", "b.png"):
        image = PillowImage.open(tmp_path / picture).convert("RGB") if sees else None
        said = f"What is in {picture}?"
        content = [{"type": "image"}, {"type": "text", "text": said}] if sees else said
        text = reader.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        pictures = {"images": [image]} if sees else {}
        fields = reader(text=[text], return_tensors="pt", add_special_tokens=False, **pictures)
        out = model.generate(**fields, do_sample=False, max_new_tokens=count, bad_words_ids=never)
        in_transformers.append(out[0, fields["input_ids"].shape[1] :].tolist())
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": image}} if sees else {}))
    words = tokenizer.convert_ids_to_tokens(list(media_tokens(model.config))) or None
    with environment(ALONE | {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}):
        llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 26)
        how = SamplingParams(temperature=0, max_tokens=count, bad_words=words)
        outputs = llm.generate(prompts, how, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
    assert [list(output.outputs[0].token_ids) for output in outputs] == in_transformers
    assert len({tuple(ids) for ids in in_transformers}) == 2
