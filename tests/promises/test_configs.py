"""Every shipped YAML file loads, and plans without weights or network: shapes, steps, memory, bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from typer.testing import CliRunner

from pipelines.llavadi.instruct_ids import instruct_ids
from student_train.cli import app
from student_train.config import (
    ExpectedSize,
    FitConfig,
    LossSpec,
    SourceConfig,
    StudentConfig,
    TrainConfig,
    check_fit_config,
)
from student_train.students.on_meta import student_on_meta
from student_train.studies.plan_file import plan_ablation, plan_file, plan_stages
from student_train.studies.plan_sources import source_manifest
from student_train.studies.rounds import RoundsConfig
from student_train.studies.run_plan import IN_FLOAT32, plan_fit
from student_train.studies.runs import AblationConfig, plan_runs
from student_train.training.stages import StagesConfig, merge, stage_configs
from teacher_cache.build.build import check_config
from teacher_cache.cli import app as cache_app
from teacher_cache.config import CacheConfig, DataConfig, build_config, load_config
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.models.model_config import load_model_config, shipped_models
from teacher_cache.models.model_sizes import GB
from teacher_cache.plan.cache_plan import plan_cache
from tests.fixtures.store import synthetic_cache

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "pipelines").glob("**/*.yaml"))
RECIPES = [p for p in FILES if p.parent.name.startswith("llava") and not p.name.startswith("cache")]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files name each other from the repository's root, and no test may reach the hub."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


SCHEMAS = ROOT / "pipelines/schemas"


def validator(path: Path) -> Draft202012Validator:
    """What an editor checks a file with that names the schema at ``path``."""
    read = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in SCHEMAS.iterdir()}
    files = Registry().with_resources((name, DRAFT202012.create_resource(schema)) for name, schema in read.items())
    return Draft202012Validator(read[path.name], registry=files)


@pytest.mark.parametrize("name", ["cache", "fit", "stages", "rounds", "ablation"])
def test_the_schemas_in_the_tree_are_those_of_the_code(name: str) -> None:
    cli, file = (cache_app, ()) if name == "cache" else (app, ("--file", name))
    printed = CliRunner().invoke(cli, ["schema", *file])
    assert json.loads(printed.output) == json.loads((SCHEMAS / f"{name}.json").read_text()), "make schemas"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cache", {"signals": {"topk": 3}}),
        ("cache", {"signals": {"top_k": -1}}),
        ("fit", {"train": {"learning_rate": "fast"}}),
        ("stages", {"stages": {"one": {"losses": [{"name": "no such loss"}]}}}),
        ("ablation", {"arms": {"a": {"set": {"train": {"micro_batsh": 1}}}}}),
    ],
)
def test_an_editor_sees_what_the_loader_would_refuse(name: str, wrong: dict[str, Any]) -> None:
    assert not validator(SCHEMAS / f"{name}.json").is_valid(wrong)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT / "pipelines")) for p in FILES])
def test_shipped_file_loads_and_names_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    editor, first = text.splitlines()[:2]
    schema = path.parent / editor.removeprefix("# yaml-language-server: $schema=")
    assert sorted(validator(schema.resolve()).iter_errors(yaml.safe_load(text)), key=str) == []
    assert first.startswith("# "), "a YAML file is headed by the command that runs it"
    assert "make " in first or str(path.relative_to(ROOT)) in first
    sections = set(yaml.safe_load(text))
    if "teacher" in sections and "data" in sections:
        check_config(load_config(CacheConfig, path))
    elif "arms" in sections:
        assert plan_runs(load_config(AblationConfig, path))
    elif "rounds" in sections:
        check_fit_config(build_config(FitConfig, merge(load_config(RoundsConfig, path).fit, {"output": "x"}), "fit"))
    elif "stages" in sections:
        assert all(check_fit_config(c) is None for _, c in stage_configs(load_config(StagesConfig, path)))
    else:
        check_fit_config(load_config(FitConfig, path))


FAMILY_PLANS = {
    "qwen2_5_vl": (8.29e9, 3.75e9, 391),
    "qwen3_vl": (8.77e9, 2.13e9, 300),
    "internvl3": (7.94e9, 2.09e9, 3328),
    "gemma3": (12.19e9, 4.30e9, 256),
    "llava_onevision": (8.03e9, 0.89e9, 3700),
    "tinyllava": (8.29e9, 0.92e9, 729),
    "llama3": (8.03e9, 1.24e9, 0),
}
"""Folder → parameters of teacher and student as published, and positions of an image in the student."""


@pytest.mark.parametrize("name", FAMILY_PLANS)
def test_a_family_to_copy_plans_its_cache_and_its_student(name: str, tmp_path: Path) -> None:
    """Without weights, processors and network: shapes, bytes, memory of one GPU, hours."""
    teacher, student, positions = FAMILY_PLANS[name]
    fit = load_config(FitConfig, f"pipelines/{name}/distill.yaml")
    (source,) = fit.sources
    lines = [{"id": str(n), "conversations": [{"from": "human", "value": "What is it? " * 9}]} for n in range(64)]
    lines = [{**line, "conversations": [*line["conversations"], {"from": "gpt", "value": "It is. "}]} for line in lines]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    cache = load_config(CacheConfig, source.made_with)
    assert cache.output == source.cache
    data = DataConfig(path=str(tmp_path / "data.json"))
    planned = plan_cache(dataclasses.replace(cache, data=data, output=str(tmp_path / "cache")))
    assert planned.samples == 64
    assert planned.memory.weights == pytest.approx(2 * teacher, rel=0.02)
    assert planned.memory.sequences(80 * GB) > 0
    assert planned.gpu_hours > 0
    run = plan_fit(fit)
    assert run.parameters == pytest.approx(student, rel=0.02)
    assert run.image_tokens == positions
    assert run.steps == -(-source.expected.samples // 128)
    assert 0 < run.sharded_bytes < 80 * GB
    assert run.cache_bytes > source.expected.samples * source.expected.rows_per_sample * planned_width(cache)
    assert 0 < run.gpu_hours < run.online_hours or name in ("gemma3", "qwen2_5_vl")
    assert "memory of one GPU" in dict(run.lines())


def planned_width(cache: CacheConfig) -> int:
    """Bytes of a row: int8 states."""
    return load_model_config(cache.teacher.model).get_text_config().hidden_size


def test_positions_of_an_image_that_no_configuration_says_are_asked_for() -> None:
    fit = load_config(FitConfig, "pipelines/qwen2_5_vl/distill.yaml", ["sources=[]"])
    expected = ExpectedSize(samples=10, rows_per_sample=3, tokens_per_sample=9, images=10)
    source = SourceConfig(cache="none", made_with="pipelines/qwen2_5_vl/cache.yaml", expected=expected)
    with pytest.raises(ConfigError, match=r"in a qwen2_5_vl model is known to its processor.*positions_per_image"):
        plan_fit(dataclasses.replace(fit, sources=(source,)))


def test_llavadis_students_plan_to_the_papers_steps_and_fit_their_gpus() -> None:
    for size, parameters, layers, width in (("2.7b", 3.01e9, 32, 2560), ("1.4b", 1.67e9, 24, 2048)):
        plans = plan_stages(load_config(StagesConfig, f"pipelines/llavadi/student_{size}.yaml"))
        pretrain, finetune = plans["pretrain"], plans["finetune"]
        assert (pretrain.steps, finetune.steps) == (2181, 5198)  # LLaVA-1.5's own numbers
        assert (finetune.width, finetune.layers, finetune.vocabulary) == (width, layers, 32064)
        assert pretrain.parameters == pytest.approx(parameters, rel=0.005)
        assert pretrain.trained == (1024 + 1) * width + (width + 1) * width  # the projector alone
        hidden_projector = width * 5120 + 5120 + 5120 * 5120 + 5120
        assert finetune.parameters - pretrain.parameters == hidden_projector
        assert pretrain.memory_bytes < 24 * GB
        assert finetune.memory_bytes < 80 * GB
        assert finetune.sharded_bytes < 24 * GB


def test_bytes_of_a_cache_that_is_not_there_follow_from_the_file_that_will_make_it() -> None:
    finetune = plan_stages(load_config(StagesConfig, "pipelines/llavadi/student_2.7b.yaml"))["finetune"]
    tokens, positions, images = 330 * 665298, (330 - 1 - 0.94) * 665298, 0.94 * 665298
    state = 5120 + 2  # int8 and its scale
    expected = tokens * (2 + 1) + positions * state + images * 576 * state
    assert finetune.cache_bytes == pytest.approx(expected, rel=1e-3)
    assert finetune.online_hours > finetune.gpu_hours  # the teacher costs more than the student that learns from it


def test_llavadis_ablation_resolves_to_a_complete_plan() -> None:
    config = load_config(AblationConfig, "pipelines/llavadi/ablate_llavadi.yaml")
    plans = plan_ablation(config)
    tables = {arm.table for arm in config.arms.values()}
    assert {f"table {n}" for n in (1, 2, 3, 4, 5)} <= tables
    assert plans["distilbert"].layers == 20
    assert plans["distilbert"].trained == pytest.approx(6.7e9, rel=0.02)
    assert plans["baseline-2m"].steps == 18977
    assert {p.steps for n, p in plans.items() if "2m" not in n} == {5198}
    # Answer rows out of states stored for all text positions are read with their neighbours; a top-64 is not.
    assert plans["forward-kl"].cache_bytes > 30 * plans["forward-kl-top-64"].cache_bytes
    rows = dict(plan_file(Path("pipelines/llavadi/ablate_llavadi.yaml"), ["seeds=[0]"]))
    assert rows["runs"] == f"{len(plans)}: {len(plans)} arms × 1 seeds"


@pytest.mark.parametrize(
    ("name", "image_tokens", "layers", "parameters"),
    [("qwen1.5_0.5b", 729, 24, 0.894e9), ("qwen1.5_1.8b", 729, 24, 2.27e9), ("mobilellama_1.4b", 576, 24, 1.67e9)],
)
def test_llava_kd_plans_three_stages(name: str, image_tokens: int, layers: int, parameters: float) -> None:
    plans = plan_stages(load_config(StagesConfig, f"pipelines/llava_kd/{name}.yaml"))
    assert [(stage, p.steps) for stage, p in plans.items()] == [("dpt", 2181), ("sft", 5198), ("dft", 5198)]
    for plan in plans.values():
        assert (plan.image_tokens, plan.layers) == (image_tokens, layers)
        assert plan.parameters == pytest.approx(parameters, rel=0.01)
    assert plans["dpt"].trained < 0.01 * plans["dpt"].parameters
    assert plans["dft"].cache_bytes > 1000 * plans["sft"].cache_bytes
    assert plans["sft"].online_hours == 0


DROPPED = [
    ({"name": "cross_entropy", "tokens": "text"}, "tokens"),
    ({"name": "cross_entropy", "average": "sample"}, "average"),
    ({"name": "forward_kl", "source": "exact", "tokens": "text", "rows": "llavadi"}, "rows"),
    ({"name": "forward_kl", "beta": 0.3}, "beta"),
    ({"name": "hidden_mse", "tokens": "all", "rows": "llavadi"}, "rows"),
    ({"name": "hidden_cosine", "temperature": 0.7}, "temperature"),
    ({"name": "hidden_mse", "source": "exact"}, "source"),
    ({"name": "similarity_mse", "tokens": "all"}, "tokens"),
    ({"name": "attention_mse", "pool": 2}, "pool"),
    ({"name": "relation", "temperature": 2.0}, "temperature"),
    ({"name": "visual_kl", "space": "hidden"}, "space"),
]


@pytest.mark.parametrize(("loss", "found"), DROPPED, ids=[f"{d['name']} {f}" for d, f in DROPPED])
def test_setting_that_a_loss_does_not_read_is_refused(loss: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"losses\[0\].*{found}"):
        build_config(FitConfig, {"losses": [loss]}, "a file")


def test_student_with_two_origins_is_refused() -> None:
    student = StudentConfig(model="runs/model", layers_from="teacher")
    with pytest.raises(ConfigError, match="model=runs/model and layers_from=teacher are both set"):
        check_fit_config(FitConfig("out", (SourceConfig(cache="none"),), student))
    with pytest.raises(ConfigError, match="layers_from, which is not set"):
        check_fit_config(FitConfig("out", (SourceConfig(cache="none"),), StudentConfig(model="runs/model", layers=2)))


def test_tied_embeddings_are_counted_once() -> None:
    model = student_on_meta(
        StudentConfig(language_model="Qwen/Qwen1.5-0.5B", vision_tower="google/siglip-so400m-patch14-384")
    )
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_teacher_and_its_students_have_the_same_image_tokens_and_vocabulary() -> None:
    teacher = load_model_config("runs/llava_kd/llava-qwen1.5-4b-siglip")
    own = student_on_meta(
        StudentConfig(language_model="Qwen/Qwen1.5-4B", vision_tower="google/siglip-so400m-patch14-384")
    )
    assert own.config.get_text_config().vocab_size == teacher.get_text_config().vocab_size
    assert own.config.vision_feature_select_strategy == teacher.vision_feature_select_strategy


def test_plan_refuses_losses_that_the_cache_will_not_hold() -> None:
    with pytest.raises(CacheError, match=r"relation needs signals\.visual=states or gram, the cache has none"):
        plan_file(Path("pipelines/llava_kd/qwen1.5_0.5b.yaml"), _losses("relation", "pipelines/llavadi/cache_2m.yaml"))


def test_plan_refuses_another_number_of_image_tokens() -> None:
    with pytest.raises(ValueError, match="the teacher has 576 image positions, the student 729"):
        plan_file(Path("pipelines/llava_kd/qwen1.5_0.5b.yaml"), _losses("relation", "pipelines/llavadi/cache.yaml"))


def _losses(name: str, made_with: str) -> list[str]:
    source = {"cache": "none", "made_with": made_with, "expected": {"samples": 10, "tokens_per_sample": 9}}
    return [f"stages.dpt.sources=[{json.dumps(source)}]", f"stages.dpt.losses=[{{name: {name}}}]"]


def test_source_without_size_or_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not there yet .*and sources"):
        source_manifest(SourceConfig(cache="nowhere"))
    with pytest.raises(ConfigError, match=f"no model configuration can be read.*{shipped_models()}"):
        load_model_config(str(tmp_path))


def test_a_cache_that_may_not_be_used_is_not_planned_as_one_to_be_made(tmp_path: Path) -> None:
    """Only a cache that is not there is replaced by what is expected of it."""
    expected = ExpectedSize(samples=7, tokens_per_sample=9)
    source = SourceConfig(cache=str(tmp_path / "c"), made_with="pipelines/llavadi/cache.yaml", expected=expected)
    assert source_manifest(source).counts["samples"] == 7
    synthetic_cache(tmp_path / "c", 5, skipped=())
    assert source_manifest(source).counts["samples"] == 5
    path = tmp_path / "c" / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"planned_samples": 5', '"planned_samples": 6'))
    with pytest.raises(CacheError, match="changed after it was written"):
        source_manifest(source)
    path.write_text(json.dumps(json.loads(whole) | {"format_version": 99}))
    with pytest.raises(CacheError, match="cache format 99"):
        source_manifest(source)


def test_lora_and_four_bit_need_less_memory() -> None:
    expected = ExpectedSize(samples=100, rows_per_sample=10, tokens_per_sample=50)
    source = SourceConfig(cache="none", made_with="pipelines/llavadi/cache.yaml", expected=expected)
    parts = {
        "language_model": "mtgv/MobileLLaMA-2.7B-Base",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "dtype": "bfloat16",
    }
    losses = (LossSpec("cross_entropy"), LossSpec("forward_kl"))
    full, lora, four_bit = (
        plan_fit(FitConfig("out", (source,), StudentConfig(**parts, **how), losses))
        for how in ({}, {"train": "lora"}, {"train": "lora", "load_in_4bit": True, "model": "runs/not-there-yet"})
    )
    assert lora.trained < 0.02 * full.trained
    assert four_bit.weight_bytes < 0.5 * lora.weight_bytes < full.weight_bytes
    assert four_bit.memory_bytes < lora.memory_bytes < full.memory_bytes


def test_hours_in_float32_are_not_those_of_bf16() -> None:
    expected = ExpectedSize(samples=100, rows_per_sample=10, tokens_per_sample=50)
    source = SourceConfig(cache="none", made_with="pipelines/llavadi/cache.yaml", expected=expected)
    student = StudentConfig(
        language_model="mtgv/MobileLLaMA-1.4B-Base", vision_tower="openai/clip-vit-large-patch14-336"
    )
    plain, mixed = (
        plan_fit(FitConfig("out", (source,), student, train=TrainConfig(mixed_precision=precision)))
        for precision in ("no", "bf16")
    )
    assert plain.gpu_hours == pytest.approx(16 * mixed.gpu_hours, rel=0.01)
    assert plain.activation_bytes == pytest.approx(2 * mixed.activation_bytes, abs=1)
    assert "float32" in dict(plain.lines())["GPU hours, estimated"]
    assert "float32" not in dict(mixed.lines())["GPU hours, estimated"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_full_size_recipes_train_in_bf16(path: Path) -> None:
    assert not [value for _, value in plan_file(path, []) if IN_FLOAT32 in str(value)]


def test_plan_command_prints_steps_and_the_assumption() -> None:
    result = CliRunner().invoke(app, ["plan", "pipelines/llavadi/student_1.4b.yaml"])
    assert result.exit_code == 0, result.output
    assert "5198" in result.output
    assert "assumption" in result.output


def test_instruct_ids_match_by_image_and_questions(tmp_path: Path) -> None:
    def sample(name: str, image: str, question: str) -> dict[str, object]:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "a"}]
        return {"id": name, "image": image, "conversations": turns}

    mix = [
        sample("17", "coco/train2017/17.jpg", "how many? answer with one word"),
        sample("17", "coco/train2017/17.jpg", "what is happening?"),
        sample("18", "coco/train2017/18.jpg", "what is happening?"),
    ]
    instruct = [sample("17", "17.jpg", "what is happening?")]
    for name, lines in (("mix", mix), ("instruct", instruct)):
        (tmp_path / f"{name}.json").write_text(json.dumps(lines))
    assert instruct_ids(tmp_path / "mix.json", tmp_path / "instruct.json") == ["17#2"]
