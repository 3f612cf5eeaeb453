from __future__ import annotations

import pytest
import torch

from resnet_fused.bench.timing import (
    Rounds,
    Spread,
    clock_for,
    elapsed_cpu,
    finished,
    interleave,
    paired_ratio,
    rotated,
    spread,
)


def test_spread_interpolates() -> None:
    assert spread([5, 1, 2, 4, 3, 6]) == Spread(3.5, 2.0, 5.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratio_is_paired_round_by_round() -> None:
    """A machine twice as slow in the second round leaves the ratios alone."""
    assert paired_ratio([1.0, 2.0], [0.5, 1.0]) == Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("other", "overlap"),
    [(Spread(2, 1, 3), True), (Spread(5, 4, 6), False), (Spread(4, 3, 5), True)],
)
def test_overlap_is_mutual(other: Spread, overlap: bool) -> None:
    here = Spread(2, 1, 3)
    assert here.overlaps(other) is overlap
    assert other.overlaps(here) is overlap


def test_rotation_lets_everyone_begin() -> None:
    turns = [rotated("abc", turn) for turn in range(4)]
    assert ["".join(turn) for turn in turns] == ["abc", "bca", "cab", "abc"]


def test_rounds_stop_at_the_budget_but_not_before_the_least() -> None:
    rounds = Rounds(least=2, most=5, seconds=10)
    assert rounds.goes_on(0, 0)
    assert rounds.goes_on(1, 100)  # over the budget, but too few to say anything
    assert rounds.goes_on(4, 8)
    assert not rounds.goes_on(4, 9)  # a fifth would end at 11.25 s
    assert not rounds.goes_on(5, 1)


def test_interleave_rotates_and_gives_every_run_the_same_number_of_calls() -> None:
    order: list[str] = []
    sampled: list[tuple[str, int]] = []

    def clock(run: object, calls: int, feed: object = None) -> float:
        run()  # type: ignore[operator]
        sampled.append((order[-1], calls))
        return 0.01 if order[-1] == "a" else 0.03

    done: list[int] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(runs, Rounds(3, 3), clock=clock, on_round=done.append)

    assert seconds == {"a": [0.01] * 3, "b": [0.03] * 3, "c": [0.03] * 3}
    assert done == [1, 2, 3]
    estimates, samples = sampled[:3], sampled[3:]
    assert estimates == [("a", 1), ("b", 1), ("c", 1)]
    assert [name for name, _ in samples] == list("abcbcacab")
    assert {calls for _, calls in samples} == {4}  # 0.04 s for the quickest


def test_a_long_call_is_made_once_without_a_lead_in() -> None:
    calls: list[int] = []
    interleave(
        {"a": lambda: calls.append(1)},
        Rounds(2, 2),
        clock=lambda run, n, feed=None: (run(), 0.5 * n)[1],
    )
    assert len(calls) == 3  # the estimate and two rounds


def test_each_one_s_input_is_written_again_between_the_emptying_and_the_call() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    feeds = {name: (lambda name=name: order.append(f"fed {name}")) for name in "ab"}
    clock = clock_for("cpu", emptied=True)
    interleave(runs, Rounds(2, 2), clock=clock, single=True, feeds=feeds)
    assert order == ["a", "b", "fed a", "a", "fed b", "b", "fed b", "b", "fed a", "a"]


def test_the_wall_clock_counts_per_call() -> None:
    calls: list[int] = []
    assert elapsed_cpu(lambda: calls.append(1), 5) >= 0
    assert len(calls) == 5


def test_a_clock_that_knows_nothing_of_gpus_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("done"))
    finished(lambda: order.append("launched"), "cuda")()
    assert order == ["launched", "done"]
    finished(lambda: order.append("run"), "cpu")()
    assert order == ["launched", "done", "run"]
