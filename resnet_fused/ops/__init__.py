"""The ops: one file each, defined once; :data:`OPS` is the one list of them."""

from resnet_fused.ops import (
    add_relu,
    avg_pool_linear,
    bn_apply,
    conv_bn_act,
    conv_bn_act_max_pool,
)
from resnet_fused.ops._op import Op
from resnet_fused.ops._register import register

#: Every op of the package, by name. Registration, contract tests, FLOP counts and benchmarks
#: walk this list; a new op is added here and nowhere else.
OPS: dict[str, Op] = {
    op.name: op
    for op in (
        conv_bn_act.OP,
        conv_bn_act_max_pool.OP,
        bn_apply.OP,
        add_relu.OP,
        avg_pool_linear.OP,
    )
}

for _op in OPS.values():
    register(_op)

__all__ = ["OPS", "Op"]
