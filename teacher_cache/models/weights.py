"""Single tensors out of a checkpoint folder, without loading the model; and weight names that engines do not know."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from teacher_cache.errors import TeacherError

_HEAD = ("language_model.lm_head.weight", "lm_head.weight")
_EMBEDDING = (
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.text_model.embed_tokens.weight",
    "model.embed_tokens.weight",
)
_FINAL_NORM = ("language_model.model.norm.", "model.language_model.norm.", "model.text_model.norm.", "model.norm.")
_RENAMED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Whose weights Transformers 5 saves by other names than the hub's, which vLLM reads: LLaVA's, Gemma 3's."""


def checkpoint_folder(model: str, revision: str = "") -> Path:
    """The local folder of ``model``: itself, or the hub's snapshot, downloaded if it is not there yet.

    Raises ``TeacherError``: ``model`` is neither a folder nor a repository that can be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision or None, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise TeacherError(
            f"teacher.model={model}: no such folder, and no model of that name can be downloaded "
            f"({first_line(error)}). Give the path of a checkpoint folder, or check the name and the network."
        ) from error


def output_head(folder: Path) -> torch.Tensor:
    """(V, d) the output projection; the input embedding where the checkpoint ties the two."""
    return _first_tensor(folder, (*_HEAD, *_EMBEDDING), "output head")


def final_norm(model: Any, folder: Path) -> torch.nn.Module:
    """The module behind the last layer of ``model`` (which may have no storage), with its weights in float32.

    Llama's is ``x · w``, Gemma's ``x · (1 + w)``, Cohere's a LayerNorm.
    """
    norm: torch.nn.Module | None = getattr(model.get_decoder(), "norm", None)
    if norm is None:
        raise TeacherError(
            f"{folder}: a {type(model).__name__}, whose decoder has no module named norm behind its last layer, which "
            "states out of vLLM must go through. Set teacher.backend=torch"
        )
    norm = norm.to_empty(device="cpu").float().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.copy_(_first_tensor(folder, tuple(prefix + name for prefix in _FINAL_NORM), "final norm"))
    return norm


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint, by name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    return {name: path for path in sorted(folder.glob("*.safetensors")) for name in _read_header(path)[0]}


def unknown_vision_names(folder: Path) -> list[str]:
    """Weights whose names vLLM does not know: transformers 5 saves CLIP and SigLIP towers without ``vision_model``.

    The hub's folders say ``vision_tower.vision_model.X``; transformers 5 reads both and writes ``vision_tower.X``, for
    which vLLM 0.32 has no parameter. Other towers (Pixtral's) have one name everywhere.
    """
    vision = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vision_config") or {}
    if vision.get("model_type", _RENAMED_TOWERS[0]) not in _RENAMED_TOWERS:
        return []
    return [name for name in tensor_files(folder) if _hub_name(name) != name]


def rename_vision_weights(folder: str | Path) -> int:
    """Give the vision tower of a checkpoint the hub's weight names, in place; return how many were renamed.

    Only headers change, the tensors' bytes are copied as they are. Each file is written beside the old one and put in
    its place when complete, so an interrupted call leaves a folder that can be renamed again.
    """
    folder = Path(folder)
    renamed = unknown_vision_names(folder)
    files = tensor_files(folder)
    for path in sorted({files[name] for name in renamed}):
        _rewrite_header(path)
    index = folder / "model.safetensors.index.json"
    if renamed and index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {_hub_name(name): file for name, file in content["weight_map"].items()}
        _replace(index, json.dumps(content, indent=2).encode())
    return len(renamed)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for use inside one of ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def _first_tensor(folder: Path, names: tuple[str, ...], what: str) -> torch.Tensor:
    files = tensor_files(folder)
    for name in names:
        if name in files:
            with safe_open(files[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    raise TeacherError(
        f"{folder}: the checkpoint has no {what}: none of {', '.join(names)} among its {len(files)} tensors. "
        "Is it a LLaVA checkpoint in safetensors, with an unquantised output head?"
    )


def _hub_name(name: str) -> str:
    for prefix in ("vision_tower.", "model.vision_tower."):
        if name.startswith(prefix) and not name.startswith(f"{prefix}vision_model."):
            return f"{prefix}vision_model.{name.removeprefix(prefix)}"
    return name


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors' entries of a safetensors file (``__metadata__`` left out), and where the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _rewrite_header(path: Path) -> None:
    header, start = _read_header(path)
    named = {"__metadata__": {"format": "pt"}, **{_hub_name(name): entry for name, entry in header.items()}}
    text = json.dumps(named, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as safetensors writes them
    partial = path.with_name(f"{path.name}.renamed")
    with path.open("rb") as old, partial.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        old.seek(start)
        shutil.copyfileobj(old, new, 16 << 20)
        new.flush()
        os.fsync(new.fileno())
    partial.replace(path)


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.renamed")
    partial.write_bytes(content)
    partial.replace(path)
