"""The stateless public API. Each docstring gives the formula and the eager torch it equals."""

from __future__ import annotations

import inspect
from typing import Any

from resnet_fused.functional import _pairs
from resnet_fused.functional.inference import (
    add_relu,
    avg_pool_linear,
    bn_apply,
    conv_bn_act,
    conv_bn_act_conv_bn_act,
    conv_bn_act_max_pool,
)
from resnet_fused.functional.training import (
    bn_act,
    bn_act_conv_bn_stats,
    bn_act_max_pool,
    bn_update_stats,
    conv_bn_stats,
    dual_bn_act,
    pointwise_bn_act,
)
from resnet_fused.ops import OPS

#: The functions, by the name of their op.
PUBLIC = {
    function.__name__: function
    for function in (
        conv_bn_act, conv_bn_act_conv_bn_act, conv_bn_act_max_pool, bn_apply, add_relu,
        avg_pool_linear, conv_bn_stats, bn_act_conv_bn_stats, bn_act, dual_bn_act, pointwise_bn_act,
        bn_act_max_pool, bn_update_stats,
    )
}  # fmt: skip


def op_arguments(op: str, *args: Any) -> tuple[Any, ...]:
    """Return ``args`` as the op's schema takes them, defaults filled in, checked.

    Raises:
        ValueError: the op is unknown or the arguments do not fit together.
        TypeError: an argument has a dtype the op does not take, or there are too many or too few.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; accepted: {', '.join(OPS)}")
    names = list(inspect.signature(OPS[op].check).parameters)
    if len(args) > len(names):
        raise TypeError(f"{op} takes {len(names)} arguments ({', '.join(names)}), got {len(args)}")
    full = dict(zip(names, args, strict=False))
    defaults = inspect.signature(PUBLIC[op]).parameters if op in PUBLIC else {}
    for name in names[len(args) :]:
        if name not in defaults or defaults[name].default is inspect.Parameter.empty:
            raise TypeError(f"{op}: {name} must be given")
        full[name] = defaults[name].default
    given = {name: full[name] for name in names if op in PUBLIC and name in _pairs.NAMES}
    full.update(zip(given, _pairs.pairs(op, **given), strict=True))
    OPS[op].check(*full.values())
    return tuple(full.values())
