"""What test_train_distributed runs in each of two processes: ``two_processes.py RANK FOLDER``.

Every case returns tensors; they are saved as FOLDER/RANK.pt, an exception as its words.
"""

import copy
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from nets import Residual, SmallNet
from torch import Tensor, nn
from torch.distributed import all_reduce, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import resnet_fused as rf
from resnet_fused.backends import cpu
from resnet_fused.ops import _bn, _shared

WORLD, IMAGES = 2, 8
#: The native CPU kernels where they are there.
NATIVE = "cpu" if cpu.available() is None else "reference"
Results = dict[str, Tensor]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every pattern of a ResNet, and a convolution with a bias."""
    torch.manual_seed(0)
    model = SmallNet()
    model.layer1.append(Residual(16, 16))
    model.layer1[0].conv1.bias = nn.Parameter(torch.linspace(-1, 1, 8))
    return model.to(dtype).train()


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """This part's share of the mean over the joined batch."""
    y = model(x)
    return (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).square().sum() / IMAGES


def state(model: nn.Module) -> Results:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**grads, **{n: b.clone() for n, b in model.named_buffers()}}


def part(rank: int, first: int, dtype: torch.dtype) -> Tensor:
    """Of the batch the first images, or the others."""
    x = batch(dtype)
    return x[:first] if rank == 0 else x[first:]


def synchronised(rank: int, first: int, dtype: torch.dtype = torch.float32, **options) -> Results:
    """DDP refuses SyncBatchNorm on the CPU, so that gradients are summed by hand."""
    model = rf.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(net(dtype)), **options)
    loss(model, part(rank, first, dtype)).backward()
    for p in model.parameters():
        all_reduce(p.grad)
    return state(model)


def sync_before_fuse(rank: int) -> Results:
    return synchronised(rank, 5)


def sync_after_fuse(rank: int) -> Results:
    """And after DDP, which does not look again; it averages."""
    model = rf.fuse(net())
    wrapped = DistributedDataParallel(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    (WORLD * loss(wrapped, part(rank, 5, torch.float32))).backward()
    return state(model)


def sync_low_memory(rank: int) -> Results:
    return synchronised(rank, 5, memory="low")


def sync_float64(rank: int) -> Results:
    with rf.use_backend("reference"):
        return synchronised(rank, 3, torch.float64)


def sync_large_means(rank: int) -> Results:
    """Means a hundred million deviations away, of uneven parts; and none from one process."""
    found = {}
    for name, first in (("uneven", 3), ("empty", 0)):
        x = part(rank, first, torch.float64) + 1e8
        count = _bn.values_per_channel(x.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mean, var = _shared.join(*_bn.statistics(x), count, torch.distributed.group.WORLD)
        found |= {f"{name} mean": mean, f"{name} var": var}
    return found


def sync_empty_part(rank: int) -> Results:
    return synchronised(rank, IMAGES)


def sync_empty_part_by_name(rank: int) -> Results:
    """Backward of an empty part is run by the native kernels, or refused, where they are asked."""
    with rf.use_backend(NATIVE):
        return synchronised(rank, IMAGES)


def sync_empty_first_part_by_name(rank: int) -> Results:
    with rf.use_backend(NATIVE):
        return synchronised(rank, 0, memory="low")


def sync_calls(rank: int) -> Results:
    """How often the processes talk, forward and backward."""
    model = rf.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(net()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
        result = loss(model, part(rank, 4, torch.float32))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
        result.backward()
    calls = [{e.key: e.count for e in p.key_averages() if e.key.startswith("c10d::")}
             for p in (forward, backward)]  # fmt: skip
    return {"calls": torch.tensor([sum(c.values()) for c in calls])}


def sync_one_value_each(rank: int) -> Results:
    """One value per channel here, two in all; two normalised values are plus and minus one."""
    conv = nn.Conv2d(2, 3, 1, bias=False)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv, nn.BatchNorm2d(3)))
    y = rf.fuse(model.train())(torch.full((1, 2, 1, 1), float(rank)))
    return {"y": y.detach().flatten()}


def data_parallel(rank: int, fused: bool) -> Results:
    model = rf.fuse(net()) if fused else net()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        (WORLD * loss(wrapped, part(rank, 5, torch.float32))).backward()
    return state(model)


def ddp_fused(rank: int) -> Results:
    return data_parallel(rank, True)


def ddp_eager(rank: int) -> Results:
    return data_parallel(rank, False)


def fully_sharded(rank: int, **options) -> Results:
    """Three steps, then inference: the parameters' memory is another's in between."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    model = rf.fuse(net(), **options)
    for block in model.layer1:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, outputs = part(rank, 4, torch.float32), []
    for _ in range(3):
        optimizer.zero_grad()
        (WORLD * loss(model, x)).backward()
        optimizer.step()
        with torch.no_grad():
            outputs.append(model.eval()(batch()))
        model.train()
    state = {n: getattr(v, "full_tensor", lambda v=v: v)() for n, v in model.state_dict().items()}
    return {"outputs": torch.stack(outputs), **{n: v.clone() for n, v in state.items()}}


def fsdp(rank: int) -> Results:
    return fully_sharded(rank)


def fsdp_low_memory(rank: int) -> Results:
    return fully_sharded(rank, memory="low")


def fsdp_plain(rank: int) -> Results:
    """The same without FSDP and without fusing."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, outputs = part(rank, 4, torch.float32), []
    for _ in range(3):
        optimizer.zero_grad()
        (WORLD * loss(model, x)).backward()
        for p in model.parameters():
            all_reduce(p.grad)
            p.grad /= WORLD
        optimizer.step()
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            outputs.append(twin(batch()))
    return {"outputs": torch.stack(outputs), **model.state_dict()}


CASES: list[Callable[[int], Results]] = [
    sync_before_fuse, sync_after_fuse, sync_low_memory, sync_float64, sync_empty_part,
    sync_empty_part_by_name, sync_empty_first_part_by_name, sync_calls, sync_one_value_each,
    sync_large_means, ddp_fused, ddp_eager, fsdp_plain, fsdp, fsdp_low_memory,
]  # fmt: skip


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found: dict[str, Results | str] = {}
    for case in CASES:
        try:
            found[case.__name__] = {n: t.detach() for n, t in case(rank).items()}
        except Exception:
            found[case.__name__] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
