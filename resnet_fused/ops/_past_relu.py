"""Gradients that passed a ReLU where they were made, handed to the op that has the ReLU.

The convolution behind a block's end has that end's result at hand, and so its ReLU's mask, while it
writes the gradient. It passes the mask there, takes the sums of what passes, and leaves both on the
gradient; where that comes to the block's end as it was left, the end reads neither its result nor
the gradient for them. Where autograd has added another reader's gradient, or a hook has put another
one in its place, it is as if nothing had been left.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Attributes of tensors, which live as long as these.
_WANTED, _LEFT = "_resnet_fused_past_relu", "_resnet_fused_sums"


class _Left(NamedTuple):
    sums: Tensor
    #: The ReLU's result, by its memory, and the gradient's count of writes.
    of: int
    version: int


def want(y: Tensor) -> None:
    """Say of ReLU's result that the gradient is wanted past the ReLU."""
    setattr(y, _WANTED, True)


def wanted(y: Tensor) -> bool:
    """Return whether that was said of this very tensor."""
    return getattr(y, _WANTED, False)


def leave(grad: Tensor, y: Tensor, sums: Tensor) -> None:
    """Leave on a gradient that passed the ReLU whose result is ``y`` its sums over each channel."""
    setattr(grad, _LEFT, _Left(sums, y.data_ptr(), grad._version))


def sums_of(grad: Tensor, y: Tensor | None) -> Tensor | None:
    """Return what was left on a gradient by the ReLU whose result is ``y``, if it still holds.

    With None by any: for what has no ReLU of its own, they are the gradient's sums.
    """
    left: _Left | None = getattr(grad, _LEFT, None)
    if left is None or left.version != grad._version:
        return None
    return left.sums if y is None or left.of == y.data_ptr() else None
