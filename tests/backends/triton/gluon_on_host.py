"""The Gluon convolution's own source, run in Python: Gluon has no interpreter.

The functions run with other globals, which do on host tensors what the operations do on a GPU, as
late or as early as a GPU may: products when they are waited for, stores likewise, loads either when
they are asked for or when they are waited for. So a slot that is filled too early, a barrier that
would never open, or a sum that is read too early gives an error or a wrong result. Threads are not
modelled: that a block's warps wait for each other is the compiler's work.
"""

import types
from collections.abc import Callable

import torch
from tma_model import as_described, read_box, read_windows, write_box
from torch import Tensor


class Block:
    """One block of the grid: what it has asked for and not yet waited for."""

    def __init__(self, program: int, programs: int, num_warps: int, eager: bool) -> None:
        self.program, self.programs, self.num_warps = program, programs, num_warps
        self.eager = eager
        self.loads: list[tuple[Barrier, Callable[[], None]]] = []
        self.products: list[Callable[[], None]] = []
        self.stores: list[Callable[[], None]] = []
        self.fenced = False

    def load(self, barrier: "Barrier", target: "Shared", read: Callable[[], Tensor]) -> None:
        def run() -> None:
            target.data.copy_(read())
            barrier.arrived(target.data.numel() * target.data.element_size())

        if self.eager:
            run()
        else:
            self.loads.append((barrier, run))

    def finish_loads(self, barrier: "Barrier") -> None:
        for entry in [entry for entry in self.loads if entry[0] is barrier]:
            self.loads.remove(entry)
            entry[1]()


class Barrier:
    """An mbarrier of one arrival, which expects bytes."""

    def __init__(self) -> None:
        self.completed, self.missing = 0, 0

    def expect(self, size: int) -> None:
        assert self.missing == 0, "armed before it completed"
        self.missing = size

    def arrived(self, size: int) -> None:
        assert self.missing >= size, "more bytes than expected"
        self.missing -= size
        self.completed += self.missing == 0


class Shared:
    """A part of shared memory; it begins as NaN."""

    def __init__(self, data: Tensor, block: Block) -> None:
        self.data, self.block = data, block

    def index(self, i: int) -> "Shared":
        return Shared(self.data[i], self.block)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order), self.block)

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape), self.block)

    def load(self, layout: None) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.block.fenced = False


class Descriptor:
    """A launch's descriptor as the kernel sees it."""

    def __init__(self, host) -> None:
        self.host, self.block_shape, self.dtype = host, host.block_shape, host.base.dtype
        self.layout, self.tensor = None, as_described(host)


class Pointer:
    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __add__(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return self.data, offsets


def _load(address: tuple[Tensor, Tensor], mask: Tensor, other: float) -> Tensor:
    data, offsets = address
    return torch.where(mask, data[torch.where(mask, offsets, 0)], other)


def _maximum(value: Tensor, least: float, propagate_nan: bool) -> Tensor:
    assert propagate_nan
    return value.clamp_min(least)


def _language(block: Block) -> types.SimpleNamespace:
    def allocate(dtype, shape, layout) -> Shared:
        return Shared(torch.full(shape, torch.nan, dtype=dtype), block)

    return types.SimpleNamespace(
        program_id=lambda axis: block.program,
        num_programs=lambda axis: block.programs,
        num_warps=lambda: block.num_warps,
        NVMMADistributedLayout=lambda *a: None,
        SliceLayout=lambda *a: None,
        allocate_shared_memory=allocate,
        static_range=range,
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        cast=lambda value, dtype: torch.tensor(value, dtype=dtype).item(),  # of 16 bits
        load=_load,
        maximum=_maximum,
        PropagateNan=types.SimpleNamespace(ALL=True),
        float32=torch.float32,
        int16=torch.int16,
    )


def _barriers(block: Block) -> types.SimpleNamespace:
    def allocate(batch: int | None = None):
        made = [Barrier() for _ in range(batch or 1)]
        return types.SimpleNamespace(index=made.__getitem__) if batch else made[0]

    def expect(barrier: Barrier, size: int, pred: bool = True) -> None:
        if pred:
            barrier.expect(size)

    def wait(barrier: Barrier, phase: int) -> None:
        block.finish_loads(barrier)
        assert barrier.completed % 2 != phase, "the phase never completes"

    return types.SimpleNamespace(
        allocate_mbarrier=allocate, init=lambda barrier, count: None, expect=expect, wait=wait
    )


def _tma(block: Block) -> types.SimpleNamespace:
    def load(desc, start, barrier, target, pred=True) -> None:
        if pred:
            block.load(barrier, target, lambda: read_box(desc.tensor, start, desc.block_shape))

    def load_im2col(desc, start, tap, barrier, target, pred=True) -> None:
        host = desc.host
        corners = host.pixel_box_lower_corner, host.pixel_box_upper_corner
        windows = *corners, host.element_strides[1:3]
        if pred:
            block.load(
                barrier,
                target,
                lambda: read_windows(
                    desc.tensor, *windows, start[:3], tap, start[3], desc.block_shape
                ),
            )

    def store(desc, start, source) -> None:
        assert block.fenced, "TMA does not see what threads wrote"
        block.stores.append(lambda: write_box(desc.tensor, start, source.data))

    def store_wait(pending: int) -> None:
        while len(block.stores) > pending:
            block.stores.pop(0)()

    return types.SimpleNamespace(
        async_load=load, async_load_im2col=load_im2col, async_store=store, store_wait=store_wait
    )


def _products(block: Block) -> dict[str, Callable]:
    def multiply(a, b, sums, is_async):
        def run() -> None:
            sums.add_(a.data.float() @ b.data.float())

        assert is_async
        block.products.append(run)
        return sums

    def wait(pending: int, deps):
        while len(block.products) > pending:
            block.products.pop(0)()
        return deps[0]

    return {"warpgroup_mma": multiply, "warpgroup_mma_wait": wait}


def _fence(block: Block) -> None:
    block.fenced = True


def run(launch, eager: bool) -> None:
    """Run a launch of the Gluon convolution on host tensors, block by block.

    Args:
        launch: as it would go to a GPU.
        eager: whether loads come as soon as they are asked for, or when they are waited for.
    """
    from resnet_fused.backends.triton.kernels import im2col, places, shared

    arguments = {
        name: Descriptor(value)
        if name.endswith("_desc") and value is not None
        else Pointer(value)
        if isinstance(value, Tensor)
        else value
        for name, value in launch.arguments.items()
    }
    for program in range(launch.grid[0]):
        block = Block(program, launch.grid[0], launch.num_warps, eager)
        language = _language(block)
        names = {
            "gl": language, "tl": language, "mbarrier": _barriers(block), "tma": _tma(block),
            **_products(block), "fence_async_shared": lambda block=block: _fence(block),
        }  # fmt: skip
        functions = [
            im2col._start, im2col._fetch, places.window_of, places.tap_of, shared.tile_of,
            shared.affine, shared.activate,
        ]  # fmt: skip
        for function in functions:
            names[function.fn.__name__] = types.FunctionType(function.fn.__code__, names)
        kernel = types.FunctionType(im2col.conv_im2col_fwd_kernel.fn.__code__, names)
        kernel(**arguments)
        assert [block.loads, block.products, block.stores] == [[], [], []]


def check(path: str, dtype: torch.dtype, blocks: int, eager: bool) -> None:
    """Hold one of IM2COL_PATHS to the rule; one dtype goes without the residual."""
    from paths import IM2COL_PATHS, arguments, assert_right

    from resnet_fused.backends.triton import launch
    from resnet_fused.backends.triton.shapes import Config, Problem

    torch.manual_seed(0)
    shape, config = IM2COL_PATHS[path]
    args = arguments(*shape, dtype=dtype, residual=dtype == torch.bfloat16)
    x, weight, scale, shift, residual, *geometry, act = args
    problem = Problem.of(x.shape, weight.shape, *geometry, residual is not None)
    out = (problem.n, problem.o, *problem.out_size)
    y = torch.full(out, torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    (step,) = launch.conv(
        x, weight, scale, shift, residual, y, problem, Config.parse(config), act, 90
    )
    run(step._replace(grid=(blocks, 1, 1)), eager)
    assert_right(args, y)
