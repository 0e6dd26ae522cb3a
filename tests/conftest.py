"""The tiny world and its caches, made once per test process: real images, the real tiny teacher, real Zarr stores."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.world import write_world
from teacher_cache.build.build import build_cache
from teacher_cache.config import (
    CacheConfig,
    DataConfig,
    GenerationConfig,
    LayoutConfig,
    SignalsConfig,
    SpeedConfig,
    TeacherConfig,
)
from teacher_cache.teachers.torch_teacher import TorchTeacher
from tests.fixtures.families import FAMILIES, PALIGEMMA, make_family
from tests.fixtures.threads import THREADS

torch.set_num_threads(THREADS)
settings.register_profile("same", derandomize=True)  # examples that do not change from day to day
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """The tests are for a CPU; those marked ``gpu`` see a GPU when they are asked for by that name."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def device() -> str:
    """On which a test marked ``gpu`` runs; convolutions in float32 there, too, as all products are by default."""
    torch.backends.cudnn.allow_tf32 = False
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def cuda(device: str) -> str:
    """For what a CPU cannot show."""
    if device == "cpu":
        pytest.skip("needs a CUDA device: pytest -m gpu on a machine that has one")
    return device


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training images (60 conversations or so), 8 dev and 8 test images."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, train_images=24, dev_images=8, test_images=8, seed=7)
    return folder


@pytest.fixture(scope="session")
def cache_config(world: Path) -> CacheConfig:
    """Everything stored, states exact to float16; ``output`` is to be set."""
    return CacheConfig(
        data=DataConfig(path=str(world / "train.json"), image_folder=str(world / "images")),
        teacher=TeacherConfig(
            model=str(TEACHER), backend="torch", dtype="float32", chat_template="tiny", max_length=256
        ),
        generation=GenerationConfig(max_new_tokens=32),
        signals=SignalsConfig(preset="full", top_k=8, hidden="text", visual="states", codec="float16"),
        layout=LayoutConfig(shard_samples=16),
        speed=SpeedConfig(device="cpu"),
    )


@pytest.fixture(scope="session")
def teacher(cache_config: CacheConfig) -> TorchTeacher:
    return TorchTeacher(cache_config.teacher, cache_config.generation, cache_config.speed)


@pytest.fixture(scope="session")
def cache_folder(cache_config: CacheConfig, teacher: TorchTeacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache of the tiny world; read it, never change it."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    build_cache(replace(cache_config, output=str(folder)), teacher=teacher, style="quiet")
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family → the folder of its tiny model, made when first asked for; read it, never change it."""
    base, made = tmp_path_factory.mktemp("families"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_family(FAMILIES.get(name, PALIGEMMA), base / name)
        return made[name]

    return folder
