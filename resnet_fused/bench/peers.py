"""Other ways to run the same network: Inductor, ONNX Runtime, OpenVINO, JAX, cuDNN's fused calls.

Imported only when asked for; they come with the extra `bench-peers`. All are held to the same
number of threads and checked against the same float64 answers.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.bench.contenders import Build, Runner, Setup, own_copy, torch_runner
from resnet_fused.bench.cudnn import cudnn_peer
from resnet_fused.bench.options import UsageError, one_of
from resnet_fused.bench.xla import jax_peer


@dataclass(frozen=True)
class Peer:
    """A competitor: how it is built, the modules it needs, the dtypes and devices it runs."""

    build: Build
    needs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]
    #: What pip is to be given.
    install: str = '"resnet_fused[bench-peers]"'

    def declines(self, dtype: torch.dtype, device: str) -> str | None:
        """Return why it does not take part in a case, or None where it does."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if dtype not in self.dtypes:
            names = ", ".join(str(accepted).removeprefix("torch.") for accepted in self.dtypes)
            return f"runs {names} only"
        return None


def eager_nchw(setup: Setup) -> Runner:
    """Plain torch in its default layout, which most programs run in."""
    model = copy.deepcopy(setup.model).to(device=setup.device, dtype=setup.dtype)

    def prepare(crops: Tensor) -> Tensor:
        return crops.to(device=setup.device, dtype=setup.dtype).contiguous()

    return Runner(prepare, model, torch.clone)


def inductor(mode: str | None = None, *, freezing: bool = False) -> Build:
    """`torch.compile` in one of its modes, with its weights frozen into the code or not."""

    def build(setup: Setup) -> Runner:
        import torch._inductor.config as config

        module = torch.compile(own_copy(setup), dynamic=False, mode=mode)
        runner = torch_runner(module, setup)
        # It compiles here, and never again: freezing is read when it does, and its own option
        # `options={"freezing": True}` is ignored (torch 2.13).
        with config.patch(freezing=freezing), torch.inference_mode():
            runner.run(runner.prepare(setup.example))
        return runner

    return build


def onnxruntime(setup: Setup) -> Runner:
    """ONNX Runtime's CPU provider with all of its graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = setup.threads
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(_exported(setup), options, providers=providers)
    name = session.get_inputs()[0].name
    return Runner(
        prepare=_as_numpy,
        run=lambda pixels: session.run(None, {name: pixels}),
        read=lambda outputs: torch.from_numpy(outputs[0].copy()),
    )


def openvino(setup: Setup) -> Runner:
    """OpenVINO's CPU plugin, set for latency, inputs and outputs shared instead of copied."""
    import openvino as ov

    core = ov.Core()
    precision = "bf16" if setup.dtype is torch.bfloat16 else "f32"
    compiled = core.compile_model(
        core.read_model(_exported(setup)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": setup.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    return Runner(
        prepare=_as_numpy,
        run=lambda pixels: request.infer({0: pixels}, share_inputs=True, share_outputs=True),
        read=lambda outputs: torch.from_numpy(outputs[0].copy()),
    )


_ONNX = ("onnx", "onnxscript")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ANYWHERE = ("cpu", "cuda")
PEERS = {
    "inductor": Peer(inductor(freezing=True), (), _FLOATS, _ANYWHERE),
    "onnxruntime": Peer(onnxruntime, (*_ONNX, "onnxruntime"), (torch.float32,), ("cpu",)),
    "openvino": Peer(openvino, (*_ONNX, "openvino"), (torch.float32, torch.bfloat16), ("cpu",)),
    "inductor-default": Peer(inductor(), (), _FLOATS, _ANYWHERE),
    # Without CUDA graphs of its own: either all contenders are captured or none.
    "inductor-max-autotune": Peer(
        inductor("max-autotune-no-cudagraphs", freezing=True), (), _FLOATS, _ANYWHERE
    ),
    "eager-nchw": Peer(eager_nchw, (), _FLOATS, _ANYWHERE),
    "cudnn": Peer(cudnn_peer, (), _FLOATS, ("cuda",)),
    "jax": Peer(jax_peer, ("jax",), (torch.float32, torch.bfloat16), ("cpu",), "jax"),
}


#: What might be expected among the peers on a GPU, and why it is not.
NO_PEERS = {
    "apex": "its Bottleneck freezes BatchNorm without its epsilon and strides in the first 1x1: "
    "another function than a ResNet's strided blocks",
    "cudnn-frontend": "what it would call of cuDNN, the peer cudnn calls through torch",
}


def usable_peers(option: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names if each is a peer and installed, or raise `UsageError`."""
    for name in names:
        if name in NO_PEERS:
            raise UsageError(f"{option}: {name} is no peer: {NO_PEERS[name]}")
        if reason := absence(one_of(option, name, PEERS)):
            raise UsageError(f"{option}: {name} {reason}")
    return tuple(names)


def absence(name: str) -> str | None:
    """Return why a peer cannot run in this environment, or None where it can."""
    missing = [need for need in PEERS[name].needs if not _found(need)]
    if not missing:
        return None
    needed = ", ".join(missing)
    return f"needs {needed}, not installed here: pip install {PEERS[name].install}"


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _as_numpy(crops: Tensor) -> Any:
    return crops.contiguous().numpy()


def _exported(setup: Setup) -> Path:
    """Export the float32 model for the batch size, once a job, and return the ONNX file."""
    path = setup.scratch / f"{setup.name}-{len(setup.example)}.onnx"
    if not path.exists():
        # The exporter tells about its own steps and about torchvision's absence on every call.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            example = (setup.example.contiguous(),)
            torch.onnx.export(setup.model, example, path, dynamo=True, verbose=False)
    return path
