"""`img2img`, `variations`, `edit`: pictures from pictures, on the command line."""

import os

import numpy as np
import pytest
import torch
from drawn import fails, levels, picture, pixels, run, same
from PIL import Image

from ldm import tasks
from ldm.app import png
from ldm.common.files import file_sha256


@pytest.fixture
def source(tmp_path):
    picture(tmp_path / "a.png", 32, 40)
    return tmp_path / "a.png"


def tensor(path):
    return (torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)) / 127.5 - 1).permute(2, 0, 1)[None]


def test_strength_0_and_1(ckpt, bundle, source, tmp_path):
    rebuilt = run("img2img", ckpt, tmp_path / "0", "--image", source, "--prompt", "red", "--strength", 0)
    assert same(rebuilt, levels(bundle.autoencoder.decode(bundle.autoencoder.encode(tensor(source))).detach().clamp(-1, 1)))
    run("reconstruct", ckpt, tmp_path / "r", "--images", source, "--whole")
    assert np.array_equal(rebuilt[0], pixels(tmp_path / "r")[0][:, 40:80])  # original, reconstruction, difference
    drawn = run("img2img", ckpt, tmp_path / "1", "--image", source, "--prompt", "red", "--strength", 1, "--seed", 4)
    plain = run("txt2img", ckpt, tmp_path / "p", "--prompt", "red", "--seed", 4, "--height", 32, "--width", 40)
    assert same(drawn, plain)


def test_a_picture_draws_itself_again(ckpt, bundle, source, tmp_path, caplog):
    more = ["--strength", 0.45, "--sampler", "ddpm", "--scale", 3, "--n-samples", 2, "--negative-prompt", "green"]
    first = run("img2img", ckpt, tmp_path / "a", "--image", source, "--prompt", "red", "blue star", "--seed", 7, *more)
    made = tasks.img2img(bundle, tensor(source), ["red", "red", "blue star", "blue star"], strength=0.45, sampler="ddpm", guidance=3.0,
                         seed=7, negative_prompt="green", batch_size=1)
    for drawn, expected in zip(first, levels(made), strict=True):  # sums of another batch are rounded in another order
        assert np.abs(drawn.astype(int) - expected).max() <= 1 and (drawn != expected).mean() < 0.01
    about = png.read(tmp_path / "a" / "00002.png")
    assert about["task"] == "img2img" and about["prompt"] == "blue star" and about["seed"] == 9 and about["strength"] == 0.45
    assert about["inputs"] == {"image": {"path": str(source), "sha256": file_sha256(source)}} and about["size"] == [32, 40]
    again = run("img2img", ckpt, tmp_path / "b", "--from-image", tmp_path / "a" / "00002.png")
    assert same(again, first[2:3]) and png.read(tmp_path / "b" / "00000.png") == about and "may differ" not in caplog.text
    other = run("img2img", ckpt, tmp_path / "c", "--from-image", tmp_path / "a" / "00002.png", "--strength", 0.9)
    assert not same(other, again) and png.read(tmp_path / "c" / "00000.png")["strength"] == 0.9


def test_the_source_is_asked_for_again(ckpt, source, tmp_path, capsys):
    run("img2img", ckpt, tmp_path / "a", "--image", source, "--prompt", "red", "--steps", 2)
    drawn = tmp_path / "a" / "00000.png"
    os.rename(source, tmp_path / "moved.png")
    base = ["img2img", "--ckpt", ckpt, "--outdir", tmp_path / "b", "--from-image", drawn]
    told = fails(capsys, *base)
    assert "a.png" in told and "which is not there; give it with --image" in told
    picture(source, 32, 40, seed=5)
    assert "which is another file now; give it with --image" in fails(capsys, *base)
    assert same(run("img2img", ckpt, tmp_path / "b", "--from-image", drawn, "--image", tmp_path / "moved.png"), pixels(tmp_path / "a"))
    assert "`python -m ldm img2img` has drawn it" in fails(capsys, "txt2img", *base[1:4], tmp_path / "c", "--from-image", drawn)


def test_alone_and_in_a_batch(ckpt, source, tmp_path):
    picture(tmp_path / "b.png", 32, 40, seed=1)
    both = run("img2img", ckpt, tmp_path / "x", "--image", source, tmp_path / "b.png", "--prompt", "red", "--batch-size", 2)
    alone = run("img2img", ckpt, tmp_path / "y", "--image", tmp_path / "b.png", "--prompt", "red", "--seed", 1)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert (tmp_path / "x" / "sheet.png").is_file()


def test_files_of_all_kinds(ckpt, source, tmp_path):
    """EXIF's turn, grey, palette, opacity over white, 16 bits: as for training."""
    image = Image.open(source)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    base = ["--prompt", "red", "--strength", 0.4, "--steps", 2]
    found = {name: run("img2img", ckpt, tmp_path / f"out-{name}", "--image", tmp_path / f"{name}.png", *base)
             for name in ("a", "turned", "deep", "grey", "rgba")}
    assert same(found["turned"], found["a"]) and same(found["rgba"], found["a"])
    assert np.abs(found["deep"][0].astype(int) - found["grey"][0]).max() <= 1 and not same(found["grey"], found["a"])


def test_sizes(ckpt, bundle, source, tmp_path, capsys):
    picture(tmp_path / "odd.png", 30, 41)
    base = ["--image", tmp_path / "odd.png", "--prompt", "red", "--strength", 0.4, "--steps", 2]
    told = fails(capsys, "img2img", "--ckpt", ckpt, "--outdir", tmp_path / "o", *base)
    assert "height 30 x width 41" in told and "nearest: 24 x 40 or 32 x 48" in told and "--fit pad" in told
    (found,) = run("img2img", ckpt, tmp_path / "a", *base, "--fit", "pad")
    frame = tasks.framed(bundle, 30, 41, "pad")
    made = tasks.img2img(bundle, frame.pad(tensor(tmp_path / "odd.png")), "red", strength=0.4, steps=2)
    assert found.shape == (30, 41, 3) and same([found], levels(frame.crop(made)))
    assert same(run("img2img", ckpt, tmp_path / "b", "--from-image", tmp_path / "a" / "00000.png"), [found])
    (cut,) = run("img2img", ckpt, tmp_path / "c", *base, "--height", 32, "--width", 32)
    assert cut.shape == (32, 32, 3)
    both = ["--image", tmp_path / "odd.png", source, "--prompt", "red"]
    assert "pictures of several sizes" in fails(capsys, "img2img", "--ckpt", ckpt, "--outdir", tmp_path / "o", *both)
    drawn = run("txt2img", ckpt, tmp_path / "d", "--prompt", "red", "--height", 30, "--width", 41, "--fit", "pad", "--steps", 2)
    assert same(drawn, levels(frame.crop(bundle.generate(["red"], size=(32, 48), steps=2))))
    (wide,) = run("txt2img", ckpt, tmp_path / "e", "--prompt", "red", "--height", 32, "--width", 96, "--window", 32, "--steps", 2)
    assert same([wide], levels(bundle.generate(["red"], size=(32, 96), steps=2, window=32)))
    assert same(run("txt2img", ckpt, tmp_path / "f", "--from-image", tmp_path / "e" / "00000.png"), [wide])


def test_previews_of_tasks_are_small(ckpt, source, tmp_path):
    given = ["--image", source, "--prompt", "red", "--steps", 4, "--preview", 2, "--height", 512, "--width", 384, "--strength", 0.4]
    run("img2img", ckpt, tmp_path / "a", *given)
    assert Image.open(tmp_path / "a" / "preview.png").height < 300


def test_variations(ckpt, bundle, source, tmp_path, caplog):
    found = run("variations", ckpt, tmp_path / "a", "--image", source, "--n-samples", 2, "--strength", 0.5, "--steps", 3)
    assert same(found, levels(tasks.img2img(bundle, tensor(source), ["", ""], strength=0.5, steps=3, batch_size=1)))
    about = png.read(tmp_path / "a" / "00001.png")
    assert about["method"] == "img2img" and about["prompt"] == ""
    assert same(run("variations", ckpt, tmp_path / "b", "--from-image", tmp_path / "a" / "00001.png"), found[1:])
    turned = run("variations", ckpt, tmp_path / "c", "--image", source, "--method", "inversion", "--strength", 0.3, "--steps", 3)
    made = tasks.variations(bundle, tensor(source), [""], method="inversion", strength=0.3, steps=3)
    assert same(turned, levels(made))


def test_variations_say_how(ckpt, source, tmp_path, caplog, capsys):
    with caplog.at_level("INFO"):
        run("variations", ckpt, tmp_path / "a", "--image", source, "--steps", 1)
    assert "variations by noise on the picture, strength 0.6 (SDEdit)" in caplog.text
    told = fails(capsys, "variations", "--ckpt", ckpt, "--outdir", tmp_path / "b", "--image", source, "--method", "embedding")
    assert "take img2img or inversion" in told


def test_edit(ckpt, bundle, source, tmp_path, capsys):
    prompts = ["--prompt", "a red star", "a blue star"]
    found = run("edit", ckpt, tmp_path / "a", "--image", source, *prompts, "--refine", 2, "--scale", 2, "--steps", 3)
    made = tasks.edit(bundle, tensor(source), "a red star", "a blue star", refine=2, guidance=2.0, steps=3)
    assert same(found, levels(made))
    about = png.read(tmp_path / "a" / "00000.png")
    assert (about["prompt"], about["to"]["prompt"], about["refine"], about["sampler"]) == ("a red star", "a blue star", 2, "ddim")
    assert same(run("edit", ckpt, tmp_path / "b", "--from-image", tmp_path / "a" / "00000.png"), found)
    back = run("edit", ckpt, tmp_path / "c", "--image", source, "--prompt", "a red star", "--scale", 1, "--steps", 8, "--refine", 8)
    plain = run("img2img", ckpt, tmp_path / "d", "--image", source, "--prompt", "a red star", "--strength", 0)
    assert np.abs(back[0].astype(int) - plain[0]).mean() < 3
    base = ["edit", "--ckpt", ckpt, "--outdir", tmp_path / "e", "--image", source]
    assert "conditions of two pictures" in fails(capsys, *base, "--prompt", "a", "b", "c")
    assert "--strength 0: the picture itself" in fails(capsys, *base, "--prompt", "a", "b", "--strength", 0)


def test_mistakes(ckpt, source, tmp_path, capsys):
    base = ["img2img", "--ckpt", ckpt, "--outdir", tmp_path / "out", "--prompt", "red"]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    for more, told in (
        (["--image", "/no/such.png"], "--image /no/such.png: no such file"),
        (["--image", tmp_path / "broken.png"], "broken.png: not an image that Pillow can read"),
        (["--image", source, "--strength", 1.5], "--strength 1.5: it lies between 0"),
        (["--image", source, "--strength", -1], "--strength -1"),
        ([], "give --image (the picture to begin with)"),
        (["--image", source, "--class", 3], "--class: this model has no such condition; it reads --prompt (a text), --image"),
        (["--image", source, "--n-samples", 0], "expected a whole number from 1"),
        (["--image", source, source, source, "--class", 1, 2], "one condition of each kind, or as many"),
        (["--image", source, "--condition", "weather"], "--condition weather: expected KEY=VALUE"),
        (["--image", source, "--classifier-scale", 2], "--classifier-scale: give --classifier too"),
        (["--image", source, "--sampler", "ddimm"], "nearest: 'ddim'"),
    ):
        assert told in fails(capsys, *base, *more)
    assert "not UTF-8 (at byte 6)" in fails(capsys, *base[:5], "--image", source, "--prompts-file", tmp_path / "latin.txt")
    assert not (tmp_path / "out").exists()
