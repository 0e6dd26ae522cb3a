"""Trains what the tiny students start from: python -m pipelines.tiny.train_start --out FOLDER

The papers' students are language models that were pre-trained on text (MobileLLaMA) behind a projector that was
pre-trained on captions. So are these: a small Llama reads scenes that are told in words and answers questions about
them, until it looks things up as well as its size allows; then a projector learns to put the tower's cells in place of
the words, with the language model frozen. `student.write_student` puts the result beside the teacher's tower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from pipelines.tiny.evaluate import Score, answer, score
from pipelines.tiny.models import build_llava, llava_config, load_llava
from pipelines.tiny.optimization import cosine_adamw, take_step
from pipelines.tiny.questions import CAPTION_QUESTIONS, QUESTION_TYPES, VISUAL_QUESTIONS, Turn, ask, describe
from pipelines.tiny.scenes import POSITIONS, Glyphs, Scene, load_glyphs, sample_scene
from pipelines.tiny.student import STUDENT_LAYERS, STUDENT_WIDTH
from pipelines.tiny.tokenizer import build_processor, build_tokenizer
from pipelines.tiny.tower import pixels
from pipelines.tiny.train_teacher import answer_loss, draw_turns, encode

LEARNING_RATE = 3e-3
BATCH = 32
SHUFFLED_WORDS = 0.5  # of the cells name what they hold in another order
SHUFFLED_CELLS = 0.3  # of the scenes are told in another order of cells
PROJECTOR_IMAGES = 1000
# Of questions about scenes in words. Whoever stays below never learned one of the look-ups (the colour of a kind, say):
# such a student would measure its own start and not a loss.
READS = 0.98
TOWER = "vision_tower"


def tell(scene: Scene, rng: np.random.Generator) -> str:
    """A scene in words, a cell after the other: "top-left circle red top-right nothing ..."."""
    held = {thing.position: [thing.position, thing.kind, thing.color] for thing in scene.things}
    order = rng.permutation(len(POSITIONS)) if rng.random() < SHUFFLED_CELLS else range(len(POSITIONS))
    told = []
    for cell in order:
        words = held.get(POSITIONS[cell], [POSITIONS[cell], "nothing"])
        told += [words[i] for i in rng.permutation(len(words))] if rng.random() < SHUFFLED_WORDS else words
    return " ".join(told)


def told_turns(scene: Scene, rng: np.random.Generator) -> tuple[list[Turn], bool]:
    """A true conversation about a scene in words: what `draw_turns` gives, with the words in the image's place."""
    turns, about_scene = draw_turns(scene, rng, captions_only=False)
    if about_scene:
        turns = [replace(turns[0], question=f"{tell(scene, rng)} {turns[0].question}"), *turns[1:]]
    return turns, False


def train(
    model: LlavaForConditionalGeneration,
    parameters: list[nn.Parameter],
    draw: Callable[[], tuple[Tensor, Tensor, Tensor | None]],
    *,
    steps: int,
    name: str,
) -> None:
    """Minimise the answers' cross-entropy; ``draw`` gives a batch's ids, answer mask and pixels."""
    optimizer, schedule = cosine_adamw(parameters, steps=steps, warmup_steps=steps // 20, learning_rate=LEARNING_RATE)
    model.train()
    started, running = time.process_time(), 0.0
    for step in range(steps):
        loss = answer_loss(model, *draw())
        take_step(loss, parameters, optimizer, schedule)
        running += loss.item()
        if step % 250 == 249:
            print(
                f"{name} {step + 1:5d} loss {running / 250:.4f} {time.process_time() - started:.0f} CPU s", flush=True
            )
            running = 0.0
    model.eval()


def train_language_model(
    model: LlavaForConditionalGeneration, glyphs: Glyphs, *, steps: int, rng: np.random.Generator
) -> None:
    """Teach the language model alone: scenes in words, drawn afresh at every step."""
    tokenizer = build_tokenizer()

    def draw() -> tuple[Tensor, Tensor, None]:
        told = [told_turns(sample_scene(rng, glyphs), rng) for _ in range(BATCH)]
        return *encode(told, tokenizer), None

    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    train(model, language, draw, steps=steps, name="language model")


def train_projector(
    model: LlavaForConditionalGeneration, glyphs: Glyphs, *, steps: int, rng: np.random.Generator
) -> None:
    """Teach the projector alone, as LLaVA's first stage does: true captions of a thousand images."""
    tokenizer = build_tokenizer()
    scenes = [sample_scene(rng, glyphs) for _ in range(PROJECTOR_IMAGES)]

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        shown = [scenes[index] for index in rng.choice(len(scenes), size=BATCH, replace=False)]
        captions = [([describe(scene, str(rng.choice(CAPTION_QUESTIONS)), rng)], True) for scene in shown]
        return *encode(captions, tokenizer), pixels(shown)

    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    train(model, [*model.model.multi_modal_projector.parameters()], draw, steps=steps, name="projector")


def text_score(model: LlavaForConditionalGeneration, *, scenes: int, seed: int) -> Score:
    """How well the language model answers about scenes that it reads in words, with handwriting it has no use for."""
    rng, glyphs = np.random.default_rng([seed, 1]), load_glyphs("dev")
    samples: list[dict[str, Any]] = []
    for scene in (sample_scene(rng, glyphs) for _ in range(scenes)):
        turns = [ask(scene, name, rng) for name in VISUAL_QUESTIONS]
        turns.append(describe(scene, str(rng.choice(CAPTION_QUESTIONS)), rng))
        for turn in turns:
            asked = {"value": f"{tell(scene, rng)} {turn.question}"}
            samples.append({"conversations": [asked, {"value": turn.answer}], "question_type": turn.type})
    return score(samples, answer(model, build_processor(), samples, Path()))


def save_start(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Half precision, everything but the tower, which students have from their teacher."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in model.state_dict().items() if TOWER not in name}
    save_file({name: value.half().contiguous() for name, value in kept.items()}, path)


def make_start(teacher: Path, out: Path, *, seed: int, steps: int, projector_steps: int, scenes: int) -> Score:
    """One start from its seed alone: initial weights and data are its own. Written if it reads (`READS`)."""
    model = build_llava(llava_config(hidden_size=STUDENT_WIDTH, layers=STUDENT_LAYERS), seed=seed)
    model.model.vision_tower.load_state_dict(load_llava(teacher).model.vision_tower.state_dict())
    glyphs, rng = load_glyphs("train"), np.random.default_rng([seed, 2])
    train_language_model(model, glyphs, steps=steps, rng=rng)
    found = text_score(model, scenes=scenes, seed=seed)
    if found.vqa >= READS:
        train_projector(model, glyphs, steps=projector_steps, rng=rng)
        save_start(model, out / f"{seed}.safetensors")
    return found


def as_markdown(scores: dict[int, Score], command: str, seconds: float, scenes: int) -> str:
    """The README.md beside the starts: what they are and how well each seed reads, those that were left out too."""
    names = [name for name in QUESTION_TYPES if name in next(iter(scores.values())).accuracy]
    heads = [f"seed {seed}{'' if found.vqa >= READS else ' (left out)'}" for seed, found in scores.items()]
    lines = [f"| {name} | {' | '.join(f'{s.accuracy[name]:.1%}' for s in scores.values())} |" for name in names]
    lines.append(f"| all visual questions | {' | '.join(f'{s.vqa:.1%}' for s in scores.values())} |")
    table = "\n".join([f"| question | {' | '.join(heads)} |", "|---" * (len(scores) + 1) + "|", *lines])
    return f"""# What the tiny students start from

A Llama of {STUDENT_LAYERS} layers of width {STUDENT_WIDTH}, pre-trained on scenes told in words, and a projector
pre-trained on the captions of {PROJECTOR_IMAGES:,} images; in half precision, without the vision tower (it is the
teacher's). Made in {seconds:.0f} CPU seconds by

    {command}

The seeds are 0, 1, ..., and a start is kept if it answers {READS:.0%} of the questions about scenes that it reads in
words: students 0, 1, 2 begin with the kept ones in order. Exact match on {scenes} such scenes, no image:

{table}
"""


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write the starts to.")],
    teacher: Annotated[Path, typer.Option(help="Whose tower the projector reads.")] = Path("pipelines/tiny/teacher"),
    starts: Annotated[int, typer.Option(help="How many that read are kept, of the seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of the language model.")] = 12000,
    projector_steps: int = 500,
    scenes: Annotated[int, typer.Option(help="Scenes in words that each is scored on.")] = 300,
) -> None:
    """Train the starts, score them on text alone, and write those that read, with a table of all."""
    torch.set_num_threads(1)
    began = time.process_time()
    options = {"steps": steps, "projector_steps": projector_steps, "scenes": scenes}
    scores: dict[int, Score] = {}
    while sum(found.vqa >= READS for found in scores.values()) < starts:
        scores[len(scores)] = make_start(teacher, out, seed=len(scores), **options)
    command = (
        f"python -m pipelines.tiny.train_start --out {out} --teacher {teacher} --starts {starts} --steps {steps} "
        f"--projector-steps {projector_steps} --scenes {scenes}"
    )
    text = as_markdown(scores, command, time.process_time() - began, scenes)
    (out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    app()
