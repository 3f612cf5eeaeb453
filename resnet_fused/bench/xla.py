"""JAX as a peer: a torch network's eval forward said again in `jax.numpy`, compiled by XLA."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from resnet_fused.bench.contenders import Runner, Setup

#: Layout of activations and weights: XLA's own preference on CPUs and GPUs.
LAYOUT = ("NHWC", "HWIO", "NHWC")


def jax_peer(setup: Setup) -> Runner:
    """`jax.jit` of the whole network on constants, so that XLA folds and fuses as it likes.

    Raises:
        NotImplementedError: the network has an op that is not said here.
        ValueError: others run on fewer threads than JAX, which takes every core it may use.
    """
    import jax
    import jax.numpy as jnp

    cores = len(os.sched_getaffinity(0))
    if setup.threads != cores:
        raise ValueError(f"jax: runs on all {cores} cores, not on {setup.threads} threads")
    kind = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}
    dtype = kind[setup.dtype]
    forward = jax.jit(_Forward(setup.model, dtype))
    return Runner(
        prepare=lambda crops: jnp.asarray(crops.permute(0, 2, 3, 1).numpy(), dtype),
        run=lambda pixels: forward(pixels).block_until_ready(),
        read=_read,
    )


def _read(result: Any) -> Tensor:
    import numpy as np

    values = torch.from_numpy(np.array(result, dtype=np.float32))
    return values.permute(0, 3, 1, 2) if values.dim() == 4 else values


class _Forward:
    """Runs the graph of a traced network, node by node, on JAX's arrays."""

    def __init__(self, model: nn.Module, dtype: Any) -> None:
        self._model, self._dtype = model, dtype
        self._graph = fx.symbolic_trace(model).graph

    def __call__(self, pixels: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                values[node] = pixels
                continue
            args = [values[a] if isinstance(a, fx.Node) else a for a in node.args]
            if node.op == "output":
                return args[0]
            values[node] = self._run(node, args)
        raise NotImplementedError("jax: a network without a result")

    def _run(self, node: fx.Node, args: list[Any]) -> Any:
        if node.op == "get_attr":
            constant = getattr(self._model, str(node.target))
            return self._array(constant.permute(0, 2, 3, 1))
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            for kind, say in MODULES.items():
                if isinstance(module, kind):
                    return say(self._array, module, args[0])
        if node.op == "call_function" and node.target in FUNCTIONS:
            return FUNCTIONS[node.target](*args)
        raise NotImplementedError(f"jax: {node.target} is not said here")

    def _array(self, tensor: Tensor, *, wide: bool = False) -> Any:
        import jax.numpy as jnp

        dtype = jnp.float32 if wide else self._dtype
        return jnp.asarray(tensor.detach().float().cpu().numpy(), dtype)


def _conv(array: Callable[..., Any], conv: Any, x: Any) -> Any:
    from jax import lax

    weight = array(conv.weight.permute(2, 3, 1, 0))
    y = lax.conv_general_dilated(
        x, weight, conv.stride, [(p, p) for p in conv.padding], rhs_dilation=conv.dilation,
        dimension_numbers=LAYOUT, feature_group_count=conv.groups,
    )  # fmt: skip
    return y if conv.bias is None else y + array(conv.bias)


def _bn(array: Callable[..., Any], bn: Any, x: Any) -> Any:
    import jax.numpy as jnp

    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    wide = x.astype(jnp.float32) * array(scale, wide=True) + array(shift, wide=True)
    return wide.astype(x.dtype)


def _max_pool(array: Callable[..., Any], pool: Any, x: Any) -> Any:
    import jax.numpy as jnp
    from jax import lax

    k, s, p = ((v, v) if isinstance(v, int) else v for v in
               (pool.kernel_size, pool.stride, pool.padding))  # fmt: skip
    padding = [(0, 0), *((n, n) for n in p), (0, 0)]
    least = jnp.array(-jnp.inf, x.dtype)
    return lax.reduce_window(x, least, lax.max, (1, *k, 1), (1, *s, 1), padding)


def _linear(array: Callable[..., Any], linear: Any, x: Any) -> Any:
    return x @ array(linear.weight.t()) + array(linear.bias)


def _relu(x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.maximum(x, jnp.zeros((), x.dtype))  # keeps NaN, as torch does


def _flatten(x: Any, *args: Any) -> Any:
    # Behind a mean over all pixels, so that the order of channels and pixels does not matter.
    return x.reshape(x.shape[0], -1)


MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _bn,
    nn.ReLU: lambda array, module, x: _relu(x),
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: lambda array, module, x: x.mean((1, 2), keepdims=True),
    nn.Flatten: lambda array, module, x: _flatten(x),
    nn.Linear: _linear,
    nn.Identity: lambda array, module, x: x,
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: operator.add,
    operator.iadd: operator.add,
    torch.add: operator.add,
    torch.relu: _relu,
    torch.flatten: _flatten,
}
