"""A training step, fused beside eager, in interleaved rounds: ``python -m benchmarks.training``.

Fused twice: as by default, and with ``memory="low"``, which computes block outputs again.

Both train the same network by SGD with momentum; bfloat16 is under autocast. Before anything is
timed, both gradients are held against float64: the fused one may turn from it twice as far as
eager's. (Gradients of a deep network with random weights turn far from it in bfloat16, either way.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import env
from resnet_fused.bench import options
from resnet_fused.bench.timing import Rounds, interleave, paired_ratio, spread
from resnet_fused.convert import MEMORY
from resnet_fused.testing import gradient_metrics

#: Images that the gradients are compared on: float64 is slow.
CHECKED = 2


class Trainer:
    """One network with its optimizer; a call is a step."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> None:
        self.model, self._x, self._target, self._dtype = model, x, target, dtype
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        """Run forward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return F.cross_entropy(self.model(self._x), self._target)

    def __call__(self) -> None:
        """Run forward, backward and update."""
        self._optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self._optimizer.step()

    def gradient(self) -> Tensor:
        """Return the gradient of all parameters as one vector, in float64."""
        self._optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.cat([grad.flatten().double() for grad in grads])

    def saved_mib(self) -> float:
        """Return MiB of unique storages kept for backward, parameters and buffers left out."""
        own = {
            t.untyped_storage().data_ptr()
            for t in (*self.model.parameters(), *self.model.buffers(), self._x)
        }
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()
        kept = sum(nbytes for address, nbytes in found.items() if address not in own)
        del loss
        return kept / 2**20


def measure(name: str, dtype: torch.dtype, batch: int, rounds: int) -> list[str]:
    """Return a row of the table: speeds, paired ratio, memory kept."""
    torch.manual_seed(0)
    model = rf.models.create_model(name).to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,))
    kind_of_number = str(dtype).removeprefix("torch.")
    networks = {"eager": model, **{kind: rf.fuse(model, memory=kind) for kind in MEMORY}}
    turns = _turns(networks, x[:CHECKED], target[:CHECKED], dtype)
    for kind in MEMORY:
        if turns[kind] > 2 * turns["eager"] + 1e-3:
            return [name, kind_of_number, "WRONG", f"{kind} turned {turns[kind]:.1e}"]
    runs = {kind: Trainer(m, x, target, dtype) for kind, m in networks.items()}
    saved = {kind: run.saved_mib() for kind, run in runs.items()}
    calls: dict[str, Callable[[], object]] = dict(runs)
    seconds = interleave(calls, Rounds(least=rounds, most=rounds))
    row = [name, kind_of_number]
    row += [f"{spread([batch / s for s in seconds[kind]]).median:.2f}" for kind in runs]
    for kind in MEMORY:
        ratio = paired_ratio(seconds["eager"], seconds[kind])
        row += [f"{ratio.median:.2f}x ({ratio.p20:.2f}-{ratio.p80:.2f})"]
        row += [f"{saved[kind] / saved['eager']:.2f}"]
    return row


def _turns(
    networks: dict[str, nn.Module], x: Tensor, target: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Return 1 - cosine between each network's gradient and float64's."""
    oracle = copy.deepcopy(networks["eager"]).double()
    exact = Trainer(oracle, x.double(), target, torch.float64).gradient()
    return {
        kind: 1
        - gradient_metrics(Trainer(copy.deepcopy(m), x, target, dtype).gradient(), exact).cosine
        for kind, m in networks.items()
    }


def main(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="Models.")] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds per row.")] = 7,
) -> None:
    """Time training steps, fused by default and with memory="low" beside eager channels_last."""
    console = Console(width=130)
    table = Table("model", "dtype", "eager img/s", "fused img/s", "low img/s")
    for kind in MEMORY:
        table.add_column(f"{kind}: ratio (p20-p80)")
        table.add_column("kept")
    for name in options.usable_models("--model", options.split(model)) or options.MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            with console.status(f"{name} {dtype}"):
                table.add_row(*measure(name, dtype, batch, rounds))
    console.print(table)
    found = env.collect()
    console.print(
        f"{found['cpu']}, {torch.get_num_threads()} threads, torch {found['torch']}, "
        f"commit {found['commit']}, batch {batch}; kept: bytes saved for backward, fused over eager"
    )


if __name__ == "__main__":
    typer.run(main)
