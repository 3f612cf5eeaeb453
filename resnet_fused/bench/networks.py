"""The networks under test: seeded weights, BN statistics from the photographs, float64 answers."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_fused.testing import longest_sum

CALIBRATION_BATCH = 8
CALIBRATION_PASSES = 2
#: Images whose float64 answers are worked out: a float64 ResNet-152 takes a second an image.
CHECKED = 2


@dataclass(frozen=True)
class Network:
    """A calibrated float32 network in eval mode, with what the report says about it.

    `checked` are the few photographs whose answers are known, `answers` the logits of the same
    weights in float64 on them, `reduced` the most terms that one output of a layer sums.
    """

    name: str
    model: nn.Module
    macs: int
    params: int
    reduced: int
    checked: Tensor
    answers: Tensor


def build(name: str, crops: Tensor, *, seed: int) -> Network:
    """Return network `name` with He-initialised weights and statistics calibrated on `crops`."""
    from resnet_fused.flops import count
    from resnet_fused.models import create_model

    torch.manual_seed(seed)
    model = create_model(name)
    counted = count(model, (1, *crops.shape[1:]))
    calibrate(model, crops)
    first = crops[:CHECKED]
    return Network(
        name=name,
        model=model,
        macs=counted.macs,
        params=counted.params,
        reduced=longest_sum(model),
        checked=first,
        answers=float64_answers(model, first),
    )


def calibrate(model: nn.Module, crops: Tensor) -> None:
    """Set the BN statistics to those of the activations of `crops`; leave the model in eval mode.

    Random weights with the initial statistics (mean 0, variance 1) would let activations grow from
    block to block until nothing about them is realistic. Only BN is put in train mode, so that
    dropout draws nothing. `momentum=None` averages over the passes with equal weight.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for part in crops.split(CALIBRATION_BATCH)[:CALIBRATION_PASSES]:
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def float64_answers(model: nn.Module, crops: Tensor) -> Tensor:
    """Return the float64 logits of the same weights on `crops`."""
    with torch.inference_mode():
        answers: Tensor = copy.deepcopy(model).double()(crops.double())
    return answers
