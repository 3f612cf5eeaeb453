"""Block outputs computed again in backward instead of kept: what ``memory="low"`` does.

A block's end, y = act(BN(z) + r), follows from what is kept anyway: the convolution's output z, the
batch's statistics, and r, which is the output of the block before or, behind a BatchNorm of its
own, of the projection's convolution. So autograd saves in y's place how to compute it. The first
reader in backward, the ReLU of a stage's last block, has the stage's outputs computed up to its
own, which live until their blocks' backward is done. Of a long stage every seventh is kept, where
the computing stops: for its 36 blocks ResNet-152 would else have as many outputs at once as if it
had kept them all.

Autograd is told by ``saved_tensors_hooks`` around each op that saves a block's output. What was
around them before, such as offloading or a measurement, sees all other tensors as ever.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fused.ops import _direct

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


#: How many outputs in a row, each computed from the one before, are not kept.
LONGEST = 6


class Kept:
    """A tensor saved for backward, by the hooks that were around when it was saved."""

    def __init__(self, tensor: Tensor, hooks: Hooks | None) -> None:
        self._hooks = hooks
        # Detached, it keeps no graph alive; the version counter stays the tensor's own.
        tensor = tensor.detach() if tensor.requires_grad else tensor
        self._packed: Any = tensor if hooks is None else hooks[0](tensor)
        self._version = tensor._version

    def value(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was written since. Autograd, which checks this, leaves it to hooks.
        """
        if self._hooks is not None:
            return self._hooks[1](self._packed)
        if self._packed._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(self._packed.shape)} is at version "
                f"{self._packed._version}, was saved at version {self._version}"
            )
        return self._packed


class Output:
    """A block's output, saved as the op and the arguments that compute it."""

    def __init__(
        self, op: Callable[..., tuple[Tensor, Tensor]], args: list[Any], hooks: Hooks | None
    ) -> None:
        self.hooks = hooks
        self._op, self._args = op, args
        self._y: Tensor | None = None
        #: How many outputs have to be computed for it, itself included, if none is.
        self.length: int = 1 + max((a.length for a in args if isinstance(a, Output)), default=0)

    def value(self) -> Tensor:
        """Return the output, computed at the first call with every one before it that it needs."""
        # A loop, as a stage may have more blocks than Python allows calls within calls.
        todo = [self]
        while before := todo[-1]._before():
            todo.append(before)
        for output in reversed(todo):
            output._compute()
        assert self._y is not None
        return self._y

    def _before(self) -> Output | None:
        """Return the output that has to be computed first."""
        if self._y is not None:
            return None
        return next((a for a in self._args if isinstance(a, Output) and a._y is None), None)

    def _compute(self) -> None:
        if self._y is None:
            with torch.no_grad():
                self._y, _ = self._op(*(a.value() if _is_saved(a) else a for a in self._args))
            # The block before may go as soon as its own readers are done.
            self._args = []


#: How the outputs that are alive were computed. Autograd alone owns that: a caller who keeps an
#: output beyond its backward keeps nothing else.
_outputs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def block_end(
    op: str, *args: Any, run: Callable[[], tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the op's results, the first of which nobody keeps but by how to compute it.

    Args:
        op: bn_act or dual_bn_act, as often as needed with the same result.
        args: its arguments; the 4-dimensional ones are kept, or block outputs themselves.
        run: what computes the results now, by default the op.
    """
    run = run or functools.partial(_direct.record, op, *args)
    if _current.saver is not None:
        return _current.saver.end(op, args, run)
    if not _applies() or not args[0].numel():
        return run()
    hooks = _around()
    output = _output(op, args, hooks, lambda t: _find(t, hooks))
    if output is None:
        return run()
    given = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]

    def pack(t: Tensor) -> Any:
        # Where there are no bits, the one map that is saved and was not given is the result.
        is_result = t.dim() == 4 and t.dtype != torch.uint8 and not any(_same(t, a) for a in given)
        return output if is_result else Kept(t, hooks)

    with saved_tensors_hooks(pack, _unpack):
        y, bits = run()
    given.clear()  # torch keeps `pack` with what it packed
    _outputs[y] = (weakref.ref(output), y._version)
    return y, bits


class _Saver:
    """What one node saves that is a whole block: its input and output as how to compute them."""

    def __init__(self, x: Tensor) -> None:
        self.hooks = _around()
        self._known = _find(x, self.hooks)
        self._output: Output | None = None
        self._x: Tensor | None = x
        self._y: Tensor | None = None

    def end(
        self, op: str, args: tuple[Any, ...], run: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return the results of the block's end, as :func:`block_end` does."""
        self._output = _output(op, args, self.hooks, self._origin)
        self._y, bits = run()
        return self._y, bits

    def _origin(self, t: Tensor) -> Output | None:
        return self._known if self._x is not None and _same(t, self._x) else None

    def pack(self, t: Tensor) -> Any:
        """Return what autograd is to keep in a tensor's place."""
        for tensor, output in ((self._x, self._known), (self._y, self._output)):
            if tensor is not None and output is not None and _same(t, tensor):
                return output
        return Kept(t, self.hooks)

    def exchange(self, node: Any) -> None:
        """Do the same to what ``node`` has saved already, which calls no hook for all the rest."""
        saved = node._raw_saved_tensors
        if self._known is not None and node.place_of_x is not None:
            known = self._known
            saved[node.place_of_x].register_hooks(lambda t: known, _unpack)
        if self._output is not None:
            output = self._output
            if node.place_of_y is None:  # the bits, which own it
                saved[-1].register_hooks(lambda t: _Owner(t, output), _unpack)
            else:
                saved[node.place_of_y].register_hooks(lambda t: output, _unpack)

    def done(self, y: Tensor) -> None:
        """Let go of tensors, of which torch would keep all that `pack` knows."""
        self._x = self._y = None
        if self._output is not None:
            _outputs[y] = (weakref.ref(self._output), y._version)


class _Owner(Kept):
    """A tensor that keeps an output alive with it."""

    def __init__(self, tensor: Tensor, output: Output) -> None:
        super().__init__(tensor, None)
        self._output = output


class _Current(threading.local):
    saver: _Saver | None = None


_current = _Current()


def as_one_node(x: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return ``run()``, a block of ``x`` as one node of `ops._tape`, which keeps neither map."""
    if not _applies():
        return run()
    _current.saver = saver = _Saver(x)
    around = saved_tensors_hooks(saver.pack, _unpack) if saver.hooks else contextlib.nullcontext()
    try:
        with around:
            y = run()
    finally:
        _current.saver = None
    if not saver.hooks:
        saver.exchange(y.grad_fn)
    saver.done(y)
    return y


@contextlib.contextmanager
def reading(x: Tensor) -> Iterator[None]:
    """Save ``x``, inside the block, as how to compute it, if it is a block's output."""
    output = _find(x, _around()) if _applies() else None
    if output is None:
        yield
        return
    known, hooks, read = output, output.hooks, [x]

    def pack(t: Tensor) -> Any:
        return known if _same(t, read[0]) else Kept(t, hooks)

    with saved_tensors_hooks(pack, _unpack):
        yield
    read.clear()  # torch keeps `pack` with what it packed


def rename(x: Tensor, again: Tensor) -> None:
    """Let ``again``, which is x to those who read it, be computed as x is, a block's output.

    What a node of several ops hands on stays in it.
    """
    if _current.saver is None and x in _outputs:
        _outputs[again] = _outputs[x]


def _unpack(saved: Kept | Output) -> Tensor:
    return saved.value()


def _applies() -> bool:
    """Return whether autograd saves anything, and takes hooks.

    torch.compile decides itself what to compute again.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]


def _around() -> Hooks | None:
    """Return the hooks that are around."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _output(
    op: str,
    args: Sequence[Any],
    hooks: Hooks | None,
    origin: Callable[[Tensor], Output | None],
) -> Output | None:
    """Return how the op's result is computed, or None if it is at the end of too long a row."""
    saved: list[Any] = [origin(a) if isinstance(a, Tensor) and a.dim() == 4 else None for a in args]
    if max((output.length for output in saved if output), default=0) == LONGEST:
        return None
    for i, a in enumerate(args):
        if saved[i] is None:
            saved[i] = _kept(a, hooks) if isinstance(a, Tensor) else a
    # Saved apart from what the op saves itself, as hooks may give each thing back only once.
    return Output(functools.partial(_direct.call, op), saved, hooks)


def _kept(tensor: Tensor, hooks: Hooks | None) -> Kept:
    # A parameter's memory may be let go between forward and backward, as FSDP does.
    return Kept(tensor.detach().clone() if isinstance(tensor, nn.Parameter) else tensor, hooks)


def _find(x: Tensor, hooks: Hooks | None) -> Output | None:
    """Return how to compute ``x``, a block's output as it was returned, or None.

    Under other hooks it is none: activation checkpointing, for one, runs what it surrounds again
    with an input whose origin is not known then.
    """
    entry = _outputs.get(x)
    if entry is None:
        return None
    reference, version = entry
    output: Output | None = reference()
    return output if output and version == x._version and output.hooks == hooks else None


def _same(t: Tensor, tensor: Tensor) -> bool:
    """Return whether ``t``, which autograd saves, is ``tensor`` or an alias of all of it."""
    if t.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
        return False
    return t.shape == tensor.shape and t.stride() == tensor.stride()


def _is_saved(value: Any) -> bool:
    return isinstance(value, Kept | Output)
