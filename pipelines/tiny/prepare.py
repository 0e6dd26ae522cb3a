"""Writes what the tiny pipeline starts from: the world's images and questions, and students that can already read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.tiny.student import STUDENT_LAYERS, STUDENT_WIDTH, write_student
from pipelines.tiny.world import write_world
from teacher_cache.errors import ConfigError
from teacher_cache.progress import silence_libraries

TEACHER = Path(__file__).parent / "teacher"


def prepare(
    folder: Path,
    *,
    train_images: int,
    dev_images: int,
    test_images: int,
    seed: int,
    students: int,
    width: int,
    layers: int,
) -> None:
    """``folder/world`` and ``folder/students/{n}``, ``readers/{n}``, ``untrained/{n}``; what is there and fits is left
    alone.

    Students begin with a pre-trained language model and projector (`train_start`) where there is one of their size, as
    the papers' do; ``readers`` of the same seeds with the language model alone, ``untrained`` ones with neither.

    Raises
    ------
    ConfigError
        The folder holds a world or students of other sizes.
    """
    wanted = {
        "train_images": train_images,
        "dev_images": dev_images,
        "test_images": test_images,
        "seed": seed,
        "students": students,
        "width": width,
        "layers": layers,
    }
    mark = folder / "prepared.json"
    if mark.is_file():
        found = json.loads(mark.read_text(encoding="utf-8"))
        if found != wanted:
            raise ConfigError(
                f"{folder}: prepared with {found}, now {wanted} is asked for. Delete it, or name another folder"
            )
        return
    write_world(folder / "world", train_images=train_images, dev_images=dev_images, test_images=test_images, seed=seed)
    shape: dict[str, Any] = {"teacher": TEACHER, "hidden_size": width, "layers": layers}
    known = (width, layers) == (STUDENT_WIDTH, STUDENT_LAYERS)
    for number in range(students):
        write_student(folder / "untrained" / str(number), seed=number, **shape)
        for name, part in (("students", "all"), ("readers", "language")):
            write_student(folder / name / str(number), seed=number, pretrained=part if known else "nothing", **shape)
    mark.write_text(json.dumps(wanted), encoding="utf-8")


def main(
    folder: Path = Path("runs/tiny"),
    train_images: Annotated[int, typer.Option(help="images with training conversations")] = 100,
    dev_images: int = 150,
    test_images: int = 300,
    seed: int = 0,
    students: Annotated[int, typer.Option(help="students, each from its own seed")] = 3,
    width: Annotated[int, typer.Option(help="hidden size of the students")] = 64,
    layers: int = 2,
) -> None:
    """Write the tiny world and its students."""
    silence_libraries()
    prepare(
        folder,
        train_images=train_images,
        dev_images=dev_images,
        test_images=test_images,
        seed=seed,
        students=students,
        width=width,
        layers=layers,
    )
    typer.echo(f"{folder}: world of {train_images}/{dev_images}/{test_images} images, {students} students")


if __name__ == "__main__":
    typer.run(main)
