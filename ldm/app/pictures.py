"""Files that are given to a command as conditions -> tensors, at the size at which they are wanted; mistakes name the file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.common.files import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
COLOURED = 32  # levels of 256 by which the channels of a grey picture may differ (JPEG)
SAME_SHAPE = 0.02  # share by which the sides of a mask and of its picture may be in another ratio


@contextmanager
def named(path: str) -> Iterator[None]:
    """A file that is none of the wanted kind is a UserError with its name."""
    from ldm.data.transforms import BrokenImage

    try:
        yield
    except BrokenImage as error:
        raise UserError(f"{path}: {error}") from error


def contents(path: str) -> bytes:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return Path(path).read_bytes()


def size_of(path: str, channels: int = 3) -> tuple[int, int]:
    """Height and width."""
    from ldm.data.transforms import sides

    with named(path):
        return sides(contents(path), channels)


def picture(path: str, channels: int, size: Sequence[int] | None = None, value_range: Sequence[float] | None = None) -> Tensor:
    """(C,H,W) in [-1,1]: as it is in the file, turned as EXIF says; or the part in the middle that has the shape of ``size``,
    height and width, resized (LANCZOS when it shrinks, BICUBIC when it grows). Of 8 bits, of 16, or an array."""
    from ldm.data.transforms import whole

    with named(path):
        return whole(contents(path), channels, value_range, size)


def depth(path: str, size: Sequence[int]) -> Tensor:
    """(1,H,W) in [-1,1] of a grey picture, or of an array in any unit."""
    from ldm.data.transforms import is_array, read_array

    with named(path):
        numbers = read_array(data, 1) if is_array(data := contents(path)) else None
    spread = None if numbers is None or numbers.max() <= numbers.min() else [float(numbers.min()), float(numbers.max())]
    return picture(path, 1, size, spread)


def class_map(path: str, size: Sequence[int]) -> Tensor:
    """(H,W) int64, nearest pixels."""
    from ldm.data.maps import nearest, numbers_in

    with named(path):
        return nearest(numbers_in(contents(path)), *size)


def mask(path: str, of: Sequence[int], size: Sequence[int]) -> Tensor:
    """(1,H,W), 1 where the file is white, 0 where it is black; grey is what it is nearer to.

    of: height and width of the picture that it belongs to, to which it is resized, nearest pixels, and told so; with that
    picture it is then cut and resized to ``size``. UserError for colours, transparency, another shape, and where it is black.
    """
    from ldm.data.maps import nearest

    found = painted(path)
    if tuple(found.shape) != tuple(of):
        height, width = found.shape
        if abs(height * of[1] - width * of[0]) > SAME_SHAPE * width * of[0]:
            raise UserError(f"{path}: a mask of height {height} x width {width} for a picture of {of[0]} x {of[1]}, another "
                            "shape; give one of the picture's size")
        log.warning("%s: a mask of %d x %d for a picture of %d x %d: resized, nearest pixels", path, height, width, *of)
    found = nearest(nearest(found, *of), *size)
    if not found.any():
        raise UserError(f"{path}: black everywhere; white is where to paint")
    return found[None].float()


def painted(path: str) -> Tensor:  # (H,W) bool

    import numpy as np
    import torch
    from PIL import ImageOps

    from ldm.data.transforms import is_array, opened, read_array, small_enough, told

    data = contents(path)
    with named(path):
        if is_array(data):
            numbers = read_array(data, 1)[..., 0]
            return torch.from_numpy(numbers >= (0.5 if numbers.max() <= 1 else 128))
        with told(), opened(data) as image:
            small_enough(image)
            image = ImageOps.exif_transpose(image)
            clear = image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255
            deep = image.mode[0] in "FI"
            rgb = None if deep else np.asarray(image.convert("RGB"), dtype=np.int16)
    if clear:
        raise UserError(f"{path}: has transparent pixels; a mask is opaque, white where to paint and black elsewhere")
    if deep:
        return picture(path, 1)[0] >= 0
    if (rgb.max(axis=2) - rgb.min(axis=2)).max() > COLOURED:
        raise UserError(f"{path}: has colours; a mask is white where to paint and black elsewhere")
    return torch.from_numpy(rgb.mean(axis=2) >= 128)
