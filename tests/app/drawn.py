"""Running commands that draw: models in files, pictures in files, what comes out."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.__main__ import main


def run(command, ckpt, outdir, *more):
    """-> the pictures' pixels, (H,W,3) uint8 each."""
    assert main([command, "--ckpt", str(ckpt), "--outdir", str(outdir), "--device", "cpu", *map(str, more)]) == 0
    return pixels(outdir)


def pixels(folder):
    files = sorted(file for file in Path(folder).glob("*.png") if file.stem.isdigit())
    return [np.asarray(Image.open(file)) for file in files]


def levels(pictures):
    """(N,3,H,W) in [-1,1] -> as `run` gives them."""
    return list(((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def same(found, expected):
    return len(found) == len(expected) and all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def picture(path, height, width, seed=0, mode="RGB"):
    """A file of random smooth colours -> its pixels (H,W,3)."""
    chance = np.random.default_rng(seed)
    small = Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    image.save(path)
    return np.asarray(image.convert("RGB"))


def mask(path, height, width, box, mode="L"):
    """White in box = top, left, bottom, right -> (H,W) bool."""
    found = np.zeros((height, width), dtype=bool)
    found[box[0] : box[2], box[1] : box[3]] = True
    Image.fromarray((255 * found).astype(np.uint8)).convert(mode).save(path)
    return found


def fails(capsys, *arguments):
    """-> the one line that says what is wrong; nothing is written to stdout."""
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert captured.out == "" and len(errors) == 1 and lines[-1] == errors[0]
    return errors[0]
