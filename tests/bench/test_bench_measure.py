"""What a case is measured under: precision, caches, and how its errors are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resnet_fused.bench import measure
from resnet_fused.bench.options import UsageError, precision_name
from resnet_fused.bench.results import FAILED, OK, OUT_OF_MEMORY, Case, Row
from resnet_fused.bench.tables import ratio_text
from resnet_fused.bench.timing import Rounds, Spread, clock_for, interleave


def flags() -> tuple[object, ...]:
    return (
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
    )


@pytest.mark.parametrize(
    ("dtype", "convolutions", "products"),
    [("tf32", True, True), ("float32", False, False), ("bfloat16", True, False)],
)
def test_float32_is_float32_and_tf32_is_tf32(
    dtype: str, convolutions: bool, products: bool
) -> None:
    """The Triton and cuDNN backends read the same flag of torch."""
    before = flags()
    with measure.precision(dtype):
        convolution, chosen, product = flags()
        assert (convolution == "tf32", chosen, product) == (convolutions, True, products)
    assert flags() == before


def test_tf32_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(UsageError, match="accepted: fp32"):
        precision_name("--dtype", "tf32", "cpu")
    assert precision_name("--dtype", "bf16", "cpu") == "bfloat16"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (MemoryError("all of it"), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY),
        (RuntimeError("no such kernel\nand more"), FAILED),
    ],
)
def test_running_out_of_memory_is_told_from_failing(error: Exception, verdict: str) -> None:
    row = measure.failed(Row(Case("m", "float32", 1), "fused", OK, 1.0, 1.0), error)
    assert row.verdict == verdict
    assert "\n" not in row.note


@pytest.mark.parametrize(
    ("error", "synchronized", "lost"),
    [
        (torch.AcceleratorError("an illegal memory access"), True, True),
        (RuntimeError("CUDA error: misaligned address"), True, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access"), False, True),
        (RuntimeError("no such kernel"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
    ],
)
def test_what_costs_a_process_its_gpu(
    error: Exception, synchronized: bool, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        if not synchronized:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert measure.device_lost(error) is lost


def test_a_cold_sample_is_one_call() -> None:
    calls: list[str] = []
    interleave(
        {"a": lambda: calls.append("a")},
        Rounds(3, 3),
        clock=clock_for("cpu", emptied=True),
        single=True,
    )
    assert len(calls) == 1 + 3  # the estimate, and one a round, without a lead-in


@pytest.mark.parametrize("given", [torch.tensor([1.0, -2.0]), np.array([1.0, -2.0], np.float32)])
def test_feeding_writes_the_same_input_where_it_lies(given: torch.Tensor | np.ndarray) -> None:
    calls: list[int] = []
    row = Row(Case("m", "float32", 1), "fused", OK, 1.0, 1.0)
    entry = measure.Entry(row, input=given, twin=lambda: calls.append(1))
    entry.feed()
    assert calls
    assert entry.input is given
    assert list(given) == [1.0, -2.0]


@pytest.mark.parametrize(("seconds", "calls"), [(1e-6, 32), (1e-3, 5), (0.5, 1)])
def test_a_gpu_is_fed_by_a_counted_number_of_calls(
    seconds: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the host's time alone it could be given a thousand calls of a millisecond in 5 ms."""
    monkeypatch.setattr("resnet_fused.bench.timing.elapsed_cuda", lambda run, number: seconds)
    ran: list[int] = []
    warm_calls = measure._warm_calls(lambda: ran.append(1), "cuda")
    assert warm_calls == calls
    row = Row(Case("m", "float32", 1), "fused", OK, 1.0, 1.0)
    given = torch.ones(2)
    measure.Entry(row, input=given, twin=lambda: ran.append(1), warm_calls=warm_calls).feed()
    assert len(ran) == calls
    assert measure._warm_calls(lambda: None, "cpu") is None


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Spread(1.02, 0.98, 1.05), "≈1.02x"),
        (Spread(1.02, 1.01, 1.05), "1.02x"),
        (Spread(1.0, 1.0, 1.0), "1.00x"),  # the reference beside itself
        (None, "-"),
    ],
)
def test_a_ratio_within_the_noise_is_marked(ratio: Spread | None, text: str) -> None:
    assert ratio_text(ratio) == text
