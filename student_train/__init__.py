"""Train students from a teacher cache, without the teacher.

Each name is imported when it is first used. ``fit`` is what ``student-train fit`` runs; ``CacheDataset``, ``Batch`` and
``distillation`` bring a cache into a loop of your own (``teacher_cache.open(…).torch(…)`` makes them).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.config import FitConfig as FitConfig
    from student_train.config import SourceConfig as SourceConfig
    from student_train.config import StudentConfig as StudentConfig
    from student_train.config import TrainConfig as TrainConfig
    from student_train.feed.distillation import distillation as distillation
    from student_train.feed.teacher import Batch as Batch
    from student_train.feed.teacher import Teacher as Teacher
    from student_train.feed.torch_dataset import CacheDataset as CacheDataset
    from student_train.losses.catalogue import LossSpec as LossSpec
    from student_train.training.trainer import fit as fit

_PLACES = {
    "Batch": "student_train.feed.teacher",
    "CacheDataset": "student_train.feed.torch_dataset",
    "FitConfig": "student_train.config",
    "LossSpec": "student_train.losses.catalogue",
    "SourceConfig": "student_train.config",
    "StudentConfig": "student_train.config",
    "Teacher": "student_train.feed.teacher",
    "TrainConfig": "student_train.config",
    "distillation": "student_train.feed.distillation",
    "fit": "student_train.training.trainer",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
