"""Image files that are odd, and such as are broken, as people find them in their folders."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin


def pixels(seed: int, side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def odd() -> dict[str, bytes]:
    """What can be read."""
    rgb, frames = pixels(1), [pixels(i) for i in range(3)]
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 5000)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"), "palette.png": saved(rgb.convert("P")), "palette with holes.gif": saved(rgb.quantize(8), "GIF", transparency=3),
        "16 bit.png": saved(Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 99)), "1 bit.png": saved(rgb.convert("1")),
        "grey and opacity.png": saved(rgb.convert("LA")), "rgba.webp": saved(rgb.convert("RGBA"), "WEBP"), "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated.png": saved(frames[0], save_all=True, append_images=frames[1:]),
        "a jpeg.png": saved(rgb, "JPEG"), "a png.jpg": saved(rgb), "a webp.jpeg": saved(rgb, "WEBP"), "LOUD.JPG": saved(rgb, "JPEG"), "long comment.png": saved(rgb, pnginfo=info),
        "turned.jpg": saved(rgb, "JPEG", exif=exif.tobytes()), "wide.png": saved(Image.new("RGB", (900, 2))), "one pixel.png": saved(Image.new("RGB", (1, 1))),
        "lab.tiff": saved(rgb.convert("LAB"), "TIFF"), "pages.tiff": saved(rgb, "TIFF", save_all=True, append_images=frames),
    }  # fmt: skip


def broken() -> dict[str, bytes]:
    """What cannot be."""
    whole, jpeg = saved(pixels(2)), saved(pixels(2, 64), "JPEG")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8)))
    return {
        "empty.png": b"", "one byte.jpg": b"\xff", "half.png": whole[: len(whole) // 2], "half.jpg": jpeg[: len(jpeg) // 2], "head alone.jpg": jpeg[:100],
        "zeros.png": bytes(1000), "a page.jpg": b"<!DOCTYPE html><html>404</html>", "text.png": b"a fox\n", "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
        "flipped.png": whole[:60] + bytes(x ^ 255 for x in whole[60:90]) + whole[90:], "bomb.png": png(60_000, 60_000), "sides of 2^31.png": png(2**31 - 1, 2**31 - 1),
        "no sides.png": png(0, 0), "bomb in a comment.png": png(4, 4, bomb), "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(6) + b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\2\2\x44\1\0;",
        "a program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n", "endless.tiff": b"II*\0\x08\0\0\0" + b"\xff\xff" * 40,
        "array of objects.png": b"\x93NUMPY\x01\0\x16\0{'descr': '|O', 'fortran_order': False, 'shape': (2,2,3)}\n" + bytes(20), "zip.jpg": b"PK\x03\x04" + bytes(60),
    }  # fmt: skip
