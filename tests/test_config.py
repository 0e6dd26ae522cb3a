"""Settings: defaults < YAML < --set; wrong ones are named with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_cache.config import CacheConfig, ConfigError, load_config


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
