"""More than 8 bits, other than 3 channels: what is in a file is what comes out, to its last bit."""

import io
import struct

import numpy as np
import pytest
import torch
from deep_pictures import chunk, png, tiff
from PIL import Image

from ldm.common.build import check
from ldm.common.files import UserError
from ldm.data import arrays
from ldm.data.arrays import BrokenImage
from ldm.data.folder import ImageFolder
from ldm.data.transforms import prepare
from ldm.data.webdataset import WebDataset

RANDOM = np.random.default_rng(0)


def levels(channels: int, side: int = 12) -> np.ndarray:  # (H,W,C)
    return RANDOM.integers(0, 65536, (side, side, channels), dtype=np.uint16)


def as_tensor(pixels: np.ndarray, top: float = 65535) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float64) / top * 2 - 1).permute(2, 0, 1).float()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**named) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **named)
    return file.getvalue()


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png(channels):
    pixels = levels(channels)
    assert torch.allclose(prepare(png(pixels), 12, channels), as_tensor(pixels), atol=1e-7)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize(("channels", "extra"), [(1, None), (3, None), (4, 2), (4, 0)])
def test_16_bit_tiff(channels, extra, order, packed):
    pixels = levels(channels)
    data = tiff(pixels, order, packed, extra)
    assert torch.allclose(prepare(data, 12, channels), as_tensor(pixels), atol=1e-7)


def test_256_steps_within_one_of_8_bits_stay_apart():
    pixels = (32768 + np.arange(256, dtype=np.uint16)).reshape(16, 16, 1)
    for data in (png(pixels), tiff(pixels), npy(pixels)):
        assert len(prepare(data, 16, 1).unique()) == 256
    assert len(prepare(png(pixels.repeat(3, axis=2)), 16, 3)[0].unique()) == 256


def test_grey_and_colour_become_one_another_without_8_bits():
    grey, rgb = levels(1), levels(3)
    assert torch.allclose(prepare(png(grey), 12, 3), as_tensor(grey).expand(3, -1, -1), atol=1e-7)
    luma = (rgb * [0.299, 0.587, 0.114]).sum(axis=2, keepdims=True)
    assert torch.allclose(prepare(png(rgb), 12, 1), as_tensor(luma), atol=1e-6)
    assert torch.equal(prepare(png(rgb), 12, 4)[3], torch.ones(12, 12))


def test_16_bit_opacity_over_white():
    rgba = levels(4)
    part = rgba[..., 3:] / 65535
    shown = rgba[..., :3] * part + 65535 * (1 - part)
    assert torch.allclose(prepare(png(rgba), 12, 3), as_tensor(shown), atol=1e-6)


def test_16_bit_with_one_transparent_colour():
    pixels = levels(3)
    pixels[3, 4] = (1, 2, 3)
    clear = prepare(png(pixels, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))), 12, 4)[3]
    assert clear[3, 4] == -1 and (clear == 1).sum() == 143


def test_a_fourth_channel_that_is_no_opacity():
    for pixels, top in ((levels(4), 65535), (RANDOM.integers(0, 256, (12, 12, 4), dtype=np.uint8), 255)):
        data = tiff(pixels, extra=0)
        assert torch.allclose(prepare(data, 12, 4), as_tensor(pixels, top), atol=1e-6)
        assert torch.allclose(prepare(data, 12, 3), as_tensor(pixels[..., :3], top), atol=1e-6)  # not laid over white


def test_8_bit_rgba_is_kept():
    pixels = RANDOM.integers(0, 256, (12, 12, 4), dtype=np.uint8)
    assert torch.allclose(prepare(saved(Image.fromarray(pixels)), 12, 4), as_tensor(pixels, 255), atol=1e-6)
    opaque = prepare(saved(Image.fromarray(pixels[..., :3]), "JPEG"), 12, 4)
    assert opaque.shape == (4, 12, 12) and (opaque[3] == 1).all()
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([10, 20, 30])
    assert (prepare(saved(palette, transparency=0), 8, 4)[3] == -1).all()
    two = prepare(saved(Image.new("LA", (9, 9), (0, 51))), 8, 2)
    assert two[:, 0, 0].tolist() == pytest.approx([-1, -0.6])


def test_exif_orientation_of_16_bits():
    pixels = levels(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = prepare(png(pixels, chunk(b"eXIf", exif.tobytes()[6:])), 12, 3)
    assert torch.allclose(turned, as_tensor(np.rot90(pixels, -1).copy()), atol=1e-7)


@pytest.mark.parametrize("size", [6, 30])
def test_resizing_keeps_the_precision_and_the_range(size):
    steps = np.linspace(20000, 20400, 12).round().astype(np.uint16)  # less than two steps of 8 bits
    pixels = np.broadcast_to(steps[None, :, None], (12, 12, 5))
    x = prepare(npy(pixels), size, 5)
    assert x.shape == (5, size, size) and x.dtype == torch.float32
    assert len(x[0, 0].unique()) == size and (x[:, :, 1:-1].diff(dim=2) > 0).all()
    assert torch.allclose(x[:, 2:-2, 2:-2].mean(), as_tensor(pixels).mean(), atol=1e-4)
    edge = np.zeros((12, 12), dtype=np.uint16)
    edge[:, 6:] = 65535
    assert prepare(npy(edge), size, 1).abs().max() <= 1  # both filters overshoot there


@pytest.mark.parametrize("shape", [(12, 12, 5), (5, 12, 12)])
def test_where_the_channels_are(shape):
    array = RANDOM.uniform(-1, 1, shape).astype(np.float32)
    expected = torch.from_numpy(array if shape[0] == 5 else array.transpose(2, 0, 1).copy())
    assert torch.equal(prepare(npy(array), 12, 5), expected)
    assert torch.equal(prepare(npz(image=array, label=np.arange(3)), 12, 5), expected)
    assert torch.equal(prepare(npz(whatever=array), 12, 5), expected)


def test_a_plane_is_grey():
    array = RANDOM.uniform(-1, 1, (12, 12)).astype(np.float32)
    for form in (array, array[None], array[..., None]):
        assert torch.equal(prepare(npy(form), 12, 1)[0], torch.from_numpy(array))


def test_the_centred_square_is_taken():
    array = np.full((4, 8, 10), -1.0)  # (C,H,W)
    array[:, :, 1:9] = RANDOM.uniform(-1, 1, (4, 8, 8))
    assert torch.allclose(prepare(npy(array), 8, 4), torch.from_numpy(array[:, :, 1:9]).float())


@pytest.mark.parametrize(("dtype", "low", "high"), [
    ("bool", 0, 1), ("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535), (">u2", 0, 65535), ("int16", -32768, 32767),
    ("uint32", 0, 2**32 - 1), ("float16", -1, 1), ("float64", -1, 1)])  # fmt: skip
def test_ranges_of_types(dtype, low, high):
    array = np.array([[low, high], [high, low]]).astype(dtype)
    assert torch.equal(prepare(npy(array), 2, 1), torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]]))


def test_a_range_of_ones_own():
    array = np.array([[0, 2048, 4095, 5000]] * 4, dtype=np.uint16)
    for data in (npy(array), png(array[..., None]), npy(array.astype(float)), npy(array.astype(np.int64))):
        row = prepare(data, 4, 1, [0, 4095])[0, 0]
        assert row.tolist() == pytest.approx([-1, 2048 / 4095 * 2 - 1, 1, 1], abs=1e-6)  # what is beyond is bounded
    eight = saved(Image.fromarray(np.array([[10, 110]] * 2, dtype=np.uint8)))
    assert prepare(eight, 2, 1, [10, 110])[0, 0].tolist() == pytest.approx([-1, 1])
    fractions = saved(Image.fromarray(np.full((4, 4), 0.25, dtype=np.float32)), "TIFF")
    assert prepare(fractions, 4, 3, [0, 1]).unique().tolist() == [-0.5]
    with pytest.raises(BrokenImage, match="floating-point pixels.*value_range"):
        prepare(fractions, 4, 3)


@pytest.mark.parametrize(("data", "channels", "told"), [
    (npy(np.zeros((8, 8, 5))), 3, r"an array of shape \(8, 8, 5\); channels: 3 takes \(H,W,3\) or \(3,H,W\)"),
    (npy(np.zeros((8, 8))), 3, r"shape \(8, 8\); channels: 3 takes"),
    (npy(np.zeros((8, 8, 3))), 1, r"channels: 1 takes \(H,W\), \(H,W,1\) or \(1,H,W\)"),
    (npy(np.zeros((2, 8, 8, 3))), 3, r"shape \(2, 8, 8, 3\)"),
    (npy(np.zeros((0, 8, 3))), 3, r"shape \(0, 8, 3\)"),
    (saved(Image.new("RGB", (8, 8))), 5, r"a picture, of 4 channels at most; channels: 5 takes arrays \(.npy, .npz\)"),
    (npy(np.full((8, 8), 200.0)), 1, r"fractions from 200 to 200; they are taken as \[-1, 1\] unless value_range"),
    (npy(np.full((8, 8), np.nan)), 1, "nan or infinite"),
    (npy(np.zeros((8, 8), dtype=np.int64)), 1, "numbers of type int64, whose range says nothing; give value_range"),
    (npy(np.zeros((8, 8), dtype=complex)), 1, "numbers of type complex128"),
    (npy(np.zeros((8, 8)))[:300], 1, "not an array that numpy can read"),
    (npz(a=np.zeros((8, 8)), b=np.zeros((8, 8))), 1, "arrays named a, b; one is expected, or one named image"),
    (npz(a=np.zeros((8, 8)))[:60], 1, "not an array that numpy can read"),
])  # fmt: skip
def test_what_does_not_fit_says_why(data, channels, told):
    with pytest.raises(BrokenImage, match=told):
        prepare(data, 8, channels)


def test_damaged_files_are_broken_and_nothing_worse():
    pixels, generator = levels(4), np.random.default_rng(1)
    whole = [png(pixels), tiff(pixels, packed=True, extra=2), npy(pixels), npz(x=pixels)]
    read = 0
    for turn in range(120):
        data = bytearray(whole[turn % 4])
        for place in generator.integers(0, min(len(data), 200), 2):
            data[place] = generator.integers(0, 256)
        try:
            x = prepare(bytes(data[: len(data) // (1 + turn % 3)]), 8, 4)
        except BrokenImage:
            continue
        read += 1
        assert x.shape == (4, 8, 8) and x.abs().max() <= 1
    assert 0 < read < 120


def test_pickled_objects_are_not_run():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BrokenImage, match="not an array that numpy can read"):
        prepare(file.getvalue(), 8, 1)


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch):
    data = npz(image=np.zeros((100, 100)))
    monkeypatch.setattr(arrays, "MAX_PIXELS", 9_999)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(BrokenImage, match="the limit is 9,999"):
        prepare(data, 8, 1)


def write(root, **files):
    for name, data in files.items():
        (root / name.replace("__", ".")).write_bytes(data)


def test_a_folder_of_arrays(tmp_path):
    first, second = levels(5), levels(5)
    write(tmp_path, a_leaf__npy=npy(first), a_stone__npz=npz(image=second))
    data = ImageFolder(str(tmp_path), size=12, channels=5, flip=True)
    assert [data.caption(i) for i in range(4)] == ["a leaf", "a stone"] * 2
    assert torch.allclose(data[0]["image"], as_tensor(first), atol=1e-7)
    assert torch.equal(data[3]["image"], data[1]["image"].flip(-1))
    assert "5 channels, 12x12" in data.report() and "2 images have more than 8 bits a channel, or are arrays" in data.report()


def test_data_check_takes_the_number_of_channels(tmp_path, capsys):
    from ldm.__main__ import main

    write(tmp_path, a_leaf__npy=npy(levels(5)))
    assert main(["data", "check", str(tmp_path), "--channels", "5", "--size", "12"]) == 0
    assert "1 images, 1 captions, 0 missing; 5 channels, 12x12" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path), "--size", "12"]) == 2
    assert "channels: 3 takes (H,W,3) or (3,H,W)" in capsys.readouterr().err


def test_arrays_beside_pictures_are_something_else(tmp_path):
    write(tmp_path, fox__png=png(levels(3)), fox__npy=npy(levels(5)))
    data = ImageFolder(str(tmp_path), size=12)
    assert len(data) == 1 and "other files, not read: 1 .npy" in data.report()
    assert ImageFolder(str(tmp_path), size=12, channels=5)[0]["key"] == "fox.npy"


def test_channels_that_do_not_fit_name_the_file(tmp_path):
    write(tmp_path, a__npy=npy(levels(4)), b__npy=npy(levels(5)))
    with pytest.raises(UserError, match=r"1 of 2 images are broken.* a.npy \(an array of shape \(12, 12, 4\); channels: 5"):
        ImageFolder(str(tmp_path), size=12, channels=5)
    (tmp_path / "b.npy").unlink()
    (tmp_path / "a.npy").rename(tmp_path / "a.txt")
    write(tmp_path, c__png=png(levels(3)))
    with pytest.raises(UserError, match="no image in this folder.*pictures have 4 channels at most, channels: 5 takes arrays"):
        ImageFolder(str(tmp_path), size=12, channels=5)


@pytest.mark.parametrize(("options", "told"), [
    ({"channels": 0}, "channels: 0; it takes 1 .grey."), ({"value_range": [1.0, 0.0]}, "value_range: .1.0, 0.0.; it takes two"),
    ({"value_range": [0.0]}, "value_range: .0.0.")])  # fmt: skip
def test_wrong_settings(tmp_path, options, told):
    write(tmp_path, a__png=png(levels(3)))
    with pytest.raises(UserError, match=told):
        ImageFolder(str(tmp_path), size=8, **options)


def test_settings_in_a_config():
    block = {"target": "ldm.data.folder.ImageFolder", "params": {"root": "x", "size": 8, "channels": 5, "value_range": [0, 4095]}}
    assert check(block, "data.train") == []
    block["params"] |= {"channels": "five", "value_range": 4095}
    assert [line.split(": ")[0] for line in check(block, "data.train")] == [
        "data.train.params.channels", "data.train.params.value_range"]  # fmt: skip


def test_fingerprints_of_pictures_of_8_bits_stay(tmp_path):
    for i in range(3):
        (tmp_path / f"fox {i}.ppm").write_bytes(b"P6 4 4 255\n" + bytes(range(i, i + 48)))
    data = ImageFolder(str(tmp_path), size=3)
    assert data.fingerprint == "d01fb7d433d062cf"  # what caches were made with before there were other channels
    assert ImageFolder(str(tmp_path), size=3, channels=1).fingerprint == "fd80c2d997c0e5a7"
    assert float(data[1]["image"].double().sum()) == pytest.approx(-21.77647089958191, abs=1e-5)
    others = [ImageFolder(str(tmp_path), size=3, **options).fingerprint
              for options in ({"channels": 4}, {"value_range": [0, 255]}, {"value_range": [0, 100]})]  # fmt: skip
    assert len({data.fingerprint, *others}) == 4


def test_16_bits_ask_for_other_caches(tmp_path, monkeypatch):
    write(tmp_path, a__png=png(levels(3)))
    deep = ImageFolder(str(tmp_path), size=12)
    now = deep.fingerprint
    deep._seen["deep"] = 0  # as if the pixels had gone through 8 bits, as they once did
    assert deep.fingerprint != now


def test_shards_of_arrays(tmp_path):
    import tarfile

    first, second = levels(5), levels(5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.npy", npy(first)), ("1.txt", b"a leaf"), ("2.npy", npy(second)), ("2.txt", b"a stone"),
                           ("2.jpg", saved(Image.new("RGB", (8, 8)), "JPEG"))):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = WebDataset(str(tmp_path), size=12, channels=5)
    assert len(data) == 2 and data.caption(1) == "a stone"
    assert torch.allclose(data[1]["image"], as_tensor(second), atol=1e-7)
    assert len(WebDataset(str(tmp_path), size=8)) == 1  # the picture
