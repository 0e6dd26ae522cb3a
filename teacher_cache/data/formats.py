"""Conversations as lines of the formats that trainers read; the way back is ``conversations.parse_sample``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.data.conversations import IMAGE_TAG, Conversation, Format
from teacher_cache.errors import DataError
from teacher_cache.files import whole

ROWS = 64
"""Lines in memory at once, and in a row group: what their embedded images take."""


def to_line(conversation: Conversation, form: Format, images: list[Any] | None = None) -> dict[str, Any]:
    """``conversation`` in ``form``. images: what stands for each image, its path unless given."""
    images = [image.path or image.image_id for image in conversation.images] if images is None else images
    roles = form in ("messages", "trl")
    keys = ("role", "content") if roles else ("from", "value")
    user, assistant = ("user", "assistant") if roles else ("human", "gpt")
    turns = [("system", _text(conversation.system, form))] if conversation.system else []
    for question, answer in zip(conversation.questions, conversation.answers, strict=True):
        turns += [(user, _question(question, form)), (assistant, _text(answer, form))]
    line = {"id": conversation.sample_id, _turns(form): [dict(zip(keys, turn, strict=True)) for turn in turns]}
    if form != "llava":
        return line | {"images": images}
    return line | ({"image": images[0] if len(images) == 1 else images} if images else {})


def write_lines(lines: Iterable[dict[str, Any]], output: Path, form: Format, embedded: bool = False) -> int:
    """Write ``lines`` as ``output`` says by its name: a JSON list, JSON lines or Parquet; how many it were. The file
    appears whole or not at all, and few lines are in memory. embedded: images are bytes and path, as ``datasets``
    keeps them.

    Raises ``DataError``: another name, or embedded images for JSON.
    """
    kind = output.suffix.lower()
    if kind not in (".json", ".jsonl", ".parquet") or (embedded and kind != ".parquet"):
        wanted = "*.parquet, which alone can hold images" if embedded else "*.json, *.jsonl or *.parquet"
        raise DataError(f"{output}: expected a name as {wanted}")
    with whole(output) as part:
        if kind == ".parquet":
            return _write_parquet(lines, part, _schema(form, embedded))
        with part.open("w", encoding="utf-8") as file:
            count = 0
            for line in lines:
                text = json.dumps(line, ensure_ascii=False, indent=None if kind == ".jsonl" else 1)
                if kind == ".json":
                    file.write((",\n " if count else "[\n ") + text.replace("\n", "\n "))
                else:
                    file.write(text + "\n")
                count += 1
            if kind == ".json":
                file.write("\n]" if count else "[]")
            return count


def _turns(form: Format) -> str:
    return "messages" if form in ("messages", "trl") else "conversations"


def _text(text: str, form: Format) -> Any:
    return [{"type": "text", "text": text}] if form == "trl" else text


def _question(question: str, form: Format) -> Any:
    texts = question.split(IMAGE_TAG)
    if form == "trl":
        parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
        return [part for part in parts if part.get("text") != ""] or _text("", form)
    if form != "llava":
        return question
    first = next((i for i, text in enumerate(texts) if text), len(texts) - 1)
    return f"{IMAGE_TAG}\n" * first + IMAGE_TAG.join(texts[first:])


def _write_parquet(lines: Iterable[dict[str, Any]], path: Path, schema: pa.Schema) -> int:
    count, rest = 0, iter(lines)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := list(islice(_listed(rest), ROWS)):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _listed(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A table's column is of one type: images are a list, however many they are."""
    for line in lines:
        one = line.pop("image", [])
        yield {"images": one if isinstance(one, list) else [one], **line}


def _schema(form: Format, embedded: bool) -> pa.Schema:
    """The table's columns, with what ``datasets`` is to take them for."""
    text = pa.string()
    content = pa.list_(pa.struct([("type", text), ("text", text)])) if form == "trl" else text
    turn = pa.struct(
        [("role", text), ("content", content)] if _turns(form) == "messages" else [("from", text), ("value", text)]
    )
    image = pa.struct([("bytes", pa.binary()), ("path", text)]) if embedded else text
    schema = pa.schema([("id", text), (_turns(form), pa.list_(turn)), ("images", pa.list_(image))])
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        fields = {field.name: _feature(field.type) for field in kind}
        return {"_type": "Image"} if "bytes" in fields else fields
    return {"dtype": str(kind), "_type": "Value"}
