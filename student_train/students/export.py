"""A student as a standard Hugging Face folder: loads in Transformers, vLLM and lmms-eval without this package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from teacher_cache.errors import ConfigError
from teacher_cache.models.weights import rename_vision_weights


def save_student(model: PreTrainedModel, processor: Any, folder: Path, ends: Sequence[int]) -> None:
    """Weights (safetensors, with the hub's names), processor, tokenizer, template; complete or not at all.

    Generation stops at ``ends``, the template's: ChatML's is not the end token of every tokenizer that knows it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    rename_vision_weights(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def export_run(run: Path, output: Path) -> Path:
    """Copy a finished run's student to ``output``, with a model card that says what it was made from.

    Raises ``ConfigError``: the run is not finished, or ``output`` is there already.
    """
    facts = run / "run.json"
    if not (run / "model").is_dir() or not facts.is_file():
        raise ConfigError(f"{run}: no finished run here (model/ and run.json are missing). Train it: student-train fit")
    if output.exists():
        raise ConfigError(f"{output}: exists already. Choose another folder")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run / "model", temporary)
    file = run / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8"))["metrics"] if file.is_file() else {}
    described = temporary / "processor_config.json"
    shown = json.loads(described.read_text(encoding="utf-8"))["image_processor"] if described.is_file() else None
    card = model_card(output.name, json.loads(facts.read_text(encoding="utf-8")), metrics, shown)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    temporary.rename(output)
    return output


def model_card(name: str, run: dict[str, Any], metrics: dict[str, float], shown: dict[str, Any] | None) -> str:
    """Markdown with the hub's metadata: caches by fingerprint, losses, training settings, metrics, and how images were
    ``shown``: the settings of its image processor; None for a student that reads text only."""
    losses = "\n".join(
        f"- {loss['weight']:g} × {loss['name']}"
        + "".join(f", {key}: {value}" for key, value in loss.items() if key not in ("weight", "name"))
        for loss in run["config"]["losses"]
    )
    caches = "\n".join(f"- {c['teacher']}: {c['samples']:,} samples, cache `{c['fingerprint']}`" for c in run["caches"])
    table = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in metrics.items())
    train = run["config"]["train"]
    kind, reads, images, task = "ImageTextToText", "Processor", "", "image-text-to-text"
    if shown is None:
        kind, reads, task = "CausalLM", "Tokenizer", "text-generation"
    elif str(shown.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
        pads, own = "padded to a square with the mean colour", "not padded: the tower's own resizing and cropping"
        images = f"Images were {pads if shown.get('do_pad') else own}.\n"
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [distillation]
---

# {name}

A student, distilled offline with teacher-cache from:

{caches or "- no teacher: plain instruction data"}

Losses:

{losses}

{run["steps"]} steps of {train["global_batch"]} samples, learning rate {train["learning_rate"]:g} ({train["schedule"]}),
seed {train["seed"]}.

{images}The {reads.lower()} in this folder reads as in training, by its own chat template; another one shows the student
what it was not trained on.

{f"| metric | value |{chr(10)}|---|---|{chr(10)}{table}" if table else "Not measured yet."}

```python
from transformers import Auto{reads}, AutoModelFor{kind}
model = AutoModelFor{kind}.from_pretrained("{name}")
{reads.lower()} = Auto{reads}.from_pretrained("{name}")
```
"""
