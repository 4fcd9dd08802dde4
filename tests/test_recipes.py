"""The recipes of stage 1 have the published sizes, and a tiny twin of each trains."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import ldm
from autoencoder.nets import Attention
from ldm.common.build import build
from main import main

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "autoencoder").glob("*.yaml"))
# encoder, decoder, 1x1 convolutions and codebook of the published first stages, summed over their checkpoints' keys
PUBLISHED = {
    "kl_f4": 55_312_063, "kl_f8": 83_653_863, "kl_f16": 69_610_963,
    "vq_f4": 55_322_782, "vq_f8": 67_717_295, "vq_f16": 69_593_371, "kl_f8_c16": 83_819_683,  # the last: Stable Diffusion 3
}  # fmt: skip
# (factor, channels, codes), by name
SIZES = {
    "kl_f4": (4, 3, None), "kl_f8": (8, 4, None), "kl_f8_c16": (8, 16, None), "kl_f16": (16, 16, None), "kl_f32": (32, 64, None),
    "vq_f4": (4, 3, 8192), "vq_f8": (8, 4, 16384), "vq_f16": (16, 8, 16384), "fsq_f8": (8, 5, 15360),
}  # fmt: skip


def autoencoder(path):
    """-> of tensors without contents."""
    with torch.device("meta"):
        return build(yaml.safe_load(path.read_text())["model"]["params"]["autoencoder"])


def test_every_recipe_is_known_here():
    assert set(RECIPES) == set(SIZES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_sizes(name):
    model = autoencoder(CONFIGS / f"autoencoder/{name}.yaml")
    assert (model.factor, model.channels, getattr(model.bottleneck, "codes", None)) == SIZES[name]
    if name in PUBLISHED:
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECIPES)
def test_its_twin_is_the_same_but_smaller(name):
    big, tiny = (autoencoder(CONFIGS / path) for path in (f"autoencoder/{name}.yaml", f"tiny/autoencoder_{name}.yaml"))
    assert tiny.factor == big.factor and type(tiny.bottleneck) is type(big.bottleneck)
    assert name == "fsq_f8" or tiny.channels == big.channels
    attended = [[any(isinstance(layer, Attention) for layer in level) for level in model.encoder.levels] for model in (big, tiny)]
    assert attended[0] == attended[1] and sum(p.numel() for p in tiny.parameters()) < 1e6


TINY = sorted((CONFIGS / "tiny").glob("autoencoder_*.yaml"))
SHORT = ["trainer.max_steps=3", "loader.batch_size=4", "data.train.params.count=8", "data.validation.params.count=4",
         "validation={every: 3, batches: 1}", "logging={every: 1, images_every: 100, wandb: false}"]  # fmt: skip


def train(path, folder, *more):
    """-> the run's folder and the numbers of its steps."""
    assert main(["-b", str(path), "-t", "-l", str(folder), "--no-test", *SHORT, *more]) == 0
    (run,) = folder.glob("*/DONE")
    rows = [json.loads(line) for line in (run.parent / "metrics.jsonl").read_text().splitlines()]
    return run.parent, [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_a_tiny_twin_trains(path, tmp_path):
    run, rows = train(path, tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    if "critic" in yaml.safe_load(path.read_text())["model"]["params"]:  # which is heard from the third batch on
        assert [row["train/adversarial_weight"] > 0 for row in rows] == [False, False, True]
    found = ldm.load(run).autoencoder
    assert found.statistics_count == 8 and (found.scale > 0).all()
    with torch.no_grad():
        assert found.decode(found.encode(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 64, 64)


def test_diffusion_on_pixels_trains(tmp_path, text_encoder):
    text = {"encoder": text_encoder, "layer": 1, "max_length": 24}  # one that is made here in place of a package's
    run, rows = train(CONFIGS / "tiny/pixel.yaml", tmp_path,
                      *(f"model.params.conditioner.params.{key}={value}" for key, value in text.items()))
    assert [row["step"] for row in rows] == [1, 2, 3]
    bundle = ldm.load(run)
    assert bundle.autoencoder.factor == 1 and bundle.generate(["a red circle"], steps=2).shape == (1, 3, 64, 64)
