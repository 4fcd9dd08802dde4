"""The ODE likelihood against k-diffusion's ``log_likelihood`` on an exact mixture in R^4. Its prior is N(0, sigma_max^2), which
knows nothing of the data's mean; what it measures is the density of data with noise sigma_min."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ldm.likelihood import ode_likelihood
from ldm.parameterization import Prediction
from ldm.process import EDM

DATA = load_file(Path(__file__).parents[1] / "data" / "parity" / "k_samplers" / "io.safetensors")
WEIGHTS, MEANS, STDS = (DATA[f"in.gm.{name}"] for name in ("weights", "means", "stds"))  # (K,), (K,D), (K,)


def denoise(x, t):
    flat, sigma = x.flatten(1)[:, None], t[:, None]  # (B,1,D), (B,1)
    variance = STDS**2 + sigma**2
    log = WEIGHTS.log() - 0.5 * (flat - MEANS).square().sum(-1) / variance - 0.5 * MEANS.shape[1] * variance.log()
    each = (STDS[:, None] ** 2 * flat + sigma[..., None] ** 2 * MEANS) / variance[..., None]
    x0 = (log.softmax(1)[..., None] * each).sum(1).view(x.shape)
    return Prediction(x0, (x - x0) / sigma[..., None, None])


@pytest.mark.parametrize("probe", range(4))
def test_with_one_probe(probe):
    found = ode_likelihood(denoise, DATA["in.ll.x"], EDM(), noise=lambda k, shape: DATA["in.ll.v"][probe], prior_std=80.0,
                           tolerance=1e-8)
    assert (found.log_likelihood - DATA["out.log_likelihood.tight"][probe]).abs().max() < 1e-6
    assert (found.latent - DATA["out.log_likelihood.latent"]).abs().max() < 1e-6


def test_exactly():
    found = ode_likelihood(denoise, DATA["in.ll.x"], EDM(), probes="exact", prior_std=80.0, tolerance=1e-8)
    corrected = found.log_likelihood + DATA["out.log_likelihood.prior_gap"]
    assert (corrected - DATA["out.log_likelihood.exact_at_sigma_min"]).abs().max() < 1e-6


def test_by_their_defaults():
    """Theirs has a tolerance of 1e-4, and is off by 5e-4 at it; its four probes together are the exact trace."""
    found = ode_likelihood(denoise, DATA["in.ll.x"], EDM(), probes="exact", prior_std=80.0)
    assert (found.log_likelihood - DATA["out.log_likelihood.default"].mean(0)).abs().max() < 1e-3
    assert found.evaluations < 2 * DATA["out.log_likelihood.default.fevals"].max()
