import math

import pytest
import torch
from oracles import ENDLESS, PROCESSES

from ldm.process import DDPM, EDM, SCHEDULES, VP, Cosine, RectifiedFlow

EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(process, n=101):
    return torch.linspace(process.t_max, process.t_min, n, dtype=torch.float64)


@EVERY
def test_noise_grows_with_time_and_data_is_clean(process):
    t = times(process)
    assert (process.log_snr(t).diff() > 0).all()  # t decreases
    alpha, sigma = process.exact(torch.tensor([process.t_data], dtype=torch.float64))
    assert alpha == 1 and sigma == 0


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine", "sigmoid", "zero_terminal", "vp", "trigonometric"])
def test_variance_is_preserved(name):
    process = PROCESSES[name]
    t = torch.cat([times(process, 777), torch.tensor([process.t_data], dtype=torch.float64)])
    alpha, sigma = process.exact(t)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-14)
    assert process.prior_std() == pytest.approx(1)


@pytest.mark.parametrize("name", ENDLESS)
def test_ends_in_pure_noise(name):
    process = PROCESSES[name]
    alpha, sigma = process.exact(torch.tensor([process.t_max], dtype=torch.float64))
    assert alpha.abs() < 1e-15 and sigma == 1


@EVERY
def test_coefficients_keep_the_type_of_t(process):
    t = times(process, 7)
    exact = process.exact(t)
    for dtype in (torch.float32, torch.float64):
        found = process.coefficients(t.to(dtype))
        assert all(c.dtype is dtype for c in found)
        assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(found, exact, strict=True))
    found = process.coefficients(torch.ones(3, dtype=torch.int64))
    assert all(c.dtype is torch.float32 and c.shape == (3,) for c in found)


@EVERY
def test_add_noise_has_the_moments_that_it_says(process):
    draws = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 64, 64, generator=draws) for _ in range(2))
    x0 = 0.5 + 0.2 * x0
    t = torch.tensor([process.t_max, process.t_min + 0.3 * (process.t_max - process.t_min)])
    alpha, sigma = process.coefficients(t)
    x = process.add_noise(x0, eps, t)
    assert torch.allclose(x.mean((1, 2, 3)), alpha * 0.5, atol=float(0.05 * sigma.max()))
    assert torch.allclose(x.std((1, 2, 3)), torch.hypot(0.2 * alpha, sigma), rtol=0.03)
    assert torch.equal(x[1], alpha[1] * x0[1] + sigma[1] * eps[1])


@EVERY
def test_network_is_told_a_time_between_0_and_1000(process):
    told = process.time(times(process).float())
    assert told.dtype is torch.float32
    assert told.min() >= -1e-3 and 999 <= told.max() <= 1000 + 1e-2
    assert (told.diff() < 0).all()


def betas_by_steps(schedule, steps):
    """The published formulas in a plain loop."""
    def alpha_bar(share):
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
    share = [i / (steps - 1) for i in range(steps)]
    return {
        "linear": [1e-4 + s * (0.02 - 1e-4) for s in share],
        "scaled_linear": [(math.sqrt(0.00085) + s * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for s in share],
        "sqrt": [math.sqrt(1e-4 + s * (0.02 - 1e-4)) for s in share],
        "sigmoid": [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * s)) for s in share],
        "cosine": [min(0.999, 1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps)) for i in range(steps)],
    }[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_of_the_schedules(schedule):
    process, expected, product = DDPM(schedule, steps=50), betas_by_steps(schedule, 50), 1.0
    assert process.betas.tolist() == pytest.approx(expected, rel=1e-10)
    for t, beta in enumerate(expected):
        product *= 1 - beta
        alpha, _ = process.exact(torch.tensor([float(t)], dtype=torch.float64))
        assert float(alpha) ** 2 == pytest.approx(product, rel=1e-10)


def test_first_and_last_beta_can_be_set():
    assert DDPM("linear", 10, start=0.1, end=0.2).betas[[0, -1]].tolist() == pytest.approx([0.1, 0.2])


def test_fractions_of_a_step_interpolate():
    process = DDPM(zero_terminal=True)
    t = torch.linspace(-1, 999, 20001, dtype=torch.float64)
    assert (process.log_snr(t).diff() < 0).all()
    alpha, _ = process.exact(torch.tensor([10.0, 10.5, 11.0], dtype=torch.float64))
    assert float(alpha[1]) == pytest.approx(float((alpha[0] * alpha[2]).sqrt()), rel=1e-14)


def test_zero_terminal_keeps_the_first_step_and_the_shape():
    plain, rescaled = (DDPM(zero_terminal=z).alpha_bar.sqrt() for z in (False, True))
    assert rescaled[0] == pytest.approx(float(plain[0]), rel=1e-14) and rescaled[-1] == 0
    share = (plain - plain[-1]) / (plain[0] - plain[-1])  # algorithm 1 of 2305.08891: an affine map of sqrt(alpha_bar)
    assert torch.allclose(rescaled / rescaled[0], share, atol=1e-14)


def test_vp_solves_its_differential_equation():
    process, t, h = VP(), torch.tensor([0.37], dtype=torch.float64), 1e-5
    beta = 0.1 + t * 19.9
    slope = (process.exact(t + h)[0].log() - process.exact(t - h)[0].log()) / (2 * h)
    assert float(slope) == pytest.approx(float(-beta / 2), rel=1e-8)  # dx = -beta x / 2 dt


def test_shift_divides_the_signal_to_noise_ratio():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    gap = RectifiedFlow().log_snr(t) - RectifiedFlow(3.0).log_snr(t)
    assert torch.allclose(gap, torch.full_like(t, math.log(3.0)))


def test_a_shifted_flow_tells_the_network_the_same_noise_level():
    shifted, plain = RectifiedFlow(3.0), RectifiedFlow()
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(shifted.time(t), plain.time(shifted.coefficients(t)[1]), atol=1e-3)


def test_edm_and_trigonometric_at_known_times():
    assert EDM().coefficients(torch.tensor([80.0])) == (1.0, 80.0)
    assert EDM(0.002, 80.0).prior_std() == pytest.approx(math.hypot(1, 80))
    alpha, sigma = Cosine().exact(torch.tensor([1 / 3], dtype=torch.float64))
    assert float(alpha) == pytest.approx(math.sqrt(3) / 2) and float(sigma) == pytest.approx(0.5)
