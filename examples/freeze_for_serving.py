"""Freeze a model once, then serve batches of several sizes from several threads."""

from concurrent.futures import ThreadPoolExecutor

import torch

import resnet_fused as rf

model = rf.models.create_model("resnet18").eval()
engine = rf.freeze(model, torch.randn(8, 3, 224, 224))
print(engine)

batches = [torch.randn(n, 3, 224, 224) for n in (8, 1, 3, 8)]
with ThreadPoolExecutor(2) as pool:
    for batch, logits in zip(batches, pool.map(engine, batches), strict=True):
        print(f"batch {len(batch)}: classes {logits.argmax(1).tolist()}")
