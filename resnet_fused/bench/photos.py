"""Real photographs as the paper's test batches: shorter side 256, 224x224 crops, normalised.

He et al. 2015 (arXiv 1512.03385), section 3.4 "Implementation" and "testing": the standard ten
crops, that is centre and corners and their mirror images. A batch larger than ten crops of every
photograph goes on with crops at random places.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_fused.bench.options import UsageError

SHORTER_SIDE = 256
CROP = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png")
SAMPLES = ("china.jpg", "flower.jpg")
NEEDS_EXTRA = 'needs {}: pip install "resnet_fused[bench]"'


def load(directory: Path | None, most: int) -> tuple[list[Tensor], list[str]]:
    """Return up to `most` photographs, each uint8 (3, height, width), and their names.

    Without a directory these are scikit-learn's two sample images. Raises `UsageError`, naming the
    file or directory, for one that is missing, empty or unreadable.
    """
    images = _samples() if directory is None else _from_directory(directory, most)
    names, photos = zip(*itertools.islice(images, most), strict=True)
    return list(photos), list(names)


def batch(photos: list[Tensor], size: int, *, seed: int = 0, crop: int = CROP) -> Tensor:
    """Return `size` distinct crops as normalised float32, shape (size, 3, crop, crop).

    Each photograph gives its first crop before any gives its second. `crop` other than 224 scales
    the shorter side along (a 32x32 network sees the same part of the picture).
    """
    shorter = round(SHORTER_SIDE * crop / CROP)
    resized = [_resize(photo, shorter) for photo in photos]
    crops = list(itertools.islice(_crops(resized, crop, seed), size))
    pixels = torch.stack(crops).float().div_(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise UsageError("reading photographs " + NEEDS_EXTRA.format("pillow")) from None
    return PIL


def _samples() -> Iterator[tuple[str, Tensor]]:
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        text = NEEDS_EXTRA.format("scikit-learn") + " (or give your own with --images DIR)"
        raise UsageError("the sample photographs: " + text) from None
    for name in SAMPLES:
        yield name, _to_tensor(load_sample_image(name))


def _from_directory(directory: Path, most: int) -> Iterator[tuple[str, Tensor]]:
    if not directory.is_dir():
        reason = "not a directory" if directory.exists() else "no such directory"
        raise UsageError(f"--images: {directory}: {reason}")
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UsageError(f"--images: {directory}: no {', '.join(SUFFIXES)} file in it")
    for path in files[:most]:
        yield path.name, _read(path)


def _read(path: Path) -> Tensor:
    pillow = _pillow()
    try:
        with pillow.Image.open(path) as image:
            upright = pillow.ImageOps.exif_transpose(image)
            return _to_tensor(np.asarray(upright.convert("RGB")))
    except (OSError, ValueError, SyntaxError, pillow.Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--images: {path}: not a readable image ({reason})") from None


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


def _resize(photo: Tensor, shorter: int) -> Tensor:
    pillow = _pillow()
    height, width = photo.shape[1:]
    scale = shorter / min(height, width)
    size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    image = pillow.Image.fromarray(photo.permute(1, 2, 0).numpy())
    return _to_tensor(np.asarray(image.resize(size, pillow.Image.Resampling.BILINEAR)))


def _crops(photos: list[Tensor], crop: int, seed: int) -> Iterator[Tensor]:
    """The ten standard crops of every photograph in turn, then random ones without end."""
    for mirrored in (False, True):
        for place in range(5):
            for photo in photos:
                yield _crop(photo, _standard_corner(photo, crop, place), crop, mirrored)
    generator = np.random.default_rng(seed)
    for photo in itertools.cycle(photos):
        top, left = (int(generator.integers(side - crop + 1)) for side in photo.shape[1:])
        yield _crop(photo, (top, left), crop, bool(generator.integers(2)))


def _standard_corner(photo: Tensor, crop: int, place: int) -> tuple[int, int]:
    down, right = photo.shape[1] - crop, photo.shape[2] - crop
    return [(down // 2, right // 2), (0, 0), (0, right), (down, 0), (down, right)][place]


def _crop(photo: Tensor, corner: tuple[int, int], crop: int, mirrored: bool) -> Tensor:
    top, left = corner
    part = photo[:, top : top + crop, left : left + crop]
    return part.flip(2) if mirrored else part
