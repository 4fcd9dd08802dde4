import pytest
import torch
from oracles import PROCESSES, gaussian
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.loss import WEIGHTS, LogitNormal, MinSNR, Uniform, diffusion_loss, uniform
from ldm.parameterization import PARAMETERIZATIONS, target

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
        f = {"noise": noise[i], "data": z[i], "v": alpha * noise[i] - sigma * z[i], "flow": noise[i] - z[i]}[parameterization]
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
