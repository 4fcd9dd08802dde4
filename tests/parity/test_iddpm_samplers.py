"""Against numbers computed with guided-diffusion (Improved DDPM, ADM): loops of p_sample, ddim_sample, ddim_reverse_sample
on a small network, with their noise. Respaced processes are the same process at fewer times."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from ldm.parameterization import Prediction
from ldm.process import DDPM, Table
from ldm.samplers import ddim, ddim_inversion, ddpm

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "iddpm_core" / "io.safetensors")
ANCESTRAL = re.compile(r"out\.sample\.p\.(linear|cosine)\.(\w+)\.(\w+)\.(final|traj|pred_xstart)")
DDIM = re.compile(r"out\.sample\.ddim\.(linear|cosine)\.(\w+)\.eta([01])(\.noclip)?\.(final|traj|pred_xstart)")
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned_range", "x_start": "small"}


def keys(pattern: re.Pattern) -> list[str]:
    return [key for key in sorted(REFERENCE) if pattern.fullmatch(key)]


def network(process: DDPM, channels: int, says_x0: bool = False):
    toy = {name: REFERENCE[f"in.toy{channels}.{name}"] for name in ("w1", "b1", "w2", "b2", "wt")}

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        inner = conv2d(x, toy["w1"], toy["b1"], padding=1) + (t / 1000).view(-1, 1, 1, 1) * toy["wt"].view(1, -1, 1, 1)
        out = conv2d(torch.tanh(inner), toy["w2"], toy["b2"], padding=1)
        alpha, sigma = (c.float().view(-1, 1, 1, 1) for c in process.exact(t.double()))
        first, var = out[:, :3], out[:, 3:] if channels == 6 else None
        if says_x0:
            return Prediction(first, (x - alpha * first) / sigma, var)
        return Prediction((x - sigma * first) / alpha, first, var)

    return denoise


def times(spacing: str) -> Tensor:
    """ddim25: every 40th step; 25: even from the first to the last, rounded."""
    n = int(spacing.removeprefix("ddim"))
    steps = range(0, 1000, 1000 // n) if spacing.startswith("ddim") else [round(k * 999 / (n - 1)) for k in range(n)]
    return torch.tensor([*sorted(steps, reverse=True), -1.0], dtype=torch.float64)


def check(key: str, run, spacing: str) -> None:
    seen: list[Tensor] = []
    said: list[Tensor] = []
    stored = REFERENCE[f"in.noise{spacing.removeprefix('ddim')}"]
    out = run(REFERENCE["in.x_T"], times(spacing), noise=lambda key, shape: stored[key],
              callback=lambda step, t, x, guess: (seen.append(x), said.append(guess.x0)))  # fmt: skip
    found = torch.stack([*seen[1:], out]) if key.endswith("traj") else out
    if key.endswith("pred_xstart"):
        found = torch.stack(said) if ".noclip." in key else torch.stack(said).clamp(-1, 1)
    # x0 at cosine's first steps is a difference of numbers a thousand times larger, in fp32
    tolerance = (1e-3 if key.endswith("pred_xstart") else 1e-4) if "cosine" in key else 2e-5
    assert (found - REFERENCE[key]).abs().max() <= tolerance * REFERENCE[key].abs().max()


@pytest.mark.parametrize("key", keys(ANCESTRAL))
def test_ancestral_sampling(key):
    schedule, spacing, kind, _ = ANCESTRAL.fullmatch(key).groups()
    process = DDPM(schedule)
    denoise = network(process, 6 if kind == "learned_range" else 3, kind == "x_start")
    check(key, partial(ddpm, denoise, process=process, variance=VARIANCES[kind], clip_x0=True), spacing)


@pytest.mark.parametrize("key", keys(DDIM))
def test_ddim(key):
    schedule, spacing, eta, noclip, _ = DDIM.fullmatch(key).groups()
    process = DDPM(schedule)
    check(key, partial(ddim, network(process, 3), process=process, eta=float(eta), clip_x0=not noclip), spacing)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_inversion(schedule):
    """It takes the data for what is at t = 0; its last step goes to pure noise: here a step more of the process."""
    process, seen = Table([*DDPM(schedule).alpha_bar.tolist(), 0.0]), []
    path = torch.cat([times("ddim25")[:-1].flip(0), torch.tensor([1000.0]).double()])
    out = ddim_inversion(network(process, 3), REFERENCE["in.x0_img"], path, process,
                         callback=lambda step, t, x, guess: seen.append(x))  # fmt: skip
    expected = REFERENCE[f"out.sample.ddim_reverse.{schedule}.ddim25.traj"]
    assert (torch.stack([*seen[1:], out]) - expected).abs().max() <= 2e-5 * expected.abs().max()
