"""``python -m benchmarks``: what is done with measured results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import readme


def main(
    save_table: Annotated[
        Path,
        typer.Option(help="A README: its results are written anew from benchmarks/results/*.json."),
    ],
) -> None:
    """Write the README's results; measuring is done by `resnet-fused bench`."""
    readme.save(save_table)


typer.run(main)
