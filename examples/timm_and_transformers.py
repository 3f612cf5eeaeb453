"""The same verbs on timm's and transformers' ResNets.

pip install timm transformers
"""

import timm
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import resnet_fused as rf

x = torch.randn(2, 3, 224, 224)
models = {
    "timm seresnet50": timm.create_model("seresnet50").eval(),
    "transformers ResNet-50": ResNetForImageClassification(ResNetConfig()).eval(),
}
for name, model in models.items():
    fused = rf.fuse(model)
    report = rf.fusion_report(fused)
    print(f"{name}: {len(report.fused)} fused, {len(report.skipped)} left alone")
    for skipped in report.skipped[:3]:
        print(f"  {skipped.name}: {skipped.reason}")
    with torch.inference_mode():
        fused(x)
