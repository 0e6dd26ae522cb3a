"""What a model says, scored our way, for every family of the list: tiny random models, real classes and processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from teacher_cache.data.conversations import Conversation
from teacher_cache.data.conversations import Image as Shown
from teacher_cache.data.logit_rule import AS_THEY_ARE, LogitRule
from teacher_cache.errors import TeacherError
from teacher_cache.models.chat import Chat, Sample
from teacher_cache.models.collate import Fields, collate, per_token, to_model
from teacher_cache.models.generation import Decoding, forward, generate, plain_generation
from teacher_cache.models.parts import lora_targets, media_tokens, parts_of
from teacher_cache.models.pretrained import ModelError, load_model, read_processor, read_tokenizer
from teacher_cache.models.probe import answered, probe
from tests.fixtures.families import FAMILIES, QWEN, QWEN_EYES, QWEN_NAMES, QWEN_VISION, Family, make_family
from tests.fixtures.rounding import MODEL, rounding

UNLISTED = (
    Family(
        "aya_vision", "aya_vision", "bytes 370",
        (*FAMILIES["cohere2"].control, "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
         "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"),
        "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", True, {}, "llava", {}, {"model_type": "cohere2", "logit_scale": 1.0},
        {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7},
        {"downsample_factor": 2, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"image_token_index": "<|IMG_PATCH|>"}, "AyaVisionProcessor",
        {"patch_size": 7, "img_size": 28, "downsample_factor": 2},
        {"image_processor": ("GotOcr2ImageProcessor",
                             {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 4})},
    ),
    Family(
        "glm4v", "glm4v", "bytes 400", (*QWEN, *QWEN_EYES, "<|begin_of_video|>", "<|end_of_video|>"), "<|im_end|>", "",
        False, QWEN_NAMES, "qwen2_vl", {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                             "mrope_section": [1, 1, 0]}},
        {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "image_size": 28}, {},
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
         "image_start_token_id": "<|vision_start|>", "image_end_token_id": "<|vision_end|>",
         "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>"},
        "Glm4vProcessor", {},
        {"image_processor": ("Glm4vImageProcessor",
                             {"size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 56 * 84 * 2}}),
         "video_processor": ("Glm4vVideoProcessor", {})},
    ),
    Family(
        "lfm2_vl", "lfm2_vl", "bytes 400",
        (*QWEN, "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"), "<|im_end|>", "", False,
        {"image_token": "<image>"}, "smolvlm", {}, {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"model_type": "siglip2_vision_model", "patch_size": 7, "num_patches": 256}, {"downsample_factor": 2},
        {"image_token_id": "<image>"}, "Lfm2VlProcessor", {},
        {"image_processor": ("Lfm2VlImageProcessor",
                             {"tile_size": 28, "max_image_tokens": 16, "min_image_tokens": 4, "encoder_patch_size": 7,
                              "downsample_factor": 2, "do_image_splitting": False})},
    ),
)  # fmt: skip
"""Families that no line of the code and of the list has heard of."""
EVERY = {**FAMILIES, **{family.name: family for family in UNLISTED}}
ANSWER = 6


@dataclass
class Loaded:
    """A family's model and what reads for it."""

    family: Family
    folder: Path

    @cached_property
    def model(self) -> Any:
        return load_model("teacher.model", str(self.folder), dtype=torch.float32).eval()

    @cached_property
    def processor(self) -> Any:
        read = read_processor if self.family.sees else read_tokenizer
        return read("teacher.model", str(self.folder))

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def rule(self) -> LogitRule:
        return LogitRule.of(self.model.config)

    def prompt(self, question: str, *images: Image.Image) -> dict[str, Any]:
        """What the processor itself writes for a question about ``images``."""
        shown = [{"type": "image", "image": image} for image in images]
        content = [*shown, {"type": "text", "text": question}] if self.family.sees else question
        made = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            **self.family.template_kwargs,
        )
        return dict(made)

    @cached_property
    def prompts(self) -> list[dict[str, torch.Tensor]]:
        """Samples of different lengths: one image, none, two of other sizes; text where it must."""
        asked: list[dict[str, Any]] = [
            self.prompt("What is in this picture?", *self._images(0)),
            self.prompt("What color is the large square on the left, and is it red or is it blue?"),
            self.prompt("Is it large?", *self._images(1, 2)),
        ]
        return [{n: f[0] if per_token(n) else f for n, f in made.items() if n != "attention_mask"} for made in asked]

    def _images(self, *numbers: int) -> list[Image.Image]:
        return [picture(number) for number in numbers] if self.family.sees else []

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.rule.apply(states @ self.model.get_output_embeddings().weight.T)

    @torch.inference_mode()
    def written(self) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """The prompts with what the model writes behind them, and the logits (B, A, V) that it wrote them from."""
        with plain_generation(self.model):
            out = self.model.generate(
                **to_model(collate(self.prompts, self.pad, "left"), self.model),
                max_new_tokens=ANSWER,
                do_sample=False,
                pad_token_id=self.pad,
                suppress_tokens=list(media_tokens(self.model.config)) or None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = out.sequences[:, -ANSWER:]
        whole = [answered(sample, answer) for sample, answer in zip(self.prompts, ids, strict=True)]
        return whole, torch.stack(out.logits, 1)


def picture(number: int) -> Image.Image:
    """Noise, so that every pixel is seen to matter; sizes that are not square."""
    height, width = ((56, 56), (40, 90), (84, 50))[number]
    noise = np.random.default_rng(number).integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    made: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        if "video_processor" in EVERY[name].parts or name == "lfm2_vl":
            pytest.importorskip("torchvision", reason="its processor needs the extra vlm")
        if name not in made:
            made[name] = Loaded(EVERY[name], make_family(EVERY[name], tmp_path_factory.mktemp(name)))
        return made[name]

    return load


@pytest.fixture(params=EVERY)
def loaded(request: pytest.FixtureRequest, folders: Callable[[str], Loaded]) -> Loaded:
    return folders(request.param)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in roundings of a pass through a tiny model."""
    scale = max(1.0, float(other.abs().max()))
    return float((one - other).abs().max()) / (scale * rounding(operations=MODEL))


@torch.inference_mode()
def test_rows_of_one_scoring_pass_are_the_logits_of_generation_and_one_position_late_they_are_not(
    loaded: Loaded,
) -> None:
    whole, raw = loaded.written()
    states = forward(loaded.model, whole, loaded.pad).last_hidden_state
    for sample, line, expected in zip(whole, states, raw, strict=True):
        end = len(sample["input_ids"])
        rows, late = (loaded.logits(line[end - ANSWER + shift - 1 : end + shift - 1]) for shift in (0, 1))
        assert far(rows, expected) < 1
        assert far(late, expected) > 10


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_what_chat_shows_is_scored_as_it_was_answered(name: str, folders: Callable[[str], Loaded]) -> None:
    """Two turns, an image inside the second: each row's most likely id is the answer's token, one position late not."""
    loaded = folders(name)
    template = "vicuna_v1" if name == "llava" else ""  # the hub's has no end token
    chat = Chat(loaded.processor, loaded.model.config, (), template, loaded.family.template_kwargs)
    seen = (Shown("a", "a"),) if loaded.family.sees else ()
    second = "Is the <image> thing large?" if seen else "Is it large?"
    conversation = Conversation("1", ("Are you there?", second), ("", ""), seen)
    never = media_tokens(loaded.model.config)
    how, given, late = Decoding(chat.end, loaded.pad, ANSWER, never), list[tuple[int, ...]](), list[bool]()
    for _ in conversation.questions:
        asked = chat.sample(conversation, given, [picture(1)] if seen else [], ask=True)
        (ids,) = generate(loaded.model, [fields(asked)], how)
        assert ids
        given.append(tuple(ids))
        whole = chat.sample(conversation, given, [picture(1)] if seen else [])
        states = forward(loaded.model, [fields(whole)], loaded.pad).last_hidden_state[0]
        logits = loaded.logits(states).index_fill(1, torch.tensor(never, dtype=torch.int64), -torch.inf)
        rows = np.flatnonzero(whole.loss_mask)[-len(ids) :] - 1
        assert logits[rows].argmax(-1).tolist() == ids
        late.append(logits[rows + 1].argmax(-1).tolist() != ids)
    assert any(late)


def fields(sample: Sample) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(sample.input_ids), **sample.model}


@torch.inference_mode()
def test_a_batch_is_each_sample_alone_as_its_processor_wrote_it(loaded: Loaded) -> None:
    """The reference is the model called with the processor's output, no code of ours; padded, and token types kept."""
    together = forward(loaded.model, loaded.prompts, loaded.pad).last_hidden_state
    for sample, states in zip(loaded.prompts, together, strict=True):
        made = {name: field[None] if per_token(name) else field for name, field in sample.items()}
        alone = loaded.model.base_model(**to_model(made, loaded.model), use_cache=False).last_hidden_state[0]
        assert far(states[: len(alone)], alone) < 1


@torch.inference_mode()
def test_token_types_matter_where_a_processor_writes_them(folders: Callable[[str], Loaded]) -> None:
    """So that the test above would notice where they are dropped: these models run on without them, and are wrong."""
    for name in ("qwen2_5_vl", "gemma3"):
        loaded = folders(name)
        (sample, *_) = loaded.prompts
        bare = {field: value for field, value in sample.items() if not field.endswith("token_type_ids")}
        assert bare.keys() != sample.keys()
        kept, dropped = (forward(loaded.model, [s], loaded.pad).last_hidden_state for s in (sample, bare))
        assert far(dropped, kept) > 10


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_does_not_depend_on_its_batch(loaded: Loaded, temperature: float) -> None:
    never = media_tokens(loaded.model.config)
    end = loaded.tokenizer.convert_tokens_to_ids(loaded.family.end)
    how = Decoding(end, loaded.pad, 2 * ANSWER, never, temperature, 0.9)
    together = generate(loaded.model, loaded.prompts, how, [1, 2, 3])
    alone = [generate(loaded.model, [s], how, [seed])[0] for s, seed in zip(loaded.prompts, (1, 2, 3), strict=True)]
    assert together == alone
    if temperature:
        assert generate(loaded.model, loaded.prompts, how, [4, 5, 6]) != together


def test_every_family_passes_the_probe(loaded: Loaded) -> None:
    for sample in loaded.prompts[:2]:
        probe("teacher.model", "x", loaded.model, sample, loaded.pad, loaded.rule)


@pytest.mark.parametrize("name", ["gemma2", "gemma4", "granite", "cohere2"])
def test_without_its_logit_rule_a_model_is_refused(name: str, folders: Callable[[str], Loaded]) -> None:
    loaded = folders(name)
    assert loaded.rule != AS_THEY_ARE
    with pytest.raises(TeacherError, match=r"with its logit rule, is not the model's own logit: .* allowed difference"):
        probe("teacher.model", "x", loaded.model, loaded.prompts[1], loaded.pad, AS_THEY_ARE)


def test_a_penalty_of_the_folders_own_is_not_applied(folders: Callable[[str], Loaded]) -> None:
    """A greedy answer is the most likely id of its rows, whatever ``generation_config.json`` would have."""
    loaded = folders("llama3")
    how = Decoding(-1, loaded.pad, 2 * ANSWER)
    expected = generate(loaded.model, loaded.prompts, how)
    own = loaded.model.generation_config
    loaded.model.generation_config = replace_settings(own, repetition_penalty=50.0, do_sample=True, temperature=9.0)
    try:
        assert generate(loaded.model, loaded.prompts, how) == expected
        assert loaded.model.generation_config.repetition_penalty == 50.0
    finally:
        loaded.model.generation_config = own


def replace_settings(config: Any, **settings: Any) -> Any:
    return type(config)(**{**config.to_diff_dict(), **settings})


def test_every_parameter_has_its_part(loaded: Loaded) -> None:
    """Decoder, head, tower, projector and bare parameters are all there is; LoRA goes to the decoder alone."""
    model, parts = loaded.model, parts_of(loaded.model)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    owners = [parts.decoder, head, *parts.projector, *parts.parameters, *([parts.tower] if parts.tower else [])]
    for name, _ in model.named_parameters():
        assert any(name == owner or name.startswith(f"{owner}.") for owner in owners), name
    assert bool(parts.tower) == bool(parts.projector) == loaded.family.sees
    targets = lora_targets(model)
    assert targets
    assert all(name.startswith(f"{parts.decoder}.") for name in targets)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in targets)


def test_what_a_row_needs_is_refused_where_it_is_not_there(folders: Callable[[str], Loaded], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DiffusionGemmaConfig

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    t5 = AutoConfig.for_model("t5", vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    bias = AutoConfig.for_model("phi", **sizes, num_attention_heads=2)
    for name, make in {
        "has no class that reads images and text, or text, and writes text": lambda f: (
            AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(f)
        ),
        "whose output head has a bias": lambda f: AutoModelForCausalLM.from_config(bias).save_pretrained(f),
        "writes by diffusion": lambda f: DiffusionGemmaConfig().save_pretrained(f),
    }.items():
        folder = tmp_path / name[:9]
        make(folder)
        with pytest.raises((ModelError, TeacherError), match=name):
            load_model("teacher.model", str(folder))


def test_fields_are_padded_on_their_side_and_joined_on_their_first_axis() -> None:
    def sample(ids: list[int], tiles: int, types: bool = True) -> Fields:
        found = {"input_ids": torch.tensor(ids), "pixel_values": torch.full((1, tiles, 2), float(tiles))}
        return {**found, "mm_token_type_ids": torch.ones(len(ids), dtype=torch.int64)} if types else found

    batch = collate([sample([5, 6, 7], 1), sample([8], 3, types=False)], 9, "left")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["mm_token_type_ids"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch["pixel_values"].shape == (2, 3, 2)
    assert batch["pixel_values"][0].tolist() == [[1, 1], [0, 0], [0, 0]]
    right = collate([sample([5, 6, 7], 1), sample([8], 3)], 9, "right")
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert right["mm_token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
