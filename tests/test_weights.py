"""Weights: the published formulas, and that a weighted loss is the same number in every parameterization."""

import math
from pathlib import Path

import pytest
import torch
from oracles import PROCESSES, gaussian
from safetensors.torch import load_file
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.loss import DISTANCES, diffusion_loss
from ldm.parameterization import PARAMETERIZATIONS, target
from ldm.process import DDPM
from ldm.weights import EDM, P2, VLB, WEIGHTS, MinSNR, Sigmoid, Uncertainty

SCHEDULES = load_file(Path(__file__).parent / "data" / "schedules.safetensors")
ON_X0 = {  # of SNR
    "min_snr": lambda snr: snr.clamp(max=5.0), "soft_min_snr": lambda snr: 5 * snr / (snr + 5), "edm": lambda snr: snr + 1,
    "simple": lambda snr: snr, "p2": lambda snr: snr / (1 + snr), "sigmoid": lambda snr: snr * torch.sigmoid(-snr.log()),
}  # fmt: skip
COMPARABLE = [*ON_X0, "vlb"]  # all but "uniform", which weighs F itself


def middle(process, n=25):
    return process.t_min + torch.linspace(0.02, 0.98, n, dtype=torch.float64) * (process.t_max - process.t_min)


class Says(nn.Module):
    """A network in any parameterization whose x0 is off by a fixed picture."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def told(self, denoiser, z, t, noise):
        alpha, sigma, p, q = (c.view(-1, 1, 1, 1) for c in denoiser.exact(t))
        x_t, x0 = alpha * z + sigma * noise, z + self.error
        self.f = target(x0, (x_t - alpha * x0) / sigma, p, q)

    def forward(self, x, time, cond):
        return self.f


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("weight", COMPARABLE)
@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "vp", "flow", "edm"])
def test_the_loss_is_the_same_number_in_every_parameterization(name, weight, distance):
    process, source = PROCESSES[name], torch.Generator().manual_seed(0)
    t = middle(process, 6) if process.t_data >= 0 else middle(process, 6).round()
    z, noise, error = (torch.randn(6, 2, 4, 4, generator=source, dtype=torch.float64) for _ in range(3))
    names = [*PARAMETERIZATIONS, *(["previous"] if process.t_data < 0 else [])]
    losses = {}
    for kind in names:
        if kind == "noise" and name == "flow":
            continue  # it cannot name x0 at t = 1
        network = Says(0.1 * error)
        denoiser = Denoiser(network, process, kind)
        denoiser.coefficients = lambda t, like, denoiser=denoiser: tuple(c.view(-1, 1, 1, 1) for c in denoiser.exact(t))
        network.told(denoiser, z, t, noise)
        denoiser.raw = lambda x_t, t, cond, network=network: _Double(network.f)
        losses[kind] = diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS[weight], distance=DISTANCES[distance])
    first = next(iter(losses.values()))
    assert first.dtype is torch.float64 and (first > 0).all() and len(losses) >= 4
    for kind, loss in losses.items():
        assert torch.allclose(loss, first, rtol=1e-9), kind


class _Double:
    """fp64 numbers that stay so when they are asked for fp32: the loss is compared to nine digits."""

    def __init__(self, value):
        self.value = value

    def float(self):
        return self.value


@pytest.mark.parametrize("name", ["scaled_linear", "vp", "flow", "edm"])
@pytest.mark.parametrize("weight", ON_X0)
def test_weights_are_the_published_functions_of_the_signal_to_noise_ratio(name, weight):
    process = PROCESSES[name]
    alpha, sigma = process.exact(middle(process))
    on_x0 = WEIGHTS[weight](alpha, sigma, *PARAMETERIZATIONS["data"](alpha, sigma))
    assert torch.allclose(on_x0, ON_X0[weight]((alpha / sigma).square()), rtol=1e-9)
    on_eps = WEIGHTS[weight](alpha, sigma, *PARAMETERIZATIONS["noise"](alpha, sigma))
    assert torch.allclose(on_eps, on_x0 * (sigma / alpha).square(), rtol=1e-9)


def test_options_of_weights():
    alpha, sigma = PROCESSES["edm"].exact(torch.tensor([0.05, 0.5, 2.0, 10.0], dtype=torch.float64))
    data, noise = (PARAMETERIZATIONS[kind](alpha, sigma) for kind in ("data", "noise"))
    assert torch.allclose(EDM(0.5)(alpha, sigma, *data), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)  # 2206.00364, table 1
    assert torch.allclose(P2(0.5, 2.0)(alpha, sigma, *noise), (2 + sigma**-2) ** -0.5)
    assert torch.allclose(Sigmoid(-1.5)(alpha, sigma, *noise), torch.sigmoid(-1.5 - 2 * (alpha / sigma).log()))
    assert torch.allclose(MinSNR(4.0, soft=True)(alpha, sigma, *data), 1 / (sigma**2 + 1 / 4))  # 2401.11605
    pair = PARAMETERIZATIONS["edm"](alpha, sigma)  # F of unit variance: the weight cancels
    assert torch.allclose(EDM(1.0)(alpha, sigma, *pair), torch.ones_like(alpha))


@pytest.mark.parametrize("weight", ["min_snr", "soft_min_snr", "p2", "sigmoid", "edm", "simple"])
@pytest.mark.parametrize("parameterization", ["v", "flow", "data"])
def test_weights_are_finite_at_both_ends(weight, parameterization):
    alpha, sigma = PROCESSES["flow"].coefficients(torch.tensor([0.0, 1e-6, 1.0]))  # a uniform number of 24 bits may be 0
    found = WEIGHTS[weight](alpha, sigma, *PARAMETERIZATIONS[parameterization](alpha, sigma))
    assert found.isfinite().all() and (found >= 0).all()


@pytest.mark.parametrize("table", ["linear_1000_0.00085_0.012", "sqrt_linear_1000_0.0001_0.02", "linear_100_0.0001_0.02"])
def test_bound_is_that_of_compvis(table):
    """Their lvlb_weights, once a step, on the error of eps."""
    name, steps, start, end = table.rsplit("_", 3)
    process = DDPM({"linear": "scaled_linear", "sqrt_linear": "linear"}[name], int(steps), float(start), float(end))
    t = torch.arange(float(steps), dtype=torch.float64)
    alpha, sigma = process.exact(t)
    found = VLB().at(process, t)(alpha, sigma, *PARAMETERIZATIONS["noise"](alpha, sigma)) / len(t)
    assert torch.allclose(found, SCHEDULES[f"out.{table}.lvlb_weights"].double(), rtol=2e-3)  # theirs divides fp32 differences
    assert torch.allclose(found[1:], 0.5 * torch.expm1(2 * (process.log_snr(t[:-1]) - process.log_snr(t[1:]))))


@pytest.mark.parametrize("kind", ["data", "v", "flow", "edm", "velocity", "previous"])
def test_the_bounds_weight_of_a_step_from_pure_noise(kind):
    """There alpha = 0, and q(x_s | x_t, x0) = N(alpha_s x0, sigma_s^2): T times the divergence from the same with x0 off by d is
    T / 2 (alpha_s d / sigma_s)^2."""
    process = DDPM(steps=20, zero_terminal=True)
    denoiser = Denoiser(torch.nn.Identity(), process, kind)
    t, z, off = torch.tensor([19.0]), torch.full((1, 1, 1, 1), 0.4), 0.3
    alpha, sigma, p, q = denoiser.exact(t)
    noise = torch.full((1, 1, 1, 1), -0.7)
    said = (p * (z + off) + q * (noise - alpha / sigma * off)).float()
    denoiser.raw = lambda x_t, t, cond: said
    (alpha_s,), (sigma_s,) = process.exact(t.double() - 1)
    expected = 20 / 2 * (alpha_s * off / sigma_s) ** 2
    assert diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS["vlb"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_step_has_no_bound():
    with pytest.raises(ValueError, match="this process has one step"):
        VLB().at(DDPM(steps=1), torch.zeros(1))


@pytest.mark.parametrize("name", ["vp", "edm", "linear"])
def test_bound_integrates_to_the_kl_divergence_of_gaussians(name):
    """For data N(m, s^2) and its best denoiser E|x0 - x0_hat|^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), whose integral over
    1/2 d(SNR) is 1/2 log((s^2 SNR + 1) at the low end over that at the high end)."""
    process, s = PROCESSES[name], 0.4
    if process.t_data < 0:
        t = torch.arange(1.0, 1000.0, dtype=torch.float64)
    else:
        t = process.t_min + (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * (process.t_max - process.t_min)
    alpha, sigma = process.exact(t)
    weight = VLB().at(process, t)(alpha, sigma, *PARAMETERIZATIONS["data"](alpha, sigma))
    left = s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2)
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    snr = (2 * process.log_snr(ends)).exp()
    exact = 0.5 * (torch.log1p(s**2 * snr[0]) - torch.log1p(s**2 * snr[1])).item()
    # a sum over 1000 steps is the upper sum of the integral
    found = (weight * left).sum().item() / (1000 if name == "linear" else len(t))
    assert exact <= found * 1.001 and found == pytest.approx(exact, rel=0.15 if name == "linear" else 0.01)


def test_uncertainty_begins_neutral_and_learns_the_log_of_the_loss():
    process, source = PROCESSES["edm"], torch.Generator().manual_seed(0)
    z = 0.7 + 0.4 * torch.randn(256, 1, 2, 2, generator=source)
    noise, learned = torch.randn(z.shape, generator=source), Uncertainty(32)
    t = torch.logspace(-1, 1, 8).repeat(32)

    class Best(nn.Module):
        def forward(self, x, time, cond):
            return gaussian(process)(x.double(), t).x0.float()

    denoiser = Denoiser(Best(), process, "data")
    plain = diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS["edm"])
    assert torch.equal(diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS["edm"], uncertainty=learned), plain)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS["edm"], uncertainty=learned).mean().backward()
        optimizer.step()
    u = learned(*process.coefficients(t[:8])).detach()
    assert torch.allclose(u, plain.view(32, 8).mean(0).log(), atol=0.05)  # the minimum of L / exp(u) + u
    assert [name for name, _ in learned.named_parameters()] == ["embed.weight"]


def test_uncertainty_is_the_same_network_every_time():
    levels = torch.rand(5), torch.rand(5)
    one, other = Uncertainty(), Uncertainty()
    nn.init.ones_(one.embed.weight)
    nn.init.ones_(other.embed.weight)
    assert torch.equal(one(*levels), other(*levels))
    assert one(torch.zeros(1), torch.ones(1)).isfinite() and one(torch.ones(1), torch.zeros(1)).isfinite()
    assert math.isclose(one.frequency.std().item(), 2 * math.pi, rel_tol=0.2)


def test_the_bounds_weight_is_asked_for_at_a_time():
    alpha, sigma = PROCESSES["linear"].exact(torch.tensor([5.0]).double())
    with pytest.raises(ValueError, match=r"take VLB\(\).at\(process, t\)"):
        VLB()(alpha, sigma, *PARAMETERIZATIONS["noise"](alpha, sigma))
