"""How a LLaVA-1.5 student reads what a LLaVA-1.5 teacher read: the cached ids, each image N positions of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage

from student_train.students.lines import Ints, Line
from student_train.students.processor import own_image_mode
from teacher_cache.data.conversations import Image
from teacher_cache.data.images import image_tokens_of, load_image, square
from teacher_cache.errors import CacheError
from teacher_cache.models.chat import Chat
from teacher_cache.models.model_config import other_size


@dataclass
class Preprocessor:
    """How the student sees images: taken from its own processor. ``chat``: how plain data are written for it."""

    chat: Chat
    image_processor: Any
    tokenizer: Any
    image_mode: str
    image_token: int
    image_tokens: int
    pad: int
    image_size: int
    """Pixels of a side of what the tower looks at."""

    def line(self, sample: int, input_ids: Ints, loss_mask: Any, fields: Mapping[str, torch.Tensor]) -> Line:
        """A cached sample, whose images have one placeholder each."""
        runs = int(np.count_nonzero(input_ids == self.image_token))
        return Line(sample, input_ids, loss_mask, np.full(runs, self.image_tokens), self.image_token, fields)

    def blank(self) -> torch.Tensor:
        """(3, H, W): what stands in for an image that cannot be read."""
        return torch.zeros(3, self.image_size, self.image_size)

    def pixels(self, image: Image, folder: str) -> torch.Tensor:
        """(3, H, W) float32.

        Raises ``ImageError``; ``CacheError``: it is of another size than the tower takes.
        """
        pixels = self._pixels(load_image(image, folder))
        if wrong := other_size(pixels, self.image_size):
            raise CacheError(f"{image.image_id}: {wrong}")
        return pixels

    def _pixels(self, image: PillowImage.Image) -> torch.Tensor:
        shown = square(image, tuple(self.image_processor.image_mean), self.image_mode)
        pixels: torch.Tensor = self.image_processor([shown], return_tensors="pt")["pixel_values"][0]
        return pixels


def preprocessor_of(config: Any, processor: Any, chat: Chat) -> Preprocessor:
    """The student's own preprocessing, by its configuration and processor."""
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    return Preprocessor(
        chat=chat,
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_mode=own_image_mode(image_processor),
        image_token=chat.image_token,
        image_tokens=image_tokens_of(config),
        pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        image_size=config.vision_config.image_size,
    )
