import pytest
import torch
from oracles import PROCESSES

from ldm.parameterization import PARAMETERIZATIONS, solve, target

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


def test_v_and_flow_are_velocities():
    """v = dx_t/dphi on the circle, F = dx_t/dt of the straight line."""
    x0, eps, h = torch.tensor([0.3]).double(), torch.tensor([-1.2]).double(), 1e-6
    for name, process, unit in (("v", PROCESSES["trigonometric"], torch.pi / 2), ("flow", PROCESSES["flow"], 1.0)):
        t = torch.tensor([0.37], dtype=torch.float64)
        slope = (process.add_noise(x0, eps, t + h) - process.add_noise(x0, eps, t - h)) / (2 * h) / unit
        said = target(x0, eps, *PARAMETERIZATIONS[name](*process.exact(t)))
        assert torch.allclose(slope, said, atol=1e-8)
