"""A training step: forward, backward and update, and what it keeps in memory.

All train the same network by SGD with momentum; bfloat16 and float16 are under autocast, float16
with a scaled loss. Before anything is timed, each gradient is held against float64: it may turn
from it twice as far as eager's. (Gradients of a deep network with random weights turn far from it
in 16 bits, in any framework.)

On a CPU each trains in a process of its own, and they take turns step by step. On a GPU the step of
each is one CUDA graph, as the other levels' calls are, but in float16, whose scaler reads from the
GPU whether to take it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused as rf
from benchmarks.apart import Apart
from benchmarks.graphs import can_capture
from resnet_fused.backends._requested import becoming_a_graph
from resnet_fused.bench import measure, memory
from resnet_fused.bench.accuracy import check_batch
from resnet_fused.bench.contenders import FUSED, FUSED_LOW, REFERENCE, Setup
from resnet_fused.bench.networks import CHECKED, Network
from resnet_fused.bench.progress import Watch
from resnet_fused.bench.results import OK, Case, Row
from resnet_fused.testing import gradient_metrics

#: 1 - cosine that is allowed where eager's own is next to none.
TURN_FLOOR = 1e-3
#: From GradScaler's first factor, 2^16, down to 1.
HALVINGS = 17

#: Makes ready to train a network that is the caller's own, so that its parameters stay the same.
Prepare = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


OWN: Mapping[str, Prepare] = {
    REFERENCE: _as_it_is,
    FUSED: functools.partial(rf.fuse, inplace=True),
    FUSED_LOW: functools.partial(rf.fuse, inplace=True, memory="low"),
}
PEERS: Mapping[str, Prepare] = {
    "inductor-default": functools.partial(torch.compile, dynamic=False),
    "inductor-max-autotune": functools.partial(
        torch.compile, dynamic=False, mode="max-autotune-no-cudagraphs"
    ),
    "eager-nchw": _as_it_is,  # in its layout by `layout_of`
}


def contenders(peers: Sequence[str]) -> dict[str, Prepare]:
    """Return who trains, the reference first; of the peers, those that are not for inference."""
    return {**OWN, **{name: PEERS[name] for name in peers if name in PEERS}}


def layout_of(name: str) -> torch.memory_format:
    """Return the layout that a contender trains in."""
    return torch.contiguous_format if name == "eager-nchw" else torch.channels_last


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the mode in which float32 parameters train in a dtype."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if low else torch.bfloat16, enabled=low)


class Trainer:
    """One network with its optimizer; a call is a step."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        dtype: torch.dtype,
        prepare: Prepare = OWN[REFERENCE],
    ) -> None:
        self.model, self._dtype = model, dtype
        self._forward = prepare(model)
        self._x, self._target = x, target
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        scaled = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(x.device.type, enabled=scaled)
        self._run: Callable[[Tensor], object] = self._step

    def capture(self) -> None:
        """Have a call launch the step as one CUDA graph."""
        self._run = rf.capture_step(
            self._step, self._target, model=self.model, optimizer=self._optimizer
        )

    def loss(self) -> Tensor:
        """Run forward."""
        with autocast(self._x.device, self._dtype):
            return F.cross_entropy(self._forward(self._x), self._target)

    def __call__(self) -> None:
        """Run forward, backward and update."""
        self._run(self._target)

    def _step(self, _: Tensor) -> None:
        # The tensors are always the same: a graph has nothing to copy.
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(self.loss()).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def gradient(self) -> Tensor:
        """Return the gradient of all parameters as one vector, in float64.

        Where it overflows in float16 the scaler halves its factor, and it is computed again.
        """
        for _ in range(HALVINGS if self._scaler.is_enabled() else 1):
            self._optimizer.zero_grad(set_to_none=True)
            self._scaler.scale(self.loss()).backward()
            self._scaler.unscale_(self._optimizer)
            self._scaler.update()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            gradient = torch.cat([grad.flatten().double() for grad in grads]).cpu()
            if gradient.isfinite().all():
                break
        return gradient

    def saved_mib(self) -> float:
        """Return MiB of unique storages kept for backward, parameters and buffers left out."""
        own = {
            t.untyped_storage().data_ptr()
            for t in (*self.model.parameters(), *self.model.buffers(), self._x)
        }
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()  # an op that kept its own output would keep itself, and all before it

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        kept = sum(nbytes for address, nbytes in found.items() if address not in own)
        del loss
        return kept / 2**20


def run_case(
    network: Network, case: Case, setup: Setup, method: measure.Method, watch: Watch
) -> list[Row]:
    """Return a row per contender: images a second, memory at its highest, bytes kept."""
    eager_turn, exact = 0.0, exact_gradient(network, case.batch)

    def entered(name: str, prepare: Prepare) -> tuple[Row, Callable[[], None]]:
        nonlocal eager_turn
        step: Callable[[], None]
        asked = (name, prepare, network, case, setup, exact, eager_turn)
        if setup.device == "cpu":
            apart = Apart()
            processes.callback(apart.close)
            row, step = apart.enter(enter, *asked), apart
        else:
            row, step = enter(*asked)
        if name == REFERENCE:
            eager_turn = row.error or 0.0
        return row, step

    with measure.precision(case.dtype), contextlib.ExitStack() as processes:
        return measure.run_entered(
            case, method, entered, functools.partial(_row, network, case), watch
        )


def _row(network: Network, case: Case, name: str) -> Row:
    # Backward is two convolutions for each one of forward: by its input and by its weight.
    return Row(case, name, OK, 3 * network.macs / 1e9, network.params / 1e6)


def enter(
    name: str,
    prepare: Prepare,
    network: Network,
    case: Case,
    setup: Setup,
    exact: Tensor,
    eager_turn: float,
) -> tuple[Row, Trainer]:
    """Check the gradient, then take a step for its memory.

    What is to be captured runs the graph's kernels here already.
    """
    captured = setup.device == "cuda" and setup.graphs and can_capture(case)
    meter = memory.meter_for(setup.device)
    before = meter.now()
    with becoming_a_graph() if captured else contextlib.nullcontext():
        trainer = _trainer(name, prepare, network.model, setup, setup.example)
        trainer()
        meter.restart()
        trainer()
        peak, saved = memory.growth_mib(before, meter.peak()), trainer.saved_mib()
        check = check_batch(network.checked, case.batch)
        checked = _trainer(name, prepare, network.model, setup, check)
        turn = 1 - gradient_metrics(checked.gradient(), exact).cosine
    if captured:
        trainer.capture()
    row = replace(_row(network, case, name), peak_mib=peak, saved_mib=saved)
    own = turn if name == REFERENCE else eager_turn
    return measure.judged(row, turn, 2 * own + TURN_FLOOR), trainer


def _trainer(
    name: str, prepare: Prepare, model: nn.Module, setup: Setup, images: Tensor
) -> Trainer:
    # TF32 is a precision of float32 and set by `precision`; 16 bits come by autocast.
    layout = layout_of(name)
    twin = copy.deepcopy(model).to(device=setup.device, memory_format=layout).train()  # type: ignore[call-overload]
    x = images.to(setup.device).contiguous(memory_format=layout)
    return Trainer(twin, x, _targets(len(images)).to(setup.device), setup.dtype, prepare)


def _targets(size: int) -> Tensor:
    """Return a class for each image, the same for images that a check repeats."""
    return check_batch(torch.tensor([2, 7]), size)


def exact_gradient(network: Network, batch: int) -> Tensor:
    """Return the float64 gradient on the images whose answers are known, repeated to `batch`.

    A batch that repeats them evenly has the same statistics and the same gradient as they alone.
    """
    return _exact(network, CHECKED if batch % CHECKED == 0 else batch)


@functools.lru_cache(maxsize=1)
def _exact(network: Network, size: int) -> Tensor:
    twin = copy.deepcopy(network.model).cpu().double().train()
    x = check_batch(network.checked, size).double()
    return Trainer(twin, x, _targets(size), torch.float64).gradient()
