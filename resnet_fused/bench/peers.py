"""Other ways to run the same network, for comparison: Inductor, ONNX Runtime, OpenVINO.

Imported only when asked for; they come with the extra `bench-peers`. All are held to the same
number of threads and checked against the same float64 answers.
"""

from __future__ import annotations

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
from resnet_fused.bench.options import UsageError, one_of


@dataclass(frozen=True)
class Peer:
    """A competitor: how it is built, the modules it needs, the dtypes and devices it runs."""

    build: Build
    needs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]

    def declines(self, dtype: torch.dtype, device: str) -> str | None:
        """Return why it does not take part in a case, or None where it does."""
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if dtype not in self.dtypes:
            names = ", ".join(str(accepted).removeprefix("torch.") for accepted in self.dtypes)
            return f"runs {names} only"
        return None


def inductor(setup: Setup) -> Runner:
    """`torch.compile` with freezing, its fastest setting for inference."""
    import torch._inductor.config as config

    # For the whole process: `options={"freezing": True}` is ignored (torch 2.13), and a patch
    # around the first call would leave a recompilation, for an input of other strides or one made
    # in inference mode, unfrozen and slower.
    config.freezing = True
    torch._dynamo.reset()
    return torch_runner(torch.compile(own_copy(setup), dynamic=False), setup)


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
PEERS = {
    "inductor": Peer(inductor, (), (torch.float32, torch.bfloat16, torch.float16), ("cpu", "cuda")),
    "onnxruntime": Peer(onnxruntime, (*_ONNX, "onnxruntime"), (torch.float32,), ("cpu",)),
    "openvino": Peer(openvino, (*_ONNX, "openvino"), (torch.float32, torch.bfloat16), ("cpu",)),
}


def usable_peers(option: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names if each is a peer and installed, or raise `UsageError`."""
    for name in names:
        missing = [need for need in PEERS[one_of(option, name, PEERS)].needs if not _found(need)]
        if missing:
            raise UsageError(
                f"{option}: {name} needs {', '.join(missing)}, not installed here: "
                'pip install "resnet_fused[bench-peers]"'
            )
    return tuple(names)


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
