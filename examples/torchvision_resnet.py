"""Fuse a torchvision ResNet, see what was fused, and compare the answers.

pip install resnet_fused[vision]
"""

import torch
import torchvision

import resnet_fused as rf

model = torchvision.models.resnet50().eval()  # weights="DEFAULT" downloads trained ones
x = torch.randn(4, 3, 224, 224)

fused = rf.fuse(model)
print(rf.fusion_report(fused))

with torch.inference_mode():
    expected, got = model(x), fused(x)
print(
    f"largest difference: {(expected - got).abs().max() / expected.abs().max():.1e} of the largest"
)
