"""A cache in Transformers' Trainer: the loss is the mean over the answer rows of all accumulated batches.

python -m pipelines.examples.hf_trainer runs/tiny/students/0 runs/tiny/cache runs/tiny/world/images
"""

import sys
from collections.abc import Sequence

from torch.utils.data import Subset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments

import teacher_cache as tc

LOSSES = ["cross_entropy", {"name": "forward_kl", "weight": 2.0}]
SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
TRAIN = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch"}
REST = {"train_sampling_strategy": "sequential", "report_to": "none", "save_strategy": "no"}


def train(folder: str, cache: str, images: str, order: Sequence[int], dtype: str = "float32") -> PreTrainedModel:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    student = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    student.model.vision_tower.requires_grad_(False)
    with tc.open(cache, tokenizer=processor.tokenizer) as opened:
        data = opened.torch(processor, images=images, signals=["topk"])
    args, loss = TrainingArguments("runs/hf-trainer", **SIZES, **TRAIN, **REST), tc.distillation(LOSSES)
    chosen = Subset(data, order)
    Trainer(student, args, train_dataset=chosen, data_collator=data.collate, compute_loss_func=loss).train()
    return student


if __name__ == "__main__":
    train(*sys.argv[1:4], order=range(160)).save_pretrained("runs/hf-trainer")
