"""What every captured answer must satisfy: the engine read our ids, and its states give its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from teacher_cache.config import CacheConfig
from teacher_cache.errors import TeacherError
from teacher_cache.models.probe import LOGIT_TOLERANCE, compare
from teacher_cache.teachers.teacher import SampleStates, Shown, TeacherDescription, Wanted
from teacher_cache.teachers.torch_teacher import TorchTeacher
from teacher_cache.teachers.vllm.jobs import Outcome


def check_ids(name: str, expected: npt.NDArray[np.int64], read: npt.NDArray[np.int64] | None) -> None:
    """The ids that the engine read must be ours, with the image's placeholder expanded."""
    assert read is not None
    if np.array_equal(expected, read):
        return
    shared = min(len(expected), len(read))
    first = int(np.argmax(np.append(expected[:shared] != read[:shared], True)))
    ours, theirs = (int(ids[first]) if first < len(ids) else None for ids in (expected, read))
    raise TeacherError(
        f"{name}: the engine read {len(read)} tokens, expected {len(expected)}; first difference at position {first}: "
        f"it read {theirs}, ours is {ours}. Does vLLM write an image out as another number of tokens than the model's "
        "own processor? Set teacher.backend=torch."
    )


COMPARED = 8
"""Text positions at a prompt's end, behind its images, whose logits are compared."""


def torch_states(config: CacheConfig, shown: Sequence[Shown], wanted: Wanted) -> dict[int, SampleStates]:
    """What the torch teacher gives for ``shown``, by place: on the GPU, which it leaves; on the CPU where the model is
    one for several GPUs."""
    several = config.speed.tensor_parallel > 1
    speed = replace(config.speed, device="cpu" if several else config.speed.device)
    teacher = TorchTeacher(config.teacher, config.generation, speed)
    try:
        scored = list(teacher.score(shown, wanted))
        return {place: state for places, states in scored for place, state in zip(places, states, strict=True)}
    finally:
        teacher.close()


def check_states(
    name: str, given: SampleStates, expected: SampleStates, head: torch.Tensor, of: TeacherDescription
) -> None:
    """The states that the engine gave for the text of a prompt, against torch's: their logits at its end."""
    text = [states.text for states in (given, expected) if states.text is not None]
    ours, theirs = (of.logit_rule.apply((states[-COMPARED:].to(head) @ head.T).float()) for states in text)
    what = f"{name}: vLLM's states give another logit than torch's"
    compare(what, ours, theirs, of.dtype, "Does vLLM run this model otherwise here? Set teacher.backend=torch")


def check_logits(name: str, rows: torch.Tensor, head: torch.Tensor, outcome: Outcome, of: TeacherDescription) -> None:
    """The invariant head(norm(h)) = the engine's logits, on the engine's most likely ids of every row."""
    if outcome.top_ids is None or outcome.top_logits is None:
        return
    ids = torch.from_numpy(outcome.top_ids).to(rows.device)
    theirs = torch.from_numpy(outcome.top_logits).to(rows.device)
    if not bool(torch.isfinite(rows).all()) or bool(torch.isinf(theirs).any()):
        return  # too large for the dtype, here or there: what becomes of it is looked at before it is stored
    ours = of.logit_rule.apply(torch.einsum("rd,rkd->rk", rows.float(), head[ids].float()))
    off = (ours - theirs).abs().amax(-1)
    allowed = LOGIT_TOLERANCE[of.dtype] * max(1.0, float(theirs.abs().max()))
    if bool((off <= allowed).all()):  # also false where the engine alone has NaN
        return
    row = int((~(off <= allowed)).nonzero()[0])
    raise TeacherError(
        f"{name}: answer row {row} of {len(off)}: the captured state does not give the engine's logits: id "
        f"{int(ids[row, 0])} has {float(theirs[row, 0]):.5g} in the engine and {float(ours[row, 0]):.5g} from "
        f"head(norm(h)), allowed difference {allowed:.2g}. So these are not this model's final states (a vLLM "
        "version or a model class that was never tried?). Set teacher.backend=torch."
    )
