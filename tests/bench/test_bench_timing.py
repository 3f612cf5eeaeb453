from __future__ import annotations

import numpy as np
import pytest
import torch

from resnet_fused.bench.timing import (
    CHANCE,
    LEAST_ROUNDS,
    MIN_ROUNDS,
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
    assert spread([5, 1, 2, 4, 3, 6]) == Spread(3.5, 2.0, 5.0, 6, 1.0, 6.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1, 7.0, 7.0)


def test_ratio_is_paired_round_by_round() -> None:
    """A machine twice as slow in the second round leaves the ratios alone."""
    assert paired_ratio([1.0, 2.0], [0.5, 1.0]) == Spread(2.0, 2.0, 2.0, 2, 2.0, 2.0)
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


@pytest.mark.parametrize("rounds", [1, 3, 4, 5, 6, 8, 10, 11, 12, 20])
def test_equal_contenders_are_told_apart_by_chance_alone(rounds: int) -> None:
    """With noise of 5 %: within rounds, and between two runs."""
    draws = 1 + 0.05 * np.random.default_rng(0).standard_normal((2, 2000, rounds))
    pairs = list(zip(*draws, strict=True))
    differ = sum(not paired_ratio(a, b).covers(1) for a, b in pairs)
    apart = sum(not spread(a).overlaps(spread(b)) for a, b in pairs)
    assert max(differ, apart) <= CHANCE * len(pairs)


def test_few_rounds_must_all_say_the_same_and_too_few_say_nothing() -> None:
    assert not spread([1.1, 1.2, 1.3, 1.2, 1.1]).covers(1)
    assert spread([1.1, 1.2, 1.3, 1.2, 0.99]).covers(1)
    assert spread([2.0, 2.1, 2.0, 2.1]).covers(1)
    assert not spread([1.2] * 10 + [0.9] * 2).covers(1)  # many may have strays
    assert spread([5.0]).overlaps(spread([9.0]))
    assert spread([5.0] * 3).overlaps(spread([9.0] * 3))
    assert not spread([5.0] * 4).overlaps(spread([9.0] * 4))


def test_rotation_lets_everyone_begin() -> None:
    turns = [rotated("abc", turn) for turn in range(4)]
    assert ["".join(turn) for turn in turns] == ["abc", "bca", "cab", "abc"]


def test_rounds_stop_at_the_budget_but_not_before_the_least() -> None:
    rounds = Rounds(least=2, most=5, seconds=10)
    assert rounds.goes_on(0, 0)
    assert rounds.goes_on(1, 100)  # over the budget, but too few to say anything
    usual = Rounds(seconds=10)
    assert usual.goes_on(MIN_ROUNDS - 1, 35)
    assert not usual.goes_on(MIN_ROUNDS - 1, 40)
    assert usual.goes_on(LEAST_ROUNDS - 1, 1000)
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
