"""Metadata in pictures."""

import json

import pytest
import torch
from PIL import Image

from ldm.__main__ import main
from ldm.app import png
from ldm.callbacks.sheet import to_image
from ldm.common.files import UserError

ABOUT = {"prompt": "ein kleiner Käfer 🐞, \"quoted\"\nand broken", "seed": 2**40, "scale": 3.0, "size": [64, 32]}


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((32, 64)).convert("RGB")


def test_what_is_written_is_read(picture, tmp_path):
    png.write(tmp_path / "a.png", picture, ABOUT)
    assert png.read(tmp_path / "a.png") == ABOUT
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["ldm"] and image.tobytes() == picture.tobytes()
    assert png.is_png(tmp_path / "a.png")


def test_without_metadata_there_is_none(picture, tmp_path):
    png.write(tmp_path / "a.png", picture, None)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {}
    with pytest.raises(UserError, match="without metadata"):
        png.read(tmp_path / "a.png")


def test_levels_are_rounded_and_bounded():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0 - 1 / 255 + 1e-4, 1.0, 2.0]).expand(3, 1, 6)
    assert list(to_image(values).getchannel(0).tobytes()) == [0, 0, 128, 255, 255, 255]


def test_not_a_picture(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert not png.is_png(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: not a PNG"):
        png.read(tmp_path / "a.png")
    with pytest.raises(UserError, match="no such file"):
        png.read(tmp_path / "b.png")
    png.write(tmp_path / "whole.png", picture, ABOUT)
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="half.png: not a PNG"):
        png.read(tmp_path / "half.png")


@pytest.mark.parametrize("text", ["{broken", "[1]"])
def test_metadata_of_another_kind(picture, tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("ldm", text)
    picture.save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match="a.png: its metadata .* JSON"):
        png.read(tmp_path / "a.png")


def test_info_prints_it(picture, tmp_path, capsys):
    png.write(tmp_path / "a.png", picture, ABOUT)
    assert main(["info", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out) == ABOUT
