"""Students: put together from parts, or cut out of a teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines.tiny.models import vision_config
from student_train.config import LossSpec, StudentConfig
from student_train.evaluate import preprocessor_of
from student_train.student import load_student
from student_train.trainer import fit
from teacher_cache.config import ConfigError
from teacher_cache.images import image_tokens_of
from teacher_cache.tokenization import image_token_id, tokenizer_fingerprint
from tests.online import TEACHER, fit_config

WORDS = 60


def save_language(folder: Path, *, tied: bool = False) -> Any:
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)) if tied else None
    model = model or LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=["<s>", "</s>", "<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator(["what colour is the square", "red"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return model


def save_tower(folder: Path, *, siglip: bool = False) -> Any:
    torch.manual_seed(1)
    plain = vision_config()
    sizes = {n: getattr(plain, n) for n in ("hidden_size", "image_size", "patch_size", "num_hidden_layers")}
    config = SiglipVisionConfig(**sizes, intermediate_size=128, num_attention_heads=2)
    model: Any = SiglipVisionModel(config) if siglip else CLIPVisionModel(plain)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(do_resize=False, do_center_crop=False).save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("siglip", [False, True])
def test_composed_student_has_the_weights_of_its_parts(tmp_path: Path, tied: bool, siglip: bool) -> None:
    language = save_language(tmp_path / "language", tied=tied)
    tower = save_tower(tmp_path / "tower", siglip=siglip)
    config = StudentConfig(language_model=str(tmp_path / "language"), vision_tower=str(tmp_path / "tower"))
    model, processor = load_student(config, seed=0)
    token = image_token_id(processor.tokenizer)
    assert model.config.image_token_id == token
    found = model.state_dict()
    for name, weight in language.get_decoder().state_dict().items():
        assert torch.equal(found[f"model.language_model.{name}"][: len(weight)], weight), name
    assert torch.equal(model.get_output_embeddings().weight[:WORDS], language.get_output_embeddings().weight)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    parts = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, parts[name.removeprefix("vision_model.")]), name
    assert image_tokens_of(model.config) == 4  # a class token is CLIP's, and is dropped
    pixels = torch.zeros(1, 3, 32, 32)
    ids = torch.tensor([[1, token, token, token, token, 5]])
    assert model(input_ids=ids, pixel_values=pixels).logits.shape == (1, 6, model.config.text_config.vocab_size)
    assert preprocessor_of(model, processor).image_tokens == 4


def test_projector_of_a_composed_student_follows_from_the_seed(tmp_path: Path) -> None:
    save_language(tmp_path / "language")
    save_tower(tmp_path / "tower")
    config = StudentConfig(language_model=str(tmp_path / "language"), vision_tower=str(tmp_path / "tower"))
    first, again, other = (load_student(config, seed)[0].model.multi_modal_projector for seed in (0, 0, 1))
    assert torch.equal(first.linear_1.weight, again.linear_1.weight)
    assert not torch.equal(first.linear_1.weight, other.linear_1.weight)


def test_composed_student_with_its_teachers_tokenizer_trains_on_its_cache_and_exports(tmp_path: Path) -> None:
    save_language(tmp_path / "language")
    save_tower(tmp_path / "tower")
    student = StudentConfig(
        language_model=str(tmp_path / "language"), vision_tower=str(tmp_path / "tower"), tokenizer=str(TEACHER)
    )
    config = fit_config(
        [LossSpec("cross_entropy"), LossSpec("forward_kl", source="exact")], tmp_path / "run", max_steps=1
    )
    summary = fit(dataclasses.replace(config, student=student), "quiet")
    teacher = LlavaForConditionalGeneration.from_pretrained(TEACHER)
    model, processor = load_student(StudentConfig(model=summary.model), 0)
    assert model.config.text_config.vocab_size == teacher.config.text_config.vocab_size
    assert tokenizer_fingerprint(processor.tokenizer) == tokenizer_fingerprint(
        load_student(StudentConfig(model=str(TEACHER)), 0)[1].tokenizer
    )


@pytest.mark.parametrize(("layers", "taken"), [(0, [0, 2]), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_cut_student_starts_from_every_nth_layer_and_everything_else(layers: int, taken: list[int]) -> None:
    """Half of four layers are 0 and 2: DistilBERT takes every other one."""
    teacher = LlavaForConditionalGeneration.from_pretrained(TEACHER)
    student, _ = load_student(StudentConfig(layers_from=str(TEACHER), layers=layers), 0)
    assert student.config.text_config.num_hidden_layers == len(taken)
    mine, theirs = student.state_dict(), teacher.state_dict()
    for number, source in enumerate(taken):
        part = f"model.language_model.layers.{source}."
        for name in (n for n in theirs if n.startswith(part)):
            assert torch.equal(mine[name.replace(part, f"model.language_model.layers.{number}.")], theirs[name])
    for name in theirs:
        if ".language_model.layers." not in name:
            assert torch.equal(mine[name], theirs[name]), name
    assert [layer.self_attn.layer_idx for layer in student.model.language_model.layers] == list(range(len(taken)))


def test_wrong_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs both language_model and vision_tower"):
        load_student(StudentConfig(language_model="somewhere"), 0)
    with pytest.raises(ConfigError, match="the teacher has 4 layers"):
        load_student(StudentConfig(layers_from=str(TEACHER), layers=5), 0)
    with pytest.raises(ConfigError, match="4-bit weights cannot be trained"):
        load_student(StudentConfig(model=str(TEACHER), load_in_4bit=True), 0)
    with pytest.raises(ConfigError, match="not a LLaVA folder"):
        load_student(StudentConfig(model=str(tmp_path)), 0)
