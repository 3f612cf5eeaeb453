"""The options of the commands that measure, with what each is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Models: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="Models; repeat or separate with commas.",
                 show_default="resnet34,resnet50,resnet152"),
]  # fmt: skip
Batches: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--batch", "-b", show_default="1,8; 1,256 on a GPU",
                 help="Batch sizes. One that has no room is halved until it has; training leaves "
                 "1 out."),
]  # fmt: skip
Images: TypeAlias = Annotated[int, typer.Option("--batch", "-b", help="Images in a map.")]
Dtypes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--dtype", "-d", help="fp32, tf32, bf16, fp16. fp32 is float32 proper; in "
                 "training 16 bits come by autocast.",
                 show_default="fp32, and bf16 where native; bf16 on a GPU"),
]  # fmt: skip
Device: TypeAlias = Annotated[str, typer.Option(help="cpu or cuda.")]
Peers: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="all, none, or names: those not installed are then refused.",
                 show_default="those installed that are quick to build"),
]  # fmt: skip
Rounds: TypeAlias = Annotated[
    int | None, typer.Option(help="Rounds per case.", show_default="as time allows")
]
Seconds: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Timing per case and contender.", show_default="0.5 to 5, by level"),
]
Caches: TypeAlias = Annotated[
    str | None,
    typer.Option("--cache", help="What a call finds in the caches. fed: its input, just written, "
                 "and the code, but no weights, as a layer in a model does. cold: nothing. hot: "
                 "what the call before left. Cold starts have no choice, training not fed.",
                 show_default="fed for ops and blocks, else hot"),
]  # fmt: skip
Graphs: TypeAlias = Annotated[
    bool | None,
    typer.Option("--graphs/--no-graphs", show_default="on a GPU",
                 help="All contenders as CUDA graphs, or none; epochs and fp16's training never."),
]  # fmt: skip
ImageSize: TypeAlias = Annotated[int, typer.Option(help="Height and width of the images.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(help="CPU threads, for all.", show_default="torch's")
]
Backend: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The package's backend to use.", show_default="RESNET_FUSED_BACKEND, or auto"
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option(help="Seed of weights, crops and inputs.")]
Photographs: TypeAlias = Annotated[
    Path | None, typer.Option("--images", help="Your own photographs instead of two samples.")
]
Limit: TypeAlias = Annotated[
    float,
    typer.Option(help="Seconds after which a case, or a turn of cold starts, counts as hung."),
]
Minutes: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Begin no case after so many minutes; --resume does the rest.",
                 show_default="no end"),
]  # fmt: skip
Out: TypeAlias = Annotated[
    Path | None, typer.Option(help="Where the results go.", show_default="out/COMMAND")
]
Resume: TypeAlias = Annotated[
    bool | None,
    typer.Option("--resume/--fresh", help="Go on with the run in --out, or begin anew."),
]
