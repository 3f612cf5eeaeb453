"""The ops of training with live BatchNorm, to build blocks of your own.

A convolution gives its output with the batch's statistics; whatever reads that output normalises it
as it reads. What lies between two convolutions is never written. In a block's words::

    z1, *m1 = conv_bn_stats(x, w1, padding=1)
    z2, *m2 = bn_act_conv_bn_stats(z1, *m1, g1, b1, w2, act="relu", padding=1)
    y = bn_act(z2, *m2, g2, b2, x, act="relu")
    for bn, z, (mean, var) in ((bn1, z1, m1), (bn2, z2, m2)):
        count = z.numel() // z.shape[1]
        bn_update_stats(*bn.buffers(), mean, var, count, bn.momentum)

BatchNorm is that of Ioffe and Szegedy (arXiv 1502.03167), algorithm 1, blocks those of He et al.
(arXiv 1512.03385), section 3. Statistics are float32 for every dtype but float64, and biased.
Their gradient is part of what normalises by them: ``mean`` and ``var`` have to be x's own.
Differentiating a gradient again raises RuntimeError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.functional._pairs import Pair, pairs


def conv_bn_stats(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Convolution, with the mean and variance of each channel of its output.

    .. math:: z = \mathrm{conv}(x, W), \quad \mu = \frac{1}{M} \sum z, \quad
              \sigma^2 = \frac{1}{M} \sum (z - \mu)^2

    with M = N · OH · OW values per channel.

    Equivalent to::

        z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
        var, mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; channels_last is fastest.
        weight: (O, C / groups, KH, KW), x's dtype, or float32, then rounded to x's as it is read.
        stride: one or two integers of at least 1.
        padding: one or two integers of at least 0; zeros are padded.
        dilation: one or two integers of at least 1.
        groups: divides C and O.

    Returns:
        z: (N, O, OH, OW) in x's dtype, channels_last.
        mean: (O,) in float32 (float64 for float64), of z as it was rounded; NaN for an empty batch,
            and by the native kernels from values of about 1e36 on, the variance infinite from
            deviations of about 1e17 on: their sums are float32.
        var: likewise, biased.

    Differentiable in x and weight; mean and var carry no gradient, weight's is in its dtype. Saved
    for backward: x and weight. Under autocast both are cast, on the CPU x alone: a float32 weight
    is saved itself, and may not be written before backward, as without autocast.

    Raises:
        ValueError: shapes, devices or geometry do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    geometry = pairs("conv_bn_stats", stride=stride, padding=padding, dilation=dilation)
    return torch.ops.resnet_fused.conv_bn_stats(x, weight, *geometry, groups)


def bn_act_conv_bn_stats(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    act: str | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""BatchNorm and activation of a convolution's output, and the next convolution, in one op.

    .. math:: z = \mathrm{conv}\left(\mathrm{act}\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2
              + \epsilon}} + \beta\right), W\right)

    Equivalent to ``conv_bn_stats(bn_act(x, mean, var, bn_weight, bn_bias, eps=eps, act=act),
    weight, ...)``, but the activation is not kept, and need not be written.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; a convolution's output.
        mean: (C,), float32 (float64 for float64): x's own, as :func:`conv_bn_stats` gives it.
        var: likewise.
        bn_weight: γ, (C,), x's dtype or float32; None for 1.
        bn_bias: β, likewise; None for 0.
        weight: (O, C / groups, KH, KW), x's dtype, or float32, then rounded to x's as it is read.
        eps: ε, at least 0.
        act: None or "relu". NaN passes through.
        stride: one or two integers of at least 1.
        padding: one or two integers of at least 0; zeros are padded, behind the activation.
        dilation: one or two integers of at least 1.
        groups: divides C and O.

    Returns:
        As :func:`conv_bn_stats`.

    Differentiable in x, bn_weight, bn_bias and weight. Saved for backward: x, the vectors,
    bn_bias as a copy, and weight; the activation is computed again. Under autocast weight alone is
    cast, on the CPU nothing: see :func:`conv_bn_stats`.

    Raises:
        ValueError: shapes, devices, geometry, eps or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    op = "bn_act_conv_bn_stats"
    return torch.ops.resnet_fused.bn_act_conv_bn_stats(
        x, mean, var, bn_weight, bn_bias, weight, eps, act,
        *pairs(op, stride=stride, padding=padding, dilation=dilation), groups,
    )  # fmt: skip


def bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    r"""BatchNorm by the batch's statistics, residual add and activation in one pass: a block's end.

    .. math:: y = \mathrm{act}\left(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta
              + r\right)

    Equivalent to::

        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps) + residual
        y = torch.relu(y)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64.
        mean: (C,), float32 (float64 for float64): x's own.
        var: likewise.
        weight: γ, (C,), x's dtype or float32; None for 1.
        bias: β, likewise; None for 0.
        residual: (N, C, H, W), x's dtype; added before the activation.
        eps: ε, at least 0.
        act: None or "relu". NaN passes through.

    Returns:
        (N, C, H, W) in x's dtype, channels_last; computed in float32 (float64), rounded once.

    Differentiable in x, weight, bias and residual. Saved for backward: x, the vectors but
    bias, and if act is "relu" y, or, in 16 bits where 8 divides C, a bit for each of its values
    that says whether it passed; without a residual, where ReLU's mask is computed again, a copy of
    bias.

    Raises:
        ValueError: shapes, devices, eps or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    y, _ = torch.ops.resnet_fused.bn_act(x, mean, var, weight, bias, residual, eps, act)
    return y


def dual_bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual_eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    r"""The end of a block whose shortcut is a projection: two BatchNorms, their sum, activation.

    .. math:: y = \mathrm{act}(\mathrm{BN}(x) + \mathrm{BN}_r(r))

    Equivalent to ``bn_act(x, ..., residual=bn_act(residual, ...), act=act)``, in one pass: the
    shortcut's normalised map is never written (arXiv 1512.03385, section 3.3, option B).

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64.
        mean: (C,), float32 (float64 for float64): x's own.
        var: likewise.
        weight: γ, (C,), x's dtype or float32; None for 1.
        bias: β, likewise; None for 0.
        residual: (N, C, H, W), x's dtype: the projection's output.
        residual_mean: as mean, residual's own.
        residual_var: as var, residual's own.
        residual_weight: as weight.
        residual_bias: as bias.
        eps: ε of x's BatchNorm, at least 0.
        residual_eps: ε of the shortcut's.
        act: None or "relu". NaN passes through.

    Returns:
        (N, C, H, W) in x's dtype, channels_last; computed in float32 (float64), rounded once.

    Differentiable in x, residual, and the weights and biases. Saved for backward: x, residual, the
    vectors but the biases, and if act is "relu" y or its bits, as :func:`bn_act` does.

    Raises:
        ValueError: shapes, devices, eps or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    y, _ = torch.ops.resnet_fused.dual_bn_act(
        x, mean, var, weight, bias, residual, residual_mean, residual_var, residual_weight,
        residual_bias, eps, residual_eps, act,
    )  # fmt: skip
    return y


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
) -> Tensor:
    r"""1x1 convolution, BatchNorm by the batch's statistics, residual add and activation.

    .. math:: y = \mathrm{act}\left(\gamma \frac{W x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta
              + r\right), \quad \mu = W m, \quad \sigma^2 = \mathrm{diag}(W C W^\top)

    with the mean m and the covariance C of x's channels: the convolution's output is never there,
    neither in forward nor in backward. For a bottleneck's end (arXiv 1512.03385, figure 5) that is
    half of what it would save. A covariance costs C / O of the convolution's FLOPs in forward and
    as much in backward, so that it pays where there are many more pixels than channels.

    Equivalent to::

        z = F.conv2d(x, weight)
        y = F.batch_norm(z, None, None, bn_weight, bn_bias, training=True, eps=eps) + residual
        y = torch.relu(y)

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64; channels_last is fastest.
        weight: (O, C, 1, 1), x's dtype, or float32, then rounded to x's as it is read.
        bn_weight: γ, (O,), x's dtype or float32; None for 1.
        bn_bias: β, likewise; None for 0.
        residual: (N, O, H, W), x's dtype; added before the activation.
        eps: ε, at least 0.
        act: None or "relu". NaN passes through.

    Returns:
        (N, O, H, W) in x's dtype, channels_last, rounded once. Means and covariances are float32
        (float64 for float64): of a channel whose mean is r deviations from zero, the variance is
        right to float32, times r².

    Differentiable in all tensors. Saved for backward: x, weight, bn_weight, the moments of x and of
    what the convolution would give, and with "relu" y. A gradient that follows y closely, of which
    BatchNorm lets little through, has the rounding of what it cancels: of bfloat16, 2^-9 of g's
    own size. Under autocast x, weight and residual are cast, on the CPU not weight.

    Raises:
        ValueError: shapes, devices, eps or act do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    op = torch.ops.resnet_fused.pointwise_bn_act
    return op(x, weight, bn_weight, bn_bias, residual, eps, act)[0]


def bn_act_max_pool(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
    pool_size: Pair = 3,
    pool_stride: Pair = 2,
    pool_padding: Pair = 1,
) -> Tensor:
    r"""BatchNorm by the batch's statistics, activation and max pool: the end of the stem.

    .. math:: y = \mathrm{maxpool}(\mathrm{act}(\mathrm{BN}(x)))

    Equivalent to ``F.max_pool2d(bn_act(x, mean, var, weight, bias, eps=eps, act=act), pool_size,
    pool_stride, pool_padding)``. The pool's defaults are those of arXiv 1512.03385, table 1.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16 or float64.
        mean: (C,), float32 (float64 for float64): x's own.
        var: likewise.
        weight: γ, (C,), x's dtype or float32; None for 1.
        bias: β, likewise; None for 0.
        eps: ε, at least 0.
        act: None or "relu".
        pool_size: height and width of the window, one or two integers; at most 256 elements.
        pool_stride: one or two integers of at least 1.
        pool_padding: one or two integers from 0 to half of ``pool_size``.

    Returns:
        (N, C, PH, PW) in x's dtype, channels_last. A window that holds NaN gives NaN.

    Differentiable in x, weight and bias; among equal maxima the first of a window has the gradient.
    Saved for backward: x, the vectors, bias as a copy, and a byte per output.

    Raises:
        ValueError: shapes, devices, eps, act or the pool do not fit; nothing has run.
        TypeError: a dtype is not accepted.
        RuntimeError: a backend asked for by name does not run this call.
    """
    pool = pairs(
        "bn_act_max_pool", pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding
    )
    vectors = (mean, var, weight, bias)
    return torch.ops.resnet_fused.bn_act_max_pool(x, *vectors, eps, act, *pool)[0]


def bn_update_stats(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None = 0.1,
) -> None:
    r"""Move BatchNorm's running statistics towards a batch's, in place, as ``BatchNorm2d`` does.

    .. math:: \bar\mu \leftarrow (1 - m) \bar\mu + m \mu, \quad
              \bar\sigma^2 \leftarrow (1 - m) \bar\sigma^2 + m \frac{M}{M - 1} \sigma^2

    Args:
        running_mean: (C,), any floating point dtype; written.
        running_var: likewise.
        num_batches_tracked: one integer, one is added; None if batches are not counted.
        mean: (C,), the batch's.
        var: likewise, biased.
        count: M, values per channel, at least 2.
        momentum: m; None for the average over all batches, m = 1 / num_batches_tracked.

    Not differentiable. Nothing waits for the device.

    Raises:
        ValueError: shapes, devices, count or momentum do not fit; nothing was written.
        TypeError: a dtype is not accepted.
    """
    torch.ops.resnet_fused.bn_update_stats(
        running_mean, running_var, num_batches_tracked, mean, var, count, momentum
    )
