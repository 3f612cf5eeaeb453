"""A network learns scikit-learn's digits: what a test holds it to, and what the suite times."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training import autocast
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.photos import NEEDS_EXTRA

#: Height and width of the images as they come.
SIDE = 8
#: Images that nobody learns from.
TESTED = 360
RATE, DECAY, SMOOTHING = 0.01, 0.05, 0.1


class Digits(NamedTuple):
    """1437 images to learn from and 360 to be tested on, with their classes."""

    learnt: Tensor
    labels: Tensor
    tested: Tensor
    truth: Tensor

    def on(self, device: str, layout: torch.memory_format) -> Digits:
        """Return the same on a device, images in a layout."""
        learnt, tested = (
            images.to(device).contiguous(memory_format=layout)
            for images in (self.learnt, self.tested)
        )
        return Digits(learnt, self.labels.to(device), tested, self.truth.to(device))


def load(side: int = SIDE) -> Digits:
    """Return the digits, normalised, as images of three equal channels, enlarged to a size.

    Raises:
        UsageError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the digits: " + NEEDS_EXTRA.format("scikit-learn")) from None
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    if side != SIDE:
        x = F.interpolate(x, size=(side, side), mode="bilinear")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    tested, learnt = order[:TESTED], order[TESTED:]
    x = (x - x[learnt].mean()) / x[learnt].std()
    y = torch.tensor(data.target)
    images = Digits(x[learnt], y[learnt], x[tested], y[tested])
    return images.on("cpu", torch.channels_last)


class Learner:
    """A network, its optimizer and its data; a call is an epoch, as a person would write it.

    What is left of the images when batches are cut is another part in every epoch, as each has an
    order of its own: the same for all learners of a seed.
    """

    def __init__(
        self,
        model: nn.Module,
        digits: Digits,
        *,
        batch: int,
        epochs: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model,
    ) -> None:
        self._model, self._digits, self._batch, self._dtype = model, digits, batch, dtype
        self._device = digits.learnt.device
        self._forward = prepare(model)
        self._left = epochs * self.steps
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, RATE, total_steps=self._left, pct_start=0.2
        )
        scaled = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=scaled)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def steps(self) -> int:
        """Return the batches of an epoch."""
        return len(self._digits.learnt) // self._batch

    def __call__(self) -> None:
        """Learn from every image but the few that fill no batch."""
        order = torch.randperm(len(self._digits.learnt), generator=self._generator)
        for chosen in order.to(self._device).split(self._batch)[: self.steps]:
            self._step(self._digits.learnt[chosen], self._digits.labels[chosen])

    def _step(self, x: Tensor, y: Tensor) -> None:
        self._optimizer.zero_grad()
        with autocast(self._device, self._dtype):
            loss = F.cross_entropy(self._forward(x), y, label_smoothing=SMOOTHING)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._left -= 1
        if self._left > 0:  # past the epochs that were planned the last rate stays
            self._schedule.step()

    def accuracy(self) -> float:
        """Return the share of the held-out images that are taken for what they are."""
        with torch.no_grad(), autocast(self._device, self._dtype):
            found = self._model.eval()(self._digits.tested).argmax(1)
        self._model.train()
        return float((found == self._digits.truth).double().mean())
