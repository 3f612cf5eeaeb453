"""A block with an identity shortcut in training: what its kernels are told, worked out once a kind.

Between two kernels of a step Python finds its own working set gone from the caches: with ops called
one by one it takes 190 us (ResNet-152 in bfloat16, two threads of an Emerald Rapids), as long as
many a kernel. Here forward and backward of a block are the calls of the extension and little else:
the same ones, in the same order, as those of its ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math, _cpu_once, _torch_conv, _turned, cpu, native
from resnet_fused.backends import _cpu_weight_gradient as weights
from resnet_fused.backends._outputs import CPU, empty_channels_last, scratch
from resnet_fused.backends._training_maps import new_vector
from resnet_fused.backends.native import DTYPE_NAMES


class Convolution(NamedTuple):
    """What of a convolution, and the BatchNorm and ReLU behind it, decides how kernels run it."""

    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]
    groups: int
    eps: float

    @property
    def kind(self) -> tuple[object, ...]:
        """All of it but the weight's values."""
        weight = self.weight
        return (weight.shape, weight.stride(), weight.dtype, *self[1:])


class _Layer(NamedTuple):
    forward: _cpu_once.Once
    data: _cpu_once.Once
    weight: weights.Kind
    geometry: tuple[Any, ...]
    shape: tuple[int, ...]
    norm_scratch_bytes: int
    eps: float


class Saved(NamedTuple):
    """Of a convolution and its BatchNorm, what backward reads."""

    z: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor
    gamma: Tensor
    #: Only where an activation is computed of it again.
    beta: Tensor | None


class BlockPlan:
    """The kernels of y = relu(BN(conv(... relu(BN(conv(x))) ...)) + x)."""

    def __init__(self, layers: Sequence[_Layer], dtype: torch.dtype) -> None:
        self._layers, self._dtype = layers, dtype

    def convolve(
        self, i: int, x: Tensor, weight: Tensor, before: Saved | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output of convolution ``i`` with its moments; ``before`` normalises x."""
        layer = self._layers[i]
        mean, var = (new_vector(layer.shape[1], CPU) for _ in range(2))
        norm, eps = _cpu_once.NO_NORM, 0.0
        if before is not None:
            assert before.beta is not None
            norm = (
                before.mean.data_ptr(), before.var.data_ptr(), before.gamma.data_ptr(),
                before.beta.data_ptr(),
            )  # fmt: skip
            eps = self._layers[i - 1].eps
        z = layer.forward.run(x, weight, None, norm, eps, "relu", mean.data_ptr(), var.data_ptr())
        return z, mean, var

    def end(self, last: Saved, beta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and its bits, none where the op has none."""
        layer, z = self._layers[-1], last.z
        shape = _bn_math.bits_shape(z.shape, self._dtype)
        bits = _bn_math.no_bits(z) if shape is None else empty_channels_last(shape, torch.uint8)
        y = empty_channels_last(z.shape, self._dtype)
        work = scratch(layer.norm_scratch_bytes)
        native.loaded().bn_act(
            z.data_ptr(), last.mean.data_ptr(), last.var.data_ptr(), last.gamma.data_ptr(),
            beta.data_ptr(), residual.data_ptr(), y.data_ptr(), bits.data_ptr(),
            work.data_ptr(), work.nbytes, *self._sizes(layer), layer.eps, True,
        )  # fmt: skip
        return y, bits

    def backward(
        self, grad: Tensor, x: Tensor, saved: Sequence[Saved], kept: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Return the gradient of x, and of each layer's weight, gamma and beta.

        ``kept`` is the block's output, or its bits.
        """
        grad = grad.contiguous(memory_format=torch.channels_last)
        masked = empty_channels_last(grad.shape, self._dtype)
        out = empty_channels_last(grad.shape, self._dtype)
        affine = self._norm_backward(-1, grad, saved[-1], kept, out, masked, None)
        grads: list[tuple[Tensor, Tensor, Tensor]] = []
        grad = out
        for i in range(len(saved) - 1, 0, -1):
            grad_a = self.data_gradient(i, grad, saved[i].weight, None)
            a = empty_channels_last(grad_a.shape, self._dtype)
            before = self._norm_backward(i - 1, grad_a, saved[i - 1], None, grad_a, None, a)
            grads.append((self._weight_gradient(i, grad, a), *affine))
            grad, affine = grad_a, before
        grad_x = self.data_gradient(0, grad, saved[0].weight, masked)
        grads.append((self._weight_gradient(0, grad, x), *affine))
        return grad_x, grads[::-1]

    def _norm_backward(
        self,
        i: int,
        grad: Tensor,
        saved: Saved,
        kept: Tensor | None,
        out: Tensor,
        masked: Tensor | None,
        activation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Write x's gradient, and what else is given, and return those of gamma and beta."""
        layer = self._layers[i]
        made = [new_vector(layer.shape[1], CPU) for _ in range(2)]
        work, passed = scratch(layer.norm_scratch_bytes), [0, 0]
        if kept is not None:
            passed[kept.dtype == torch.uint8] = kept.data_ptr()
        beta = saved.mean if saved.beta is None else saved.beta  # not read with what passed
        native.loaded().bn_act_backward(
            grad.data_ptr(), saved.z.data_ptr(), saved.mean.data_ptr(), saved.var.data_ptr(),
            saved.gamma.data_ptr(), beta.data_ptr(), *passed, out.data_ptr(),
            *(t.data_ptr() for t in made), native.address(masked), native.address(activation),
            work.data_ptr(), work.nbytes, *self._sizes(layer), layer.eps, True,
        )  # fmt: skip
        return made[0], made[1]

    def data_gradient(
        self, i: int, grad: Tensor, weight: Tensor, residual: Tensor | None
    ) -> Tensor:
        """Return the gradient of convolution ``i``'s input, and ``residual`` with it."""
        once = self._layers[i].data
        return once.run(grad, weight, residual, _cpu_once.NO_NORM, 0.0, None, 0, 0)

    def _weight_gradient(self, i: int, grad: Tensor, x: Tensor) -> Tensor:
        layer = self._layers[i]
        made = layer.weight.run(grad, x)
        if made is None:
            kind, (stride, padding, dilation, groups) = layer.weight, layer.geometry
            made = _torch_conv.backward_weight(
                grad, x, kind.weight_size, stride, padding, dilation, groups, kind.channels_last,
                kind.dtype,
            )  # fmt: skip
        return made

    def _sizes(self, layer: _Layer) -> tuple[str, int, int]:
        n, c, h, w = layer.shape
        return DTYPE_NAMES[self._dtype], n * h * w, c


def plan(x: Tensor, convolutions: Sequence[Convolution]) -> BlockPlan | None:
    """Return the plan of a block of ``x``, or None where an op of it is not all native.

    The caller has seen that the convolutions follow each other, and that the last one's output is
    like x.
    """
    key = (
        x.shape, x.dtype, native.loaded().cpu_isa(), torch.get_num_threads(),
        *(c.kind for c in convolutions),
    )  # fmt: skip
    if key not in _plans:
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[key] = _planned(x, convolutions)
    return _plans[key]


#: By kind of block. As a model has few, all are dropped where there are more.
_plans: dict[tuple[object, ...], BlockPlan | None] = {}
_MOST = 1024


def _planned(x: Tensor, convolutions: Sequence[Convolution]) -> BlockPlan | None:
    if cpu.declines(x) is not None:
        return None
    layers = []
    for i, convolution in enumerate(convolutions):
        layer = _layer(x, convolution, normalised=i > 0)
        if layer is None:
            return None
        layers.append(layer)
        x = torch.empty(layer.shape, dtype=x.dtype, device="meta")
    return BlockPlan(layers, x.dtype)


def _layer(x: Tensor, c: Convolution, *, normalised: bool) -> _Layer | None:
    """Return the calls for a convolution of what is like x."""
    if {*c.stride} != {1} or c.groups != 1:
        return None
    weight, geometry = c.weight, c[1:5]
    forward = _cpu_once.Once.of(x, weight, *geometry, normalised=normalised, with_stats=True)
    outer = _turned.around(weight.shape, c.padding, c.dilation)
    if forward is None or min(outer) < 0:
        return None
    shape = forward.plan.output_shape
    grad = torch.empty(shape, dtype=x.dtype, device="meta")
    data = _cpu_once.Once.of(grad, weight, (1, 1), outer, c.dilation, 1, turned=True)
    last = not weight.is_contiguous()
    kind = weights.Kind.of(grad, x, weight.shape, *geometry, last, weight.dtype)
    if data is None or kind is None:
        return None
    n, channels, h, w = shape
    work = max(
        native.loaded().bn_act_scratch_bytes(n * h * w, channels),
        native.loaded().bn_act_backward_scratch_bytes(n * h * w, channels),
    )
    return _Layer(forward, data, kind, geometry, shape, work, c.eps)
