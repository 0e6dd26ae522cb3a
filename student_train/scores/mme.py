"""MME: two yes/no questions an image, and points for getting both right.

Source: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models" (arXiv 2306.13394);
official `eval_tool/calculation.py`, with the answers joined to the release folder as LLaVA's `convert_answer_to_mme.py`
does it.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from student_train.scores.answers import Answer, by_question, check_answered, read_answers

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_INSTRUCTION = "Answer the question using a single word or phrase."
_ENDING = " Please answer yes or no."

Question = tuple[str, str, str]
"""Subtask, annotation file (one an image), question."""


@dataclass(frozen=True)
class SubtaskScores:
    """`accuracy` over questions; `accuracy_plus` over images: both questions right. `others`: neither yes nor no."""

    accuracy: float
    accuracy_plus: float
    others: int

    @property
    def points(self) -> float:
        """0 to 200."""
        return self.accuracy * 100 + self.accuracy_plus * 100


@dataclass(frozen=True)
class MmeScores:
    subtasks: dict[str, SubtaskScores]

    @property
    def perception(self) -> float:
        """Points over the ten perception subtasks, at most 2000: the figure papers report."""
        return sum(self.subtasks[name].points for name in PERCEPTION)

    @property
    def cognition(self) -> float:
        """Points over the four cognition subtasks, at most 800."""
        return sum(self.subtasks[name].points for name in COGNITION)


def score_mme(answers_path: Path | str, annotations_dir: Path | str) -> MmeScores:
    """Scores against `MME_Benchmark_release_version`; answers have `question_id` "subtask/image.png" and a `prompt`.

    ValueError: one of the 14 subtasks is not there, an image without two questions, or answers that do not fit.
    """
    labels = _read_labels(Path(annotations_dir))
    answers = by_question(read_answers(answers_path), answers_path, key=lambda answer: _question(answer, labels))
    check_answered(answers, labels, answers_path, annotations_dir)
    images: dict[str, dict[str, list[str]]] = {name: defaultdict(list) for name in PERCEPTION + COGNITION}
    others: Counter[str] = Counter()
    for question, label in labels.items():
        said = yes_no_or_other(answers[question].text)
        others[question[0]] += said == "other"
        images[question[0]][question[1]].append("right" if said == label else "wrong")
    return MmeScores({name: _subtask(list(rows.values()), others[name]) for name, rows in images.items()})


def yes_no_or_other(text: str) -> str:
    """What the first four characters say, case aside. " yes" says yes, but "  yes" and "Well, no" are other."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def _subtask(images: list[list[str]], others: int) -> SubtaskScores:
    right = [image.count("right") for image in images]
    return SubtaskScores(
        accuracy=sum(right) / (2 * len(images)), accuracy_plus=right.count(2) / len(images), others=others
    )


def _question(answer: Answer, labels: dict[Question, str]) -> Question:
    """The annotated question that an answer belongs to: LLaVA's instruction off, MME's ending on.

    Some annotations have two spaces before the ending.
    """
    subtask, _, image = answer.question_id.rpartition("/")
    file = image.split(".")[0] + ".txt"
    prompt = answer.prompt
    if _INSTRUCTION in prompt:
        prompt = prompt.replace(_INSTRUCTION, "").strip()
    if _ENDING.strip() in prompt:
        return subtask, file, prompt
    two_spaces = (subtask, file, f"{prompt} {_ENDING}")
    return two_spaces if two_spaces in labels else (subtask, file, prompt + _ENDING)


def _read_labels(folder: Path) -> dict[Question, str]:
    """Question → "yes" or "no", from `subtask/*.txt` or `subtask/questions_answers_YN/*.txt`."""
    labels: dict[Question, str] = {}
    for subtask in PERCEPTION + COGNITION:
        place = folder / subtask
        if (place / "images").exists():
            place /= "questions_answers_YN"
        files = sorted(place.glob("*.txt"))
        if not files:
            raise ValueError(
                f"{place}: no annotation files; expected those of subtask '{subtask}' (MME has 14 subtasks). "
                "Pass the folder MME_Benchmark_release_version."
            )
        for file in files:
            labels.update(_read_image_labels(subtask, file))
    return labels


def _read_image_labels(subtask: str, file: Path) -> dict[Question, str]:
    lines = [line.strip().split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    pairs = {(subtask, file.name, line[0]): line[-1].lower() for line in lines if len(line) == 2}
    if len(lines) != 2 or len(pairs) != 2 or not set(pairs.values()) <= {"yes", "no"}:
        raise ValueError(
            f"{file}: {lines}; expected two lines 'question<tab>Yes or No', one image a file. Download MME again."
        )
    return pairs
