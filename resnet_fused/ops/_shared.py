"""Statistics of a batch that is spread over several processes: SyncBatchNorm's sums.

Forward, the processes' counts, means and variances become the joined batch's; backward, each
needs its two sums. Either is one all-reduce, and empty or uneven parts are right, as
the counts are summed too. Which processes share a batch is known by its mean, the tensor that every
op of BatchNorm takes, so that no op needs an argument for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Shared(NamedTuple):
    """The batch of which a process has a part."""

    #: A ``torch.distributed.ProcessGroup``.
    group: object
    #: Values per channel of the joined batch; it stays on the device, which need not wait.
    values: Tensor

    def means(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Return each sum over the joined batch, divided by its count."""
        joined = torch.cat(sums)
        torch.distributed.all_reduce(joined, group=self.group)
        return (joined / self.values.to(joined.dtype)).split([len(s) for s in sums])


#: By the mean of a joined batch.
_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shared(mean: Tensor) -> Shared | None:
    """Return of which joined batch ``mean`` is the mean, or None if this process has all of it."""
    # torch.compile cannot trace the look-up, and never gets a joined batch.
    return None if torch.compiler.is_compiling() or not _shared else _shared.get(mean)


def join(mean: Tensor, var: Tensor, count: int, group: object) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the joined batch.

    Sums are float64: subtracting the squared mean costs no more than the float32 of the parts.

    Args:
        mean: of this process's part; not read if that is empty.
        var: likewise.
        count: values per channel of this process's part.
        group: the ``torch.distributed.ProcessGroup`` that shares the batch.
    """
    part = torch.zeros(1 + 2 * len(mean), dtype=torch.float64, device=mean.device)
    if count:
        wide = mean.double()
        part[0] = count
        part[1:] = count * torch.cat([wide, var.double() + wide * wide])
    torch.distributed.all_reduce(part, group=group)
    means, squares = (part[1:] / part[0]).split(len(mean))
    joined = means.to(mean.dtype)
    # A max that keeps NaN.
    variance = torch.clamp(squares - means * means, min=0).to(var.dtype)
    _shared[joined] = Shared(group, part[0])
    return joined, variance
