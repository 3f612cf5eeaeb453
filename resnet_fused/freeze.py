"""The verb ``freeze``: a model as an inference engine for given input shapes."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backends import _derived
from resnet_fused.convert import fuse
from resnet_fused.engine.capture import capture
from resnet_fused.engine.constancy import capture_for_any_values
from resnet_fused.engine.graph import graphs_on
from resnet_fused.engine.plan import Plan
from resnet_fused.nn.bn import BATCH_NORMS
from resnet_fused.nn.fused import program_of
from resnet_fused.ops._checks import FLOAT_DTYPES

#: Plans kept per frozen module; the one unused for longest goes first.
MAX_PLANS = 8

#: Tracing patches torch itself, so one thread of the process makes plans at a time.
_planning = threading.RLock()


def freeze(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    graphs: bool = True,
) -> FrozenModule:
    r"""Turn a model into an inference engine: weights packed, buffers planned and reused.

    .. math:: y = \mathrm{relu}(\mathrm{conv}(x, W) \cdot \mathrm{scale} + \mathrm{shift} + r)

    The model is copied, fused and run once on the example; from then on its calls are a fixed list
    over one block of memory. BatchNorm stays a float32 scale and shift in the convolutions'
    epilogue, at any ``dtype``, so that nothing is lost by folding. Later changes of ``model`` do
    not reach the engine. Forward hooks run while a plan is made, so that what they do to tensors
    is kept, and never again, as an engine calls no modules: a warning names who has some.

    The first plan is made from two runs, the second on other values, so that what only the
    example's own can answer is refused: results or values that leave tensors, and numbers drawn
    outside of torch.

    An input of another batch or image size gets a plan of its own on first sight (the last
    ``MAX_PLANS`` shapes are kept). Results are the caller's own. Calls from several threads are
    right, one after another per shape.

    On a CUDA GPU each plan is recorded as a CUDA graph, and its calls are replays on the caller's
    current stream, one after another on the device whatever the streams are. What cannot be
    recorded runs call by call; ``print(engine)`` says why. So it does inside a graph of the
    caller's, for shapes that were called before: that graph needs the engine to live on. While a
    plan is made, no other thread may synchronise the device or draw its random numbers.

    Args:
        model: a module in eval mode that takes one (N, C, H, W) tensor.
        example_input: floating point, as the model will see it; its layout does not matter.
        dtype: compute in this dtype instead of the example's: float32, bfloat16, float16 or
            float64. The engine then takes inputs of either dtype and returns this one.
        graphs: record CUDA graphs, on a CUDA GPU; False: call by call there, on any stream.

    Returns:
        A module without parameters. It cannot be trained or moved; it can be copied and pickled.

    Raises:
        TypeError: ``model`` is no module, ``example_input`` no floating point tensor, ``dtype``
            not one of the four, or the result has other things in it than tensors and constants.
        ValueError: ``example_input`` is not (N, C, H, W) or on another device; ``model`` is in
            training mode, has no convolution, is frozen already, branches on values, writes its
            own buffers, or answers with constants that are the example's or of one call.
    """
    _check_arguments(model, example_input, dtype)
    _warn_of_hooks(model)
    dtype = dtype or example_input.dtype
    # Tensors made in inference mode count no versions and cannot be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        source = fuse(model)
        _cast(source, dtype)
    frozen = FrozenModule(source, example_input, dtype, graphs)
    frozen.plan(example_input)
    return frozen


def _check_arguments(model: Any, example: Any, dtype: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    if any(isinstance(m, FrozenModule) for m in model.modules()):
        raise ValueError("freeze: model is frozen already, or a part of it: freeze the original")
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"freeze: model must be in eval mode, {where} in training mode: call "
                         "model.eval() first")  # fmt: skip
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = getattr(example, "dtype", type(example).__name__)
        raise TypeError(f"freeze: example_input must be a floating point tensor, got {got}")
    if example.dim() != 4:
        raise ValueError(
            "freeze: example_input must have 4 dimensions (N, C, H, W), "
            f"got {example.dim()}: {tuple(example.shape)}"
        )
    if dtype not in (None, *FLOAT_DTYPES) or example.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(map(str, FLOAT_DTYPES))
        raise TypeError(
            f"freeze: dtype and example_input.dtype must be one of {accepted}, "
            f"got {dtype} and {example.dtype}"
        )
    elsewhere = {str(p.device) for p in model.parameters() if p.device != example.device}
    if elsewhere:
        raise ValueError(f"freeze: example_input must be on the model's device "
                         f"{', '.join(sorted(elsewhere))}, got {example.device}")  # fmt: skip


def _warn_of_hooks(model: nn.Module) -> None:
    """Warn of hooks, whose effects beside tensors end; those of torch itself have none."""
    hooked = [
        name or "the model itself"
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not str(getattr(hook, "__module__", "")).startswith("torch.nn.")
    ]
    if hooked:
        names = ", ".join(dict.fromkeys(hooked))
        warnings.warn(
            f"freeze: the forward hooks of {names} run while a plan is made, so that what they do "
            "to tensors is kept, and not when the engine is called: remove those that observe",
            UserWarning,
            stacklevel=3,
        )


class FrozenModule(nn.Module):
    """What :func:`freeze` returns: call it with a tensor, inference only."""

    def __init__(
        self, source: nn.Module, example: Tensor, dtype: torch.dtype, graphs: bool
    ) -> None:
        super().__init__()
        # Past nn.Module's registration: the engine has no parameters and no submodules.
        self.__dict__["_source"] = source.requires_grad_(False)
        self._dtypes = (dtype, example.dtype)
        self._device = example.device
        self._shape = tuple(example.shape)
        self._records = graphs
        self.training = False
        self._reset()

    def _reset(self) -> None:
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._graphs = graphs_on(self._device, self._records)
        # Not where the function stands: it loads the compiler, and importing is free.
        self._run_uncompiled = torch.compiler.disable(self._run)

    def forward(self, x: Tensor) -> Any:
        """Run the engine on ``x``; inside ``torch.compile`` it stays a call of its own.

        Raises:
            TypeError: ``x`` is not a tensor of a dtype the engine was frozen for.
            ValueError: ``x`` has another rank, channel count or device.
            RuntimeError: torch is tracing or exporting, which cannot see the kernels; or the
                caller is recording a CUDA graph, and there is no plan yet for x's shape.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                "frozen module: cannot be traced or exported, as its kernels run outside torch; "
                "trace the model it was made from"
            )
        self._check(x)
        return self._run_uncompiled(x)

    @torch.no_grad()
    def _run(self, x: Tensor) -> Any:
        with torch.autocast(self._device.type, enabled=False):
            if self._graphs is not None and self._graphs.capturing():
                with _derived.constant():  # the graph needs the engine to live on
                    return self._plan_for_a_graph(x).run_steps(x)
            return self.plan(x).run(x)

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

    def plan(self, x: Tensor) -> Plan:
        """Return the plan for inputs like ``x``, made now if there is none."""
        shape = tuple(x.shape)
        plan = self._plans.get(shape)
        if plan is None:
            with _planning:
                plan = self._plans.get(shape) or self._make_plan(x)
                self._plans[shape] = plan
                self._drop_plans()
        return plan

    def _drop_plans(self) -> None:
        idle = [shape for shape, plan in self._plans.items() if not plan.pinned]
        idle.sort(key=lambda shape: self._plans[shape].last_use, reverse=True)
        for shape in idle[MAX_PLANS:]:
            del self._plans[shape]

    def _plan_for_a_graph(self, x: Tensor) -> Plan:
        """Return a plan whose calls the caller is recording; its constants stay from now on."""
        with _planning:
            plan = self._plans.get(tuple(x.shape))
            if plan is None:
                raise RuntimeError(
                    f"frozen module: has no plan for x of shape {tuple(x.shape)}, and none can be "
                    "made while a CUDA graph is being recorded: call it once before, as a warm-up"
                )
            plan.pinned = True
            return plan

    def _make_plan(self, x: Tensor) -> Plan:
        devices = [] if x.device.type == "cpu" else [x.device]
        with (
            # Outside inference mode, as the plan's tensors could not be written to outside later.
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(x.device.type, enabled=False),
            torch.random.fork_rng(devices),
        ):
            example = torch.empty(
                x.shape, dtype=self._dtypes[0], device=x.device, memory_format=torch.channels_last
            )
            example.copy_(x)
            # Once: of further shapes the forward is the same, and a run takes seconds.
            record = capture if self._plans else capture_for_any_values
            return Plan(record(self.__dict__["_source"], example), example, self._graphs)

    def extra_repr(self) -> str:
        """Return what the engine was frozen for and what it keeps."""
        plans = dict(self._plans)
        shapes = ", ".join(map(str, plans))
        kept = sum(plan.nbytes for plan in plans.values()) / 2**20
        text = f"{self._dtypes[0]}, planned for {shapes}: {kept:.1f} MiB of buffers"
        if self._graphs is None or not self._graphs.records:
            return text
        reasons = [f"{shape}: {p.ungraphed}" for shape, p in plans.items() if p.ungraphed]
        text += f", CUDA graphs: {len(plans) - len(reasons)}"
        return "\n".join([text, *(f"no CUDA graph for {reason}" for reason in reasons)])

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
        made = ("_plans", "_graphs", "_run_uncompiled")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state over."""
        super().__setstate__(state)
        self._reset()


def _fused_norms(model: nn.Module) -> set[nn.Module]:
    programs = [(module, program_of(module)) for module in model.modules()]
    return {
        module.get_submodule(program.children[call.bn].name)
        for module, program in programs
        if program is not None
        for call in program.fused
    }


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all but BatchNorm, whose statistics 16 bits may not hold."""
    fused = _fused_norms(model)
    for module in model.modules():
        # torch's own BatchNorm takes 16 bits beside float32 statistics, a detection model's not.
        keep = isinstance(module, BATCH_NORMS) or module in fused
        wanted = torch.float32 if keep and dtype != torch.float64 else dtype
        for store in (module._parameters, module._buffers):
            for tensor in store.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(wanted)
