"""Against numbers computed with guided-diffusion: its loss types with their gradients, for all means and variances."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.loss import Variational, diffusion_loss
from ldm.process import DDPM

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "iddpm_core" / "io.safetensors")
PROCESS = DDPM("linear", 1000)
MEANS = {"eps": "noise", "x_start": "data", "previous_x": "previous"}
SCALES = {"mse": 1 / 1000, "rescaled_mse": 0.001, "kl": 1 / 1000, "rescaled_kl": 1.0}


class Says(nn.Module):
    def __init__(self, out: torch.Tensor):
        super().__init__()
        self.out = nn.Parameter(out.clone())

    def forward(self, x, time, cond):
        return self.out


@pytest.mark.parametrize("loss", SCALES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("mean", MEANS)
def test_losses_and_gradients(mean, variance, loss):
    kind, _, fixed = variance.partition("_") if variance.startswith("fixed") else (variance, "", "small")
    out = REFERENCE["in.model_output_learned" if kind == "learned" else "in.model_output"]
    network = Says(out[:, :3] if kind == "fixed" else out)
    objective = "vlb" if loss.endswith("kl") else "hybrid"
    variational = Variational(objective, scale=SCALES[loss], fixed=fixed, cdf="tanh")
    denoiser = Denoiser(network, PROCESS, MEANS[mean], variance=kind)
    found = diffusion_loss(denoiser, REFERENCE["in.x_start"], Cond(), REFERENCE["in.t"], REFERENCE["in.noise"],
                           variational=None if (objective, kind) == ("hybrid", "fixed") else variational)  # fmt: skip
    found.mean().backward()
    expected, gradient = (REFERENCE[f"out.loss.linear.1000.{loss}.{mean}.{variance}.{name}"] for name in ("loss", "grad"))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    assert torch.allclose(network.out.grad, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("key", sorted(key for key in REFERENCE if key.startswith("out.loss.") and key.endswith((".mse", ".vb"))))
def test_terms(key):
    """The simple loss, and the bound's term in bits, which is scaled by T / 1000 where the loss is rescaled: here by 1."""
    mean, variance, term = key.split(".")[-3:]
    kind = "fixed" if variance.startswith("fixed") else variance
    out = REFERENCE["in.model_output_learned" if kind == "learned" else "in.model_output"]
    denoiser = Denoiser(Says(out[:, :3] if kind == "fixed" else out), PROCESS, MEANS[mean], variance=kind)
    found = diffusion_loss(denoiser, REFERENCE["in.x_start"], Cond(), REFERENCE["in.t"], REFERENCE["in.noise"],
                           variational=Variational("vlb", scale=1 / 1000, cdf="tanh") if term == "vb" else None)  # fmt: skip
    assert torch.allclose(found, REFERENCE[key], rtol=1e-5, atol=1e-6 * REFERENCE[key].abs().max().item())
