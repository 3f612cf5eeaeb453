"""From an op's arguments to kernel launches: packed weights, descriptors, grids, specialisations.

Tensors on the meta device give the same launches, to be compiled where no GPU is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused.backends._derived import derived
from resnet_fused.backends.triton import im2col, interpreted, tiles
from resnet_fused.backends.triton.cost import occupancy
from resnet_fused.backends.triton.kernels.conv import conv_fwd_kernel
from resnet_fused.backends.triton.kernels.depthwise import depthwise_fwd_kernel
from resnet_fused.backends.triton.kernels.pair import conv_pair_fwd_kernel
from resnet_fused.backends.triton.kernels.pointwise import affine_kernel
from resnet_fused.backends.triton.kernels.tma import conv_tma_fwd_kernel
from resnet_fused.backends.triton.pair_tiles import Pair
from resnet_fused.backends.triton.shapes import Config, Problem, box, count

#: From this many elements on, offsets take 64 bits.
WIDE_FROM = 2**31
#: What vector loads and descriptors want of an address.
ALIGNMENT = 16
_BLOCK = 1024
#: Whether descriptors can have float32 rounded to TF32 on its way, from Triton 3.7 on.
DESCRIPTORS_ROUND = "round_f32_to_tf32" in {f.name for f in dataclasses.fields(TensorDescriptor)}


def is_wide(*counts: int) -> bool:
    """Return whether one of so many elements, or of rows in whole blocks, takes 64 bits to tell."""
    return max(counts) >= WIDE_FROM


class Launch(NamedTuple):
    """A kernel with everything it is launched with."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    #: Registers of a thread at most; None leaves it to the compiler.
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """Return what the compiler is told beside the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options())


def precision(dtype: torch.dtype) -> str:
    """Return the precision of :mod:`tiles`; torch's flag for convolutions decides on TF32.

    ``torch.backends.cudnn.allow_tf32`` writes the same flag; reading that one fails where the new
    names were used.
    """
    if dtype != torch.float32:
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    flag: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if flag == "tf32" else "fp32"


def channels_last(t: Tensor) -> Tensor:
    """Return ``t`` dense in channels_last order at an aligned address; itself if it is."""
    t = t.contiguous(memory_format=torch.channels_last)
    return t.clone() if t.data_ptr() % ALIGNMENT else t


def vector(t: Tensor | None) -> Tensor | None:
    """Return ``t`` dense at an aligned address; itself if it is."""
    if t is None:
        return None
    t = t.contiguous()
    return t.clone() if t.data_ptr() % ALIGNMENT else t


def pack(weight: Tensor, groups: int) -> Tensor:
    """Return the weight as the kernels read it.

    Rows (O, KH · KW · C/groups), each padded with zeros to 16 bytes, which for a weight in
    channels_last memory is that memory; for a depthwise convolution (KH · KW, O).
    """
    rows = weight.detach().permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    if weight.shape[1] == 1 and groups > 1:
        rows = rows.t()
    elif over := -rows.shape[1] % (ALIGNMENT // weight.element_size()):
        rows = F.pad(rows, (0, over))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows


def _packed(weight: Tensor, groups: int) -> Tensor:
    return derived((weight,), ("triton", groups), lambda: pack(weight, groups))


def conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    problem: Problem,
    config: Config,
    act: str | None,
    capability: int,
) -> list[Launch]:
    """Return the launches of one conv_bn_act, all maps from :func:`channels_last`.

    Raises:
        ValueError: the config does not fit the problem.
    """
    kind = precision(x.dtype)
    if config.im2col:
        if reason := im2col.missing() or im2col.declines(problem, kind, capability):
            raise ValueError(f"config {config} does not run {problem}: {reason}")
    elif config.tma and not tiles.takes_tma(problem, kind, config, capability):
        raise ValueError(f"config {config} fetches tiles in a way that {problem} does not allow")
    packed = _packed(weight, problem.groups)
    vectors = {"scale_ptr": vector(scale), "shift_ptr": vector(shift)}
    relu = act == "relu"
    if config.im2col:
        from resnet_fused.backends.triton import launch_im2col

        return [
            launch_im2col.conv(x, packed, vectors, residual, y, problem, config, relu, capability)
        ]
    if config.tma:
        return [_tma(x, packed, vectors, residual, y, problem, config, relu, capability)]
    tensors = {"x_ptr": x, "w_ptr": packed, "y_ptr": y, **vectors, "residual_ptr": residual}
    rows = math.ceil(problem.m / config.block_m)
    elements = (x.numel(), packed.numel(), y.numel() * config.split_k)
    common = {
        **geometry(problem), **_pixels(problem),
        "OUT": problem.o, "GROUPS": problem.groups, "RELU": relu,
        "WIDE": is_wide(*elements, rows * config.block_m),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    most = tiles.register_limit(problem, kind, config, capability)
    if problem.depthwise:
        grid = (rows * math.ceil(problem.o * problem.groups / config.block_n), 1, 1)
        both = {**tensors, **common}
        return [Launch(depthwise_fwd_kernel, grid, both, config.num_warps, maxnreg=most)]
    arguments = {
        **tensors, **common, "partial_ptr": None, "IN": problem.c, "PITCH": packed.shape[1],
        "PRECISION": dot_precision(kind), "FLAT": problem.flat, "SPLIT_K": config.split_k,
        "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    grid = (rows * math.ceil(problem.o / config.block_n), config.split_k, problem.groups)
    launch = Launch(conv_fwd_kernel, grid, arguments, config.num_warps, config.num_stages, most)
    if config.split_k == 1:
        return [launch]
    partial = torch.empty((config.split_k, y.numel()), dtype=torch.float32, device=y.device)
    nothing = dict.fromkeys(("scale_ptr", "shift_ptr", "residual_ptr"))
    launch.arguments.update(nothing, partial_ptr=partial, RELU=False)
    return [launch, affine(partial, scale, shift, residual, y, act, parts=config.split_k)]


def geometry(problem: Problem) -> dict[str, int]:
    """Return the kernels' arguments about taps and the output's size."""
    (kh, kw), (pad_h, pad_w), (dil_h, dil_w) = problem.kernel, problem.padding, problem.dilation
    oh, ow = problem.out_size
    return {
        "oh": oh, "ow": ow, "KH": kh, "KW": kw, "PAD_H": pad_h, "PAD_W": pad_w,
        "DIL_H": dil_h, "DIL_W": dil_w,
    }  # fmt: skip


def _pixels(problem: Problem) -> dict[str, int]:
    stride_h, stride_w = problem.stride
    return {
        "m": problem.m, "h": problem.h, "w": problem.w, "STRIDE_H": stride_h, "STRIDE_W": stride_w,
    }  # fmt: skip


def pair(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    problem: Pair,
    config: Config,
    act: str | None,
    act2: str | None,
) -> Launch:
    """Return the launch of one conv_bn_act_conv_bn_act, all maps from :func:`channels_last`."""
    first, packed, packed2 = problem.first, _packed(weight, 1), _packed(weight2, 1)
    rows = math.ceil(first.m / config.block_m)
    elements = (x.numel(), packed.numel(), packed2.numel(), y.numel())
    arguments = {
        "x_ptr": x, "w_ptr": packed, "scale_ptr": vector(scale), "shift_ptr": vector(shift),
        "w2_ptr": packed2, "scale2_ptr": vector(scale2), "shift2_ptr": vector(shift2),
        "residual_ptr": residual, "y_ptr": y, **geometry(first), **_pixels(first),
        "IN": first.c, "BETWEEN": first.o, "OUT": problem.o, "PITCH": packed.shape[1],
        "PITCH2": packed2.shape[1], "RELU": act == "relu", "RELU2": act2 == "relu",
        "WIDE": is_wide(*elements, rows * config.block_m),
        "BLOCK_M": config.block_m, "BLOCK_BETWEEN": problem.block_between,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    grid = (rows, 1, 1)
    return Launch(conv_pair_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)


def dot_precision(kind: str) -> str:
    """Return the name that ``tl.dot`` has for a precision of :mod:`tiles`."""
    return "tf32" if kind == "tf32" else "ieee"


def _tma(
    x: Tensor,
    packed: Tensor,
    vectors: dict[str, Tensor | None],
    residual: Tensor | None,
    y: Tensor,
    problem: Problem,
    config: Config,
    relu: bool,
    capability: int,
) -> Launch:
    box_n, box_h, box_w = box(problem, config.block_m)
    s, kind = problem.stride[0], precision(x.dtype)
    n, oh, ow = (problem.n, *problem.out_size)
    shape = (n, problem.h // s, s, problem.w // s, s * problem.c)
    if problem.pointwise:
        n, oh, ow, shape = 1, 1, problem.m, (1, 1, 1, problem.m, problem.c)
    out = (n, oh, ow, problem.o)
    out_box = (box_n, box_h, box_w, config.block_n)
    # Interpreted products are float32's own, and from Triton 3.8 on its descriptors would round.
    rounds = kind == "tf32" and DESCRIPTORS_ROUND and not interpreted()
    arguments = {
        "x_desc": _descriptor(x, shape, (box_n, box_h, 1, box_w, config.block_k), rounds),
        "w_desc": _descriptor(packed, packed.shape, (config.block_n, config.block_k), rounds),
        "y_desc": _descriptor(y, out, out_box),
        "residual_desc": None if residual is None else _descriptor(residual, out, out_box),
        **vectors, **geometry(problem), "images": n, "oh": oh, "ow": ow,
        "IN": problem.c, "OUT": problem.o, "STRIDE": s, "RELU": relu,
        "PRECISION": dot_precision(kind), "ROUNDED": rounds,
        "BOX_N": box_n, "BOX_H": box_h, "BOX_W": box_w,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    resident = occupancy(problem, kind, config, capability)
    grid = (min(count(problem, config), processors(x.device) * resident), 1, 1)
    return Launch(conv_tma_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)


def _descriptor(
    t: Tensor, shape: tuple[int, ...], block: tuple[int, ...], rounds: bool = False
) -> TensorDescriptor:
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    to_tf32 = {"round_f32_to_tf32": True} if rounds else {}
    return TensorDescriptor(t, list(shape), strides, list(block), **to_tf32)


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Return a GPU's multiprocessors; elsewhere two, so that blocks stay for several tiles."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    act: str | None,
    parts: int = 1,
) -> Launch:
    """Return the launch of y = relu(Σ x · scale + shift + residual) over ``parts`` of ``x``."""
    elements = y.numel()
    blocks = math.ceil(elements / _BLOCK)
    arguments = {
        "x_ptr": x, "y_ptr": y, "scale_ptr": vector(scale), "shift_ptr": vector(shift),
        "residual_ptr": residual, "elements": elements, "CHANNELS": y.shape[1], "PARTS": parts,
        "RELU": act == "relu", "WIDE": is_wide(blocks * _BLOCK), "BLOCK": _BLOCK,
    }  # fmt: skip
    return Launch(affine_kernel, (blocks, 1, 1), arguments)
