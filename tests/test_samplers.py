import math
from functools import partial

import pytest
import torch
from oracles import ENDLESS, MEAN, PROCESSES, STD, Mixture, at, gaussian, slope, transported

from ldm.common.random import normal
from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.parameterization import PARAMETERIZATIONS, Prediction, target
from ldm.process import DDPM, EDM
from ldm.samplers import SAMPLERS
from ldm.times import TIMES, linear

VARIANTS = {**SAMPLERS, "ddim_half": partial(SAMPLERS["ddim"], eta=0.5)}
DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp_2m")
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


def times(name, n):
    """Even in t; for EDM even in log sigma, as its noise spans many orders of magnitude."""
    process = PROCESSES[name]
    if name != "edm":
        return linear(process, n)
    ladder = torch.logspace(math.log10(process.t_max), math.log10(process.t_min), n, dtype=torch.float64)
    return torch.cat([ladder, torch.zeros(1, dtype=torch.float64)])


def affine(sampler, name, n):
    """On Gaussian data a sampler is an affine map of x_T and of every step's noise: -> offset, gain, gains of the noise (n,),
    read off runs that see one unit impulse each."""
    x = torch.zeros(n + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step, shape):
        unit = torch.zeros(shape, dtype=torch.float64)
        unit[2 + step] = 1
        return unit

    out = sampler(gaussian(PROCESSES[name]), x, times(name, n), PROCESSES[name], noise=noise).flatten()
    return out[0].item(), (out[1] - out[0]).item(), out[2:] - out[0]


def prior(name):
    """alpha at the start, and the standard deviation of the noisy Gaussian there."""
    process = PROCESSES[name]
    alpha, sigma = (c.item() for c in process.exact(torch.tensor([process.t_max], dtype=torch.float64)))
    return alpha, math.hypot(alpha * STD, sigma)


@pytest.mark.parametrize("sampler", VARIANTS)
@pytest.mark.parametrize("name", PROCESSES)
def test_samples_have_the_moments_of_the_data(name, sampler):
    alpha, spread = prior(name)
    errors = {}
    for n in (100, 400):
        offset, gain, noises = affine(VARIANTS[sampler], name, n)
        assert offset + gain * alpha * MEAN == pytest.approx(MEAN, abs=1e-6)
        std = math.sqrt((gain * spread) ** 2 + noises.square().sum().item())
        errors[n] = abs(std / STD - 1)
    assert errors[400] < {"ddpm": 0.03, "ddim_half": 0.02, "ddim": 0.016, "euler": 0.016}.get(sampler, 0.008)
    assert errors[400] < max(0.4 * errors[100], 1e-3)  # goes to zero at least like 1 / n


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("name", PROCESSES)
def test_deterministic_samplers_are_the_map_of_the_ode(name, sampler):
    alpha, spread = prior(name)
    offset, gain, noises = affine(VARIANTS[sampler], name, 400)
    assert not noises.any()
    assert gain == pytest.approx(STD / spread, rel=0.016)
    assert offset == pytest.approx(MEAN - alpha * MEAN * STD / spread, abs=0.016 * alpha * MEAN + 1e-6)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize("name", ["scaled_linear", "vp", "trigonometric", "flow", "flow_shift", "edm"])
def test_order_of_convergence(name, sampler):
    """Between two times where everything is smooth, against the exact solution for a mixture of two Gaussians."""
    process = PROCESSES[name]
    begin, end = (process.t_min + share * (process.t_max - process.t_min) for share in (0.7, 0.15))
    mixture = Mixture(process)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1) * max(1.0, begin if name == "edm" else 0.0)
    exact, errors = mixture.transported(x, begin, end), {}
    for n in (40, 80, 160):
        path = torch.linspace(begin, end, n + 1, dtype=torch.float64)
        if name == "edm":
            path = torch.logspace(math.log10(begin), math.log10(end), n + 1, dtype=torch.float64)
        errors[n] = (SAMPLERS[sampler](mixture.denoise, x, path, process) - exact).abs().max().item()
    assert slope(errors) == pytest.approx(ORDERS[sampler], abs=0.25), errors


def test_second_order_is_worth_its_calls():
    """On a straight flow: with as many calls of the network, Heun and 2M are nearer than Euler."""
    process = PROCESSES["flow"]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    exact = transported(process, x, 1.0, 0.0)
    error = {name: (SAMPLERS[name](gaussian(process), x, linear(process, n), process) - exact).abs().max()
             for name, n in (("euler", 40), ("heun", 20), ("dpmpp_2m", 40))}  # fmt: skip
    assert error["heun"] < 0.2 * error["euler"] and error["dpmpp_2m"] < 0.4 * error["euler"]


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("name", ["zero_terminal", "cosine", "flow", "trigonometric"])
def test_few_steps_from_pure_noise_stay_in_bounds(name, sampler):
    process = PROCESSES[name]
    out = SAMPLERS[sampler](gaussian(process), torch.full((1, 1, 1, 1), 2.0), linear(process, 4), process)
    assert out.isfinite().all() and MEAN - 0.1 < float(out) < MEAN + 2 * STD + 0.1


class Perfect(torch.nn.Module):
    """A network that says F of the Gaussian's best denoiser."""

    def __init__(self, process, parameterization):
        super().__init__()
        self.process, self.pair, self.t = process, PARAMETERIZATIONS[parameterization], None

    def forward(self, x, time, cond):
        best = gaussian(self.process)(x.double(), self.t)
        p, q = self.pair(*at(self.process, self.t, x))
        return target(best.x0, best.eps, p, q).float()


@pytest.mark.parametrize(("name", "parameterization"), [(process, name) for process in PROCESSES for name in PARAMETERIZATIONS
                                                        if not (name == "noise" and process in ENDLESS)])  # fmt: skip
def test_every_parameterization_samples_the_same(name, parameterization):
    process = PROCESSES[name]
    network = Perfect(process, parameterization)
    denoiser = Denoiser(network, process, parameterization)

    def denoise(x, t):
        network.t = t
        return denoiser(x, t, Cond())

    x = process.prior_std() * torch.linspace(-2, 2, 5).view(-1, 1, 1, 1)
    for sampler in (SAMPLERS["heun"], SAMPLERS["dpmpp_2m"]):
        found = sampler(denoise, x, times(name, 20), process)
        expected = sampler(gaussian(process), x.double(), times(name, 20), process).float()
        assert torch.allclose(found, expected, atol=2e-3 if parameterization == "noise" else 2e-5)


def test_ddim_of_eta_1_is_the_posterior():
    """One step of DDPM in its own words: 2006.11239, eq. 6 and 7, from betas."""
    process, t = DDPM("linear"), 500
    beta, bar, before = process.betas[t], process.alpha_bar[t], process.alpha_bar[t - 1]
    draws = torch.Generator().manual_seed(0)
    x0, x_t, z = (torch.randn(2, 1, 4, 4, generator=draws, dtype=torch.float64) for _ in range(3))
    fixed = Prediction(x0, (x_t - bar.sqrt() * x0) / (1 - bar).sqrt())
    found = SAMPLERS["ddpm"](lambda x, t: fixed, x_t, torch.tensor([t, t - 1.0]), process, noise=lambda step, shape: z)
    mean = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t
    assert torch.allclose(found, mean + ((1 - before) / (1 - bar) * beta).sqrt() * z, atol=1e-12)


def test_euler_is_edm_algorithm_1_without_correction():
    process = EDM()
    x, denoise = torch.randn(2, 1, 2, 2, dtype=torch.float64), gaussian(process)
    found = SAMPLERS["euler"](denoise, x, torch.tensor([2.0, 0.5], dtype=torch.float64), process)
    assert torch.allclose(found, x + (0.5 - 2.0) * (x - denoise(x, torch.tensor(2.0)).x0) / 2.0)


def test_heun_is_edm_algorithm_1():
    process = EDM()
    x, denoise = torch.randn(2, 1, 2, 2, dtype=torch.float64), gaussian(process)
    first = (x - denoise(x, torch.tensor(2.0)).x0) / 2.0
    guess = x - 1.5 * first
    second = (guess - denoise(guess, torch.tensor(0.5)).x0) / 0.5
    found = SAMPLERS["heun"](denoise, x, torch.tensor([2.0, 0.5], dtype=torch.float64), process)
    assert torch.allclose(found, x - 1.5 * (first + second) / 2)


@pytest.mark.parametrize(("sampler", "calls"), [("ddpm", 7), ("ddim", 7), ("euler", 7), ("heun", 13), ("dpmpp_2m", 7)])
def test_calls_of_the_network(sampler, calls):
    process, seen = PROCESSES["flow"], []

    def denoise(x, t):
        seen.append(t)
        return gaussian(process)(x, t)

    SAMPLERS[sampler](denoise, torch.randn(3, 1, 2, 2), linear(process, 7), process)
    assert len(seen) == calls
    assert all(t.shape == (3,) and t.unique().numel() == 1 for t in seen) and all(t.min() > 0 for t in seen)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_sees_every_step(sampler):
    process, seen = PROCESSES["flow"], []
    SAMPLERS[sampler](gaussian(process), torch.randn(1, 1, 2, 2), linear(process, 4), process,
                      callback=lambda step, t, x, guess: seen.append((step, t, x.shape, guess.x0.shape)))  # fmt: skip
    assert [s[0] for s in seen] == [0, 1, 2, 3] and [s[1] for s in seen] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert all(shape == (1, 1, 2, 2) for s in seen for shape in s[2:])


@pytest.mark.parametrize("sampler", VARIANTS)
def test_runs_can_be_replayed(sampler):
    process, stored = PROCESSES["scaled_linear"], {}

    def record(step, shape):
        stored[step] = torch.randn(shape)
        return stored[step]

    run = partial(VARIANTS[sampler], gaussian(process), torch.randn(2, 3, 4, 4), linear(process, 10), process)
    first = run(noise=record)
    assert torch.equal(first, run(noise=lambda step, shape: stored[step]))
    assert sorted(stored) == ([] if sampler in DETERMINISTIC else list(range(9)))  # the last step ends at the data


@pytest.mark.parametrize("sampler", VARIANTS)
def test_a_picture_does_not_depend_on_its_batch(sampler):
    process = PROCESSES["zero_terminal"]

    def pictures(positions):
        def noise(step, shape):
            return normal(shape[1:], 5, f"step {step}", positions)
        x = normal((2, 3, 3), 5, "x", positions)
        return VARIANTS[sampler](gaussian(process), x, linear(process, 8), process, noise=noise)

    together = pictures([0, 1, 2, 3])
    assert torch.allclose(together, torch.cat([pictures([0]), pictures([1, 2]), pictures([3])]), atol=1e-6)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stays_in_the_type_of_x(sampler):
    process = PROCESSES["flow"]
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(1, 1, 2, 2, dtype=dtype)
        out = SAMPLERS[sampler](lambda x, t: Prediction(x * 0.5, x * 0.5), x, linear(process, 3), process)
        assert out.dtype is dtype


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["compvis", "leading", "quadratic"])
def test_lists_of_published_samplers_can_be_walked(sampler, name):
    process = PROCESSES["scaled_linear"]
    out = SAMPLERS[sampler](gaussian(process), torch.randn(1, 1, 8, 8), TIMES[name](process, 30), process)
    assert out.isfinite().all() and abs(float(out.mean()) - MEAN) < 0.5


def test_bound_denoiser_is_a_denoise_function():
    process = PROCESSES["flow"]
    network = Perfect(process, "flow")
    network.t = torch.tensor([0.5, 0.5])
    x = torch.randn(2, 1, 2, 2)
    found = bind(Denoiser(network, process, "flow"), Cond())(x, network.t)
    assert torch.allclose(found.x0, gaussian(process)(x.double(), network.t).x0.float(), atol=1e-6)
