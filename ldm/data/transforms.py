"""A file's bytes -> a square picture in [-1, 1]. The one place that knows how image files can be odd."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

VERSION = 1  # part of every fingerprint: raise it when the pixels that come out change
MAX_PIXELS = (
    80_000_000  # a larger picture is refused before it is unpacked (decompression bombs); 80 MP is 240 MB of RGB
)


class BrokenImage(ValueError):
    """Bytes that do not make a picture; the message says why, not which file."""


def prepare(data: bytes, size: int, channels: int = 3) -> Tensor:
    """-> (C,size,size) float32 in [-1, 1] from an image file's bytes. Raises BrokenImage.

    The first frame, turned as EXIF says, transparency over white, colours as they stand (ICC profiles are not applied).
    The largest centred square is taken and resized with LANCZOS when it shrinks, BICUBIC when it grows; at equal size
    the pixels are untouched. `channels`: 3 RGB, 1 grey (ITU-R 601 luma).
    """
    image = decode(data, at_least=2 * size)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # cropped before, as resize(box=...) would let pixels beside the box in
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling.LANCZOS if side >= size else Image.Resampling.BICUBIC)
    return to_tensor(image if channels == 3 else image.convert("L"))


def decode(data: bytes, at_least: int | None = None) -> Image.Image:
    """-> RGB. Large JPEGs are unpacked at 1/2, 1/4 or 1/8 where both sides stay `at_least` pixels: much faster."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenImage(f"{width}x{height} pixels; the limit is {MAX_PIXELS:,} in all")
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return flatten(ImageOps.exif_transpose(image))
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image that Pillow can read") from error
    except (
        Exception
    ) as error:  # Pillow's readers raise whatever their parser ran into: OSError, SyntaxError, struct.error ...
        raise BrokenImage(str(error) or type(error).__name__) from error


def flatten(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> RGB; what is transparent shows white."""
    if image.mode.startswith(
        "I"
    ):  # 16 bits a pixel, as numbers up to 65,535: Pillow's own conversion would clip at 255
        levels = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(levels.clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        raise BrokenImage("floating-point pixels, whose range the file does not tell; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:  # -> (C,H,W) in [-1, 1]
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1).contiguous()
