"""Samplers that walk in time, as SiT does: Runge-Kutta on the ODE, and the SDE with as much noise as one likes."""

import math

import pytest
import torch
from oracles import MEAN, PROCESSES, STD, Mixture, gaussian, slope

from ldm.common.build import build
from ldm.process import DDPM
from ldm.samplers import DIFFUSIONS, RULES, diffusion_of, reverse_sde, runge_kutta
from ldm.times import linear

SMOOTH = ("vp", "trigonometric", "flow", "flow_shift", "edm")
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


@pytest.mark.parametrize("name", SMOOTH)
def test_rates_are_derivatives(name):
    process, h = PROCESSES[name], 1e-6
    t = process.t_max * torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    before, after = process.exact(t - h * process.t_max), process.exact(t + h * process.t_max)
    for rate, low, high in zip(process.rates(t), before, after, strict=True):
        torch.testing.assert_close(rate, (high - low) / (2 * h), rtol=1e-6, atol=1e-8)
    with torch.inference_mode():
        torch.testing.assert_close(process.rates(t.clone()), process.rates(t))


def test_rates_of_steps_are_those_of_the_process_that_they_approximate():
    """DDPM's linear schedule of T steps is VP with b_min = 0.1, b_max = 20 (2011.13456, appendix B)."""
    steps, smooth = DDPM("linear"), PROCESSES["vp"]
    t = torch.tensor([100.0, 400.0, 900.0], dtype=torch.float64)
    for ours, theirs in zip(steps.rates(t), smooth.rates(steps.share(t)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=4e-3)
    assert all(rate.isfinite().all() for name in PROCESSES for rate in PROCESSES[name].rates(
        torch.tensor([PROCESSES[name].t_max], dtype=torch.float64)))  # fmt: skip


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", SMOOTH)
def test_order_of_convergence(name, method):
    process = PROCESSES[name]
    begin, end = (process.t_max * share for share in ((0.05, 0.005) if name == "edm" else (0.7, 0.2)))
    mixture, errors = Mixture(process), {}
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    exact = mixture.transported(x, begin, end)
    for n in (12, 24):
        path = torch.linspace(begin, end, n + 1, dtype=torch.float64)
        errors[n] = (runge_kutta(mixture.denoise, x, path, process, method=method) - exact).abs().max().item()
    assert ORDERS[method] - 0.35 < slope(errors) < ORDERS[method] + 0.9, errors


def test_the_end_is_asked_only_where_it_may_be():
    process, x = PROCESSES["flow"], torch.randn(2, 1, 2, 2, dtype=torch.float64)
    for method, to_the_end, calls in (("heun2", False, 7), ("heun2", True, 8), ("midpoint", False, 8), ("rk4", False, 13)):
        seen = []
        runge_kutta(lambda x, t, seen=seen: seen.append(float(t[0])) or gaussian(process)(x, t.clamp(min=1e-9)), x,
                    linear(process, 4), process, method=method, to_the_end=to_the_end)  # fmt: skip
        assert len(seen) == calls and (min(seen) == 0) == to_the_end


def moments(name, n, **options):
    """Mean and deviation of what the sampler makes of a Gaussian, exactly: it is an affine map of x_T and the noises."""
    process = PROCESSES[name]
    x = torch.zeros(n + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1

    def noise(step, shape):
        return torch.zeros(shape, dtype=torch.float64).index_fill(0, torch.tensor([2 + step]), 1.0)

    out = reverse_sde(gaussian(process), x, linear(process, n), process, noise=noise, **options).flatten()
    alpha, sigma = (float(c) for c in process.exact(torch.tensor(process.t_max, dtype=torch.float64)))
    gain, offset = float(out[1] - out[0]), float(out[0])
    spread = math.hypot(gain * math.hypot(alpha * STD, sigma), float((out[2:] - out[0]).norm()))
    return offset + gain * alpha * MEAN, spread


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("name", ["linear", "cosine", "zero_terminal", "trigonometric", "flow", "flow_shift"])
def test_every_diffusion_has_the_moments_of_the_data(name, diffusion):
    if (name, diffusion) == ("cosine", "sbdm"):
        return  # next to pure noise that is thousands
    loose = 2.5 if diffusion == "constant" else 1  # as much noise next to the data as elsewhere
    for n, method, close in ((60, "euler", 0.06), (30, "heun", 0.09)):
        mean, std = moments(name, n, diffusion=diffusion, norm=0.5, method=method)
        assert mean == pytest.approx(MEAN, abs=0.02) and std == pytest.approx(STD, rel=loose * close)


def test_last_steps():
    """From t = 0.25 to the data in one step: on a straight flow x0 is where the ODE leads, and noise has no part in it."""
    process, x, t = PROCESSES["flow"], torch.randn(2, 1, 2, 2, dtype=torch.float64), 0.25
    guess, draws = gaussian(process)(x, torch.tensor(t)), []

    def run(**options):
        return reverse_sde(gaussian(process), x, torch.tensor([t, 0.0]), process, diffusion="linear",
                           noise=lambda step, shape: draws.append(step) or torch.ones(shape), **options)  # fmt: skip

    for method in ("euler", "heun"):
        torch.testing.assert_close(run(method=method, last_step="tweedie"), guess.x0)
        torch.testing.assert_close(run(method=method, last_step="euler"), guess.x0)
        torch.testing.assert_close(run(method=method), guess.x0 - t * guess.eps)  # w = t, score = -eps / t, a step of t
    assert not draws
    torch.testing.assert_close(run(last_step=None), guess.x0 - t * guess.eps + math.sqrt(2 * t * t))
    assert draws == [0]


def test_without_noise_it_is_the_ode():
    process, x = PROCESSES["trigonometric"], torch.randn(2, 1, 2, 2, dtype=torch.float64)
    times = linear(process, 7)
    for method, rule in (("euler", "euler"), ("heun", "heun2")):
        found = reverse_sde(gaussian(process), x, times, process, norm=0.0, method=method)
        torch.testing.assert_close(found, runge_kutta(gaussian(process), x, times, process, method=rule))


def test_diffusion_of_the_process_itself():
    """Half of g^2, which is beta / 2 for VP (2011.13456, eq. 11), and 0 where it would be infinite."""
    process = build({"target": "ldm.process.VP"})
    assert diffusion_of("sbdm", process, 0.4) == pytest.approx((0.1 + 0.4 * 19.9) / 2)
    assert diffusion_of("sbdm", PROCESSES["flow"], 0.4, norm=2.0) == pytest.approx(2 * 0.4 / 0.6)
    assert diffusion_of("sbdm", PROCESSES["flow"], 1.0) == 0
