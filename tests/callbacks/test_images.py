import json

import pytest
import torch
from PIL import Image
from tiny_training import fit

from ldm.callbacks.clock import Clock
from ldm.callbacks.images import Panel, Pictures, reconstructions, samples
from ldm.callbacks.sheet import CELL, MARGIN, save_png, sheet, to_image


def test_pictures_stand_in_rows_above_their_captions():
    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 64, 64)
    page = sheet(torch.stack([red, -red, red]), ["one", "two " * 40, "three"], columns=2)
    side = 64 * 3  # enlarged by a whole number
    assert side >= CELL and page.width == 2 * side + 3 * MARGIN
    assert page.getpixel((MARGIN + 5, MARGIN + 5)) == (255, 0, 0)
    assert page.getpixel((2 * MARGIN + side + 5, MARGIN + 5)) == (0, 255, 255)
    below = page.crop((MARGIN, MARGIN + side + 2, MARGIN + side, MARGIN + side + 14))
    assert min(below.convert("L").get_flattened_data()) < 100  # there is writing


def test_pictures_of_1_3_and_4_channels_are_what_they_are():
    levels = torch.arange(4) / 255 * 2 - 1
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        image = to_image(levels[:channels, None, None].expand(-1, 2, 5))
        assert (image.mode, image.size) == (mode, (5, 2))
        assert image.getpixel((4, 1)) == (tuple(range(channels)) if channels > 1 else 0)


@pytest.mark.parametrize(("channels", "columns", "rows"), [(2, 2, 1), (5, 3, 2), (9, 3, 3)])
def test_other_channels_are_grey_tiles(channels, columns, rows):
    image = to_image((torch.arange(channels) / 255 * 2 - 1)[:, None, None].expand(-1, 4, 6))
    assert (image.mode, image.size) == ("L", (6 * columns, 4 * rows))
    shown = [image.getpixel((6 * (c % columns) + 3, 4 * (c // columns) + 2)) for c in range(columns * rows)]
    assert shown == [*range(channels), *[255] * (columns * rows - channels)]


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_sheets_of_any_channels(channels):
    page = sheet(torch.zeros(2, channels, 8, 16), ["a", "b"])
    assert page.mode == "RGB" and page.height > 16


def test_what_is_transparent_shows_a_chequered_ground():
    clear = torch.tensor([1.0, -1.0, -1.0, -1.0]).view(4, 1, 1).expand(4, 64, 64)
    page = sheet(torch.stack([clear, torch.cat([clear[:3], -clear[3:]])]), ["", ""], columns=2)
    side = 64 * 3
    assert {page.getpixel((MARGIN + x, MARGIN + 4)) for x in (4, 12)} == {(235,) * 3, (195,) * 3}
    assert page.getpixel((2 * MARGIN + side + 4, MARGIN + 4)) == (255, 0, 0)


def test_what_a_sheet_shows_is_in_the_file(tmp_path):
    save_png(sheet(torch.zeros(1, 3, 8, 8), ["größe"]), tmp_path / "a.png", {"prompts": ["größe"], "seed": 3})
    assert json.loads(Image.open(tmp_path / "a.png").text["ldm"]) == {"prompts": ["größe"], "seed": 3}


class Viewer:
    def __init__(self):
        self.seen = []

    def picture(self, name, image, caption, step):
        self.seen.append((name, caption, step))


def test_sheets_on_the_way(tmp_path):
    clock, viewer = Clock(), Viewer()
    draw = Pictures(lambda module: Panel(torch.zeros(2, 3, 8, 8), ["a", "b"]), tmp_path / "samples", 2, clock, [viewer])
    fit([clock, draw], steps=3, accumulate_grad_batches=2)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000002.png"]
    assert viewer.seen == [("samples", "a | b", 2)] and clock.pauses["pictures"] > 0


def test_none_where_the_interval_is_zero(tmp_path):
    fit([Pictures(lambda module: 1 / 0, tmp_path / "samples", 0, Clock())], steps=2)
    assert not (tmp_path / "samples").exists()


def test_reconstructions_stand_under_their_originals():
    class Module:
        device = "cpu"

        def reconstruct(self, x):
            return x + 0.2

    x = torch.zeros(3, 3, 8, 8)
    panel = reconstructions(x)(Module())
    assert torch.equal(panel.pictures[:3], x) and panel.columns == 3
    assert panel.captions[:3] == ["original"] * 3 and panel.captions[3] == "20.0 dB"  # 10 log10(4 / 0.04)


def test_samples_are_those_of_the_averaged_model():
    calls = []

    class Model:
        def generate(self, batch, **options):
            calls.append((batch, options))
            return torch.zeros(2, 3, 8, 8)

    def averaged(module):
        calls.append(module)
        return Model()

    batch = {"caption": ["a", "b"]}
    panel = samples(batch, averaged, seed=7)("module")
    assert calls == ["module", (batch, {"seed": 7})] and panel.captions == ["a", "b"] and panel.about["seed"] == 7


def test_a_full_disk_ends_nothing(tmp_path, caplog):
    (tmp_path / "samples").write_text("a file where the folder should be")
    draw = Pictures(lambda module: Panel(torch.zeros(1, 3, 8, 8), ["a"]), tmp_path / "samples", 1, Clock())
    fit([draw], steps=1)
    assert "training goes on" in caplog.text


@pytest.mark.parametrize("n", [1, 5])
def test_columns_by_themselves(n):
    page = sheet(torch.zeros(n, 3, 8, 8), [""] * n)
    assert page.width > 0
