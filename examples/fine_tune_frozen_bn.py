"""Fine-tune with frozen BatchNorm, as detection does: fused forward, right gradients.

BatchNorm stays in eval mode, so every conv+BN+ReLU runs as one op, forward and backward.
"""

import torch
from torch import nn

import resnet_fused as rf

torch.manual_seed(0)
model = rf.fuse(rf.models.create_model("resnet18", num_classes=10))
model.train()
for module in model.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.eval().requires_grad_(False)

optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.001)
x, target = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
for step in range(5):
    loss = nn.functional.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
