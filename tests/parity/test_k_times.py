"""Lists of noise levels against k-diffusion's (fp32): get_sigmas_karras, _exponential, _polyexponential, _vp, get_sigmas."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.process import DDPM, EDM
from ldm.times import exponential, karras, linspace, polyexponential, vp

DATA = load_file(Path(__file__).parents[1] / "data" / "parity" / "k_samplers" / "io.safetensors")
KINDS = {"karras": karras, "exponential": exponential, "polyexponential": polyexponential, "vp": vp}


def close(found: Tensor, key: str, rtol: float = 1e-5) -> bool:
    """Theirs are fp32; the last level of vp is the root of a difference from 1."""
    expected = DATA[key].double()
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=rtol, atol=3e-6 if ".vp." in key else 0)


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("out.sigmas.")])
def test_levels(key):
    n, options, (low, high) = len(DATA[key]) - 1, {}, (0.002, 80.0)
    if key.endswith(".sd"):
        options, (low, high) = {"rho": 5.0}, (0.0292, 14.6146)
    if ".rho" in key:
        options = {"rho": float(key.partition(".rho")[2][:3])}
    if ".vp." in key:  # from t = 1 to 1e-3
        low, high = (math.sqrt(math.expm1(19.9 * t**2 / 2 + 0.1 * t)) for t in (1e-3, 1.0))
    assert close(KINDS[key.split(".")[2]](EDM(low, high), n, **options), key)


@pytest.mark.parametrize("key", ["out.compvis.q0.get_sigmas.5", "out.compvis.q1.get_sigmas.5", "out.compvis.q0.get_sigmas.None",
                                 "out.compvis.q0.sigmas10.sd", "out.compvis.q1.sigmas10.sd"])
def test_levels_of_the_training_steps(key):
    """Their wrapper of Stable Diffusion: evenly spaced training steps, of which fractions interpolate log sigma, and a 0."""
    process = DDPM(between="log_snr")
    found = torch.exp(-process.log_snr(linspace(process, len(DATA[key]) - 1, round=False)))
    assert close(found, key, rtol=2e-5)  # in fp32 the root of 1 - alpha_bar has five digits at the first step


def test_karras_levels_of_the_training_range():
    process = DDPM()
    assert close(torch.exp(-process.log_snr(karras(process, 10))), "out.compvis.q1.sigmas10.karras", rtol=2e-5)
    for q in "01":
        ends = torch.exp(-process.log_snr(torch.tensor([process.t_min, process.t_max]).double()))
        assert close(ends, f"out.compvis.q{q}.sigma_min_max", rtol=2e-5)
