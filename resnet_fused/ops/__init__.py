"""The ops: one file each, defined once; :data:`OPS` is the one list of them."""

from resnet_fused.ops import (
    add_relu,
    avg_pool_linear,
    bn_act,
    bn_act_backward,
    bn_act_backward_apply,
    bn_act_backward_reduce,
    bn_act_conv_backward,
    bn_act_conv_backward_data,
    bn_act_conv_backward_weight,
    bn_act_conv_bn_stats,
    bn_act_max_pool,
    bn_act_max_pool_backward,
    bn_apply,
    bn_update_stats,
    channel_covariance,
    conv_backward_data,
    conv_backward_weight,
    conv_bn_act,
    conv_bn_act_conv_bn_act,
    conv_bn_act_max_pool,
    conv_bn_stats,
    dual_bn_act,
    dual_bn_act_backward_apply,
    dual_bn_act_backward_reduce,
    max_pool_backward,
    pointwise_bn_act,
    pointwise_bn_act_backward,
    pointwise_bn_gradients,
    pointwise_bn_stats,
    relu_conv_backward_data,
)
from resnet_fused.ops._op import Op
from resnet_fused.ops._register import register

#: Ops of inference, and of training with frozen BatchNorm.
INFERENCE: dict[str, Op] = {
    op.name: op
    for op in (
        conv_bn_act.OP,
        conv_bn_act_max_pool.OP,
        conv_bn_act_conv_bn_act.OP,
        bn_apply.OP,
        add_relu.OP,
        avg_pool_linear.OP,
    )
}

#: Ops of training with live BatchNorm: forward, then backward.
TRAINING: dict[str, Op] = {
    op.name: op
    for op in (
        conv_bn_stats.OP,
        bn_act_conv_bn_stats.OP,
        bn_act.OP,
        dual_bn_act.OP,
        pointwise_bn_act.OP,
        bn_act_max_pool.OP,
        channel_covariance.OP,
        pointwise_bn_stats.OP,
        bn_update_stats.OP,
        bn_act_backward.OP,
        bn_act_backward_reduce.OP,
        bn_act_backward_apply.OP,
        dual_bn_act_backward_reduce.OP,
        dual_bn_act_backward_apply.OP,
        bn_act_max_pool_backward.OP,
        max_pool_backward.OP,
        conv_backward_data.OP,
        relu_conv_backward_data.OP,
        conv_backward_weight.OP,
        bn_act_conv_backward.OP,
        bn_act_conv_backward_data.OP,
        bn_act_conv_backward_weight.OP,
        pointwise_bn_act_backward.OP,
        pointwise_bn_gradients.OP,
    )
}

#: Every op of the package, by name. Registration, tests, FLOP counts and benchmarks walk these
#: lists; a new op is added to one of the two and nowhere else.
OPS: dict[str, Op] = {**INFERENCE, **TRAINING}

for _op in OPS.values():
    register(_op)

__all__ = ["INFERENCE", "OPS", "TRAINING", "Op"]
