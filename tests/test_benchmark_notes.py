"""benchmarks/NOTES.md: its predictions are those of the models, its commands exist."""

import re
import shlex

import pytest
from typer.testing import CliRunner

from benchmarks import predicted
from resnet_fused.cli import app

NOTES = predicted.NOTES.read_text(encoding="utf-8")


def test_tuning_a_resnet50_is_predicted_to_take_less_than_two_minutes():
    """Most of it is compilation: with twice as many configs it would not."""
    work = predicted.tuning("resnet50", 256)
    assert work.calls == 29
    assert 100 < work.configs <= 8 * 25 + 5 * 3 + 1
    assert work.seconds < 120 < 2 * work.seconds


def test_the_predictions_are_what_the_models_say():
    written = NOTES.partition(predicted.BEGIN)[2].partition(predicted.END)[0].strip()
    assert written == predicted.section().strip(), "run: python -m benchmarks.predicted --save"


def test_the_table_is_written_between_the_marks(tmp_path, monkeypatch):
    notes = tmp_path / "NOTES.md"
    notes.write_text(f"before\n{predicted.BEGIN}\nold\n{predicted.END}\nafter")
    monkeypatch.setattr(predicted, "NOTES", notes)
    monkeypatch.setattr(predicted, "section", lambda: "new")
    predicted.main(save=True)
    assert notes.read_text() == f"before\n{predicted.BEGIN}\nnew\n{predicted.END}\nafter"
    notes.write_text("no marks")
    with pytest.raises(SystemExit, match="has no <!-- predicted -->"):
        predicted.main(save=True)
    assert notes.read_text() == "no marks"


def test_no_fusion_is_predicted_to_be_slower_and_none_to_pass_the_arithmetic():
    rows = [line.strip("| ").split(" | ") for line in NOTES.splitlines() if "| resnet" in line]
    inference = [row for row in rows if len(row) == len(predicted.COLUMNS)]
    assert len(inference) == len(predicted.MODELS) * len(predicted.BATCHES)
    for row in inference:
        *bounds, arithmetic, tiles = (float(v.replace(",", "")) for v in row[2:7])
        assert bounds == sorted(bounds)
        assert bounds[-1] <= arithmetic
        assert tiles < bounds[0]


def test_its_commands_exist():
    commands = re.findall(r"`resnet-fused (\w+)((?: [^`]*)?)`", NOTES)
    assert commands
    for command, words in commands:
        shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
        assert shown.exit_code == 0, command
        options = [word for word in shlex.split(words) if word.startswith("--")]
        text = re.sub(r"\x1b\[[\d;]*m", "", shown.output)
        assert [option for option in options if option not in text] == []
    for path in re.findall(r"`(?:\w+/)*\w+\.py", NOTES):
        name = path.strip("`")
        root = predicted.NOTES.parents[1]
        assert (root / name).exists() or (root / "resnet_fused" / name).exists(), name


def test_it_is_one_page():
    assert len(NOTES.splitlines()) <= 80
