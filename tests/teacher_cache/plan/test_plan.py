"""A plan is within 10 % of what is then written, from data and configuration alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pipelines.tiny.prepare import TEACHER
from teacher_cache.build.build import build_cache
from teacher_cache.config import (
    PRESETS,
    CacheConfig,
    DataConfig,
    SignalsConfig,
    TeacherConfig,
    build_config,
    load_config,
)
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.models.model_config import load_model_config
from teacher_cache.models.model_sizes import GB, GROUPS_OF_128, NF4, parameter_bytes, size_of
from teacher_cache.plan import lengths as lengths_module
from teacher_cache.plan.cache_plan import as_preset, plan_cache
from teacher_cache.plan.cost import Throughput, assumed_throughput, measured_throughput, teacher_memory
from teacher_cache.store.manifest import read_manifest
from teacher_cache.store.reader import TeacherCache
from teacher_cache.store.storage import Storage
from tests.fixtures.store import signals

MODELS = Path(__file__).parents[3] / "pipelines/llavadi/models"


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def bare_teacher(tmp_path_factory):
    """The teacher's folder without its weights."""
    folder = tmp_path_factory.mktemp("bare") / "teacher"
    shutil.copytree(TEACHER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def _bare(config, bare_teacher, **fields):
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, model=str(bare_teacher)), **fields)


@pytest.mark.parametrize(
    "stored",
    [
        signals("small", calibration_samples=16),
        signals(top_k=16),
        signals("full", second_last=True, sampled=6, codec="int4"),
        signals("llava_kd"),
    ],
    ids=lambda s: s.preset,
)
def test_a_plan_is_within_ten_percent_of_what_is_written(cache_config, teacher, bare_teacher, tmp_path, stored):
    data = dataclasses.replace(cache_config.data, regenerate="none")
    config = dataclasses.replace(cache_config, output=str(tmp_path / "c"), data=data, signals=stored)
    plan = plan_cache(_bare(config, bare_teacher))
    summary = build_cache(config, teacher=teacher, style="quiet")
    assert (plan.samples, plan.skipped, plan.rows) == (summary.samples, summary.skipped, summary.rows)
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    for name in ("tokens", "positions"):
        assert getattr(plan, name) == manifest["counts"][name]
    for spec in [*read_manifest(Storage(tmp_path / "c")).arrays, *read_manifest(Storage(tmp_path / "c")).image_arrays]:
        files = (tmp_path / "c").glob(f"*/0*/{spec.name}/c/**/*")
        written = sum(p.stat().st_size for p in files if p.is_file())
        assert plan.part_bytes[spec.name] == pytest.approx(written, rel=0.1), spec.name
    assert plan.total_bytes == pytest.approx(_bytes(tmp_path / "c"), rel=0.1)
    assert plan.preset_bytes[stored.preset] == pytest.approx(plan.total_bytes, rel=0.25)


def test_answers_that_lie_there_already_are_counted(cache_config, cache_folder, bare_teacher):
    config = dataclasses.replace(cache_config, output=str(cache_folder))
    plan = plan_cache(_bare(config, bare_teacher), answer_factor=3.0)
    manifest = json.loads((cache_folder / "manifest.json").read_text())
    assert plan.rows == manifest["counts"]["rows"]
    assert plan.total_bytes == pytest.approx(_bytes(cache_folder), rel=0.1)


def test_longer_answers_make_more_rows_up_to_the_limit(cache_config, bare_teacher, tmp_path):
    config = _bare(dataclasses.replace(cache_config, output=str(tmp_path / "none")), bare_teacher)
    rows = [plan_cache(config, answer_factor=f).rows for f in (1.0, 2.0, 100.0)]
    assert rows[1] == pytest.approx(2 * rows[0], rel=0.1)
    assert rows[0] < rows[1] < rows[2] < 100 * rows[0]
    assert any("as long as the original ones" in note for note in plan_cache(config).notes)


def test_images_that_are_missing_and_samples_too_long_are_counted_as_skipped(
    cache_config, bare_teacher, world, tmp_path
):
    shutil.copytree(world / "images", tmp_path / "images")
    used = next(line["image"] for line in json.loads((world / "train.json").read_text()) if "image" in line)
    (tmp_path / "images" / used).unlink()
    data = dataclasses.replace(cache_config.data, image_folder=str(tmp_path / "images"), regenerate="none")
    whole = plan_cache(_bare(cache_config, bare_teacher))
    plan = plan_cache(_bare(cache_config, bare_teacher, data=data))
    assert plan.skipped > whole.skipped
    assert plan.samples + plan.skipped == whole.samples + whole.skipped
    short = dataclasses.replace(cache_config.teacher, model=str(bare_teacher), max_length=25)
    assert plan_cache(dataclasses.replace(cache_config, teacher=short)).skipped > 0


def test_sampled_token_counts_are_near_the_counted_ones(cache_config, bare_teacher, monkeypatch):
    config = _bare(cache_config, bare_teacher)
    counted = plan_cache(config)
    monkeypatch.setattr(lengths_module, "COUNTED", 20)
    sampled = plan_cache(config)
    assert sampled.rows == pytest.approx(counted.rows, rel=0.15)
    assert any("20 samples counted" in note for note in sampled.notes)


@pytest.mark.parametrize(("name", "weights"), [("13b", 13.0e9), ("7b", 6.7e9)])
def test_llava_is_planned_without_weights_or_tokenizer(tmp_path, name, weights):
    lines = [
        {
            "id": str(i),
            "image": f"{i % 30}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is in the picture?"},
                {"from": "gpt", "value": "A man rides a brown horse along a beach at sunset. " * 8},
            ],
        }
        for i in range(50)
    ]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    config = CacheConfig(
        output=str(tmp_path / "cache"),
        data=DataConfig(path=str(tmp_path / "data.json")),
        teacher=TeacherConfig(model=str(MODELS / f"llava-1.5-{name}")),
    )
    plan = plan_cache(config)
    assert (plan.samples, plan.images) == (50, 30)
    assert 80 < plan.rows / plan.samples < 130
    assert any("no tokenizer found" in note for note in plan.notes)
    order = [plan.preset_bytes[n] for n in ("small", "compact", "standard", "llava_kd", "full")]
    assert plan.preset_bytes["standard"] == plan.total_bytes
    assert min(order) in order[:2]
    assert order[2] < order[3] < order[4]
    assert set(plan.preset_bytes) == set(PRESETS)
    rows = dict(plan.as_rows())
    assert rows["fits"] == "yes"
    assert rows["samples"] == "50 cached, 0 skipped"
    from transformers import AutoConfig

    size = size_of(AutoConfig.from_pretrained(config.teacher.model))
    assert size.language == pytest.approx(weights, rel=0.03)
    assert 0.29e9 < size.vision < 0.36e9, "CLIP-L and a two-layer projector"


def test_hours_follow_from_the_throughput(cache_config, bare_teacher):
    config = _bare(cache_config, bare_teacher)
    slow = plan_cache(config, throughput=Throughput(100, 10))
    fast = plan_cache(config, throughput=Throughput(200, 20))
    assert slow.gpu_hours == pytest.approx(2 * fast.gpu_hours)
    rate = assumed_throughput(13_000_000_000)
    assert 4_000 < rate.read_tokens_per_second < 7_000
    assert 1_500 < rate.write_tokens_per_second < 4_000


def test_the_time_of_an_earlier_cache_can_be_counted_with(cache_config, cache_folder, bare_teacher, tmp_path):
    """The plan of the very same data then comes to the very seconds that it took."""
    rate = measured_throughput(Storage(cache_folder))
    cost = json.loads((cache_folder / "cost.json").read_text())
    again = dataclasses.replace(cache_config, output=str(tmp_path / "none"))
    rows = json.loads((cache_folder / "manifest.json").read_text())["counts"]["rows"]
    factor = rows / plan_cache(_bare(again, bare_teacher)).rows
    plan = plan_cache(_bare(again, bare_teacher), throughput=rate, answer_factor=factor)
    assert plan.gpu_hours * 3600 == pytest.approx(cost["answer_seconds"] + cost["score_seconds"], rel=0.1)
    with pytest.raises(CacheError, match="manifest"):
        measured_throughput(Storage(tmp_path / "none"))


def test_the_time_of_one_pass_does_not_tell_reading_from_writing(cache_folder, tmp_path):
    shutil.copytree(cache_folder, tmp_path / "c")
    cost = json.loads((tmp_path / "c/cost.json").read_text())
    assert cost["one_pass"] is False
    (tmp_path / "c/cost.json").write_text(json.dumps(cost | {"one_pass": True}))
    with pytest.raises(ConfigError, match="out of one pass; expected both, of two passes"):
        measured_throughput(Storage(tmp_path / "c"))


def test_answers_that_were_kept_took_no_writing(cache_config, teacher, tmp_path):
    data = dataclasses.replace(cache_config.data, regenerate_share=0.2)
    build_cache(
        dataclasses.replace(cache_config, output=str(tmp_path / "c"), data=data), teacher=teacher, style="quiet"
    )
    with TeacherCache.open(tmp_path / "c") as cache:
        rows = sum(cache[i].rows for i in range(len(cache)) if cache[i].source == "teacher")
        assert 0 < rows < cache.manifest.counts["rows"] / 2
    cost = json.loads((tmp_path / "c/cost.json").read_text())
    rate = measured_throughput(Storage(tmp_path / "c"))
    assert rate.write_tokens_per_second == pytest.approx(rows / cost["answer_seconds"])


def test_another_preset_undoes_what_ones_own_preset_set():
    small, standard = (
        build_config(SignalsConfig, {"preset": n, **PRESETS[n], "codec": "int4"}, n) for n in ("small", "standard")
    )
    assert as_preset(small, "standard") == dataclasses.replace(standard, preset="small")
    assert as_preset(dataclasses.replace(standard, top_k=7), "full").top_k == 7


@pytest.mark.parametrize(("name", "least", "most"), [("cache", 25, 45), ("cache_2x24gb", 4, 12)])
def test_memory_of_the_13b_configurations(name, least, most):
    """26.7 GB of 16-bit weights leave room for that many conversations of 2,048 tokens on the GPUs they are for."""
    config = load_config(CacheConfig, MODELS.parent / f"{name}.yaml")
    model = load_model_config(config.teacher.model)
    memory = teacher_memory(config, model, 2048)
    assert memory.weights * memory.gpus == pytest.approx(26.7e9, rel=0.01)
    assert memory.sequence * memory.gpus == pytest.approx(2 * 2 * 40 * 5120 * 2048, rel=0.03)
    assert least < memory.sequences((24 if memory.gpus == 2 else 80) * GB) < most
    assert memory.sequences(8 * GB) == 0
    packed = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, quantization="awq"))
    assert teacher_memory(packed, model, 2048).weights < 0.35 * memory.weights
    assert any("does not fit" in value for _, value in dataclasses.replace(memory, weights=200 * GB).as_rows())


def test_four_bits_weigh_what_their_format_says():
    """AWQ: 128 weights in 64 bytes, a float16 scale, 4 bits of zero; nf4: 64 weights in 32 bytes, a float32 scale."""
    assert 128 * GROUPS_OF_128 == 64 + 2 + 0.5
    assert 64 * NF4 == 32 + 4
    assert parameter_bytes("awq") == parameter_bytes("gptq_marlin") == GROUPS_OF_128
    assert [parameter_bytes(name) for name in ("float32", "bfloat16", "fp8", "bitsandbytes")] == [4, 2, 1, NF4]


def test_what_does_not_fit_is_said(cache_config, bare_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 1000)
    plan = plan_cache(_bare(cache_config, bare_teacher, output=str(tmp_path / "c")))
    assert plan.fits is False
    assert dict(plan.as_rows())["fits"].startswith("NO: free space")


def test_a_teacher_without_a_configuration_is_refused(cache_config, tmp_path):
    config = dataclasses.replace(cache_config, teacher=dataclasses.replace(cache_config.teacher, model=str(tmp_path)))
    with pytest.raises(ConfigError, match="config"):
        plan_cache(config)
