"""Questions about a scene with their true answers, the noisy answers of a model that never saw it, and captions.

LLaVA-Instruct's answers were written by a text-only language model. `guess` and `blind_caption` play that model:
they follow language priors (always "yes", mostly "red"), mix attributes up and add objects that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.tiny.scenes import COLORS, DIGITS, KINDS, POSITIONS, Scene

COUNTS = ("1", "2", "3", "4")
VISUAL_QUESTIONS = ("color", "what", "where", "count", "exist", "compare")
QUESTION_TYPES = (*VISUAL_QUESTIONS, "describe", "fact")
DESCRIBE = "describe the image"  # position kind color: each word is the key that looks up the next one
LIST = "list the objects"  # kind position color: teaches to find a thing by its kind
CAPTION_QUESTIONS = (DESCRIBE, LIST)

FACTS = {
    "what is the opposite of left": "right",
    "what is the opposite of right": "left",
    "what is the opposite of up": "down",
    "what is the opposite of down": "up",
    "what is the opposite of hot": "cold",
    "what is the opposite of cold": "hot",
    "what is the opposite of day": "night",
    "what is the opposite of night": "day",
    "what color is grass": "green",
    "what color is a banana": "yellow",
    "what color is a tomato": "red",
    "what color is the sky": "blue",
    "what comes after zero": "one",
    "what comes after one": "two",
    "what comes after two": "three",
}

# What a text-only model says when it has to guess: most likely first.
GUESSES = {
    "color": (COLORS, (0.4, 0.1, 0.15, 0.05, 0.25, 0.05)),
    "what": (KINDS, (0.35, 0.25, 0.1, 0.05, 0.05, 0.1, 0.05, 0.05)),
    "where": (POSITIONS, (0.5, 0.2, 0.2, 0.1)),
    "count": (COUNTS, (0.1, 0.5, 0.3, 0.1)),
    "exist": (("yes",), (1.0,)),
    "compare": (("yes",), (1.0,)),
}
GUESS_RATE = 0.35
SWAP_RATE = 0.2
INVENT_RATE = 0.25
# Of the comparisons asked about unequal numbers; with the ties, which are a "no", half of all answers are "yes".
RIGHT_COMPARISON_RATE = 0.7

Statement = tuple[str | None, str | None, str | None]


@dataclass(frozen=True)
class Turn:
    """A question, its answer and its type (one of `QUESTION_TYPES`)."""

    question: str
    answer: str
    type: str


def ask(scene: Scene, question_type: str, rng: np.random.Generator) -> Turn:
    """One question of a visual type, truly answered. Yes and no are equally likely."""
    question, answer = _ASK[question_type](scene, rng)
    return Turn(question, answer, question_type)


def _ask_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = scene.things[rng.integers(len(scene.things))]
    return f"what color is the {thing.kind}", thing.color


def _ask_what(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    position = POSITIONS[rng.integers(len(POSITIONS))]
    found = [thing.kind for thing in scene.things if thing.position == position]
    return f"what is at the {position}", found[0] if found else "nothing"


def _ask_where(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = scene.things[rng.integers(len(scene.things))]
    return f"where is the {thing.kind}", thing.position


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "how many objects are there", COUNTS[len(scene.things) - 1]


def ask_existence(scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
    """`count` different existence questions about a scene, as POPE asks several of each image."""
    turns: dict[str, Turn] = {}
    while len(turns) < count:
        turn = ask(scene, "exist", rng)
        turns.setdefault(turn.question, turn)
    return list(turns.values())


def _ask_exist(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = [thing.kind for thing in scene.things]
    absent = [kind for kind in KINDS if kind not in present]
    answer, kinds = ("yes", present) if rng.random() < 0.5 else ("no", absent)
    return f"is there a {kinds[rng.integers(len(kinds))]}", answer


def _ask_compare(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    digits = sum(thing.kind in DIGITS for thing in scene.things)
    shapes = len(scene.things) - digits
    ask_for_digits = digits > shapes if rng.random() < RIGHT_COMPARISON_RATE else digits < shapes
    if ask_for_digits:
        return "are there more digits than shapes", "yes" if digits > shapes else "no"
    return "are there more shapes than digits", "yes" if shapes > digits else "no"


_ASK: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str]]] = {
    "color": _ask_color,
    "what": _ask_what,
    "where": _ask_where,
    "count": _ask_count,
    "exist": _ask_exist,
    "compare": _ask_compare,
}


def ask_several(scene: Scene, count: int, rng: np.random.Generator) -> list[Turn]:
    """`count` different questions in random order, the types evenly mixed: a round of all six, then another."""
    turns: dict[str, Turn] = {}
    while len(turns) < count:
        for question_type in rng.permutation(VISUAL_QUESTIONS):
            turn = ask(scene, str(question_type), rng)
            turns.setdefault(turn.question, turn)
    return list(turns.values())[:count]


def ask_facts(count: int, rng: np.random.Generator) -> list[Turn]:
    """`count` different questions that need no image."""
    questions = list(FACTS)
    chosen = rng.choice(len(questions), size=count, replace=False)
    return [Turn(questions[index], FACTS[questions[index]], "fact") for index in chosen]


def caption_objects(scene: Scene) -> list[Statement]:
    """The true (position, kind, color) of each thing, in reading order."""
    return [(thing.position, thing.kind, thing.color) for thing in scene.things]


def write_caption(objects: Sequence[Statement], question: str, rng: np.random.Generator) -> str:
    """State objects in random order, as people do: what `question` fixes is the order of the words inside an object."""
    order = (0, 1, 2) if question == DESCRIBE else (1, 0, 2)
    shuffled = [objects[index] for index in rng.permutation(len(objects))]
    return " and ".join(" ".join(str(thing[i]) for i in order) for thing in shuffled)


def describe(scene: Scene, question: str, rng: np.random.Generator) -> Turn:
    """A caption question with a true caption."""
    return Turn(question, write_caption(caption_objects(scene), question, rng), "describe")


def parse_caption(text: str) -> list[Statement]:
    """The (position, kind, color) objects that a caption of either style states, in order.

    An attribute that is not stated is None, so that a broken phrase matches no real object. A phrase without any
    known word states nothing.
    """
    statements = []
    for phrase in text.split(" and "):
        words = phrase.split()
        stated = tuple(next((word for word in words if word in known), None) for known in (POSITIONS, KINDS, COLORS))
        if any(stated):
            statements.append(stated)
    return statements


def guess(turn: Turn, rng: np.random.Generator) -> Turn:
    """The turn as answered from language priors alone. Facts need no image, so they stay right."""
    if turn.type not in GUESSES:
        return turn
    words, chances = GUESSES[turn.type]
    return replace(turn, answer=str(rng.choice(words, p=chances)))


def blind_answers(turns: Sequence[Turn], rng: np.random.Generator) -> list[Turn]:
    """What a text-only model left us: a share GUESS_RATE of the answers are guesses (some of them right)."""
    return [guess(turn, rng) if rng.random() < GUESS_RATE else turn for turn in turns]


def blind_caption(scene: Scene, question: str, rng: np.random.Generator) -> Turn:
    """A caption with swapped attributes and, at times, an object that is not there; two in five stay clean."""
    objects = [_swap_attribute(thing, rng) if rng.random() < SWAP_RATE else thing for thing in caption_objects(scene)]
    if rng.random() < INVENT_RATE:
        objects.append((str(rng.choice(POSITIONS)), str(rng.choice(KINDS)), str(rng.choice(COLORS))))
    return Turn(question, write_caption(objects, question, rng), "describe")


def _swap_attribute(thing: Statement, rng: np.random.Generator) -> Statement:
    """Replace one of the three attributes by another value."""
    which = int(rng.integers(3))
    words = [word for word in (POSITIONS, KINDS, COLORS)[which] if word != thing[which]]
    swapped = list(thing)
    swapped[which] = str(rng.choice(words))
    return (swapped[0], swapped[1], swapped[2])
