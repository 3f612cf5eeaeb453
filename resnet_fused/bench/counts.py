"""What the command `flops` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from resnet_fused.bench import options
from resnet_fused.flops import count, format_paper_table
from resnet_fused.models import create_model


def lines(names: Sequence[str], *, input_size: str, stride_in: str, layers: bool) -> Iterator[str]:
    """Yield the paper's table, or each model's totals and, if asked for, its layers.

    Raises:
        UsageError: an option's value, or a model that does not take it.
    """
    size = options.input_size("--input-size", input_size)
    options.one_of("--stride-in", stride_in, ("1x1", "3x3"))
    if not names:
        yield format_paper_table()
    for name in names:
        try:
            with torch.device("meta"):
                model = create_model(name, stride_in=stride_in)
            report = count(model, size)
        except ValueError as error:
            # A model without that option, or an image too small for it: the message says so.
            raise options.UsageError(str(error)) from error
        yield f"{name}: {report.macs / 1e9:.3f} GMACs, {report.params / 1e6:.2f} M parameters"
        if layers:
            yield f"{report}\n"
