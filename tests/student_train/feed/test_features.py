"""An image is what lies in its file: of the same name in another folder, or written again, it is another."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from PIL import ImageOps

from student_train.config import FitConfig, LossSpec, SourceConfig
from student_train.feed.features import ImageFeatures, compute_features
from student_train.feed.loader import make_loader
from student_train.feed.sources import CacheSource
from student_train.training.trainer import Run
from teacher_cache.data.conversations import Image
from teacher_cache.data.image_files import OtherImageError
from teacher_cache.errors import CacheError, DataError, ImageError
from tests.fixtures.training import tiny_fit


@pytest.fixture
def config(tmp_path: Path, cache_folder: Path, world: Path) -> FitConfig:
    """Twice the same questions: with their images from a cache, and with others of the same names as plain data."""
    (tmp_path / "inverted").mkdir()
    for path in (world / "images").glob("*.png"):
        with PillowImage.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(tmp_path / "inverted" / path.name)
    plain = tiny_fit(tmp_path, cache_folder, world, max_steps=1, global_batch=12, micro_batch=12)
    one = replace(plain.sources[0], max_samples=6)
    data = str(world / "train.json")
    other = SourceConfig(data=data, image_folder=str(tmp_path / "inverted"), max_samples=6)
    return replace(plain, sources=(one, other), losses=(LossSpec("cross_entropy"),))


@pytest.mark.parametrize("kept", ["compute", "cache"])
def test_images_of_one_name_in_two_folders_are_two(config: FitConfig, kept: str) -> None:
    run = Run.prepare(replace(config, student=replace(config.student, vision_features=kept)))
    seen = []
    for micro, batch in make_loader(run.dataset, run.plan, range(1), 0, 1, 0, False):
        values = batch.fields["pixel_values"] if kept == "compute" else batch.image_features
        assert values is not None
        order = np.argsort([i for i in micro.indices if run.dataset.sources[micro.source].image_counts[i]])
        assert len(order) == len(values) > 1
        seen.append(values[torch.from_numpy(order)])
    assert len(seen) == 2
    assert all(not torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("kept", ["compute", "cache"])
@pytest.mark.parametrize("answers", ["cached", "original"])
def test_other_images_of_the_same_names_are_refused_where_a_cache_names_them(
    config: FitConfig, kept: str, answers: Literal["cached", "original"]
) -> None:
    wrong = replace(config.sources[0], image_folder=config.sources[1].image_folder, answers=answers)
    config = replace(config, sources=(wrong,), student=replace(config.student, vision_features=kept))
    with pytest.raises(OtherImageError, match=r"image train-.*: other bytes than those the teacher saw"):
        list(make_loader((run := Run.prepare(config)).dataset, run.plan, range(1), 0, 1, 0, False))


def paint(path: Path, colour: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    PillowImage.new("RGB", (4, 4), (colour,) * 3).save(path)
    return path


def features(folder: Path, images: Path) -> float:
    """Of ``000.png`` by a tower that gives the mean colour."""

    def pixels(image: Image, where: str) -> torch.Tensor:
        with PillowImage.open(Path(where) / image.path) as opened:
            return torch.from_numpy(np.array(opened, np.float32)).permute(2, 0, 1)

    image = Image("000.png", path="000.png")
    found = compute_features(folder, [(image, str(images))], lambda p: p.mean((1, 2, 3)).reshape(-1, 1, 1), pixels, "t")
    return ImageFeatures(found).read([str(images / "000.png")]).item()


def test_features_of_an_image_that_was_written_again_are_computed_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    paint(first / "000.png", 10)
    paint(second / "000.png", 20)
    assert (features(tmp_path, first), features(tmp_path, second)) == (10, 20)
    made = len(list(tmp_path.glob("vision-features-*")))
    assert features(tmp_path, first) == 10
    assert len(list(tmp_path.glob("vision-features-*"))) == made
    paint(first / "000.png", 30)
    assert features(tmp_path, first) == 30
    (first / "000.png").unlink()
    with pytest.raises(DataError, match=r"first/000\.png: an image of the training data cannot be found"):
        features(tmp_path, first)


def test_images_are_listed_without_reading_an_array(tmp_path: Path, cache_folder: Path) -> None:
    from transformers import AutoTokenizer

    from pipelines.tiny.prepare import TEACHER

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    shutil.copytree(cache_folder, tmp_path / "cache")
    for name in ("shards", "images"):
        for path in (tmp_path / "cache" / name).glob("*/*"):
            if path.is_dir():
                shutil.rmtree(path)
    whole, bare = (
        CacheSource(SourceConfig(cache=str(c)), tokenizer, [], []) for c in (cache_folder, tmp_path / "cache")
    )
    with pytest.raises(CacheError):
        bare.read([0])
    assert [i.image_id for i in bare.images()] == [
        *(i for r in map(whole.cache.__getitem__, range(len(whole))) for i in r.image_ids)
    ]


KILLED = """
import os, sys
from pathlib import Path
import torch
from student_train.feed.features import compute_features
from teacher_cache.data.conversations import Image
from teacher_cache.errors import ImageError
folder, asked, last = Path(sys.argv[1]), [], int(sys.argv[2])
def pixels(image, where):
    if (Path(where) / image.path).read_bytes():
        raise ImageError(f"image {image.path}: broken")
    return torch.full((1,), float(image.path))
def tower(values):
    if len(asked) == last:
        os.kill(os.getpid(), 9)
    asked.append(len(values))
    return values.reshape(-1, 1, 1).expand(-1, 3, 2)
images = [(Image(str(n), path=str(n)), sys.argv[3]) for n in range(10)]
print(compute_features(folder, images, tower, pixels, "t", 2, lambda: torch.zeros(1)), sum(asked))
"""


def killed(folder: Path, images: Path, batches: int) -> tuple[int, str]:
    """Compute ten images' features in a process that is killed after so many batches: status, and what it said."""
    images.mkdir(exist_ok=True)
    for number in range(10):
        path = images / str(number)
        if not path.exists():
            path.touch()
    command = [sys.executable, "-c", KILLED, str(folder), str(batches), str(images)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return ran.returncode, ran.stdout


def check(folder: Path, images: Path) -> None:
    values = ImageFeatures(folder).read([str(images / str(n)) for n in range(10)])
    assert torch.equal(values, torch.arange(10.0, dtype=torch.float16).reshape(-1, 1, 1).expand(-1, 3, 2))


def test_features_go_on_after_kill_9_and_leave_nothing(tmp_path: Path) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    out.mkdir()
    for _ in range(2):
        assert killed(out, images, 2)[0] == -signal.SIGKILL
    status, said = killed(out, images, 99)
    found = Path(said.split()[0])
    assert (status, said.split()[1]) == (0, "2")  # the last batch alone
    check(found, images)
    assert list(out.iterdir()) == [found]


def test_what_a_killed_run_left_is_checked_before_it_is_used(tmp_path: Path) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    out.mkdir()
    assert killed(out, images, 4)[0] == -signal.SIGKILL
    (part,) = out.glob(".*.part")
    with (part / "features.npy").open("r+b") as file:  # image 3 of 10, at 12 bytes each
        file.seek(-12 * 7, 2)
        file.write(b"\0\0")
    status, said = killed(out, images, 99)
    assert (status, said.split()[1]) == (0, "7")
    check(Path(said.split()[0]), images)


@pytest.mark.parametrize("lost", [3, 9])
def test_a_damaged_image_stays_so_after_kill_9(tmp_path: Path, lost: int) -> None:
    """One that the killed run had looked at, and one that it had not."""
    out, images = tmp_path / "run", tmp_path / "images"
    out.mkdir()
    images.mkdir()
    (images / str(lost)).write_bytes(b"<html>")
    assert killed(out, images, 3)[0] == -signal.SIGKILL
    status, said = killed(out, images, 99)
    assert (status, said.split()[1]) == (0, "4")
    found = ImageFeatures(Path(said.split()[0]))
    assert found.damaged == {str(images / str(lost)): f"image {lost}: broken"}
    good = [n for n in range(10) if n != lost]
    assert found.read([str(images / str(n)) for n in good])[:, 0, 0].tolist() == good
    with pytest.raises(ImageError, match=f"image {lost}: broken"):
        found.read([str(images / str(n)) for n in range(10)])


def test_features_that_were_changed_are_refused(tmp_path: Path) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    out.mkdir()
    found = Path(killed(out, images, 99)[1].split()[0])
    with (found / "features.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x11")
    with pytest.raises(DataError, match=r"features of .*/9 were changed after they were written. Delete that folder"):
        check(found, images)
    (found / "features.crc").write_bytes(b"")
    with pytest.raises(DataError, match="other numbers of images"):
        ImageFeatures(found)


def test_features_whose_header_says_swapped_bytes_are_refused(tmp_path: Path) -> None:
    """The checksums are of the bytes, which are the same: read so, every feature would be another number."""
    out, images = tmp_path / "run", tmp_path / "images"
    out.mkdir()
    found = Path(killed(out, images, 99)[1].split()[0])
    array = found / "features.npy"
    array.write_bytes(array.read_bytes().replace(b"'<f2'", b"'>f2'", 1))
    with pytest.raises(DataError, match="expected <f2"):
        ImageFeatures(found)


def test_two_runs_at_once_compute_features_once(tmp_path: Path) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    out.mkdir()
    with ThreadPoolExecutor(2) as threads:
        said = [s for _, s in threads.map(lambda _: killed(out, images, 99), range(2))]
    assert sorted(int(s.split()[1]) for s in said) == [0, 10]
