"""Plain data as people have it: samples that cannot be trained on are left out with phase one's reasons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from student_train.config import SourceConfig
from teacher_cache.data.conversations import Conversation, Image, Skipped
from teacher_cache.data.images import load_image
from teacher_cache.data.skipped import Allowed, counted
from teacher_cache.errors import ImageError

SKIPPED = "skipped.jsonl"
"""Beside the run: one line (sample_id, reason) for each sample that it does not learn from."""


def usable(samples: Iterable[Conversation | Skipped], folder: str, skipped: list[Skipped]) -> Iterator[Conversation]:
    """The samples to train on; the others go to ``skipped``. Of an image only its file is looked for here: reading
    each of them would take as long as an epoch."""
    for sample in samples:
        if isinstance(sample, Skipped):
            skipped.append(sample)
        elif reason := next(filter(None, (image_fault(image, folder) for image in sample.images)), ""):
            skipped.append(Skipped(sample.sample_id, reason))
        else:
            yield sample


def image_fault(image: Image, folder: str) -> str:
    """Why the file of ``image`` cannot be found, in phase one's words; empty where it is there.

    Raises ``DataError``: the folder itself does not answer.
    """
    if image.embedded or (folder and (Path(folder) / image.path).is_file()):
        return ""
    try:
        load_image(image, folder)
    except ImageError as error:
        return str(error)
    return ""


def check_share(config: SourceConfig, total: int, skipped: Sequence[Skipped]) -> None:
    """Raises ``DataError``: more than ``max_skipped`` of the samples are left out, or all, with the counted reasons."""
    first = f"; the first: {skipped[0].sample_id}, {skipped[0].reason}" if skipped else ""
    allowed = Allowed("sources[…].max_skipped", config.max_skipped, total)
    allowed.check(len(skipped), f"{counted(skipped)}{first}", where=config.data, do=" and run the same command again")


class SkippedFile:
    """``skipped.jsonl`` of a run: what was left out before and while it trained; a resumed run goes on with it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / SKIPPED
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.known = {json.loads(line)["sample_id"] for line in lines}

    def add(self, skipped: Iterable[Skipped]) -> list[Skipped]:
        """Write down those that are new, and return them."""
        new = {s.sample_id: s for s in skipped if s.sample_id not in self.known}
        if new:
            self.known |= new.keys()
            with self.path.open("a", encoding="utf-8") as file:  # one write, so that ranks do not mix their lines
                file.write(
                    "".join(json.dumps({"sample_id": s.sample_id, "reason": s.reason}) + "\n" for s in new.values())
                )
        return list(new.values())
