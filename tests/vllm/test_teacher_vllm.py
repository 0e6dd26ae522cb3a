"""The vLLM teacher on vLLM's real CPU build, with the torch teacher as the oracle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image as PillowImage
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vllm import LLM, SamplingParams

from student_train.evaluation.answers import Student, answer_questions
from student_train.students.export import export_run
from student_train.training.trainer import fit
from teacher_cache.build.answers import AnsweredSample, answer_conversations
from teacher_cache.build.build import build_cache
from teacher_cache.build.inputs import ReadSample, ShardInput
from teacher_cache.build.signals import row_signals, stable_topk
from teacher_cache.config import CacheConfig, as_plain
from teacher_cache.data.conversations import Conversation
from teacher_cache.errors import TeacherCrashed, TeacherError
from teacher_cache.models.weights import rename_vision_weights, tensor_files
from teacher_cache.store.reader import TeacherCache
from teacher_cache.teachers.teacher import Answer, AnswerRequest, SampleStates, Shown, Teacher, Wanted, pick
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.teachers.vllm.choice import choose
from teacher_cache.teachers.vllm.jobs import Mode, VllmOptions
from teacher_cache.teachers.vllm.processes import environment
from teacher_cache.teachers.vllm.session import LENGTH_MARGIN, VllmSession
from teacher_cache.teachers.vllm.vllm_teacher import VllmTeacher
from tests.fixtures.building import asked, build_of
from tests.fixtures.training import tiny_fit, weights
from tests.fixtures.waiting import PATIENCE, until
from tests.vllm.caches import CLOSE, assert_same_caches
from tests.vllm.conftest import TEACHER, make_config

WANTED = Wanted(text=True, visual=True)
TEMPERATURES = (0.5, 1.0, 2.0)


@dataclass
class Answered:
    """Conversations a teacher has answered, ready to be scored."""

    samples: list[AnsweredSample]
    shown: list[Shown]
    read: list[ReadSample]


def answer_all(teacher: Teacher, config: CacheConfig, conversations: Sequence[Conversation]) -> Answered:
    build = build_of(config, teacher)
    read = ShardInput.load(build, conversations).samples
    assert len(read) == len(conversations)
    samples = answer_conversations(build, read)
    return Answered(samples, [r.shown(s.answers) for r, s in zip(read, samples, strict=True)], read)


def captured_states(teacher: Teacher, answered: Answered) -> list[SampleStates]:
    description = teacher.description
    states = []
    for sample, shown in zip(answered.samples, answered.shown, strict=True):
        assert sample.hidden is not None
        positions = shown.sample.positions(description.image_token)
        assert len(sample.hidden) == positions.length - 1, "every position but the last token's"
        states.append(pick(positions, WANTED, sample.hidden))
    return states


def scored_states(teacher: Teacher, answered: Answered, wanted: Wanted = WANTED) -> list[SampleStates]:
    states: dict[int, SampleStates] = {}
    for places, batch in teacher.score(answered.shown, wanted):
        states.update(zip(places, batch, strict=True))
    return [states[place] for place in range(len(answered.shown))]


def assert_same_states(ours: Sequence[SampleStates], oracle: Sequence[SampleStates], head: torch.Tensor) -> None:
    """States at rows, text and image positions, and what is formed from the rows, within :data:`CLOSE`."""
    for mine, theirs in zip(ours, oracle, strict=True):
        for name in ("rows", "text", "visual", "rows_second_last", "text_second_last"):
            left, right = getattr(mine, name), getattr(theirs, name)
            assert (left is None) == (right is None), name
            if left is not None:
                torch.testing.assert_close(left, right, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    mine = torch.cat([s.rows for s in ours]) @ head.T
    theirs = torch.cat([s.rows for s in oracle]) @ head.T
    values, ids = stable_topk(theirs, 8)
    torch.testing.assert_close(mine.gather(1, ids), values, **CLOSE)
    torch.testing.assert_close(mine.topk(8).values, values, **CLOSE)
    stats, expected = (row_signals(logits, 0, TEMPERATURES)["stats"] for logits in (mine, theirs))
    torch.testing.assert_close(stats, expected, **CLOSE)


def first_difference(one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """(turn, place) of the first id in which two lists of answers differ."""
    for turn, (left, right) in enumerate(zip(one, other, strict=True)):
        for place, (a, b) in enumerate(zip(left, right, strict=False)):
            if a != b:
                return turn, place
    raise AssertionError("one answer is the other's beginning: they ended differently")


@pytest.fixture(scope="module")
def one_pass(vllm_teacher: VllmTeacher, config: CacheConfig, conversations: list[Conversation]) -> Answered:
    return answer_all(vllm_teacher, config, conversations)


def test_greedy_answers_equal_those_of_torch(
    one_pass: Answered, torch_teacher: TorchTeacher, config: CacheConfig, conversations: list[Conversation]
) -> None:
    oracle = answer_all(torch_teacher, config, conversations)
    pairs = list(zip(one_pass.samples, oracle.samples, strict=True))
    different = [i for i, (a, b) in enumerate(pairs) if a.answers != b.answers]
    assert len(different) <= 0.005 * len(conversations), f"{len(different)} of {len(conversations)} differ"
    for i in different:  # two candidates that are equal but for rounding
        turn, place = first_difference(pairs[i][0].answers, pairs[i][1].answers)
        chosen = [pairs[i][side].answers[turn][place] for side in (0, 1)]
        row = sum(map(len, pairs[i][1].answers[:turn])) + place
        ((_, (states,)),) = torch_teacher.score([oracle.shown[i]], Wanted())
        logits = states.rows[row] @ torch_teacher.head().T
        torch.testing.assert_close(logits[chosen[0]], logits[chosen[1]], **CLOSE)
    same = [(a, b) for a, b in pairs if a.answers == b.answers]
    assert all(a.finish_reasons == b.finish_reasons for a, b in same)


def test_one_pass_states_equal_those_of_a_torch_scoring_pass(
    one_pass: Answered, vllm_teacher: VllmTeacher, torch_teacher: TorchTeacher
) -> None:
    oracle = scored_states(torch_teacher, one_pass)
    assert_same_states(captured_states(vllm_teacher, one_pass), oracle, torch_teacher.head())
    assert any(s.visual is not None for s in oracle)
    assert any(s.visual is None for s in oracle)


def test_scoring_alone_gives_the_states_of_the_one_pass(one_pass: Answered, vllm_teacher: VllmTeacher) -> None:
    first = replace_all(one_pass, 60)
    assert_same_states(scored_states(vllm_teacher, first), captured_states(vllm_teacher, first), vllm_teacher.head())


def replace_all(answered: Answered, count: int) -> Answered:
    return Answered(answered.samples[:count], answered.shown[:count], answered.read[:count])


def test_a_later_turn_reads_image_and_earlier_turns_from_the_prefix_cache(
    vllm_teacher: VllmTeacher, config: CacheConfig, conversations: list[Conversation]
) -> None:
    """Asked twice, the same prompt is all hits but its last block; states and answer stay the same."""
    request = longest_request(vllm_teacher, config, conversations)
    vllm_teacher.answer([request])
    (again,) = vllm_teacher.answer([request])
    assert vllm_teacher.last_cached_tokens >= 32
    white = (PillowImage.new("RGB", (32, 32), "white"),)
    fresh = replace(request, shown=replace(request.shown, images=white))
    (other,) = vllm_teacher.answer([fresh])
    assert again.hidden is not None
    assert other.hidden is not None
    shared = min(len(again.hidden), len(other.hidden))
    assert not torch.allclose(again.hidden[:shared], other.hidden[:shared], atol=1e-2), (
        "another image is another prefix"
    )


def longest_request(teacher: VllmTeacher, config: CacheConfig, conversations: list[Conversation]) -> AnswerRequest:
    conversation = next(c for c in conversations if c.image is not None and len(c.questions) == 4)
    return asked(teacher, conversation, [(5, 2)] * 3, config.data.image_folder, capture=True)


def test_conversations_that_go_on_at_once_give_the_same_answers(
    one_pass: Answered, vllm_teacher: VllmTeacher, conversations: list[Conversation]
) -> None:
    """``answers(then=…)``: no conversation waits for another, and later turns find their prefix in the cache."""
    places = [i for i, c in enumerate(conversations[:120]) if len(c.questions) > 1]
    said: dict[str, list[tuple[int, ...]]] = {conversations[i].sample_id: [] for i in places}
    by_id = {conversations[i].sample_id: i for i in places}

    def request(i: int, turn: int) -> AnswerRequest:
        name = conversations[i].sample_id
        last = turn + 1 == len(conversations[i].questions)
        return AnswerRequest(one_pass.read[i].shown(said[name], ask=True), 0, capture=last)

    def then(asked: AnswerRequest, answer: Answer) -> AnswerRequest | None:
        said[asked.sample_id].append(answer.token_ids)
        i = by_id[asked.sample_id]
        return request(i, asked.turn + 1) if asked.turn + 1 < len(conversations[i].questions) else None

    for _ in vllm_teacher.answers([request(i, 0) for i in places], then):
        pass
    assert [said[conversations[i].sample_id] for i in places] == [one_pass.samples[i].answers for i in places]


@pytest.fixture(scope="module")
def both_caches(
    vllm_teacher: VllmTeacher,
    torch_teacher: TorchTeacher,
    config: CacheConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """200 whole conversations through ``build_cache``, by vLLM in one pass and by torch in two."""
    small = replace(
        config,
        data=replace(config.data, max_samples=200),
        signals=replace(config.signals, codec="float32", hidden="text", visual="states", top_k=8, advantage="blurred"),
    )
    folder = tmp_path_factory.mktemp("caches")
    for name, teacher in (("vllm", vllm_teacher), ("torch", torch_teacher)):
        assert build_cache(replace(small, output=str(folder / name)), teacher=teacher, style="quiet").skipped == 0
    return folder / "vllm", folder / "torch"


def test_the_cache_built_in_one_pass_equals_the_one_of_torch(both_caches: tuple[Path, Path]) -> None:
    assert_same_caches(*both_caches)
    with TeacherCache.open(both_caches[0]) as ours, TeacherCache.open(both_caches[1]) as oracle:
        images = np.flatnonzero(oracle.images())
        mine, theirs = (cache.read_images(cache.read(images, []).image_places).arrays for cache in (ours, oracle))
        assert mine.keys() == theirs.keys() == {"visual"}
        np.testing.assert_allclose(mine["visual"], theirs["visual"], **CLOSE)


def test_a_student_trained_from_either_cache_ends_the_same(
    both_caches: tuple[Path, Path], world: Path, tmp_path: Path
) -> None:
    """40 steps with three losses: what the backend changes is a thousandth of what another seed changes."""
    runs = {
        name: tiny_fit(tmp_path, cache, world, name, max_steps=40, checkpoint_every=0, seed=seed)
        for name, cache, seed in (
            ("vllm", both_caches[0], 0),
            ("torch", both_caches[1], 0),
            ("seed", both_caches[1], 1),
        )
    }
    for run in runs.values():
        fit(run, "quiet")
    final = {name: weights(run) for name, run in runs.items()}
    flat = {name: torch.cat([w.flatten() for w in tensors.values()]) for name, tensors in final.items()}
    backend, seed = ((flat[name] - flat["torch"]).norm() for name in ("vllm", "seed"))
    assert backend < 1e-3 * seed


def test_an_exported_student_says_the_same_in_transformers_in_vllm_and_in_our_evaluation(
    both_caches: tuple[Path, Path], world: Path, tmp_path: Path
) -> None:
    run = tiny_fit(tmp_path, both_caches[0], world, max_steps=120, checkpoint_every=0, learning_rate=3e-3)
    fit(run, "quiet")
    folder = export_run(Path(run.output), tmp_path / "exported")
    samples = json.loads((world / "dev.json").read_text())
    ours = answer_questions(Student.load(folder), world / "dev.json", world / "images", max_new_tokens=16)

    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    prompts, in_transformers = [], []
    for sample in samples:
        text = sample["conversations"][0]["value"].replace("<image>", "").strip()
        image = PillowImage.open(world / "images" / sample["image"]).convert("RGB") if "image" in sample else None
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append({"prompt": prompt} | ({"multi_modal_data": {"image": image}} if image is not None else {}))
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        in_transformers.append(out.tolist())

    with environment({"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}):
        llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 28)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        llm.llm_engine.engine_core.shutdown(timeout=2)
    in_vllm = [list(output.outputs[0].token_ids) for output in outputs]
    assert in_vllm == in_transformers
    assert processor.tokenizer.batch_decode(in_vllm, skip_special_tokens=True) == ours
    assert len(set(ours)) > 3


def test_connector_files_do_not_stay(vllm_teacher: VllmTeacher, one_pass: Answered) -> None:
    assert vllm_teacher.scratch_files() == []


def test_a_wrong_output_head_is_caught(
    vllm_teacher: VllmTeacher, config: CacheConfig, conversations: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = longest_request(vllm_teacher, config, conversations)
    norm = vllm_teacher._norm
    assert norm is not None
    monkeypatch.setattr(vllm_teacher, "_norm", lambda states: norm(states) * 1.01)
    with pytest.raises(
        TeacherError, match=r"answer row 0 of \d+: the captured state does not give the engine's logits"
    ):
        vllm_teacher.answer([request])


def test_a_request_that_does_not_fit_is_named(vllm_teacher: VllmTeacher) -> None:
    request = asked(vllm_teacher, Conversation("long-1", (" ".join(["red"] * 500),), ("",)))
    with pytest.raises(TeacherError, match=r"long-1, turn 0 \(\d+ over\).*teacher.max_length"):
        vllm_teacher.answer([request])


def test_hostile_scheduling_changes_nothing(
    config: CacheConfig, hard_conversations: list[Conversation], torch_teacher: TorchTeacher
) -> None:
    """Chunked prefill, too few cache blocks (preemption), prefix-cache hits, two captured layers, then kill -9."""
    hostile = VllmOptions(max_sequences=32, prefill_tokens=64, cache_blocks=20, block_tokens=32, count_events=True)
    twice = replace(config, signals=replace(config.signals, second_last=True))
    wanted = replace(WANTED, second_last=True)
    oracle = answer_all(torch_teacher, config, hard_conversations)
    expected = scored_states(torch_teacher, oracle, wanted)
    with VllmTeacher(twice, hard_conversations, hostile) as teacher:
        answered = answer_all(teacher, config, hard_conversations)
        events = teacher.events()
        assert [s.answers for s in answered.samples] == [s.answers for s in oracle.samples]
        without = [replace(s, rows_second_last=None, text_second_last=None) for s in expected]
        assert_same_states(captured_states(teacher, answered), without, teacher.head())
        assert_same_states(scored_states(teacher, answered, wanted), expected, teacher.head())
        assert events["preemptions"] > 0
        assert events["cached prompt tokens"] > 0
        die_and_go_on(teacher, oracle)


def die_and_go_on(teacher: VllmTeacher, oracle: Answered) -> None:
    """An EngineCore killed in the middle of a batch is an ``TeacherCrashed``; the same teacher then goes on."""
    requests = [AnswerRequest(read.shown((), ask=True), 0, capture=True) for read in oracle.read]
    seen = 0
    with pytest.raises(TeacherCrashed, match=r"exit code (-9|unknown).*Run the same command again"):  # noqa: PT012
        for _ in teacher.answers(requests):
            seen += 1
            if seen == 3:
                os.kill(teacher.engine_pids()[0], signal.SIGKILL)
    assert 3 <= seen < len(requests)
    assert teacher.engine_pids() == []
    answers = teacher.answer(requests)
    assert [a.token_ids for a in answers] == [s.answers[0] for s in oracle.samples]


def test_a_model_class_without_inner_states_answers_then_scores(
    config: CacheConfig,
    conversations: list[Conversation],
    vllm_teacher: VllmTeacher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """All shards are answered before the first is scored, so the engines change once, and the cache is the same."""
    small = replace(
        config,
        data=replace(config.data, max_samples=48),
        signals=replace(config.signals, codec="float32", hidden="rows"),
        layout=replace(config.layout, shard_samples=16),
    )
    whole = replace(small, output=str(tmp_path / "one-pass"))
    build_cache(whole, teacher=vllm_teacher, style="quiet")
    started: list[str] = []

    class Counted(VllmSession):
        def __init__(self, mode: Mode, *rest: Any) -> None:
            started.append(mode)
            super().__init__(mode, *rest)

    monkeypatch.setattr("teacher_cache.teachers.vllm.registry.can_capture", lambda architecture: False)
    monkeypatch.setattr("teacher_cache.teachers.vllm.vllm_teacher.VllmSession", Counted)
    assert not choose(config).one_pass
    halves = replace(small, output=str(tmp_path / "two-passes"))
    with VllmTeacher(halves, conversations, VllmOptions(cache_bytes=256 << 20)) as teacher:
        assert not teacher.one_pass
        assert teacher.two_engines
        assert build_cache(halves, teacher=teacher, style="quiet").shards_made == 3
    assert started == ["plain", "states"]
    assert_same_caches(Path(halves.output), Path(whole.output))


def test_killed_engine_then_killed_driver_in_a_run_of_1000_samples(config: CacheConfig, tmp_path: Path) -> None:
    """The engine dies: the run goes on by itself. The driver dies: its engine goes with it, and the next run goes on
    after the last committed shard. Nothing that was committed is asked again, nothing is missing."""
    lines = json.loads(Path(str(config.data.path)).read_text())[:1000]
    for place, line in enumerate(lines):  # of one turn or of two
        del line["conversations"][2 + 2 * (place % 2) :]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    thousand = replace(
        config,
        output=str(tmp_path / "killed"),
        data=replace(config.data, path=str(tmp_path / "data.json")),
        teacher=replace(config.teacher, backend="vllm"),
        generation=replace(config.generation, max_new_tokens=12),
        signals=replace(config.signals, codec="float32", hidden="rows", visual="none"),
        layout=replace(config.layout, shard_samples=200),
    )
    settings = tmp_path / "cache.yaml"
    settings.write_text(yaml.safe_dump(as_plain(thousand)), encoding="utf-8")
    command = [sys.executable, "-m", "teacher_cache.cli", "build", str(settings)]
    answers = Path(thousand.output) / "answers"
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(lambda: len(list(answers.glob("*.parquet"))) >= 1, driver)
        (engine,) = engines_of(driver.pid)
        engine.kill()
        wait_for(lambda: len(list(answers.glob("*.parquet"))) >= 3, driver)
        (engine,) = engines_of(driver.pid)
        driver.kill()
        driver.wait()
    assert "Starting it again" in (tmp_path / "log").read_text()
    engine.wait(PATIENCE)  # raises TimeoutExpired where it outlives its driver
    done = {path.name: path.stat().st_mtime_ns for path in answers.glob("*.parquet")}
    assert 3 <= len(done) < 5
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(answers.glob("*.parquet"))) == 5
    assert {name: (answers / name).stat().st_mtime_ns for name in done} == done, "answered twice"
    whole = replace(thousand, output=str(tmp_path / "whole"), teacher=replace(config.teacher, backend="torch"))
    build_cache(whole, style="quiet")
    assert_same_caches(Path(thousand.output), Path(whole.output), differing=5)


def engines_of(driver: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(driver).children(recursive=True) if "EngineCore" in "".join(p.cmdline())]


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    until(condition, alive=lambda: driver.poll() is None)


def test_no_memory_for_the_cache_says_what_to_set(config: CacheConfig, conversations: list[Conversation]) -> None:
    with (
        VllmTeacher(config, conversations, VllmOptions(cache_bytes=1 << 16)) as teacher,
        pytest.raises(TeacherError, match=r"no memory for the KV cache.*speed.gpu_memory_share.*vLLM says: ValueError"),
    ):
        teacher.answer([asked(teacher, Conversation("a", ("red",), ("",)))])


def copy_of_teacher(folder: Path) -> Path:
    return Path(shutil.copytree(TEACHER, folder / "teacher"))


def test_unknown_architecture_is_refused_and_auto_takes_torch(world: Path, tmp_path: Path) -> None:
    folder = copy_of_teacher(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["NobodyForConditionalGeneration"]}))
    config = make_config(world, tmp_path / "cache", teacher={"model": str(folder), "backend": "vllm"})
    with pytest.raises(TeacherError, match=r"does not know the architecture Nobody\w+.*teacher.backend=torch"):
        choose(config)
    automatic = make_config(world, tmp_path / "cache", teacher={"model": str(folder)})
    assert not choose(automatic).use_vllm
    assert "NobodyForConditionalGeneration" in choose(automatic).reason


def test_missing_processor_is_refused(world: Path, tmp_path: Path) -> None:
    folder = copy_of_teacher(tmp_path)
    (folder / "processor_config.json").unlink()
    with pytest.raises(TeacherError, match="processor"):
        VllmTeacher(make_config(world, tmp_path / "cache", teacher={"model": str(folder)}), [])


def test_weight_names_of_transformers_5_are_refused_and_can_be_renamed(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of_teacher(tmp_path)
    weights = load_file(folder / "model.safetensors")
    old = {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in weights.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config(world, tmp_path / "cache", teacher={"model": str(folder)})
    with pytest.raises(TeacherError, match=r"vLLM does not know \d+ of its weight names.*rename_vision_weights"):
        VllmTeacher(config, [])
    changed = rename_vision_weights(folder)
    assert changed == sum("vision_tower" in name for name in weights)
    assert rename_vision_weights(folder) == 0
    again = load_file(folder / "model.safetensors")
    assert sorted(tensor_files(folder)) == sorted(weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    VllmTeacher(config, [])


def test_what_outgrows_the_models_positions_counts_as_too_long(config: CacheConfig, vllm_teacher: VllmTeacher) -> None:
    """Not by an engine that dies: it never holds more than the model's positions and the room that vLLM needs."""
    long = VllmTeacher(replace(config, teacher=replace(config.teacher, max_length=4096)), [])
    positions = long._text.max_position_embeddings
    assert long._arguments()["max_model_len"] == positions
    assert long.positions == vllm_teacher.positions == positions - LENGTH_MARGIN - 1
    assert vllm_teacher._arguments()["max_model_len"] == config.teacher.max_length + 1 + LENGTH_MARGIN


def test_attention_maps_are_refused(world: Path, tmp_path: Path) -> None:
    config = make_config(world, tmp_path, teacher={"backend": "vllm"}, signals={"attention": True})
    with pytest.raises(TeacherError, match=r"signals.attention.*teacher.backend=torch"):
        choose(config)


def test_sampled_answers_depend_on_their_seed_alone_and_follow_the_distribution(
    config: CacheConfig, conversations: list[Conversation], one_pass: Answered, torch_teacher: TorchTeacher
) -> None:
    hot = replace(config, generation=replace(config.generation, temperature=1.5, max_new_tokens=6))
    some, draws, head = range(24), 600, torch_teacher.head()

    def request(place: int, seed: int) -> AnswerRequest:
        return AnswerRequest(one_pass.read[place].shown((), ask=True), seed)

    assert not choose(hot).one_pass, "the CPU build does not sample rightly beside extraction"
    with VllmTeacher(hot, conversations, VllmOptions(cache_bytes=256 << 20)) as teacher:
        together = [a.token_ids for a in teacher.answer([request(i, i) for i in some])]
        few = [a.token_ids for a in teacher.answer([request(i, i) for i in (7, 3, 21)])]
        other = [a.token_ids for a in teacher.answer([request(i, 1000 + i) for i in some])]
        place = max(some, key=lambda i: len(set(one_pass.samples[i].answers[0])))
        first = [a.token_ids[0] for a in teacher.answer([request(place, seed) for seed in range(draws)])]
        image = teacher.description.image_token
    assert few == [together[i] for i in (7, 3, 21)]
    assert together != other
    assert not any(image in ids for ids in together + other)
    sample = replace_all(one_pass, place + 1)
    logits = scored_states(torch_teacher, sample, Wanted())[place].rows[0] @ head.T
    expected = torch.softmax(logits.double() / 1.5, -1)
    seen = torch.bincount(torch.tensor(first), minlength=len(expected)).double() / draws
    noise = float((expected * (1 - expected) / draws).sqrt().sum()) / 2
    assert float((seen - expected).abs().sum()) / 2 <= 2 * noise + 0.005
