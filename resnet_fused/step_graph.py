"""The verb `capture_step`: a whole training step as one CUDA graph."""

from __future__ import annotations

import contextlib
import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from resnet_fused.backends._requested import becoming_a_graph
from resnet_fused.engine.graph import Watch, no_garbage_collection
from resnet_fused.ops import _casts
from resnet_fused.ops._casts import Casts

#: A training step: from a batch to whatever it returns, its loss say.
Step = Callable[..., Any]
#: How torch's warning begins that backward writes gradients on another stream than the step's.
_ELSEWHERE = "The AccumulateGrad node's stream does not match"


def capture_step(
    step: Step,
    *examples: Tensor,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    warmup: int = 3,
) -> CapturedStep:
    """Record a training step as one CUDA graph and return it as a call.

    ``step`` runs once to be examined, ``warmup`` times, and once more to be recorded, and leaves no
    trace: parameters, buffers (running statistics, ``num_batches_tracked``), the optimizer's state
    and the random generators are as before. State that the optimizer made meanwhile is zero, which
    for SGD without dampening and for the Adam family is the same as none; another optimizer takes a
    first step before it is captured. Gradients mean nothing until the first call::

        def step(x, target):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            return loss

        step = rf.capture_step(step, x, target, model=model, optimizer=optimizer)
        for x, target in batches:
            loss = step(x, target)

    In a graph the large convolutions of a fused model train fused in bfloat16, even where outside
    of one they would by torch's kernels. Recorded is what ``step`` does now: a learning rate that
    is a number, ``model.train()`` and ``requires_grad`` stay as they are. An optimizer that counts
    its steps has to do so on the GPU (``capturable=True``); a learning rate that is a tensor can be
    filled with another. ``GradScaler.step`` reads a value back, which no graph can: capture forward
    and backward alone.
    What an earlier step returned with its history, a loss say, holds nodes of autograd's on that
    step's stream: let go of it first. ``DistributedDataParallel`` always holds some: it wants to be
    made under a side stream, 11 warm-up steps, and
    ``torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)`` before the capture.

    Args:
        step: takes as many tensors as there are examples; returns tensors in any nesting.
        *examples: CUDA tensors of one device, in the shapes and dtypes of all later calls.
        model: what ``step`` trains.
        optimizer: what ``step`` updates it with; None where it computes gradients only.
        warmup: how often ``step`` runs before it is recorded, beside the examination.

    Raises:
        ValueError: there is no example, one is not on a CUDA device or not on the first one's, or
            ``warmup`` is below 1.
        TypeError: an example is not a tensor.
        RuntimeError: the step does what no graph can repeat, by name, or CUDA cannot record it. All
            is then as before, gradients included.
    """
    device = _device(examples, warmup)
    state = _State(model, optimizer)
    inputs = [example.detach().clone() for example in examples]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), becoming_a_graph(), _casts.together() as casts:

        def casting_first(*given: Tensor) -> Any:
            casts.begin()
            return step(*given)

        try:
            stream = torch.cuda.Stream()
            _warm_up(casting_first, inputs, warmup, stream, device)
            state.put_back()
            outputs = _record(graph, casting_first, inputs, stream)
        except BaseException:
            state.put_back()
            raise
    # A recording changes no parameter: what the steps before it derived is out of date.
    torch.autograd.graph.increment_version(state.tensors)
    return CapturedStep(graph, inputs, outputs, state.tensors, casts)


class CapturedStep:
    """A recorded step, made by `capture_step`. For one thread and one stream at a time."""

    def __init__(
        self,
        graph: Any,
        inputs: Sequence[Tensor],
        outputs: Any,
        changed: Sequence[Tensor],
        casts: Casts,
    ) -> None:
        self._graph, self._inputs, self._outputs = graph, inputs, outputs
        self._changed = changed
        self._casts = casts  # whose memory the graph writes

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the step; what it returns is the caller's own, without autograd history.

        Raises:
            ValueError: the inputs are not as many as the examples were, or one has another shape or
                dtype.
        """
        self._check(inputs)
        with torch.cuda.device(self._inputs[0].device):
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
            # No op told torch that they changed: what was derived from them is out of date.
            torch.autograd.graph.increment_version(self._changed)
            return pytree.tree_map_only(Tensor, torch.clone, self._outputs)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._inputs):
            raise ValueError(
                f"step: got {len(inputs)} inputs, was captured with {len(self._inputs)}"
            )
        for i, (own, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"step: input {i} is {tuple(given.shape)} in {given.dtype}, was captured with "
                    f"{tuple(own.shape)} in {own.dtype}: capture another step for it"
                )


def _device(examples: Sequence[Tensor], warmup: int) -> torch.device:
    """Return the examples' device, or raise what `capture_step` says."""
    if warmup < 1:
        raise ValueError(f"warmup: must be at least 1, got {warmup}")
    if not examples:
        raise ValueError("examples: needs at least one tensor that the step takes")
    for i, example in enumerate(examples):
        if not isinstance(example, Tensor):
            raise TypeError(f"examples: all must be tensors, {i} is {type(example).__name__}")
        if not example.is_cuda:
            raise ValueError(f"examples: must be on a CUDA device, {i} is on {example.device}")
        if example.device != examples[0].device:
            raise ValueError(
                f"examples: must be on one device, {i} is on {example.device}, "
                f"0 on {examples[0].device}"
            )
    return examples[0].device


def _warm_up(
    step: Step, inputs: Sequence[Tensor], times: int, stream: Any, device: torch.device
) -> None:
    gc.collect()  # a loss that only a reference cycle keeps counts as held
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.random.fork_rng([device]), torch.cuda.stream(stream):
        with Watch(device, random=True) as watch, _of_one_stream():
            step(*inputs)
        # Found here, as a recording that fails leaves torch's allocator in the middle of it.
        if watch.reason:
            raise RuntimeError(f"step: a CUDA graph cannot repeat it: {watch.reason}")
        for _ in range(times):
            step(*inputs)
    current.wait_stream(stream)


@contextlib.contextmanager
def _of_one_stream() -> Iterator[None]:
    """Raise where backward would leave the stream of the recording, which CUDA would then end."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=_ELSEWHERE)
            yield
    except UserWarning as warning:
        if not str(warning).startswith(_ELSEWHERE):
            raise
        traceback.clear_frames(warning.__traceback__)  # they hold the loss of this step
        raise RuntimeError(
            "step: a CUDA graph cannot repeat it: the model's parameters are held, on another "
            "stream, by a result of an earlier step, such as its loss; let go of it (`del loss`) "
            "or detach it before; for DistributedDataParallel see help(rf.capture_step)"
        ) from None
    finally:
        torch.set_warn_always(before)


def _record(graph: Any, step: Step, inputs: Sequence[Tensor], stream: Any) -> Any:
    # Other threads, one that pins memory say, may go on meanwhile. The stream is entered by hand
    # too, as a recording that fails does not return to the old one.
    recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with no_garbage_collection(), torch.cuda.stream(stream), recording:
        return pytree.tree_map_only(Tensor, Tensor.detach, step(*inputs))


class _State:
    """What a step changes, as it was."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        #: Parameters and buffers.
        self.tensors = [*model.parameters(), *model.buffers()]
        self._optimizer = optimizer
        self._gradients = [(p, p.grad) for p in model.parameters()]
        known = [g for _, g in self._gradients if g is not None]
        self._copies = [(t, t.detach().clone()) for t in (*self.tensors, *known, *self._made())]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write all of it back in place; an optimizer's new state becomes zero."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        known = {id(tensor) for tensor, _ in self._copies}
        for tensor in self._made():
            if id(tensor) not in known:
                tensor.zero_()

    def _made(self) -> list[Tensor]:
        """Return the tensors of the optimizer's state."""
        states = self._optimizer.state.values() if self._optimizer else ()
        return [t for state in states for t in state.values() if isinstance(t, Tensor)]
