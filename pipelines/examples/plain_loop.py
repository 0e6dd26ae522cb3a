"""A cache in a plain PyTorch loop. The student's logits are never formed: head and losses go in chunks of rows.

python -m pipelines.examples.plain_loop runs/tiny/students/0 runs/tiny/cache runs/tiny/world/images
"""

import sys
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import teacher_cache as tc

LOSSES = ["cross_entropy", {"name": "forward_kl", "weight": 2.0}]


def train(folder: str, cache: str, images: str, order: Sequence[int], dtype: str = "float32") -> PreTrainedModel:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    student = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).train()
    student.model.vision_tower.requires_grad_(False)
    with tc.open(cache, tokenizer=processor.tokenizer) as opened:
        data = opened.torch(processor, images=images, signals=["topk"])
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for batch in DataLoader(Subset(data, order), batch_size=8, num_workers=2, collate_fn=data.collate):
        states = student.base_model(**batch.inputs).last_hidden_state
        batch.teacher.head_loss(LOSSES, states, student).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


if __name__ == "__main__":
    train(*sys.argv[1:4], order=range(160)).save_pretrained("runs/plain-loop")
