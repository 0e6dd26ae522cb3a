"""Settings: defaults < YAML < --set; wrong ones are named with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_cache.config import CacheConfig, SpeedConfig, check_settings, load_config
from teacher_cache.errors import ConfigError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_set_wins_over_yaml_over_default(tmp_path: Path) -> None:
    path = written(tmp_path, "signals: {top_k: 32}\ngeneration: {temperature: 1}\n")
    config = load_config(CacheConfig, path, ["signals.top_k=8", "data.path=[a.json, b.json]"])
    assert (config.signals.top_k, config.generation.temperature, config.layout.shard_samples) == (8, 1.0, 512)
    assert config.data.path == ("a.json", "b.json")


def test_a_preset_fills_what_the_yaml_leaves_open(tmp_path: Path) -> None:
    config = load_config(CacheConfig, written(tmp_path, "signals: {preset: full, visual: none}"))
    assert (config.signals.hidden, config.signals.visual) == ("text", "none")
    assert load_config(CacheConfig, None, ["signals.preset=compact"]).signals.hidden == "none"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("signals: {topk: 3}", "unknown key signals.topk; did you mean signals.top_k?"),
        ("sginals: {}", "unknown key sginals; did you mean signals?"),
        ("signals: {top_k: many}", "signals.top_k: expected int, found 'many'"),
        ("signals: {top_k: 1.5}", "signals.top_k: expected int, found 1.5"),
        ("signals: {top_k: true}", "signals.top_k: expected int, found True"),
        ("signals: {top_k: -1}", "signals.top_k: expected at least 0, found -1"),
        ("signals: {sampled: 256}", "signals.sampled: expected at most 255, found 256"),
        ("signals: {temperatures: [1, 0]}", "signals.temperatures[1]: expected more than 0, found 0"),
        ("generation: {temperature: .inf}", "generation.temperature: expected a finite number, found inf"),
        ("generation: {top_p: 1.5}", "generation.top_p: expected at most 1"),
        ("data: {path: 3}", "data.path: expected str, found 3"),
        ("signals: {codec: int7}", "signals.codec: expected one of float32, float16"),
        ("signals: 3", "signals: expected a section, found 3"),
        ("signals: {preset: huge}", "signals.preset: 'huge' is none of"),
        ("- 1", "expected a mapping of sections"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CacheConfig, written(tmp_path, text))
    assert error in str(caught.value)


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_config(CacheConfig, None, ["signals.top_k"])
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(CacheConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"unknown key signals\.tpo_k"):
        load_config(CacheConfig, None, ["signals.tpo_k=3"])


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a text; an empty value leaves the default."""
    path = written(tmp_path, "generation: {temperature: 1e-3, seed: }\nsignals: {temperatures: [1, 2e0]}\nspeed:\n")
    config = load_config(CacheConfig, path)
    assert (config.generation.temperature, config.generation.seed, config.signals.temperatures) == (1e-3, 0, (1.0, 2.0))


def test_settings_made_in_python_are_checked_like_those_of_a_file() -> None:
    with pytest.raises(ConfigError, match=r"speed\.answer_batch: expected at least 1, found 0"):
        check_settings(CacheConfig(speed=SpeedConfig(answer_batch=0)))
