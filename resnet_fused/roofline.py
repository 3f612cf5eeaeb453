"""What a device would need at least for a model: the roofline, layer by layer.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures" (Communications of the ACM 52(4), 2009). It is a bound, not a measurement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resnet_fused.backends.triton.pair_tiles import MOST_BETWEEN
from resnet_fused.convert import fuse
from resnet_fused.flops import Call, Trace, trace
from resnet_fused.models import create_model
from resnet_fused.ops import OPS


@dataclass(frozen=True)
class Device:
    """The two figures of a device that bound every kernel on it."""

    name: str
    #: Floating point operations a second, two per multiply-add, by dtype.
    flops: Mapping[torch.dtype, float]
    #: Bytes a second between memory and the chip.
    bandwidth: float


DEVICES = {
    # As measured on one, both figures: what a matrix product and a copy reach.
    "h200": Device("H200", {torch.bfloat16: 790e12, torch.float16: 790e12}, 4.3e12),
    # NVIDIA H100 data sheet, SXM5: dense, half of what it gives "with sparsity"; float32 as TF32,
    # in which torch convolves by default.
    "h100": Device(
        "H100 SXM5",
        {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 494.7e12},
        3.35e12,
    ),
    # NVIDIA A100 data sheet, SXM4 80 GB: dense; float32 as TF32.
    "a100": Device(
        "A100 SXM4 80 GB",
        {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 156e12},
        2.039e12,
    ),
}


@dataclass(frozen=True)
class Layer:
    """One kernel: an op, or several that hand on what they make without writing it."""

    name: str
    #: The ops, joined by " + ".
    op: str
    flops: int
    #: Bytes read and written, each tensor once.
    nbytes: int
    #: Seconds for the arithmetic alone.
    compute_time: float
    #: Seconds for the bytes alone.
    memory_time: float

    @property
    def intensity(self) -> float:
        """Floating point operations per byte."""
        return self.flops / max(self.nbytes, 1)

    @property
    def time(self) -> float:
        """Seconds: the longer of the two, as if the shorter one hid behind it."""
        return max(self.compute_time, self.memory_time)

    @property
    def bound(self) -> str:
        """What the layer waits for: "compute" or "memory"."""
        return "compute" if self.compute_time > self.memory_time else "memory"


@dataclass(frozen=True)
class Schedule:
    """Layers that run one after another on a batch."""

    layers: tuple[Layer, ...]
    images: int

    @property
    def time(self) -> float:
        """Seconds for the batch."""
        return sum(layer.time for layer in self.layers)

    @property
    def images_per_second(self) -> float:
        """Images a second, at most."""
        return _rate(self.images, self.time)

    @property
    def images_per_second_of_arithmetic(self) -> float:
        """Images a second if memory cost nothing: what no fusion can pass."""
        return _rate(self.images, sum(layer.compute_time for layer in self.layers))

    @property
    def nbytes_per_image(self) -> float:
        """Bytes an image; the weights are read once a batch."""
        return sum(layer.nbytes for layer in self.layers) / self.images

    @property
    def convolutions(self) -> Schedule:
        """The layers with a convolution in them."""
        chosen = (layer for layer in self.layers if "conv" in layer.op)
        return Schedule(tuple(chosen), self.images)


def _rate(images: int, seconds: float) -> float:
    return images / seconds if seconds else math.inf


@dataclass(frozen=True)
class Report:
    """The bound of one forward; ``str()`` is a table."""

    model: str
    input_size: tuple[int, ...]
    device: Device
    dtype: torch.dtype
    #: One layer per op that runs; the head is one, as in an engine.
    layerwise: Schedule
    #: The same with the stem's pool in its convolution's kernel.
    stem_joined: Schedule
    #: And with the last 1x1 convolution of each bottleneck in the kernel of its 3x3, where that has
    #: at most :data:`MOST_BETWEEN` channels: the stages of 56x56 and 28x28 pixels.
    across: Schedule

    @property
    def saved_by_pairs(self) -> dict[str, float]:
        """Bytes an image that each 3x3 in one kernel with its 1x1 need not move, by their names."""
        alone = {layer.name: layer.nbytes for layer in self.stem_joined.layers}
        pairs = (layer for layer in self.across.layers if layer.name not in alone)
        return {
            p.name: (sum(alone[name] for name in p.name.split(" + ")) - p.nbytes)
            / self.across.images
            for p in pairs
        }

    def __str__(self) -> str:
        """Return one line per layer, the longest first, and the totals."""
        titles = ("layer", "GFLOP", "MB", "FLOP/B", "us", "share", "bound")
        table: list[tuple[str, ...]] = [titles]
        total = self.layerwise.time
        for layer in sorted(self.layerwise.layers, key=lambda layer: -layer.time):
            figures = (layer.flops / 1e9, layer.nbytes / 1e6, layer.intensity, layer.time * 1e6)
            share = f"{layer.time / total:.1%}"
            table.append((layer.name, *(f"{f:.1f}" for f in figures), share, layer.bound))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        line = "  ".join(f"{{:{side}{w}}}" for side, w in zip("<>>>>><", widths, strict=True))
        size = "x".join(map(str, self.input_size))
        dtype = str(self.dtype).removeprefix("torch.")
        head = f"{self.model}, input {size}, {dtype}, {self.device.name}: at best, not measured"
        rows = (line.format(*row).rstrip() for row in table)
        return "\n".join((head, *rows, *self._pairs(), *self._totals()))

    def _pairs(self) -> Iterable[str]:
        for name, saved in self.saved_by_pairs.items():
            yield f"in one kernel: {name}, {saved / 1e6:.1f} MB an image saved"

    def _totals(self) -> Iterable[str]:
        before = self.layerwise.nbytes_per_image
        convolutions = self.layerwise.convolutions.nbytes_per_image / 1e6
        rows = (
            ("layer by layer", self.layerwise, f"{convolutions:.1f} of it in convolutions"),
            ("stem in one kernel", self.stem_joined, ""),
            ("and each 3x3 with its 1x1", self.across, ""),
        )
        for title, schedule, note in rows:
            per_image = schedule.nbytes_per_image
            note = note or f"{(before - per_image) / 1e6:.1f} saved"
            speed = f"{schedule.images_per_second:,.0f} img/s"
            yield f"{title:<26}{speed:>14}, {per_image / 1e6:6.1f} MB an image, {note}"
        speed = f"{self.layerwise.images_per_second_of_arithmetic:,.0f} img/s"
        yield f"{'arithmetic alone':<26}{speed:>14}"


def roofline(
    model: nn.Module, input_size: Sequence[int], device: Device, dtype: torch.dtype
) -> Report:
    r"""Bound the time of one forward of ``model``, a fused one as a rule, on ``device``.

    .. math:: t = \sum_\text{layers} \max(\text{FLOPs} / \text{peak}, \text{bytes} /
              \text{bandwidth})

    A convolution reads its input, its weight, its scale and shift and its residual once and writes
    its output once; a pool, and whatever else runs, likewise; views cost nothing, and neither does
    what depends on parameters only, as it can be kept. FLOPs and bytes are those of the ops' own
    ``flops`` and ``nbytes``, and for torch's ops torch's formulas and the sizes of their tensors.
    The mean and the linear layer of a head are one layer. What one layer writes the next one reads
    from memory: no cache is counted on. A batch reads the weights once, so ResNet-50 in bfloat16
    moves 57.0 MB (10^6 bytes) an image at batch 256, 54.8 of them in its convolutions.

    The forward runs on a copy on the meta device; ``model`` is untouched.

    Args:
        model: as :func:`resnet_fused.fuse` returns it, or any other to compare with.
        input_size: (N, C, H, W).
        device: one of :data:`DEVICES`, or your own.
        dtype: of input and parameters; scale and shift stay float32.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: the device has no figure for ``dtype``, ``input_size`` is not a sequence of
            positive integers, or the forward fails on it.
    """
    if dtype not in device.flops:
        accepted = ", ".join(map(str, device.flops))
        raise ValueError(f"roofline: no figure for {dtype} on {device.name}; accepted: {accepted}")
    traced = trace("roofline", model, input_size, dtype)
    steps = _Steps(traced)
    size = tuple(traced.x.shape)

    def schedule(*joins: Callable[[Call, Call], bool]) -> Schedule:
        layers = (_layer(calls, device, dtype) for calls in steps.joined(*joins))
        return Schedule(tuple(layers), size[0])

    return Report(
        model=type(model).__name__,
        input_size=size,
        device=device,
        dtype=dtype,
        layerwise=schedule(_is_head),
        stem_joined=schedule(_is_head, _is_stem),
        across=schedule(_is_head, _is_stem, _is_expansion),
    )


def roofline_by_name(
    name: str, input_size: Sequence[int], device: Device, dtype: torch.dtype
) -> Report:
    """Return :func:`roofline` of the model that ``create_model`` builds, fused, without weights.

    Raises:
        ValueError: there is no such model, or as :func:`roofline`.
    """
    with torch.device("meta"):
        model = fuse(create_model(name))
    return dataclasses.replace(roofline(model, input_size, device, dtype), model=name)


class _Steps:
    """The calls that compute something from the input, and who reads whose result."""

    def __init__(self, traced: Trace) -> None:
        self.calls: list[Call] = []
        #: By call: the places of the calls whose results it reads.
        self._sources: list[set[int]] = []
        #: By call: how many read its result, the model's caller included.
        self._readers: list[int] = []
        # Views share the memory of what they are views of, so memory tells who reads what.
        writers = {_memory(traced.x): -1}
        for call in traced.calls:
            sources = {writers[m] for t in _tensors(call) if (m := _memory(t)) in writers}
            if not sources or _is_view(call):
                continue
            for source in sources - {-1}:
                self._readers[source] += 1
            writers[_memory(call.out)] = len(self.calls)
            self.calls.append(call)
            self._sources.append(sources)
            self._readers.append(0)
        for tensor in tree_leaves(traced.result):
            if isinstance(tensor, Tensor) and writers.get(_memory(tensor), -1) >= 0:
                self._readers[writers[_memory(tensor)]] += 1

    def joined(self, *joins: Callable[[Call, Call], bool]) -> list[tuple[Call, ...]]:
        """Return the calls, in pairs where the second alone reads the first and a join holds."""
        groups: dict[int, tuple[Call, ...]] = {}
        for i, call in enumerate(self.calls):
            groups[i] = (call,)
            for j in self._sources[i]:
                before = groups.get(j, ())
                if len(before) != 1 or len(groups[i]) != 1 or self._readers[j] != 1:
                    continue
                if any(join(before[0], call) for join in joins):
                    groups[i] = (*groups.pop(j), call)
        return list(groups.values())


def _layer(calls: tuple[Call, ...], device: Device, dtype: torch.dtype) -> Layer:
    """Return the cost of calls of which each hands its result to the next one on the chip."""
    flops = sum(call.flops or 0 for call in calls)
    handed_on = sum(call.out.nbytes for call in calls[:-1])
    nbytes = sum(map(_nbytes, calls)) - 2 * handed_on
    name, op = " + ".join(c.name for c in calls), " + ".join(c.op for c in calls)
    compute_time, memory_time = flops / device.flops[dtype], nbytes / device.bandwidth
    return Layer(name, op, flops, nbytes, compute_time, memory_time)


def _nbytes(call: Call) -> int:
    namespace, _, name = call.func._schema.name.partition("::")
    if namespace == "resnet_fused":
        return OPS[name].nbytes(*call.args)
    # Of several results, as a pool's indices, the first is what inference needs.
    return sum(t.nbytes for t in _tensors(call)) + call.out.nbytes


def _tensors(call: Call) -> list[Tensor]:
    """Return the tensors a call reads, each once."""
    leaves = (t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor))
    return list({id(t): t for t in leaves}.values())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(call: Call) -> bool:
    return call.func.is_view or torch.Tag.inplace_view in call.func.tags


def _is_stem(before: Call, after: Call) -> bool:
    """Return whether the two are a stem: a convolution without residual and its max pool."""
    convolution = before.op == "resnet_fused.conv_bn_act" and before.args[4] is None
    return convolution and after.op == "aten.max_pool2d_with_indices"


def _is_head(before: Call, after: Call) -> bool:
    """Return whether the two are a head: the mean over all pixels and a linear layer."""
    if before.op != "aten.mean" or after.op not in ("aten.addmm", "aten.mm"):
        return False
    features = before.args[0].shape[:2]
    return before.out.shape[:2] == features and before.out.numel() == features.numel()


def _is_expansion(before: Call, after: Call) -> bool:
    """Return whether the two are a bottleneck's 3x3 and 1x1, narrow enough to stay on the chip."""
    if not before.op == after.op == "resnet_fused.conv_bn_act":
        return False
    if _memory(after.args[0]) != _memory(before.out) or before.args[4] is not None:
        return False
    first, second = (call.args[1].shape for call in (before, after))
    kernels = first[2:] == (3, 3) and second[2:] == (1, 1)
    dense = before.args[8] == after.args[8] == 1 and tuple(after.args[5]) == (1, 1)
    return kernels and dense and first[0] <= MOST_BETWEEN
