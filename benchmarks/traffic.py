"""What a training step must move at least, op by op: counted on meta tensors, nothing is computed.

Every op is a kernel that reads its inputs once and writes its results once, but where it cannot:
BatchNorm needs a map's sums before it can use them, so that it reads the map twice. A cache between
two ops is not counted on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import resnet_fused as rf
from resnet_fused.models import create_model
from resnet_fused.nn import pointwise
from resnet_fused.ops import OPS
from resnet_fused.roofline import Device

#: Arguments of torch's ops that are read once more than once, by place: BatchNorm's map, and the
#: gradient and the map of its backward; a convolution's gradient, by two kernels.
_READ_TWICE = {
    "aten::_native_batch_norm_legit": (0,),
    "aten::native_batch_norm": (0,),
    "aten::native_batch_norm_backward": (0, 1),
    "aten::convolution_backward": (0,),
}
#: Arguments of which an op reads the size alone.
_NOT_READ = {"aten::max_pool2d_with_indices_backward": (1,)}


class Work(NamedTuple):
    """One op of a step."""

    name: str
    nbytes: int
    flops: int

    def seconds(self, device: Device, dtype: torch.dtype) -> float:
        """Return the longer of the times for the bytes and for the arithmetic."""
        return max(self.nbytes / device.bandwidth, self.flops / device.flops[dtype])


def training_step(
    name: str, batch: int, dtype: torch.dtype, *, fused: bool, ends: bool = False
) -> list[Work]:
    """Return the ops of forward and backward of a model on 224x224 images, in channels_last.

    Fused, they are those of the package, each as its own definition counts it; with ``ends``, block
    ends whose convolution is 1x1 are one op.
    """
    with torch.device("meta"):
        model: nn.Module = create_model(name).to(dtype).train()
        x = torch.empty(batch, 3, 224, 224, dtype=dtype)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    taken = pointwise.on_meta() if ends else contextlib.nullcontext()
    with rf.use_backend("reference"), taken, _Count() as counted:
        (rf.fuse(model) if fused else model)(x).sum().backward()
    return counted.found


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        namespace, _, op = name.partition("::")
        nbytes = OPS[op].nbytes(*args) if namespace == "resnet_fused" else _moved(func, args, out)
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=out) if formula and nbytes else 0
        self.found.append(Work(name, nbytes, flops))
        return out


def _moved(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """Return the bytes of one of torch's ops; none for one that makes a view or reads nothing."""
    name = func.name()
    if any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
        return 0
    unread = _NOT_READ.get(name, ())
    read = [t for i, a in enumerate(args) if i not in unread for t in _tensors(a)]
    if not read:
        return 0
    again = [t for i in _READ_TWICE.get(name, ()) for t in _tensors(args[i])]
    return sum(t.nbytes for t in (*read, *again, *_tensors(out)))


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
