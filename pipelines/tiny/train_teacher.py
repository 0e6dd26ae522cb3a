"""Trains the tiny world's teacher and writes it as a LLaVA folder: python -m pipelines.tiny.train_teacher --out FOLDER

Three stages, as for LLaVA: a vision tower on what each cell holds, then frozen; captions; conversations. All data are
drawn afresh at every step, so nothing is seen twice.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from pipelines.tiny.evaluate import Score, score_world
from pipelines.tiny.models import build_llava, llava_config, load_llava, save_llava
from pipelines.tiny.optimization import cosine_adamw, take_step
from pipelines.tiny.questions import (
    CAPTION_QUESTIONS,
    QUESTION_TYPES,
    Turn,
    ask_facts,
    ask_several,
    describe,
)
from pipelines.tiny.scenes import Glyphs, Scene, load_glyphs, sample_scene
from pipelines.tiny.tokenizer import (
    ASSISTANT,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    build_tokenizer,
    conversation_text,
    vocabulary,
)
from pipelines.tiny.tower import pixels, train_tower
from pipelines.tiny.world import write_world
from teacher_cache.models.pretrained import read_processor

HIDDEN_SIZE = 128
LAYERS = 4
HEAD_WIDTH = 64
BATCH = 32
MOST_TURNS = 7
CAPTION_SHARE = 0.3
FACT_SHARE = 0.06


def draw_turns(scene: Scene, rng: np.random.Generator, *, captions_only: bool) -> tuple[list[Turn], bool]:
    """A true conversation and whether it shows the image: a caption, text-only facts, or one to seven questions."""
    draw = rng.random()
    if captions_only or draw < CAPTION_SHARE:
        return [describe(scene, str(rng.choice(CAPTION_QUESTIONS)), rng)], True
    if draw < CAPTION_SHARE + FACT_SHARE:
        return ask_facts(int(rng.integers(1, MOST_TURNS + 1)), rng), False
    return ask_several(scene, int(rng.integers(1, MOST_TURNS + 1)), rng), True


def encode(
    conversations: Sequence[tuple[list[Turn], bool]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Right-padded token ids (B, S), images expanded, and which of them are answers (B, S), `</s>` included."""
    texts = [
        conversation_text([(turn.question, turn.answer) for turn in turns], image=image).replace(
            IMAGE, IMAGE * IMAGE_TOKENS
        )
        for turns, image in conversations
    ]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    answers_begun = (ids == tokenizer.convert_tokens_to_ids(ASSISTANT)).int()
    answers_ended = (ids == tokenizer.convert_tokens_to_ids(EOS)).int()
    is_answer = (answers_begun.cumsum(1) - answers_begun) > (answers_ended.cumsum(1) - answers_ended)
    return ids, is_answer


def answer_loss(model: LlavaForConditionalGeneration, ids: Tensor, is_answer: Tensor, images: Tensor | None) -> Tensor:
    """Mean cross-entropy of answer tokens. Padding is to the right of everything, so causal attention never sees it."""
    states = model.model(input_ids=ids, pixel_values=images, use_cache=False).last_hidden_state  # (B, S, D)
    predicts = is_answer[:, 1:]
    return F.cross_entropy(model.lm_head(states[:, :-1][predicts]), ids[:, 1:][predicts])


def train_language(
    model: LlavaForConditionalGeneration,
    glyphs: Glyphs,
    *,
    steps: int,
    caption_steps: int,
    rng: np.random.Generator,
) -> None:
    """Teach projector and language model to caption (`caption_steps`), then to converse (the rest of `steps`)."""
    tokenizer = build_tokenizer()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = cosine_adamw(parameters, steps=steps, warmup_steps=50)
    model.train()
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        scenes = [sample_scene(rng, glyphs) for _ in range(BATCH)]
        conversations = [draw_turns(scene, rng, captions_only=step < caption_steps) for scene in scenes]
        shown = [scene for scene, (_, image) in zip(scenes, conversations, strict=True) if image]
        ids, is_answer = encode(conversations, tokenizer)
        loss = answer_loss(model, ids, is_answer, pixels(shown))
        take_step(loss, parameters, optimizer, schedule)
        running += loss.item()
        if step % 100 == 99:
            print(f"language {step + 1:5d} loss {running / 100:.4f} {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
    model.eval()


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write the teacher to.")],
    seed: Annotated[int, typer.Option(help="Fixes weights and data; the result also depends on the threads.")] = 0,
    tower_steps: Annotated[int, typer.Option(help="Steps of the vision tower.")] = 3000,
    steps: Annotated[int, typer.Option(help="Steps of the language model, captions included.")] = 3000,
    caption_steps: Annotated[int, typer.Option(help="How many of them see captions only.")] = 400,
    test_images: Annotated[int, typer.Option(help="Images each of dev and test that the teacher is scored on.")] = 500,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Train the tiny teacher, score it on dev and test, and write it with its model card."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    started = time.process_time()
    glyphs, rng = load_glyphs("train"), np.random.default_rng(seed)
    model = build_llava(llava_config(hidden_size=HIDDEN_SIZE, layers=LAYERS, head_width=HEAD_WIDTH), seed=seed)
    train_tower(model.model.vision_tower, glyphs, steps=tower_steps, rng=rng)
    train_language(model, glyphs, steps=steps, caption_steps=caption_steps, rng=rng)
    save_llava(model, out)
    seconds = time.process_time() - started

    table = score_table(*score_saved(out, images=test_images, seed=seed))
    print(table)
    command = (
        f"python -m pipelines.tiny.train_teacher --out {out} --seed {seed} --tower-steps {tower_steps} "
        f"--steps {steps} --caption-steps {caption_steps} --test-images {test_images} --threads {threads}"
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (out / "README.md").write_text(model_card(table, command, parameters, test_images, threads, seconds))


def score_saved(folder: Path, *, images: int, seed: int) -> tuple[Score, Score]:
    """Dev and test scores of the folder as it was written, so half precision is in them."""
    with tempfile.TemporaryDirectory() as world:
        write_world(Path(world), train_images=0, dev_images=images, test_images=images, seed=seed)
        model, processor = load_llava(folder), read_processor("model", str(folder))
        dev, test = (score_world(model, processor, Path(world), split) for split in ("dev", "test"))
    return dev, test


def score_table(dev: Score, test: Score) -> str:
    """A Markdown table of both splits in per cent, a line per question type."""
    lines = [f"| {name} | {dev.accuracy[name]:.1%} | {test.accuracy[name]:.1%} |" for name in QUESTION_TYPES]
    lines += [
        f"| all visual questions | {dev.vqa:.1%} | {test.vqa:.1%} |",
        f"| objects stated that are not there | {dev.hallucinated:.1%} | {test.hallucinated:.1%} |",
        f"| objects there that are not stated | {dev.missed:.1%} | {test.missed:.1%} |",
    ]
    return "\n".join(["| | dev | test |", "| --- | --- | --- |", *lines])


def model_card(table: str, command: str, parameters: int, images: int, threads: int, seconds: float) -> str:
    """The README.md of the folder."""
    return f"""---
license: apache-2.0
pipeline_tag: image-text-to-text
---

# The tiny world's teacher

A LLaVA ({parameters:,} parameters: CLIP tower, two-layer projector, Llama) that answers questions about 32 x 32
pictures of shapes and handwritten digits. It stands in for LLaVA-1.5-13B, so that the whole pipeline runs on two CPU
cores; it knows {len(vocabulary())} words and nothing else. Trained on true answers about freshly drawn images, on
{date.today()}, in {seconds:.0f} CPU seconds (threads: {threads}); weights are stored in half precision:

    {command}

Exact match on {images} dev and {images} test images with handwriting not seen in training, greedy decoding.
"describe" counts captions that are true in every word.

{table}

Digits: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" (CC BY 4.0). Hues of neighbouring
colours overlap, which costs every model about one colour answer in nine.
"""


if __name__ == "__main__":
    app()
