"""The verbs ``fuse``, ``unfuse`` and ``fusion_report``."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from resnet_fused.backends import trains
from resnet_fused.nn.fused import class_of, install, program_of, remove
from resnet_fused.nn.match import match
from resnet_fused.nn.program import Program, build
from resnet_fused.nn.trace import Chains, TraceError, has_children, trace
from resnet_fused.ops._checks import FLOAT_DTYPES

FilterFn = Callable[[nn.Module, str], bool]
MEMORY = ("default", "low")


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    filter_fn: FilterFn | None = None,
    memory: str = "default",
) -> nn.Module:
    r"""Run conv → BN → [add] → [ReLU] as one op wherever the model's forwards contain it.

    .. math:: y = \mathrm{relu}(\mathrm{BN}(\mathrm{conv}(x)) + r)

    Each module's forward is traced and matched, so the model may come from torchvision, timm,
    transformers or anywhere else. Only forwards change: names, children, Parameter objects, hooks
    and ``state_dict`` stay as they are, weights load before and after, every module remains an
    instance of its class, and ``unfuse`` gives the original back. What the fused op does not cover
    (a hook on an inner module, an add that broadcasts) runs as before, call by call. Fused blocks
    return channels_last tensors, which ``reshape`` and ``flatten`` take and ``view`` may not. Hooks
    for all modules (``register_module_forward_hook``) do not see the modules inside a group.

    Parameters may be changed at any time, by an optimizer or in place under ``torch.no_grad()``.
    Other writes through ``parameter.data``, and of running statistics by ``F.batch_norm`` outside
    of its module, are not seen by what is kept of them. Modules, functions, numbers and settings of
    a fused module may be exchanged: what its steps no longer stand for runs its own forward.

    On the CPU outputs of 256 KiB and more lie in memory that is used again, which torch cannot
    resize: neither by ``untyped_storage().resize_`` nor as an ``out=`` of another size. There is no
    switch for it; a ``clone()`` is torch's own, as is what the backend "reference" returns.

    A CUDA graph of one's own of a fused model derives scale, shift and packed weights anew at every
    replay, as it must see weights that changed; :func:`freeze` and :func:`capture_step` are made
    for graphs, and faster.

    Args:
        model: any module with a Conv2d in it, on any device, in training or eval mode.
        inplace: change ``model`` itself instead of a deep copy.
        filter_fn: ``filter_fn(module, fqn) -> bool``; a module for which it is false keeps its
            forward (its children are asked for themselves). The root's name is "".
        memory: in training, "low" keeps no block's output for backward but computes those of a
            stage again, bit for bit, when its last block's gradient is due: a quarter less of what
            eager torch keeps, for one more pass over each block's end. They then live until their
            block's backward is done, or as long as the graph if it is retained. A map that was
            written in between unseen by its version counter (``.data``, a NumPy view) gives other
            gradients; other writes raise, as in torch. torch.compile decides itself what to keep,
            in either case.

    Returns:
        The model, fused. :func:`fusion_report` says what was and was not, and why.

    Raises:
        TypeError: ``model`` is not an eager ``nn.Module``.
        ValueError: ``model`` has no Conv2d, or ``memory`` is neither "default" nor "low".
    """
    _check_model("fuse", model)
    if memory not in MEMORY:
        raise ValueError(f"fuse: memory must be one of {MEMORY}, got {memory!r}")
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        raise ValueError(f"fuse: model {type(model).__name__} has no Conv2d, nothing can be fused")
    if not inplace:
        # Copies made in inference mode would have no version counters, and nothing could be cached.
        with torch.inference_mode(False):
            model = copy.deepcopy(model)
    unfuse(model)
    # Asked now, as torch.compile cannot ask while it traces.
    for device in {p.device for p in model.parameters()}:
        for dtype in FLOAT_DTYPES:
            trains(device, dtype, 0)
    shared = _shared(model)
    for module, program in _units(model, shared, filter_fn or _any, memory):
        install(module, program)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module of ``model`` its own forward back, in place, and return ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        remove(module)
    return model


class Fused(NamedTuple):
    """One fused group."""

    #: The convolution's fully qualified name.
    name: str
    #: The parts, such as "conv+bn+add+relu".
    pattern: str
    #: The module whose forward contains the group.
    reason: str


class Skipped(NamedTuple):
    """One convolution that was left alone."""

    name: str
    pattern: str
    reason: str


class FusionReport(NamedTuple):
    """What :func:`fuse` did to a model; ``str()`` is a table."""

    fused: list[Fused]
    skipped: list[Skipped]
    #: What :func:`fuse` was asked to keep in training; both words if parts were fused apart.
    memory: str

    def __str__(self) -> str:
        """Return counts by pattern, then each convolution left alone with its reason."""
        counts = Counter(group.pattern for group in self.fused)
        lines = [f"fused {len(self.fused)} of {len(self.fused) + len(self.skipped)} convolutions"]
        lines += [f"  {count:4d}  {pattern}" for pattern, count in counts.most_common()]
        if "low" in self.memory:
            lines.append(f"memory in training: {self.memory}")
        if self.skipped:
            lines.append("left alone:")
            width = max(len(s.name) for s in self.skipped)
            lines += [f"  {s.name:<{width}}  {s.reason}" for s in self.skipped]
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """Say which convolutions of ``model`` run fused, which do not, and why.

    Args:
        model: a fused model; for any other the reasons say what keeps it from being fused.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_model("fusion_report", model)
    reasons: dict[str, str] = {}
    fused: dict[str, Fused] = {}
    memory: set[str] = set()
    for fqn, module in model.named_modules():
        program = program_of(module)
        if program is None:
            continue
        where = f"in {fqn or 'the root'} ({class_of(module).__name__})"
        for call in program.fused:
            name = _join(fqn, call.name)
            fused[name] = Fused(name, call.pattern, where)
            memory.add(call.memory)
        reasons.update((_join(fqn, name), reason) for name, reason in program.skipped)
    missing = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} - fused.keys()
    if missing - reasons.keys():
        reasons = {**_find_reasons(model, missing), **reasons}
    skipped = [Skipped(n, "conv", reasons[n]) for n in sorted(missing)]
    return FusionReport(list(fused.values()), skipped, " and ".join(sorted(memory)) or "default")


def _find_reasons(model: nn.Module, missing: set[str]) -> dict[str, str]:
    """Say for each convolution in ``missing`` what the forwards that are not fused make of it."""
    reasons: dict[str, str] = {}
    untraceable: dict[str, str] = {}
    shared = _shared(model)
    chains: Chains = {}
    for fqn, module in model.named_modules():
        if program_of(module) is not None or not _has_forward(module):
            continue
        try:
            matches = match(module, trace(module, chains).graph, shared)
        except TraceError as error:
            untraceable[fqn] = f"{type(module).__name__}.forward cannot be traced: {error}"
            continue
        left_out = {str(group.conv.target): _NOT_ASKED for group in matches.groups}
        found = {**left_out, **matches.skipped}
        reasons.update((_join(fqn, name), reason) for name, reason in found.items())
    for name in missing - reasons.keys():
        caller = name
        while caller and (caller := caller.rpartition(".")[0]) not in untraceable:
            pass
        reasons[name] = untraceable.get(caller, "no forward that could be traced calls it")
    return reasons


_NOT_ASKED = "could be fused: fuse was not called on it, or filter_fn left it out"


def _has_forward(module: nn.Module) -> bool:
    """Return whether ``module`` calls others in a forward of its own (a ModuleList has none)."""
    return has_children(module) and type(module).forward is not nn.Module.forward


def _units(
    model: nn.Module, shared: set[int], wanted: FilterFn, memory: str
) -> Iterator[tuple[nn.Module, Program]]:
    """Yield each module to fuse with its program, parents first; inlined children are not asked."""
    covered: set[int] = set()
    chains: Chains = {}
    for fqn, module in list(model.named_modules()):
        if id(module) in covered or not has_children(module):
            continue
        if not wanted(module, fqn):
            continue
        try:
            traced = trace(module, chains)
        except TraceError:
            continue
        matches = match(module, traced.graph, shared)
        if matches.groups:
            covered |= {id(module.get_submodule(name)) for name in traced.inlined}
            yield module, build(module, traced, matches, memory)


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of the modules that stand under several names."""
    counts = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return {i for i, count in counts.items() if count > 1}


def _any(module: nn.Module, fqn: str) -> bool:
    return True


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _check_model(verb: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{verb}: model must be an eager nn.Module, got {type(model).__name__}")
