"""Model folders: nothing is drawn at random, run as another model, or allowed to run code."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from pipelines.tiny.models import build_llava, load_llava, save_llava
from pipelines.tiny.prepare import TEACHER
from student_train.config import StudentConfig
from student_train.evaluation.answers import Student
from student_train.students.on_meta import student_architecture, student_on_meta
from student_train.students.student import load_student
from teacher_cache.config import CacheConfig, DataConfig, GenerationConfig, SpeedConfig, TeacherConfig
from teacher_cache.errors import ConfigError, TeacherError
from teacher_cache.models.checkpoint import checkpoint_digest
from teacher_cache.models.pretrained import ModelError, load_language_model, read_processor
from teacher_cache.plan.cache_plan import plan_cache
from teacher_cache.teachers.torch_teacher import TorchTeacher

ROOT = Path(__file__).parents[3]
Rename = Callable[[str], str]


def as_teacher(folder: Path) -> None:
    TorchTeacher(teacher_config(folder), GenerationConfig(), SpeedConfig(device="cpu"))


def as_student(folder: Path) -> None:
    load_student(StudentConfig(model=str(folder)), 0)


def as_teacher_of_layers(folder: Path) -> None:
    load_student(StudentConfig(layers_from=str(folder)), 0)


def as_evaluated(folder: Path) -> None:
    Student.load(folder)


DOORS = [as_teacher, as_student, as_teacher_of_layers, as_evaluated]


def teacher_config(folder: Path) -> TeacherConfig:
    return TeacherConfig(model=str(folder), backend="torch", dtype="float32", chat_template="tiny")


def original(name: str) -> str:
    """LLaVA's own repository's names."""
    name = name.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
    name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
    name = name.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
    return f"model.vision_tower.{name}" if name.startswith("vision_tower") else name


def without(part: str) -> Rename:
    return lambda name: "" if part in name else name


CHECKPOINTS: dict[str, tuple[Rename, str]] = {
    "original": (original, "names of LLaVA's own repository: convert"),
    "peft": (lambda name: f"base_model.model.{name}", "names of an adapter.*merge_and_unload"),
    "no projector": (without("multi_modal_projector"), "would be random .*multi_modal_projector.linear_1.bias"),
    "no tower": (without("vision_tower"), "would be random .*vision_tower"),
    "no head": (without("lm_head"), "1 weights are not in the checkpoint.*lm_head.weight"),
    "another name": (lambda name: name.replace("linear_1.bias", "linear_1.shift"), "no place in the model.*shift"),
}


def renamed(folder: Path, rename: Rename) -> Path:
    shutil.copytree(TEACHER, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {rename(name): weight for name, weight in weights.items() if rename(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_settings(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_weights_that_are_not_in_a_checkpoint_are_never_drawn_at_random(
    checkpoint: str, door: Callable[[Path], None], tmp_path: Path
) -> None:
    rename, words = CHECKPOINTS[checkpoint]
    folder = renamed(tmp_path / "model", rename)
    with pytest.raises(ModelError, match=words) as raised:
        door(folder)
    assert str(folder) in str(raised.value)
    assert isinstance(raised.value, TeacherError)
    assert isinstance(raised.value, ConfigError)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TEACHER, tmp_path / "model"))
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"intermediate_size": 400}
    with_settings(folder, text_config=text)
    with pytest.raises(ModelError, match=r"12 weights have another shape .*\(128, 384\), expected \(128, 400\)"):
        as_student(folder)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TEACHER, tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config.json.*merge_and_unload"):
        as_teacher(folder)


def test_a_head_that_is_tied_to_the_embeddings_is_not_missing(tmp_path: Path) -> None:
    config = load_llava(TEACHER).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = build_llava(config, seed=0)
    model.tie_weights()
    save_llava(model, tmp_path / "model")
    assert "lm_head.weight" not in "".join(load_file(tmp_path / "model" / "model.safetensors"))
    loaded = load_llava(tmp_path / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_parts_of_a_composed_student_are_whole(part: str, tmp_path: Path) -> None:
    teacher = load_llava(TEACHER)
    parts = {"language_model": LlamaForCausalLM(teacher.config.text_config), "vision_tower": teacher.model.vision_tower}
    for name, model in parts.items():
        model.save_pretrained(tmp_path / name)
        read_processor("model", str(TEACHER)).save_pretrained(tmp_path / name)
    broken = tmp_path / part / "model.safetensors"
    save_file(dict(list(load_file(broken).items())[1:]), broken, metadata={"format": "pt"})
    config = StudentConfig(language_model=str(tmp_path / "language_model"), vision_tower=str(tmp_path / "vision_tower"))
    with pytest.raises(ModelError, match=rf"student\.{part}=.*1 weights are not in the checkpoint"):
        load_student(config, 0)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT checkpoint with LLaVA-1.5's processor beside it: everything but its model type fits."""
    folder = tmp_path_factory.mktemp("next") / "model"
    shutil.copytree(TEACHER, folder)
    tiny = load_llava(TEACHER).config
    LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=tiny.vision_config,
            text_config=tiny.text_config,
            image_token_index=tiny.image_token_index,
            image_grid_pinpoints=[[32, 64]],
            image_seq_length=4,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(TEACHER, folder)
    LlamaForCausalLM(load_llava(TEACHER).config.text_config).save_pretrained(folder)
    return folder


def as_planned_cache(folder: Path) -> None:
    data = folder.parent / "data.json"
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello"}]
    data.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    plan_cache(CacheConfig(data=DataConfig(path=str(data)), teacher=teacher_config(folder)))


def as_planned_student(folder: Path) -> None:
    student_architecture(StudentConfig(model=str(folder)))


@pytest.mark.parametrize("folder", ["llava_next", "text_only"])
def test_a_student_is_of_its_folders_own_class(folder: str, request: pytest.FixtureRequest) -> None:
    """Not a LLaVA-1.5 of that folder's weights, its own parts left out or drawn anew."""
    path: Path = request.getfixturevalue(folder)
    expected = {"llava_next": LlavaNextForConditionalGeneration, "text_only": LlamaForCausalLM}[folder]
    for config in (StudentConfig(model=str(path)), StudentConfig(layers_from=str(path))):
        assert type(load_student(config, 0)[0]) is expected
        assert type(student_on_meta(config)) is expected


def test_parts_of_another_kind_are_refused(llava_next: Path, text_only: Path) -> None:
    with pytest.raises(ModelError, match=r"student.language_model=.*a llava model, which has parts beside"):
        load_student(StudentConfig(language_model=str(TEACHER), vision_tower=str(TEACHER)), 0)
    with pytest.raises(ModelError, match=r"student.vision_tower=.*a llama model, expected a vision tower"):
        load_student(StudentConfig(language_model=str(text_only), vision_tower=str(text_only)), 0)
    with pytest.raises(ModelError, match="which has parts beside its language model"):
        load_language_model("student.language_model", str(llava_next))


def test_a_processor_with_a_video_part_is_loaded_or_says_what_it_needs(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TEACHER, tmp_path / "model"))
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    path.write_text(json.dumps({**settings, "processor_class": "LlavaOnevisionProcessor", "video_processor": video}))
    if find_spec("torchvision") is not None:
        processor = read_processor("teacher.model", str(folder))
        assert type(processor.image_processor).__name__.endswith("Pil")
        return
    with pytest.raises(ModelError, match="Install torchvision, which the video part"):
        read_processor("teacher.model", str(folder))


CODE = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nclass EvilConfig: pass\n"
AUTO_MAP = {
    "AutoConfig": "code.EvilConfig",
    "AutoModelForCausalLM": "code.EvilConfig",
    "AutoModel": "code.EvilConfig",
    "AutoProcessor": "code.EvilConfig",
    "AutoImageProcessor": "code.EvilConfig",
    "AutoTokenizer": ["code.EvilConfig", "code.EvilConfig"],
}


def test_code_in_a_model_folder_does_not_run_and_nobody_is_asked(tmp_path: Path) -> None:
    """Every door in one process whose standard input says yes to whatever it is asked."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(TEACHER, folder)
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    with_settings(folder, model_type="evil", auto_map=AUTO_MAP)
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "auto_map": AUTO_MAP}))
    doors = """
import sys
from pathlib import Path
from typing import Any
from tests.teacher_cache.models.test_pretrained import *
from teacher_cache.models import pretrained
folder = Path(sys.argv[1])
names = ("read_config", "read_tokenizer", "read_processor", "read_image_processor")
parts = [lambda f, n=n: getattr(pretrained, n)("setting", str(f)) for n in (*names, "load_language_model")]
parts += [lambda f: load_student(StudentConfig(language_model=str(f), vision_tower=str(f)), 0)]
for door in [*DOORS, as_planned_cache, as_planned_student, *parts]:
    try:
        door(folder)
    except ModelError as error:
        assert "code of its own, which is not run" in str(error), error
    except ConfigError as error:
        assert "code of its own" in str(error), error
print("asked" if sys.stdin.readline() != "yes\\n" else "not asked")
"""
    done = subprocess.run(
        [sys.executable, "-c", doors, str(folder)], input="yes\n" * 20, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "not asked"
    assert not mark.exists()


class Pickled:
    """What a pickle can hold: a call, made when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside safetensors"])
@pytest.mark.parametrize("door", DOORS)
def test_a_pickle_in_a_model_folder_is_not_opened(door: Callable[[Path], None], beside: bool, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(TEACHER, folder)
    weights = next(folder.glob("*.safetensors"))
    if not beside:
        weights.unlink()
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Pickled(mark)))
    with contextlib.nullcontext() if beside else pytest.raises((ModelError, ConfigError)):
        door(folder)
    assert not mark.exists()


def test_models_come_through_one_door() -> None:
    """A model read anywhere else would be one whose weights nobody compares with its checkpoint; examples are loops of
    somebody who has a model of his own."""
    for package in ("teacher_cache", "student_train", "pipelines"):
        for path in set((ROOT / package).rglob("*.py")) - set((ROOT / "pipelines/examples").iterdir()):
            calls = [n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
            assert "from_pretrained" not in calls or path.name == "pretrained.py", path


def test_a_vision_tower_by_itself_is_taken(tmp_path: Path) -> None:
    """The checks refuse nothing that fits: parts saved by their own classes make a student with their weights."""
    teacher = load_llava(TEACHER)
    teacher.model.vision_tower.save_pretrained(tmp_path / "vision")
    assert isinstance(teacher.model.vision_tower, CLIPVisionModel)
    LlamaForCausalLM(teacher.config.text_config).save_pretrained(tmp_path / "language")
    processor = read_processor("model", str(TEACHER))
    for name in ("vision", "language"):
        processor.save_pretrained(tmp_path / name)
    config = StudentConfig(language_model=str(tmp_path / "language"), vision_tower=str(tmp_path / "vision"))
    model, _ = load_student(config, 0)
    ours, theirs = model.model.vision_tower.state_dict(), teacher.model.vision_tower.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_digest_covers_every_byte_of_a_large_checkpoint(tmp_path: Path) -> None:
    """70 MiB, with a byte changed in the middle: a merged adapter changes nothing at the ends of a file."""
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(70 << 20, dtype=torch.uint8)}, path)
    before = checkpoint_digest(str(tmp_path))
    content = path.read_bytes()
    path.write_bytes(content[: 35 << 20] + b"x" + content[(35 << 20) + 1 :])
    assert checkpoint_digest(str(tmp_path)) != before
    path.write_bytes(content)
    assert checkpoint_digest(str(tmp_path)) == before
