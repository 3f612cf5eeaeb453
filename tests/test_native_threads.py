"""The CPU kernels run on torch's own OpenMP threads, as many as torch was told to use."""

import subprocess
import sys

import pytest

pytest.importorskip("resnet_fused._C")

#: Prints by how many threads a process grew: at kernels on some, at torch's own operation on as
#: many, at kernels on more. A second OpenMP library, or one that torch does not set, would start
#: threads of its own.
PROBE = """
import os
import torch
import resnet_fused as rf

threads, kernel = int({threads}), {kernel!r}
torch.set_num_threads(1)  # while inputs are made
x = torch.zeros(4, 64, 32, 32).contiguous(memory_format=torch.channels_last)
weight, vector = torch.zeros(64, 64, 3, 3), torch.ones(64)
linear, large = torch.zeros(1000, 64), torch.zeros(1 << 22)

def run():
    if kernel == "conv_bn_act":
        rf.functional.conv_bn_act(x, weight, vector, vector, padding=1)
    elif kernel == "avg_pool_linear":
        rf.functional.avg_pool_linear(x, linear)
    elif kernel == "bn_apply":
        rf.functional.bn_apply(x, vector, vector)
    else:
        torch.ops.resnet_fused.bn_act(x, vector, vector, None, None, None, 1e-5, "relu")

def grown(function):
    before = len(os.listdir("/proc/self/task"))
    function()
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(threads)
with rf.use_backend("cpu"):
    first = grown(run)
    torchs = grown(lambda: large.add_(1))
    torch.set_num_threads(threads + 2)
    print(first, torchs, grown(run), grown(lambda: large.add_(1)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernel", ["conv_bn_act", "avg_pool_linear", "bn_apply", "bn_act"])
def test_kernels_run_on_torchs_threads(kernel, threads):
    probe = PROBE.format(threads=threads, kernel=kernel)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(threads - 1), "0", "2", "0"]
