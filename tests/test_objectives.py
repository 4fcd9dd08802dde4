"""Every objective as a config: built, saved and loaded again, it predicts the same and generates."""

import numpy as np
import pytest
import torch

from ldm.bundle import Bundle
from ldm.common.build import build, check
from ldm.cond import Cond
from ldm.load import load
from ldm.process import DDPM

OBJECTIVES = {
    "learned range": {"process": {"target": "ldm.process.DDPM"}, "parameterization": "noise", "variance": "learned_range"},
    "learned": {"process": {"target": "ldm.process.DDPM"}, "parameterization": "v", "variance": "learned"},
    "edm": {"process": {"target": "ldm.process.EDM"}, "parameterization": "edm"},
    "edm of pictures": {"process": {"target": "ldm.process.EDM"}, "parameterization": {
        "target": "ldm.parameterization.Preconditioned", "params": {"sigma_data": 0.5}}},
    "previous": {"parameterization": "previous", "process": {"target": "ldm.process.respaced", "params": {
        "process": {"target": "ldm.process.DDPM", "params": {"schedule": "linear"}}, "kept": "25"}}},
    "resolution": {"process": {"target": "ldm.process.RectifiedFlow", "params": {"shift": "flux", "tokens": 256}}},
    "table": {"parameterization": "data", "process": {"target": "ldm.process.Table", "params": {"alpha_bar": [0.9, 0.5, 0.1]}}},
}  # fmt: skip


UNET = {"target": "ldm.networks.unet.UNet", "params": dict(
    model_channels=32, channel_mult=[1], num_res_blocks=1, transformer_depth=[0], middle_depth=0)}  # fmt: skip


def module(objective: dict) -> dict:
    optimizer = {"target": "torch.optim.AdamW"}
    return {"target": "ldm.lit.DiffusionModule", "params": {"network": UNET, "optimizer": optimizer, **objective}}


def made(objective: dict) -> Bundle:
    """A model of pictures without conditions and with small random weights."""
    autoencoder = {"target": "autoencoder.base.Identity"}
    bundle = Bundle.from_config(
        {"name": "tiny", "autoencoder": autoencoder, "model": module(objective), "sampling": {"size": [8, 8]}})
    source = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(value.shape, generator=source) * 0.1 for key, value in bundle.state_dict().items()}
    return bundle.assign(weights | {"autoencoder.shift": torch.zeros(3), "autoencoder.scale": torch.ones(3)})


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_checkpoint_keeps_its_objective(objective, tmp_path):
    bundle = made(objective)
    bundle.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    learned = "variance" in objective
    assert bundle.denoiser.network.conv_out.out_channels == (6 if learned else 3)
    process, draws = bundle.denoiser.process, torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 8, 8, generator=draws), torch.tensor([process.t_min, process.t_max])
    with torch.no_grad():
        ours, theirs = (one.denoiser(x, t.clamp(min=0.01), Cond()) for one in (bundle, again))
    assert torch.equal(ours.x0, theirs.x0) and torch.equal(ours.eps, theirs.eps) and ours.x0.isfinite().all()
    assert (ours.var is not None) == learned and (not learned or torch.equal(ours.var, theirs.var))
    pictures = again.generate(["", ""], steps=2)
    assert pictures.isfinite().all() and torch.equal(pictures, bundle.generate(["", ""], steps=2))


@pytest.mark.parametrize(("objective", "told"), [
    ({"parameterization": "previous"}, "parameterization: parameterization 'previous' is the mean of the step before"),
    ({"process": {"target": "ldm.process.DDPM", "params": {"zero_terminal": True}}, "parameterization": "noise"}, "cannot name x0"),
    ({"parameterization": {"target": "ldm.parameterization.Preconditioned", "params": {"sigma_data": 0.0}}},
     "parameterization: sigma_data: 0.0; a standard deviation is above 0"),
    ({"process": {"target": "ldm.process.Table", "params": {"betas": [0.1, 0.0]}}}, "process: alpha_bar[1] is 0.9 after 0.9"),
    ({"process": {"target": "ldm.process.RectifiedFlow", "params": {"shift": "flux"}}}, "process: shift 'flux' with tokens None"),
    ({"variance": "range"}, "variance: expected one of 'fixed', 'learned', 'learned_range'"),
])  # fmt: skip
def test_what_cannot_be_is_found_before_anything_is_built(objective, told):
    [line] = check(module(objective))
    assert line.startswith("model.params.") and told in line


@pytest.mark.parametrize("objective", [one for one in OBJECTIVES.values() if "variance" not in one])
def test_every_objective_is_a_valid_config(objective):
    assert check(module(objective)) == []


def test_a_network_that_learns_its_variance_starts_in_the_middle_of_the_range():
    network = build(UNET, in_channels=3, out_channels=6)
    assert not network.conv_out.weight.any() and not network.conv_out.bias.any()  # var = 0: halfway between the two logs


def test_a_checkpoint_needs_no_file_of_noise_levels(tmp_path):
    path = tmp_path / "levels.npy"
    np.save(path, DDPM("cosine", 40).alpha_bar.numpy())
    bundle = made({"parameterization": "v", "process": {"target": "ldm.process.Table", "params": {"alpha_bar": str(path)}}})
    bundle.save(tmp_path / "model.ckpt")
    path.unlink()
    again = load(tmp_path / "model.ckpt")
    assert torch.equal(again.denoiser.process.alpha_bar, DDPM("cosine", 40).alpha_bar)
