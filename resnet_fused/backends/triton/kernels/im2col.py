"""Convolution as an implicit GEMM whose windows TMA's im2col mode gathers: Gluon, sm_90."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from resnet_fused.backends.triton.kernels.places import tap_of, window_of
from resnet_fused.backends.triton.kernels.shared import activate, affine, tile_of


@gluon.jit
def _start(
    tile, tiles, tiles_m, oh, ow, STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr,
    PAD_H: gl.constexpr, PAD_W: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """Return a tile, its step 0, where its first window is, and its first output channel.

    Those of the last tile where there is none of that number.
    """
    tile_m, tile_n = tile_of(min(tile, tiles - 1), tiles_m, tiles // tiles_m, GROUP_M)
    image, top, left = window_of(tile_m * BLOCK_M, oh, ow, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    return tile, 0, image, top, left, tile_n * BLOCK_N


@gluon.jit
def _fetch(
    place, x_desc, w_desc, x_tiles, w_tiles, ready, slot, tiles, tiles_m, oh, ow,
    STEPS: gl.constexpr, BLOCKS: gl.constexpr, KW: gl.constexpr, STRIDE_H: gl.constexpr,
    STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr, DIL_H: gl.constexpr,
    DIL_W: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Have both operands of a step put into a slot; return the place of the next step."""
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    tile, step, image, top, left, first = place
    wanted = tile < tiles
    tap, down, right, channel = tap_of(step, BLOCKS, BLOCK_K, KW, DIL_H, DIL_W)
    offsets = [gl.cast(down, gl.int16), gl.cast(right, gl.int16)]
    barrier = ready.index(slot)
    mbarrier.expect(barrier, (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred=wanted)
    tma.async_load_im2col(
        x_desc, [image, top, left, channel], offsets, barrier, x_tiles.index(slot), pred=wanted
    )
    tma.async_load(w_desc, [first, tap, channel], barrier, w_tiles.index(slot), pred=wanted)
    step += 1
    if step == STEPS:  # Once a tile: in every step, divisions by sizes would outlast the products.
        tile, step, image, top, left, first = _start(
            tile + gl.num_programs(0), tiles, tiles_m, oh, ow, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
            BLOCK_M, BLOCK_N, GROUP_M,
        )  # fmt: skip
    return tile, step, image, top, left, first


# Sizes stay ordinary arguments, so that another batch or image size compiles nothing.
@gluon.jit(do_not_specialize=["m", "oh", "ow"])
def conv_im2col_fwd_kernel(
    x_desc, w_desc, y_desc, residual_desc, scale_ptr, shift_ptr, m, oh, ow,
    IN: gl.constexpr, OUT: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr, PAD_H: gl.constexpr, PAD_W: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr, RELU: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """Tiles of so many output pixels and channels as y's descriptor says, one after another.

    Output pixels are numbered through all images: TMA walks from one window to the next, over the
    ends of rows and images, so that only the last tile has pixels to spare. Of the weight,
    (OUT, KH · KW, IN), a step takes (channels, one tap, BLOCK_K); what lies past the last channel
    arrives as zeros on both sides. Sums are held transposed, (channels, pixels).

    Steps are numbered through all of a block's tiles: their operands go round STAGES slots, and
    the next ones are fetched while a tile is finished. A slot is filled again once every warp has
    waited for the products that read it: the compiler puts the block's barrier between the two.
    The residual's tile waits where the output's will be written.
    """
    BLOCK_M: gl.constexpr = y_desc.block_shape[0]
    BLOCK_N: gl.constexpr = y_desc.block_shape[1]
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    DTYPE: gl.constexpr = y_desc.dtype
    BLOCKS: gl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K
    STEPS: gl.constexpr = KH * KW * BLOCKS
    # A warp has 16 rows of channels of a wgmma; with warps to spare, the pixels are shared out.
    DOWN: gl.constexpr = gl.num_warps() if 16 * gl.num_warps() <= BLOCK_N else 4
    ACROSS: gl.constexpr = gl.num_warps() // DOWN
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [DOWN, ACROSS], [16, BLOCK_M // ACROSS, 16]
    )
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, 1, BLOCK_K], w_desc.layout)
    y_tile = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_N], y_desc.layout)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    added = mbarrier.allocate_mbarrier()
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    mbarrier.init(added, count=1)

    tiles_m = (m + BLOCK_M - 1) // BLOCK_M
    tiles = tiles_m * ((OUT + BLOCK_N - 1) // BLOCK_N)
    place = _start(
        gl.program_id(0), tiles, tiles_m, oh, ow, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
        BLOCK_M, BLOCK_N, GROUP_M,
    )  # fmt: skip
    for slot in range(STAGES - 1):
        place = _fetch(
            place, x_desc, w_desc, x_tiles, w_tiles, ready, slot, tiles, tiles_m, oh, ow,
            STEPS, BLOCKS, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W, GROUP_M,
        )  # fmt: skip
    done, finished = 0, 0  # steps and tiles
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles // tiles_m, GROUP_M)
        tma.store_wait(0)  # the tile before this one has been read
        if residual_desc is not None:
            mbarrier.expect(added, BLOCK_M * BLOCK_N * 2)
            tma.async_load(residual_desc, [tile_m * BLOCK_M, tile_n * BLOCK_N], added, y_tile)
        sums = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, SUMS)
        for _ in range(STEPS):
            slot = done % STAGES
            mbarrier.wait(ready.index(slot), done // STAGES & 1)
            w = w_tiles.index(slot).reshape([BLOCK_N, BLOCK_K])
            x = x_tiles.index(slot).permute((1, 0))
            sums = warpgroup_mma(w, x, sums, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])  # this step's products stay under way
            place = _fetch(
                place, x_desc, w_desc, x_tiles, w_tiles, ready, (done + STAGES - 1) % STAGES,
                tiles, tiles_m, oh, ow, STEPS, BLOCKS, KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W,
                DIL_H, DIL_W, GROUP_M,
            )  # fmt: skip
            done += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        channels = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SUMS))
        sums = affine(sums, scale_ptr, shift_ptr, channels, channels < OUT)
        if residual_desc is not None:
            mbarrier.wait(added, finished & 1)
            sums += y_tile.permute((1, 0)).load(SUMS).to(gl.float32)
        y_tile.permute((1, 0)).store(activate(sums, RELU).to(DTYPE))
        fence_async_shared()
        tma.async_store(y_desc, [tile_m * BLOCK_M, tile_n * BLOCK_N], y_tile)
        finished += 1  # noqa: SIM113 - Gluon has no enumerate
    tma.store_wait(0)
