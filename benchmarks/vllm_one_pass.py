"""What capturing costs: one pass against vLLM's bare generation, answer-then-score, and torch generate + score.

    .venv-vllm/bin/python -m benchmarks.vllm_one_pass                       # an untrained 60M LLaVA, any machine
    python -m benchmarks.vllm_one_pass --model llava-hf/llava-1.5-13b-hf --dtype bfloat16 --torch-batch 16

The same samples for all, in one run, engine start-up counted apart. Each engine is warmed up, then timed on several
disjoint sets of samples (a second time, a set would come out of the prefix cache); the table has the median set.
CPU seconds are those of this process and the engine's together: on a busy machine they say more than the clock.
The untrained model sees 64 image tokens and never ends an answer, so all answers have the same length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines.tiny.models import build_llava, llava_config
from pipelines.tiny.tokenizer import build_tokenizer
from pipelines.tiny.world import write_world
from teacher_cache.build.inputs import ReadSample
from teacher_cache.config import CacheConfig, build_config
from teacher_cache.data.conversations import Conversation
from teacher_cache.data.images import open_picture
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.models.weights import rename_vision_weights
from teacher_cache.teachers.teacher import Answer, AnswerRequest, Teacher, Wanted
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.teachers.vllm.jobs import VllmOptions
from teacher_cache.teachers.vllm.vllm_teacher import VllmTeacher

Seconds = tuple[float, float]
"""By the clock, and of CPU."""

IMAGE_SIDE, PATCH = 112, 14
WARM_UP = 8


@dataclass(frozen=True)
class Line:
    """One way of getting there: seconds to start, and for each set of samples seconds by the clock and of CPU."""

    name: str
    start: float
    sets: list[Seconds]
    tokens: int

    @property
    def median(self) -> float:
        return statistics.median(wall for wall, _ in self.sets)

    @property
    def cpu(self) -> float:
        return statistics.median(cpu for _, cpu in self.sets)


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config, conversations = prepare(arguments, Path(folder))
        sets = split(conversations, arguments.sets)
        lines = [
            measure("vLLM, bare generation", lambda: vllm(config, conversations, False), sets, config, answer_only),
            measure("vLLM, one pass with capture", lambda: vllm(config, conversations, True), sets, config, one_pass),
            measure("vLLM, answer then score", lambda: vllm(config, conversations, False), sets, config, two_passes),
            measure("torch, generate then score", lambda: torch_teacher(config), sets, config, two_passes),
        ]
    print(table(lines))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([vars(line) for line in lines], indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a LLaVA folder or hub name; default: an untrained small one")
    parser.add_argument("--data", default="", help="LLaVA JSON; default: questions about drawn scenes")
    parser.add_argument("--images", default="", help="the image folder of --data")
    parser.add_argument("--samples", type=int, default=24, help="in each set")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--torch-batch", type=int, default=32)
    parser.add_argument("--gpu-memory-share", type=float, default=0.85)
    parser.add_argument("--json", default="", help="also write the numbers here")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[CacheConfig, list[Conversation]]:
    """The configuration, and enough single-turn conversations, one in eight without an image."""
    count = arguments.samples * arguments.sets + WARM_UP
    model, data, images = arguments.model, arguments.data, arguments.images
    if not model:
        save_model(folder / "model")
        model = str(folder / "model")
    if not data:
        write_world(folder / "world", train_images=count // 2 + 1, dev_images=1, test_images=1, seed=0)
        data, images = str(folder / "world" / "train.json"), str(folder / "world" / "images")
    tree = {
        "output": str(folder / "cache"),
        "data": {"path": data, "image_folder": images, "max_samples": count, "duplicate_ids": "number"},
        "teacher": {
            "model": model,
            "dtype": arguments.dtype,
            "chat_template": "vicuna_v1" if arguments.model else "tiny",
        },
        "generation": {"max_new_tokens": arguments.answer_tokens},
        "speed": {"answer_batch": arguments.torch_batch, "gpu_memory_share": arguments.gpu_memory_share},
    }
    config = build_config(CacheConfig, tree, "the benchmark")
    samples = [s for s in read_conversations(config.data) if isinstance(s, Conversation)]
    return config, [Conversation(s.sample_id, s.questions[:1], s.answers[:1], s.images) for s in samples]


def save_model(folder: Path) -> None:
    """60M parameters, 64 image tokens, a vocabulary of 32,000: large enough that the model is what takes the time."""
    config = llava_config(hidden_size=512, layers=8, head_width=64)
    config.text_config.vocab_size = 32_000
    config.vision_config = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        projection_dim=256,
    )
    config.image_seq_length = (IMAGE_SIDE // PATCH) ** 2
    model = build_llava(config, seed=0)
    with torch.no_grad():  # the first 72 ids are the tokenizer's words; an end token among the answers would end them
        model.lm_head.weight[:72] = 0
    model.save_pretrained(folder)
    rename_vision_weights(folder)
    size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=size)
    LlavaProcessor(
        pictures,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def split(conversations: Sequence[Conversation], sets: int) -> list[list[Conversation]]:
    """The warm-up, then ``sets`` disjoint sets of one size."""
    size = (len(conversations) - WARM_UP) // sets
    rest = conversations[WARM_UP:]
    return [list(conversations[:WARM_UP]), *(list(rest[i * size : (i + 1) * size]) for i in range(sets))]


def vllm(config: CacheConfig, conversations: Sequence[Conversation], capture: bool) -> Teacher:
    return VllmTeacher(config, conversations, VllmOptions(capture=capture))


def torch_teacher(config: CacheConfig) -> Teacher:
    return TorchTeacher(config.teacher, config.generation, config.speed)


Prepared = tuple[list[ReadSample], list[AnswerRequest]]


def measure(
    name: str,
    start: Callable[[], Teacher],
    sets: Sequence[Sequence[Conversation]],
    config: CacheConfig,
    work: Callable[[Teacher, Sequence[Prepared]], list[Seconds]],
) -> Line:
    """Start, warm up with the first set, time the others."""
    begin = time.perf_counter()
    teacher = start()
    try:
        prepared = [requests(teacher, conversations, config) for conversations in sets]
        work(teacher, prepared[:1])
        started = time.perf_counter() - begin
        seconds = work(teacher, prepared[1:])
    finally:
        teacher.close()
    line = Line(name, started, seconds, len(sets[1]) * config.generation.max_new_tokens)
    print(f"{name}: {line.median:.2f} s, {line.cpu:.2f} s of CPU, started in {started:.0f} s", flush=True)
    return line


def requests(teacher: Teacher, conversations: Sequence[Conversation], config: CacheConfig) -> Prepared:
    folder = config.data.image_folder
    pictures = [tuple(open_picture(image, folder) for image in c.images) for c in conversations]
    read = [ReadSample.read(teacher.chat, c, p, original=False) for c, p in zip(conversations, pictures, strict=True)]
    return read, [AnswerRequest(sample.shown((), ask=True), 0, capture=teacher.one_pass) for sample in read]


def answer_only(teacher: Teacher, sets: Sequence[Prepared]) -> list[Seconds]:
    return [timed(lambda asked=asked: teacher.answer(asked)) for _, asked in sets]


def one_pass(teacher: Teacher, sets: Sequence[Prepared]) -> list[Seconds]:
    """States checked, normed and let go as they come, as a build uses them."""
    assert teacher.one_pass
    return answer_only(teacher, sets)


def two_passes(teacher: Teacher, sets: Sequence[Prepared]) -> list[Seconds]:
    """All answers, then all scores: as a build with two engines would, which starts each once."""
    teacher.answer(sets[0][1][:2])  # starts the first engine, where the warm-up ended with the second
    answers: list[list[Answer]] = []
    answering = [timed(lambda asked=asked: answers.append(teacher.answer(asked))) for _, asked in sets]
    todo = []
    for (read, _), given in zip(sets, answers, strict=True):
        todo.append([sample.shown([answer.token_ids]) for sample, answer in zip(read, given, strict=True)])
    for _ in teacher.score(todo[0][:2], Wanted()):  # starts the second engine, where there is one
        pass
    scoring = [timed(lambda batch=batch: list(teacher.score(batch, Wanted(text=True)))) for batch in todo]
    return [(a[0] + s[0], a[1] + s[1]) for a, s in zip(answering, scoring, strict=True)]


def timed(work: Callable[[], object]) -> Seconds:
    begin, cpu = time.perf_counter(), cpu_seconds()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """User and system time of this process and of all below it (psutil comes with vLLM)."""
    import psutil

    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def table(lines: Sequence[Line]) -> str:
    bare = lines[0]
    rows = ["| | seconds (median set) | tokens/s | × bare | CPU seconds | × bare | start-up |"]
    rows += ["|---|---:|---:|---:|---:|---:|---:|"]
    rows += [
        f"| {line.name} | {line.median:.2f} | {line.tokens / line.median:,.0f} | {line.median / bare.median:.2f} "
        f"| {line.cpu:.2f} | {line.cpu / bare.cpu:.2f} | {line.start:.0f} s |"
        for line in lines
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
