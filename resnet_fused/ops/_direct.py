"""How a backward calls other ops: past torch's dispatcher where nobody listens there.

The dispatcher, autograd's layer and the checks of arguments take some 50 us an op on a Zen core: of
the five that a convolution's backward calls, a tenth of a training step of ResNet-50 at batch 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: By an op's name, what runs it on arguments that are known to fit; filled by `_register`.
RUN: dict[str, Callable[..., Any]] = {}

_PLAIN = (Tensor, nn.Parameter)


def call(name: str, *args: Any) -> Any:
    """Return ``torch.ops.resnet_fused.<name>(*args)``, for arguments that come from a forward.

    It goes by the dispatcher in grad mode, where double backward is refused, and where a mode, a
    profiler or a subclass of Tensor wants to see the op: under ``torch.compile``, say.
    """
    if torch.is_grad_enabled() or _watched(args):
        return getattr(torch.ops.resnet_fused, name)(*args)
    return RUN[name](*args)


def _watched(args: tuple[Any, ...]) -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
        or any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in args)
    )
