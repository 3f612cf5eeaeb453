"""The verb ``freeze``: a model as an inference engine for given input shapes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.convert import fuse
from resnet_fused.engine.capture import capture
from resnet_fused.engine.plan import Plan
from resnet_fused.nn.bn import is_batch_norm
from resnet_fused.ops._checks import FLOAT_DTYPES

#: Plans kept per frozen module; the one unused for longest goes first.
MAX_PLANS = 8


def freeze(
    model: nn.Module, example_input: Tensor, *, dtype: torch.dtype | None = None
) -> FrozenModule:
    r"""Turn a model into an inference engine: weights packed, buffers planned and reused.

    .. math:: y = \mathrm{relu}(\mathrm{conv}(x, W) \cdot \mathrm{scale} + \mathrm{shift} + r)

    The model is copied, fused and run once on the example; from then on its calls are a fixed list
    over one block of memory. BatchNorm stays a float32 scale and shift in the convolutions'
    epilogue, at any ``dtype``, so that nothing is lost by folding. Later changes of ``model`` do
    not reach the engine.

    An input of another batch or image size gets a plan of its own on first sight (the last
    ``MAX_PLANS`` shapes are kept). Results are the caller's own. Calls from several threads are
    right, one after another per shape.

    Args:
        model: a module in eval mode that takes one (N, C, H, W) tensor.
        example_input: floating point, as the model will see it; its layout does not matter.
        dtype: compute in this dtype instead of the example's: float32, bfloat16, float16 or
            float64. The engine then takes inputs of either dtype and returns this one.

    Returns:
        A module without parameters. It cannot be trained or moved; it can be copied and pickled.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` no floating point tensor, or ``dtype``
            not one of the four.
        ValueError: ``model`` is in training mode, has no convolution, or branches on values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"freeze: model must be in eval mode, {where} in training mode: call "
                         "model.eval() first")  # fmt: skip
    if not isinstance(example_input, Tensor) or not example_input.is_floating_point():
        got = getattr(example_input, "dtype", type(example_input).__name__)
        raise TypeError(f"freeze: example_input must be a floating point tensor, got {got}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        accepted = ", ".join(map(str, FLOAT_DTYPES))
        raise TypeError(f"freeze: dtype must be None or one of {accepted}, got {dtype!r}")
    source = fuse(model)
    _cast(source, dtype or example_input.dtype)
    frozen = FrozenModule(source, example_input, dtype or example_input.dtype)
    frozen(example_input)
    return frozen


class FrozenModule(nn.Module):
    """What :func:`freeze` returns: call it with a tensor, inference only."""

    def __init__(self, source: nn.Module, example: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        # Past nn.Module's registration: the engine has no parameters and no submodules.
        self.__dict__["_source"] = source.requires_grad_(False)
        self._dtypes = (dtype, example.dtype)
        self._device = example.device
        self._shape = tuple(example.shape)
        self._plans: OrderedDict[tuple[int, ...], Plan] = OrderedDict()
        self.training = False

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """Run the engine on ``x``.

        Raises:
            TypeError: ``x`` is not a tensor of a dtype the engine was frozen for.
            ValueError: ``x`` has another rank, channel count or device.
        """
        self._check(x)
        with torch.autocast(self._device.type, enabled=False):
            return self._plan(x).run(x)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype not in self._dtypes:
            accepted = " or ".join(str(d) for d in dict.fromkeys(self._dtypes))
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"frozen module: x must be a tensor of {accepted}, got {got}")
        if x.device != self._device:
            raise ValueError(f"frozen module: x must be on {self._device}, got {x.device}")
        if x.dim() != len(self._shape) or x.shape[1] != self._shape[1]:
            raise ValueError(
                f"frozen module: x must be like the example {self._shape} in rank and channels, "
                f"got {tuple(x.shape)}"
            )

    def _plan(self, x: Tensor) -> Plan:
        shape = tuple(x.shape)
        plan = self._plans.get(shape)
        if plan is None:
            # Planned outside inference mode, as its tensors could not be written to outside later.
            with torch.inference_mode(False), torch.no_grad():
                example = torch.empty(
                    shape, dtype=self._dtypes[0], device=x.device,
                    memory_format=torch.channels_last,
                )  # fmt: skip
                example.copy_(x)
                plan = Plan(capture(self.__dict__["_source"], example), example)
            self._plans[shape] = plan
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(shape)
        return plan

    def extra_repr(self) -> str:
        """Return what the engine was frozen for and what it keeps."""
        shapes = ", ".join(str(shape) for shape in self._plans)
        kept = sum(plan.nbytes for plan in self._plans.values()) / 2**20
        return f"{self._dtypes[0]}, planned for {shapes}: {kept:.1f} MiB of buffers"

    def train(self, mode: bool = True) -> FrozenModule:
        """Refuse training mode: BatchNorm is a constant here."""
        if mode:
            raise ValueError("frozen module: inference only; train the model and freeze it again")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModule:
        raise RuntimeError(
            "frozen module: cannot be moved or cast; move the model and freeze it again"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the plans: they are made again on first use."""
        return {**self.__dict__, "_plans": OrderedDict()}


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all but BatchNorm, whose statistics 16 bits may not hold."""
    for module in model.modules():
        keep = is_batch_norm(module) and dtype != torch.float64
        wanted = torch.float32 if keep else dtype
        for store in (module._parameters, module._buffers):
            for tensor in store.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(wanted)
