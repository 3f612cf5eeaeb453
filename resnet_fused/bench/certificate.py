"""What `resnet-fused verify` does: a calibrated network, and its certificate of errors."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from resnet_fused.bench import networks, options, photos
from resnet_fused.bench.options import UsageError
from resnet_fused.models import create_model
from resnet_fused.verify import VerifyReport, verify


def run(
    model: str, *, dtype: str, batch: int, seed: int, images: Path | None, console: Console
) -> VerifyReport:
    """Check what was asked for and return the report, with a bar on a terminal meanwhile.

    Raises `UsageError` for what cannot be done.
    """
    (name,) = options.usable_models("MODEL", [model])
    kind = options.DTYPES[options.dtype_name("--dtype", dtype)]
    size = options.positive("--batch", batch)
    number = options.usable_seed("--seed", seed)
    backend = options.usable_backend("--backend", None)
    loaded, _ = photos.load(images, size)
    crops = photos.batch(loaded, size, seed=number)
    torch.manual_seed(number)
    network = create_model(name)
    hidden = not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("calibrating", total=None)
        networks.calibrate(network, crops)

        def on_step(done: int, of_all: int) -> None:
            progress.update(task, description="float64", completed=done, total=of_all)

        try:
            return verify(network.to(kind), crops.to(kind), on_step=on_step)
        except RuntimeError as error:
            if backend == "auto":
                raise
            # A backend that was asked for says what it does not run.
            raise UsageError(f"{options.BACKEND}: {error}") from None
