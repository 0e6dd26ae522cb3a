"""Tiny LLaVA models: configuration, an initialisation that learns in minutes, and saving under the hub's names."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from pipelines.tiny.scenes import CELL, IMAGE_SIDE
from pipelines.tiny.tokenizer import BOS, EOS, IMAGE, IMAGE_TOKENS, PAD, build_processor, vocabulary
from teacher_cache.models.pretrained import load_llava as load_llava_folder
from teacher_cache.models.weights import rename_vision_weights

HEAD_WIDTH = 32  # the narrowest head that vLLM's CPU attention knows
EMBEDDING_STD = 0.5
QUERY_SCALE = 0.75


def vision_config() -> CLIPVisionConfig:
    """A CLIP tower of 64 channels whose 16-pixel patches are the world's four cells."""
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=CELL,
        projection_dim=64,
    )


def llava_config(*, hidden_size: int, layers: int, head_width: int = HEAD_WIDTH) -> LlavaConfig:
    """LLaVA with the tiny tower; rows up to a multiple of 8 pad the vocabulary and are never trained as targets."""
    words = vocabulary()
    text = LlamaConfig(
        vocab_size=math.ceil(len(words) / 8) * 8,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // head_width,
        num_key_value_heads=hidden_size // head_width,
        head_dim=head_width,
        max_position_embeddings=512,
        # Nearly position-free attention: looking up a word by what it is comes first, its distance second.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        pad_token_id=words.index(PAD),
        bos_token_id=words.index(BOS),
        eos_token_id=words.index(EOS),
    )
    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=words.index(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype="float32",
    )


def build_llava(config: LlavaConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """An untrained model, float32, whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        initialize(model)
    return model.float().eval()


def initialize(model: nn.Module) -> None:
    """Weights of variance 1 / fan-in, and keys that start as the queries.

    Transformers' 0.02 suits wide models; at width 128 signals vanish. Equal query and key maps make a head attend to
    what resembles its input from the first step on, and looking words up is all that the tiny world asks for.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and "embed_tokens" in name:
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
    for module in model.modules():
        if hasattr(module, "q_proj") and hasattr(module, "k_proj"):
            with torch.no_grad():
                module.q_proj.weight.mul_(QUERY_SCALE)
                module.k_proj.weight.copy_(module.q_proj.weight)


def save_llava(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a Hugging Face folder: fp16 weights under the hub's names, config, tokenizer and processor.

    Half precision halves the file, not the speed: the config says float32, in which Transformers then computes.
    """
    half = copy.deepcopy(model).half()
    text = half.config.text_config
    half.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    half.save_pretrained(folder)
    rename_vision_weights(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    build_processor().save_pretrained(folder)


def load_llava(folder: Path) -> LlavaForConditionalGeneration:
    """Read a saved folder, in float32, ready to answer."""
    model: LlavaForConditionalGeneration = load_llava_folder("model", str(folder), dtype=torch.float32)
    return model.eval()
