"""The models: :data:`MODELS` lists them, :func:`create_model` builds them.

They are plain modules; :func:`resnet_fused.fuse` makes them fast.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from resnet_fused.models.cifar import cifar_plain, cifar_resnet
from resnet_fused.models.plain import plain_net
from resnet_fused.models.resnet import basic_resnet, bottleneck_resnet
from resnet_fused.models.vgg import vgg

#: Every model's builder by name. The keyword arguments of a builder are the options of its model.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(basic_resnet, depths=(2, 2, 2, 2)),
    "resnet34": partial(basic_resnet, depths=(3, 4, 6, 3)),
    "resnet50": partial(bottleneck_resnet, depths=(3, 4, 6, 3)),
    "resnet101": partial(bottleneck_resnet, depths=(3, 4, 23, 3)),
    "resnet152": partial(bottleneck_resnet, depths=(3, 8, 36, 3)),
    "resnext50_32x4d": partial(bottleneck_resnet, depths=(3, 4, 6, 3), groups=32, group_width=4),
    "wide_resnet50_2": partial(bottleneck_resnet, depths=(3, 4, 6, 3), group_width=128),
    "plain18": partial(plain_net, depths=(2, 2, 2, 2)),
    "plain34": partial(plain_net, depths=(3, 4, 6, 3)),
    "vgg16": partial(vgg, depths=(2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, depths=(2, 2, 4, 4, 4)),
    "cifar_resnet20": partial(cifar_resnet, depth=3),
    "cifar_resnet32": partial(cifar_resnet, depth=5),
    "cifar_resnet44": partial(cifar_resnet, depth=7),
    "cifar_resnet56": partial(cifar_resnet, depth=9),
    "cifar_resnet110": partial(cifar_resnet, depth=18),
    "cifar_resnet1202": partial(cifar_resnet, depth=200),
    "cifar_plain20": partial(cifar_plain, depth=3),
    "cifar_plain32": partial(cifar_plain, depth=5),
    "cifar_plain44": partial(cifar_plain, depth=7),
    "cifar_plain56": partial(cifar_plain, depth=9),
}

#: What says "the model's own default"; accepted by every model, also by one without the option.
_DEFAULTS: dict[str, Any] = {"num_classes": None, "shortcut": None, "stride_in": "3x3"}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    shortcut: str | None = None,
    stride_in: str = "3x3",
) -> nn.Module:
    """Return the model ``name`` of :data:`MODELS` with freshly drawn weights, in training mode.

    The ResNets, ResNeXt, Wide ResNet and VGG nets have torchvision's names and shapes, so that its
    weights load strictly, and the other way round. He et al. (arXiv 1512.03385), table 1 and
    sections 3.3, 4.1, 4.2.

    Args:
        name: a key of :data:`MODELS`.
        num_classes: outputs; 1000 if left out, 10 for the CIFAR nets.
        shortcut: the shortcuts of a residual net: "A" (identity, zero-padded where channels are
            new, no parameters), "B" (projection where the shape changes), "C" (projections only);
            "B" if left out, "A" for the CIFAR nets, as in the paper.
        stride_in: the convolution of a bottleneck that has the stride: "3x3" (torchvision) or
            "1x1" (the paper).

    Raises:
        ValueError: the name is unknown, an option's value is not accepted, or the model does not
            have an option that was given.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5) or list(MODELS)
        raise ValueError(f"create_model: unknown name {name!r}; nearest: {', '.join(near)}")
    builder = MODELS[name]
    options: dict[str, Any] = {}
    known = inspect.signature(builder).parameters
    given = {"num_classes": num_classes, "shortcut": shortcut, "stride_in": stride_in}
    for option, value in given.items():
        if value == _DEFAULTS[option]:
            continue
        if option not in known:
            raise ValueError(
                f"create_model: {option}={value!r} is not accepted, {name} has no {option}; "
                f"accepted: {_DEFAULTS[option]!r}"
            )
        options[option] = value
    try:
        return builder(**options)
    except ValueError as error:
        raise ValueError(f"create_model: {name}: {error}") from None


__all__ = ["MODELS", "create_model"]
