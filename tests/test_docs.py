"""What the documents say is so: the table, the example, the paths, the commands, the variables."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import resnet_fused as rf
from resnet_fused.backends import ORDER
from resnet_fused.cli import app
from resnet_fused.functional import PUBLIC

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ((ROOT / n).read_text() for n in ("README.md", "CONTRIBUTING.md"))


@pytest.mark.parametrize("name", ["README.md", "benchmarks/RESULTS.md"])
def test_the_results_are_those_that_were_measured(name):
    from benchmarks import documents

    text = (ROOT / name).read_text()
    assert text == documents.filled(text), f"run: python -m benchmarks --save-table {name}"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_example_runs(torchvision, monkeypatch):
    """Without the download of weights, and on a smaller image."""
    (example,) = blocks(README, "python")
    code = example.replace('weights="DEFAULT"', "").replace("8, 3, 224, 224", "2, 3, 64, 64")
    said = re.search(r"# (\d+) of \d+: (.*)", example)
    names: dict = {}
    exec(code, names)
    report = rf.fusion_report(names["fused"])
    assert names["y"].shape == (2, 1000)
    assert names["y"].dtype == torch.bfloat16
    assert int(said[1]) == len(report.fused)
    for count, pattern in (part.split() for part in said[2].split(", ")):
        assert sum(group.pattern == pattern for group in report.fused) == int(count)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_rooms_are_there():
    for name in re.findall(r"^\| (`.*?`) \|", CONTRIBUTING, flags=re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", name):
            inside = ROOT / path if (ROOT / path).exists() else ROOT / "resnet_fused" / path
            assert inside.exists(), path


def test_make_knows_the_commands():
    lines = [
        line.split("#")[0] for b in blocks(README + CONTRIBUTING, "sh") for line in b.split("\n")
    ]
    commands = [shlex.split(line) for line in lines if line.startswith("make ")]
    assert len(commands) >= 4
    for command in commands:
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_command_line_knows_its_options():
    for command, words in re.findall(r"`resnet-fused (\w+)((?: [^`]*)?)`", README):
        shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
        assert shown.exit_code == 0, command
        for option in re.findall(r"--[\w-]+", words):
            assert option in re.sub(r"\x1b\[[\d;]*m", "", shown.output), (command, option)


def test_backends_and_ops_are_named():
    assert all(f"| `{name}` |" in README for name in (*ORDER, "reference"))
    assert all(f"`{op}`" in README or f"functional.{op}" in README for op in PUBLIC)


def test_environment_variables():
    pattern = re.compile(r"RESNET_FUSED_[A-Z_]+")
    sources = [*ROOT.glob("resnet_fused/**/*.py"), ROOT / "setup.py"]
    used = {v for path in sources for v in pattern.findall(path.read_text())}
    assert used <= set(pattern.findall(CONTRIBUTING)), "a variable is not in CONTRIBUTING.md"


def test_the_version_is_one():
    assert f'version = "{rf.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {rf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_commands_of_the_readme_are_those_of_ci():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"resnet_fused {rf.__version__}"
