from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_fused.bench import photos
from resnet_fused.bench.options import UsageError


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (300, 260)) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def test_the_samples_fill_a_batch_with_distinct_crops() -> None:
    pictures, names = photos.load(None, 24)
    batch = photos.batch(pictures, 24)
    assert names == ["china.jpg", "flower.jpg"]
    assert batch.shape == (24, 3, 224, 224)
    assert batch.dtype is torch.float32
    assert len({crop.numpy().tobytes() for crop in batch}) == 24
    # The sixth pair mirrors the first, the paper's ten crops.
    assert torch.equal(batch[10], batch[0].flip(2))


def test_crops_are_normalised_as_imagenet_is() -> None:
    grey = torch.full((3, 300, 400), 128, dtype=torch.uint8)
    pixel = photos.batch([grey], 1)[0, :, 0, 0]
    expected = [(128 / 255 - m) / s for m, s in zip(photos.MEAN, photos.STD, strict=True)]
    assert pixel.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_seed_decides_the_random_crops() -> None:
    pictures, _ = photos.load(None, 2)
    one, same, other = (photos.batch(pictures, 24, seed=seed)[20:] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_small_and_tall_pictures_are_enlarged() -> None:
    assert photos.batch([torch.zeros(3, 40, 10, dtype=torch.uint8)], 2).shape == (2, 3, 224, 224)
    assert photos.batch([torch.zeros(3, 40, 10, dtype=torch.uint8)], 1, crop=32).shape[-1] == 32


def test_own_images_of_any_mode(tmp_path: Path) -> None:
    save(tmp_path / "b.PNG", "RGBA")
    save(tmp_path / "a.jpg", "L")
    (tmp_path / "notes.txt").write_text("not a photograph")
    pictures, names = photos.load(tmp_path, 8)
    assert names == ["a.jpg", "b.PNG"]
    assert all(picture.shape == (3, 260, 300) for picture in pictures)


def test_no_more_are_read_than_needed(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"")
    assert photos.load(tmp_path, 1)[1] == ["a.jpg"]


@pytest.mark.parametrize("content", [b"", b"no jpeg", None])
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = save(tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    with pytest.raises(UsageError, match=r"cut\.jpg: not a readable image") as caught:
        photos.load(tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_a_missing_an_empty_and_a_file_for_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such directory"):
        photos.load(tmp_path / "nowhere", 1)
    with pytest.raises(UsageError, match=r"no \.jpg, \.jpeg, \.png file in it"):
        photos.load(tmp_path, 1)
    with pytest.raises(UsageError, match="not a directory"):
        photos.load(save(tmp_path / "a.jpg"), 1)


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r'pip install "resnet_fused\[bench\]"'):
        photos.load(None, 1)
