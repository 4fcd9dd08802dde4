"""`python -m ldm evaluate likelihood`."""

import csv
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from autoencoder.base import Identity
from ldm.__main__ import main
from ldm.bundle import Bundle
from ldm.denoiser import Denoiser
from ldm.metrics.likelihood import Settings, evaluate
from ldm.process import DDPM, RectifiedFlow
from ldm.times import karras, linear

SHAPES = {"target": "ldm.data.shapes.Shapes", "params": {"count": 5}}


@pytest.fixture(scope="module")
def model(bundle, model_config, tmp_path_factory) -> str:
    """Latents of 4 x 16 x 16, and drawn shapes by its config."""
    config = {**model_config, "data": {"train": SHAPES, "validation": SHAPES}}
    path = tmp_path_factory.mktemp("model") / "model.ckpt"
    Bundle(bundle.autoencoder, bundle.conditioner, bundle.denoiser, config, config["sampling"]).save(path)
    return str(path)


def run(*arguments) -> None:
    assert main(["evaluate", "likelihood", *map(str, arguments)]) == 0


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["evaluate", "likelihood", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].startswith("error: ")
    return captured.err


def test_a_model_of_latents(model, tmp_path, capsys):
    out = tmp_path / "out"
    run("--ckpt", model, "--n", 3, "--batch-size", 2, "--steps", 4, "--kind", "both", "--tolerance", 0.3, "--continuous",
        "--rate-distortion", "--outdir", out)
    said = capsys.readouterr().out
    for text in ("3 of 3 x 64 x 64; condition: each picture's own, no guidance", "of latents, a density at unit scale",
                 "4 steps, large variance (prior 0.0000 + steps ", "of infinitely many steps", "probability-flow ODE",
                 "upper bound with the decoder's term", "standard deviation at unit scale: the autoencoder's own"):
        assert text in said, text
    found = json.loads((out / "likelihood.json").read_text())
    table, about = found["likelihood"], found["about"]
    pixels, latents = table["pixels"], table["latents"]
    for kind in ("bound", "continuous_bound", "ode"):
        total = pixels["reconstruction"] - pixels["posterior_entropy"] + pixels[kind]["prior_of_latents"]
        assert math.isclose(pixels[kind]["bits_per_dim"], total, rel_tol=1e-9)
        assert math.isclose(pixels[kind]["prior_of_latents"] * 3 * 64 * 64, latents[kind]["bits_per_dim"] * 4 * 16 * 16, rel_tol=1e-9)
    assert latents["shape"] == [4, 16, 16] and latents["std"] is None and latents["ode"]["evaluations"] > 6
    assert about["bound"] == {"steps": 4, "times": "karras", "variance": "large"} and about["ode"]["tolerance"] == 0.3
    assert len(table["steps"]["t"]) == 4 and table["steps"]["noise_level"][0] is None
    with open(out / "rate_distortion.csv") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["bits_per_dim"]) for row in rows]
    assert rates == table["rate_distortion"]["bits_per_dim"] == sorted(rates) and rates[0] == 0
    assert Image.open(out / "rate_distortion.png").width > 300
    assert "is there already" in fails(capsys, "--ckpt", model, "--outdir", out)


def test_a_picture_does_not_depend_on_its_batch(model, tmp_path):
    for size in (1, 3):
        run("--ckpt", model, "--n", 3, "--batch-size", size, "--steps", 2, "--out", tmp_path / f"{size}.json", "--latent-std", 0.1,
            "--decoder", "laplace")
    one, three = (json.loads((tmp_path / f"{size}.json").read_text())["likelihood"] for size in (1, 3))
    assert one["latents"]["std"] == 0.1
    assert math.isclose(one["pixels"]["bound"]["bits_per_dim"], three["pixels"]["bound"]["bits_per_dim"], rel_tol=1e-4)


def test_a_folder_without_captions(model, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / name)
    run("--ckpt", model, "--images", tmp_path, "--steps", 2, "--times", "linear", "--variance", "small")
    assert "2 of 3 x 32 x 32; condition: none, no guidance" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "told"), [
    (["--kind", "ode", "--rate-distortion"], "--rate-distortion: comes from the bound; give --kind bound, or both"),
    (["--decoder-std", "0"], "--decoder-std 0: expected a number above 0"),
    (["--precision", "bf16"], "--precision: likelihoods are computed in fp32"),
    (["--size", "32"], "--size: belongs to --images"),
    (["--clip"], "--clip: belongs to models of pixels; this is one of latents"),
    (["--times", "karas"], "nearest: 'karras'"),
])
def test_what_cannot_be(model, options, told, capsys):
    assert told in fails(capsys, "--ckpt", model, *options)


def test_a_model_of_pixels(tmp_path, capsys):
    unet = dict(model_channels=16, channel_mult=[1], num_res_blocks=1, transformer_depth=[0], num_heads=2, patch_size=8)
    config = {
        "name": "pixels", "autoencoder": {"target": "autoencoder.base.Identity"},
        "model": {"target": "ldm.lit.DiffusionModule", "params": {
            "network": {"target": "ldm.networks.unet.UNet", "params": unet},
            "process": {"target": "ldm.process.DDPM", "params": {"schedule": "linear", "steps": 4}}, "parameterization": "v",
            "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}}}},
        "data": {"train": SHAPES}, "sampling": {"size": [64, 64]},
    }  # fmt: skip
    made, source = Bundle.from_config(config).to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for value in made.state_dict().values():
        value.fill_(0) if not value.is_floating_point() else value.normal_(0, 0.05, generator=source)
    made.autoencoder.set_statistics(torch.zeros(3), torch.ones(3), 1)
    made.save(tmp_path / "pixels.safetensors")
    run("--ckpt", tmp_path / "pixels.safetensors", "--n", 2, "--kind", "both", "--tolerance", 0.1, "--clip", "--out", tmp_path / "a.json")
    said = capsys.readouterr().out
    for text in ("2 of 3 x 64 x 64; condition: none", "upper bound, 4 steps, large variance (prior ", "noise uniform over their level"):
        assert text in said, text
    assert "latents" not in said and "p(x|z)" not in said
    found = json.loads((tmp_path / "a.json").read_text())
    bound = found["likelihood"]["pixels"]["bound"]
    assert math.isclose(bound["bits_per_dim"], bound["prior"] + bound["steps"] + bound["last_step"], rel_tol=1e-9)
    assert found["about"]["clip"] is True and found["about"]["bound"]["times"] == "linear"
    assert "belongs to models of latents" in fails(capsys, "--ckpt", tmp_path / "pixels.safetensors", "--latent-std", 1)


# Pixels: a denoiser that knows the data, which are normal around grey, each level rounded.


class Known(nn.Module):
    """x0 = E[x0 | x_t] of N(0, std^2), as a network that says x0."""

    def __init__(self, process, std):
        super().__init__()
        self.process, self.std = process, std

    def forward(self, x, time, cond):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in self.process.exact(time.double() / 1000 if self.process.t_data == 0 else time.double()))
        return (alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * x).float()


@pytest.mark.parametrize(("process", "scale"), [(RectifiedFlow(), 1.0), (RectifiedFlow(), 0.5), (DDPM("linear", 200, 5e-4, 0.1), 1.0)])
def test_pixels_against_their_entropy(process, scale):
    """Bounds and ODE come near the entropy of the levels, from above; x0 at another scale gives the same. This denoiser knows
    nothing of levels: noise finer than one, which the continuous bound goes down to, only costs."""
    std = 0.25
    levels = (127.5 * (1 + std * torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)))).round().clamp(0, 255)
    space = Identity()
    space.set_statistics(torch.zeros(3), torch.full((3,), scale), 1)
    denoiser = Denoiser(Known(process, std / scale), process, "data")
    times = karras(process, 100, sigma_min=0.01 / scale) if process.t_data == 0 else linear(process, 200)
    table = evaluate(space, None, denoiser, lambda: iter([{"image": levels / 127.5 - 1}]), Settings(
        times, continuous=50, ode=True, rate_distortion=True))
    entropy = math.log2(127.5 * std * math.sqrt(2 * math.pi * math.e))
    assert table["condition"] == "none" and "latents" not in table
    above = {kind: value["bits_per_dim"] - entropy for kind, value in table["pixels"].items()}
    assert -0.05 < above["ode"] < 0.05 and -0.05 < above["bound"] < 0.15 and -0.05 < above["continuous_bound"] < 1.2
    curve = table["rate_distortion"]
    assert abs(curve["rmse"][0] - 127.5 * std) < 1.5 and curve["rmse"][-1] < 5
