"""The command `resnet-fused`: bench, flops, roofline, verify, tune, inspect, doctor.

Imports are inside the commands, so that `--help` waits for nothing it does not show.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from resnet_fused.bench import terminal

if TYPE_CHECKING:
    from resnet_fused.bench.options import Settings
    from resnet_fused.bench.results import Record

PROGRAM = "resnet-fused"
FILES = ("bench.json", "bench.md", "bench.png")

app = typer.Typer(
    name=PROGRAM,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fused ResNets: measure them, count them, verify them, and see what runs here.\n\n"
    "Begin with [bold]resnet-fused doctor[/bold], then [bold]resnet-fused bench[/bold].",
)

BENCH_EPILOG = """
[bold]Examples[/bold], each after `resnet-fused`

bench  [dim]# ResNet-34, -50, -152 at batch 1 and 8: about two minutes[/dim]

bench --model resnet50 --dtype bf16 --batch 1,4,16 --images photos/

bench --peers inductor,onnxruntime,openvino

bench --compare old/bench.json new/bench.json --threshold 0.05
"""

INSPECT_EPILOG = """
[bold]Examples[/bold], each after `resnet-fused`

inspect -m resnet50 --arch 90  [dim]# what runs where nothing was tuned[/dim]

inspect --shape 256,64,56,56,64,3,1 --all  [dim]# images, C, H, W, O, K, stride[/dim]

inspect --shape 32,128,56,56,128,3,1 --groups 32  [dim]# of ResNeXt-50 32x4d[/dim]

inspect --shape 8,512,65,65,512,3,1 --dilation 4  [dim]# of DeepLab, padded to keep the size[/dim]

inspect --op conv_bn_act_conv_bn_act --shape 256,64,56,56,64,3,1,256  [dim]# ..., O of the 1x1[/dim]

inspect --op conv_bn_act_max_pool --shape 256,3,224,224,64,7,2

inspect --op avg_pool_linear --shape 256,2048,7,7,1000  [dim]# ..., classes[/dim]
"""

BenchModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="A model; repeat the option or separate with commas.",
        show_default="resnet34,resnet50,resnet152",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Directory of your own photographs (jpg, png) instead of two samples."),
]
Seed = Annotated[int, typer.Option(help="Seed of the random weights and crops.")]


def main() -> None:
    """Run the command line."""
    terminal.run(app, PROGRAM)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.")
    ] = False,
) -> None:
    if show_version:
        from resnet_fused import __version__

        typer.echo(f"resnet_fused {__version__}")
        raise typer.Exit


@app.command(epilog=BENCH_EPILOG)
def bench(
    context: typer.Context,
    model: BenchModels = None,
    batch: Annotated[
        list[str] | None, typer.Option("--batch", "-b", help="Batch sizes.", show_default="1,8")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", "-d", help="fp32, bf16, fp16.", show_default="fp32, and bf16 where native"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, for every contender.", show_default="torch's")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(
            help="The one backend to use; `doctor` lists them.",
            show_default="RESNET_FUSED_BACKEND, or auto",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds per case.", show_default="as a time budget allows"),
    ] = None,
    seed: Seed = 0,
    images: Images = None,
    out: Annotated[Path, typer.Option(help="Where bench.json, bench.md and bench.png go.")] = Path(
        "out/bench"
    ),
    peers: Annotated[
        list[str] | None,
        typer.Option(help="Also time inductor, onnxruntime, openvino (extra: bench-peers)."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Time nothing; compare two bench.json files instead.", metavar="A B"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="With --compare: exit 1 if B is slower by more than this share."),
    ] = None,
) -> None:
    """Time real ResNets on real photographs: eager against fused against frozen.

    Every round times each contender once, in rotated order. Answers are
    checked against float64 first: one that is off by more than twice eager's
    own error is reported as [red]WRONG[/red], has no speed, and makes the exit code 1.
    """
    kept = "nothing was written; `python -m benchmarks models` keeps each case as it is done"
    with _one_line_errors(kept):
        if compare:
            terminal.refuse_beside(context, "--compare", "compare", "threshold")
            terminal.compare_files(PROGRAM, *compare, threshold)
            return
        if threshold is not None:
            _refuse("--threshold: belongs to --compare A.json B.json")
        from resnet_fused.bench import options, photos

        settings = options.checked(
            models=model, batches=batch, dtypes=dtype, threads=threads, device=device,
            backend=backend, rounds=rounds, seed=seed, images=images, out=out, peers=peers,
        )  # fmt: skip
        photos.load(images, 1)
        options.writable_directory("--out", out, FILES)
        record = _run(settings)
        _report(record, settings.out)
        raise typer.Exit(0 if record.right else 1)


@app.command()
def flops(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A model.", show_default="the paper's table"),
    ] = None,
    input_size: Annotated[
        str, typer.Option(help="Batch, channels, height, width.")
    ] = "1,3,224,224",
    stride_in: Annotated[
        str,
        typer.Option(help="Where a bottleneck's stride sits: 3x3 (torchvision) or 1x1 (paper)."),
    ] = "3x3",
    layers: Annotated[bool, typer.Option("--layers", help="Also every layer.")] = False,
) -> None:
    """Count multiply-adds and parameters; without a model, the paper's table.

    Nothing is computed: the models are built on meta tensors.
    """
    with _one_line_errors():
        from resnet_fused.bench import counts, options

        names = options.usable_models("--model", options.split("--model", model))
        if not names:
            terminal.refuse_beside(context, "the paper's table, without --model")
        for line in counts.lines(names, input_size=input_size, stride_in=stride_in, layers=layers):
            typer.echo(line)


@app.command()
def roofline(
    model: Annotated[str, typer.Argument(help="A model, such as resnet50.")],
    device: Annotated[str, typer.Option(help="h200, h100 or a100; none is needed here.")] = "h200",
    input_size: Annotated[
        str, typer.Option(help="Batch, channels, height, width.")
    ] = "256,3,224,224",
    dtype: Annotated[str, typer.Option("--dtype", "-d", help="bf16, fp16, fp32.")] = "bf16",
) -> None:
    """Bound the speed of a fused model on a device, layer by layer, from FLOPs and bytes.

    Nothing is measured: it is the least time in which each layer can compute, or read and write
    its tensors once; and what fusing across layers would save.
    """
    with _one_line_errors():
        from resnet_fused.bench import options
        from resnet_fused.roofline import DEVICES, roofline_by_name

        (name,) = options.usable_models("MODEL", [model])
        target = DEVICES[options.one_of("--device", device, DEVICES)]
        kind = options.DTYPES[options.dtype_name("--dtype", dtype)]
        size = options.input_size("--input-size", input_size)
        try:
            typer.echo(str(roofline_by_name(name, size, target, kind)))
        except ValueError as error:
            # A dtype without a figure, or an image too small: the message says so.
            _refuse(str(error))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A model, such as resnet50.")],
    dtype: Annotated[str, typer.Option("--dtype", "-d", help="fp32, bf16 or fp16.")] = "fp32",
    batch: Annotated[int, typer.Option("--batch", "-b", help="Photographs in the batch.")] = 2,
    seed: Seed = 0,
    images: Images = None,
) -> None:
    """Hold a fused model against float64, layer by layer, beside eager torch's own errors.

    Exits with 1 if any layer is off by more than twice eager's error.
    """
    with _one_line_errors("nothing is kept"):
        from resnet_fused.bench import certificate

        report = certificate.run(
            model, dtype=dtype, batch=batch, seed=seed, images=images,
            console=terminal.console(stderr=True),
        )  # fmt: skip
        typer.echo(str(report))
        raise typer.Exit(0 if report.ok else 1)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A model, such as resnet50.")],
    batch: Annotated[int, typer.Option("--batch", "-b", help="Images in the batch.")] = 8,
    image_size: Annotated[int, typer.Option(help="Height and width of the images.")] = 224,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", "-d", help="fp32, bf16 or fp16.", show_default="bf16 where native, else fp32"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    training: Annotated[
        bool, typer.Option("--training", help="The calls of a training step, 16 bits by autocast.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure again what is known.")] = False,
) -> None:
    """Measure which backend runs each layer of a model fastest, and remember it.

    Every candidate is held to float64 first. On a GPU later processes use the choices by
    themselves; those measured on the CPU hold only in programs that call `rf.tune`.
    Exits with 1 if a layer has no candidate that answers rightly.
    """
    with _one_line_errors("choices made so far are kept; the same command goes on"):
        from resnet_fused.bench import tune as tuning

        report = tuning.run(
            model, batch=batch, image_size=image_size, dtype=dtype, device=device,
            training=training, force=force, console=terminal.console(stderr=True),
        )  # fmt: skip
        typer.echo(str(report))
        raise typer.Exit(0 if report.ok else 1)


@app.command(epilog=INSPECT_EPILOG)
def inspect(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Every distinct call of a model.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="One call instead; its numbers follow from --op.", metavar="N,C,H,W,..."),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Groups of --shape's convolution; C and O count all.", show_default="1"),
    ] = None,
    dilation: Annotated[
        str | None,
        typer.Option(
            help="Dilation of --shape's convolution; its padding grows with it.", show_default="1"
        ),
    ] = None,
    op: Annotated[
        str,
        typer.Option(
            help="conv_bn_act; conv_bn_act_conv_bn_act, a bottleneck's 3x3 and 1x1 in one; "
            "conv_bn_act_max_pool, the stem; avg_pool_linear, the head."
        ),
    ] = "conv_bn_act",
    every: Annotated[
        bool,
        typer.Option("--all", help="Every config that `tune` would time, not the untuned alone."),
    ] = False,
    batch: Annotated[str, typer.Option("--batch", "-b", help="Images, with --model.")] = "256",
    dtype: Annotated[str, typer.Option("--dtype", "-d", help="bf16, fp16, tf32, fp32.")] = "bf16",
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="80 (A100), 90 (H100, H200), 100 (B200); none need be here.",
            show_default="80,90,100",
        ),
    ] = None,
) -> None:
    """Compile the Triton kernels for GPUs that need not be here, and show what they cost.

    One row per config and architecture. Spilled registers, narrow loads or
    products without tensor cores (those are wgmma, tcgen05, mma.sync) tell a
    bad tile before it runs; a spill makes the exit code 1.
    """
    with _one_line_errors():
        from resnet_fused import inspection
        from resnet_fused.bench import options

        if shape is not None and "batch" in terminal.given(context):
            _refuse("--batch: belongs to --model; the first number of --shape is the images")
        geometry = {"groups": groups, "dilation": dilation}
        clean = inspection.show(
            terminal.console(), terminal.console(stderr=True), op=op, model=model, batch=batch,
            dtype=dtype, archs=options.split("--arch", arch), shape=shape, every=every,
            geometry={name: value for name, value in geometry.items() if value is not None},
        )  # fmt: skip
        raise typer.Exit(0 if clean else 1)


@app.command()
def doctor(
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if anything is missing.")
    ] = False,
) -> None:
    """Show versions, devices and backends; for each that is missing, why and what to do."""
    from resnet_fused import env

    missing = env.show(terminal.console())
    raise typer.Exit(1 if strict and missing else 0)


def _one_line_errors(interrupted: str = "") -> contextlib.AbstractContextManager[None]:
    return terminal.one_line_errors(PROGRAM, interrupted)


def _refuse(message: str) -> NoReturn:
    terminal.refuse(PROGRAM, message)


def _run(settings: Settings) -> Record:
    from resnet_fused.bench import conditions, job

    found = conditions.of(settings, PROGRAM)
    with terminal.progress() as watch:
        return job.run(settings, found, watch)


def _report(record: Record, out: Path) -> None:
    from resnet_fused.bench import chart, options, results, tables

    data, text, picture = (out / name for name in FILES)
    # All before it is shown, which may fail.
    results.save(record, data)
    results.save_text(tables.markdown(record), text)
    written = [data.name, text.name]
    try:
        chart.save(record, picture)
        written.append(picture.name)
    except options.UsageError as error:  # no matplotlib: the numbers are worth keeping all the same
        typer.echo(f"{PROGRAM}: {error}", err=True)
    console = terminal.console()
    tables.show(record, console)
    console.print(f"written to {out}: {', '.join(written)}", highlight=False, soft_wrap=True)
