"""Ablations: checked before anything is trained, resumable, with tables that say what they mean."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from student_train.studies.ablate import Children, _run_all, ablate, run_one
from student_train.studies.runs import AblationConfig, ArmConfig, plan_runs
from student_train.studies.table import as_csv, as_markdown, as_text, make_table, teacher_text
from student_train.training.stages import StagesConfig, fit_file, stage_configs
from teacher_cache.config import build_config
from teacher_cache.errors import ConfigError
from teacher_cache.store.manifest import read_manifest, write_manifest
from teacher_cache.store.storage import Storage


def ablation(output: Path, **over: Any) -> AblationConfig:
    tree: dict[str, Any] = {
        "output": str(output),
        "base": {"sources": [{"cache": "c"}], "student": {"model": "s/{seed}"}, "train": {"max_steps": 2}},
        "arms": {
            "a": {},
            "b": {"set": {"losses": [{"name": "cross_entropy"}, {"name": "forward_kl"}]}, "needs": ["a"]},
        },
        "baseline": "a",
        "seeds": [0, 1],
    }
    return build_config(AblationConfig, {**tree, **over}, "test")


def test_every_arm_and_seed_is_a_run_with_its_own_folder_and_seed(tmp_path: Path) -> None:
    runs = plan_runs(ablation(tmp_path))
    assert [r.name for r in runs] == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    assert [r.tree["student"]["model"] for r in runs] == ["s/0", "s/1", "s/0", "s/1"]
    assert [r.tree["train"]["seed"] for r in runs] == [0, 1, 0, 1]
    assert len({r.tree["output"] for r in runs}) == 4


@pytest.mark.parametrize(
    ("over", "error"),
    [
        ({"baseline": "c"}, "no arm 'c'"),
        ({"arms": {"a": {"needs": ["z"]}}}, "needs arm 'z'"),
        ({"arms": {"a": {"needs": ["b"]}, "b": {"needs": ["a"]}}}, "in a circle"),
        ({"arms": {"a": {"set": {"losses": [{"name": "forward_kk"}]}}}}, "arms.a: losses"),
        ({"arms": {"a": {"set": {"trian": {}}}}}, "did you mean train"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_trained(tmp_path: Path, over: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        plan_runs(ablation(tmp_path, **over))


def test_table_means_deviations_and_paired_differences(tmp_path: Path) -> None:
    costs = {"cpu_seconds": 2.0, "seconds": 3.0, "peak_megabytes": 4.0, "steps": 5}
    scores = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 2.0, ("b", 1): 4.5}
    results = {key: {**costs, "metrics": {"vqa": value}} for key, value in scores.items()}
    table = make_table(ablation(tmp_path), results)
    a, b = table["arms"]
    assert (a["mean"]["vqa"], b["mean"]["vqa"]) == (2.0, 3.25)
    assert a["deviation"]["vqa"] == pytest.approx(2**0.5)
    assert b["difference"]["vqa"] == pytest.approx((1.25, 0.5**0.5 / 2))
    assert "(+1.2 ± 0.35*)" in as_markdown(table)
    assert as_csv(table).splitlines()[1:] == ["a,0,1.0", "a,1,3.0", "b,0,2.0", "b,1,4.5"]
    assert as_text(table).splitlines()[0].split() == ["arm", "vqa", "CPU", "s", "MB"]


def test_arms_of_several_tables_stand_below_the_baseline_each(tmp_path: Path) -> None:
    costs = {"cpu_seconds": 2.0, "seconds": 3.0, "peak_megabytes": 4.0, "steps": 5}
    results = {(arm, seed): {**costs, "metrics": {"vqa": 1.0}} for arm in "abc" for seed in (0, 1)}
    arms = {"a": ArmConfig(table="all"), "b": ArmConfig(table="table 1"), "c": ArmConfig(table="table 2")}
    table = make_table(replace(ablation(tmp_path), arms=arms), results)
    text = as_markdown(table)
    parts = text.split("## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["table 1", "table 2"]
    assert [[line.split()[1] for line in part.splitlines()[4:6]] for part in parts] == [["a", "b"], ["a", "c"]]
    assert [line.split()[0] for line in as_text(table).splitlines()] == ["arm", "a", "b", "c"]


def count_files(model: str) -> dict[str, float]:
    """A measuring function: how many files the exported student has."""
    return {"files": float(len(list(Path(model).iterdir())))}


@pytest.mark.slow
def test_an_ablation_goes_on_where_it_was_and_refuses_other_settings(
    tmp_path: Path, cache_folder: Path, world: Path
) -> None:
    write_student(tmp_path / "student", teacher=TEACHER, seed=0)
    base = {
        "sources": [{"cache": str(cache_folder), "image_folder": str(world / "images")}],
        "student": {"model": str(tmp_path / "student")},
        "train": {"max_steps": 2, "global_batch": 4, "threads": 1},
    }
    arms: dict[str, Any] = {"a": {}}
    settings: dict[str, Any] = {
        "base": base,
        "arms": arms,
        "seeds": [0],
        "measure": "tests.student_train.studies.test_ablate:count_files",
    }
    table = ablate(ablation(tmp_path / "out", **settings), "quiet")
    mark = tmp_path / "out/runs/a-seed0/metrics.json"
    before = mark.stat().st_mtime_ns
    arms["b"] = {"match_cpu": "a", "steps_like": "a"}
    table = ablate(ablation(tmp_path / "out", **settings), "quiet")
    assert [arm["name"] for arm in table["arms"]] == ["a", "b"]
    assert mark.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out/table.json").read_text())["arms"][1]["steps"] == 2
    assert (tmp_path / "out/table.svg").stat().st_size > 1000
    base["train"]["max_steps"] = 3
    with pytest.raises(ConfigError, match="has other settings"):
        ablate(ablation(tmp_path / "out", **settings), "quiet")


def test_online_cost_is_that_of_the_longest_distilled_arm(tmp_path: Path) -> None:
    """600 steps of 32 over 638 samples are 30 epochs; the arm that matches CPU seconds is longer, and asks none."""
    losses = [{"name": "cross_entropy"}, {"name": "forward_kl"}]
    arms = {"a": ArmConfig(), "long": ArmConfig(), "kl": ArmConfig(set={"losses": losses})}
    costs = {"cpu_seconds": 2.0, "seconds": 3.0, "peak_megabytes": 4.0}
    steps = {"a": 600, "long": 770, "kl": 600}
    results = {(a, s): {**costs, "steps": n, "metrics": {"vqa": 1.0}} for a, n in steps.items() for s in (0, 1)}
    teacher = {"answer_seconds": 3.8, "score_seconds": 1.929, "samples": 638}
    table = make_table(replace(ablation(tmp_path), arms=arms), results) | {"teacher": teacher, "global_batch": 32}
    assert "30 epochs × 1.9 s = 58 s for each distilled student" in teacher_text(table)
    table["arms"] = [arm for arm in table["arms"] if arm["name"] != "kl"]
    assert "Online" not in teacher_text(table)


def test_a_run_takes_the_gpu_of_the_one_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent may use GPUs 4 and 7. The first run ends first; the third starts while the second still runs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    gpus: list[str] = []
    lock, second, third_runs = threading.Lock(), threading.Event(), threading.Event()

    def call(_: Children, command: list[str], *, env: dict[str, str], **__: Any) -> int:
        with lock:
            gpus.append(env["CUDA_VISIBLE_DEVICES"])
            number = len(gpus)
        if number == 1:
            assert second.wait(10)
        elif number == 2:
            second.set()
            assert third_runs.wait(10)
        else:
            third_runs.set()
        return 0

    monkeypatch.setattr(Children, "call", call)
    config = ablation(tmp_path, arms={"a": {}}, seeds=[0, 1, 2, 3])
    _run_all(config, plan_runs(config), lambda run: None)
    assert sorted(gpus[:2]) == ["4", "7"]
    assert gpus[2] == gpus[0]


def test_finished_runs_stand_on_their_cache_and_on_the_runs_they_need(
    tmp_path: Path, cache_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_student(tmp_path / "student", teacher=TEACHER, seed=0)
    shutil.copytree(cache_folder, tmp_path / "cache")
    base: dict[str, Any] = {
        "sources": [{"cache": str(tmp_path / "cache"), "image_folder": str(world / "images")}],
        "student": {"model": str(tmp_path / "student")},
        "train": {"max_steps": 1, "global_batch": 4, "threads": 1},
    }
    arms: dict[str, Any] = {"a": {}, "b": {"needs": ["a"]}}
    over = {
        "base": base,
        "arms": arms,
        "seeds": [0],
        "measure": "tests.student_train.studies.test_ablate:count_files",
        "workers": 1,
    }
    monkeypatch.setattr("student_train.studies.ablate._spawn", lambda config, run, *_: run_one(config, run))

    def again(**more: Any) -> None:
        ablate(ablation(tmp_path / "out", **over, **more), "quiet")

    again()
    again()
    arms["a"] = {"set": {"train": {"learning_rate": 1e-3}}}
    shutil.rmtree(tmp_path / "out/runs/a-seed0")
    with pytest.raises(ConfigError, match=r"b-seed0: .* other run a-seed0, .*\. Delete .*b-seed0 to run it anew"):
        again()
    shutil.rmtree(tmp_path / "out/runs/b-seed0")
    again()
    storage = Storage(tmp_path / "cache")
    manifest = read_manifest(storage)
    write_manifest(storage, replace(manifest, teacher=manifest.teacher | {"weights": "another teacher"}))
    with pytest.raises(ConfigError, match=r"a-seed0: .* has other sources\[0\] \(.*cache\)"):
        again()
    shutil.rmtree(tmp_path / "cache")  # gone, and so not another
    again()


def test_a_finished_stage_stands_only_for_its_settings_and_its_student(
    tmp_path: Path, cache_folder: Path, world: Path
) -> None:
    write_student(tmp_path / "student", teacher=TEACHER, seed=0)
    tree = {
        "output": str(tmp_path / "out"),
        "base": {
            "sources": [{"cache": str(cache_folder), "image_folder": str(world / "images")}],
            "student": {"model": str(tmp_path / "student")},
            "train": {"max_steps": 1, "global_batch": 4, "threads": 1, "warmup_share": 0},
        },
        "stages": {"a": {}, "b": {}},
    }
    path = tmp_path / "stages.yaml"
    path.write_text(json.dumps(tree))
    first = fit_file(path, [], "quiet")
    mark = (tmp_path / "out/b/summary.json").stat().st_mtime_ns
    assert fit_file(path, [], "quiet") == first
    assert (tmp_path / "out/b/summary.json").stat().st_mtime_ns == mark
    with pytest.raises(ConfigError, match=r"out/a: stage a was begun with other settings, .* Delete the folder"):
        fit_file(path, ["stages.a.train.seed=7"], "quiet")
    shutil.rmtree(tmp_path / "out/a")
    with pytest.raises(ConfigError, match=r"out/b: stage b was begun with other student\.model \(.*out/a/model\)"):
        fit_file(path, ["stages.a.train.seed=7"], "quiet")


def test_stages_hand_their_model_on() -> None:
    config = build_config(
        StagesConfig,
        {
            "output": "o",
            "base": {"sources": [{"cache": "c"}], "student": {"language_model": "l", "vision_tower": "v"}},
            "stages": {"one": {"student": {"train": "projector"}}, "two": {"student": {"train": "full"}}},
        },
        "test",
    )
    (_, one), (_, two) = stage_configs(config)
    assert (one.student.language_model, one.student.train, one.output) == ("l", "projector", "o/one")
    assert (two.student.model, two.student.language_model, two.student.train) == ("o/one/model", "", "full")
