"""The ops of inference, and of training with frozen BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.functional._pairs import Pair, pairs


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str | None = None,
) -> Tensor:
    r"""Convolution, per-channel scale and shift, residual add and activation in one op.

    .. math:: y = \mathrm{act}(\mathrm{conv}(x, W) \cdot \mathrm{scale} + \mathrm{shift} + r)

    With :math:`\mathrm{scale} = \gamma / \sqrt{\sigma^2 + \epsilon}` and
    :math:`\mathrm{shift} = \beta - \mu \cdot \mathrm{scale}` this is convolution, BatchNorm with
    running statistics, shortcut and ReLU of He et al. (arXiv 1512.03385), figure 2 and section 3.4.

    Equivalent to::

        y = F.conv2d(x, weight, None, stride, padding, dilation, groups).float()
        y = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual
        y = torch.relu(y).to(x.dtype)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; channels_last is fastest.
        weight: (O, C / groups, KH, KW), x's dtype.
        scale: (O,), x's dtype or float32; 1 if left out.
        shift: (O,), likewise; 0 if left out.
        residual: (N, O, OH, OW), x's dtype; added before the activation.
        stride: one or two integers of at least 1.
        padding: one or two integers of at least 0; zeros are padded.
        dilation: one or two integers of at least 1.
        groups: divides C and O.
        act: None or "relu". NaN passes through, as in ``torch.relu``.

    Returns:
        (N, O, OH, OW) in x's dtype, channels_last. Products are accumulated in float32 (float64 for
        float64), and scale, shift and add applied there, rounded once.

    Differentiable in x, weight, scale, shift and residual. Saved for backward: x, weight, scale,
    shift, and y if act is "relu". Under autocast x, weight and residual are cast, the vectors not.

    Raises:
        ValueError: shapes, devices, geometry or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    return torch.ops.resnet_fused.conv_bn_act(
        x, weight, scale, shift, residual,
        *pairs("conv_bn_act", stride=stride, padding=padding, dilation=dilation), groups, act,
    )  # fmt: skip


def conv_bn_act_max_pool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str | None = None,
    pool_size: Pair = 3,
    pool_stride: Pair = 2,
    pool_padding: Pair = 1,
) -> Tensor:
    r"""Convolution, per-channel scale and shift, activation and max pool: the stem, in one op.

    .. math:: y = \mathrm{maxpool}(\mathrm{act}(\mathrm{conv}(x, W) \cdot \mathrm{scale}
              + \mathrm{shift}))

    With scale and shift as in :func:`conv_bn_act` this is conv1 and the pool that begins conv2_x
    of He et al. (arXiv 1512.03385), table 1; the pool's defaults are that table's. The map between
    the two, four times the result, need not be written.

    Equivalent to::

        y = F.conv2d(x, weight, None, stride, padding, dilation, groups).float()
        y = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        y = F.max_pool2d(torch.relu(y).to(x.dtype), pool_size, pool_stride, pool_padding)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; channels_last is fastest.
        weight: (O, C / groups, KH, KW), x's dtype.
        scale: (O,), x's dtype or float32; 1 if left out.
        shift: (O,), likewise; 0 if left out.
        stride: of the convolution, one or two integers of at least 1.
        padding: of the convolution, one or two integers of at least 0; zeros are padded.
        dilation: one or two integers of at least 1.
        groups: divides C and O.
        act: None or "relu".
        pool_size: height and width of the pool's window, one or two integers of at least 1.
        pool_stride: one or two integers of at least 1.
        pool_padding: one or two integers from 0 to half of ``pool_size``; padding is never the
            maximum.

    Returns:
        (N, O, PH, PW) in x's dtype, channels_last, with PH = ⌊(OH + 2 · pool_padding - pool_size) /
        pool_stride⌋ + 1. A window that holds NaN gives NaN, as in ``F.max_pool2d``.

    Differentiable in x, weight, scale and shift; among equal maxima the first one of a window has
    the gradient, as in torch. Saved for backward: x, weight, scale and shift; the map is computed
    again. Under autocast x and weight are cast, the vectors not.

    Raises:
        ValueError: shapes, devices, geometry or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    op = "conv_bn_act_max_pool"
    return torch.ops.resnet_fused.conv_bn_act_max_pool(
        x, weight, scale, shift, *pairs(op, stride=stride, padding=padding, dilation=dilation),
        groups, act,
        *pairs(op, pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding),
    )  # fmt: skip


def conv_bn_act_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    act: str | None = None,
    act2: str | None = None,
) -> Tensor:
    r"""A convolution and the 1x1 convolution behind it, each as :func:`conv_bn_act`, in one op.

    .. math:: y = \mathrm{act}_2(\mathrm{conv}_{1 \times 1}(\mathrm{act}(\mathrm{conv}(x, W) \cdot
              \mathrm{scale} + \mathrm{shift}), W_2) \cdot \mathrm{scale}_2 + \mathrm{shift}_2 + r)

    The last two convolutions and the shortcut of a bottleneck, He et al. (arXiv 1512.03385),
    figure 5, right. A kernel for both need not write z, the map between them.

    Equivalent to, and run as, where no backend has the op whole::

        z = conv_bn_act(x, weight, scale, shift, None, stride=stride, padding=padding,
                        dilation=dilation, act=act)
        y = conv_bn_act(z, weight2, scale2, shift2, residual, act=act2)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; channels_last is fastest.
        weight: (M, C, KH, KW), x's dtype.
        scale: (M,), x's dtype or float32; 1 if None.
        shift: (M,), likewise; 0 if None.
        weight2: (O, M, 1, 1), x's dtype.
        scale2: (O,), x's dtype or float32; 1 if left out.
        shift2: (O,), likewise; 0 if left out.
        residual: (N, O, OH, OW), x's dtype; added before ``act2``.
        stride: of the first convolution, one or two integers of at least 1.
        padding: of the first, one or two integers of at least 0; zeros are padded.
        dilation: of the first, one or two integers of at least 1.
        act: None or "relu", behind the first. NaN passes through.
        act2: None or "relu", behind the second.

    Returns:
        (N, O, OH, OW) in x's dtype, channels_last; z is rounded to x's dtype, too.

    Differentiable in all tensors. Saved for backward: x, weights, vectors, and y if ``act2`` is
    "relu"; z is computed again. Under autocast x, weights and residual are cast, the vectors not.

    Raises:
        ValueError: shapes, devices, geometry or an act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    geometry = pairs("conv_bn_act_conv_bn_act", stride=stride, padding=padding, dilation=dilation)
    return torch.ops.resnet_fused.conv_bn_act_conv_bn_act(
        x, weight, scale, shift, weight2, scale2, shift2, residual, *geometry, act, act2
    )


def bn_apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    act: str | None = None,
) -> Tensor:
    r"""Apply per-channel scale and shift, residual add and activation in one pass.

    .. math:: y = \mathrm{act}(x \cdot \mathrm{scale} + \mathrm{shift} + r)

    Equivalent to::

        y = x.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual
        y = torch.relu(y).to(x.dtype)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64.
        scale: (C,), x's dtype or float32.
        shift: (C,), likewise.
        residual: (N, C, H, W), x's dtype; added before the activation.
        act: None or "relu". NaN passes through.

    Returns:
        (N, C, H, W) in x's dtype, channels_last; computed in float32 (float64), rounded once.

    Differentiable in all tensors. Saved for backward: x, the vectors, and y if act is "relu".
    Under autocast x and residual are cast, the vectors not.

    Raises:
        ValueError: shapes, devices or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
    """
    return torch.ops.resnet_fused.bn_apply(x, scale, shift, residual, act)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    r"""Add the shortcut and rectify, the end of a residual block (arXiv 1512.03385, figure 2).

    .. math:: y = \mathrm{relu}(x + r)

    Equivalent to ``torch.relu(x + residual)``.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64.
        residual: the same shape, dtype and device.

    Returns:
        (N, C, H, W) in x's dtype, channels_last.

    Differentiable in both. Saved for backward: y alone. Under autocast both are cast.

    Raises:
        ValueError: shapes or devices differ; nothing has run.
        TypeError: a dtype is not accepted.
    """
    return torch.ops.resnet_fused.add_relu(x, residual)


def avg_pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Global average pool and linear layer: the head, in one op.

    .. math:: y = \frac{1}{HW} \sum_{h, w} x_{hw} \, W^T + b

    He et al. (arXiv 1512.03385), table 1, last row.

    Equivalent to ``F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)``.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; channels_last is fastest.
        weight: (K, C), x's dtype.
        bias: (K,), x's dtype; 0 if left out.

    Returns:
        (N, K) in x's dtype. Sums are in float32 (float64 for float64); a backend may round the
        mean to x's dtype before the product.

    Differentiable in all three. Saved for backward: x and weight. Under autocast all are cast.

    Raises:
        ValueError: shapes or devices do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    return torch.ops.resnet_fused.avg_pool_linear(x, weight, bias)
