import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import transforms
from ldm.data.transforms import BrokenImage, decode, prepare


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colour(data: bytes, channels: int = 3) -> list[int]:
    """Levels 0..255 of a picture that has one colour."""
    pixels = (prepare(data, 8, channels) + 1) * 127.5
    assert (pixels - pixels[:, :1, :1]).abs().max() < 1.5
    return pixels[:, 0, 0].round().int().tolist()


def test_pixels_are_untouched_at_equal_size():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tensor = prepare(saved(Image.fromarray(pixels)), 32)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    assert prepare(saved(Image.new("RGB", (4, 4), "white")), 4).unique().tolist() == [1]
    assert prepare(saved(Image.new("RGB", (4, 4), "black")), 4).unique().tolist() == [-1]


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (40, 13), (64, 64)])
def test_the_centred_square_is_taken(size):
    image = Image.new("RGB", size, "black")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste("white", (left, top, left + side, top + side))
    assert prepare(saved(image), 16).min() > 0.9


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (9, 9), 100), [100] * 3),
        (Image.new("1", (9, 9), 1), [255] * 3),
        (Image.new("RGBA", (9, 9), (200, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 51)), [204, 204, 204]),
        (Image.new("LA", (9, 9), (0, 51)), [204, 204, 204]),
        (Image.new("RGB", (9, 9), (10, 200, 30)).quantize(4), [10, 200, 30]),
        (Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)), [156] * 3),
    ],
    ids=["grey", "bits", "transparent", "translucent", "grey and alpha", "palette", "16 bit"],
)
def test_modes(image, expected):
    assert colour(saved(image)) == expected


def test_palette_with_transparent_colour_shows_white():
    image = Image.new("P", (9, 9), 0)
    image.putpalette([10, 20, 30])
    assert colour(saved(image, transparency=0)) == [255] * 3
    assert colour(saved(image)) == [10, 20, 30]


def test_cmyk_jpeg():
    assert colour(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)) == pytest.approx(
        [255, 0, 0], abs=3
    )


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (9, 9), name) for name in ("red", "green", "blue")]
    assert colour(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [255, 0, 0]


def test_exif_orientation_is_honoured():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the stored top is the right side
    shown = prepare(saved(image, "PNG", exif=exif), 32)
    assert (shown[:, :, 16:] == 1).all() and (shown[:, :, :16] == -1).all()


def test_grey():
    tensor = prepare(saved(Image.new("RGB", (9, 9), (255, 0, 0))), 8, channels=1)
    assert tensor.shape == (1, 8, 8)
    assert colour(saved(Image.new("RGB", (9, 9), (255, 0, 0))), 1) == [76]  # 0.299 * 255


def test_large_jpeg_is_unpacked_smaller_and_looks_the_same():
    x, y = np.meshgrid(np.arange(1024), np.arange(768))
    smooth = np.stack([x / 4, y / 3, (x + y) / 8], -1).astype(np.uint8)
    data = saved(Image.fromarray(smooth), "JPEG", quality=95)
    assert decode(data, at_least=128).size == (256, 192)
    whole = decode(data).crop((128, 0, 896, 768)).resize((64, 64), Image.Resampling.LANCZOS)
    assert (prepare(data, 64) - transforms.to_tensor(whole)).abs().mean() < 0.01


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch):
    data = saved(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(transforms, "MAX_PIXELS", 9_999)
    with pytest.raises(BrokenImage, match="100x100 pixels; the limit is 9,999"):
        prepare(data, 8)
    monkeypatch.setattr(transforms, "MAX_PIXELS", 10_000)
    prepare(data, 8)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (saved(NOISE, "JPEG")[:-900], "truncated"),
        (saved(NOISE)[:3000], "truncated"),
        (saved(NOISE, "WEBP")[:500], "."),
        (saved(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "html", "jpeg", "png", "webp", "float"],
)
def test_broken_files_say_why(data, message):
    with pytest.raises(BrokenImage, match=message):
        prepare(data, 8)
