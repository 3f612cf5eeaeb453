"""``python -m benchmarks``: from one op to an epoch, against every peer and the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import asked, begin, bn, convolutions, digits, documents, epoch, report, suite
from benchmarks.begin import PROGRAM
from benchmarks.suite import Suite
from resnet_fused.backends import cpu
from resnet_fused.bench import options, photos, results, terminal
from resnet_fused.bench.options import Settings, UsageError
from resnet_fused.bench.results import (
    BLOCK,
    COLD,
    CONVOLUTION,
    EPOCH,
    INFERENCE,
    OP,
    PASS,
    TRAINING,
)

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure ResNets from one op to an epoch of training, on a CPU or a GPU.\n\n"
    "Every contender of a case runs in the same interleaved rounds and is held against float64 "
    "first. A case that crashes, hangs or runs out of memory is recorded as such, and the run "
    "goes on; an interrupted one goes on with --resume.\n\n"
    "A run writes suite.json (the record: every round, and the conditions), .csv, .md, .html and "
    "pictures into --out. A record can be compared, shown again, and kept for the documents.\n\n"
    "Exit codes: 0 all right; 1 a wrong answer, a failure, or a regression past a threshold; "
    "2 cannot be done as asked; 130 interrupted.",
    epilog="[bold]Examples[/bold]\n\n"
    "python -m benchmarks ops -m resnet50 -b 8  [dim]# which layer loses most[/dim]\n\n"
    "python -m benchmarks all --device cuda  [dim]# the default suite: ten minutes[/dim]\n\n"
    "python -m benchmarks models --device cuda -d tf32,bf16 -b 1,32,256\n\n"
    "python -m benchmarks training --peers inductor-default --minutes 20\n\n"
    "python -m benchmarks training --resume  [dim]# the rest of it[/dim]\n\n"
    "python -m benchmarks compare old/suite.json new/suite.json --threshold 0.05\n\n"
    "python -m benchmarks keep out/training/suite.json cpu-zen5-training\n\n"
    "python -m benchmarks --save-table README.md --save-table benchmarks/RESULTS.md",
)


@app.callback(invoke_without_command=True)
def _root(
    save_table: Annotated[
        list[Path] | None,
        typer.Option(
            help="A document: its marked results are written anew from benchmarks/results/*.json."
        ),
    ] = None,
) -> None:
    if save_table:
        with terminal.one_line_errors(PROGRAM):
            for document in save_table:
                documents.save(document)
        raise typer.Exit


def _measuring(*levels: str) -> Callable[..., None]:
    """Return a command that measures these levels."""

    def command(
        context: typer.Context,
        model: asked.Models = None,
        batch: asked.Batches = None,
        dtype: asked.Dtypes = None,
        device: asked.Device = "cpu",
        peers: asked.Peers = None,
        rounds: asked.Rounds = None,
        seconds: asked.Seconds = None,
        cache: asked.Caches = None,
        graphs: asked.Graphs = None,
        image_size: asked.ImageSize = 224,
        threads: asked.Threads = None,
        backend: asked.Backend = None,
        seed: asked.Seed = 0,
        images: asked.Photographs = None,
        limit: asked.Limit = 900.0,
        minutes: asked.Minutes = None,
        out: asked.Out = None,
        resume: asked.Resume = None,
    ) -> None:
        with terminal.one_line_errors(PROGRAM):
            usual = suite.usual(levels, options.usable_device("--device", device))
            settings = options.checked(
                models=model or usual.models, batches=batch or map(str, usual.batches or ()),
                dtypes=dtype or usual.dtypes, threads=threads, device=device, backend=backend,
                rounds=rounds, seed=seed, images=images, peers=None,
                out=out or Path("out") / str(context.info_name),
            )  # fmt: skip
            if set(levels) - {OP, BLOCK}:  # before the run, not in its first case
                photos.load(images, 1)
            by_level, absent = suite.peers_by_level(
                "--peers", options.split("--peers", peers), settings.device, usual
            )
            wanted = Suite(
                settings=settings,
                levels=usual.levels,
                peers=by_level,
                image_size=options.positive("--image-size", image_size, least=32),
                caches=begin.caches(cache, usual.levels),
                graphs=begin.graphs(graphs, settings.device),
                seconds=begin.seconds(seconds, settings.device),
                limit=begin.above_zero("--limit", limit),
                budget=begin.budget(minutes),
                layer_batches=None if batch else usual.layer_batches,
            )
            begin.run(wanted, resume, {"absent": absent})

    return command


for _name, _levels, _help in (
    ("ops", (OP, INFERENCE), "Every distinct op of the models (convolution, BatchNorm, add and "
     "ReLU as one), and the models that they add up to.\n\nThe first table to read is the time "
     "lost by layer: seconds beyond what the device's measured peaks allow, times how often the "
     "model runs the layer. It names the next kernel to write."),
    ("blocks", (BLOCK,), "Every distinct residual block of the models.\n\nWhat a block gains over "
     "the sum of its ops is what fusing across layers, or a cache, gives."),
    ("models", (INFERENCE, COLD), "Whole models: throughput, memory, and what a cold start takes."
     "\n\nRatios are taken round by round; ≈ marks one that may as well be 1: no difference. "
     "Several batch sizes give a picture of throughput. On a GPU it is planned to end within ten "
     "minutes; cold starts are then for `cold`."),
    ("training", (TRAINING,), "Training steps: throughput, gradients held to float64, memory."
     "\n\nForward, backward and SGD. kept MiB is what forward saves for backward, peak MiB the "
     "highest point of a whole step."),
    ("cold", (COLD,), "What the first image costs, from the import on, in fresh processes.\n\n"
     "Compilers begin with empty caches. --rounds is the number of starts."),
    ("all", suite.ALL, "Ops, blocks, models, cold starts, training and epochs, in one record.\n\n"
     "On a GPU this is the default suite: ResNet-50 in bf16, models at batch 1 and 256, ops, "
     "blocks and training at 256, epochs as ever, without cold starts, planned to end within ten "
     "minutes; each option changes its part.\n\nElsewhere it is long: --minutes stops it in time "
     "and --resume goes on."),
):  # fmt: skip
    app.command(_name, help=_help)(_measuring(*_levels))


@app.command(
    "bn",
    help="BatchNorm's passes in training on the CPU, beside torch, Inductor and a copy.\n\n"
    "Normalise with add and ReLU, the statistics, and their backward, on six maps of ResNet-50. A "
    "ratio above 1 means that the kernel is faster; the copy moves the same bytes and computes "
    "nothing.",
)
def _bn(
    context: typer.Context,
    batch: asked.Images = 8,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", "-d", help="fp32, bf16.", show_default="both")
    ] = None,
    threads: asked.Threads = None,
    rounds: asked.Rounds = None,
    seconds: asked.Seconds = None,
    limit: asked.Limit = 900.0,
    minutes: asked.Minutes = None,
    out: asked.Out = None,
    resume: asked.Resume = None,
) -> None:
    with terminal.one_line_errors(PROGRAM):
        if reason := cpu.available():
            raise UsageError(f"bn: needs the native kernels: {reason}")
        dtypes = [
            options.dtype_name("--dtype", d, bn.PRECISIONS) for d in options.split("--dtype", dtype)
        ]
        settings = options.checked(
            models=None, batches=[str(batch)], dtypes=dtypes or bn.PRECISIONS, threads=threads,
            device="cpu", backend="cpu", rounds=rounds, seed=0, images=None, peers=None,
            out=out or Path("out") / str(context.info_name),
        )  # fmt: skip
        wanted = _of_one(PASS, settings, seconds, limit, minutes)
        begin.run(wanted, resume, {})


@app.command(
    "convolutions",
    help="The convolutions of training on the CPU, beside torch's (oneDNN's).\n\n"
    "Forward, data gradient and weight gradient of every distinct convolution of the models, in "
    "CPU time on one thread, the packing of weights included, in memory that nobody has to fault "
    "in. A ratio above 1 means that the kernel is faster; where torch's own is as fast, it is left "
    "to it. On fewer than 16 images torch calls oneDNN for no 1x1 on one thread.",
)
def _convolutions(
    context: typer.Context,
    model: asked.Models = None,
    batch: asked.Images = 16,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", "-d", help="fp32, bf16.", show_default="both")
    ] = None,
    rounds: asked.Rounds = None,
    seconds: asked.Seconds = None,
    limit: asked.Limit = 900.0,
    minutes: asked.Minutes = None,
    out: asked.Out = None,
    resume: asked.Resume = None,
) -> None:
    with terminal.one_line_errors(PROGRAM):
        if reason := cpu.available():
            raise UsageError(f"convolutions: needs the native kernels: {reason}")
        dtypes = [
            options.dtype_name("--dtype", d, bn.PRECISIONS) for d in options.split("--dtype", dtype)
        ]
        settings = options.checked(
            models=model or convolutions.MODELS, batches=[str(batch)],
            dtypes=dtypes or bn.PRECISIONS, threads=1, device="cpu", backend="cpu", rounds=rounds,
            seed=0, images=None, peers=None, out=out or Path("out") / str(context.info_name),
        )  # fmt: skip
        wanted = _of_one(CONVOLUTION, settings, seconds, limit, minutes)
        suite.plan(wanted)  # a model without convolutions is refused before the run
        begin.run(wanted, resume, {})


@app.command(
    "epoch",
    help="Whole epochs of training: the paper's ResNet-20 learns scikit-learn's digits.\n\n"
    "Data order, batches of 128 enlarged images, forward, backward and AdamW, in turns epoch by "
    "epoch. At the end each is tested on images that it has not seen; one that takes more than one "
    "in twenty for another has no speed. --rounds is the number of epochs that are timed.",
)
def _epoch(
    context: typer.Context,
    dtype: asked.Dtypes = None,
    device: asked.Device = "cpu",
    peers: Annotated[
        list[str] | None, typer.Option(help="all, none, or names.", show_default="none")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Epochs.", show_default=str(epoch.EPOCHS))
    ] = None,
    threads: asked.Threads = None,
    backend: asked.Backend = None,
    seed: asked.Seed = 0,
    limit: asked.Limit = 900.0,
    minutes: asked.Minutes = None,
    out: asked.Out = None,
    resume: asked.Resume = None,
) -> None:
    with terminal.one_line_errors(PROGRAM):
        settings = options.checked(
            models=[epoch.MODEL], batches=[str(epoch.BATCH)], dtypes=dtype, threads=threads,
            device=device, backend=backend, rounds=rounds, seed=seed, images=None, peers=None,
            out=out or Path("out") / str(context.info_name),
        )  # fmt: skip
        digits.load()  # before the run, not in its first case
        usual = suite.usual((EPOCH,), settings.device)
        by_level, absent = suite.peers_by_level(
            "--peers", options.split("--peers", peers), settings.device, usual
        )
        wanted = _of_one(EPOCH, settings, None, limit, minutes)
        whole = replace(wanted, peers=by_level, image_size=epoch.SIDE)
        begin.run(whole, resume, {"absent": absent})


def _of_one(
    level: str, settings: Settings, seconds: float | None, limit: float, minutes: float | None
) -> Suite:
    """Return a suite of one level, whose image sizes, caches and graphs are given."""
    return Suite(
        settings=settings,
        levels=(level,),
        peers={},
        image_size=224,
        caches=suite.CACHES,
        graphs=False,
        seconds=begin.seconds(seconds, settings.device),
        limit=begin.above_zero("--limit", limit),
        budget=begin.budget(minutes),
    )


@app.command(
    help="Show what changed between two records, and what is only noise.\n\n"
    "A difference counts where the rounds of A and of B do not overlap: their middle three fifths, "
    "or where there are few all of them. "
    "Memory, rows missing from B and conditions that differ are named; records of another image "
    "size, of other caches, or with CUDA graphs and without, are refused."
)
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A record, as suite.json.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Exit 1 if B is slower or larger by more than this share, or lacks a row."
        ),
    ] = None,
) -> None:
    with terminal.one_line_errors(PROGRAM):
        terminal.compare_files(PROGRAM, before, after, threshold)


@app.command("report")
def _report(
    record: Annotated[Path, typer.Argument(help="A record, as suite.json.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go.", show_default="beside it")]
    = None,
) -> None:  # fmt: skip
    """Write tables, pictures and the page of a record again; nothing is measured."""
    with terminal.one_line_errors(PROGRAM):
        begin.written(
            results.load(record),
            options.writable_directory("--out", out or record.parent, report.FILES),
        )


@app.command(
    help="Put a record into benchmarks/results, where the documents' tables come from.\n\n"
    "Records of all commands are kept the same way. --save-table then writes the tables anew; a "
    "test fails where a document and the records differ."
)
def keep(
    record: Annotated[Path, typer.Argument(help="A finished record, as suite.json.")],
    name: Annotated[
        str, typer.Argument(help="Its name: device and levels, such as cpu-zen5-training.")
    ],
) -> None:
    with terminal.one_line_errors(PROGRAM):
        kept = documents.keep(results.load(record), name)
    typer.echo(f"kept as {kept}; --save-table README.md --save-table benchmarks/RESULTS.md is next")


if __name__ == "__main__":
    terminal.run(app, PROGRAM)
