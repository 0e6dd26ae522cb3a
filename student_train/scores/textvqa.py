"""TextVQA: soft accuracy against ten human answers.

Source: Singh et al., "Towards VQA Models That Can Read", CVPR 2019 (arXiv 1904.08920). Each prediction is compared,
after normalisation, with every leave-one-out set of nine of the ten answers: min(matches / 3, 1), averaged. The
normalisation is that of EvalAI's VQA server as M4C's `EvalAIAnswerProcessor` has it; the whole as LLaVA runs it,
`llava/eval/eval_textvqa.py` and `llava/eval/m4c_evaluator.py`, on `TextVQA_0.5.1_val.json`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_train.scores.answers import Answer, check_answered, read_answers, read_json, require_columns

_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# As published: a full stop goes unless a digit follows it. ("<=" was meant as a look-behind and is none.)
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
# Python's sub() takes the official script's `re.UNICODE` for its `count`, so at most this many full stops go.
_FULL_STOPS_REMOVED = int(re.UNICODE)
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a hundred quoted words read worse)
# A contraction with one apostrophe left out → the contraction. The last entry is the wrong way round, as published.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


@dataclass(frozen=True)
class TextVqaScores:
    """`per_sample` in the order of the answer file."""

    accuracy: float
    per_sample: list[float]


def score_textvqa(answers_path: Path | str, annotations_path: Path | str) -> TextVqaScores:
    """Soft accuracy of an answer file. LLaVA's answers have the image id as `question_id`, the question in `prompt`.

    ValueError: a question missing, answered twice, unknown, or a prompt whose question cannot be told.
    """
    annotations: list[dict[str, Any]] = read_json(annotations_path)["data"]
    for annotation in annotations:
        require_columns(annotation, ("image_id", "question", "answers"), annotations_path)
    references = {(row["image_id"], row["question"].lower()): row["answers"] for row in annotations}
    answers = read_answers(answers_path)
    keys = [(answer.question_id, question_of(answer, answers_path)) for answer in answers]
    # Two annotators may have put the same question to one image, hence the comparison as multisets.
    asked = [(row["image_id"], row["question"].lower()) for row in annotations]
    check_answered(keys, asked, answers_path, annotations_path)
    scores = [soft_accuracy(answer.text, references[key]) for answer, key in zip(answers, keys, strict=True)]
    return TextVqaScores(accuracy=sum(scores) / len(scores), per_sample=scores)


def soft_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA accuracy of one answer against its ten human ones, between 0 and 1; float for float the official figure."""
    answer = normalise(prediction)
    agree = [normalise(reference) == answer for reference in references]
    matches = sum(agree)
    if not matches:
        return 0.0
    leave_one_out = [min(1, float(matches - agrees) / 3) for agrees in agree]
    return sum(leave_one_out) / len(leave_one_out)


def normalise(text: str) -> str:
    """EvalAI's form of an answer: lower case, numbers as digits, no articles, contractions with their apostrophe.

    Possessives become a word of their own ("joe's" → "joe 's"), as in M4C's tokenizer.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def question_of(answer: Answer, path: Path | str) -> str:
    """The question inside a LLaVA prompt, lower-cased: before the instruction, with or without OCR tokens."""
    lines = answer.prompt.split("\n")
    if answer.prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", answer.prompt, re.DOTALL)
        if match:
            return match.group(1).lower()
    elif "Reference OCR token: " in answer.prompt and len(lines) == 3:
        return lines[1 if lines[0].startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"{path} line {answer.line}: cannot tell the question from the prompt {answer.prompt[:80]!r}; expected the "
        "question, then the instruction in its own line. Ask with LLaVA's prompts (llava_textvqa_val_v051_ocr.jsonl)."
    )


def _without_punctuation(text: str) -> str:
    """A sign next to a space anywhere in the text goes everywhere; otherwise it becomes a space."""
    out = text
    for sign in _PUNCTUATION:
        out = out.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    return _FULL_STOP.sub("", out, count=_FULL_STOPS_REMOVED)
