"""Which op calls a model makes: found on meta tensors, drawn again on the device to be tuned."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused.backends import ORDER, candidates
from resnet_fused.backends._sizes import pool_of
from resnet_fused.backends._tuned import signature
from resnet_fused.convert import fuse
from resnet_fused.engine.capture import capture, fill
from resnet_fused.engine.merge import STEM_IN_TWO, heads, pairs, stems
from resnet_fused.flops import meta_copy
from resnet_fused.freeze import FrozenModule
from resnet_fused.nn import pointwise
from resnet_fused.nn.bn import BATCH_NORMS
from resnet_fused.nn.fused import program_of
from resnet_fused.ops import OPS, bn_act_max_pool
from resnet_fused.ops._checks import AUTOCAST_DEVICES

#: What a forward on meta tensors may raise.
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError)


@dataclass
class Call:
    """One op call of a model, its tensors on the meta device."""

    op: str
    args: tuple[Any, ...]
    #: How often the model makes it.
    count: int = 1

    def argument(self, name: str) -> Any:
        """Return an argument by its name, None if the op has none of that name."""
        return dict(zip(argument_names(self.op), self.args, strict=True)).get(name)

    def __str__(self) -> str:
        """Return the call in a few words, such as ``8x64x56x56 3x3 to 64 add relu``."""
        weight, stride, groups = map(self.argument, ("weight", "stride", "groups"))
        size = self.argument("weight_size") if weight is None else weight.shape
        words = [_shape(self.args[0].shape), *([self.op] if self.op != "conv_bn_act" else [])]
        if stride is not None:
            words.append(f"{_shape(size[2:])} to {size[0]}")
            words += [f"stride {_shape(sorted(set(stride)))}"] if max(stride) > 1 else []
            words += [f"groups {groups}"] if (groups or 1) > 1 else []
        second = self.argument("weight2")
        words += [f"then 1x1 to {second.shape[0]}"] if second is not None else []
        words += ["add"] if self.argument("residual") is not None else []
        return " ".join([*words, self.argument("act") or ""]).strip()


def argument_names(op: str) -> list[str]:
    """Return the names of an op's arguments in the order of its schema."""
    return list(inspect.signature(OPS[op].check).parameters)


def harvest(model: nn.Module, example_input: Tensor) -> list[Call]:
    """Return the different op calls that ``model`` makes, each with its count.

    Of one forward, and of the backward too if the model is in training mode. They run on a meta
    copy; one that is not fused is fused there. Under autocast the calls are those that the ops see
    behind it.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` not a floating point tensor.
        ValueError: the model is frozen, its forward fails on such an input, or makes no fused call.
    """
    _check_arguments(model, example_input)
    twin, wide = _fused_copy(model), False
    dtype, x = _autocast_dtype(example_input), example_input.detach().to("meta")
    if twin.training:
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        if dtype is not None:
            x, dtype, wide = _autocast(twin, x, dtype), None, _stays_wide(model, example_input)
    recorder, more = (_Recorder(dtype, example_input.device.type, wide=wide) for _ in range(2))
    try:
        _step(twin, x, recorder)
        if twin.training:  # block ends, and projections, as one op, too
            with pointwise.on_meta():
                _step(twin, x, more)
    except _FAILURES as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"tune: {type(model).__name__} failed on an example_input of shape "
            f"{tuple(example_input.shape)}: {reason}"
        ) from error
    if not recorder.calls:
        raise ValueError(
            f"tune: {type(model).__name__} makes no fused call here; fusion_report says why"
        )
    return list({**more.calls, **recorder.calls}.values())


def _step(model: nn.Module, x: Tensor, recorder: _Recorder) -> None:
    """Run a forward, and a backward of what is differentiable."""
    with torch.inference_mode(False), torch.set_grad_enabled(model.training), recorder:
        results = tree_leaves(model(x))
        recorded = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
        if recorded:
            torch.autograd.backward(recorded, [torch.ones_like(t) for t in recorded])


def with_parts(calls: Sequence[Call]) -> list[Call]:
    """Return the calls of a step in the order to tune them: what one may be run as is before it.

    An op that is a chain of smaller ones, as BatchNorm and a convolution are, is timed against
    these, each by the fastest that runs it. The last are block ends as one op: they are timed with
    their backward, and against the ops that they replace.
    """
    known = {signature(call.op, call.args) for call in calls}
    whole = {id(call): OPS[call.op].decomposition for call in calls}
    parts: dict[Any, Call] = {}
    for call in calls:
        if (chain := whole[id(call)]) is None:
            continue
        recorder = _Recorder(None, "meta", wide=False)
        with torch.no_grad(), recorder:
            chain(*call.args)
        for key, part in recorder.calls.items():
            if key not in known:
                parts.setdefault(key, replace(part, count=0)).count += call.count

    def place(call: Call) -> tuple[bool, bool]:
        return whole[id(call)] is not None, call.op == pointwise.OP

    return [*parts.values(), *sorted(calls, key=place)]


def harvest_merged(model: nn.Module, example_input: Tensor, device: torch.device) -> list[Call]:
    """Return the calls that an engine could make in place of several: pairs, the stem, the head.

    Of those the ones that a backend runs in one kernel. There are none in training mode, under
    autocast, or for a forward that cannot be captured: no engine runs so.

    Args:
        model: as :func:`harvest` takes it.
        example_input: likewise.
        device: where the engine would run.
    """
    if any(module.training for module in model.modules()) or _autocast_dtype(example_input):
        return []
    twin = _fused_copy(model)
    with torch.inference_mode(False), torch.no_grad():
        try:
            captured = capture(twin, example_input.detach().to("meta"))
        except _FAILURES:
            return []
    merged = (*(call for _, call in pairs(captured)), *stems(captured), *heads(captured))
    found: dict[Any, Call] = {}
    for each in merged:
        name = each.target.name().partition("::")[2]
        call = Call(name, fill(each.args, list(captured.examples)), 0)
        found.setdefault(signature(call.op, call.args), call).count += 1
    return [call for call in found.values() if _runs_whole(call, device)]


def _runs_whole(call: Call, device: torch.device) -> bool:
    try:
        backends = {name for name, _ in candidates(call.op, *draw(call, device))}
    except torch.OutOfMemoryError:
        return True  # tuning it says so
    if call.op == "conv_bn_act_max_pool":
        backends -= {name for name, module in ORDER.items() if module in STEM_IN_TWO}
    return bool(backends)


def _autocast(twin: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Give all but BatchNorms the dtype that autocast casts to, and return x in it.

    On meta tensors autocast does nothing, and BatchNorm's maps have the dtype of what is before.
    """
    for module in twin.modules():
        if type(module) not in BATCH_NORMS:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return x.to(dtype)


def _stays_wide(model: nn.Module, example: Tensor) -> bool:
    """Return whether autocast leaves the convolutions' weights to training's kernels."""
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
    return example.is_cpu and all(weight.dtype == torch.float32 for weight in weights)


def _fused_copy(model: nn.Module) -> nn.Module:
    twin = meta_copy(model)
    return (
        twin if any(program_of(module) for module in twin.modules()) else fuse(twin, inplace=True)
    )


def _check_arguments(model: Any, example: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"tune: model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, FrozenModule) for module in model.modules()):
        raise ValueError("tune: model is frozen: tune the original, then freeze it")
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = getattr(example, "dtype", type(example).__name__)
        raise TypeError(f"tune: example_input must be a floating point tensor, got {got}")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast casts to on x's device, or None where it is off."""
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


class _Recorder(TorchDispatchMode):
    """Keeps every call that maps floating point tensors, and bits or places, to new ones.

    None of them empty.
    """

    def __init__(self, dtype: torch.dtype | None, device: str, *, wide: bool) -> None:
        super().__init__()
        self.calls: dict[Any, Call] = {}
        self._names = {getattr(torch.ops.resnet_fused, name).default: name for name in OPS}
        self._dtype, self._device, self._wide = dtype, device, wide

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = self._names.get(func)
        if name is not None and _is_plain(name, func, args):
            args = self._behind_autocast(name, args)
            if self._wide:
                args = _with_wide_weights(name, args)
            key = signature(name, args)
            if key in self.calls:
                self.calls[key].count += 1
            else:
                self.calls[key] = Call(name, args)
        return out

    def _behind_autocast(self, op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Cast what the op lets autocast cast; on meta tensors autocast itself does nothing."""
        if self._dtype is None:
            return args

        def cast(name: str, value: Any) -> Any:
            if name not in OPS[op].autocast or not isinstance(value, Tensor):
                return value
            kept = OPS[op].kept_by_autocast(name, self._device)
            return value if value.dtype in kept else value.to(self._dtype)

        return tuple(map(cast, argument_names(op), args))


def _with_wide_weights(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give back to a call the float32 weight, or gradient of one, that autocast leaves it."""
    wide = [name in OPS[op].wide for name in argument_names(op)]
    return tuple(
        torch.float32 if isinstance(a, torch.dtype) else a.float() if w else a
        for a, w in zip(args, wide, strict=True)
    )


def _is_plain(op: str, func: Any, args: tuple[Any, ...]) -> bool:
    if func._schema.is_mutable:
        return False
    named = zip(argument_names(op), args, strict=True)
    tensors = [(name, a) for name, a in named if isinstance(a, Tensor)]
    bytes_too = ("y", "index")
    return all(
        (t.numel() or name == "taken") and (name in bytes_too or t.is_floating_point())
        for name, t in tensors
    )


def draw(call: Call, device: torch.device) -> tuple[Any, ...]:
    """Return the arguments of a call with random normal tensors of the same strides on a device.

    Of variances, their absolute values; bits are random too, and places those of a random map.
    Where a covariance is among them, it and what depends on it belong together.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        if not value.is_floating_point():
            flat = torch.randint(
                256, (extent,), generator=generator, dtype=value.dtype, device=device
            )
            return flat.as_strided(value.shape, value.stride())
        flat = torch.randn(extent, generator=generator, dtype=value.dtype, device=device)
        if name.endswith("var"):
            flat.abs_()
        return flat.as_strided(value.shape, value.stride())

    args = {
        name: _places(call, drawn("x", call.args[0])) if name == "index" else drawn(name, value)
        for name, value in zip(argument_names(call.op), call.args, strict=True)
    }
    if "x_cov" in args:
        args.update(_moments(args))
    return tuple(args.values())


def _moments(args: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the moments of x, of a 1x1 convolution's output, and sums, that belong together.

    Of x itself where it is there, else of any; those of the output only where they are arguments.
    """
    weight, x = args["weight"], args.get("x")
    if x is None:
        cov = args["x_cov"] @ args["x_cov"].t() / len(args["x_cov"])
        found = {"x_mean": args["x_mean"], "x_cov": cov}
    else:
        found = dict(zip(("x_mean", "x_cov"), OPS["channel_covariance"].reference(x), strict=True))
    stats = OPS["pointwise_bn_stats"].reference(weight, *found.values(), None, None, 0.0)
    found.update(zip(("mean", "var"), stats, strict=False))
    if args.get("sum_g") is not None and "grad" in args:
        found["sum_g"] = args["grad"].to(found["x_mean"].dtype).sum((0, 2, 3))
    return {name: moment for name, moment in found.items() if name in args}


def _places(call: Call, grad: Tensor) -> Tensor:
    """Return which element a max pool took of each window, for a gradient of its result.

    Of a window at an edge it is one within the map, so not any byte is a place.
    """
    x, pool = call.argument("x"), pool_of(call.op, call.args)
    assert pool is not None, "what has places has a pool"
    size = call.argument("x_size") if x is None else x.shape
    generator = torch.Generator(grad.device).manual_seed(1)
    drawn = torch.randn(tuple(size), generator=generator, dtype=grad.dtype, device=grad.device)
    zero = torch.zeros(size[1], device=grad.device)
    return bn_act_max_pool.reference(drawn, zero, zero + 1, None, None, 0.0, None, *pool)[1]


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(str(n) for n in sizes)
