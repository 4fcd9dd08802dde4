"""`inpaint` on the command line: every pixel beside the mask is that of the file."""

import copy

import numpy as np
import pytest
from drawn import fails, mask, picture, run, same
from PIL import Image
from random_models import random_model

from ldm.app import png

TEXT_AND_MASK = {"target": "ldm.conditioners.join.Join"}


@pytest.fixture(scope="module")
def models(bundle, model_config, tmp_path_factory):
    """Checkpoints: of a model of text, of one that was trained to inpaint under text."""
    folder = tmp_path_factory.mktemp("models")
    bundle.save(folder / "text.ckpt")
    text = copy.deepcopy(model_config["model"]["params"]["conditioner"])
    parts = [text, {"target": "ldm.conditioners.spatial.MaskedImage"}]
    random_model(model_config, {"target": "ldm.conditioners.join.Join", "params": {"parts": parts}}).save(folder / "inpaint.ckpt")
    return folder


@pytest.mark.parametrize(("model", "more"), [
    ("text", []), ("text", ["--method", "repaint", "--jump", 1, "--resample", 2]), ("inpaint", []), ("inpaint", ["--method", "replace"])])
def test_unmasked_pixels_are_the_files(models, tmp_path, model, more):
    pixels = picture(tmp_path / "a.png", 32, 40)
    inside = mask(tmp_path / "m.png", 32, 40, (8, 8, 21, 30))
    given = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--prompt", "red", "--steps", 3, *more]
    found = run("inpaint", models / f"{model}.ckpt", tmp_path / "out", *given, "--n-samples", 2)
    for drawn in found:
        assert np.array_equal(drawn[~inside], pixels[~inside]) and (drawn[inside] != pixels[inside]).any(axis=-1).mean() > 0.9
    assert not same(found[:1], found[1:])
    about = png.read(tmp_path / "out" / "00001.png")
    assert about["task"] == "inpaint" and set(about["inputs"]) == {"image", "mask"}
    again = run("inpaint", models / f"{model}.ckpt", tmp_path / "again", "--from-image", tmp_path / "out" / "00001.png")
    assert same(again, found[1:])


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "RGBA"])
def test_masks_of_all_modes(models, tmp_path, mode):
    pixels = picture(tmp_path / "a.png", 32, 32)
    inside = mask(tmp_path / "m.png", 32, 32, (0, 0, 32, 15), mode)
    (drawn,) = run("inpaint", models / "inpaint.ckpt", tmp_path / "out", "--image", tmp_path / "a.png", "--mask", tmp_path / "m.png",
                   "--prompt", "red", "--steps", 1)  # fmt: skip
    assert np.array_equal(drawn[~inside], pixels[~inside]) and (drawn[inside] != pixels[inside]).any()


def test_a_mask_of_another_size_is_resized_and_told(models, tmp_path, caplog):
    pixels = picture(tmp_path / "a.png", 32, 32)
    mask(tmp_path / "m.png", 16, 16, (4, 4, 8, 10))
    given = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--prompt", "red", "--steps", 1]
    (drawn,) = run("inpaint", models / "text.ckpt", tmp_path / "out", *given)
    changed = (drawn != pixels).any(axis=-1)
    assert "a mask of 16 x 16 for a picture of 32 x 32: resized" in caplog.text
    assert not changed[:8].any() and not changed[16:].any() and changed[8:16, 8:20].mean() > 0.9 and not changed[:, 20:].any()


def test_pictures_of_sizes_that_are_no_multiples(models, tmp_path):
    pixels = picture(tmp_path / "a.png", 29, 43)
    inside = mask(tmp_path / "m.png", 29, 43, (10, 0, 29, 43))
    given = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--prompt", "red", "--steps", 1, "--fit", "pad"]
    (drawn,) = run("inpaint", models / "inpaint.ckpt", tmp_path / "out", *given)
    assert drawn.shape == pixels.shape and np.array_equal(drawn[~inside], pixels[~inside])
    small = run("inpaint", models / "inpaint.ckpt", tmp_path / "small", *given[:-2], "--height", 16, "--width", 24)
    assert small[0].shape == (16, 24, 3)


def test_outpainting(models, tmp_path):
    pixels = picture(tmp_path / "a.png", 24, 24)
    given = ["--image", tmp_path / "a.png", "--prompt", "red", "--steps", 2, "--expand", 8, 0, 0, 16]
    for model in ("text", "inpaint"):
        (drawn,) = run("inpaint", models / f"{model}.ckpt", tmp_path / model, *given)
        assert drawn.shape == (40, 32, 3) and np.array_equal(drawn[:24, 8:], pixels)
        assert (drawn[24:, 8:] != pixels[23]).any()  # no repeated edge
        again = run("inpaint", models / f"{model}.ckpt", tmp_path / f"{model}2", "--from-image", tmp_path / model / "00000.png")
        assert same(again, [drawn])
    padded = [*given[:-4], 7, 1, 2, 3, "--fit", "pad"]
    (drawn,) = run("inpaint", models / "inpaint.ckpt", tmp_path / "odd", *padded)
    assert drawn.shape == (28, 33, 3) and np.array_equal(drawn[1:25, 7:31], pixels)


def test_feathering_is_asked_for(models, tmp_path):
    pixels = picture(tmp_path / "a.png", 32, 32)
    mask(tmp_path / "m.png", 32, 32, (0, 0, 32, 12))
    given = ["--image", tmp_path / "a.png", "--mask", tmp_path / "m.png", "--prompt", "red", "--steps", 1, "--feather", 4]
    (drawn,) = run("inpaint", models / "text.ckpt", tmp_path / "out", *given)
    changed = (drawn != pixels).any(axis=-1)
    assert changed[:, 12:14].mean() > 0.5 and not changed[:, 16:].any()


def test_mistakes(models, tmp_path, capsys):
    picture(tmp_path / "a.png", 32, 32)
    mask(tmp_path / "m.png", 32, 32, (0, 0, 32, 12))
    mask(tmp_path / "black.png", 32, 32, (0, 0, 0, 0))
    mask(tmp_path / "wide.png", 32, 64, (0, 0, 8, 8))
    picture(tmp_path / "colours.png", 32, 32, seed=3)
    Image.new("RGBA", (32, 32), (255, 255, 255, 100)).save(tmp_path / "clear.png")
    base = ["inpaint", "--ckpt", models / "text.ckpt", "--outdir", tmp_path / "out", "--prompt", "red", "--image", tmp_path / "a.png"]
    for name, told in (("black", "black everywhere; white is where to paint"), ("wide", "a mask of height 32 x width 64 for a picture of 32 x 32"),
                       ("colours", "has colours; a mask is white where to paint"), ("clear", "has transparent pixels"),
                       ("missing", "missing.png: no such file")):  # fmt: skip
        assert told in fails(capsys, *base, "--mask", tmp_path / f"{name}.png")
    for more, told in (([], "give --mask (white where to paint; or --expand)"), (["--expand", 0, 0, 0, 0], "nothing to paint"),
                       (["--expand", 0, 0, -1, 0], "expected a whole number from 0"),
                       (["--mask", tmp_path / "m.png", "--method", "model"], "was not trained to inpaint")):  # fmt: skip
        assert told in fails(capsys, *base, *more)
    told = fails(capsys, "txt2img", "--ckpt", models / "inpaint.ckpt", "--outdir", tmp_path / "out", "--prompt", "red")
    assert "give --image (the picture to paint in), --mask (white where to paint); or use `python -m ldm inpaint`" in told
    assert not (tmp_path / "out").exists()
