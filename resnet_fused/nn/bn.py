"""BatchNorm with fixed statistics as a per-channel scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fused.backends._derived import derived

#: The BatchNorm classes whose eval forward is exactly scale and shift.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is one of torch's BatchNorms or a detection model's frozen one.

    Subclasses are left alone: their forward may do more. torchvision's FrozenBatchNorm2d is known
    by its class name, so that torchvision need not be there.
    """
    return type(module) in BATCH_NORMS or type(module).__name__ == "FrozenBatchNorm2d"


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Return whether ``bn``, called now, would normalise by the batch's own statistics."""
    if isinstance(bn, BATCH_NORMS):
        return bn.training or bn.running_var is None or bn.running_mean is None
    return False


def scale_shift(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and shift that ``bn`` applies to ``conv`` without its bias.

    scale = γ / √(σ² + ε), shift = β + (b - μ) · scale, with b the convolution's bias
    (Ioffe and Szegedy, arXiv 1502.03167, algorithm 2), in float32, or float64 for float64 buffers.
    The result is kept until one of the tensors changes, unless gradients are wanted.
    """
    sources = (bn.running_var, bn.running_mean, bn.weight, bn.bias, conv.bias)
    wants_grad = torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources)
    if wants_grad or torch.compiler.is_compiling():
        return _compute(*sources, eps=bn.eps)
    # Tensors made in inference mode have no version counter, so nothing could be keyed on them.
    with torch.inference_mode(False), torch.no_grad():
        return derived(sources, ("scale_shift", bn.eps), lambda: _compute(*sources, eps=bn.eps))


def _compute(
    variance: Tensor,
    mean: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    conv_bias: Tensor | None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if variance.dtype == torch.float64 else torch.float32
    scale = torch.rsqrt(variance.to(wide) + eps)
    if gamma is not None:
        scale = scale * gamma.to(wide)
    centre = mean.to(wide) if conv_bias is None else mean.to(wide) - conv_bias.to(wide)
    shift = -centre * scale
    return scale, shift if beta is None else shift + beta.to(wide)
