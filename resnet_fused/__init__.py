"""Fused conv+BN+ReLU and residual-add+ReLU kernels behind drop-in ResNet blocks."""

from resnet_fused import flops, functional, models
from resnet_fused.backends import backends, explain, use_backend
from resnet_fused.convert import fuse, fusion_report, unfuse
from resnet_fused.freeze import freeze
from resnet_fused.step_graph import capture_step
from resnet_fused.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "backends",
    "capture_step",
    "explain",
    "flops",
    "freeze",
    "functional",
    "fuse",
    "fusion_report",
    "models",
    "tune",
    "unfuse",
    "use_backend",
]
