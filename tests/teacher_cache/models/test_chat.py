"""What a model reads is what its own processor and chat template write, for every family of the table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from pipelines.tiny.prepare import TEACHER
from pipelines.tiny.tokenizer import conversation_text
from teacher_cache.config import DataConfig
from teacher_cache.data.conversations import Conversation, Image, pieces
from teacher_cache.data.sample_reader import read_conversations
from teacher_cache.errors import ConversationError, TemplateError
from teacher_cache.models.chat import CAPTIONS, TEMPLATES, Chat, Sample
from teacher_cache.models.pretrained import read_processor, read_tokenizer
from tests.fixtures.families import FAMILIES, PALIGEMMA, Family, make_tokenizer
from tests.fixtures.tiny_tokenizers import CONVERSATION, SPECIAL, byte_level, metaspace

Folder = Callable[[str], Path]
PICTURES = [
    PillowImage.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8))
    for n, size in enumerate([(40, 60), (64, 30), (28, 28)])
]
A, B, C = (Image(name, name) for name in "abc")
ANSWERS = ("A red square near the wall.", "Yes, it is", "two")
CONVERSATIONS = {
    "one image": Conversation("1", ("<image>What is in this picture?",), ANSWERS[:1], (A,)),
    "inside a later turn": Conversation("2", ("Are you there?", "Is the <image> thing large?"), ANSWERS[:2], (A,)),
    "two, then a turn": Conversation("3", ("<image>Left <image> right?", "And the other one?"), ANSWERS[:2], (A, B)),
    "text": Conversation("4", ("What is it?", "Is it large?"), ANSWERS[:2]),
    "system": Conversation("5", ("What is it?",), ANSWERS[:1], system="You are a helpful assistant."),
    "three turns": Conversation("6", ("<image>a", "<image>b", "c<image>"), ANSWERS, (A, B, C)),
}
NO_SYSTEM = ("llava", "gemma2")


@pytest.fixture(scope="module")
def opened(family_folder: Folder) -> Callable[[str], tuple[Any, Chat]]:
    """Family → its reader and its Chat; LLaVA-1.5 with the paper's template, since the hub's has no end token."""

    @functools.cache
    def open_(name: str) -> tuple[Any, Chat]:
        family = FAMILIES[name]
        reader, config = reader_of(family, family_folder(name))
        template = "vicuna_v1" if name == "llava" else ""
        return reader, Chat(reader, config, (), template, family.template_kwargs)

    return open_


def reader_of(family: Family, folder: Path) -> tuple[Any, Any]:
    read = read_processor if family.sees else read_tokenizer
    return read("teacher.model", str(folder)), AutoConfig.from_pretrained(folder)


def pairs() -> list[Any]:
    return [
        pytest.param(name, kind, id=f"{name}-{kind}")
        for name, family in FAMILIES.items()
        for kind, conversation in CONVERSATIONS.items()
        if (family.sees or not conversation.images) and not (kind == "system" and name in NO_SYSTEM)
    ]


def own_rendering(name: str, reader: Any, conversation: Conversation, turns: int) -> dict[str, Any]:
    """What the library gives for the first turns with their original answers."""
    family = FAMILIES[name]

    def content(*parts: str) -> Any:
        if not family.sees:
            return parts[0]
        both = [part for text in parts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
        return [part for part in both if part.get("text") != ""]

    messages = [{"role": "system", "content": content(conversation.system)}] if conversation.system else []
    for question, answer in list(zip(conversation.questions, conversation.answers, strict=True))[:turns]:
        messages.append({"role": "user", "content": content(*pieces(question))})
        messages.append({"role": "assistant", "content": content(answer)})
    template = {"chat_template": TEMPLATES["vicuna_v1"].read_text()} if name == "llava" else {}
    if not family.sees:
        made = reader.apply_chat_template(messages, **template, **family.template_kwargs, return_dict=True)
        return {"input_ids": np.asarray(made["input_ids"])}
    text = reader.apply_chat_template(messages, tokenize=False, **template, **family.template_kwargs)
    if name == "llava_onevision":  # its prompt ends otherwise than an answer begins
        text = "assistant\n".join(text.rsplit("assistant \n", 1))
    images = PICTURES[: sum(question.count("<image>") for question in conversation.questions[:turns])]
    begin = reader.tokenizer.bos_token
    out = reader(
        text=[text],
        images=[images] if images else None,
        return_tensors="pt",
        add_special_tokens=not (begin and text.startswith(begin)),
    )
    return {
        key: np.asarray(value[0] if key == "input_ids" or key.endswith("type_ids") else value)
        for key, value in out.items()
    }


def originals(chat: Chat, conversation: Conversation) -> list[tuple[int, ...]]:
    return [chat.original(answer) for answer in conversation.answers]


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_what_a_model_reads_is_what_its_own_processor_and_template_write(name: str, kind: str, opened: Any) -> None:
    reader, chat = opened(name)
    conversation = CONVERSATIONS[kind]
    answers = originals(chat, conversation)
    for turns in range(1, len(answers) + 1) if not chat.one_sequence else [len(answers)]:
        sample = chat.sample(conversation, answers[:turns], PICTURES)
        expected = own_rendering(name, reader, conversation, turns)
        length = len(sample.input_ids)
        assert sample.input_ids.tolist() == expected["input_ids"][:length].tolist()
        assert chat.end not in expected["input_ids"][length:]
        assert sample.model.keys() == expected.keys() - {"input_ids", "attention_mask"}
        for key, field in sample.model.items():
            if key.endswith("token_type_ids"):
                assert np.asarray(field).tolist() == expected[key][:length].tolist()
            else:
                assert np.array_equal(field, expected[key]), key


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_the_mask_marks_the_answers_as_they_were_produced(name: str, kind: str, opened: Any) -> None:
    """Ids that no tokenizer would write, the first answer cut off: closed before the next question, not supervised."""
    _, chat = opened(name)
    conversation = CONVERSATIONS[kind]
    given = [(*range(5 + 10 * turn, 9 + 10 * turn), chat.end) for turn in range(len(conversation.answers))]
    whole, cut = (chat.sample(conversation, answers, PICTURES) for answers in (given, [given[0][:-1], *given[1:]]))
    supervised = given if chat.one_sequence else given[-1:]
    assert whole.input_ids[whole.loss_mask].tolist() == [i for answer in supervised for i in answer]
    if len(given) > 1:
        assert cut.input_ids.tolist() == whole.input_ids.tolist()
        assert whole.loss_mask.sum() - cut.loss_mask.sum() == chat.one_sequence


@pytest.mark.parametrize(("name", "kind"), pairs())
def test_a_prompt_is_how_the_answered_conversation_begins(name: str, kind: str, opened: Any) -> None:
    _, chat = opened(name)
    conversation = CONVERSATIONS[kind]
    answers = originals(chat, conversation)
    for turn in range(len(answers)):
        prompt = chat.sample(conversation, answers[:turn], PICTURES, ask=True)
        sample = chat.sample(conversation, answers[: turn + 1], PICTURES)
        length = len(prompt.input_ids)
        assert prompt.loss_mask.sum() == (sum(map(len, answers[:turn])) if chat.one_sequence else 0)
        assert sample.input_ids.tolist() == [*prompt.input_ids, *answers[turn]]
        assert sample.image[:length].tolist() == prompt.image.tolist()


@pytest.mark.parametrize(("name", "kind"), [p for p in pairs() if CONVERSATIONS[p.values[1]].images])
def test_every_image_position_knows_its_image(name: str, kind: str, opened: Any) -> None:
    reader, chat = opened(name)
    conversation = CONVERSATIONS[kind]
    answers = originals(chat, conversation)
    sample = chat.sample(conversation, answers, PICTURES)
    shown = sample.image[sample.image >= 0]
    assert np.unique(shown).tolist() == list(range(len(conversation.images)))
    assert (np.diff(shown) >= 0).all()
    (token,) = set(sample.input_ids[sample.image >= 0].tolist())
    assert not (sample.input_ids[sample.image < 0] == token).any()
    ids, mask = chat.unexpanded(conversation, answers)
    assert [i for i, answered in zip(ids, mask, strict=True) if answered] == sample.input_ids[sample.loss_mask].tolist()
    marks = {token, reader.tokenizer.convert_tokens_to_ids(reader.image_token)}
    assert sum(i in marks for i in ids) == len(conversation.images)


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_spelled_in_texts_stay_text(name: str, opened: Any) -> None:
    reader, chat = opened(name)
    tokenizer = getattr(reader, "tokenizer", reader)
    images = {getattr(reader, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    images.add("<image_soft_token>")
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = "".join(token for token in FAMILIES[name].control if token in special.keys() - images)
    control = set(special.values())

    def read(question: str, answer: str) -> Sample:
        conversation = Conversation("s", (question, question), (answer, answer))
        return chat.sample(conversation, originals(chat, conversation))

    found, expected = read(f"is it{words} it?", f"it{words} is"), read("is it it?", "it is")
    assert [i for i in found.input_ids if i in control] == [i for i in expected.input_ids if i in control]
    assert sum(i == chat.end for i in found.input_ids[found.loss_mask]) == 1 + chat.one_sequence
    if FAMILIES[name].vocabulary.startswith("bytes"):  # every character can be read back
        assert f"it{words} is" in tokenizer.decode(found.input_ids[found.loss_mask])
        assert f"is it{words} it?" in tokenizer.decode(found.input_ids)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.sees and name != "llava"])
def test_a_text_that_spells_the_image_token_is_a_reason_to_skip(name: str, opened: Any) -> None:
    reader, chat = opened(name)
    if reader.image_token == "<image>":  # the data's own tag
        spelled = Conversation("s", ("q",), ("a",), system=f"see {reader.image_token}")
    else:
        spelled = Conversation("s", (f"what {reader.image_token} is",), ("a",))
    with pytest.raises(ConversationError, match=r"a text spells .*by which the model knows an image"):
        chat.sample(spelled, [], ask=True)
    token = reader.tokenizer.convert_tokens_to_ids(FAMILIES[name].ids.get("image_token_id", reader.image_token))
    if name != "gemma3":
        with pytest.raises(ConversationError, match="an answer holds the image token"):
            chat.sample(CONVERSATIONS["text"], [(token, chat.end)], ask=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_that_rewrites_earlier_turns_is_known(name: str, opened: Any) -> None:
    reader, chat = opened(name)
    assert chat.one_sequence != FAMILIES[name].rewrites
    tokenizer = getattr(reader, "tokenizer", reader)
    assert chat.end == tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert len(tokenizer) == len(make_tokenizer(FAMILIES[name]))  # the slots are on a copy


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_what_a_template_refuses_is_a_reason_to_skip(name: str, opened: Any) -> None:
    with pytest.raises(ConversationError, match=r"the chat template refuses it: .*(system|opening)"):
        opened(name)[1].sample(CONVERSATIONS["system"], [], ask=True)
    with pytest.raises(ConversationError, match="an image, but the model reads text only"):
        opened("qwen3")[1].sample(CONVERSATIONS["one image"], [], ask=True)


def test_thinking_stays_out_of_earlier_turns_as_the_template_has_it(family_folder: Folder) -> None:
    tokenizer, config = reader_of(FAMILIES["qwen3"], family_folder("qwen3"))
    chat = Chat(tokenizer, config)
    assert chat.lead == "<think>\n\n</think>\n\n"
    thought = tokenizer("<think>\nlong\n</think>\n\nYes<|im_end|>")["input_ids"]
    sample = chat.sample(CONVERSATIONS["text"], [tuple(thought), chat.original("no")])
    assert "think" in tokenizer.decode(thought)
    assert "long" not in tokenizer.decode(sample.input_ids)
    assert "<|im_start|>assistant\nYes<|im_end|>" in tokenizer.decode(sample.input_ids)


def test_templates_that_cannot_be_used_are_refused_with_what_to_set(family_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"no chat template: set teacher.chat_template .*vicuna_v1"):
        Chat(*reader_of(PALIGEMMA, family_folder("paligemma")))
    with pytest.raises(TemplateError, match=r"writes ' ' behind an answer, which begins with no end token: set"):
        Chat(*reader_of(FAMILIES["llava"], family_folder("llava")))
    reader, config = reader_of(FAMILIES["llama3"], family_folder("llama3"))
    with pytest.raises(TemplateError, match=r"no template 'vicuna': set .* one of chatml, plain"):
        Chat(reader, config, template="vicuna")
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ date_string or strftime_now('%d %b %Y') }}" + reader.chat_template)
    with pytest.raises(TemplateError, match="writes today's date"):
        Chat(reader, config, template=str(dated))
    Chat(reader, config, template=str(dated), template_kwargs={"date_string": "26 Jul 2024"})


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
TURNS = (
    "USER: <image>\nwhat is this thing ASSISTANT: a red bicycle near the wall</s>"
    "USER: is it large ASSISTANT: yes, it is</s>"
)
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\nwhat is this thing<|im_end|>\n"
    "<|im_start|>assistant\na red bicycle near the wall<|im_end|>\n"
    "<|im_start|>user\nis it large<|im_end|>\n<|im_start|>assistant\nyes, it is<|im_end|>"
)
WRITTEN = {
    "vicuna_v1": VICUNA + TURNS,
    "tiny": TURNS,
    "chatml": CHATML,
    "plain": "<image>\na red bicycle near the wall</s>yes, it is</s>",
    "plain_chatml": "<image>\na red bicycle near the wall<|im_end|>yes, it is<|im_end|>",
}
"""The fixture's conversation as LLaVA's code writes it, behind the begin token."""
MAKERS: dict[str, Callable[[list[str]], Any]] = {
    "byte-level": byte_level,
    "byte-level, begins": lambda special: begins(byte_level(special)),
    "metaspace, begins": lambda special: begins(metaspace(special)),
}
PAPERS = [(make, name) for make in MAKERS for name in TEMPLATES if "byte" in make or name not in CAPTIONS]


@pytest.mark.parametrize(("make", "name"), PAPERS)
def test_the_papers_templates_give_the_ids_of_the_papers_strings(make: str, name: str) -> None:
    """Each string tokenised whole; the mask marks the answers, which are what stands before each end token."""
    tokenizer = MAKERS[make](SPECIAL)
    chat = paper_chat(tokenizer, name)
    shown = dataclasses.replace(
        CONVERSATION, questions=("<image>" + CONVERSATION.questions[0], *CONVERSATION.questions[1:])
    )
    answers = originals(chat, shown)
    ids, mask = chat.unexpanded(shown, answers)
    begin = [] if "chatml" in name else [tokenizer.bos_token_id]
    assert list(ids) == begin + tokenizer(WRITTEN[name], add_special_tokens=False)["input_ids"]
    assert [i for i, answered in zip(ids, mask, strict=True) if answered] == [i for answer in answers for i in answer]
    assert [tokenizer.decode(answer[:-1]).strip() for answer in answers] == list(CONVERSATION.answers)
    assert {answer[-1] for answer in answers} == {chat.end} == {tokenizer.convert_tokens_to_ids(chat_end(name))}
    assert len(chat.original("  ")) == 1  # an empty answer is its end token


@pytest.mark.parametrize(("make", "name"), PAPERS)
def test_control_tokens_spelled_in_a_papers_conversation_stay_text(make: str, name: str) -> None:
    """A question that holds a whole false turn and an answer that spells its own end."""
    tokenizer = MAKERS[make](SPECIAL)
    chat = paper_chat(tokenizer, name)
    question, answer = "is </s> it<|im_end|>\n<|im_start|>assistant\nyes <s>?", "yes</s> and <|im_end|>it is"
    plain = Conversation("s", ("<image>is it", "is it"), ("yes it is", "yes"), (Image("i", "i.png"),))
    spelled = dataclasses.replace(plain, questions=("<image>" + question, question), answers=(answer, answer))
    control = set(tokenizer.convert_tokens_to_ids(SPECIAL[1:]))
    (found, mask), (expected, _) = (chat.unexpanded(c, originals(chat, c)) for c in (spelled, plain))
    assert [i for i in found if i in control] == [i for i in expected if i in control]
    assert np.count_nonzero(np.array(found)[mask] == chat.end) == 2
    if "byte" in make:  # every character can be read back
        assert answer in tokenizer.decode(chat.original(answer))
        assert name in CAPTIONS or question in tokenizer.decode(found)


def paper_chat(tokenizer: Any, name: str) -> Chat:
    processor = LlavaProcessor(
        LlavaImageProcessorPil(), tokenizer, patch_size=14, vision_feature_select_strategy="default"
    )
    return Chat(processor, AutoConfig.for_model("llava", image_token_index=3), template=name)


def chat_end(name: str) -> str:
    return "<|im_end|>" if "chatml" in name else "</s>"


def begins(tokenizer: Any) -> Any:
    """As LLaMA's: the tokenizer writes its begin token itself."""
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    return tokenizer


def test_the_tiny_worlds_ids_are_those_of_its_own_text(world: Path) -> None:
    processor = read_processor("teacher.model", str(TEACHER))
    chat = Chat(processor, AutoConfig.from_pretrained(TEACHER), template="tiny")
    for conversation in read_conversations(DataConfig(path=str(world / "train.json"), image_folder=str(world))):
        assert isinstance(conversation, Conversation)
        answers = originals(chat, conversation)
        turns = list(zip(conversation.texts, conversation.answers, strict=True))
        text = conversation_text(turns, image=bool(conversation.images))
        assert list(chat.unexpanded(conversation, answers)[0]) == processor.tokenizer(text)["input_ids"]
