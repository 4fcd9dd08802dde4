"""Files that Pillow reads but cannot write: 16-bit PNG and TIFF of several channels, byte by byte as their standards say."""

import struct
import zlib

import numpy as np

PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type


def png(pixels: np.ndarray, extra: bytes = b"") -> bytes:
    """(H,W,C) uint16 -> a PNG whose rows use all five filters in turn; `extra`: chunks before the pixels."""
    height, width, channels = pixels.shape
    step, rows = 2 * channels, pixels.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    lines = []
    for y, row in enumerate(rows):
        up = rows[y - 1] if y else np.zeros_like(row)
        left, corner = (np.concatenate([np.zeros(step, int), line[:-step]]) for line in (row, up))
        guess = left + up - corner
        near = np.stack([abs(guess - left), abs(guess - up), abs(guess - corner)]).argmin(axis=0)
        paeth = np.choose(near, [left, up, corner])
        predicted = [np.zeros_like(row), left, up, (left + up) // 2, paeth][y % 5]
        lines.append(bytes([y % 5]) + ((row - predicted) % 256).astype(np.uint8).tobytes())
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(pixels: np.ndarray, order: str = "<", packed: bool = False, extra: int | None = None) -> bytes:
    """(H,W,C) uint8 or uint16 -> a TIFF of one strip. extra: what a fourth channel is (0: not said, 2: opacity)."""
    height, width, channels = pixels.shape
    bits = pixels.dtype.itemsize * 8
    strip = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    strip = zlib.compress(strip) if packed else strip
    tags = [(256, "H", [width]), (257, "H", [height]), (258, "H", [bits] * channels), (259, "H", [8 if packed else 1]),
            (262, "H", [2 if channels > 2 else 1]), (273, "I", [0]), (277, "H", [channels]), (278, "H", [height]),
            (279, "I", [len(strip)]), (284, "H", [1])]  # fmt: skip
    tags += [(338, "H", [extra])] if extra is not None else []
    after = 8 + 2 + 12 * len(tags) + 4
    directory, beyond = b"", b""
    for number, kind, values in tags:
        values = [after + 64] if number == 273 else values
        data = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(data) > 4:
            place = struct.pack(f"{order}I", after + len(beyond))
            data, beyond = place, beyond + data
        directory += struct.pack(f"{order}HHI", number, {"H": 3, "I": 4}[kind], len(values)) + data.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", len(tags))
    return (start + directory + bytes(4) + beyond).ljust(after + 64, b"\0") + strip
