"""Statistics of a batch that is spread over several processes: SyncBatchNorm's.

Forward, the processes' counts, means and variances are gathered and merged to the joined batch's;
backward, its two sums are reduced. Either is one collective, and empty or uneven parts are right,
as the counts are gathered too. Which processes share a batch is known by its mean, the tensor that
every op of BatchNorm takes, so that no op needs an argument for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


def join(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the joined batch, the same bits in every process.

    Parts are merged by their distances from the joined mean (Chan, Golub and LeVeque 1983): squares
    of the means themselves would leave nothing of a variance that is far smaller.

    Args:
        mean: of this process's part; not read if that is empty.
        var: likewise.
        count: values per channel of this process's part.
        group: the ``torch.distributed.ProcessGroup`` that shares the batch.
    """
    part = torch.zeros(1 + 2 * len(mean), dtype=torch.float64, device=mean.device)
    if count:
        part[0] = count
        part[1:] = torch.cat([mean, var])
    parts = part.new_empty(group.size(), len(part))
    torch.distributed.all_gather(list(parts), part, group=group)
    counts, means, variances = parts.split([1, len(mean), len(mean)], dim=1)
    total = counts.sum()
    joined = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - joined).square())).sum(0) / total
    joined = joined.to(mean.dtype)
    _shared[joined] = Shared(group, total)
    return joined, variance.to(var.dtype)
