"""The yardstick itself: it passes what it should, and what is wrong does not get through."""

import math

import pytest
import torch

from resnet_fused.testing import (
    gradient_metrics,
    gradient_rule,
    max_error,
    optional_import,
    to_float64,
    two_x_rule,
)

T = torch.tensor
NAN, INF = math.nan, math.inf


def test_to_float64_reaches_into_sequences():
    args = (T([1.0]), [T([1]), (T([1.0]).half(), "relu", None)], 3)
    wide = to_float64(args)
    assert wide[0].dtype == wide[1][1][0].dtype == torch.float64
    assert wide[1][0].dtype == torch.int64
    assert (wide[1][1][1:], wide[2]) == (("relu", None), 3)


@pytest.mark.parametrize(
    ("value", "oracle", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([NAN, INF, -INF], [NAN, INF, -INF], 0.0),
        ([NAN], [1.0], INF),
        ([1.0], [NAN], INF),
        ([INF], [-INF], INF),
        ([1e30], [INF], INF),
        ([], [], 0.0),
    ],
)
def test_max_error(value, oracle, error):
    assert max_error(T(value), T(oracle, dtype=torch.float64)) == error


def test_two_x_rule_allows_twice_eager_and_the_floor():
    oracle = torch.linspace(-4, 4, 9, dtype=torch.float64)
    eager = (oracle + 0.25).float()
    assert two_x_rule((oracle + 0.5).float(), eager, oracle, 1).ok
    assert not two_x_rule((oracle + 0.51).float(), eager, oracle, 1).ok
    eps = torch.finfo(torch.float32).eps
    exact = two_x_rule(oracle.float(), oracle.float(), oracle, 9)
    assert exact.eager_error == 0
    assert exact.allowed == pytest.approx(4 * (eps + 3 * eps))


def test_two_x_rule_is_not_loosened_by_a_broken_eager():
    oracle = torch.ones(3, dtype=torch.float64)
    check = two_x_rule(T([1.0, 1.0, 2.0]), T([1.0, NAN, 1.0]), oracle, 1)
    assert check.eager_error == INF
    assert not check.ok


def test_two_x_rule_where_the_oracle_is_not_finite():
    oracle = T([INF, NAN, 1.0], dtype=torch.float64)
    assert two_x_rule(oracle.float(), oracle.float(), oracle, 1).ok
    assert not two_x_rule(T([INF, 0.0, 1.0]), oracle.float(), oracle, 1).ok


def test_gradient_metrics():
    oracle = T([3.0, -4.0])
    assert gradient_metrics(oracle * 2, oracle).cosine == pytest.approx(1)
    assert gradient_metrics(T([4.0, 3.0]), oracle).cosine == pytest.approx(0)
    assert gradient_metrics(oracle + 0.5, oracle).bias == pytest.approx(0.5 / 3.5)
    assert gradient_metrics(torch.zeros(2), torch.zeros(2)) == (1.0, 0.0)
    assert gradient_metrics(torch.ones(2), torch.zeros(2)) == (0.0, INF)


def test_gradient_rule_sees_size_direction_and_drift():
    torch.manual_seed(0)
    oracle = torch.randn(10_000, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    noise = torch.randn(10_000, dtype=torch.float64) * eps / 4
    good = (oracle + noise).float()
    assert gradient_rule(good, oracle.float(), oracle, 1).ok
    assert not gradient_rule((oracle + noise * 100).float(), oracle.float(), oracle, 1).ok
    drifting = gradient_rule((oracle + eps).float(), oracle.float(), oracle, 1)
    assert drifting.error.ok  # small enough for every element
    assert abs(drifting.metrics.bias) > drifting.bias
    assert not drifting.ok


def test_optional_import_of_what_is_not_there():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        optional_import("no_such_package")


def test_optional_import_of_torchvision(torchvision):
    assert optional_import("torchvision") is torchvision
    assert torchvision.models.resnet18
