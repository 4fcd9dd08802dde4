import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from oracles import PROCESSES, gaussian
from torch import nn

from ldm.common.random import normal
from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.densities import LossSecondMoment
from ldm.loss import (
    DISTANCES,
    WEIGHTS,
    Huber,
    LogitNormal,
    MinSNR,
    Objective,
    PseudoHuber,
    Uniform,
    Variational,
    diffusion_loss,
    immiscible,
    l1,
    misfits,
    mse,
    uniform,
)
from ldm.parameterization import PARAMETERIZATIONS, target
from ldm.process import DDPM
from ldm.weights import Uncertainty

U = torch.linspace(0, 1 - 2**-24, 10001)


class Constant(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, time, cond):
        return self.value.expand_as(x)


@pytest.fixture
def batch():
    draws = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, 2, 3, 3, generator=draws) for _ in range(2))


def test_uniform_reaches_every_step_equally_often():
    steps, counts = Uniform()((torch.arange(5000) + 0.5) / 5000, PROCESSES["linear"]).unique(return_counts=True)
    assert torch.equal(steps, torch.arange(1000.0)) and (counts == 5).all()
    assert Uniform()(U, PROCESSES["linear"]).max() == 999


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_uniform_spans_continuous_processes(name):
    process = PROCESSES[name]
    t = Uniform()(U, process)
    assert t[0] == pytest.approx(process.t_min) and t[-1] == pytest.approx(process.t_max)
    assert torch.allclose(t.diff(), t.diff().mean(), atol=1e-6 * process.t_max)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_has_normal_logits(mean, std):
    t = LogitNormal(mean, std)(U, PROCESSES["flow"])
    logits = torch.logit(t[1:-1].double())
    assert logits.mean() == pytest.approx(mean, abs=1e-3) and logits.std() == pytest.approx(std, rel=5e-3)
    within = ((logits - mean).abs() < std).double().mean()
    assert within == pytest.approx(0.6827, abs=1e-3)
    assert (t.diff() >= 0).all() and t.isfinite().all()


def test_logit_normal_on_discrete_processes_is_an_index():
    t = LogitNormal()(U, PROCESSES["linear"])
    assert torch.equal(t, t.floor()) and t.min() >= 0 and t.max() <= 999


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_loss_is_the_squared_error_of_f(parameterization, batch):
    z, noise = batch
    process = PROCESSES["scaled_linear"]
    t = torch.tensor([0.0, 10.0, 500.0, 999.0])
    loss = diffusion_loss(Denoiser(Constant(0.3), process, parameterization), z, Cond(), t, noise)
    assert loss.shape == (4,)
    for i in range(4):
        alpha, sigma = (c.float() for c in process.exact(t[i].double()))
        s = sigma / alpha
        f = {"noise": noise[i], "data": z[i], "v": alpha * noise[i] - sigma * z[i], "flow": noise[i] - z[i],
             "edm": (z[i] - (z[i] + s * noise[i]) / (s**2 + 1)) * (s**2 + 1).sqrt() / s}[parameterization]
        assert loss[i].item() == pytest.approx((0.3 - f).square().mean().item(), rel=1e-5)


def test_network_sees_the_noisy_latent(batch):
    z, noise = batch

    class Copies(nn.Module):
        def forward(self, x, time, cond):
            self.x, self.time = x, time
            return x

    network, t = Copies(), torch.tensor([0.0, 0.25, 0.5, 1.0])
    diffusion_loss(Denoiser(network, PROCESSES["flow"]), z, Cond(), t, noise)
    part = t.view(-1, 1, 1, 1)
    assert torch.allclose(network.x, (1 - part) * z + part * noise)
    assert torch.allclose(network.time, 1000 * t)


def test_right_answers_cost_nothing_and_gradients_point_there(batch):
    z, noise = torch.zeros_like(batch[0]), torch.full_like(batch[1], 0.5)
    network = Constant(0.5)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    loss = diffusion_loss(Denoiser(network, PROCESSES["flow"], "flow"), z, Cond(), t, noise)
    assert loss.tolist() == [0] * 4
    network.value.data += 0.1
    diffusion_loss(Denoiser(network, PROCESSES["flow"], "flow"), z, Cond(), t, noise).mean().backward()
    assert network.value.grad.item() == pytest.approx(0.2)


def test_best_denoiser_of_gaussian_data_costs_what_is_left_of_chance():
    """E|F - target|^2 at t is the variance of F given x_t: for data N(m, s^2) and flow, s^2 / (alpha^2 s^2 + sigma^2)."""
    process, draws = PROCESSES["flow"], torch.Generator().manual_seed(0)
    z = 0.7 + 0.4 * torch.randn(3, 1, 256, 256, generator=draws)
    noise, t = torch.randn(z.shape, generator=draws), torch.tensor([0.1, 0.5, 0.9])

    class Best(nn.Module):
        def forward(self, x, time, cond):
            best = gaussian(process)(x.double(), t)
            return (best.eps - best.x0).float()

    loss = diffusion_loss(Denoiser(Best(), process, "flow"), z, Cond(), t, noise)
    alpha, sigma = process.coefficients(t)
    assert torch.allclose(loss, 0.16 / ((0.4 * alpha) ** 2 + sigma**2), rtol=0.03)


@pytest.mark.parametrize("name", ["scaled_linear", "vp", "flow", "trigonometric", "edm"])
def test_min_snr_weighs_the_error_of_x0_in_every_parameterization(name):
    process = PROCESSES[name]
    t = process.t_min + torch.linspace(0.02, 0.98, 25, dtype=torch.float64) * (process.t_max - process.t_min)
    alpha, sigma = process.exact(t)
    error = 0.3  # of x0; then eps is wrong by -alpha / sigma of it, as x_t is known
    expected = (alpha / sigma).square().clamp(max=5.0) * error**2
    for pair in PARAMETERIZATIONS.values():
        p, q = pair(alpha, sigma)
        error_of_f = target(torch.full_like(alpha, error), -alpha / sigma * error, p, q)
        assert torch.allclose(WEIGHTS["min_snr"](alpha, sigma, p, q) * error_of_f.square(), expected, rtol=1e-9)


def test_min_snr_of_noise_prediction_is_the_published_weight():
    alpha, sigma = PROCESSES["linear"].exact(torch.arange(0.0, 1000, 50).double())
    snr = (alpha / sigma).square()
    weight = MinSNR(5.0)(alpha, sigma, *PARAMETERIZATIONS["noise"](alpha, sigma))
    assert torch.allclose(weight, snr.clamp(max=5.0) / snr)  # 2303.09556, section 3.4


@pytest.mark.parametrize("parameterization", ["data", "v", "flow"])
def test_min_snr_is_finite_at_both_ends(parameterization):
    alpha, sigma = PROCESSES["flow"].coefficients(torch.tensor([0.0, 1e-6, 1.0]))
    weight = MinSNR()(alpha, sigma, *PARAMETERIZATIONS[parameterization](alpha, sigma))
    assert weight.isfinite().all() and (weight >= 0).all() and weight[2] == 0


def test_weights_multiply_the_loss(batch):
    z, noise = batch
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    denoiser = Denoiser(Constant(), PROCESSES["flow"])
    plain = diffusion_loss(denoiser, z, Cond(), t, noise)
    alpha, sigma = PROCESSES["flow"].coefficients(t)
    assert torch.allclose(diffusion_loss(denoiser, z, Cond(), t, noise, MinSNR(5.0)),
                          plain * torch.minimum(alpha**2, 5 * sigma**2))  # fmt: skip
    assert torch.equal(plain, diffusion_loss(denoiser, z, Cond(), t, noise, uniform))


@pytest.mark.parametrize("distance", ["l1", "huber", "pseudo_huber"])
def test_distances(distance):
    source = torch.Generator().manual_seed(0)
    error = 2 * torch.randn(3, 2, 4, 4, generator=source)
    nothing = torch.zeros_like(error)
    expected = {
        "l1": F.l1_loss(error, nothing, reduction="none").flatten(1).mean(1),
        "huber": F.huber_loss(error, nothing, reduction="none").flatten(1).mean(1),
        "pseudo_huber": torch.stack([(e.norm() ** 2 + 32 * 0.00054**2).sqrt() - 0.00054 * 32**0.5 for e in error]),
    }[distance]
    assert torch.allclose(DISTANCES[distance](error), expected)


def test_distances_come_near_to_each_other():
    error = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Huber(1e3)(error), mse(error) / 2)
    assert torch.allclose(Huber(1e-4)(error) / 1e-4, l1(error), atol=1e-3)
    assert torch.allclose(PseudoHuber(1e3)(error) * 2e3 / 25, mse(error), rtol=1e-2)
    assert torch.allclose(PseudoHuber(0.0)(error), error.flatten(1).norm(dim=1))


def test_a_distance_takes_the_place_of_the_square(batch):
    z, noise = batch
    t, denoiser = torch.tensor([0.2, 0.4, 0.6, 0.8]), Denoiser(Constant(0.3), PROCESSES["flow"])
    error = 0.3 - (noise - z)
    assert torch.allclose(diffusion_loss(denoiser, z, Cond(), t, noise, distance=l1), error.abs().flatten(1).mean(1))
    alpha, sigma = PROCESSES["flow"].coefficients(t)
    root = torch.minimum(alpha**2, 5 * sigma**2).sqrt().view(-1, 1, 1, 1)
    found = diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS["min_snr"], distance=Huber(0.1))
    assert torch.allclose(found, Huber(0.1)(root * error))


def test_immiscible_pairs_are_the_best_of_all():
    source = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(5, 2, 2, 2, generator=source) for _ in range(2))
    paired = immiscible(z, noise)
    cost = [(z - noise[list(order)]).square().sum().item() for order in permutations(range(5))]
    assert (z - paired).square().sum().item() == pytest.approx(min(cost), rel=1e-6)
    assert sorted(paired.flatten(1).tolist()) == sorted(noise.flatten(1).tolist())


def test_immiscible_noise_is_that_of_the_target_too():
    objective = Objective(immiscible=True)
    z = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    noise = objective.noise(z, list(range(6)), 3)
    drawn = normal((2, 3, 3), 3, "noise", range(6))
    assert torch.equal(noise, immiscible(z, drawn)) and not torch.equal(noise, drawn)

    class Solves(nn.Module):
        """Knows the data, so it finds the noise that is in x_t."""

        def forward(self, x, time, cond):
            s = (time / 1000).view(-1, 1, 1, 1)
            return (x - (1 - s) * z) / s - z

    loss = objective(Denoiser(Solves(), PROCESSES["flow"]), z, Cond(), torch.full((6,), 0.5), noise, torch.zeros(6, dtype=torch.bool))
    assert torch.allclose(loss, torch.zeros(6), atol=1e-10)


def test_offset_noise_is_the_same_in_all_pixels_of_a_channel():
    z = torch.zeros(512, 3, 4, 4)
    plain, offset = (Objective(offset_noise=strength).noise(z, list(range(512)), 5) for strength in (0.0, 0.5))
    added = offset - plain
    assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
    assert added[..., 0, 0].std() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(plain, normal((3, 4, 4), 5, "noise", range(512)))
    assert torch.equal(offset[7:9], Objective(offset_noise=0.5).noise(z[:2], [7, 8], 5))


class Half(nn.Module):
    """Two outputs of a learned variance, each with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.mean, self.var = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x, time, cond):
        return torch.cat([self.mean.expand_as(x), self.var.expand_as(x)], dim=1)


@pytest.mark.parametrize("decoder", ["discretized", "gaussian"])
def test_the_hybrid_teaches_the_variance_alone(batch, decoder):
    z, noise = batch[0].clamp(-1, 1), batch[1]
    t, process = torch.tensor([0.0, 1.0, 500.0, 999.0]), PROCESSES["linear"]

    def gradients(variational):
        denoiser = Denoiser(Half(), process, "noise", variance="learned_range")
        loss = diffusion_loss(denoiser, z, Cond(), t, noise, variational=variational)
        return loss, torch.autograd.grad(loss.mean(), [denoiser.network.mean, denoiser.network.var])

    plain = diffusion_loss(Denoiser(Constant(0.1), process, "noise"), z, Cond(), t, noise)
    hybrid, (mean, var) = gradients(Variational(decoder=decoder))
    bound, (mean_of_bound, var_of_bound) = gradients(Variational("vlb", decoder=decoder))
    assert torch.allclose(hybrid, plain + 0.001 * bound, rtol=1e-5)
    assert mean == pytest.approx(2 * (0.1 - noise).mean().item(), rel=1e-4) and mean_of_bound != 0
    assert var == pytest.approx(0.001 * var_of_bound.item(), rel=1e-4)
    nats, _ = gradients(Variational("vlb", unit="nats", decoder=decoder))
    assert torch.allclose(bound * math.log(2), nats)


def test_the_bound_with_fixed_variance_is_its_weight():
    """KL between Gaussians of one variance is the weighted squared error: the two routes agree, but for the first step."""
    process, source = PROCESSES["cosine"], torch.Generator().manual_seed(0)
    z, noise = (torch.randn(4, 2, 3, 3, generator=source) for _ in range(2))
    t, denoiser = torch.tensor([1.0, 30.0, 400.0, 900.0]), Denoiser(Constant(0.3), process, "v")
    bound = diffusion_loss(denoiser, z, Cond(), t, noise, variational=Variational("vlb", unit="nats"))
    assert torch.allclose(bound, diffusion_loss(denoiser, z, Cond(), t, noise, WEIGHTS["vlb"]), rtol=1e-3)


def test_the_gaussian_decoder_is_a_density():
    process, z = PROCESSES["linear"], torch.zeros(1, 1, 1, 1)
    x0 = torch.full((1, 1, 1, 1), 0.3)
    log = process.posterior(1.0, 0.0).variance.log().item()
    found = Variational("vlb", scale=1 / 1000, unit="nats", decoder="gaussian")(process, "fixed", z, x0, torch.zeros(1), x0)
    expected = -torch.distributions.Normal(0.3, math.exp(log / 2)).log_prob(torch.zeros(()))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_does_not_fit_is_told():
    flow, ddpm = PROCESSES["flow"], PROCESSES["linear"]
    assert "RectifiedFlow has none; take weight 'vlb'" in misfits(flow, "learned", variational=Variational())[0]
    assert "take variance 'learned_range'" in misfits(ddpm, "fixed", variational=Variational())[0]
    assert "this process has one step" in misfits(DDPM(steps=1), "fixed", variational=Variational("vlb"))[0]
    assert "remove one of them" in misfits(ddpm, "fixed", variational=Variational("vlb"), uncertainty=Uncertainty())[0]
    assert "learned from the bound alone" in misfits(ddpm, "learned_range")[0]
    assert "has no steps" in misfits(flow, "fixed", density=LossSecondMoment())[0]
    assert misfits(ddpm, "learned_range", LossSecondMoment(), Uncertainty(), Variational()) == []
    with pytest.raises(ValueError, match="density: LossSecondMoment keeps a history"):
        Objective(LossSecondMoment()).attach(flow)
