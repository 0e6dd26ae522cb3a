"""A cache as a map-style torch ``Dataset``, read by the same code that feeds our own trainer and evaluation.

An item is a number; :meth:`CacheDataset.collate` reads all samples of a batch in one go, in whichever process it is
called. So any sampler, any ``Subset`` and any number of workers serve, and nothing is read twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from student_train.config import FitConfig, SourceConfig, StudentConfig, TrainConfig
from student_train.feed.loader import MicroBatches, with_own_images
from student_train.feed.sources import CacheSource, open_sources
from student_train.feed.step_plan import StepPlan
from student_train.feed.teacher import SIGNALS, Batch, Origin
from student_train.students.chat_reader import ChatReader
from student_train.students.reader import prepare_reader
from teacher_cache.data.conversations import Conversation
from teacher_cache.errors import ConfigError, UserError
from teacher_cache.models.model_config import position_limit
from teacher_cache.models.pretrained import read_config, read_generation_config


@dataclass(frozen=True)
class Sample:
    """An item of a :class:`CacheDataset`: the sample's number in the cache."""

    number: int


@dataclass(frozen=True)
class StudentFacts:
    """What is asked of a student to read as it does: its configuration, and what else ends its answers."""

    config: Any
    generation_config: Any


class CacheDataset(Dataset[Sample]):
    """A cache's M samples for one student, by number; ``teacher_cache.TeacherCache.torch`` makes it, and says what
    the settings mean and which errors there are.

    >>> from torch.utils.data import DataLoader
    >>> loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2, collate_fn=data.collate)
    >>> sum(len(batch["input_ids"]) for batch in loader) == len(data)
    True
    """

    def __init__(
        self,
        address: str,
        processor: Any,
        *,
        images: str | Path | Sequence[str] = "",
        signals: Sequence[str] = ("topk",),
        model: Any = None,
        chat_template: str = "",
        same_ids: bool = False,
    ) -> None:
        if unknown := [name for name in signals if name not in SIGNALS]:
            raise ConfigError(f"signals: {unknown[0]!r} is none of {', '.join(SIGNALS)}")
        facts = _facts(processor, model)
        _check_family(processor, facts.config)
        named = SourceConfig(cache=address, tokenizer="same_ids" if same_ids else "exact", **_images(images))
        losses = tuple(SIGNALS[name] for name in signals)
        student = StudentConfig(model="processor", chat_template=chat_template)
        config = FitConfig(output="-", sources=(named,), student=student, losses=losses, train=TrainConfig())
        self.processor = copy.deepcopy(processor)
        """As the student reads: save it beside the student. The one that was given is not changed."""
        with _named_as_here():
            reader, _ = prepare_reader(facts, self.processor, config)
            sources = open_sources(config, reader)
            reader = with_own_images(config, sources, reader)
        if not isinstance(reader, ChatReader):  # which looks at each sample that it writes
            plan = StepPlan(sources, config.sources, config.train, reader.image_tokens)
            plan.check_positions(position_limit(facts.config))
        (source,) = sources
        assert isinstance(source, CacheSource)
        self._source, self._origin = source, Origin(address, source.cache.manifest.fingerprint)
        self._signals = tuple(signals)
        self._batches = MicroBatches(sources, reader, None, config.train.pixel_cache)
        for number in sorted({0, int((source.image_counts > 0).argmax())}):
            self.collate([number])  # a sample that cannot be shown is an error here, not at a step

    def __len__(self) -> int:
        """M"""
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        """Raises ``IndexError``: there is no such sample."""
        number = index + len(self) if index < 0 else int(index)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index}, but there are {len(self)}")
        return Sample(number)

    def conversation(self, index: int) -> Conversation:
        """Sample ``index`` to look at: questions, the teacher's answers, images."""
        return self._source.conversations([self[index].number])[0]

    def collate(self, samples: Sequence[Sample | int | Mapping[str, Any]]) -> Batch:
        """The batch of these samples, read now: items, numbers, or rows of another data set with a column ``sample``.

        Raises ``CacheError``, ``ImageError``, ``ConfigError``: a sample that this student cannot be shown, with its
        name.
        """
        numbers = [_number(sample) for sample in samples]
        return Batch.of(self._batches.batch(numbers), self._origin, self._signals)


def _number(sample: Any) -> int:
    if isinstance(sample, Sample):
        return sample.number
    if isinstance(sample, Mapping) and "sample" not in sample:
        raise ConfigError(
            f"collate: expected rows with a column 'sample', the number in the cache; found {', '.join(sample)}. A "
            "trainer that drops columns keeps them with remove_unused_columns=False"
        )
    return int(sample["sample"] if isinstance(sample, Mapping) else sample)


_HERE = {
    "sources[…].image_folder": "images",
    "sources[…].image_data": "images",
    "sources[…].tokenizer=same_ids": "same_ids=True",
    "student.chat_template": "chat_template",
}
"""Settings of a configuration file → what they are called here."""


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Errors that say what to set, by the names of :class:`CacheDataset`."""
    try:
        yield
    except UserError as error:
        text = functools.reduce(lambda text, name: text.replace(name, _HERE[name]), _HERE, str(error))
        raise type(error)(text) from error


def _images(images: str | Path | Sequence[str]) -> dict[str, Any]:
    """The source's setting that ``images`` stands for: Parquet files by their names, else a folder."""
    if not isinstance(images, (str, Path)):
        return {"image_data": tuple(map(str, images))}
    return {"image_data" if ".parquet" in str(images) else "image_folder": str(images)}


def _facts(processor: Any, model: Any) -> StudentFacts:
    """Of the student itself, or of the folder that it, or its processor, was loaded from."""
    if model is not None and not isinstance(model, (str, Path)):
        return StudentFacts(model.config, getattr(model, "generation_config", None))
    name = str(model or getattr(processor, "tokenizer", processor).name_or_path)
    return StudentFacts(read_config("model", name), read_generation_config(name))


def _check_family(processor: Any, config: Any) -> None:
    """Refuse the processor of another family: its image tokens and pixels are not what this student reads."""
    expected, found = PROCESSOR_MAPPING_NAMES.get(config.model_type), type(processor).__name__
    sees = hasattr(processor, "image_processor")
    if sees and expected is not None and found != expected:
        raise ConfigError(
            f"processor: a {found}, but the student ({config.model_type}) reads by a {expected}. Give the student's "
            "own: AutoProcessor.from_pretrained(the student's folder)"
        )
