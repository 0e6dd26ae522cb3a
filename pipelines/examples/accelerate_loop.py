"""A cache in a loop on Accelerate: batches reach the device, and every process its part, teacher and all.

python -m pipelines.examples.accelerate_loop runs/tiny/students/0 runs/tiny/cache runs/tiny/world/images
"""

import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import teacher_cache as tc

compute_loss = tc.distillation(["cross_entropy", {"name": "forward_kl", "weight": 2.0}])


def train(folder: str, cache: str, images: str, order: Sequence[int], dtype: str = "float32") -> PreTrainedModel:
    accelerator = Accelerator()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    student = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).train()
    student.model.vision_tower.requires_grad_(False)
    with tc.open(cache, tokenizer=processor.tokenizer) as opened:
        data = opened.torch(processor, images=images, signals=["topk"])
    loader = DataLoader(Subset(data, order), batch_size=8, collate_fn=data.collate)
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    for batch in loader:
        accelerator.backward(compute_loss(model(**batch.inputs), batch["labels"]))
        optimizer.step()
        optimizer.zero_grad()
    return student


if __name__ == "__main__":
    train(*sys.argv[1:4], order=range(160)).save_pretrained("runs/accelerate-loop")
