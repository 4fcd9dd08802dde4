import pytest
import torch
from oracles import MEAN, PROCESSES, STD

from ldm.parameterization import PARAMETERIZATIONS, STEPWISE, Preconditioned, inverse, previous, solve, target

EVERY = pytest.mark.parametrize("name", PARAMETERIZATIONS)


@pytest.fixture
def known():
    """x0 and eps (4,3,8,8), alpha and sigma of a process that preserves no variance."""
    draws = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 8, 8, generator=draws, dtype=torch.float64) for _ in range(2))
    levels = torch.tensor([[0.99, 0.7, 0.3, 0.05], [0.1, 0.6, 1.4, 1.0]], dtype=torch.float64)
    return x0, eps, *levels.view(2, -1, 1, 1, 1)


@EVERY
def test_solve_is_the_inverse_of_target(name, known):
    x0, eps, alpha, sigma = known
    p, q = PARAMETERIZATIONS[name](alpha, sigma)
    found = solve(alpha * x0 + sigma * eps, target(x0, eps, p, q), alpha, sigma, p, q)
    assert torch.allclose(found.x0, x0, atol=1e-12) and torch.allclose(found.eps, eps, atol=1e-12)


@EVERY
def test_what_is_solved_is_consistent_with_x_t(name, known):
    """alpha x0 + sigma eps = x_t whatever the network says."""
    x0, eps, alpha, sigma = known
    x_t = alpha * x0 + sigma * eps
    p, q = PARAMETERIZATIONS[name](alpha, sigma)
    found = solve(x_t, torch.randn_like(x0), alpha, sigma, p, q)
    assert torch.allclose(alpha * found.x0 + sigma * found.eps, x_t, atol=1e-12)


def test_what_each_one_says(known):
    x0, eps, alpha, sigma = known
    said = {name: target(x0, eps, *pair(alpha, sigma)) for name, pair in PARAMETERIZATIONS.items()}
    assert torch.equal(said["noise"], eps) and torch.equal(said["data"], x0)
    assert torch.allclose(said["flow"], eps - x0)
    assert torch.allclose(said["v"], alpha * eps - sigma * x0)
    assert torch.allclose(said["edm"], (sigma * x0 - alpha * eps) / torch.hypot(alpha, sigma))


def test_v_and_flow_are_velocities():
    """v = dx_t/dphi on the circle, F = dx_t/dt of the straight line."""
    x0, eps, h = torch.tensor([0.3]).double(), torch.tensor([-1.2]).double(), 1e-6
    for name, process, unit in (("v", PROCESSES["trigonometric"], torch.pi / 2), ("flow", PROCESSES["flow"], 1.0)):
        t = torch.tensor([0.37], dtype=torch.float64)
        slope = (process.add_noise(x0, eps, t + h) - process.add_noise(x0, eps, t - h)) / (2 * h) / unit
        said = target(x0, eps, *PARAMETERIZATIONS[name](*process.exact(t)))
        assert torch.allclose(slope, said, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_all_of_them_say_the_same(process):
    """What one says, solved for x0 and eps, is what every other would have said."""
    draws = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 50, generator=draws, dtype=torch.float64)
    t = process.t_min + torch.linspace(0.02, 0.95, 50, dtype=torch.float64) * (process.t_max - process.t_min)
    alpha, sigma = process.exact(t)
    pairs = {name: pair(alpha, sigma) for name, pair in PARAMETERIZATIONS.items()} | {"half": Preconditioned(0.5)(alpha, sigma)}
    if process.t_data < 0:
        pairs["previous"] = previous(alpha, sigma, *process.exact(t - 1))
    x_t = alpha * x0 + sigma * eps
    for name, pair in pairs.items():
        f = target(x0, eps, *pair)
        guess = solve(x_t, f, alpha, sigma, *pair)
        lost = sum(coefficient.abs() for row in inverse(alpha, sigma, *pair) for coefficient in row)  # of 1e-16, by rounding
        for other in pairs.values():
            wrong = (target(guess.x0, guess.eps, *other) - target(x0, eps, *other)).abs()
            assert (wrong <= 1e-14 * (1 + lost) * (1 + other[0].abs() + other[1].abs())).all(), name


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_is_the_papers_preconditioning(sigma_data):
    """Table 1 of 2206.00364, where alpha = 1: D = c_skip x + c_out F."""
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    total = sigma**2 + sigma_data**2
    edm, alpha = Preconditioned(sigma_data), torch.ones_like(sigma)
    (c_skip, c_out), _ = inverse(alpha, sigma, *edm(alpha, sigma))
    assert torch.allclose(c_skip, sigma_data**2 / total, rtol=1e-12)
    assert torch.allclose(c_out, sigma * sigma_data / total.sqrt(), rtol=1e-12)
    assert torch.allclose(edm.c_in(alpha, sigma), total.rsqrt(), rtol=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_edm_gives_the_network_unit_variance_on_both_sides(process):
    """In closed form, for data of mean 0 and variance sigma_data^2: Var(c_in x_t) = Var(F) = 1, and of all F of the form
    p x0 + q eps with unit variance it has the smallest gain of errors, |dx0 / dF| = c_out (2206.00364, B.6)."""
    sigma_data = 0.5
    t = torch.linspace(process.t_max, process.t_min, 21, dtype=torch.float64)
    alpha, sigma = process.exact(t)
    edm = Preconditioned(sigma_data)
    p, q = edm(alpha, sigma)
    one = torch.ones_like(t)
    assert torch.allclose((p * sigma_data) ** 2 + q**2, one, rtol=1e-12)
    assert torch.allclose(edm.c_in(alpha, sigma) ** 2 * ((alpha * sigma_data) ** 2 + sigma**2), one, rtol=1e-12)
    assert torch.allclose(alpha * q - sigma * p, -torch.hypot(alpha * sigma_data, sigma) / sigma_data)  # never 0
    assert torch.allclose(p * sigma_data**2 * alpha + q * sigma, 0 * one, atol=1e-12)  # F is uncorrelated with x_t
    c_out = (sigma * sigma_data / torch.hypot(alpha * sigma_data, sigma)).abs()
    for angle in (0.3, 1.1, 2.0, 2.9):  # the other F of unit variance
        other_p, other_q = torch.cos(angle * one) / sigma_data, torch.sin(angle * one)
        assert (sigma / (alpha * other_q - sigma * other_p).abs() >= c_out * (1 - 1e-12)).all()


def test_edm_of_data_at_unit_scale_is_v():
    alpha, sigma = PROCESSES["vp"].exact(torch.linspace(0.1, 1, 9, dtype=torch.float64))
    for ours, known in zip(PARAMETERIZATIONS["edm"](alpha, sigma), PARAMETERIZATIONS["v"](alpha, sigma), strict=True):
        assert torch.allclose(ours, -known, atol=1e-12)


def test_edm_needs_a_scale():
    with pytest.raises(ValueError, match="sigma_data: 0; a standard deviation is above 0"):
        Preconditioned(0)


@pytest.mark.parametrize("name", ["linear", "cosine", "zero_terminal"])
def test_previous_is_the_mean_of_the_posterior(name):
    process, (x0, eps) = PROCESSES[name], (torch.tensor(MEAN).double(), torch.tensor(-STD).double())
    t = torch.arange(1000, dtype=torch.float64)
    (alpha, sigma), step = process.exact(t), process.posterior(t, t - 1)
    found = target(x0, eps, *STEPWISE["previous"](alpha, sigma, *process.exact(t - 1)))
    assert torch.allclose(found, step.x0 * x0 + step.xt * (alpha * x0 + sigma * eps), rtol=1e-12)
    assert found[0] == x0
