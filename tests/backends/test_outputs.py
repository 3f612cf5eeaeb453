"""Memory of outputs is used again only when nobody can read it any more."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused.backends import _outputs

SHAPE = (2, 64, 56, 56)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outputs, "_chunks", _outputs._Chunks())


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
    assert _outputs._chunks.total == 0
    monkeypatch.setattr(_outputs, "_MOST", 2**20)
    assert _make((1, 64, 112, 112)).shape == (1, 64, 112, 112)
    assert _outputs._chunks.total == 0


def test_memory_of_one_size_serves_others(monkeypatch) -> None:
    """What three maps gave back holds one as large as all, and what is left then a small one."""
    monkeypatch.setattr(_outputs, "_MOST", 4 * 2**20)
    maps = [_make((1, 64, 64, 64)) for _ in range(3)]  # 1 MiB each
    address = min(t.data_ptr() for t in maps)
    maps.clear()
    large, small = _make((1, 64, 64, 192)), _make((1, 64, 64, 64))
    assert large.data_ptr() == address
    assert small.data_ptr() == address + large.nbytes
    assert _outputs._chunks.total == 4 * 2**20


def test_a_map_larger_than_a_chunk_has_one_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(_outputs, "_CHUNK", 2**20)
    held = _make((2, 64, 64, 64))
    assert _outputs._chunks.total == held.nbytes == 2 * 2**20


def test_room_is_made_by_giving_up_free_chunks_that_are_too_small(monkeypatch) -> None:
    monkeypatch.setattr(_outputs, "_MOST", 3 * 2**20)
    monkeypatch.setattr(_outputs, "_CHUNK", 2**20)
    held = _make((1, 64, 64, 64))  # 1 MiB
    free = _make((1, 64, 64, 64))
    del free
    other = _make((1, 64, 64, 128))  # 2 MiB, fits only in place of the free one
    assert _outputs._chunks.total == held.nbytes + other.nbytes


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.randoms()), max_size=60))
def test_blocks_never_overlap_and_all_gaps_close(calls) -> None:
    """Whatever is taken, and in whatever order and number blocks are given back."""
    chunk = _outputs._Chunk(32)
    held: list[tuple[int, int]] = []
    for give, size, random in calls:
        random.shuffle(held)
        for _ in range(min(give // 10, len(held))):
            chunk.returned.append(held.pop())
        taken = chunk.take(size)
        if taken is not None:
            held.append(taken)
            assert taken[1] - taken[0] == size
        spans = sorted(held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        # Refused only where no gap has room.
        edges = [0, *(edge for span in spans for edge in span), 32]
        if taken is None:
            assert all(
                end - start < size for start, end in zip(edges[::2], edges[1::2], strict=True)
            )
    chunk.returned += held
    assert chunk.take(32) == (0, 32)


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
