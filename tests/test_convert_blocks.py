"""Blocks that a careless matcher gets wrong: the answer stays the original's, and the report says.

Each entry of BLOCKS is a forward over the children of :class:`Base`, the patterns that are fused in
it, and words of the reason given for each convolution that is not.
"""

import copy
import operator
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from nets import assert_close, image, tensors
from torch import nn

import resnet_fused as rf
from resnet_fused.testing import max_error

CHANNELS = 8
RELU, ADD, PLAIN = "conv+bn+relu", "conv+bn+add+relu", "conv+bn"
SUM = "conv+bn+add"


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
            norm = nn.BatchNorm2d(CHANNELS)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            self.add_module(f"bn{i}", norm)
        self.relu = nn.ReLU(inplace=True)


class Case(NamedTuple):
    forward: Callable
    patterns: tuple[str, ...]
    reasons: tuple[str, ...]
    setup: Callable | None


BLOCKS: dict[str, Case] = {}


def block(*patterns: str, left: tuple[str, ...] = (), setup: Callable | None = None):
    """Enter a forward: the patterns fused in it, and the reasons for the convolutions it calls."""

    def enter(forward):
        BLOCKS[forward.__name__] = Case(forward, patterns, left, setup)
        return forward

    return enter


def make(name: str) -> nn.Module:
    case = BLOCKS[name]
    module = type(name, (Base,), {"forward": case.forward})()
    if case.setup is not None:
        case.setup(module)
    used = case.forward.__code__.co_names
    for i in (1, 2, 3):
        if f"conv{i}" not in used and hasattr(module, f"conv{i}"):
            delattr(module, f"conv{i}")
    return module


# --- sharing -------------------------------------------------------------------------------------


@block(RELU, RELU, ADD)
def relu_shared_three_times(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.relu(self.bn2(self.conv2(out)))
    out = self.bn3(self.conv3(out))
    out += x
    return self.relu(out)


@block(left=("2 readers",))
def conv_read_twice(self, x):
    y = self.conv1(x)
    return self.relu(self.bn1(y)) + y


@block(PLAIN)
def bn_read_twice(self, x):
    y = self.bn1(self.conv1(x))
    return F.relu(y) + y


@block(left=("BatchNorm is used at several places",) * 2)
def bn_called_twice(self, x):
    return self.relu(self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def _share_bn(self):
    self.bn2 = self.bn1


@block(left=("BatchNorm is used at several places",) * 2, setup=_share_bn)
def bn_under_two_names(self, x):
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


@block(PLAIN)
def one_conv_before_two_norms(self, x):
    return self.bn2(self.conv1(self.bn1(self.conv1(x))))


def _share_conv(self):
    self.conv2 = self.conv1


@block(left=("convolution is used at several places",), setup=_share_conv)
def conv_under_two_names(self, x):
    return self.bn2(self.conv2(self.bn1(self.conv1(x))))


# --- BatchNorm -----------------------------------------------------------------------------------


def _no_affine(self):
    self.bn1 = nn.BatchNorm2d(CHANNELS, affine=False)


@block(RELU, setup=_no_affine)
def bn_without_affine(self, x):
    return self.relu(self.bn1(self.conv1(x)))


def _no_statistics(self):
    self.bn1 = nn.BatchNorm2d(CHANNELS, track_running_stats=False)


@block(left=("keeps no running statistics",), setup=_no_statistics)
def bn_without_statistics(self, x):
    return self.relu(self.bn1(self.conv1(x)))


def _cumulative(self):
    self.bn1.momentum = None


@block(RELU, setup=_cumulative)
def bn_with_cumulative_average(self, x):
    return self.relu(self.bn1(self.conv1(x)))


class NoisyNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def _subclassed_norm(self):
    self.bn1 = NoisyNorm(CHANNELS)


@block(left=("no BatchNorm follows",), setup=_subclassed_norm)
def bn_subclass(self, x):
    return self.relu(self.bn1(self.conv1(x)))


# --- the add -------------------------------------------------------------------------------------


@block(PLAIN)
def in_place_add_whose_operand_is_used_again(self, x):
    y = self.bn1(self.conv1(x))
    z = y
    y += x
    return F.relu(y) + z


@block(PLAIN)
def in_place_add_into_the_input(self, x):
    x += self.bn1(self.conv1(x))
    return F.relu(x)


@block(PLAIN)
def in_place_add_into_a_residual_read_later(self, x):
    r = x * 2
    out = r
    out += self.bn1(self.conv1(x))
    return F.relu(out) + r


@block(ADD)
def add_into_a_fresh_residual(self, x):
    r = self.bn3(x)
    r += self.bn1(self.conv1(x))
    return F.relu(r)


@block(ADD)
def residual_that_broadcasts(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


@block(ADD)
def residual_larger_than_the_output(self, x):
    return self.relu(self.bn1(self.conv1(x)) + torch.stack((x, x)))


@block(ADD)
def residual_of_another_dtype(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x.double())


@block(PLAIN)
def residual_is_a_number(self, x):
    return self.relu(self.bn1(self.conv1(x)) + 0.5)


@block(PLAIN)
def add_with_alpha(self, x):
    return self.relu(torch.add(self.bn1(self.conv1(x)), x, alpha=2))


@block(PLAIN)
def added_to_itself(self, x):
    y = self.bn1(self.conv1(x))
    return self.relu(y + y)


@block(ADD, PLAIN)
def both_operands_end_groups(self, x):
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


@block(SUM, RELU)
def add_without_relu(self, x):
    return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))).add_(x)


@block(ADD)
def residual_on_the_left(self, x):
    return torch.relu_(operator.add(x, self.bn1(self.conv1(x))))


@block(ADD)
def residual_from_a_view(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x.transpose(2, 3))


# --- in-place operations elsewhere ---------------------------------------------------------------


@block(PLAIN)
def relu_in_place_on_a_tensor_read_twice(self, x):
    y = self.bn1(self.conv1(x))
    z = F.relu(y, inplace=True)
    return y + z


@block(PLAIN)
def residual_changed_between(self, x):
    r = self.bn3(x)
    y = self.bn1(self.conv1(r))
    r.mul_(2)
    return self.relu(y + r)


@block(left=("in-place operation stands between",))
def input_changed_between(self, x):
    r = self.bn3(x)
    y = self.conv1(r)
    r.mul_(2)
    return self.bn1(y)


@block(left=("in-place operation stands between",))
def input_changed_through_an_alias(self, x):
    r = self.bn3(x)
    alias = r.add_(1)
    y = self.conv1(alias)
    r.mul_(2)
    return self.bn1(y)


@block(left=("in-place operation stands between",))
def weight_changed_between(self, x):
    y = self.conv1(x)
    self.bn1.bias.data.add_(0.125)
    return self.bn1(y)


@block(PLAIN)
def relu_in_place_on_the_residual(self, x):
    r = self.bn3(x)
    y = self.bn1(self.conv1(r))
    s = self.relu(r)
    return y + r + s


# --- how modules are called ----------------------------------------------------------------------


@block(RELU, left=("positional argument",))
def modules_called_by_keyword(self, x):
    y = self.bn1(self.conv1(input=x))
    return self.relu(input=self.bn2(self.conv2(y)))


@block(RELU)
def optional_argument(self, x, scale=None):
    out = self.relu(self.bn1(self.conv1(x)))
    return out if scale is None else out * scale


@block(RELU)
def optional_keyword(self, x, *, double=False):
    out = self.relu(self.bn1(self.conv1(x)))
    return out * 2 if double else out


@block(RELU)
def another_way_in_training(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    if self.training:
        return out, out.mean()
    return out


@block(RELU, RELU)
def nested_outputs(self, x):
    first = self.relu(self.bn1(self.conv1(x)))
    second = F.relu(self.bn2(self.conv2(first)))
    return {"all": (first, [second, None]), "pooled": second[:, :, ::2, 1:].flatten(1)}


def _branches(self):
    self.branches = nn.ModuleList(
        nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)) for _ in range(2)
    )


@block(SUM, SUM, setup=_branches)
def loop_over_branches(self, x):
    out = x
    for branch in self.branches:
        out = out + branch(x)
    return out


def _chain(self):
    self.chain = nn.Sequential(self.conv1, self.bn1, nn.Identity(), self.relu)
    del self.conv1, self.bn1


@block(RELU, setup=_chain)
def identity_in_a_chain(self, x):
    return self.chain(x)


# --- forwards that no graph stands for -----------------------------------------------------------

TRACED = ("cannot be traced",)


@block(left=TRACED)
def control_flow_on_values(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    return out if out.sum() > 0 else -out


@block(left=TRACED)
def control_flow_on_types(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    return out * 2 if isinstance(x, torch.Tensor) else out


@block(left=TRACED)
def writes_an_attribute(self, x):
    self.last = self.relu(self.bn1(self.conv1(x)))
    return self.last


def _log(self):
    self.log = []


@block(left=TRACED, setup=_log)
def appends_to_a_list(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    self.log.append(out)
    return out


def _counter(self):
    self.register_buffer("calls", torch.zeros(()))


@block(RELU, setup=_counter)
def counts_in_a_buffer(self, x):
    self.calls.add_(1)
    return self.relu(self.bn1(self.conv1(x))) * self.calls


def _hidden_counter(self):
    self.calls = torch.zeros(())


@block(left=TRACED, setup=_hidden_counter)
def counts_in_a_tensor(self, x):
    self.calls.add_(1)
    return self.relu(self.bn1(self.conv1(x))) * self.calls


@block(left=TRACED)
def draws_random_numbers(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    return out if random.random() < 0.5 else -out


@block(left=TRACED)
def takes_any_arguments(self, *args):
    return self.relu(self.bn1(self.conv1(args[0])))


# --- convolutions --------------------------------------------------------------------------------


def _padding(value, mode="zeros"):
    def setup(self):
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=value, padding_mode=mode)

    return setup


@block(left=("padding is 'same'",), setup=_padding("same"))
def padding_same(self, x):
    return self.relu(self.bn1(self.conv1(x)))


@block(RELU, setup=_padding("valid"))
def padding_valid(self, x):
    return self.relu(self.bn1(self.conv1(x)))


@block(left=("padding_mode is 'reflect'",), setup=_padding(1, "reflect"))
def padding_reflect(self, x):
    return self.relu(self.bn1(self.conv1(x)))


@block(RELU, setup=_padding(1))
def conv_with_bias(self, x):
    return self.relu(self.bn1(self.conv1(x)))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def _subclassed_conv(self):
    self.conv1 = Scaled(CHANNELS, CHANNELS, 3)


@block(left=("Scaled is a subclass",), setup=_subclassed_conv)
def conv_subclass(self, x):
    return self.relu(self.bn1(self.conv1(x)))


def _weight_norm(self):
    nn.utils.parametrizations.weight_norm(self.conv1)


@block(left=("is a subclass",), setup=_weight_norm)
def weight_norm(self, x):
    return self.relu(self.bn1(self.conv1(x)))


def _spectral_norm(self):
    nn.utils.parametrizations.spectral_norm(self.conv1)


@block(left=("is a subclass",), setup=_spectral_norm)
def spectral_norm(self, x):
    return self.relu(self.bn1(self.conv1(x)))


def _old_spectral_norm(self):
    nn.utils.spectral_norm(self.conv1)


@block(left=("has hooks",), setup=_old_spectral_norm)
def spectral_norm_by_hook(self, x):
    return self.relu(self.bn1(self.conv1(x)))


@block(left=("no BatchNorm follows", "no BatchNorm follows"))
def no_batch_norm(self, x):
    return self.relu(self.conv1(x)), F.batch_norm(self.conv2(x), None, None, training=True)


@block(PLAIN, left=("no forward that could be traced calls it",))
def conv_that_nobody_calls(self, x):
    assert self.conv2 is not None
    return self.bn1(self.conv1(x))


# --- the tests -----------------------------------------------------------------------------------

each_block = pytest.mark.parametrize("name", BLOCKS)


@each_block
def test_eval_output_is_the_original_s(name):
    model = make(name).eval()
    fused, twin = rf.fuse(model), copy.deepcopy(model).double()
    x = image(2, CHANNELS, 6, 6)
    inputs = [x.clone(), x.clone(), x.double()]
    with torch.no_grad():
        for _ in range(2):  # twice: what a forward keeps, it keeps
            random.seed(5)
            eager = model(inputs[0])
            random.seed(5)
            value = fused(inputs[1])
            random.seed(5)
            oracle = twin(inputs[2])
    reduced = 3 * CHANNELS * 9
    assert_close(value, eager, oracle, reduced)
    assert_close(inputs[1], inputs[0], inputs[2], reduced)  # what is written into the input
    for v, e in zip(tensors(fused.state_dict()), tensors(model.state_dict()), strict=True):
        assert torch.equal(v, e)
    if not BLOCKS[name].patterns:
        assert all(map(torch.equal, tensors(value), tensors(eager)))


@each_block
def test_training_is_the_original_s(name):
    model = make(name).train()
    fused = rf.fuse(model)
    results, gradients, errors = [], [], {}
    for kind, m in (("eager", model), ("fused", fused)):
        random.seed(5)
        torch.manual_seed(5)
        x = image(2, CHANNELS, 6, 6).requires_grad_()
        outputs = tensors(m(x * 1))
        results.append([*outputs, *m.state_dict().values()])
        try:
            torch.stack([(y * y).sum() for y in outputs]).sum().backward()
        except RuntimeError as error:  # some write over what autograd has saved
            errors[kind] = str(error)
        gradients.append([p.grad for p in (x, *m.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # The fused ops save less: what the original cannot differentiate they sometimes can.
    assert errors.keys() != {"fused"}, errors
    for a, b in zip(*gradients, strict=True) if not errors else ():
        assert (a is None) == (b is None)
        if a is not None:
            assert max_error(a, b) <= 1e-3 * max(1.0, float(b.abs().max()))


@each_block
def test_report(name):
    case = BLOCKS[name]
    report = rf.fusion_report(rf.fuse(make(name)))
    assert sorted(group.pattern for group in report.fused) == sorted(case.patterns)
    assert len(report.skipped) == len(case.reasons), report
    for entry, words in zip(report.skipped, case.reasons, strict=True):
        assert words in entry.reason
        assert entry.name in str(report)


@each_block
def test_fuse_leaves_the_model_as_it_was(name):
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {k: copy.copy(v) for k, v in model.__dict__.items() if not k.startswith("_")}
    state = random.getstate(), torch.get_rng_state()
    fused = rf.fuse(model)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    for m in (model, fused, rf.unfuse(fused)):
        now = m.state_dict()
        assert list(now) == list(before)
        assert all(torch.equal(now[k], before[k]) for k in before)
        assert all(str(m.__dict__[k]) == str(v) for k, v in attributes.items())
    assert type(model) is type(fused)
