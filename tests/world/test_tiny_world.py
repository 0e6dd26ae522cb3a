"""The tiny world: the same bytes from the same seed, fair splits, noisy originals, and a teacher that knows it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pipelines.tiny
from pipelines.tiny.evaluate import answer, score
from pipelines.tiny.models import load_llava
from pipelines.tiny.questions import CAPTION_QUESTIONS, DESCRIBE, LIST, QUESTION_TYPES, ask, write_caption
from pipelines.tiny.scenes import DIGITS, POSITIONS, Scene, load_glyphs, render
from pipelines.tiny.student import STARTS, write_student
from pipelines.tiny.tokenizer import ASSISTANT, EOS, IMAGE, USER, build_tokenizer, conversation_text, prompt_text
from pipelines.tiny.train_start import READS, tell, text_score
from pipelines.tiny.world import caption_objects, parse_caption, split_scenes, write_world

TEACHER = Path(pipelines.tiny.__file__).parent / "teacher"
START_FILES = sorted(STARTS.glob("*.safetensors"))
TRAIN_IMAGES = 400
SPLITS = ("train", "dev", "test")

Sample = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, train_images=TRAIN_IMAGES, dev_images=25, test_images=25, seed=7)
    return folder


@pytest.fixture(scope="module")
def teacher() -> LlavaForConditionalGeneration:
    return load_llava(TEACHER)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(TEACHER)


def read(world: Path, split: str) -> list[Sample]:
    return json.loads((world / f"{split}.json").read_text())


def turns(sample: Sample) -> list[tuple[str, str]]:
    values = [message["value"].removeprefix(f"{IMAGE}\n") for message in sample["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_world(tmp_path / name, train_images=6, dev_images=2, test_images=2, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["images/train-000000.png"] != digests(tmp_path / "c")["images/train-000000.png"]


def test_a_larger_world_starts_with_the_smaller_one(tmp_path: Path, world: Path) -> None:
    write_world(tmp_path, train_images=5, dev_images=1, test_images=1, seed=7)
    assert read(tmp_path, "train") == read(world, "train")[: len(read(tmp_path, "train"))]
    assert digests(tmp_path / "images").items() <= digests(world / "images").items()


def test_a_scene_looks_the_same_in_any_batch() -> None:
    scenes = split_scenes("train", 5, seed=3)
    assert np.array_equal(render(scenes)[3], render(scenes[3:4])[0])


def test_splits_share_no_image_and_no_handwriting(world: Path) -> None:
    images = list(digests(world / "images").values())
    assert len(set(images)) == len(images) == TRAIN_IMAGES + 50
    glyphs = {split: {mask.tobytes() for masks in load_glyphs(split).values() for mask in masks} for split in SPLITS}
    assert not glyphs["train"] & (glyphs["dev"] | glyphs["test"])
    assert not glyphs["dev"] & glyphs["test"]


def test_samples_are_llava_json_with_unique_ids_and_the_image_in_the_first_question(world: Path) -> None:
    for split in SPLITS:
        samples = read(world, split)
        assert len({sample["id"] for sample in samples}) == len(samples)
        for sample in samples:
            roles = [message["from"] for message in sample["conversations"]]
            assert roles == ["human", "gpt"] * (len(roles) // 2)
            tags = [message["value"].count(IMAGE) for message in sample["conversations"]]
            assert tags == [int("image" in sample)] + [0] * (len(tags) - 1)
            assert sample["conversations"][0]["value"].startswith(f"{IMAGE}\n") == ("image" in sample)
            assert "image" not in sample or (world / "images" / sample["image"]).is_file()


def test_test_split_asks_one_question_a_sample_of_every_type(world: Path) -> None:
    samples = read(world, "test")
    assert {len(sample["conversations"]) for sample in samples} == {2}
    assert {sample["question_type"] for sample in samples} == {*QUESTION_TYPES, "exist_more"}


def test_three_different_existence_questions_are_asked_of_every_test_image(world: Path) -> None:
    asked = defaultdict(list)
    for sample in read(world, "test"):
        if sample["question_type"] in ("exist", "exist_more"):
            asked[sample["image"]].append(turns(sample)[0][0])
    assert len(asked) == 25
    assert all(len(questions) == len(set(questions)) == 3 for questions in asked.values())


def true_answer(scene: Scene, question: str, question_type: str) -> str:
    """The oracle: read the answer off the scene, knowing only the wording of the questions."""
    words = question.split()
    kinds = {thing.kind: thing for thing in scene.things}
    if question_type == "color":
        return kinds[words[-1]].color
    if question_type == "what":
        return {thing.position: thing.kind for thing in scene.things}.get(words[-1], "nothing")
    if question_type == "where":
        return kinds[words[-1]].position
    if question_type == "count":
        return str(len(scene.things))
    if question_type.startswith("exist"):
        return "yes" if words[-1] in kinds else "no"
    if question_type == "compare":
        digits = sum(kind in DIGITS for kind in kinds)
        margin = 2 * digits - len(kinds)
        return "yes" if (margin if words[3] == "digits" else -margin) > 0 else "no"
    return write_caption(caption_objects(scene), question, np.random.default_rng(0))


def is_true(given: str, scene: Scene, question: str, question_type: str) -> bool:
    """Captions state their objects in any order; every other answer is one word."""
    truth = true_answer(scene, question, question_type)
    return sorted(given.split(" and ")) == sorted(truth.split(" and "))


def test_true_answers_follow_from_the_scene(world: Path) -> None:
    scenes = split_scenes("test", 25, seed=7)
    for sample in read(world, "test"):
        if "image" in sample:
            ((question, given),) = turns(sample)
            scene = scenes[int(sample["image"][5:11])]
            assert is_true(given, scene, question, sample["question_type"]), question


def test_yes_and_no_are_balanced_in_test_questions(tmp_path: Path) -> None:
    write_world(tmp_path, train_images=0, dev_images=0, test_images=300, seed=1)
    for question_type in ("exist", "compare"):
        samples = [sample for sample in read(tmp_path, "test") if sample["question_type"] == question_type]
        assert 0.42 < np.mean([turns(sample)[0][1] == "yes" for sample in samples]) < 0.58


def test_captions_of_both_styles_are_parsed_back() -> None:
    for scene in split_scenes("test", 20, seed=0):
        for question in CAPTION_QUESTIONS:
            parsed = parse_caption(write_caption(caption_objects(scene), question, np.random.default_rng(0)))
            assert sorted(parsed) == sorted(caption_objects(scene))


@pytest.mark.parametrize(
    ("question", "phrases"),
    [
        (DESCRIBE, ("top-right two red", "bottom-left circle blue")),
        (LIST, ("two top-right red", "circle bottom-left blue")),
    ],
)
def test_captions_order_words_as_asked_and_objects_at_random(question: str, phrases: tuple[str, str]) -> None:
    objects = [("top-right", "two", "red"), ("bottom-left", "circle", "blue")]
    written = {write_caption(objects, question, np.random.default_rng(seed)) for seed in range(20)}
    assert written == {" and ".join(phrases), " and ".join(reversed(phrases))}


def test_a_caption_is_right_in_any_order_and_wrong_with_an_object_more_or_less() -> None:
    sample = {"question_type": "describe", "conversations": [{}, {"value": "top-left two red and top-right one blue"}]}
    for given, right in (
        ("top-right one blue and top-left two red", 1.0),
        ("top-left two red", 0.0),
        ("top-left two red and top-left two red and top-right one blue", 0.0),
        ("top-left two blue and top-right one red", 0.0),
    ):
        assert score([sample | {"question_type": "describe"}], [given]).accuracy["describe"] == right, given


def test_a_broken_phrase_matches_no_object() -> None:
    assert parse_caption("top-left circle and what is") == [("top-left", "circle", None)]
    assert parse_caption("") == []


def test_original_answers_are_noisy_as_if_never_having_seen_the_image(world: Path) -> None:
    scenes = split_scenes("train", TRAIN_IMAGES, seed=7)
    right: defaultdict[str, list[bool]] = defaultdict(list)
    yes: list[bool] = []
    for sample in read(world, "train"):
        if "image" not in sample:
            continue
        scene = scenes[int(sample["image"][6:12])]
        for (question, given), question_type in zip(turns(sample), sample["question_types"], strict=True):
            right[question_type].append(is_true(given, scene, question, question_type))
            if question_type == "exist":
                yes.append(given == "yes")
    assert 0.35 < np.mean(right["describe"]) < 0.5
    assert 0.65 < np.mean(right["color"]) < 0.8
    assert 0.77 < np.mean(right["exist"]) < 0.88  # half of the guesses, always "yes", are right
    assert 0.6 < np.mean(yes) < 0.75


def test_facts_are_right_even_in_the_original_answers(world: Path) -> None:
    facts = dict(turns(sample)[0] for sample in read(world, "test") if "image" not in sample)
    for sample in read(world, "train"):
        if "image" not in sample:
            assert all(facts[question] == given for question, given in turns(sample))


def test_every_word_is_in_the_vocabulary(world: Path) -> None:
    tokenizer = build_tokenizer()
    unknown = {
        word
        for split in SPLITS
        for sample in read(world, split)
        for turn in turns(sample)
        for word in " ".join(turn).split()
        if word not in tokenizer.get_vocab()
    }
    assert not unknown


def test_template_is_the_documented_string_and_the_processors_chat_template(processor: Any) -> None:
    questions = [("what color is the circle", "red"), ("is there a two", "no")]
    text = conversation_text(questions, image=True)
    assert text == (
        "<s>USER: <image>\nwhat color is the circle ASSISTANT: red</s>USER: is there a two ASSISTANT: no</s>"
    )
    messages: list[dict[str, Any]] = []
    for question, given in questions:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": given}]})
    messages[0]["content"].insert(0, {"type": "image"})
    assert processor.apply_chat_template(messages) == text
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert prompt == prompt_text(questions[0][0], image=True)


def test_one_word_is_one_token_and_decoding_restores_the_text(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer("<s>USER: <image>\nlist the objects ASSISTANT: two top-left red</s>")["input_ids"]
    words = ["<s>", USER, IMAGE, "list", "the", "objects", ASSISTANT, "two", "top-left", "red", EOS]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer.decode(ids[7:], skip_special_tokens=True) == "two top-left red"


def test_teacher_weights_have_hub_names_and_all_load() -> None:
    with safe_open(TEACHER / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    roots = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.")
    assert all(name.startswith(roots) for name in names)
    assert "language_model.lm_head.weight" in names
    _, info = LlavaForConditionalGeneration.from_pretrained(TEACHER, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_teacher_folder_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 4 << 20


def test_teacher_answers_unseen_images(world: Path, teacher: LlavaForConditionalGeneration, processor: Any) -> None:
    samples = read(world, "test")
    result = score(samples, answer(teacher, processor, samples, world / "images"))
    assert result.vqa > 0.93
    assert result.accuracy["fact"] == 1.0
    assert result.hallucinated < 0.3  # of 62 objects; 0.19 of many: what it says of things that look ambiguous


def test_teacher_is_as_sure_as_it_is_right(teacher: LlavaForConditionalGeneration, processor: Any) -> None:
    """Soft labels say something only where a teacher has doubts, and something true only where they are founded."""
    scenes, rng = split_scenes("dev", 150, seed=9), np.random.default_rng(0)
    images = [Image.fromarray(image) for image in render(scenes)]
    asked = [ask(scene, "color", rng) for scene in scenes]
    texts = [prompt_text(turn.question, image=True) for turn in asked]
    inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        chances = teacher(**inputs).logits[:, -1].float().softmax(-1)
    truths = torch.tensor(processor.tokenizer.convert_tokens_to_ids([turn.answer for turn in asked]))
    sure, says = chances.max(-1)
    assert 0.15 < torch.special.entr(chances).sum(-1).mean() < 0.5
    assert abs(sure.mean() - (says == truths).float().mean()) < 0.06


def test_teacher_answers_the_last_of_several_turns(
    world: Path, teacher: LlavaForConditionalGeneration, processor: Any
) -> None:
    """Its own training conversations had up to seven turns; here a question of each type follows all others."""
    by_image: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for sample in read(world, "dev"):
        if "image" in sample and sample["question_type"] != "describe":
            by_image[sample["image"]] += turns(sample)
    asked = {image: q[i % len(q) :] + q[: i % len(q)] for i, (image, q) in enumerate(by_image.items())}
    texts = [conversation_text(q, image=True).rsplit(f" {q[-1][1]}{EOS}", 1)[0] for q in asked.values()]
    images = [Image.open(world / "images" / image) for image in asked]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = teacher.generate(**inputs, max_new_tokens=4, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [given == questions[-1][1] for given, questions in zip(answers, asked.values(), strict=True)]
    assert np.mean(right) > 0.85


def test_teacher_never_says_a_token_that_is_no_answer(
    world: Path, teacher: LlavaForConditionalGeneration, processor: Any
) -> None:
    """An `<image>` in an answer could not be scored: it would ask for an image that is not there."""
    tokenizer = processor.tokenizer
    samples = [sample for sample in read(world, "train")[:60] if "image" in sample]
    texts = [conversation_text(turns(sample), image=True) for sample in samples]
    images = [Image.open(world / "images" / sample["image"]) for sample in samples]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.inference_mode():
        chances = teacher(**inputs).logits.softmax(-1)
    begins = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(ASSISTANT)
    never = [
        *range(len(tokenizer), chances.shape[-1]),
        *tokenizer.convert_tokens_to_ids([IMAGE, USER, ASSISTANT, "<s>"]),
    ]
    never += tokenizer.convert_tokens_to_ids(["<pad>", "<unk>"])
    assert chances[begins][:, never].sum(-1).max() < 0.01


def test_student_shares_the_teachers_tower_and_depends_on_its_seed_alone(
    tmp_path: Path, teacher: LlavaForConditionalGeneration
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_student(tmp_path / name, teacher=TEACHER, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    first, other = load_llava(tmp_path / "a"), load_llava(tmp_path / "c")
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    for name, weight in teacher.model.vision_tower.state_dict().items():
        assert torch.equal(weight, first.model.vision_tower.state_dict()[name])
    assert first.config.text_config.hidden_size == 64
    for file in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "a" / file).read_bytes() == (TEACHER / file).read_bytes()


@pytest.mark.parametrize("seed", range(len(START_FILES)))
@pytest.mark.parametrize("part", ["language", "all"])
def test_a_pretrained_student_is_its_start_behind_the_teachers_tower(
    tmp_path: Path, teacher: LlavaForConditionalGeneration, seed: int, part: Any
) -> None:
    write_student(tmp_path, teacher=TEACHER, seed=seed, pretrained=part)
    weights = load_llava(tmp_path).state_dict()
    start = load_file(START_FILES[seed])
    tower = {name: value for name, value in teacher.state_dict().items() if "vision_tower" in name}
    assert weights.keys() == start.keys() | tower.keys()
    projector = {name for name in start if "projector" in name}
    assert len(projector) == 4
    for name, value in (start | tower).items():
        assert torch.equal(weights[name], value.float()) == (part == "all" or name not in projector), name


def test_every_start_reads_scenes_that_are_told_in_words(tmp_path: Path) -> None:
    assert START_FILES
    for seed in range(len(START_FILES)):
        write_student(tmp_path / str(seed), teacher=TEACHER, seed=seed, pretrained="all")
        assert text_score(load_llava(tmp_path / str(seed)), scenes=60, seed=100).vqa >= READS


def test_a_scene_in_words_states_every_cell_in_whatever_order() -> None:
    for number, scene in enumerate(split_scenes("dev", 30, seed=1)):
        words = tell(scene, np.random.default_rng(number)).split()
        expected = [word for thing in scene.things for word in (thing.position, thing.kind, thing.color)]
        expected += [word for position in POSITIONS if position not in expected for word in (position, "nothing")]
        assert sorted(words) == sorted(expected)
