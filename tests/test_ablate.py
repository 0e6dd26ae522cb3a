"""Ablations: checked before anything is trained, resumable, with tables that say what they mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.student import write_student
from student_train.ablate import AblationConfig, ArmConfig, ablate, plan_runs
from student_train.stages import StagesConfig, stage_configs
from student_train.table import as_csv, as_markdown, as_text, make_table
from teacher_cache.config import ConfigError, build_config


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
    results = {key: {**costs, "scores": {"vqa": value}} for key, value in scores.items()}
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
    results = {(arm, seed): {**costs, "scores": {"vqa": 1.0}} for arm in "abc" for seed in (0, 1)}
    arms = {"a": ArmConfig(table="all"), "b": ArmConfig(table="table 1"), "c": ArmConfig(table="table 2")}
    table = make_table(replace(ablation(tmp_path), arms=arms), results)
    text = as_markdown(table)
    parts = text.split("## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["table 1", "table 2"]
    assert [[line.split()[1] for line in part.splitlines()[4:6]] for part in parts] == [["a", "b"], ["a", "c"]]
    assert [line.split()[0] for line in as_text(table).splitlines()] == ["arm", "a", "b", "c"]


def count_files(model: str) -> dict[str, float]:
    """A score function: how many files the exported student has."""
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
    settings: dict[str, Any] = {"base": base, "arms": arms, "seeds": [0], "score": "tests.test_ablate:count_files"}
    table = ablate(ablation(tmp_path / "out", **settings), "quiet")
    mark = tmp_path / "out/runs/a-seed0/scores.json"
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
