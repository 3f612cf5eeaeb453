"""Several ops as one node of autograd: what they say of their gradients, walked without it.

A block of ResNet-50 is four ops. Each, as a node, is a good deal of Python around a kernel or two,
and between large kernels Python finds nothing of its own in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.ops import _direct

#: The slot of what needs no gradient.
NOBODY = -1
#: The place of None, behind all that backward will need.
NOTHING = -1


class Part:
    """What one op saved; stands in the place of autograd's ``ctx``."""

    def __init__(self, needs_input_grad: Sequence[bool], backward: Callable[..., Any]) -> None:
        self.needs_input_grad, self.backward = needs_input_grad, backward
        self.saved_tensors: Sequence[Tensor | None] = ()
        #: Places of what was saved among the node's saved tensors.
        self.saved: Sequence[int] = ()
        #: Slots of the gradients of its arguments and of its results.
        self.inputs: Sequence[int] = ()
        self.outputs: Sequence[int] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Hold tensors for the tape to take."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *results: Tensor) -> None:
        """Nothing to do: backward ignores such results' gradients, and nobody makes any."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing to do: a gradient that is not there is None."""

    def gradients(self, saved: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> Any:
        """Return the gradients of the arguments by those of the results."""
        # Another object, as two threads may run backward through one graph.
        part = Part.__new__(Part)
        part.__dict__.update(self.__dict__)
        part.saved_tensors = [saved[place] for place in self.saved]
        return self.backward(part, *given)


class Tape:
    """The ops of one node, in their order."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.parts: list[Part] = []
        #: What backward will need, each tensor once.
        self.saved: list[Tensor] = []
        self._places: dict[int, int] = {}
        #: Slots of those that need a gradient, by their ids.
        self._slots: dict[int, int] = {}
        #: No other tensor takes the id of one that is here.
        self._alive: list[Any] = [inputs]
        for slot, x in enumerate(inputs):
            if x.requires_grad:
                self._slots[id(x)] = slot
        self._next = len(inputs)

    def needs(self, x: Tensor) -> bool:
        """Return whether a gradient of ``x`` is wanted."""
        return id(x) in self._slots

    def slot(self, x: Tensor) -> int:
        """Return where the gradient of ``x`` goes."""
        return self._slots.get(id(x), NOBODY)

    def record(self, name: str, args: tuple[Any, ...], *, hands_on: bool = False) -> Any:
        """Run an op; remember how to differentiate it if one of its arguments needs it."""
        op = _direct.TAPED.get(name)
        if op is None:  # it writes statistics
            return _direct.RUN[name](*args)
        result = op.run(*args)
        if hands_on:
            result = (*result, args[0].detach())
        slots = self._slots
        inputs = [slots.get(id(a), NOBODY) for a in args]
        if max(inputs) > NOBODY:
            self._alive += (args, result)
            part = Part([slot > NOBODY for slot in inputs], op.backward)
            op.setup_context(part, args, result)
            part.saved = [self._keep(t) for t in part.saved_tensors]
            part.saved_tensors = ()
            part.inputs, part.outputs = inputs, range(self._next, self._next + len(result))
            self._next += len(result)
            # Of what an op gives only the first result, and x handed on, have gradients.
            slots[id(result[0])] = part.outputs[0]
            if hands_on:
                slots[id(result[-1])] = part.outputs[-1]
            self.parts.append(part)
        return result

    def place(self, t: Tensor) -> int | None:
        """Return where ``t`` is among what backward will need, None if it will not."""
        return self._places.get(id(t))

    def _keep(self, t: Tensor | None) -> int:
        if t is None:
            return NOTHING
        place = self._places.get(id(t))
        if place is None:
            place = self._places[id(t)] = len(self.saved)
            self.saved.append(t)
        return place


class Node(torch.autograd.Function):
    """Runs a function whose ops go on a tape."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
        """Return what ``run`` gives, a tensor that an op made of ``inputs``."""
        tape = Tape(inputs)
        with _direct.recording_on(tape):
            y = run()
        ctx.save_for_backward(*tape.saved)
        ctx.set_materialize_grads(False)
        ctx.parts, ctx.result, ctx.count = tape.parts, tape.slot(y), len(inputs)
        #: Where the first input and the result are among the saved tensors, if they are.
        ctx.place_of_x, ctx.place_of_y = tape.place(inputs[0]), tape.place(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Walk the tape from its end."""
        saved = [*ctx.saved_tensors, None]
        grads: dict[int, Tensor] = {} if grad is None else {ctx.result: grad}
        for part in reversed(ctx.parts):
            given = [grads.pop(slot, None) for slot in part.outputs]
            if all(g is None for g in given):
                continue
            for slot, found in zip(part.inputs, part.gradients(saved, given), strict=True):
                if slot != NOBODY and found is not None:
                    grads[slot] = grads[slot] + found if slot in grads else found
        return None, *(grads.get(slot) for slot in range(ctx.count))
