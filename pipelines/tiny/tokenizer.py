"""The tiny world's closed vocabulary, its word-level tokenizer, its conversation template and its LLaVA processor."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaProcessor, PreTrainedTokenizerFast

# Without torchvision `CLIPImageProcessor` is this class behind a warning.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines.tiny.questions import CAPTION_QUESTIONS, COUNTS, FACTS
from pipelines.tiny.scenes import CELL, COLORS, IMAGE_SIDE, KINDS, POSITIONS

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, IMAGE)
USER, ASSISTANT = "USER:", "ASSISTANT:"
IMAGE_TOKENS = (IMAGE_SIDE // CELL) ** 2
PIXEL_MEAN, PIXEL_STD = 0.22, 0.22

# What the templates of `questions` say around the names of things.
QUESTION_WORDS = "what color is the at where how many objects are there a and more digits than shapes"
ANSWER_WORDS = ("yes", "no", "nothing")

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% else %}{{ ' ASSISTANT: ' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Every token once; the special tokens come first and the order fixes the ids."""
    phrases = " ".join([QUESTION_WORDS, *CAPTION_QUESTIONS, *FACTS.keys(), *FACTS.values()])
    names = (*POSITIONS, *KINDS, *COLORS, *COUNTS, *ANSWER_WORDS)
    words = (*SPECIAL_TOKENS, USER, ASSISTANT, *names, *phrases.split())
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. It adds no `<s>` by itself: the template writes it, once."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary())}, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor() -> LlavaProcessor:
    """Images go in as they are (32 x 32); each becomes four tokens, after the tower's class token is dropped."""
    images = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def conversation_text(turns: Sequence[tuple[str, str]], *, image: bool) -> str:
    """(question, answer) turns as `<s>USER: <image>\\nQ ASSISTANT: A</s>USER: Q ASSISTANT: A</s>`."""
    placeholder = f"{IMAGE}\n" if image else ""
    pieces = [
        f"{USER} {placeholder if index == 0 else ''}{question} {ASSISTANT} {answer}{EOS}"
        for index, (question, answer) in enumerate(turns)
    ]
    return BOS + "".join(pieces)


def prompt_text(question: str, *, image: bool) -> str:
    """A first question, ready for the model to answer."""
    return f"{BOS}{USER} {f'{IMAGE}{chr(10)}' if image else ''}{question} {ASSISTANT}"
