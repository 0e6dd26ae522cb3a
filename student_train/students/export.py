"""A student as a standard Hugging Face folder: loads in Transformers, vLLM and lmms-eval without this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlavaForConditionalGeneration

from teacher_cache.data.tokenization import Template, end_token_id
from teacher_cache.errors import ConfigError
from teacher_cache.models.weights import rename_vision_weights


def save_student(model: LlavaForConditionalGeneration, processor: Any, folder: Path, template: Template) -> None:
    """Weights (safetensors, with the hub's names), processor, tokenizer, template; complete or not at all.

    Generation stops at the template's end token: ChatML's is not the end token of every tokenizer that knows it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_token_id(tokenizer, template),
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
    shown = json.loads((temporary / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    card = model_card(output.name, json.loads(facts.read_text(encoding="utf-8")), metrics, bool(shown.get("do_pad")))
    (temporary / "README.md").write_text(card, encoding="utf-8")
    temporary.rename(output)
    return output


def model_card(name: str, run: dict[str, Any], metrics: dict[str, float], pads: bool) -> str:
    """Markdown with the hub's metadata: caches by fingerprint, losses, training settings, metrics, and how images were
    shown (``pads``: as padded squares)."""
    losses = "\n".join(
        f"- {loss['weight']:g} × {loss['name']}"
        + "".join(f", {key}: {value}" for key, value in loss.items() if key not in ("weight", "name"))
        for loss in run["config"]["losses"]
    )
    caches = "\n".join(f"- {c['teacher']}: {c['samples']:,} samples, cache `{c['fingerprint']}`" for c in run["caches"])
    table = "\n".join(f"| {metric} | {value:.4g} |" for metric, value in metrics.items())
    train = run["config"]["train"]
    images = "padded to a square with the mean colour" if pads else "not padded: the tower's own resizing and cropping"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, distillation]
---

# {name}

A LLaVA student, distilled offline with teacher-cache from:

{caches or "- no teacher: plain instruction data"}

Losses:

{losses}

{run["steps"]} steps of {train["global_batch"]} samples, learning rate {train["learning_rate"]:g} ({train["schedule"]}),
seed {train["seed"]}.

Images were {images}. The processor does the same (Transformers' `LlavaImageProcessor`), and its chat template writes
conversations as in training; another processor shows the student images that it was not trained on.

{f"| metric | value |{chr(10)}|---|---|{chr(10)}{table}" if table else "Not measured yet."}

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```
"""
