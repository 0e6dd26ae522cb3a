"""A LLaVA world of any size with random weights: photographs of noise, conversations of random words, real files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


@dataclass(frozen=True)
class Llm:
    width: int
    layers: int
    inner: int
    heads: int


@dataclass(frozen=True)
class Tower:
    """A CLIP tower on images of ``side`` pixels: (side / patch)² image tokens."""

    width: int
    layers: int
    heads: int
    side: int
    patch: int

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


@dataclass(frozen=True)
class WorldSize:
    """``samples`` conversations of one turn, ``question`` and ``answer`` words long (give or take a quarter), each
    with an image of its own of 640 × 480 pixels."""

    vocabulary: int
    samples: int
    question: int
    answer: int


def write_data(folder: Path, size: WorldSize) -> None:
    """``images/*.jpg`` and ``data.json``."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(size.samples):
        coarse = random.integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(folder / "images" / f"{number}.jpg", quality=90)
        question, answer = (_words(random, size.vocabulary, n) for n in (size.question, size.answer))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        samples.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples), encoding="utf-8")


def write_model(folder: Path, llm: Llm, tower: Tower, vocabulary: int, dtype: torch.dtype, device: str) -> int:
    """A LLaVA folder with random weights and its processor; returns its parameters, the tower's left out."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=llm.width,
            intermediate_size=llm.inner,
            num_hidden_layers=llm.layers,
            num_attention_heads=llm.heads,
            num_key_value_heads=llm.heads,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=tower.width,
            intermediate_size=4 * tower.width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.side,
            patch_size=tower.patch,
            projection_dim=tower.width,
        ),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=tower.tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    _processor(vocabulary, tower).save_pretrained(folder)
    return sum(p.numel() for n, p in model.named_parameters() if "vision_tower" not in n)


def _words(random: np.random.Generator, vocabulary: int, length: int) -> str:
    count = int(random.integers(length - length // 4, length + length // 4 + 1))
    return " ".join(f"w{i}" for i in random.integers(0, vocabulary - len(SPECIAL) - 2, count))


def _processor(vocabulary: int, tower: Tower) -> LlavaProcessor:
    words = [*SPECIAL, "USER:", "ASSISTANT:", *(f"w{i}" for i in range(vocabulary - len(SPECIAL) - 2))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    side = {"height": tower.side, "width": tower.side}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": tower.side}, crop_size=side),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
            padding_side="left",
            clean_up_tokenization_spaces=False,
        ),
        patch_size=tower.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
