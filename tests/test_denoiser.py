import pytest
import torch
from oracles import ENDLESS, PROCESSES
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind, impossible, linear_map
from ldm.loss import diffusion_loss
from ldm.networks.dit import DiT
from ldm.networks.unet import UNet
from ldm.parameterization import PARAMETERIZATIONS, Preconditioned, target
from ldm.process import DDPM, log_variance, respaced
from ldm.samplers import dpmpp_2m
from ldm.times import linear

EVERY = (*PARAMETERIZATIONS, "previous", "velocity", Preconditioned(0.5))
PAIRS = [(process, name) for process in PROCESSES for name in EVERY if not impossible(PROCESSES[process], name)]


class Says(nn.Module):
    """Answers with what it is given, and keeps what it was asked."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def forward(self, x, time, cond):
        self.x, self.time, self.cond = x, time, cond
        return x if self.answer is None else self.answer


@pytest.mark.parametrize(("name", "parameterization"), PAIRS)
def test_a_network_that_is_right_gives_back_data_and_noise(name, parameterization):
    process, draws = PROCESSES[name], torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(5, 2, 4, 4, generator=draws) for _ in range(2))
    t = (process.t_min + torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]) * (process.t_max - process.t_min)).float()
    alpha, sigma, *pair = linear_map(process, parameterization, t.double())
    p, q = (c.view(-1, 1, 1, 1) for c in pair)
    denoiser = Denoiser(Says(target(x0, eps, p, q).float()), process, parameterization)
    x_t = process.add_noise(x0, eps, t)
    found = denoiser(x_t, t, Cond())
    # rounding of x_t and F (1e-7 of their size) passes through the inverse of the 2 x 2 system
    p, q = p.flatten(), q.flatten()
    loss = (alpha.abs() + sigma + p.abs() + q.abs()) * (1 + sigma) / (alpha * q - sigma * p).abs()
    for ours, known in ((found.x0, x0), (found.eps, eps)):
        worst = (ours - known).abs().amax((1, 2, 3)).double()
        assert (worst < 1e-5 + 5e-7 * loss).all(), (worst, loss)
    assert found.x0.dtype is torch.float32 and found.var is None


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_at_every_time_but_the_ends_errors_are_small(parameterization):
    process, draws = PROCESSES["flow"], torch.Generator().manual_seed(1)
    if parameterization == "noise":
        process = PROCESSES["scaled_linear"]
    x0, eps = (torch.randn(3, 2, 4, 4, generator=draws) for _ in range(2))
    t = torch.tensor([0.2, 0.5, 0.8]) * process.t_max
    p, q = (c.view(-1, 1, 1, 1) for c in PARAMETERIZATIONS[parameterization](*process.coefficients(t)))
    found = Denoiser(Says(target(x0, eps, p, q)), process, parameterization)(process.add_noise(x0, eps, t), t, Cond())
    assert torch.allclose(found.x0, x0, atol=1e-5) and torch.allclose(found.eps, eps, atol=1e-5)


@pytest.mark.parametrize("name", ENDLESS)
def test_noise_cannot_name_data_where_there_is_none(name):
    process = PROCESSES[name]
    with pytest.raises(ValueError, match="'noise' cannot name x0 at t = .*alpha = 0.*take 'v' or 'flow'"):
        Denoiser(Says(), process, "noise")
    for parameterization in ("data", "v", "flow"):
        assert impossible(process, parameterization) == []
        t = torch.full((2,), process.t_max)
        found = Denoiser(Says(torch.ones(2, 1, 2, 2)), process, parameterization)(torch.randn(2, 1, 2, 2), t, Cond())
        assert found.x0.isfinite().all() and found.eps.isfinite().all()


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="no parameterization 'speed'; there are noise, data, v, flow, edm, previous, velocity"):
        Denoiser(Says(), PROCESSES["flow"], "speed")
    with pytest.raises(ValueError, match="no variance 'small'; there are fixed, learned, learned_range"):
        Denoiser(Says(), PROCESSES["flow"], variance="small")


def test_which_pairs_are_refused():
    refused = {(process, name) for process in PROCESSES for name in EVERY if impossible(PROCESSES[process], name)}
    continuous = {process for process in PROCESSES if PROCESSES[process].t_data >= 0}
    assert refused == {(process, "noise") for process in ENDLESS} | {(process, "previous") for process in continuous}
    with pytest.raises(ValueError, match="'previous' is the mean of the step before, and VP has no steps"):
        Denoiser(Says(), PROCESSES["vp"], "previous")


def test_a_function_of_ones_own():
    """F = x_t + eps would say nothing where alpha = 0."""
    def own(alpha, sigma):
        return alpha, sigma + 1

    assert impossible(PROCESSES["linear"], own) == []
    assert "cannot name x0 at t = 1" in impossible(PROCESSES["flow"], own)[0]


def test_edm_scales_the_input_and_not_the_condition():
    network, process = Says(), PROCESSES["edm"]
    x, spatial, t = torch.randn(2, 4, 3, 3), torch.randn(2, 1, 3, 3), torch.tensor([0.5, 10.0])
    Denoiser(network, process, Preconditioned(0.5)).raw(x, t, Cond(spatial=spatial))
    assert torch.allclose(network.x[:, :4], x / torch.hypot(t, torch.tensor(0.5)).view(-1, 1, 1, 1))
    assert torch.equal(network.x[:, 4:], spatial)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_second_half_of_the_channels_is_the_variance(variance):
    process, t = DDPM("linear"), torch.tensor([0.0, 400.0])
    answer, x_t = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    denoiser = Denoiser(Says(answer), process, "noise", variance)
    found, plain = denoiser(x_t, t, Cond()), Denoiser(Says(answer[:, :3]), process, "noise")(x_t, t, Cond())
    assert torch.equal(found.x0, plain.x0) and torch.equal(found.eps, plain.eps)
    assert torch.equal(found.var, answer[:, 3:]) and torch.equal(denoiser.raw(x_t, t, Cond()), answer)
    step = process.posterior(t.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1) - 1)
    assert log_variance(step, found.var, variance, process.posterior(1, 0).variance).shape == x_t.shape


@pytest.mark.parametrize(("variance", "channels", "expected"), [("fixed", 6, 3), ("learned", 4, 6)])
def test_a_network_with_other_channels_is_refused(variance, channels, expected):
    denoiser = Denoiser(Says(torch.zeros(1, channels, 2, 2)), PROCESSES["vp"], "v", variance)
    with pytest.raises(ValueError, match=f"with variance '{variance}' it has to have {expected} output channels"):
        denoiser(torch.zeros(1, 3, 2, 2), torch.tensor([0.5]), Cond())


def test_a_respaced_process_tells_the_times_of_the_whole_one():
    network, x = Says(torch.zeros(2, 1, 2, 2)), torch.randn(2, 1, 2, 2)
    whole, some = DDPM(), respaced(DDPM(), [0, 10, 500, 999])
    found = Denoiser(network, some, "noise")(x, torch.tensor([1, 2]), Cond())
    assert network.time.tolist() == [10, 500]
    assert torch.equal(found.x0, Denoiser(network, whole, "noise")(x, torch.tensor([10, 500]), Cond()).x0)


def test_spatial_conditions_follow_the_channels_of_x():
    network = Says()
    x, spatial = torch.randn(2, 4, 3, 3), torch.randn(2, 1, 3, 3, dtype=torch.float64)
    out = Denoiser(network, PROCESSES["flow"]).raw(x, torch.tensor([0.1, 0.2]), Cond(spatial=spatial))
    assert out.shape == (2, 5, 3, 3) and out.dtype is torch.float32
    assert torch.equal(network.x[:, :4], x) and torch.equal(network.x[:, 4:], spatial.float())


def test_the_network_is_told_the_process_time_and_the_condition():
    network, process, cond = Says(), PROCESSES["edm"], Cond(vector=torch.ones(2, 3))
    t = torch.tensor([0.5, 3.0])
    bind(Denoiser(network, process), cond)(torch.randn(2, 1, 2, 2), t)
    assert torch.equal(network.time, process.time(t)) and network.cond is cond


def test_half_precision_answers_become_fp32():
    found = Denoiser(Says(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)), PROCESSES["flow"])(
        torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.tensor([0.5]), Cond())  # fmt: skip
    assert found.x0.dtype is found.eps.dtype is torch.float32


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("latents", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_weights_and_latents_of_any_types_go_together(kind, weights, latents):
    """As in fp64 up to the digits of the coarser type, for predictions, walks and losses; the text may be of a third type."""
    torch.manual_seed(0)
    network = {"unet": lambda: UNet(3, 2, context_dim=6, model_channels=32, channel_mult=[1], num_res_blocks=1, transformer_depth=[1]),
               "dit": lambda: DiT(3, 2, context_dim=6, width=32, depth=1, heads=2)}[kind]().eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    process, t = PROCESSES["flow"], torch.tensor([0.4])
    x, noise = torch.randn(2, 1, 2, 2, 6, dtype=torch.float64)
    cond = Cond(torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool), spatial=torch.randn(1, 1, 2, 6))

    def found(denoiser, x):
        with torch.no_grad():
            yield denoiser(x, t, cond).x0
            yield dpmpp_2m(bind(denoiser, cond), x, linear(process, 3), process)
            yield diffusion_loss(denoiser, x, cond, t, noise.to(x))

    exact = list(found(Denoiser(network.double(), process), x))
    for each, truth in zip(found(Denoiser(network.to(weights), process), x.to(latents)), exact, strict=True):
        assert (each.double() - truth).abs().max() < (1e-4 if {weights, latents} <= {torch.float32, torch.float64} else 0.1)
