"""Objects that an answer states and the image does not have.

Source: CHAIR, Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018 (arXiv 1809.02156), equations 1
and 2, over sets of objects: what was stated is given, not parsed out of captions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from student_train.scores.answers import ratio
from student_train.scores.vqa import check_lengths


@dataclass(frozen=True)
class HallucinationScores:
    """Over all answers together (an answer with many objects weighs more), 0.0 where there is nothing to count.

    `precision`: share of the stated objects that are there · `recall`: share of the true objects that were stated ·
    `hallucination_rate`: share of the stated objects that are not there (CHAIR_i) · `hallucinating_answers`: share of
    the answers that state at least one such object (CHAIR_s).
    """

    precision: float
    recall: float
    hallucination_rate: float
    hallucinating_answers: float


def hallucination(
    stated_objects: Sequence[Collection[str]], true_objects: Sequence[Collection[str]]
) -> HallucinationScores:
    """Scores of M answers: the objects each states and the objects its image has. Case and repetition do not count."""
    check_lengths(stated_objects=stated_objects, true_objects=true_objects)
    pairs = [(_objects(stated), _objects(true)) for stated, true in zip(stated_objects, true_objects, strict=True)]
    stated_count = sum(len(stated) for stated, _ in pairs)
    true_count = sum(len(true) for _, true in pairs)
    seen = sum(len(stated & true) for stated, true in pairs)
    return HallucinationScores(
        precision=ratio(seen, stated_count),
        recall=ratio(seen, true_count),
        hallucination_rate=ratio(stated_count - seen, stated_count),
        hallucinating_answers=ratio(sum(bool(stated - true) for stated, true in pairs), len(pairs)),
    )


def _objects(names: Collection[str]) -> set[str]:
    if isinstance(names, str):
        raise ValueError(f"objects: the text {names!r}; expected a collection of names. Pass a list, one name each.")
    return {name.strip().lower() for name in names}
