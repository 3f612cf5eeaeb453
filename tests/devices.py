"""Where the tensors of a backend's tests live, and what a GPU makes of float32 there."""

import contextlib

import torch

import resnet_fused as rf
from resnet_fused.backends import ORDER


def device_of(backend: str | None) -> str:
    """ "cuda" for a backend that does not take CPU tensors where there is a GPU, else "cpu"."""
    if backend not in ORDER or not torch.cuda.is_available():
        return "cpu"
    with rf.use_backend(backend):
        declined = ORDER[backend].supports("add_relu", torch.ones(1, 1, 1, 1))
    return "cuda" if declined else "cpu"


def moved(args: tuple, device: str) -> tuple:
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


@contextlib.contextmanager
def precision_of(kind: str):
    """Convolve float32 as TF32 for "tf32", and as it is for any other kind."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before
