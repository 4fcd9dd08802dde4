import pytest
import torch
from oracles import PROCESSES, gaussian
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.guidance import cfg, cfg_batched, mix, within
from ldm.parameterization import PARAMETERIZATIONS, Prediction, solve
from ldm.process import DDPM
from ldm.samplers import ddim
from ldm.times import linear


class Attends(nn.Module):
    """Adds what it reads from the real tokens, and counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.read, self.calls = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(6, 2), 0

    def forward(self, x, time, cond):
        self.calls += 1
        told = (self.read(cond.tokens) * cond.mask[..., None]).sum(1) / cond.mask.sum(1, keepdim=True)
        return self.mix(x) + told[:, :, None, None] + 1e-3 * time.view(-1, 1, 1, 1)


@pytest.fixture
def conds():
    """Three captions of up to 7 tokens, and the empty caption of 3."""
    torch.manual_seed(1)
    mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    null = Cond(tokens=torch.randn(1, 3, 6), mask=torch.tensor([[True, True, False]]))
    return Cond(tokens=torch.randn(3, 7, 6), mask=mask), null.repeat_interleave(3)


def same(a, b, **options):
    return torch.allclose(a.x0, b.x0, **options) and torch.allclose(a.eps, b.eps, **options)


@pytest.mark.parametrize("parameterization", ["v", "flow", "data"])
def test_one_batched_pass_is_two_passes(conds, parameterization):
    network = Attends()
    denoiser = Denoiser(network, PROCESSES["flow"], parameterization)
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([0.9, 0.5, 0.2])
    batched = cfg_batched(denoiser, *conds, 5.0)(x, t)
    assert network.calls == 1
    apart = cfg(*(bind(denoiser, cond) for cond in conds), 5.0)(x, t)
    assert network.calls == 3
    assert same(batched, apart, atol=1e-5, rtol=1e-5) and batched.x0.shape == x.shape


def test_scale_1_is_the_condition_alone_and_0_the_empty_one(conds):
    network = Attends()
    denoiser, (cond, null) = Denoiser(network, PROCESSES["flow"]), conds
    x, t = torch.randn(3, 2, 4, 4), torch.full((3,), 0.5)
    for guided in (cfg(bind(denoiser, cond), bind(denoiser, null), 1), cfg_batched(denoiser, cond, null, 1)):
        network.calls = 0
        found = guided(x, t)
        assert network.calls == 1 and torch.equal(found.x0, bind(denoiser, cond)(x, t).x0)
    assert same(cfg_batched(denoiser, cond, null, 0.0)(x, t), bind(denoiser, null)(x, t), atol=1e-5)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_guidance_on_f_is_guidance_on_x0_and_eps(parameterization):
    """The map from F to (x0, eps) is affine in F, and the weights sum to one."""
    torch.manual_seed(0)
    x, cond, null = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    alpha, sigma = DDPM("linear").exact(torch.tensor([100.0, 700.0]).double())
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    row = (alpha, sigma, *PARAMETERIZATIONS[parameterization](alpha, sigma))
    mixed = mix(solve(x, cond, *row), solve(x, null, *row), 7.5)
    assert same(mixed, solve(x, null + 7.5 * (cond - null), *row), atol=1e-9)
    assert torch.allclose(alpha * mixed.x0 + sigma * mixed.eps, x)


def test_mix_extrapolates():
    x0, eps, other_x0, other_eps, var = torch.tensor([[1.0], [4.0], [0.5], [6.0], [9.0]])
    found = mix(Prediction(x0, eps, var), Prediction(other_x0, other_eps), 3.0)
    assert (found.x0.item(), found.eps.item(), found.var.item()) == (2.0, 0.0, 9.0)


def test_guided_gaussians_go_where_they_should():
    """Both conditions normal with one std s: guided x0 = E[x0 | null mean + scale * difference], so samples move there."""
    process = PROCESSES["flow"]
    guided = cfg(gaussian(process, mean=1.0), gaussian(process, mean=0.5), 3.0)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    found, expected = (ddim(denoise, x, linear(process, 20), process) for denoise in (guided, gaussian(process, mean=2.0)))
    assert torch.allclose(found, expected, atol=1e-9)


def test_within_chooses_by_time():
    def says(value):
        return lambda x, t: Prediction(torch.full_like(x, value), x)
    denoise, x = within(0.2, 0.8, inside=says(1.0), outside=says(0.0)), torch.zeros(2, 1, 1, 1)
    found = [denoise(x, torch.full((2,), t)).x0[0].item() for t in (0.1, 0.25, 0.5, 0.75, 0.9)]
    assert found == [0, 1, 1, 1, 0]
