"""Students: put together from parts, or cut out of a teacher."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines.tiny.models import vision_config
from student_train.config import FitConfig, LossSpec, SourceConfig, StudentConfig
from student_train.evaluation.answers import Student
from student_train.students.chat_reader import make_chat
from student_train.students.export import export_run, save_student
from student_train.students.on_meta import student_on_meta
from student_train.students.preprocessor import Preprocessor, preprocessor_of
from student_train.students.reader import prepare_reader
from student_train.students.student import load_student
from student_train.studies.run_plan import plan_fit
from student_train.training.trainer import Run, fit
from teacher_cache.config import SignalsConfig
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.conversations import Image as ConversationImage
from teacher_cache.data.images import image_tokens_of, square
from teacher_cache.data.vocabulary import tokenizer_fingerprint
from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.models.chat import CAPTIONS
from tests.fixtures.online import TEACHER, build, fit_config, student_folder

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
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
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
    chat = make_chat(model, processor, "vicuna_v1")
    assert preprocessor_of(model.config, processor, chat).image_tokens == 4


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


def test_cut_layers_keep_their_kind_of_attention(tmp_path: Path) -> None:
    """Sliding and full attention take turns: every other layer of this teacher is a sliding one."""
    config = LlavaConfig.from_pretrained(TEACHER)
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {"vocab_size": config.text_config.vocab_size, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    config.text_config = Qwen2Config(**text, **heads, use_sliding_window=True, sliding_window=8, layer_types=kinds)
    shutil.copytree(TEACHER, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "teacher")
    wanted = StudentConfig(layers_from=str(tmp_path / "teacher"), layers=2)
    student, _ = load_student(wanted, 0)
    assert student.config.text_config.layer_types == ["sliding_attention"] * 2
    assert student_on_meta(wanted).config.text_config.layer_types == ["sliding_attention"] * 2


def test_wrong_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs both language_model and vision_tower"):
        load_student(StudentConfig(language_model="somewhere"), 0)
    with pytest.raises(ConfigError, match="the teacher has 4 layers"):
        load_student(StudentConfig(layers_from=str(TEACHER), layers=5), 0)
    with pytest.raises(ConfigError, match="4-bit weights cannot be trained"):
        load_student(StudentConfig(model=str(TEACHER), load_in_4bit=True), 0)
    with pytest.raises(ConfigError, match="no model configuration can be read"):
        load_student(StudentConfig(model=str(tmp_path)), 0)


def chatml_student(folder: Path) -> StudentConfig:
    """Parts whose tokenizer has ChatML's tokens, and Qwen's template: content as a string alone."""
    save_language(folder / "language")
    save_tower(folder / "tower")
    tokenizer = AutoTokenizer.from_pretrained(folder / "language")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder / "language")
    return StudentConfig(language_model=str(folder / "language"), vision_tower=str(folder / "tower"))


@pytest.mark.parametrize("begins", [False, True], ids=["", "the tokenizer writes <s> by itself"])
@pytest.mark.parametrize("name", ["vicuna_v1", "chatml", "plain"])
def test_exported_chat_template_writes_what_the_student_was_trained_on(tmp_path: Path, name: str, begins: bool) -> None:
    """A string or parts, with and without an image, over two turns: the ids of the training's ``Chat``."""
    model, processor = load_student(chatml_student(tmp_path), 0)
    if begins:
        processor.tokenizer.add_bos_token = True
    source, student = SourceConfig(data="none"), StudentConfig(chat_template=name)
    reader, _ = prepare_reader(model, processor, FitConfig("out", (source,), student))
    assert isinstance(reader, Preprocessor)
    chat = reader.chat
    processor.save_pretrained(tmp_path / "exported")
    exported = AutoProcessor.from_pretrained(tmp_path / "exported", backend="pil")
    blank = Image.new("RGB", (32, 32))
    asked, answered = ("what colour", "is it red"), ("red ", "the square")
    for image, turns in [(None, 1), (ConversationImage("0.png"), 1), (ConversationImage("0.png"), 2)]:
        conversation = Conversation.with_image("a", asked[:turns], answered[:turns], image)
        answers = [chat.original(a) for a in answered[: turns - 1]]
        expected, _ = chat.unexpanded(conversation, answers, ask=True)
        text = exported.apply_chat_template(
            messages(asked, answered, turns, image is not None), add_generation_prompt=True
        )
        begin = exported.tokenizer.bos_token  # as apply_chat_template(tokenize=True) decides
        ids = exported(text=text, images=[blank] if image else None, add_special_tokens=not text.startswith(begin))
        expanded = np.repeat(expected, np.where(np.array(expected) == chat.image_token, 4, 1))
        assert list(ids["input_ids"][0]) == expanded.tolist(), text
        if not image and name not in CAPTIONS:
            plain = [{"role": "user", "content": asked[0]}]
            assert exported.apply_chat_template(plain, add_generation_prompt=True) == text
    with pytest.raises(jinja2.TemplateError, match="only the roles user and assistant are known"):
        exported.apply_chat_template([{"role": "system", "content": "be brief"}])


def messages(asked: Sequence[str], answered: Sequence[str], turns: int, image: bool) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for turn in range(turns):
        if turn:
            out.append({"role": "assistant", "content": [{"type": "text", "text": answered[turn - 1]}]})
        shown = [{"type": "image"}] if image and not turn else []
        out.append({"role": "user", "content": [*shown, {"type": "text", "text": asked[turn]}]})
    return out


def test_generation_of_an_exported_student_stops_at_its_templates_end(tmp_path: Path) -> None:
    model, processor = load_student(chatml_student(tmp_path), 0)
    end = make_chat(model, processor, "chatml").end
    save_student(model, processor, tmp_path / "exported", [end])
    found = GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id
    assert found == processor.tokenizer.convert_tokens_to_ids("<|im_end|>") != processor.tokenizer.eos_token_id


def cropping_student(folder: Path) -> StudentConfig:
    """Composed, with the processor of OpenAI's CLIP: the centre is cut out."""
    save_language(folder / "language")
    save_tower(folder / "tower")
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "tower")
    return StudentConfig(
        language_model=str(folder / "language"), vision_tower=str(folder / "tower"), tokenizer=str(TEACHER)
    )


@functools.cache
def cache_of(mode: Literal["pad", "crop"]) -> str:
    """A cache of the tiny world whose teacher saw images in this mode."""
    return build(SignalsConfig(preset="full", top_k=8, hidden="text", visual="states"), mode, max_samples=8)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_student_sees_images_as_the_caches_teacher_did_and_its_export_shows_them_so(
    tmp_path: Path, mode: Literal["pad", "crop"]
) -> None:
    """By itself CLIP's processor cuts the ends off a wide image; the export loads in plain Transformers."""
    config = fit_config([LossSpec("cross_entropy")], tmp_path / "run", cache=cache_of(mode), max_steps=1)
    config = dataclasses.replace(config, student=cropping_student(tmp_path))
    run = Run.prepare(config)
    exported = AutoProcessor.from_pretrained(run_and_export(run, tmp_path), backend="pil")
    colours = np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8)
    wide = Image.fromarray(colours)
    clip = AutoImageProcessor.from_pretrained(tmp_path / "tower", backend="pil")
    expected = clip([square(wide, tuple(clip.image_mean), mode)], return_tensors="pt")["pixel_values"]
    for processor in (run.processor, exported):
        assert torch.equal(processor.image_processor([wide], return_tensors="pt")["pixel_values"], expected)
    wide.save(tmp_path / "wide.png")
    shown = run.dataset.reader
    assert isinstance(shown, Preprocessor)
    assert torch.equal(shown.pixels(ConversationImage("wide.png", path="wide.png"), str(tmp_path)), expected[0])
    asked = Conversation("a", ("<image>what",), ("red",), (ConversationImage("wide.png", path="wide.png"),))
    prompt = Student.load(run_and_export(run, tmp_path)).reader.prompt(asked, [wide])
    assert torch.equal(prompt["pixel_values"], expected)
    card = export_run(tmp_path / "run", tmp_path / "card") / "README.md"
    assert ("padded to a square" in card.read_text(encoding="utf-8")) == (mode == "pad")


def run_and_export(run: Run, folder: Path) -> Path:
    if not (folder / "run" / "model").is_dir():
        run.train("quiet")
        run.finish()
    return folder / "run" / "model"


def test_losses_on_image_positions_refuse_a_student_that_sees_other_parts_of_the_image(tmp_path: Path) -> None:
    for loss in (LossSpec("hidden_mse", tokens="all"), LossSpec("visual_kl"), LossSpec("attention_mse")):
        config = fit_config([loss], tmp_path / "run", cache=cache_of("pad"))
        config = dataclasses.replace(config, student=dataclasses.replace(config.student, image_mode="crop"))
        with pytest.raises(CacheError, match=f"image_mode=pad, the student sees them with crop.*{loss.name}"):
            Run.prepare(config)
        with pytest.raises(CacheError, match="image_mode=pad, the student sees them with crop"):
            plan_fit(config)
    Run.prepare(dataclasses.replace(config, losses=(LossSpec("hidden_mse"),)))


def test_caches_of_two_image_modes_need_a_choice(tmp_path: Path) -> None:
    config = fit_config([LossSpec("forward_kl")], tmp_path / "run", cache=cache_of("pad"))
    both = (*config.sources, dataclasses.replace(config.sources[0], cache=cache_of("crop")))
    with pytest.raises(ConfigError, match=r"several ways .*pad.*crop.*Set student\.image_mode"):
        Run.prepare(dataclasses.replace(config, sources=both))
    student = dataclasses.replace(config.student, image_mode="pad")
    Run.prepare(dataclasses.replace(config, sources=both, student=student))


def test_a_picture_of_another_size_than_the_students_tower_takes_is_refused_with_both_sizes(tmp_path: Path) -> None:
    model, processor = load_student(StudentConfig(model=student_folder()), seed=0)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(CacheError, match=r"a: .*40 x (30|40) pixels of an image, and the vision tower takes 32 x 32"):
        preprocessor_of(model.config, processor, make_chat(model, processor, "tiny")).pixels(
            ConversationImage("a", "a.png"), str(tmp_path)
        )
