"""A model's configuration without its weights: from its folder, from those shipped beside the pipelines, or the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from teacher_cache.errors import ConfigError


def load_model_config(name: str, revision: str = "", setting: str = "model") -> Any:
    """The Transformers configuration of ``name``, a folder or a hub name; no code of it runs.

    A hub name is looked up by its last part among the shipped ``pipelines/models/*/config.json`` first, so that plans
    need no network.

    Raises ``ConfigError``: where neither has it; says where to put one.
    """
    from teacher_cache.models.pretrained import ModelError, read_config

    folder = Path(name)
    if not (folder / "config.json").is_file():
        shipped = shipped_models() / folder.name
        if (shipped / "config.json").is_file():
            return read_config(setting, str(shipped))
    try:
        return read_config(setting, name, revision)
    except ModelError as error:
        raise ConfigError(
            f"{error}. Give a folder with the model's config.json, or put it into {shipped_models()}/{folder.name}/; "
            "weights are not needed"
        ) from error


def position_limit(model: Any) -> int | None:
    """Positions of the language model in a Transformers configuration; None for a model that has no limit.

    Beyond them rotary positions were never trained, and learned ones do not exist.
    """
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit and limit > 0 else None


def fixed_side(model: Any) -> int | None:
    """Pixels of a side of the one size that the vision tower in a Transformers configuration takes: CLIP and SigLIP
    have learned positions for it alone. None where it takes others too."""
    vision = getattr(model, "vision_config", None)
    fixed = getattr(vision, "model_type", "") in ("clip_vision_model", "siglip_vision_model")
    return int(vision.image_size) if vision is not None and fixed else None


def other_size(pixels: Any, side: int | None) -> str:
    """What is wrong with the size of ``pixels`` (…, H, W) for a tower of ``side``, or an empty text: a processor that
    does not resize (``do_resize``) hands out pictures as large as they are."""
    if pixels is None or side is None or tuple(pixels.shape[-2:]) == (side, side):
        return ""
    height, width = pixels.shape[-2:]
    return (
        f"the image processor makes {width} x {height} pixels of an image, and the vision tower takes {side} x {side}. "
        "Set do_resize and size in the folder's processor settings, or give images of that size"
    )


def shipped_models() -> Path:
    """``pipelines/models``: found as data, nothing of it is imported."""
    spec = importlib.util.find_spec("pipelines")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0] if places else "pipelines") / "models"
