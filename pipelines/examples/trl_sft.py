"""A cache in TRL's SFTTrainer, whose data set holds numbers: the cache's collate reads the samples.

python -m pipelines.examples.trl_sft runs/tiny/students/0 runs/tiny/cache runs/tiny/world/images
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import teacher_cache as tc

distil = tc.distillation(["cross_entropy", {"name": "forward_kl", "weight": 2.0}])
DATA = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_length": None}
TRAIN = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "bf16": False}
REST = {"gradient_checkpointing": False, "optim": "adamw_torch", "report_to": "none", "save_strategy": "no"}


class Distilled(SFTTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, outputs = inputs["labels"], model(**inputs.inputs)
        loss = distil(outputs, labels, num_items_in_batch) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def train(folder: str, cache: str, images: str, order: Sequence[int], dtype: str = "float32") -> PreTrainedModel:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    student = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    student.model.vision_tower.requires_grad_(False)
    with tc.open(cache, tokenizer=processor.tokenizer) as opened:
        collate = opened.torch(processor, images=images, signals=["topk"]).collate
    args = SFTConfig("runs/trl", learning_rate=1e-3, num_train_epochs=1, **DATA, **TRAIN, **REST)
    numbers = Dataset.from_dict({"sample": list(order)})
    Distilled(student, args, collate, train_dataset=numbers, processing_class=processor).train()
    return student
