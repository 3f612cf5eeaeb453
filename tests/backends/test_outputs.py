"""Memory of outputs is used again only when nobody can read it any more."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.dlpack import from_dlpack

from resnet_fused.backends import _outputs, native

SHAPE = (2, 64, 56, 56)
PAGE = 4096

pytestmark = pytest.mark.skipif(native.extension() is None, reason="the extension is not loaded")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    _limited(monkeypatch)


def _limited(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(_outputs, name, value)
    monkeypatch.setattr(_outputs, "_memory", _outputs._Memory())


def _total() -> int:
    return _outputs._memory.own.total


def _make(shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return _outputs.empty_channels_last(shape, dtype)


def test_large_ones_cannot_be_resized_but_their_clones() -> None:
    """As `fuse` says."""
    y = _outputs.empty_channels_last((1, 64, 64, 64), torch.float32)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.untyped_storage().resize_(0)
    y.clone().untyped_storage().resize_(0)


def test_layout_is_that_of_torch_empty() -> None:
    for shape in (SHAPE, (1, 4, 3, 3), (0, 4, 3, 3)):
        expected = torch.empty(shape, memory_format=torch.channels_last)
        made = _make(shape)
        assert made.shape == expected.shape
        assert made.stride() == expected.stride()


def test_a_contiguous_one_lies_in_the_same_memory() -> None:
    shape = (512, 256, 3, 3)
    first = _outputs.empty_contiguous(shape, torch.bfloat16)
    assert first.is_contiguous()
    assert (first.shape, first.dtype) == (shape, torch.bfloat16)
    address = first.data_ptr()
    del first
    assert _make().data_ptr() == address
    small = _outputs.empty_contiguous((2, 3, 1, 1), torch.float32)
    assert small.stride() == (3, 1, 1, 1)


def test_memory_comes_back_when_the_tensor_is_gone() -> None:
    first = _make()
    address = first.data_ptr()
    assert _make().data_ptr() != address
    del first
    assert _make().data_ptr() == address


@pytest.mark.parametrize(
    "hold", [lambda t: t[1:], lambda t: t.detach(), lambda t: t.permute(0, 2, 3, 1).numpy()]
)
def test_memory_stays_while_anything_reads_it(hold) -> None:
    first = _make()
    address = first.data_ptr()
    held = hold(first)
    del first
    assert _make().data_ptr() != address
    del held
    assert _make().data_ptr() == address


def test_memory_stays_while_autograd_holds_it() -> None:
    x = _make().fill_(2.0)
    address = x.data_ptr()
    w = torch.ones(1, requires_grad=True)
    y = (x * w).sum()
    del x
    assert _make().data_ptr() != address
    y.backward()
    assert w.grad.item() == 2.0 * torch.Size(SHAPE).numel()


def test_small_tensors_and_what_passes_the_limit_come_from_torch(monkeypatch) -> None:
    _make((1, 4, 3, 3))
    assert _total() == 0
    _limited(monkeypatch, _MOST=2**20)
    assert _make((1, 64, 112, 112)).shape == (1, 64, 112, 112)
    assert _total() == 0


def test_without_the_extension_they_come_from_torch(monkeypatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    _limited(monkeypatch)
    y = _make()
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.untyped_storage().resize_(0)


@pytest.mark.parametrize("dtype", _outputs._DLPACK)
def test_every_dtype_is_itself(dtype) -> None:
    y = _make(dtype=dtype)
    assert y.dtype == dtype
    assert torch.equal(y.fill_(3), torch.full_like(y, 3))


def test_a_capsule_that_nobody_takes_gives_its_block_back() -> None:
    memory = native.loaded().Memory(PAGE, PAGE)
    for _ in range(3):
        capsule = memory.lend(PAGE, 1, 1, 1, True, 1, 8)
        assert memory.lend(PAGE, 1, 1, 1, True, 1, 8) is None
        del capsule


@pytest.mark.parametrize("sides", [(2**62, 4, 1, 1), (-1, 4, 1, 1), (0, 4, 1, 1)])
def test_sizes_that_no_memory_has(sides) -> None:
    assert native.loaded().Memory(PAGE, 2**40).lend(*sides, True, 2, 32) is None


def test_memory_outlives_the_thread_that_took_it() -> None:
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.append(_make().fill_(5.0)))
    thread.start()
    thread.join()
    assert bool((made[0] == 5.0).all())


def test_memory_of_one_size_serves_others(monkeypatch) -> None:
    """What three maps gave back holds one as large as all, and what is left then a small one."""
    _limited(monkeypatch, _MOST=4 * 2**20)
    maps = [_make((1, 64, 64, 64)) for _ in range(3)]  # 1 MiB each
    address = min(t.data_ptr() for t in maps)
    maps.clear()
    large, small = _make((1, 64, 64, 192)), _make((1, 64, 64, 64))
    assert large.data_ptr() == address
    assert small.data_ptr() == address + large.nbytes
    assert _total() == 4 * 2**20


def test_a_map_larger_than_a_chunk_has_one_of_its_own(monkeypatch) -> None:
    _limited(monkeypatch, _CHUNK=2**20)
    held = _make((2, 64, 64, 64))
    assert _total() == held.nbytes == 2 * 2**20


def test_room_is_made_by_giving_up_free_chunks_that_are_too_small(monkeypatch) -> None:
    _limited(monkeypatch, _MOST=3 * 2**20, _CHUNK=2**20)
    held = _make((1, 64, 64, 64))  # 1 MiB
    free = _make((1, 64, 64, 64))
    del free
    other = _make((1, 64, 64, 128))  # 2 MiB, fits only in place of the free one
    assert _total() == held.nbytes + other.nbytes


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.randoms()), max_size=60))
def test_blocks_never_overlap_and_all_gaps_close(calls) -> None:
    """Whatever is taken, and in whatever order and number blocks are given back."""
    memory = native.loaded().Memory(32 * PAGE, 32 * PAGE)
    held: list[torch.Tensor] = []

    def take(pages: int) -> torch.Tensor | None:
        capsule = memory.lend(pages, PAGE, 1, 1, False, 1, 8)
        return None if capsule is None else from_dlpack(capsule)

    whole = take(32)
    assert whole is not None
    start = whole.data_ptr()
    del whole

    def spans() -> list[tuple[int, int]]:
        begins = sorted(((t.data_ptr() - start) // PAGE, t.shape[0]) for t in held)
        return [(begin, begin + pages) for begin, pages in begins]

    for give, size, random in calls:
        random.shuffle(held)
        del held[: give // 10]
        taken = take(size)
        if taken is not None:
            held.append(taken)
            assert taken.shape[0] == size
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans()))
        # Refused only where no gap has room.
        edges = [0, *(edge for span in spans() for edge in span), 32]
        if taken is None:
            assert all(
                end - begin < size for begin, end in zip(edges[::2], edges[1::2], strict=True)
            )
        del taken
    held.clear()
    whole = take(32)
    assert whole is not None
    assert whole.data_ptr() == start


def test_threads_do_not_share_blocks() -> None:
    first = _make()
    address = first.data_ptr()
    del first
    seen: list[int] = []

    def use() -> None:
        kept = _make()
        seen.append(kept.data_ptr())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen != [address]


def test_inference_mode_leaves_later_tensors_ordinary() -> None:
    with torch.inference_mode():
        first = _make()
        assert first.is_inference()
    del first
    assert not _make().is_inference()
