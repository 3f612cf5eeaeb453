"""``python -m benchmarks``: from one op to a training step, against every peer and the limit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import bn, readme, report, runner, suite
from benchmarks.suite import Suite
from resnet_fused.backends import cpu
from resnet_fused.bench import conditions, options, results, terminal, timing
from resnet_fused.bench.options import UsageError
from resnet_fused.bench.results import BLOCK, COLD, INFERENCE, LEVELS, OP, TRAINING, Record

PROGRAM = "python -m benchmarks"
CACHES = ("cold", "hot")

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure ResNets from one op to a training step, on a CPU or a GPU.\n\n"
    "Every contender of a case runs in the same interleaved rounds and is held against float64 "
    "first. A case that crashes, hangs or runs out of memory is recorded as such, and the run "
    "goes on; an interrupted one goes on with --resume.",
    epilog="[bold]Examples[/bold]\n\n"
    "python -m benchmarks ops -m resnet50 -b 8  [dim]# which layer loses the most time[/dim]\n\n"
    "python -m benchmarks models --device cuda --dtype tf32,bf16,fp16 --batch 1,32,256\n\n"
    "python -m benchmarks training --peers inductor-default\n\n"
    "python -m benchmarks compare old/suite.json new/suite.json --threshold 0.05",
)


@app.callback(invoke_without_command=True)
def _root(
    save_table: Annotated[
        Path | None,
        typer.Option(help="A README: its results are written anew from benchmarks/results/*.json."),
    ] = None,
) -> None:
    if save_table:
        with terminal.one_line_errors(PROGRAM):
            readme.save(save_table)
        raise typer.Exit


def _measuring(*levels: str) -> Callable[..., None]:
    """Return a command that measures these levels."""

    def command(
        context: typer.Context,
        model: Annotated[
            list[str] | None,
            typer.Option(
                "--model",
                "-m",
                help="Models; repeat or separate with commas.",
                show_default="resnet34,resnet50,resnet152",
            ),
        ] = None,
        batch: Annotated[
            list[str] | None,
            typer.Option(
                "--batch",
                "-b",
                show_default="1,8; 1,256 on a GPU",
                help="Batch sizes. "
                "One that has no room is halved until it has; training leaves 1 out.",
            ),
        ] = None,
        dtype: Annotated[
            list[str] | None,
            typer.Option(
                "--dtype",
                "-d",
                help="fp32, tf32, bf16, fp16. fp32 is float32 proper.",
                show_default="fp32, and bf16 where native",
            ),
        ] = None,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        peers: Annotated[
            list[str] | None,
            typer.Option(
                help="all, none, or names: those not installed are then refused.",
                show_default="those installed that are quick to build",
            ),
        ] = None,
        rounds: Annotated[
            int | None, typer.Option(help="Rounds per case.", show_default="as time allows")
        ] = None,
        seconds: Annotated[
            float | None,
            typer.Option(help="Timing per case and contender.", show_default="0.5 to 5, by level"),
        ] = None,
        cache: Annotated[
            str | None,
            typer.Option(
                help="cold: caches (L2, on a GPU) are emptied before each call. hot: not.",
                show_default="cold for ops and blocks",
            ),
        ] = None,
        graphs: Annotated[
            bool | None,
            typer.Option(
                "--graphs/--no-graphs",
                show_default="on a GPU",
                help="Run all contenders as CUDA graphs, or none (training: never).",
            ),
        ] = None,
        image_size: Annotated[int, typer.Option(help="Height and width of the images.")] = 224,
        threads: Annotated[
            int | None, typer.Option(help="CPU threads, for all.", show_default="torch's")
        ] = None,
        backend: Annotated[str, typer.Option(help="The package's backend to use.")] = "auto",
        seed: Annotated[int, typer.Option(help="Seed of weights, crops and inputs.")] = 0,
        images: Annotated[
            Path | None, typer.Option(help="Your own photographs instead of two samples.")
        ] = None,
        limit: Annotated[
            float, typer.Option(help="Seconds after which a case counts as hung.")
        ] = 900.0,
        minutes: Annotated[
            float | None,
            typer.Option(
                help="Begin no case after so many minutes; --resume does the rest.",
                show_default="no end",
            ),
        ] = None,
        out: Annotated[
            Path | None, typer.Option(help="Where the results go.", show_default="out/COMMAND")
        ] = None,
        resume: Annotated[
            bool | None,
            typer.Option("--resume/--fresh", help="Go on with the run in --out, or begin anew."),
        ] = None,
    ) -> None:
        with terminal.one_line_errors(PROGRAM):
            asked = options.checked(
                models=model, batches=batch, dtypes=dtype, threads=threads, device=device,
                backend=backend, rounds=rounds, seed=seed, images=images, peers=None,
                out=out or Path("out") / str(context.info_name),
            )  # fmt: skip
            by_level, absent = suite.peers_by_level("--peers", options.split(peers), asked.device)
            cold = _cold_caches(cache)
            wanted = Suite(
                settings=asked,
                levels=levels,
                peers=by_level,
                image_size=options.positive("--image-size", image_size, least=32),
                cold_caches=cold,
                graphs=_graphs(graphs, asked.device),
                seconds=dict.fromkeys(LEVELS, _above_zero("--seconds", seconds))
                if seconds is not None
                else suite.SECONDS,
                limit=_above_zero("--limit", limit),
                budget=None if minutes is None else 60 * _above_zero("--minutes", minutes),
            )
            found = {
                **conditions.of(asked, shlex.join([*PROGRAM.split(), *sys.argv[1:]])),
                "graphs": wanted.graphs, "cold_caches": cold, "image_size": image_size,
                "photographs_from": str(images) if images else "scikit-learn", "absent": absent,
            }  # fmt: skip
            _run(wanted, _begun(asked.out / report.RECORD, found, resume))

    return command


for _name, _levels, _help in (
    ("ops", (OP, INFERENCE), "Every distinct op of the models, with the time it loses against the "
     "device's limit, and the models that they add up to."),
    ("blocks", (BLOCK,), "Every distinct residual block of the models."),
    ("models", (INFERENCE, COLD), "Whole models: throughput, memory, and what a cold start takes."),
    ("training", (TRAINING,), "Training steps: throughput, gradients held to float64, memory."),
    ("cold", (COLD,), "What the first image costs, from the import on, in fresh processes."),
    ("all", LEVELS, "All of these."),
):  # fmt: skip
    app.command(_name, help=_help)(_measuring(*_levels))


@app.command("bn")
def _bn(
    batch: Annotated[int, typer.Option("--batch", "-b", help="Images.")] = 8,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, for all.", show_default="torch's")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Timing per pass, map and dtype.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Where bn.json goes.")] = Path("out/bn"),
) -> None:
    """BatchNorm's passes in training on the CPU, beside torch, Inductor and a copy."""
    with terminal.one_line_errors(PROGRAM):
        if reason := cpu.available():
            raise UsageError(f"bn: needs the native kernels: {reason}")
        asked = options.checked(
            models=None, batches=[str(batch)], dtypes=None, threads=threads, device="cpu",
            backend="cpu", rounds=None, seed=0, images=None, peers=None, out=out,
        )  # fmt: skip
        rounds = timing.Rounds(seconds=_above_zero("--seconds", seconds))
    torch.set_num_threads(asked.threads)
    rows = bn.measure(batch, rounds, terminal.console(stderr=True))
    bn.show(rows, terminal.console())
    found = conditions.of(asked, shlex.join([*PROGRAM.split(), *sys.argv[1:]]))
    bn.save(rows, found, out / "bn.json")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="A record, as suite.json.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    threshold: Annotated[
        float | None, typer.Option(help="Exit 1 if B is slower by more than this share.")
    ] = None,
) -> None:
    """Show what changed between two records, and what is only noise."""
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
        _written(results.load(record), options.writable_directory("--out", out or record.parent))


@app.command()
def keep(
    record: Annotated[Path, typer.Argument(help="A finished record, as suite.json.")],
    name: Annotated[str, typer.Argument(help="Its device, such as cpu-zen5-2-threads.")],
) -> None:
    """Put a record and its chart into benchmarks/results, where the README's tables come from."""
    with terminal.one_line_errors(PROGRAM):
        readme.keep(results.load(record), name)


def _cold_caches(cache: str | None) -> dict[str, bool]:
    if cache is None:
        return {level: level in suite.COLD_CACHES for level in LEVELS}
    return dict.fromkeys(LEVELS, options.one_of("--cache", cache, CACHES) == "cold")


def _graphs(asked: bool | None, device: str) -> bool:
    if asked and device != "cuda":
        raise UsageError("--graphs: CUDA graphs need --device cuda")
    return device == "cuda" if asked is None else asked


def _above_zero(option: str, value: float) -> float:
    if not value > 0:
        raise UsageError(f"{option}: {value:g} given; accepted: a number above 0")
    return value


def _begun(path: Path, found: dict[str, object], resume: bool | None) -> Record:
    """Return the record to go on with, or an empty one.

    Raises:
        UsageError: an unfinished run lies there and it was not said what to do with it, or it was
            measured under other conditions.
    """
    if not path.exists() or resume is False:
        return Record(found, [])
    record = results.load(path)
    if resume:
        return runner.resumed(record, found, path)
    if left := record.conditions.get(runner.UNFINISHED):
        raise UsageError(
            f"{path} holds a run of which {left} cases are left: --resume goes on, --fresh begins "
            "again"
        )
    return Record(found, [])


def _run(wanted: Suite, begun: Record) -> None:
    path = wanted.settings.out / report.RECORD
    try:
        with terminal.progress() as watch:
            record = runner.Runner(wanted, begun, lambda r: results.save(r, path), watch).run()
    except KeyboardInterrupt:
        typer.echo(f"{PROGRAM}: interrupted; the same command with --resume goes on", err=True)
        raise typer.Exit(130) from None
    report.show(record, terminal.console())
    _written(record, wanted.settings.out)
    raise typer.Exit(0 if record.right else 1)


def _written(record: Record, out: Path) -> None:
    files = report.write(record, out)
    names = ", ".join(path.name for path in files)
    terminal.console().print(f"written to {out}: {names}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app(prog_name=PROGRAM)
