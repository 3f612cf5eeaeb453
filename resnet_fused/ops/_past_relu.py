"""Gradients that passed a ReLU where they were made, handed to the op that has the ReLU.

The convolution behind a block's end has that end's result at hand, and so its ReLU's mask, while it
writes the gradient. It passes the mask there, takes the sums of what passes, and leaves both on the
gradient; where that comes to the block's end as it was left, the end reads neither its result nor
the gradient for them. Where autograd has added another reader's gradient, or a hook has put another
one in its place, it is as if nothing had been left. And nobody gets to see the gradient of the
end's result without what the ReLU stops: where someone may, it comes whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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


def may_pass(ctx: Any, y: Tensor, weight: int) -> bool:
    """Return whether the gradient of ``y`` may pass the ReLU in a node's backward that runs now.

    Not where ``y`` is a tensor of which that was not wanted, as one that hooks of saved tensors
    gave back, has hooks, or retains its gradient; nor in ``torch.autograd.grad``, which may be
    asked for it. A hook on the node itself is not known of.

    Args:
        ctx: the node, where autograd has a node of its own for the op.
        y: an input of it as it was saved.
        weight: which other input comes from a parameter that trains.
    """
    if not wanted(y) or y._backward_hooks or y.retains_grad:
        return False
    node = getattr(ctx, "next_functions", {weight: (None, 0)})[weight][0]
    while node is not None and node.next_functions:  # autograd's cast
        node = node.next_functions[0][0]
    if node is None:
        return False
    try:
        # Of a parameter's own node autograd tells no more, under torch.autograd.grad, than that.
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return False


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
