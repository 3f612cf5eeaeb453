from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from resnet_fused.bench import conditions, options
from resnet_fused.bench.options import UsageError


class Backend(NamedTuple):
    name: str
    available: bool
    reason: str
    advice: str


def test_commas_and_repetition_both_list() -> None:
    assert options.split("--model", ["a, b", "c", "a"]) == ["a", "b", "c"]
    assert options.split("--model", None) == []
    with pytest.raises(UsageError, match="--model: ', ' given, which names nothing"):
        options.split("--model", [", "])


def test_the_nearest_names_are_offered() -> None:
    with pytest.raises(UsageError, match=r"--model: unknown .*did you mean resnet50.*accepted: "):
        options.usable_models("--model", ["resnt50"])


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", ""])
def test_numbers_must_be_whole_and_positive(value: str) -> None:
    with pytest.raises(UsageError, match=f"--batch: '{value}' given; accepted: a whole number, 1"):
        options.positive("--batch", value)
    assert options.positive("--seed", "0", least=0) == 0


def test_dtypes_by_either_name() -> None:
    assert options.dtype_name("--dtype", "bf16") == options.dtype_name("--dtype", "bfloat16")
    with pytest.raises(UsageError, match="accepted: fp32, bf16, fp16, float32, bfloat16, float16"):
        options.dtype_name("--dtype", "int8")
    with pytest.raises(UsageError, match="'fp8'; accepted: fp32, bf16, fp16, tf32, float32"):
        options.precision_name("--dtype", "fp8", "cuda")


def test_default_dtypes_begin_with_fp32() -> None:
    assert options.default_dtypes("cpu")[0] == "float32"


def test_a_backend_that_is_not_here_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Backend("cuda", False, "no driver", "install one"), Backend("onednn", True, "", "")]
    monkeypatch.setattr("resnet_fused.backends", lambda: listed)
    assert options.usable_backend("--backend", "auto") == "auto"
    assert options.usable_backend("--backend", "onednn") == "onednn"
    with pytest.raises(UsageError, match="cuda is not available: no driver; install one"):
        options.usable_backend("--backend", "cuda")
    with pytest.raises(UsageError, match="did you mean onednn"):
        options.usable_backend("--backend", "ondnn")


def test_no_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="no usable CUDA device here"):
        options.usable_device("--device", "cuda")


def test_out_is_made_and_left_empty(tmp_path: Path) -> None:
    path = options.writable_directory("--out", tmp_path / "a" / "b")
    assert path.is_dir()
    assert not list(path.iterdir())


def test_out_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out: cannot write to"):
        options.writable_directory("--out", tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="--out: cannot write to"):
        options.writable_directory("--out", tmp_path / "file")


@pytest.mark.parametrize("out", [["--out", "/home/me/out"], ["--out=/home/me/out"], []])
def test_a_record_tells_the_command_and_not_whose_folder_it_wrote_to(out: list[str]) -> None:
    words = ["models", "-m", "resnet50", *out, "--images", "my photos"]
    told = conditions.command("python -m benchmarks", words)
    assert told == "python -m benchmarks models -m resnet50 --images 'my photos'"
