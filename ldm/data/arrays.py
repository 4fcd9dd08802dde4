"""Pictures of more than eight bits, or of channels that have no name: numbers (H,W,C) instead of Pillow's images.

16-bit PNG and TIFF, floating-point TIFF, and arrays of numpy (.npy, .npz). Nothing goes through eight bits on the way.
"""

import io
import sys
import zipfile
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 80_000_000  # more are refused before they are unpacked (decompression bombs); 80 MP is 240 MB of RGB
SUFFIXES = (".npy", ".npz")
MAGIC = (b"\x93NUMPY", b"PK\x03\x04")  # how such files begin
SAMPLES = ("LA", "RGB", "RGBX", "RGBA", "RGBa")  # what a pixel of 16 bits a number holds, in Pillow's words
OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
LUMA = np.array([[0.299], [0.587], [0.114]])  # ITU-R 601


class BrokenImage(ValueError):
    """Bytes that do not make a picture of the wanted kind; the message says why, not which file."""


def is_array(data: bytes) -> bool:
    return data.startswith(MAGIC)


def read_array(data: bytes, channels: int) -> np.ndarray:
    """-> (H,W,C) of a .npy file, or of a .npz with one array in it, or with one named "image". Raises BrokenImage."""
    try:
        if data.startswith(MAGIC[1]):
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                _within_limit(max((member.file_size for member in packed.infolist()), default=0) // (8 * channels))
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            names = array.files
            if len(names) != 1 and "image" not in names:
                raise BrokenImage(f"arrays named {', '.join(names) or 'nothing'}; one is expected, or one named image")
            array = array["image" if "image" in names else names[0]]
    except BrokenImage:
        raise
    except Exception as error:  # numpy passes on what its parsers ran into: ValueError, zlib.error, tokenize.TokenError ...
        raise BrokenImage(f"not an array that numpy can read: {' '.join(str(error).split())}") from error
    return channels_last(np.asarray(array), channels)


def channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    """(H,W) of one channel, (H,W,C) or (C,H,W) -> (H,W,C); where both would do, it is (H,W,C)."""
    if array.ndim == 2 and channels == 1:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        flat = "(H,W), " if channels == 1 else ""
        raise BrokenImage(f"an array of shape {array.shape}; channels: {channels} takes {flat}(H,W,{channels}) or "
                          f"({channels},H,W)")  # fmt: skip
    _within_limit(array.shape[0] * array.shape[1])
    return array


def _within_limit(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise BrokenImage(f"{pixels:,} pixels; the limit is {MAX_PIXELS:,}")


def scaled(array: np.ndarray, value_range: Sequence[float] | None) -> np.ndarray:
    """-> float32 in [-1, 1]. `value_range`: what becomes -1 and 1, and bounds what is beyond; None: the least and the
    greatest number that the type holds, and [-1, 1] itself for fractions. Raises BrokenImage."""
    kind = array.dtype.kind
    if kind not in "biuf":
        raise BrokenImage(f"numbers of type {array.dtype}; integers or fractions are expected")
    if not np.isfinite(array).all():
        raise BrokenImage("nan or infinite numbers")
    if value_range is not None:
        low, high = value_range
    elif kind == "f":
        low, high, least, most = -1.0, 1.0, array.min(), array.max()
        if least < -1.001 or most > 1.001:
            raise BrokenImage(f"fractions from {least:g} to {most:g}; they are taken as [-1, 1] unless value_range: "
                              "[low, high] says otherwise")  # fmt: skip
    elif kind == "b":
        low, high = 0, 1
    elif array.dtype.itemsize <= 4:
        low, high = np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
    else:
        raise BrokenImage(f"numbers of type {array.dtype}, whose range says nothing; give value_range: [low, high]")
    x = (array.astype(np.float64) - low) * (2 / (high - low)) - 1
    return x.clip(-1, 1).astype(np.float32)


def is_deep(image: Image.Image, channels: int) -> bool:
    """Of an image that is open but not loaded: whether Pillow's own image of 8 bits would lose something of it."""
    if image.mode[0] in "FI":
        return True
    samples, _, bits = _layout(image).partition(";")
    return (samples in SAMPLES and bits in OTHER_BYTE) or (samples == "RGBX" and channels == 4)


def read_deep(data: bytes, channels: int, value_range: Sequence[float] | None = None) -> np.ndarray:
    """-> (H,W,C) float32 in [-1, 1] of an image that `is_deep`. Raises BrokenImage, and what Pillow raises."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "F" and value_range is None:
            raise BrokenImage("floating-point pixels, whose range the file does not tell; give value_range: [low, high], or "
                              "save it with 8 or 16 bits")  # fmt: skip
        if image.mode[0] in "FI":
            array = np.asarray(ImageOps.exif_transpose(image))[..., None]
            if image.mode == "I" and value_range is None:  # 32 bits, which programs use for 16
                if array.min() < 0 or array.max() > 65535:
                    raise BrokenImage(f"integers from {array.min()} to {array.max()}; more than 16 bits need value_range: "
                                      "[low, high]")  # fmt: skip
                array = array.astype(np.uint16)
        else:
            samples, _, bits = _layout(image).partition(";")
            array = _sixteen_bits(data, samples, bits) if bits else _unpacked(data, "RGBA", "RGBA").astype(np.uint8)
        x = scaled(array, value_range)
        if "RGBX" in _layout(image) and channels != 4:  # a fourth channel that is no opacity
            x = x[..., :3]
        elif "RGBa" in _layout(image):  # colours were multiplied by their opacity
            x[..., :3] = ((x[..., :3] + 1) / np.maximum(x[..., 3:] + 1, 1e-6)).clip(0, 1) * 2 - 1
        elif "transparency" in image.info:  # one colour is
            clear = (array == np.array(image.info["transparency"])).all(axis=2, keepdims=True)
            x = np.concatenate([x, np.where(clear, -1, 1).astype(np.float32)], axis=2)
        return fitted(x, channels)


def fitted(x: np.ndarray, channels: int) -> np.ndarray:
    """(H,W,C) in [-1, 1] of a picture, C being grey, grey and opacity, RGB or RGBA -> as many channels as are wanted: what
    is transparent shows white where opacity is not wanted, and what says nothing of it is opaque."""
    needs_pictures(channels)
    colour, opacity = (x[..., :-1], x[..., -1:]) if x.shape[2] in (2, 4) else (x, np.ones_like(x[..., :1]))
    if channels in (1, 3) and x.shape[2] in (2, 4):
        part = (opacity + 1) / 2
        colour = colour * part + (1 - part)
    if colour.shape[2] == 1 and channels >= 3:
        colour = colour.repeat(3, axis=2)
    elif colour.shape[2] == 3 and channels < 3:
        colour = (colour @ LUMA).astype(np.float32)
    return colour if channels in (1, 3) else np.concatenate([colour, opacity], axis=2)


def needs_pictures(channels: int) -> None:
    """Raises BrokenImage where no picture has that many channels."""
    if channels > 4:
        raise BrokenImage(f"a picture, of 4 channels at most; channels: {channels} takes arrays (.npy, .npz) of shape "
                          f"(H,W,{channels}) or ({channels},H,W)")  # fmt: skip


def _layout(image: Image.Image) -> str:
    """How the pixels lie in the file, in Pillow's words: "RGB;16B"."""
    arguments = image.tile[0].args if getattr(image, "tile", None) else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _sixteen_bits(data: bytes, samples: str, order: str) -> np.ndarray:
    """-> (H,W,C) uint16. Pillow unpacks one byte of each number: which one, follows from the byte order that it is told. So
    both bytes are had by unpacking twice."""
    if samples == "LA":  # no such twin, but two numbers of 16 bits lie as four of 8
        both = _unpacked(data, "RGBA", "RGBA")
        return both[..., 0::2] << 8 | both[..., 1::2]
    mode = "RGB" if samples == "RGB" else "RGBA"
    high, low = (_unpacked(data, mode, f"{mode};{bits}") for bits in (order, OTHER_BYTE[order]))
    return high << 8 | low


def _unpacked(data: bytes, mode: str, layout: str) -> np.ndarray:
    """-> (H,W,C) uint16 below 256: an image of Pillow's, its bytes taken to lie in another way than it thinks."""
    with Image.open(io.BytesIO(data)) as image:
        image._mode = mode
        image.tile = [tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
                      for tile in image.tile]  # fmt: skip
        return np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
