"""Fused conv+BN+ReLU and residual-add+ReLU kernels behind drop-in ResNet blocks."""

from resnet_fused import functional
from resnet_fused.backends import backends, explain, use_backend
from resnet_fused.convert import fuse, fusion_report, unfuse
from resnet_fused.freeze import freeze

__version__ = "0.1.0"

__all__ = [
    "backends",
    "explain",
    "freeze",
    "functional",
    "fuse",
    "fusion_report",
    "unfuse",
    "use_backend",
]
