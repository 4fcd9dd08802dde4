"""Against numbers computed with k-diffusion: every sampler on an exact mixture of Gaussians (fp64) and on a small network.

Its models live in x over sigma: on the mixture our EDM process, where alpha = 1 and t = sigma. Churned steps take its noises
by number.
"""

import math
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from ldm import samplers
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.parameterization import Prediction
from ldm.process import DDPM, EDM
from ldm.steps import Point, ancestral
from ldm.times import dpm_fast, make_times

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "k_samplers" / "io.safetensors")
PROCESS = EDM(0.002, 80.0)
CHURN = dict(s_churn=4.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
OURS = {  # their names in the recording
    "euler": samplers.euler, "heun": samplers.heun, "dpm_2": samplers.dpm_2,
    "euler_churn": partial(samplers.euler, **CHURN), "heun_churn": partial(samplers.heun, **CHURN),
    "dpm_2_churn": partial(samplers.dpm_2, **CHURN),
    **{f"lms{order}": partial(samplers.lms, order=order) for order in (1, 2, 3, 4)},
    "euler_ancestral": samplers.euler_ancestral,
    "euler_ancestral_eta0.5": partial(samplers.euler_ancestral, eta=0.5, s_noise=0.9),
    "dpm_2_ancestral": samplers.dpm_2_ancestral,
    "dpmpp_2s_ancestral": samplers.dpmpp_2s_ancestral, "dpmpp_2s_ancestral_eta0": samplers.dpmpp_2s,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde, "dpmpp_2m_sde_eta0.5": partial(samplers.dpmpp_2m_sde, eta=0.5),
    "dpmpp_2m_sde_midpoint_eta0": partial(samplers.dpmpp_2m_sde, eta=0.0),
    "dpmpp_2m_sde_heun": samplers.dpmpp_2m_sde_heun,
    "dpmpp_2m_sde_heun_eta0": partial(samplers.dpmpp_2m_sde_heun, eta=0.0),
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde, "dpmpp_3m_sde_eta0": partial(samplers.dpmpp_3m_sde, eta=0.0),
    "dpmpp_3m_sde_eta0.5": partial(samplers.dpmpp_3m_sde, eta=0.5),
    "dpmpp_sde": samplers.dpmpp_sde, "dpmpp_sde_eta0": partial(samplers.dpmpp_sde, eta=0.0),
    "dpmpp_sde_r0.3_eta0.6": partial(samplers.dpmpp_sde, r=0.3, eta=0.6),
}  # fmt: skip
MIXTURE = re.compile(r"out\.(karras|exponential)\.(.+)\.(\d+)\.(final|x|rmse_at_0|rmse_at_sigma_min)")
NETWORK = re.compile(r"out\.compvis\.q([01])\.(sd|karras)\.(.+)\.10\.final")


def mixture(x: Tensor, sigma: Tensor) -> Prediction:
    """The best denoiser of the recorded mixture, fp64."""
    weights, means, stds = (REFERENCE[f"in.gm.{name}"] for name in ("weights", "means", "stds"))
    sigma = sigma.double().view(-1, 1)
    flat, spread = x.flatten(1).unsqueeze(1), (stds**2 + sigma**2).unsqueeze(-1)  # (B,1,4), (B,3,1)
    log = weights.log() - ((flat - means) ** 2 / spread).sum(-1) / 2 - means.shape[1] / 2 * spread.squeeze(-1).log()
    share = torch.softmax(log, 1).unsqueeze(-1)
    x0 = (share * (stds.view(-1, 1) ** 2 * flat + sigma.unsqueeze(-1) ** 2 * means) / spread).sum(1).view_as(x)
    return Prediction(x0, (x - x0) / sigma.view(-1, 1, 1, 1))


class Toy(torch.nn.Module):
    """The recorded small network, told t / 1000."""

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        toy = {name: REFERENCE[f"in.toy.{name}"] for name in ("w1", "b1", "w2", "b2", "wt")}
        inner = conv2d(x, toy["w1"], toy["b1"], padding=1) + (time / 1000).view(-1, 1, 1, 1) * toy["wt"].view(1, -1, 1, 1)
        return conv2d(torch.tanh(inner), toy["w2"], toy["b2"], padding=1)


def stable_diffusion(quantized: bool) -> DDPM:
    """k-diffusion's CompVisDenoiser: between the steps log sigma is linear; the network is told t, or the nearest step."""
    return DDPM(between="log_snr", tells="whole" if quantized else "step")


def in_sigma(process: DDPM):
    """The small network over x / alpha and sigma / alpha, its input scaled as the process does."""
    def denoise(x: Tensor, sigma: Tensor) -> Prediction:
        t = process.time(process.when(-sigma.double().log()).clamp(min=0)).float()
        wide = sigma.view(-1, 1, 1, 1)
        eps = Toy()(x / (wide**2 + 1).sqrt(), t, Cond())
        return Prediction(x - wide * eps, eps)
    return denoise


def close_to(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def sigmas_of(schedule: str, n: int) -> Tensor:
    key = f"out.sigmas.{schedule}.{n}"
    if key in REFERENCE:
        return REFERENCE[key].double()
    ramp, ends = torch.linspace(0, 1, n), (0.002, 80.0)  # not recorded for every n: as it computes them, in fp32
    if schedule == "karras":
        low, high = ends[0] ** (1 / 7), ends[1] ** (1 / 7)
        ladder = (high + ramp * (low - high)) ** 7
    else:
        ladder = torch.linspace(torch.tensor(ends[1]).log().item(), torch.tensor(ends[0]).log().item(), n).exp()
    return torch.cat([ladder, torch.zeros(1)]).double()


@cache
def exact(sigma: float) -> Tensor:
    """Where the ODE brings the starts at this sigma (the data for 0, reached from a sigma of 1e-6)."""
    solve = pytest.importorskip("scipy.integrate").solve_ivp

    def slope(log: float, flat) -> Tensor:
        x = torch.from_numpy(flat).view_as(REFERENCE["in.x_T"])
        return math.exp(log) * mixture(x, torch.full((len(x),), math.exp(log), dtype=torch.float64)).eps.flatten().numpy()

    path = solve(slope, (math.log(80.0), math.log(max(sigma, 1e-6))), (80 * REFERENCE["in.x_T"]).flatten().numpy(),
                 method="DOP853", rtol=1e-11, atol=1e-12)  # fmt: skip
    return torch.from_numpy(path.y[:, -1]).view_as(REFERENCE["in.x_T"])


@pytest.mark.parametrize("key", [key for key in sorted(REFERENCE) if MIXTURE.fullmatch(key)])
def test_on_the_exact_mixture(key):
    schedule, name, n, what = MIXTURE.fullmatch(key).groups()
    sigmas, seen = sigmas_of(schedule, int(n)), []
    if what == "rmse_at_sigma_min":
        sigmas = sigmas[:-1]
    out = OURS[name](mixture, 80 * REFERENCE["in.x_T"], sigmas, PROCESS, noise=lambda k, shape: REFERENCE["in.noise"][k],
                     callback=lambda step, t, x, guess: seen.append(x))  # fmt: skip
    if what.startswith("rmse"):
        error = out - exact(0.0 if what == "rmse_at_0" else 0.002)
        assert error.square().mean().sqrt().item() == pytest.approx(REFERENCE[key].item(), rel=1e-5)
    else:
        found, expected = torch.stack(seen) if what == "x" else out, REFERENCE[key]
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("key", [key for key in sorted(REFERENCE) if NETWORK.fullmatch(key)])
def test_on_a_network(key):
    """Theirs walks x / alpha over sigma / alpha, ours x on the training process."""
    quantized, schedule, name = NETWORK.fullmatch(key).groups()
    process = stable_diffusion(quantized == "1")
    if "churn" in name:  # theirs goes beyond the training steps, with sigma up to 20
        denoise, process = in_sigma(process), EDM(0.0, 100.0)
    else:
        denoise = bind(Denoiser(Toy(), process, "noise"), Cond())
    sigmas = next(REFERENCE[f"out.compvis.q{q}.sigmas10.{schedule}"] for q in (quantized, "1")
                  if f"out.compvis.q{q}.sigmas10.{schedule}" in REFERENCE)  # fmt: skip
    times = make_times({"name": "sigmas", "values": sigmas.tolist()}, process, 10)
    x = REFERENCE["in.net.x_T"] * sigmas[0] * process.coefficients(times[:1])[0].float()
    out = OURS[name](denoise, x, times, process, noise=lambda k, shape: REFERENCE["in.net.noise"][k])
    assert (out - REFERENCE[key]).abs().max() <= 3e-5 * REFERENCE[key].abs().max()


@pytest.mark.parametrize("n", [5, 20])
def test_fast(n):
    """n calls of DPM-Solver-3, -2 and -1. Theirs keeps lambda in fp32."""
    found = samplers.dpm_fast(mixture, 80 * REFERENCE["in.x_T"], dpm_fast(PROCESS, n), PROCESS)
    expected = REFERENCE[f"out.dpm_fast.{n}.final"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ancestral_steps():
    """(sigma_down, sigma_up) for sigmas from, to and eta."""
    for row, (begin, end, eta) in zip(REFERENCE["out.ancestral_step"], ((10, 5, 1), (10, 5, 0.5), (1, 0.9, 2), (1, 0, 1), (3, 2, 0)),
                                      strict=True):  # fmt: skip
        down, up = ancestral(Point(1.0, begin), Point(1.0, end), eta)
        assert (down.sigma, up) == pytest.approx(tuple(row.tolist()), rel=1e-9)


def test_adaptive():
    """DPM-Solver-23 by its defaults, DPM-Solver-12 by the number of its steps. Theirs keeps lambda in fp32, which moves its
    result by 2e-4; the same algorithm with an fp64 lambda is within 1e-9 of ours."""
    attempts = []
    run = partial(samplers.dpm_adaptive, mixture, 80 * REFERENCE["in.x_T"], torch.tensor([80.0, 0.002], dtype=torch.float64),
                  PROCESS, joint=True)  # fmt: skip
    assert (run() - REFERENCE["out.dpm_adaptive.final"]).abs().max() <= 3e-4
    out = run(order=2, rtol=0.01, atol=0.001, callback=lambda step, t, x, guess: attempts.append(t))
    calls, accepted, rejected = REFERENCE["out.dpm_adaptive.o2.nfe_accept_reject"].tolist()
    assert len(attempts) == accepted + rejected == calls / 2
    assert len(set(attempts)) == accepted  # a rejected step is tried again from its start
    assert (out - exact(0.002)).abs().max() < 0.02
