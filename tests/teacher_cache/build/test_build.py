"""Promises 4 to 6: nothing half-written is read, a wrong cache is refused, everything is accounted for."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from typer.testing import CliRunner

from pipelines.tiny.prepare import TEACHER
from teacher_cache.build.build import answer_only, build_cache, check_answered, check_config
from teacher_cache.cli import app
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.errors import CacheError, ConfigError, StorageError, TeacherError
from teacher_cache.models.checkpoint import checkpoint_digest
from teacher_cache.models.open_chat import load_processor
from teacher_cache.store.reader import TeacherCache
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.threads import THREADS

ROOT = Path(__file__).parents[3]
EXCEPTED = {"cost.json"}  # how long it took; and created_at in the manifest, see contents()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache by name; the manifest without the time of its making."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = json.loads(found["manifest.json"])
    for name in ("created_at", "digest"):
        manifest.pop(name)
    found["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    return {name: data for name, data in found.items() if name not in EXCEPTED}


def write_job(config: CacheConfig, path: Path) -> Path:
    """A program that builds the cache in a process of its own; with a number n, killed at its n-th file operation."""
    settings = json.dumps(json.dumps(asdict(config)))
    path.write_text(
        "import sys, json, torch\n"
        f"torch.set_num_threads({THREADS})\n"
        "if sys.argv[1:]:\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    from benchmarks.chaos_builds import die_at\n"
        "    die_at(int(sys.argv[1]))\n"
        "from teacher_cache.config import CacheConfig, build_config\n"
        "from teacher_cache.build.build import build_cache\n"
        f"build_cache(build_config(CacheConfig, json.loads({settings}), 'test'), style='quiet')\n"
    )
    return path


def test_a_run_killed_at_random_moments_gives_the_uninterrupted_cache(
    cache_config: CacheConfig, cache_folder: Path, tmp_path: Path
) -> None:
    """kill -9, three times, each somewhere else; the short form of ``make chaos``."""
    config = replace(cache_config, output=str(tmp_path / "cache"))
    job = write_job(config, tmp_path / "job.py")
    moments = random.Random(3)
    for _ in range(3):
        before = set((tmp_path / "cache" / "shards").glob("0*")) if (tmp_path / "cache").exists() else set()
        moment = str(moments.randrange(20, 60))
        killed = subprocess.run([sys.executable, str(job), moment]).returncode
        assert killed == -signal.SIGKILL
        assert before <= set((tmp_path / "cache" / "shards").glob("0*"))  # what was committed stays
        with pytest.raises(CacheError, match="not complete"):
            TeacherCache.open(tmp_path / "cache")
    subprocess.run([sys.executable, str(job)], check=True)
    assert contents(tmp_path / "cache") == contents(cache_folder)


def test_building_a_complete_cache_again_changes_nothing(
    cache_config: CacheConfig, cache_folder: Path, teacher: TorchTeacher, tmp_path: Path
) -> None:
    shutil.copytree(cache_folder, tmp_path / "cache")
    summary = build_cache(replace(cache_config, output=str(tmp_path / "cache")), teacher=teacher, style="quiet")
    assert summary.shards_made == 0
    assert contents(tmp_path / "cache") == contents(cache_folder)


def test_answer_then_score_gives_what_build_gives(
    cache_config: CacheConfig, cache_folder: Path, teacher: TorchTeacher, tmp_path: Path
) -> None:
    config = replace(cache_config, output=str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="no teacher cache here"):
        check_answered(config)
    assert answer_only(config, style="quiet") > 0
    check_answered(config)
    with pytest.raises(CacheError, match="not complete"):
        TeacherCache.open(tmp_path / "cache")
    build_cache(config, teacher=teacher, style="quiet")
    assert contents(tmp_path / "cache") == contents(cache_folder)
    (tmp_path / "cache" / "answers" / "part-00000.parquet").unlink()
    shutil.rmtree(tmp_path / "cache" / "shards" / "00000")
    with pytest.raises(CacheError, match=r"1 shards have no answers \(first: answers/part-00000"):
        check_answered(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"signals": {"top_k": 4}}, "signals.top_k: 8 in the cache, 4 now"),
        ({"generation": {"max_new_tokens": 9}}, "generation.max_new_tokens: 32 in the cache, 9 now"),
        ({"data": {"history": "original"}}, "data.history: 'teacher' in the cache, 'original' now"),
    ],
)
def test_other_settings_are_refused_and_named(
    change: dict, named: str, cache_config: CacheConfig, cache_folder: Path, teacher: TorchTeacher
) -> None:
    config = replace(cache_config, output=str(cache_folder))
    for section, values in change.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(CacheError) as caught:
        build_cache(config, teacher=teacher, style="quiet")
    assert named in str(caught.value)


def test_settings_that_only_change_speed_do_not_matter(
    cache_config: CacheConfig, cache_folder: Path, teacher: TorchTeacher
) -> None:
    speed = replace(cache_config.speed, score_batch_tokens=333, answer_batch=3)
    build_cache(replace(cache_config, output=str(cache_folder), speed=speed), teacher=teacher, style="quiet")


def test_cached_plus_skipped_is_input(
    cache_config: CacheConfig, teacher: TorchTeacher, world: Path, tmp_path: Path
) -> None:
    """One of everything that can be wrong, among samples that are right; nothing lost, every reason given."""
    images = tmp_path / "images"
    shutil.copytree(world / "images", images)
    lines = json.loads((world / "train.json").read_text())[:6]
    good = lines[0]
    name = good["image"]
    (images / "cut.png").write_bytes((images / name).read_bytes()[:80])
    PillowImage.new("1", (9000, 9000)).save(images / "huge.png")
    human, gpt = good["conversations"][:2]
    bad = {
        "missing": {**good, "image": "nowhere.png"},
        "cut": {**good, "image": "cut.png"},
        "huge": {**good, "image": "huge.png"},
        "escape": {**good, "image": "../world.png"},
        "roles": {**good, "conversations": [human, human]},
        "twice": {**good, "conversations": [{**human, "value": "<image> <image> what"}, gpt]},
        "noimage": {"conversations": [human, gpt]},
        "long": {**good, "conversations": [{**human, "value": "<image>\n" + "what " * 400}, gpt]},
    }
    lines += [{**line, "id": key} for key, line in bad.items()]
    (tmp_path / "d.json").write_text(json.dumps(lines))
    data = DataConfig(path=str(tmp_path / "d.json"), image_folder=str(images))
    summary = build_cache(
        replace(cache_config, output=str(tmp_path / "cache"), data=data), teacher=teacher, style="quiet"
    )
    assert (summary.samples, summary.skipped) == (6, 8)
    listed = [json.loads(line) for line in (tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()]
    reasons = {s["sample_id"]: s["reason"] for s in listed}
    assert reasons.keys() == bad.keys()
    assert "no such file" in reasons["missing"]
    assert "cannot be decoded" in reasons["cut"]
    assert "pixels" in reasons["huge"]
    assert "leaves the image folder" in reasons["escape"]
    assert "alternate" in reasons["roles"]
    assert "2 times" in reasons["twice"]
    assert "no image" in reasons["noimage"]
    assert "teacher.max_length is 256" in reasons["long"]
    with TeacherCache.open(tmp_path / "cache") as cache:
        assert list(cache.sample_ids()) == [line["id"] for line in lines[:6]]


@pytest.mark.parametrize("kind", ["one sample", "text only", "empty answer", "longer than the limit after answering"])
def test_odd_caches(kind: str, cache_config: CacheConfig, teacher: TorchTeacher, world: Path, tmp_path: Path) -> None:
    human = {"from": "human", "value": "what is the opposite of left"}
    image = json.loads((world / "train.json").read_text())[0]["image"]
    lines = {
        "one sample": [
            {
                "id": "a",
                "image": image,
                "conversations": [
                    {"from": "human", "value": "<image>\nhow many objects are there"},
                    {"from": "gpt", "value": "1"},
                ],
            }
        ],
        "text only": [{"id": "a", "conversations": [human, {"from": "gpt", "value": "right"}]}],
        "empty answer": [{"id": "a", "conversations": [human, {"from": "gpt", "value": ""}]}],
        "longer than the limit after answering": [
            {"id": "a", "conversations": [human, {"from": "gpt", "value": "right " * 300}]},
            {"id": "b", "conversations": [human, {"from": "gpt", "value": "right"}]},
        ],
    }[kind]
    (tmp_path / "d.json").write_text(json.dumps(lines))
    regenerate = "none" if "answer" in kind else "all"
    data = DataConfig(path=str(tmp_path / "d.json"), image_folder=str(world / "images"), regenerate=regenerate)
    summary = build_cache(replace(cache_config, output=str(tmp_path / "c"), data=data), teacher=teacher, style="quiet")
    assert (summary.samples, summary.skipped) == (1, len(lines) - 1)
    with TeacherCache.open(tmp_path / "c") as cache:
        record = cache[0]
        assert len(record.arrays["topk_ids"]) == record.rows > 0
        if kind == "empty answer":
            assert record.rows == 1
            assert record.answers == ("",)
        if summary.skipped:
            assert "teacher.max_length is 256" in (tmp_path / "c" / "skipped.jsonl").read_text()


def test_not_order_locked(cache_folder: Path) -> None:
    """Promise 7: any sample by number, any order, any batch; all give the same bytes."""
    with TeacherCache.open(cache_folder) as cache:
        order = np.random.default_rng(0).permutation(len(cache))
        whole = cache.read(order)
        ends = np.cumsum(whole.counts["row"])
        for place, index in enumerate(order):
            rows = slice(ends[place] - whole.counts["row"][place], ends[place])
            assert (cache[int(index)].arrays["topk_ids"] == whole.arrays["topk_ids"][rows]).all()
        assert whole.sample_ids == [cache[int(i)].sample_id for i in order]


def test_other_images_are_a_matter_of_the_folder_only(
    cache_config: CacheConfig, cache_folder: Path, teacher: TorchTeacher
) -> None:
    """The image folder may move; the fingerprint does not know where it is."""
    moved = replace(cache_config, data=replace(cache_config.data, image_folder="elsewhere"), output=str(cache_folder))
    assert build_cache(moved, teacher=teacher, style="quiet").shards_made == 0


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_afterwards(
    cache_config: CacheConfig, cache_folder: Path, tmp_path: Path
) -> None:
    """RLIMIT_FSIZE makes the kernel refuse to write beyond a size: the same path as a disk that is full."""
    config = replace(cache_config, output=str(tmp_path / "cache"))
    job = write_job(config, tmp_path / "job.py")
    limited = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
    )
    (tmp_path / "limited.py").write_text(limited + job.read_text())
    failed = subprocess.run([sys.executable, str(tmp_path / "limited.py")], capture_output=True, text=True)
    assert failed.returncode != 0
    assert "committed shards stand" in failed.stderr
    subprocess.run([sys.executable, str(job)], check=True)
    assert contents(tmp_path / "cache") == contents(cache_folder)


def test_a_folder_without_permission_is_a_clear_error(
    cache_config: CacheConfig, teacher: TorchTeacher, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, OSError), match="file"):
        build_cache(replace(cache_config, output=str(tmp_path / "file" / "cache")), teacher=teacher, style="quiet")


def test_a_model_that_is_no_llava_is_refused(cache_config: CacheConfig, tmp_path: Path) -> None:
    teacher = replace(cache_config.teacher, model=str(tmp_path))
    with pytest.raises(TeacherError, match=r"teacher\.model=.*no model configuration can be read"):
        load_processor(teacher)
    shutil.copy(TEACHER / "config.json", tmp_path)
    with pytest.raises(TeacherError, match=r"no processor can be loaded.*needs processor_config\.json"):
        load_processor(teacher)


@pytest.mark.parametrize(
    ("section", "values", "error"),
    [
        ("signals", {"temperatures": (2.0,)}, "must contain 1.0"),
        ("signals", {"sampled": 300}, "at most 255"),
        ("signals", {"hidden": "none", "second_last": True}, "second_last needs"),
        ("signals", {"sampled": 4, "sampled_from": "tail", "top_k": 0}, "sampled_from=tail needs signals.top_k"),
        ("generation", {"top_p": 0.0}, "top_p: expected more than 0, found 0"),
        ("data", {"path": ""}, "data.path: not set"),
        ("teacher", {"model": ""}, "teacher.model: not set"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    section: str, values: dict, error: str, cache_config: CacheConfig
) -> None:
    config = replace(cache_config, output="x", **{section: replace(getattr(cache_config, section), **values)})
    with pytest.raises(ConfigError, match=error):
        check_config(config)


def test_torch_refuses_a_quantisation_that_it_would_not_apply(cache_config: CacheConfig) -> None:
    with pytest.raises(TeacherError, match=r"quantization=awq: only vLLM applies it"):
        TorchTeacher(replace(cache_config.teacher, quantization="awq"), cache_config.generation, cache_config.speed)


def test_a_checkpoint_is_the_same_whatever_library_wrote_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TEACHER, tmp_path / "teacher"))
    settings = json.loads((folder / "config.json").read_text())

    def digest_with(**fields: object) -> str:
        (folder / "config.json").write_text(json.dumps({**settings, **fields}))
        return checkpoint_digest(str(folder))

    assert digest_with(transformers_version="1.0") == digest_with() == checkpoint_digest(str(TEACHER))
    assert digest_with(vision_feature_layer=-3) != digest_with()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert digest_with() != checkpoint_digest(str(TEACHER))


def test_scales_of_visual_states_are_fitted_on_samples_that_have_an_image(
    cache_config: CacheConfig, teacher: TorchTeacher, world: Path, tmp_path: Path
) -> None:
    lines = json.loads((world / "train.json").read_text())
    text, shown = ([line for line in lines if ("image" in line) == kind] for kind in (False, True))
    text = [{**text[0], "id": f"text-{i}"} for i in range(9)]
    (tmp_path / "data.json").write_text(json.dumps(text + shown[:3]))
    config = replace(
        cache_config,
        output=str(tmp_path / "cache"),
        data=replace(cache_config.data, path=str(tmp_path / "data.json")),
        signals=replace(cache_config.signals, codec="int8", calibration_samples=4),
    )
    build_cache(config, teacher=teacher, style="quiet")
    with TeacherCache.open(config.output) as cache:
        assert {"hidden", "visual"} <= cache.scales.keys()


def test_texts_are_those_of_the_records(cache_folder: Path) -> None:
    with TeacherCache.open(cache_folder) as cache:
        texts = list(cache.texts())
        assert [t.sample_id for t in texts] == list(cache.sample_ids())
        for index in range(0, len(cache), 7):
            record = cache[index]
            assert tuple(texts[index].answers) == record.answers
            assert (tuple(texts[index].image_ids), texts[index].source) == (record.image_ids, record.source)


def test_errors_are_shown_as_they_are_written(tmp_path: Path) -> None:
    """Square brackets are no markup: neither those of an extra's name nor a template's."""
    (tmp_path / "c.yaml").write_text("output: x\n'[/INST]': 1\n")
    shown = CliRunner().invoke(app, ["build", str(tmp_path / "c.yaml")])
    assert shown.exit_code == 1
    assert "[/INST]" in shown.output


def test_sampled_answers_do_not_depend_on_the_batch(cache_config: CacheConfig, world: Path, tmp_path: Path) -> None:
    """Per-sample seeds: another batch size, and another place in another shard, give the same answers."""
    found = []
    for size, shard in ((4, 16), (64, 5)):
        generation = replace(cache_config.generation, temperature=3.0, top_p=0.95, seed=5)
        config = replace(
            cache_config,
            output=str(tmp_path / str(size)),
            generation=generation,
            data=replace(cache_config.data, max_samples=12),
            layout=replace(cache_config.layout, shard_samples=shard),
            speed=replace(cache_config.speed, answer_batch=size),
        )
        build_cache(config, style="quiet")
        with TeacherCache.open(tmp_path / str(size)) as cache:
            found.append([cache[i].answers for i in range(len(cache))])
    assert found[0] == found[1]
    torch.manual_seed(0)
