"""The bytes of a training step, counted without computing anything."""

import collections

import pytest
import torch

from benchmarks import traffic
from resnet_fused.roofline import DEVICES


@pytest.fixture(scope="module")
def steps() -> dict:
    return {
        fused: traffic.training_step("resnet50", 64, torch.bfloat16, fused=fused)
        for fused in (False, True)
    }


def moved(step: list) -> collections.Counter:
    found: collections.Counter = collections.Counter()
    for work in step:
        found[work.name] += work.nbytes
    return found


def test_a_forward_of_torch_s_layers_by_hand():
    """conv, BatchNorm and ReLU of the first layer: read, written, and read again."""
    step = traffic.training_step("resnet50", 2, torch.bfloat16, fused=False)
    first = next(work for work in step if work.name == "aten::convolution")
    image, out, weight = 2 * 3 * 224 * 224 * 2, 2 * 64 * 112 * 112 * 2, 64 * 3 * 49 * 2
    assert first.nbytes == image + weight + out
    assert first.flops == 2 * (2 * 64 * 112 * 112) * 3 * 49
    norm = next(work for work in step if work.name == "aten::native_batch_norm")
    assert norm.nbytes == pytest.approx(3 * out, abs=4096)
    assert next(work for work in step if work.name == "aten::relu_").nbytes == 2 * out


def test_fused_steps_multiply_as_much_and_move_less(steps):
    eager, fused = (sum(work.flops for work in steps[kind]) for kind in (False, True))
    assert eager == fused
    eager, fused = (sum(work.nbytes for work in steps[kind]) for kind in (False, True))
    assert fused < 0.75 * eager


def test_no_activation_within_a_block_is_written(steps):
    """All that reads one has it from the raw output in front."""
    names = moved(steps[True])
    assert not names.keys() & {"aten::relu_", "aten::native_batch_norm"}
    assert all(work.nbytes < 1e6 for work in steps[True] if work.name == "aten::add.Tensor")
    ends = 16
    assert sum(work.name.endswith(("::bn_act", "::dual_bn_act")) for work in steps[True]) == ends


def test_an_op_takes_the_longer_of_its_two_times():
    device = DEVICES["h200"]
    peak, bandwidth = device.flops[torch.bfloat16], device.bandwidth
    assert traffic.Work("", int(bandwidth), int(3 * peak)).seconds(device, torch.bfloat16) == 3
    assert traffic.Work("", int(2 * bandwidth), 0).seconds(device, torch.bfloat16) == 2


def test_ends_as_one_op_move_less_still():
    """The convolution's output, written once and read five times, of three in four bottlenecks."""
    by_name = [
        moved(traffic.training_step("resnet50", 64, torch.bfloat16, fused=True, ends=ends))
        for ends in (False, True)
    ]
    end = "resnet_fused::pointwise_bn_act"
    assert end not in by_name[0]
    assert {end, f"{end}_backward"} <= by_name[1].keys()
    assert sum(by_name[1].values()) < 0.9 * sum(by_name[0].values())
    same = [
        traffic.training_step("resnet34", 8, torch.bfloat16, fused=True, ends=ends)
        for ends in (False, True)
    ]
    assert same[0] == same[1]
