"""The ops of BatchNorm in training on the native kernels, each taking its op's arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math, native
from resnet_fused.backends import _training_kernels as kernels
from resnet_fused.backends._outputs import empty_channels_last
from resnet_fused.backends._training_kernels import gradient_vectors, scale_shift
from resnet_fused.backends._training_maps import new_bits, with_bits


def bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Run the op."""
    bits = new_bits(x, summed=residual is not None, act=act)
    y = kernels.bn_act(x, mean, var, weight, bias, eps, residual, act == "relu", bits)
    return with_bits(y, bits)


def dual_bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    eps: float,
    residual_eps: float,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """Run the op."""
    own = scale_shift(mean, var, weight, bias, eps)
    theirs = scale_shift(residual_mean, residual_var, residual_weight, residual_bias, residual_eps)
    bits = new_bits(x, summed=True, act=act)
    y = kernels.bn_apply(x, *own, residual, *theirs, relu=act == "relu", bits=bits)
    return with_bits(y, bits)


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Run the op."""
    return _backward(grad, x, mean, var, weight, bias, y, eps, act, wanted)


def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    wanted: Sequence[bool],
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Run bn_act_backward; x's gradient goes to ``out``, which may be ``grad``."""
    vectors, (*gradients, activation) = (mean, var, weight, bias), wanted
    # The pass that writes x's gradient has what ReLU gave, where its mask is made of it.
    beside = activation and gradients[0] and act == "relu"
    *found, a = kernels.bn_act_backward(
        grad, x, *vectors, eps, y, act == "relu", (*gradients, beside), out
    )
    if activation and not beside:
        a = kernels.bn_act(x, *vectors, eps, relu=act == "relu")
    return _as_given(x, (*found, a), (x, weight, bias, x, x))


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    eps: float,
    act: str | None,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op."""
    vectors: tuple[Tensor | None, Tensor | None] = (None, None)
    if act and y is None:  # the mask is made again
        vectors = scale_shift(mean, var, weight, bias, eps)
    written = empty_channels_last(x.shape, x.dtype, x.device) if masked else None
    sum_g, sum_gx = kernels.bn_act_backward_reduce(
        grad, x, mean, *vectors, y, relu=act == "relu", masked=written
    )
    return sum_g, sum_gx, x.new_empty(0) if written is None else written


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    act: str | None,
    count: int,
) -> Tensor:
    """Run the op."""
    vectors = gradient_vectors(mean, var, weight, sum_g, sum_gx, eps, max(count, 1))
    scale = shift = None
    if act and y is None:
        scale, shift = scale_shift(mean, var, weight, bias, eps)
    return kernels.bn_act_backward_apply(grad, x, *vectors, scale, shift, y, relu=act == "relu")


def dual_bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    residual: Tensor,
    residual_mean: Tensor,
    y: Tensor | None,
    act: str | None,
) -> tuple[Tensor, ...]:
    """Run the op."""
    return kernels.bn_act_backward_reduce(
        grad, x, mean, None, None, y, relu=act == "relu", x2=residual, mean2=residual_mean
    )


def dual_bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    y: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    sum_gr: Tensor,
    eps: float,
    residual_eps: float,
    act: str | None,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Run the op."""
    m = max(count, 1)
    own = gradient_vectors(mean, var, weight, sum_g, sum_gx, eps, m)
    theirs = gradient_vectors(
        residual_mean, residual_var, residual_weight, sum_g, sum_gr, residual_eps, m
    )
    return kernels.bn_act_backward_apply_both(grad, x, residual, own, theirs, y, relu=act == "relu")


def bn_act_max_pool(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op in one pass: each output normalises what its window holds."""
    scale, shift = kernels.scale_shift(mean, var, weight, bias, eps)
    pool = (pool_size[0], pool_stride[0], pool_padding[0])
    return kernels.max_pool_index(x, scale, shift, *pool, act == "relu")


def max_pool_backward(
    grad: Tensor,
    index: Tensor,
    x_size: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """Run the op."""
    return kernels.max_pool_backward(
        grad, index, x_size, pool_size[0], pool_stride[0], pool_padding[0]
    )


bn_act_max_pool_backward_by_parts = functools.partial(
    _bn_math.pooled_gradients, (bn_act_backward_reduce, max_pool_backward, bn_act_backward_apply)
)


def bn_act_max_pool_backward(
    grad: Tensor,
    index: Tensor,
    taken: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Run the op by the kernels that only a GPU has: the activation's gradient is not written.

    But where nobody says what the pool took: there the sums are over that gradient.
    """
    if not taken.numel():
        saved = (x, mean, var, weight, bias, eps, act, pool_size, pool_stride, pool_padding)
        return bn_act_max_pool_backward_by_parts(grad, index, taken, *saved, wanted)
    pool = (pool_size[0], pool_stride[0], pool_padding[0])
    found = kernels.bn_act_max_pool_backward(
        grad, index, taken, x, mean, var, weight, bias, eps, *pool, act == "relu", wanted
    )
    return _as_given(x, found, (x, weight, bias))


def _as_given(
    x: Tensor, found: Sequence[Tensor | None], given: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return gradients in the dtypes of what they are of, empty where there is none."""
    return tuple(
        x.new_empty(0)
        if made is None or t is None
        else made
        if made.dtype == t.dtype  # asking first is a call of torch less
        else made.to(t.dtype)
        for made, t in zip(found, given, strict=True)
    )


def bn_update_stats(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Run the op: float32 by one call for seven of torch's, which took longer than statistics."""
    tracked, device, shape = num_batches_tracked, mean.device, mean.shape
    plain = all(
        v.dtype == torch.float32 and v.device == device and v.shape == shape and v.is_contiguous()
        for v in (running_mean, running_var, mean, var)
    )
    if tracked is not None:
        # The kernel adds to 8 bytes; of another dtype, torch counts.
        counts = tracked.dtype == torch.int64 and tracked.device == device and tracked.numel() == 1
        plain = plain and counts
    if momentum is None or not plain:
        _bn_math.bn_update_stats(running_mean, running_var, tracked, mean, var, count, momentum)
        return
    native.run(
        device, "bn_update_stats", running_mean.data_ptr(), running_var.data_ptr(),
        0 if tracked is None else tracked.data_ptr(), mean.data_ptr(), var.data_ptr(),
        len(mean), count, momentum,
    )  # fmt: skip
    written = (
        (running_mean, running_var) if tracked is None else (running_mean, running_var, tracked)
    )
    torch.autograd.graph.increment_version(written)


def chained_backward_data(convolution: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return bn_act_conv_backward_data: ``convolution``, a conv_backward_data, then BatchNorm's."""

    def bn_act_conv_backward_data(
        grad: Tensor,
        weight: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        eps: float,
        act: str | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Run the op by its two parts."""
        grad_a = convolution(grad, weight, x.shape, stride, padding, dilation, groups, None)
        saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
        return _backward(grad_a, *saved, (*wanted, False, False), _in_place(grad_a))[:3]

    return bn_act_conv_backward_data


def _in_place(grad: Tensor) -> Tensor | None:
    """Return a gradient that nobody else reads, where the kernels can write theirs over it."""
    return grad if grad.is_contiguous(memory_format=torch.channels_last) else None


def chained_backward(
    data: Callable[..., Tensor], weights: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """Return bn_act_conv_backward: ``data``, BatchNorm's with the activation, and ``weights``.

    Args:
        data: a conv_backward_data.
        weights: a conv_backward_weight.
    """

    def bn_act_conv_backward(
        grad: Tensor,
        weight: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        eps: float,
        act: str | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        channels_last: bool,
        dtype: torch.dtype,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """Run the op by its three parts; the activation lives until the last has read it."""
        geometry = (stride, padding, dilation, groups)
        grad_a = data(grad, weight, x.shape, *geometry, None)
        saved = (x, mean, var, bn_weight, bn_bias, None, eps, act)
        *found, _, a = _backward(grad_a, *saved, (*wanted, False, True), _in_place(grad_a))
        return *found, weights(grad, a, weight.shape, *geometry, channels_last, dtype)

    return bn_act_conv_backward


def chained_backward_weight(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return bn_act_conv_backward_weight: bn_act, then ``convolution``, a conv_backward_weight."""

    def bn_act_conv_backward_weight(
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        weight_size: Sequence[int],
        eps: float,
        act: str | None,
        *geometry: Any,
    ) -> Tensor:
        """Run the op; the activation lives until the convolution has read it."""
        a, _ = bn_act(x, mean, var, bn_weight, bn_bias, None, eps, act)
        return convolution(grad, a, weight_size, *geometry)

    return bn_act_conv_backward_weight
