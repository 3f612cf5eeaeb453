"""Gradients that passed a ReLU where they were made, handed to the op that has the ReLU.

The convolution behind a block's end has that end's result at hand, and so its ReLU's mask, while it
writes the gradient. It passes the mask there, takes the sums of what passes, and leaves both on the
gradient; where that comes to the block's end as it was left, the end reads neither its result nor
the gradient for them. Where autograd has added another reader's gradient, or a hook has put another
one in its place, it is as if nothing had been left. And nobody gets to see the gradient of the
end's result without what the ReLU stops, but a hook on a node of autograd: where someone may, it
comes whole.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from torch import Tensor

#: Attributes of tensors, which live as long as these. Of tensors and numbers, or a tensor that has
#: one could be saved and not be loaded.
_WANTED, _LEFT = "_resnet_fused_past_relu", "_resnet_fused_sums"
#: Each for one ReLU in one forward, of this process.
_tokens = itertools.count(int.from_bytes(os.urandom(7), "little"))


def want(y: Tensor) -> int:
    """Say of ReLU's result that the gradient is wanted past the ReLU; return by which token."""
    token = next(_tokens)
    if type(y) is Tensor:  # not while torch.compile traces
        setattr(y, _WANTED, (token, y._version))
    return token


def wanted(x: Tensor) -> int | None:
    """Return the token if that was said of this very tensor, and its values are still those."""
    token, version = getattr(x, _WANTED, (None, 0))
    made = token is not None and x.grad_fn is not None and x._version == version
    return token if made else None


def may_pass(ctx: Any, x: Tensor, token: int, weight: int) -> bool:
    """Return whether the gradient of ``x`` may pass the ReLU in a node's backward that runs now.

    Not where ``x`` has hooks, retains its gradient, or is another tensor than in forward, as hooks
    of saved tensors give; nor in ``torch.autograd.grad``, which may be asked for it.

    Args:
        ctx: the node, where autograd has a node of its own for the op.
        x: an input of it as it was saved.
        token: what :func:`wanted` said of it in forward.
        weight: which other input comes from a parameter that trains.
    """
    if wanted(x) != token or x._backward_hooks or x.retains_grad:
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


def leave(grad: Tensor, token: int, sums: Tensor) -> None:
    """Leave on a gradient that passed a ReLU its sums over each channel."""
    if type(grad) is Tensor:
        left = (token, grad._version, sums, sums._version, _stream(grad))
        setattr(grad, _LEFT, left)


def sums_of(grad: Tensor, token: int | None) -> Tensor | None:
    """Return what was left on a gradient that passed the ReLU of a token, if it still holds.

    With None of any: for what has no ReLU of its own, they are the gradient's sums.
    """
    of, version, sums, sums_version, stream = getattr(grad, _LEFT, (None, 0, None, 0, 0))
    if sums is None or grad._version != version or sums._version != sums_version:
        return None
    if token not in (None, of):
        return None
    found: Tensor = sums
    if _stream(grad) != stream:  # autograd tells the allocator so of the gradient alone
        found.record_stream(torch.cuda.current_stream(grad.device))
    return found


def _stream(grad: Tensor) -> int:
    return torch.cuda.current_stream(grad.device).cuda_stream if grad.is_cuda else 0
