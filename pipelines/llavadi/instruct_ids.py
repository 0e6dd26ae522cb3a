"""Which samples of LLaVA's 665K mix are LLaVA-Instruct-150K's: the list that ``data.regenerate_ids`` names.

    python -m pipelines.llavadi.instruct_ids MIX.json INSTRUCT.json OUT.txt

The two files share ids with each other and with other parts of the mix (a COCO number stands for every question about
that image), so samples are matched by image and questions, and named as ``data.duplicate_ids: number`` names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.sample_reader import read_conversations

Key = tuple[str, tuple[str, ...]]


def instruct_ids(mix: Path, instruct: Path) -> list[str]:
    """Ids of ``mix``, in its order, of the samples that ask what a sample of ``instruct`` asks about the same image."""
    wanted = {_key(c) for c in _read(instruct)}
    return [c.sample_id for c in _read(mix) if _key(c) in wanted]


def _read(path: Path) -> list[Conversation]:
    samples = read_conversations(DataConfig(path=str(path), duplicate_ids="number"))
    return [s for s in samples if isinstance(s, Conversation)]


def _key(conversation: Conversation) -> Key:
    """Folders differ between the files, names of images do not."""
    image = conversation.image.image_id if conversation.image is not None else ""
    return Path(image).name, conversation.texts


def main(
    mix: Annotated[Path, typer.Argument(help="llava_v1_5_mix665k.json")],
    instruct: Annotated[Path, typer.Argument(help="llava_instruct_150k.json")],
    output: Annotated[Path, typer.Argument(help="text file, one sample_id a line")],
) -> None:
    """Write the list."""
    ids = instruct_ids(mix, instruct)
    output.write_text("\n".join(ids) + "\n", encoding="utf-8")
    typer.echo(f"{output}: {len(ids):,} samples")


if __name__ == "__main__":
    typer.run(main)
