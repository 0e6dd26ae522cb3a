"""Chat templates, and conversations as token ids.

A conversation becomes *segments*: the prompt text before each answer, and the answers. Prompt segments are tokenised
once, with the special token before them as context, so that the ids equal those of the whole string tokenised at
once; answers are ids that a model produced, or an original answer tokenised behind its prompt. One image is one
placeholder here; only a model expands it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.data.conversations import IMAGE_TAG, Conversation
from teacher_cache.data.rows import Positions, equal_runs, expand, expanded_length, positions_of
from teacher_cache.errors import TemplateError

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """How a conversation is written down.

    ``first`` opens the text (after ``bos``), ``user`` and ``assistant`` stand around each question; an answer is
    ``answer_space + text + end``, and ``separator`` follows it before the next question. ``end`` is the
    end-of-answer token: supervised, and the one at which generation stops.
    """

    name: str
    first: str
    user: str
    assistant: str
    answer_space: str
    end: str
    separator: str = ""
    bos: bool = True
    questions: bool = True
    """False: the image alone stands before the answer, as in LLaVA's ``preprocess_plain``."""


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES: dict[str, Template] = {
    # LLaVA-1.5's conv_vicuna_v1: seps " " and "</s>", "USER: {q} ASSISTANT: {a}</s>USER: …".
    "vicuna_v1": Template("vicuna_v1", _VICUNA_SYSTEM, "USER: ", " ASSISTANT:", " ", "</s>"),
    # vicuna_v1 without the system prompt: what the tiny world trains with.
    "tiny": Template("tiny", "", "USER: ", " ASSISTANT:", " ", "</s>"),
    # LLaVA's pre-training: the image, then the caption. The line break stands between them, not behind them as there,
    # so that a text position predicts the first word; the end token ends the caption.
    "plain": Template("plain", "", "", "", "", "</s>", questions=False),
    "plain_chatml": Template("plain_chatml", "", "", "", "", "<|im_end|>", bos=False, questions=False),
    # Qwen1.5/Qwen2.5 and other ChatML models; no bos token.
    "chatml": Template(
        "chatml",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
        "\n",
        bos=False,
    ),
}


@dataclass(frozen=True)
class Prompt:
    """The token ids before and between the answers of one conversation: ``segments[t]`` stands before answer t."""

    sample_id: str
    segments: tuple[Ids, ...]
    end: int

    def before(self, turn: int, answers: Sequence[Ids]) -> Ids:
        """The ids the model reads to give answer ``turn``, after the ``answers`` already given."""
        ids: list[int] = []
        for t in range(turn):
            ids += [*self.segments[t], *answers[t], *self.close(answers[t])]
        return (*ids, *self.segments[turn])

    def close(self, answer: Ids) -> Ids:
        """The end token that an answer cut off by ``max_new_tokens`` lacks. A later question needs it before it, but
        it is nobody's answer, so it is never supervised."""
        return () if answer and answer[-1] == self.end else (self.end,)


@dataclass(frozen=True)
class TokenizedSample:
    """A whole conversation.

    input_ids: (T,) int64, one placeholder a run of image positions · loss_mask: (T,) bool, true at answer tokens, the
    end-of-answer token included · runs: (G, 2) positions and image number of each placeholder. The mask names the
    *answer tokens*; which position predicts them is ``data.rows``' business.
    """

    sample_id: str
    input_ids: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    runs: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    @property
    def rows(self) -> int:
        """R: the number of answer tokens."""
        return int(self.loss_mask.sum())

    @property
    def length(self) -> int:
        """S: positions that the model reads."""
        return int(expanded_length(len(self.input_ids), len(self.runs), self.runs[:, 0].sum()))

    def expanded(self, image_token: int) -> npt.NDArray[np.int64]:
        """(S,) the ids as the model reads them."""
        return expand(self.input_ids, image_token, self.runs[:, 0])

    def positions(self, image_token: int) -> Positions:
        """Where its rows, text and images stand in what the model reads."""
        return positions_of(self.input_ids, self.loss_mask, image_token, self.runs[:, 0])

    def with_runs(self, image_token: int, image_tokens: int) -> TokenizedSample:
        """For a model that shows every image in as many positions."""
        return replace(self, runs=equal_runs(self.input_ids, image_token, image_tokens))


def template_by_name(name: str) -> Template:
    if name not in TEMPLATES:
        raise TemplateError(f"teacher.template: no template {name!r}; there are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def template_text(template: Template) -> str:
    """All of the template, for a manifest."""
    return json.dumps(asdict(template), sort_keys=True)


def image_token_id(tokenizer: Any) -> int:
    """The id of ``<image>`` in this tokenizer, which must know it as a single token."""
    ids = tokenizer(IMAGE_TAG, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise TemplateError(
            f"the tokenizer writes {IMAGE_TAG} as {len(ids)} tokens, expected 1: "
            "use a LLaVA checkpoint's tokenizer, or add the token and resize the embeddings"
        )
    return int(ids[0])


def end_token_id(tokenizer: Any, template: Template) -> int:
    """The id of the template's end-of-answer token, which must be one token."""
    ids = tokenizer(template.end, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise TemplateError(
            f"template {template.name} ends an answer with {template.end!r}, which this tokenizer writes as "
            f"{len(ids)} tokens, expected 1: choose the template the model was trained with"
        )
    return int(ids[0])


def tokenize_prompt(conversation: Conversation, template: Template, tokenizer: Any) -> Prompt:
    """The prompt segments of ``conversation``; no answer is read."""
    segments = []
    for turn, question in enumerate(conversation.texts):
        tag = f"{IMAGE_TAG}\n" if conversation.image is not None and turn == 0 else ""
        words = question if template.questions else ""
        if turn == 0:
            bos = (int(tokenizer.bos_token_id),) if template.bos else ()
            before = template.first + template.user + tag
            segments.append((*bos, *_around(tokenizer, before, words, template.assistant)))
        else:
            before = template.separator + template.user
            segments.append(_after(tokenizer, template.end, before, words, template.assistant, template))
    return Prompt(conversation.sample_id, tuple(segments), end_token_id(tokenizer, template))


def tokenize_answer(answer: str, template: Template, tokenizer: Any) -> Ids:
    """An original answer as ids, as it is tokenised behind ``… ASSISTANT:``, the end-of-answer token included."""
    space = template.answer_space if answer.strip() else ""
    return _after(tokenizer, template.assistant, space, answer.strip(), template.end, template)


def assemble(prompt: Prompt, answers: Sequence[Ids]) -> TokenizedSample:
    """Prompt segments and answers in turn, with the mask that marks the answers."""
    ids: list[int] = []
    mask: list[bool] = []
    for turn, (segment, answer) in enumerate(zip(prompt.segments, answers, strict=True)):
        close = prompt.close(answer) if turn + 1 < len(answers) else ()
        ids += [*segment, *answer, *close]
        mask += [False] * len(segment) + [True] * len(answer) + [False] * len(close)
    return TokenizedSample(prompt.sample_id, np.asarray(ids, np.int64), np.asarray(mask, np.bool_))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of the vocabulary and special tokens: equal exactly where token ids mean the same text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    text = json.dumps([vocabulary, special], ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _ids(tokenizer: Any, text: str) -> Ids:
    return tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def _around(tokenizer: Any, before: str, words: str, after: str) -> Ids:
    """The ids of ``before + words + after``, where ``words`` come from the data: a control token that they spell
    (``</s>``, ``<|im_end|>``) is text, however the tokenizer would read it.

    Raises
    ------
    TemplateError
        The tokenizer cannot say where its tokens stand in the text, so they cannot be told apart.
    """
    text = before + words + after
    pattern, special = _control_tokens(tokenizer, len(tokenizer))
    found = pattern.search(words) if pattern is not None else None
    if found is None:
        return _ids(tokenizer, text)
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"a text spells the control token {found[0]!r}, and this tokenizer cannot keep it as text: give the model "
            "a fast tokenizer (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = []
    for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        spelled = i in special and start >= len(before) and end <= len(before) + len(words)
        ids += _spelled(tokenizer, text[start:end], special) if spelled else [int(i)]
    return tuple(ids)


def _spelled(tokenizer: Any, token: str, special: frozenset[int]) -> list[int]:
    """The ids of a control token's characters, none of which is that token."""
    whole = tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not special & set(whole):
        return [int(i) for i in whole]
    return [
        int(i) for c in token for i in tokenizer(c, add_special_tokens=False)["input_ids"]
    ]  # it is in the vocabulary


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, size: int) -> tuple[re.Pattern[str] | None, frozenset[int]]:
    """What finds a control token (of a vocabulary of ``size``) in a text, and their ids."""
    tokens = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts = sorted(filter(None, tokens.values()), key=len, reverse=True)
    return (re.compile("|".join(map(re.escape, texts))) if texts else None), frozenset(tokens)


def _after(tokenizer: Any, context: str, space: str, words: str, end: str, template: Template) -> Ids:
    """The ids of ``space + words + end`` when they stand behind ``context``; ``words`` come from the data."""
    before, whole = _ids(tokenizer, context), _around(tokenizer, context + space, words, end)
    if whole[: len(before)] != before:
        raise TemplateError(
            f"template {template.name}: this tokenizer merges {context!r} with the text behind it "
            f"({(space + words + end)[:30]!r}), so an answer has no token boundary of its own; use the template the "
            "model was trained with"
        )
    return whole[len(before) :]
