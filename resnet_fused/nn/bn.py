"""BatchNorm with fixed statistics as a per-channel scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import AUTO, _bn_math, _training_kernels, cuda, requested
from resnet_fused.backends._derived import derived, on_gpu
from resnet_fused.ops import _direct

#: The BatchNorm classes whose eval forward is exactly scale and shift.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


_FROZEN_TENSORS = ("weight", "bias", "running_mean", "running_var")


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether ``module`` is one of torch's BatchNorms or a detection model's frozen one.

    Subclasses are left alone: their forward may do more. FrozenBatchNorm2d is known by its class
    name and what it holds, so that torchvision need not be there; under autocast its result has
    the autocast dtype when fused, as BatchNorm2d's has.
    """
    if type(module) in BATCH_NORMS:
        return True
    return (
        type(module).__name__ == "FrozenBatchNorm2d"
        and isinstance(getattr(module, "eps", None), float)
        and all(isinstance(getattr(module, n, None), Tensor) for n in _FROZEN_TENSORS)
    )


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Return whether ``bn``, called now, would normalise by the batch's own statistics."""
    if isinstance(bn, BATCH_NORMS):
        return bn.training or bn.running_var is None or bn.running_mean is None
    return False


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP has the parameters of ``module``: it fills them and leaves no trace."""
    return bool(module.__dict__.get("_is_fsdp_managed_module"))


def sharing_group(bn: nn.Module) -> Any:
    """Return the process group over which ``bn``, called now, would sum its statistics, or None."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def scale_shift(conv: nn.Conv2d, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and shift that ``bn`` applies to ``conv`` without its bias.

    scale = γ / √(σ² + ε), shift = β + (b - μ) · scale, with b the convolution's bias
    (Ioffe and Szegedy, arXiv 1502.03167, algorithm 2), in float32, or float64 for float64 buffers.
    The result is kept until one of the tensors changes, unless gradients are wanted.
    """
    norm: Any = bn  # BatchNorm2d, or any class that is_batch_norm takes
    sources = (norm.running_var, norm.running_mean, norm.weight, norm.bias, conv.bias)
    eps: float = norm.eps
    if _changes_unseen(bn) or (
        torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources)
    ):
        return _compute(*sources, eps=eps)
    # Training writes the statistics without moving their versions; the count of batches moves.
    seen = (*sources, getattr(bn, "num_batches_tracked", None))

    def compute() -> tuple[Tensor, Tensor]:
        # Tensors made in inference mode have no version counter, so nothing is keyed on them.
        with torch.inference_mode(False), torch.no_grad():
            return _compute(*sources, eps=eps, by_kernel=_kernel_takes(*sources))

    return derived(seen, ("scale_shift", eps), compute)


def _changes_unseen(bn: nn.Module) -> bool:
    """Return whether what ``bn`` holds may change, now or when run later, with no trace of it."""
    if is_sharded(bn):
        return True
    counts = not isinstance(bn, BATCH_NORMS) or bn.num_batches_tracked is not None
    return not counts or torch.compiler.is_compiling() or torch.jit.is_tracing()


def _compute(
    variance: Tensor,
    mean: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    conv_bias: Tensor | None,
    *,
    eps: float,
    by_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    variance, mean, gamma, beta, conv_bias = _widened(variance, mean, gamma, beta, conv_bias)
    centre = mean if conv_bias is None else mean - conv_bias
    formula = _training_kernels.scale_shift if by_kernel else _bn_math.scale_shift
    return formula(centre, variance, gamma, beta, eps)


def _kernel_takes(*sources: Tensor | None) -> bool:
    """Return whether one kernel of ours makes scale and shift, on a GPU, where torch takes four.

    A graph of a fused model runs this for every layer at each replay.
    """
    given = [source for source in sources if source is not None]
    variance = given[0]
    if not on_gpu(variance) or requested() not in (AUTO, "cuda") or _direct.watched(given):
        return False
    if any((s.device, s.shape) != (variance.device, variance.shape) for s in given):
        return False  # torch says what is wrong
    # Vectors that BatchNorm's passes take, it takes as well.
    return cuda.available() is None and cuda.supports("bn_act", variance) is None


def _widened(variance: Tensor, *others: Tensor | None) -> list[Any]:
    """Return vectors in float32, or float64; those of 16 bits all in one cast."""
    vectors = (variance, *others)
    wide = torch.float64 if variance.dtype == torch.float64 else torch.float32
    given = [v for v in vectors if v is not None]
    alike = len({(v.dtype, v.device) for v in given}) == 1
    if alike and variance.dtype.itemsize == 2:
        rows = iter(torch.stack(given).to(wide).unbind())
        return [None if v is None else next(rows) for v in vectors]
    return [None if v is None else v.to(wide) for v in vectors]
