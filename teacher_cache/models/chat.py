"""A conversation as a model reads it: written by the model's own chat template and processor, by nothing else.

The template is rendered with a slot where each answer goes, and the processor called once with the whole text and all
images, wherever they stand; then the answers' ids, as a model produced them, take the slots' places. What stands around
the answers is so exactly what ``processor(text=processor.apply_chat_template(...), images=...)`` gives.

``return_assistant_tokens_mask`` is no way to an answer's place: most templates give none, without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.data.conversations import IMAGE_TAG, Conversation, pieces
from teacher_cache.data.rows import TokenizedSample, collapse
from teacher_cache.errors import ConversationError, TemplateError
from teacher_cache.models.model_config import fixed_side, other_size
from teacher_cache.models.prompt import Prompt
from teacher_cache.models.slots import SLOT, SPELLED, Array, Ids, Slots

TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
"""Papers' templates, which no processor brings."""
CAPTIONS = ("plain", "plain_chatml")
"""Those of them that write no question."""
_SET = f"set teacher.chat_template to a Jinja file with the model's turns, or to one of {', '.join(TEMPLATES)}"

_DATE = (
    "the chat template writes today's date, so a cache begun today could not be finished tomorrow: give it a date "
    "(teacher.template_kwargs; date_string in Llama's), or set teacher.chat_template to a copy with a fixed one"
)


@dataclass(frozen=True)
class Sample:
    """What a model reads: S positions, each image written out as its positions."""

    input_ids: Array
    """(S,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(S,) true at the supervised answers' tokens, end tokens included."""
    image: Array
    """(S,) which image a position shows; -1 for text."""
    model: Mapping[str, Any]
    """What else the processor made: token types (S,); pixels and the like, on their own axes."""


class Chat:
    """How one model is shown conversations.

    processor: its processor, or the tokenizer of a text-only model; not changed · config: its configuration ·
    ends: what else ends its answers (``generation_config.eos_token_id``) · template: empty for the model's own, the
    name of a shipped one, or a Jinja file · template_kwargs: what is given to the template (``enable_thinking``).

    Raises
    ------
    TemplateError
        No chat template, or one that cannot be used: no end token behind an answer, today's date in the text.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        ends: Sequence[int] = (),
        template: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.processor = processor
        """The model's own."""
        self.name = template
        self.given = dict(template_kwargs or {})
        """What is given to the template."""
        self._made_with = {"config": config, "ends": ends, "template_kwargs": template_kwargs}
        self._sees = hasattr(processor, "image_processor")
        self._slots = Slots(processor.tokenizer if self._sees else processor)
        self._reader = self._tokenizer = self._slots.tokenizer
        if self._sees:
            self._reader = copy.copy(processor)
            self._reader.tokenizer = self._tokenizer
        self._kwargs = dict(self.given)
        self._choose_template(template)
        self._side = fixed_side(config) if self._sees else None
        token = getattr(config, "image_token_id", None) if self._sees else None
        self.image_token = -1 if token is None else int(token)
        """The id at an image's positions; -1 for a model that reads text alone."""
        known = [] if token is None else [self.image_token]
        named = [getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        self._placeholders = frozenset(filter(None, [*named, *self._tokenizer.convert_ids_to_tokens(known)]))
        self._learn(frozenset(ends))

    def _choose_template(self, name: str) -> None:
        """The template's text, and who writes the begin token."""
        file = TEMPLATES.get(name, Path(name))
        if name and not file.is_file():
            raise TemplateError(f"teacher.chat_template: no template {name!r}: {_SET}")
        own = getattr(self._reader, "chat_template", None) or self._tokenizer.chat_template
        if not name and not own:
            raise TemplateError(f"the model has no chat template: {_SET}")
        self._template = file.read_text("utf-8") if name else None
        self.text = str(self._template or own)
        """The template itself."""
        if "strftime_now" in self.text:
            self._kwargs["strftime_now"] = ""  # cannot be called
        self.adds_begin: bool | None = None
        """Whether the tokenizer writes the begin token; None: as ``apply_chat_template`` decides by the text."""
        if name in TEMPLATES:
            begin = self._tokenizer.bos_token_id
            begins = "bos_token" in self.text
            if begins and begin is None:
                raise TemplateError(f"the template {name} opens with a begin token, and the tokenizer has none: {_SET}")
            self.adds_begin = begins and self._tokenizer("")["input_ids"][:1] == [begin]
            if self.adds_begin:  # the tokenizer then writes "\u2581A" behind it, as in LLaVA's code, not "A"
                self._kwargs["bos_token"] = ""

    def _learn(self, ends: frozenset[int]) -> None:
        """From two short conversations: what ends an answer, what leads to it, and whether earlier turns stay."""
        question, answer = self._message("user", "Q"), self._message("assistant", SLOT)
        self._asks = SPELLED in self._render([self._message("user", SPELLED)], ask=True)
        self._context = self._render([question], ask=True)
        before, _, self._tail = self._render([question, answer]).partition(SLOT)
        later = self._render([question, answer, question], ask=True)
        tail = self._tokenizer(self._tail, add_special_tokens=False, return_offsets_mapping=True)
        if not tail["input_ids"] or tail["input_ids"][0] not in self._slots.control | ends:
            raise TemplateError(
                f"the chat template writes {self._tail!r} behind an answer, which begins with no end token: {_SET}"
            )
        self.end = int(tail["input_ids"][0])
        """The token that ends an answer in this template."""
        self.ends = ends | {self.end}
        """The tokens at which generation stops."""
        self._closing = self._tail[: tail["offset_mapping"][0][1]]
        begins = self._begins(self._context)
        self._context_ids = self._tokenizer(self._context, add_special_tokens=begins)["input_ids"]
        self._leads = before.startswith(self._context)
        self.lead = before[len(self._context) :] if self._leads else ""
        """What the template writes between its generation prompt and an answer: part of an answer's ids."""
        self.one_sequence = self._leads and later.startswith(self._context + self.lead + SLOT + self._closing)
        """Whether a later prompt goes on where the last answer ended; if not, each turn is a sample of its own."""

    def in_template(self, name: str) -> Chat:
        """The same model, shown conversations in another template."""
        return self if name == self.name else Chat(self.processor, template=name, **self._made_with)

    def prompt(self, conversation: Conversation, images: Sequence[Any] = ()) -> Prompt:
        """What stands around the answers of ``conversation``, with all its images; raises as :meth:`sample`."""
        assert self.one_sequence, "each turn is a sample of its own"
        marked = self.tokenized(conversation, [(self.end,)] * len(conversation.questions), images)
        return Prompt.of(marked, self.image_token, self.end)

    def tokenized(
        self, conversation: Conversation, answers: Sequence[Ids], images: Sequence[Any] = (), ask: bool = False
    ) -> TokenizedSample:
        """:meth:`sample` as a cache keeps it: of each run of image positions one alone."""
        whole = self.sample(conversation, answers, images, ask)
        return TokenizedSample(conversation.sample_id, *collapse(whole.input_ids, whole.loss_mask, whole.image))

    def check(self, conversation: Conversation, images: Sequence[Any] = ()) -> bool:
        """Compare :meth:`sample` with what the model's own processor makes of the text that its template writes: of the
        whole conversation with its original answers, or, where the template rewrites turns, of the first prompt. False
        where a text spells a control token, which is one to the processor and text to us.

        Raises
        ------
        TemplateError
            An id or another field differs: the first one.
        ConversationError
            As :meth:`sample`.
        """
        if self._slots.spells((*conversation.questions, *conversation.answers, conversation.system)):
            return False
        ask = not self.one_sequence
        answers = [] if ask else [self.original(answer) for answer in conversation.answers]
        sample = self.sample(conversation, answers, images, ask)
        messages = [self._message("system", conversation.system)] if conversation.system else []
        for question, answer in zip(conversation.questions[: 1 if ask else None], conversation.answers, strict=False):
            messages.append(self._message("user", *(pieces(question) if self._asks else [""] * len(pieces(question)))))
            messages += [] if ask else [self._message("assistant", answer.strip())]
        text = self._render(messages, ask, self.processor)
        shown = images[: sum(q.count(IMAGE_TAG) for q in conversation.questions[: 1 if ask else None])]
        more = {"images": [list(shown)] if shown else None} if self._sees else {}
        own = dict(self.processor(text=[text], return_tensors="pt", add_special_tokens=self._begins(text), **more))
        length = len(sample.input_ids)
        found: dict[str, Any] = {"input_ids": sample.input_ids, **sample.model}
        for name in sorted(found.keys() | own.keys() - {"attention_mask"}):
            line = name == "input_ids" or name.endswith("token_type_ids")
            theirs = own[name][0, :length] if name in own and line else own.get(name)
            if name not in found or theirs is None or not np.array_equal(np.asarray(theirs), np.asarray(found[name])):
                raise TemplateError(
                    f"sample {conversation.sample_id}: {name} is not what the model's own processor and template make "
                    f"of this conversation ({_apart(theirs, found.get(name))}), so what would be cached is not what "
                    f"the model reads. Is the template one that writes a turn in more than one way? Else {_SET}"
                )
        return True

    def original(self, answer: str) -> Ids:
        """An answer that no model produced, as the template writes it behind its prompt, with its end token.

        Raises
        ------
        ConversationError, TemplateError
            It spells an image's token; the tokenizer merges it with the prompt.
        """
        spelled: list[str] = []
        words = self._slots.plain(answer.strip(), spelled, self._placeholders)
        written = self._render([self._message("user", "Q"), self._message("assistant", words)])
        if self._leads and written.startswith(self._context) and written.endswith(self._tail):
            words = written[len(self._context) : len(written) - len(self._tail)]
        text, before = self._context + words + self._closing, self._context_ids
        whole = self._tokenizer(text, add_special_tokens=self._begins(self._context))["input_ids"]
        if whole[: len(before)] != before:
            raise TemplateError(
                f"the tokenizer merges the end of the prompt, {self._context[-20:]!r}, with the text behind it "
                f"({words[:30]!r}), so an answer has no token boundary of its own: {_SET}"
            )
        return tuple(self._slots.fill(whole[len(before) :], [], spelled)[0].tolist())

    def sample(
        self, conversation: Conversation, answers: Sequence[Ids], images: Sequence[Any] = (), ask: bool = False
    ) -> Sample:
        """The conversation up to its last given answer, or (``ask``) to the prompt for the next one.

        All answers are supervised. Where the template rewrites earlier turns (not :attr:`one_sequence`) the last one
        alone is, and those before it stand there as the template writes them. An answer that was cut off is closed
        before the next question, but nobody's end token is supervised. ``images``: Pillow's, in the conversation's
        order; those of later turns are left out.

        Raises
        ------
        ConversationError
            The model cannot be shown this: the reason.
        """
        text, slots, spelled = self._text(conversation, answers, ask)
        asked = conversation.questions[: len(answers) + ask]
        made = self._processed(text, images[: sum(question.count(IMAGE_TAG) for question in asked)])
        ids, offsets = (np.asarray(made.pop(name)[0]) for name in ("input_ids", "offset_mapping"))
        if wrong := other_size(made.get("pixel_values"), self._side):
            raise ConversationError(wrong)
        image = np.full(len(ids), -1)
        spans = made.pop("text_replacement_offsets", ())
        for number, span in enumerate(spans[0] if len(spans) else ()):
            inside = (offsets[:, 0] >= span["new_span"][0]) & (offsets[:, 0] < span["new_span"][1])
            image[inside & (ids == self.image_token)] = number
        values, source, mask = self._slots.fill(ids.tolist(), slots, spelled, self.ends)
        fields = {name: field for name, field in made.items() if name != "attention_mask"}
        for name in [name for name in fields if name.endswith("token_type_ids")]:
            line = fields[name][0]  # an answer's tokens are text, type 0
            fields[name] = line[source.clip(0)] * line.new_tensor(source >= 0)
        return Sample(values, mask, np.where(source >= 0, image[source.clip(0)], -1), fields)

    def unexpanded(
        self, conversation: Conversation, answers: Sequence[Ids], ask: bool = False
    ) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """As :meth:`sample`, for an engine that expands images itself: ids with one placeholder an image, loss mask."""
        text, slots, spelled = self._text(conversation, answers, ask)
        ids = self._tokenizer(text, add_special_tokens=self._begins(text))["input_ids"]
        values, _, mask = self._slots.fill(ids, slots, spelled, self.ends)
        return tuple(values.tolist()), mask

    def _text(
        self, conversation: Conversation, answers: Sequence[Ids], ask: bool
    ) -> tuple[str, Sequence[Ids], list[str]]:
        """What the template writes, the answers of its slots, and the control tokens that texts in it spell."""
        if any(self.image_token in answer for answer in answers):
            raise ConversationError("an answer holds the image token")
        turn = len(answers) - (not ask)
        spelled: list[str] = []
        messages: list[dict[str, Any]] = []

        def say(role: str, *parts: str) -> None:
            plain = [part if part == SLOT else self._slots.plain(part, spelled, self._placeholders) for part in parts]
            messages.append(self._message(role, *plain))

        if conversation.system:
            say("system", conversation.system)
        for t in range(turn + 1):
            asked = pieces(conversation.questions[t])
            say("user", *(asked if self._asks else [""] * len(asked)))
            if t < turn:
                say("assistant", SLOT if self.one_sequence else self._said(answers[t]))
        text = self._render(messages, ask=True).replace(self.lead + SLOT, SLOT) + ("" if ask else SLOT)
        slots = answers if self.one_sequence else answers[turn:]
        if text.count(SLOT) != len(slots) or text.count(SPELLED) != len(spelled):
            raise ConversationError("the chat template does not write every turn once, as it stands")
        return text, slots, spelled

    def _said(self, answer: Ids) -> str:
        """An earlier answer in words, its end token left out; a thought in it is the template's to leave out."""
        words = answer[:-1] if answer[-1:] and answer[-1] in self.ends else answer
        return str(self._tokenizer.decode(list(words), clean_up_tokenization_spaces=False)).strip()

    def _message(self, role: str, *parts: str) -> dict[str, Any]:
        """Texts with an image between each two: parts for a processor, a text for a tokenizer."""
        if not self._sees:
            if len(parts) > 1:
                raise ConversationError("an image, but the model reads text only")
            return {"role": role, "content": parts[0]}
        content: list[dict[str, str]] = []
        for number, text in enumerate(parts):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": text}] if text or len(parts) == 1 else []
        return {"role": role, "content": content}

    def _render(self, messages: list[dict[str, Any]], ask: bool = False, reader: Any = None) -> str:
        from jinja2 import TemplateError as JinjaError

        settings: dict[str, Any] = {"chat_template": self._template, "tokenize": False, "add_generation_prompt": ask}
        try:
            return str((reader or self._reader).apply_chat_template(messages, **settings, **self._kwargs))
        except (JinjaError, TypeError) as error:
            if "strftime_now" in self._kwargs and "not callable" in str(error):
                raise TemplateError(_DATE) from error
            raise ConversationError(f"the chat template refuses it: {error}") from error

    def _begins(self, text: str) -> bool:
        """Whether the tokenizer is to write its begin token before ``text``, as ``apply_chat_template`` decides."""
        if self.adds_begin is not None or not self._sees:
            return bool(self.adds_begin)
        begin = self._tokenizer.bos_token
        return not (begin and text.startswith(begin))

    def _processed(self, text: str, images: Sequence[Any]) -> dict[str, Any]:
        """The processor's output for one text, where its tokens stand in it, and where its images."""
        more: dict[str, Any] = {"add_special_tokens": self._begins(text), "return_offsets_mapping": True}
        if self._sees:
            more |= {"images": [list(images)] if images else None, "return_text_replacement_offsets": True}
        try:
            return dict(self._reader(text=[text], return_tensors="pt", **more))
        except ValueError as error:
            raise ConversationError(f"the model's processor refuses it: {error}") from error


def _apart(theirs: Any, ours: Any) -> str:
    """The first difference of two fields."""
    if theirs is None or ours is None:
        return "one of the two has none"
    left, right = np.asarray(theirs), np.asarray(ours)
    if left.shape != right.shape:
        return f"shape {left.shape} there, {right.shape} here"
    place = np.unravel_index(int(np.argmax(left != right)), left.shape)
    return f"{left[place]} there, {right[place]} here, at {tuple(map(int, place))}"
