"""Whether what a capture holds fixed is fixed: the forward again, on other values.

What leaves tensors on its way (``.data``, ``.numpy()``, ``.tolist()``) leaves the trace as well and
comes back as a constant: the example's own values, which an engine would repeat for every input. So
does what the forward draws outside of torch or counts. None of it can be told from a true constant
by looking at it, but it differs from one input, or one call, to the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.engine.capture import Call, Captured, capture


def capture_for_any_values(model: nn.Module, x: Tensor) -> Captured:
    """Record what ``model`` runs on an input of x's shape, whatever its values.

    A difference is looked at a second time: what the first call has put aside for the others, the
    second finds there.

    Raises:
        ValueError: as :func:`capture`; or the forward runs other calls, or with other constants,
            for other values of x or from call to call.
    """
    first = capture(model, x)
    second = capture(model, _other_values(x))
    if _difference(first, second) is None:
        return first
    third = capture(model, x)
    if (where := _difference(second, third)) is not None:
        raise ValueError(
            "freeze: the model's forward gives other constants for other values of its input, or "
            f"at every call ({where}), and an engine would repeat those of one call: accepted is "
            "what stays in tensors, without .data, .numpy(), .tolist(), numbers drawn outside of "
            "torch, or attributes that forward changes"
        )
    return third


def _other_values(x: Tensor) -> Tensor:
    """Return drawn values of x's range, as a forward may not take others."""
    if not x.numel():
        return x
    low, high = x.aminmax()
    width = torch.where(high > low, high - low, torch.ones_like(low))
    generator = torch.Generator(x.device).manual_seed(0)
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (low + width * drawn).contiguous(memory_format=torch.channels_last)


def _difference(a: Captured, b: Captured) -> str | None:
    """Return where two captures differ, or None."""
    for one, other in zip(a.calls, b.calls, strict=False):
        if not _same(_parts(one), _parts(other)):
            return f"in {one.target}"
    if len(a.calls) != len(b.calls):
        return "in the number of operators"
    if a.spec != b.spec or not _same(a.outputs, b.outputs):
        return "in what it returns"
    return None


def _parts(call: Call) -> tuple[Any, ...]:
    return call.target, call.args, call.kwargs, call.out


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return _same_tensor(a, b)
    if isinstance(a, torch.fx.GraphModule):
        return a.code == b.code
    return bool(a == b or (a != a and b != b))


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
