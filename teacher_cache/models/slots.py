"""Text with slots as token ids: what stands around them is tokenised as one text, what goes into them stays as it is.

Two tokens are added to a copy of the tokenizer. Where an answer goes stands :data:`SLOT`; its ids, which a model
produced, need not be those of its text. Where a text of the data spells a control token (``</s>``, ``<|im_end|>``)
stands :data:`SPELLED`, which cuts the text just as that token would; its letters' ids take that place: it stays text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_cache.data.conversations import IMAGE_TAG
from teacher_cache.errors import ConversationError, TemplateError

Ids = tuple[int, ...]
Array = npt.NDArray[np.int64]
SLOT, SPELLED = "\ue0f0answer\ue0f1", "\ue0f0spelled\ue0f1"


class Slots:
    """A copy of a fast tokenizer, :attr:`tokenizer`, that knows the two tokens.

    Raises
    ------
    TemplateError
        The tokenizer cannot say where its tokens stand in a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError("the model's tokenizer cannot say where its tokens stand: a tokenizer.json is needed")
        self.tokenizer = copy.deepcopy(tokenizer)
        special = {int(i): token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control = frozenset(special)
        """The ids of the tokenizer's own control tokens."""
        texts = sorted(special.values(), key=len, reverse=True)
        self._spells = re.compile("|".join(map(re.escape, (SLOT, SPELLED, *texts))))
        self.tokenizer.add_tokens([SLOT, SPELLED], special_tokens=True)
        self._slot, self._spelled = self.tokenizer.convert_tokens_to_ids([SLOT, SPELLED])

    def spells(self, texts: Sequence[str]) -> bool:
        """Whether a text spells a control token; an image's place, which the data write as ``<image>``, is none."""
        return any(self._spells.search(part) for text in texts for part in text.split(IMAGE_TAG))

    def plain(self, text: str, spelled: list[str], refused: Collection[str] = ()) -> str:
        """``text`` with a mark for each control token that it spells; they are added to ``spelled``.

        Raises
        ------
        ConversationError
            It spells a token of ``refused``.
        """
        found = self._spells.findall(text)
        if held := set(found).intersection(refused):
            raise ConversationError(f"a text spells {min(held)}, by which the model knows an image, a video or a sound")
        spelled += found
        return self._spells.sub(SPELLED, text)

    def fill(
        self, ids: Sequence[int], answers: Sequence[Ids], spelled: Sequence[str], ends: Collection[int] = ()
    ) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
        """(T,) ids with all slots filled; where each stood in ``ids``, -1 for what was filled in; which are answers'.

        An answer that was cut off has no end token; the one that follows its slot closes it. Any other brought its own.
        """
        values: list[int] = []
        source: list[int] = []
        mask: list[bool] = []
        given, texts, closed = iter(answers), iter(spelled), False
        for place, token in enumerate(ids):
            is_slot, own = token == self._slot, token not in (self._slot, self._spelled)
            put: Sequence[int] = (token,)
            if is_slot:
                put = next(given)
            elif not own:
                put = self._letters(next(texts))
            elif closed and token in ends:
                put = ()
            closed = is_slot and bool(put) and put[-1] in ends
            values += put
            source += [place if own else -1] * len(put)
            mask += [is_slot] * len(put)
        return np.asarray(values, np.int64), np.asarray(source, np.int64), np.asarray(mask, np.bool_)

    def _letters(self, token: str) -> Ids:
        """The ids of a control token's letters, none of which is that token."""
        whole = self.tokenizer(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.control & set(whole):  # it is in the vocabulary, too
            whole = [i for c in token for i in self.tokenizer(c, add_special_tokens=False)["input_ids"]]
        return tuple(int(i) for i in whole)
