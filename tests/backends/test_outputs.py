"""Memory of outputs is used again only when nobody can read it any more."""

import threading

import pytest
import torch

from resnet_fused.backends import _outputs

SHAPE = (2, 64, 56, 56)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outputs, "_blocks", _outputs._Blocks())


def _make(shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    return _outputs.empty_channels_last(shape, dtype)


def test_layout_is_that_of_torch_empty() -> None:
    for shape in (SHAPE, (1, 4, 3, 3), (0, 4, 3, 3)):
        expected = torch.empty(shape, memory_format=torch.channels_last)
        made = _make(shape)
        assert made.shape == expected.shape
        assert made.stride() == expected.stride()


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
    assert _outputs._blocks.total == 0
    monkeypatch.setattr(_outputs, "_MOST", 2**20)
    assert _make((1, 64, 112, 112)).shape == (1, 64, 112, 112)
    assert _outputs._blocks.total == 0


def test_room_is_made_by_giving_up_free_blocks_of_other_sizes(monkeypatch) -> None:
    monkeypatch.setattr(_outputs, "_MOST", 3 * 2**20)
    held = _make((1, 64, 64, 64))  # 1 MiB
    free = _make((1, 64, 64, 128))  # 2 MiB
    del free
    other = _make((1, 96, 64, 64))  # 1.5 MiB, fits only in place of the free block
    assert _outputs._blocks.total == held.nbytes + other.nbytes


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
