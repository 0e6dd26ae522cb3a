"""LLaVA-KD from a cache: its visual losses from every stored form, ChatML, other image-token counts, three stages."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines.tiny.models import vision_config
from pipelines.tiny.tokenizer import PIXEL_MEAN, PIXEL_STD
from student_train.config import FitConfig, LossSpec, StudentConfig
from student_train.training.stages import StagesConfig, fit_file, stage_configs
from student_train.training.trainer import Run
from teacher_cache.build.build import build_cache
from teacher_cache.config import (
    CacheConfig,
    DataConfig,
    LayoutConfig,
    SignalsConfig,
    TeacherConfig,
    as_plain,
    load_config,
)
from teacher_cache.errors import ConfigError
from tests.fixtures.online import Oracle, dense_loss, exact_cache, fit_config, states_of, student_folder, world
from tests.fixtures.rounding import MODEL, half_the_digits, rounding
from tests.promises.test_offline_online import gradients, offline_gradients

VISUAL = [LossSpec("visual_kl"), LossSpec("relation", space="logits"), LossSpec("relation", space="hidden")]


def scored(signals: SignalsConfig, *, data: Path | None = None, images: Path | None = None, **teacher: Any) -> str:
    """A cache of original answers: nothing is generated, so it is made in a second."""
    output = tempfile.mkdtemp(prefix="cache-") + "/cache"
    settings = {"model": "pipelines/tiny/teacher", "chat_template": "tiny"} | teacher
    build_cache(
        CacheConfig(
            output=output,
            data=DataConfig(
                path=str(data or world() / "train.json"),
                image_folder=str(images or world() / "images"),
                regenerate="none",
                max_samples=12,
            ),
            teacher=TeacherConfig(backend="torch", dtype="float32", max_length=256, **settings),
            signals=signals,
            layout=LayoutConfig(shard_samples=8),
        ),
        style="quiet",
    )
    return output


@pytest.mark.parametrize(
    ("visual", "spec", "tolerance"),
    [
        ("gram", VISUAL[1], rounding(torch.float16, 2)),  # Grams are stored in float16
        ("gram", VISUAL[2], 2e-3),
        ("topk", LossSpec("visual_kl"), 2e-3),  # all 72 ids, in float16
    ],
    ids=["gram logits", "gram hidden", "topk"],
)
def test_small_stored_forms_give_the_live_teachers_loss(
    visual: str, spec: LossSpec, tolerance: float, tmp_path: Path
) -> None:
    cache = scored(SignalsConfig(preset="standard", top_k=8, codec="float32", visual=visual, visual_top_k=1000))
    run = Run.prepare(fit_config([spec], tmp_path, cache=cache, attention="sdpa"))
    offline, found = offline_gradients(run)
    run.student.zero_grad()
    oracle = Oracle(cache)
    numbers = run.plan.global_batch(0).tolist()
    model = LlavaForConditionalGeneration.from_pretrained(student_folder(), attn_implementation="eager")
    online = oracle.loss(model, None, [spec], numbers)
    online.backward()
    assert offline == pytest.approx(float(online.detach()), rel=tolerance, abs=1e-5)
    live = {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    a = torch.cat([found[n].flatten() for n in found])
    b = torch.cat([live[n].flatten() for n in found])
    assert float((a - b).norm() / b.norm()) < 10 * tolerance


def test_states_once_an_image_train_as_states_once_a_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second cache is made from copies of the images, one a conversation, so nothing is shared in it."""
    copies = tmp_path / "images"
    copies.mkdir()
    samples = json.loads((world() / "train.json").read_text())[:12]
    for number, sample in enumerate(samples):
        if "image" in sample:
            name = f"{number}-{sample['image']}"
            shutil.copy(world() / "images" / sample["image"], copies / name)
            sample["image"] = name
    data = tmp_path / "train.json"
    data.write_text(json.dumps(samples))
    signals = SignalsConfig(preset="standard", top_k=8, codec="int8", visual="states")
    weights, sizes = [], []
    for name, cache, images in (
        ("image", scored(signals), world() / "images"),
        ("conversation", scored(signals, data=data, images=copies), copies),
    ):
        config = fit_config(
            [LossSpec("cross_entropy"), *VISUAL[:2]], tmp_path / name, cache=cache, attention="sdpa", max_steps=3
        )
        source = dataclasses.replace(config.sources[0], image_folder=str(images))
        run = Run.prepare(dataclasses.replace(config, sources=(source,)))
        run.train("quiet")
        weights.append(list(run.student.parameters()))
        arrays = [p for p in (Path(cache) / "images").rglob("*") if p.is_file() and "c" in p.parts]
        sizes.append(sum(p.stat().st_size for p in arrays))
    with capsys.disabled():
        print(f"\nvisual states: {sizes[0]:,} bytes once an image, {sizes[1]:,} once a conversation")
    for one, other in zip(*weights, strict=True):
        assert float((one - other).norm()) <= half_the_digits(steps=3) * float(one.norm())
    assert 0 < sizes[0] < 0.7 * sizes[1]


@functools.cache
def coarse_student() -> str:
    """A student that sees an image as one token where the teacher has a grid of two by two."""
    folder = Path(tempfile.mkdtemp(prefix="coarse-")) / "student"
    model = LlavaForConditionalGeneration.from_pretrained(student_folder())
    plain = model.config.to_dict()
    plain["vision_config"] |= {"patch_size": 32}
    plain["image_seq_length"] = 1
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(**plain)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(Path(student_folder()) / name, folder / name)
    return str(folder)


def coarse(losses: list[LossSpec], output: Path) -> FitConfig:
    config = fit_config(losses, output, attention="sdpa")
    return dataclasses.replace(config, student=StudentConfig(model=coarse_student()))


@pytest.mark.parametrize(
    "spec",
    [*VISUAL, LossSpec("hidden_mse", tokens="all"), LossSpec("forward_kl", source="exact", tokens="all")],
    ids=lambda s: f"{s.name} {s.tokens}",
)
def test_another_number_of_image_tokens_is_refused_before_the_first_step(spec: LossSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the teacher has 4 image positions, the student 1"):
        Run.prepare(coarse([spec], tmp_path))


def test_named_pooling_matches_the_teachers_grid(tmp_path: Path) -> None:
    """Visual KL against the softmax of the teacher's mean logits, which are the logits of the mean state."""
    run = Run.prepare(coarse([LossSpec("visual_kl", pool=1)], tmp_path))
    offline, _ = offline_gradients(run)
    oracle, spec, values = Oracle(exact_cache()), LossSpec("visual_kl"), []
    for number in run.plan.global_batch(0).tolist():
        sample, teacher = oracle.asked(number)
        if not sample.image:
            continue
        first = sample.image[0]
        ids = torch.cat([sample.ids[: first + 1], sample.ids[first + 4 :]])
        student = LlavaForConditionalGeneration.from_pretrained(coarse_student(), attn_implementation="eager")
        states = states_of(student, dataclasses.replace(sample, ids=ids))
        values.append(dense_loss(spec, teacher.logits[sample.image].mean(0).double(), states.logits[first].double()))
    assert offline == pytest.approx(float(torch.stack(values).mean().detach()), rel=rounding(operations=MODEL))


def test_text_tokens_serve_a_student_with_another_number_of_image_tokens(tmp_path: Path) -> None:
    run = Run.prepare(coarse([LossSpec("hidden_cosine", tokens="text"), LossSpec("forward_kl")], tmp_path))
    loss, found = offline_gradients(run)
    assert 0 < loss < 100
    assert "model.model.multi_modal_projector.linear_1.weight" in found


# ChatML: another tokenizer, another template, another language model


@functools.cache
def chatml_model(width: int, seed: int) -> Path:
    """A random LLaVA on a Qwen2 of ``width``, with a byte-level tokenizer and ChatML's special tokens."""
    folder = Path(tempfile.mkdtemp(prefix="chatml-")) / f"llava-{width}"
    words = [t["value"] for s in json.loads((world() / "train.json").read_text()) for t in s["conversations"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    text = Qwen2Config(
        vocab_size=368,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision_config(),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@functools.cache
def chatml_cache() -> str:
    signals = SignalsConfig(preset="full", top_k=8, codec="float32", hidden="text", visual="states")
    return scored(signals, model=str(chatml_model(64, 0)), chat_template="chatml")


CHATML_TERMS = [
    LossSpec("cross_entropy"),
    LossSpec("forward_kl"),
    LossSpec("forward_kl", source="exact", temperature=0.7),
    LossSpec("hidden_mse", tokens="all"),
    LossSpec("visual_kl"),
    LossSpec("relation"),
]


@pytest.mark.parametrize("spec", CHATML_TERMS, ids=lambda s: f"{s.name} {s.source}")
def test_chatml_losses_equal_those_with_the_live_teacher(spec: LossSpec, tmp_path: Path) -> None:
    config = fit_config([spec], tmp_path, cache=chatml_cache(), global_batch=6)
    student = StudentConfig(model=str(chatml_model(32, 1)), attention="eager")
    run = Run.prepare(dataclasses.replace(config, student=student))
    offline, found = offline_gradients(run)
    run.student.zero_grad()
    oracle = Oracle(chatml_cache(), folder=chatml_model(64, 0))
    online = oracle.loss(run.student.model, run.student.projectors, [spec], run.plan.global_batch(0).tolist())
    online.backward()
    assert offline == pytest.approx(float(online.detach()), rel=rounding(operations=MODEL), abs=1e-7)
    live = gradients(run)
    assert found.keys() == live.keys()
    for name, gradient in live.items():
        assert float((found[name] - gradient).norm()) < half_the_digits() * float(gradient.norm()) + 1e-6, name


def test_chatml_rows_predict_every_answer_token_and_the_end_of_answer() -> None:
    """Row r's most likely id is the live model's prediction one position before answer token r."""
    oracle = Oracle(chatml_cache(), folder=chatml_model(64, 0))
    end = oracle.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    several = 0
    for number in range(len(oracle.cache)):
        record, (sample, teacher) = oracle.cache[number], oracle.asked(number)
        answers = record.arrays["input_ids"][record.arrays["loss_mask"]]
        assert (answers == end).sum() == len(record.answers)
        several += len(record.answers) > 1
        assert record.arrays["topk_ids"][:, 0].tolist() == teacher.logits[sample.rows].argmax(-1).tolist()
    assert several


# Stages


def test_three_stages_hand_the_student_on_and_resume(tmp_path: Path) -> None:
    cache = scored(SignalsConfig(preset="standard", top_k=8, codec="int8", visual="states"))
    tree = as_plain(fit_config([LossSpec("cross_entropy")], "", cache=cache, attention="sdpa", max_steps=2))
    tree.pop("output")
    distilled = [{"name": n} for n in ("cross_entropy", "forward_kl", "visual_kl", "relation")]
    stages = {
        "dpt": {"student": {"train": "projector"}, "losses": distilled},
        "sft": {"losses": [{"name": "cross_entropy"}]},
        "dft": {"losses": distilled},
    }
    path = tmp_path / "stages.yaml"
    path.write_text(json.dumps({"output": str(tmp_path / "run"), "base": tree, "stages": stages}))
    first = fit_file(path, [], "quiet")
    assert [Path(s.model).parent.name for s in first] == ["dpt", "sft", "dft"]
    begin = LlavaForConditionalGeneration.from_pretrained(student_folder()).state_dict()
    dpt = LlavaForConditionalGeneration.from_pretrained(first[0].model).state_dict()
    changed = {n.split(".")[1] for n in begin if not torch.equal(begin[n], dpt[n])}
    assert changed == {"multi_modal_projector"}  # pre-training moves the projector alone
    assert stage_configs(load_config(StagesConfig, path))[2][1].student.model == first[1].model
    assert [s.seconds for s in fit_file(path, [], "quiet")] == [s.seconds for s in first]  # nothing ran again


def test_stages_file_without_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs output and at least one stage"):
        stage_configs(StagesConfig(output=str(tmp_path)))
