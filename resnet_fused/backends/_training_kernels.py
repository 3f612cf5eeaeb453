"""The native kernels of training: BatchNorm's passes, residual add and ReLU, the stem's max pool.

Maps are (N, C, H, W), float32 or bfloat16, on a GPU also float16, all of the first one's shape,
dtype and device; other layouts than channels_last are converted. Vectors have C values and are read
as float32. Results are channels_last maps and float32 vectors; arithmetic is in float32. On a GPU,
kernels are put on the current stream and not waited for. Arguments that do not fit raise
ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.backends import _bn_math, native
from resnet_fused.backends._outputs import empty_channels_last
from resnet_fused.backends._sizes import pool_shape
from resnet_fused.backends._training_maps import Maps, new_vector
from resnet_fused.backends.native import address, as_vector


def scale_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return :func:`_bn_math.scale_shift` by one kernel, the arithmetic of :func:`bn_act`."""
    kept = [as_vector(t) for t in (mean, var, weight, bias)]
    made = [new_vector(len(mean), mean.device) for _ in range(2)]
    native.run(mean.device, "bn_scale_shift", *map(address, [*kept, *made]), len(mean), eps)
    return made[0], made[1]


def gradient_vectors(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    sum_g: Tensor,
    sum_gx: Tensor,
    eps: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`_bn_math.gradient_vectors` by one kernel."""
    kept = [as_vector(t) for t in (mean, var, weight, sum_g, sum_gx)]
    made = [new_vector(len(mean), mean.device) for _ in range(3)]
    native.run(
        mean.device, "bn_gradient_vectors", *map(address, [*kept, *made]), len(mean), eps, count
    )
    return made[0], made[1], made[2]


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and biased variance (arXiv 1502.03167, algorithm 1).

    One pass over x, with shifted sums merged in double precision: as exact where the mean is far
    larger than the deviation. The same bits on any number of threads. Sums within a part are
    float32: the variance is infinite from deviations of about 1e17 on, as torch's is from 2e19 on,
    and the mean NaN from values of about 1e36 on.
    """
    maps = Maps(x)
    mean, var = maps.new_vectors(2)
    maps.run(
        "bn_stats", maps.map("x", x), mean.data_ptr(), var.data_ptr(), *maps.scratch("bn_stats"),
        *maps.sizes,
    )  # fmt: skip
    return mean, var


def bn_apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
    bits: Tensor | None = None,
) -> Tensor:
    """Return act(x · scale + shift + r).

    r is 0, ``residual``, or residual · residual_scale + residual_shift: the BatchNorm of a
    projection shortcut. ``out`` may be ``x`` or ``residual``. ``bits``, of
    :func:`_bn_math.bits_shape`, receives what passed the ReLU of a sum with r.
    """
    maps = Maps(x, whole=bits is not None)
    y = maps.output("out", out)
    maps.run(
        "bn_apply", maps.map("x", x), maps.vector("scale", scale), maps.vector("shift", shift),
        maps.map("residual", residual), maps.vector("residual_scale", residual_scale),
        maps.vector("residual_shift", residual_shift), y.data_ptr(), maps.bits_to_write(bits),
        *maps.sizes, relu,
    )  # fmt: skip
    return y


def bn_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = True,
    bits: Tensor | None = None,
) -> Tensor:
    """Return :func:`bn_apply` with the scale and shift of :func:`scale_shift`, in one call."""
    maps = Maps(x, whole=bits is not None)
    y = maps.output("out", None)
    maps.run(
        "bn_act", maps.map("x", x), *maps.affine(mean, var, weight, bias),
        maps.map("residual", residual), y.data_ptr(), maps.bits_to_write(bits),
        *maps.scratch("bn_act"), *maps.sizes, eps, relu,
    )  # fmt: skip
    return y


def add_relu(x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
    """Return relu(x + residual); ``out`` may be either."""
    maps = Maps(x)
    y = maps.output("out", out)
    addresses = maps.map("x", x), maps.map("residual", residual), y.data_ptr()
    maps.run("add_relu", *addresses, maps.sizes[0], x.numel())
    return y


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor | None = None,
    relu: bool = True,
    wanted: Sequence[bool] = (True, True, True, False, False),
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual, and act(BN(x)); None for the unwanted.

    It is :func:`bn_act_backward_reduce`, :func:`gradient_vectors` and :func:`bn_act_backward_apply`
    in one call; vectors' gradients are float32, zeros where x is empty.

    Args:
        grad: the gradient of bn_act's result.
        x: what bn_act normalised.
        mean: of x.
        var: of x.
        weight: BatchNorm's own.
        bias: BatchNorm's own.
        eps: BatchNorm's own.
        y: bn_act's result, or its bits; needed with ``relu`` where a residual was added.
        relu: whether bn_act rectified.
        wanted: which of them; the residual's gradient only with ``relu``, else it is ``grad``,
            act(BN(x)) only with x's gradient and ``relu``, and without ``y``.
        out: receives x's gradient; may be ``grad``.
    """
    maps = Maps(x)
    want_x, want_weight, want_bias, want_residual, want_activation = wanted
    made = (
        maps.output("out", out) if want_x else None,
        *(maps.new_vectors(1)[0] if want else None for want in (want_weight, want_bias)),
        maps.output("grad_residual", None) if want_residual else None,
        maps.output("activation", None) if want_activation else None,
    )
    if not x.numel():  # this kernel divides by the rows
        return tuple(None if t is None else t.zero_() for t in made)
    kernel = "bn_act_backward"
    maps.run(
        kernel, maps.map("grad", grad), maps.map("x", x), *maps.affine(mean, var, weight, bias),
        *maps.relu_result(y), *map(address, made), *maps.scratch(kernel), *maps.sizes, eps, relu,
    )  # fmt: skip
    return made


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    relu: bool = True,
    masked: Tensor | None = None,
    x2: Tensor | None = None,
    mean2: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return Σ g and Σ g · (x - mean), with ``x2`` also Σ g · (x2 - mean2).

    g is the gradient behind the ReLU: ``grad`` where not y <= 0, or, without ``y``, where not
    x · scale + shift <= 0; all of ``grad`` without ``relu``. The same bits on any number of
    threads.

    Args:
        grad: the gradient of bn_act's result.
        x: what bn_act normalised.
        mean: what is subtracted from ``x``.
        scale: bn_act's own, needed with ``relu`` but without ``y``.
        shift: likewise.
        y: bn_act's result, or its bits; needed with ``relu`` where a residual was added.
        relu: whether bn_act rectified.
        masked: receives g, the residual's gradient; may be ``grad``.
        x2: what the shortcut's BatchNorm normalised.
        mean2: what is subtracted from ``x2``.
    """
    maps = Maps(x)
    sums = maps.new_vectors(2 if x2 is None else 3)
    out = [s.data_ptr() for s in sums] + [0] * (3 - len(sums))
    masked = None if masked is None else maps.output("masked", masked)
    kernel = "bn_act_backward_reduce"
    maps.run(
        kernel, maps.map("grad", grad), maps.map("x", x), maps.map("x2", x2),
        maps.vector("scale", scale), maps.vector("shift", shift), *maps.relu_result(y),
        maps.vector("mean", mean), maps.vector("mean2", mean2), *out, address(masked),
        *maps.scratch(kernel), *maps.sizes, relu,
    )  # fmt: skip
    return tuple(sums)


def bn_act_backward_apply(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    y: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Return g · a + x · b + d, with g as in :func:`bn_act_backward_reduce`.

    ``out`` may be ``grad``. With a ``grad`` that is masked already, ``relu`` is False.
    """
    maps = Maps(x)
    grad_x = maps.output("out", out)
    maps.run(
        "bn_act_backward_apply", maps.map("grad", grad), maps.map("x", x), 0,
        maps.vector("scale", scale), maps.vector("shift", shift), *maps.relu_result(y),
        maps.vector("a", a), maps.vector("b", b), maps.vector("d", d), 0, 0, 0,
        grad_x.data_ptr(), 0, *maps.sizes, relu,
    )  # fmt: skip
    return grad_x


def bn_act_backward_apply_both(
    grad: Tensor,
    x: Tensor,
    x2: Tensor,
    vectors: Sequence[Tensor],
    vectors2: Sequence[Tensor],
    y: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return :func:`bn_act_backward_apply` for x and for the shortcut's x2, reading grad once.

    ``vectors`` are a, b, d for x, ``vectors2`` those for x2. ``out`` receives x's gradient and may
    be ``grad``.
    """
    maps = Maps(x)
    grad_x, grad_x2 = maps.output("out", out), maps.output("grad_x2", None)
    maps.run(
        "bn_act_backward_apply", maps.map("grad", grad), maps.map("x", x), maps.map("x2", x2),
        0, 0, *maps.relu_result(y),
        *(maps.vector("vectors", v) for v in vectors),
        *(maps.vector("vectors2", v) for v in vectors2),
        grad_x.data_ptr(), grad_x2.data_ptr(), *maps.sizes, relu,
    )  # fmt: skip
    return grad_x, grad_x2


def max_pool_index(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel: int,
    stride: int,
    padding: int,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the max pool of act(x · scale + shift), the places it took, and x's elements there.

    These in 16 bits alone (:func:`_bn_math.taken_shape`). Places are bytes, counted row by row from
    the window's corner. As in torch, the first of equal values is taken, and the last NaN; values
    are compared after rounding to x's dtype.
    """
    n, c, h, w = x.shape
    shape = pool_shape(x.shape, (kernel,) * 2, (stride,) * 2, (padding,) * 2)
    maps = Maps(x)
    y, index = (empty_channels_last(shape, dtype, x.device) for dtype in (x.dtype, torch.uint8))
    taken = empty_channels_last(_bn_math.taken_shape(shape, x.dtype), x.dtype, x.device)
    maps.run(
        "max_pool_index", maps.map("x", x), maps.vector("scale", scale),
        maps.vector("shift", shift), y.data_ptr(), index.data_ptr(), taken.data_ptr(),
        maps.sizes[0], n, h, w, c, kernel, stride, padding, relu,
    )  # fmt: skip
    return y, index, taken


def max_pool_backward(
    grad: Tensor, index: Tensor, shape: Sequence[int], kernel: int, stride: int, padding: int
) -> Tensor:
    """Return the gradient of :func:`max_pool_index`'s input of ``shape``. Deterministic."""
    n, c, h, w = shape
    index = _checked_places(grad, index, shape, kernel, stride, padding)
    maps, grad_x = Maps(grad), empty_channels_last(shape, grad.dtype, grad.device)
    maps.run(
        "max_pool_backward", maps.map("grad", grad), index.data_ptr(), grad_x.data_ptr(),
        maps.sizes[0],
        n, h, w, c, kernel, stride, padding,
    )  # fmt: skip
    return grad_x


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
    kernel: int,
    stride: int,
    padding: int,
    relu: bool = True,
    wanted: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias, None for those that are not wanted.

    They are :func:`bn_act_backward`'s of what :func:`max_pool_backward` gives, which is not
    written: the sums are over the elements ``taken``, and x's gradient is gathered from ``grad``
    and ``index``. On a GPU alone.
    """
    index = _checked_places(grad, index, x.shape, kernel, stride, padding)
    if grad.dtype != x.dtype or grad.device != x.device:
        expected, got = (f"{t.dtype} on {t.device}" for t in (x, grad))
        raise ValueError(f"grad: must be {expected}, got {got}")
    maps, pooled = Maps(x), Maps(grad)
    made = (
        maps.output("grad_x", None) if wanted[0] else None,
        *(maps.new_vectors(1)[0] if want else None for want in wanted[1:]),
    )
    if not x.numel():  # as in bn_act_backward
        return tuple(None if t is None else t.zero_() for t in made)
    n, c, h, w = x.shape
    maps.run(
        "bn_act_max_pool_backward", pooled.map("grad", grad), index.data_ptr(),
        pooled.map("taken", taken), maps.map("x", x), *maps.affine(mean, var, weight, bias),
        *map(address, made), *pooled.scratch("bn_act_max_pool_backward"), maps.sizes[0],
        n, h, w, c, kernel, stride, padding, eps, relu,
    )  # fmt: skip
    return made


def _checked_places(
    grad: Tensor, index: Tensor, shape: Sequence[int], kernel: int, stride: int, padding: int
) -> Tensor:
    """Return the places of a pool of ``shape``, dense, where they and ``grad`` belong to one."""
    expected = pool_shape(shape, (kernel,) * 2, (stride,) * 2, (padding,) * 2)
    for name, t in (("grad", grad), ("index", index)):
        if tuple(t.shape) != expected:
            raise ValueError(f"{name}: must have shape {expected}, got {tuple(t.shape)}")
    if index.dtype != torch.uint8:
        raise ValueError(f"index: must be torch.uint8, got {index.dtype}")
    return index.contiguous(memory_format=torch.channels_last)
