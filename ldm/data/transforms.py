"""A file's bytes -> a square picture in [-1, 1]. The one place that knows how image files can be odd.

What has eight bits is Pillow's; more bits, and arrays of numbers, are in arrays.py.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.data.arrays import (
    MAX_PIXELS,
    BrokenImage,
    fitted,
    is_array,
    is_deep,
    needs_pictures,
    read_array,
    read_deep,
    scaled,
)

ORIENTATION = 0x0112  # EXIF's tag; from 5 on, a picture lies on its side
PROGRAMS = {"EPS", "PDF", "WMF", "MPEG", "HDF5", "GRIB", "BUFR"}  # what draws or plays such files is not Pillow itself
VERSION = 1  # part of every fingerprint: raise it when the pixels that come out change


def prepare(data: bytes, size: int, channels: int = 3, value_range: Sequence[float] | None = None) -> Tensor:
    """-> (C,size,size) float32 in [-1, 1] from an image file's bytes, or those of an array. Raises BrokenImage.

    The first frame, turned as EXIF says, colours as they stand (ICC profiles are not applied). The largest centred square
    is taken and resized with LANCZOS when it shrinks, BICUBIC when it grows; at equal size the pixels are untouched.

    Args:
        channels: 3 RGB, 1 grey (ITU-R 601 luma), both over white where the picture is transparent; 4 RGBA, 2 grey and
            opacity; arrays may have any number, and have to have this one.
        value_range: the numbers in the file that become -1 and 1; None: see ``ldm.data.arrays.scaled``.
    """
    return _joined([square(band, size) for band in unpack(data, channels, value_range, at_least=2 * size)], channels)


def whole(data: bytes, channels: int = 3, value_range: Sequence[float] | None = None, size: Sequence[int] | None = None
          ) -> Tensor:  # fmt: skip
    """As ``prepare``, but neither cut nor resized, (C,H,W); or at any ``size``, height and width: the part in the middle that
    has this shape. Raises BrokenImage."""
    bands = unpack(data, channels, value_range)
    return _joined(bands if size is None else [covered(band, *size) for band in bands], channels)


def _joined(bands: list[Image.Image], channels: int) -> Tensor:  # -> (C,H,W) in [-1, 1]
    if bands[0].mode == "F":
        return torch.from_numpy(np.stack([np.asarray(band) for band in bands])).clamp(-1, 1)
    return to_tensor(bands[0].convert("L") if channels == 1 else bands[0])


def square(image: Image.Image, size: int) -> Image.Image:
    return covered(image, size, size)


def covered(image: Image.Image, height: int, width: int) -> Image.Image:
    """The part in the middle that has this shape, at this size."""
    top, left, h, w = middle(image.height, image.width, height, width)
    # cropped before, as resize(box=...) would let pixels beside the box in
    image = image.crop((left, top, left + w, top + h))
    return image.resize((width, height), Image.Resampling.LANCZOS if h >= height else Image.Resampling.BICUBIC)


def middle(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int, int, int]:
    """-> top, left, height, width of the largest part in the middle whose sides are as to_height to to_width."""
    share = min(height / to_height, width / to_width)
    h, w = max(1, round(to_height * share)), max(1, round(to_width * share))
    return (height - h) // 2, (width - w) // 2, h, w


def sides(data: bytes, channels: int = 3) -> tuple[int, int]:
    """-> height and width of a picture, turned as EXIF says, without unpacking it; of an array too. Raises BrokenImage."""
    if is_array(data):
        return read_array(data, channels).shape[:2]
    with told(), opened(data) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)


def unpack(data: bytes, channels: int = 3, value_range: Sequence[float] | None = None, at_least: int | None = None
           ) -> list[Image.Image]:  # fmt: skip
    """-> one image of 8 bits (RGB for 1 and 3 channels, LA, RGBA), or one a channel of fractions (mode F) in [-1, 1]: from
    files of more bits, from arrays, and where there is a value_range. Raises BrokenImage."""
    if is_array(data):
        return _bands(scaled(read_array(data, channels), value_range))
    needs_pictures(channels)
    with told(), opened(data) as image:
        small_enough(image)
        if is_deep(image, channels):
            return _bands(read_deep(data, channels, value_range))
    image = decode(data, at_least, {2: "LA", 4: "RGBA"}.get(channels, "RGB"))
    if value_range is None:
        return [image]
    return _bands(fitted(scaled(np.asarray(image), value_range), channels))


def decode(data: bytes, at_least: int | None = None, mode: str = "RGB") -> Image.Image:
    """-> 8 bits, of an image that has no more. Large JPEGs are unpacked at 1/2, 1/4 or 1/8 where both sides stay `at_least`
    pixels: much faster."""
    with told(), opened(data) as image:
        small_enough(image)
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        image = ImageOps.exif_transpose(image)
        return flatten(image) if mode == "RGB" else with_opacity(image, mode)


def opened(data: bytes) -> Image.Image:
    """Whatever its name, a file of a kind for which Pillow starts another program (EPS) is no picture."""
    Image.init()
    return Image.open(io.BytesIO(data), formats=[kind for kind in Image.OPEN if kind not in PROGRAMS])


@contextmanager
def told() -> Iterator[None]:
    """Whatever goes wrong in a file is a BrokenImage."""
    try:
        yield
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image that Pillow can read") from error
    except Exception as error:  # Pillow's readers raise whatever their parser ran into: OSError, SyntaxError, struct.error ...
        raise BrokenImage(str(error) or type(error).__name__) from error


def small_enough(image: Image.Image) -> None:
    """Before it is unpacked. Raises BrokenImage."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width}x{height} pixels; the limit is {MAX_PIXELS:,} in all")


def _bands(x: np.ndarray) -> list[Image.Image]:  # (H,W,C)
    return [Image.fromarray(np.ascontiguousarray(x[..., c])) for c in range(x.shape[2])]


def with_opacity(image: Image.Image, mode: str) -> Image.Image:
    """Any of Pillow's modes of 8 bits -> LA or RGBA; opaque where the picture says nothing of it."""
    if image.has_transparency_data:
        return image.convert("RGBA").convert(mode)
    return image.convert("RGB").convert(mode)


def flatten(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes of 8 bits -> RGB; what is transparent shows white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:  # -> (C,H,W) in [-1, 1]
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).contiguous()
