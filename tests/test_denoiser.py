import pytest
import torch
from oracles import ENDLESS, PROCESSES
from torch import nn

from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind, impossible
from ldm.parameterization import PARAMETERIZATIONS, target

PAIRS = [(process, name) for process in PROCESSES for name in PARAMETERIZATIONS
         if not (name == "noise" and process in ENDLESS)]  # fmt: skip


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
    alpha, sigma = process.exact(t.double())
    p, q = (c.view(-1, 1, 1, 1) for c in PARAMETERIZATIONS[parameterization](alpha, sigma))
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


def test_unknown_parameterizations_are_named():
    with pytest.raises(ValueError, match="no parameterization 'velocity'; there are noise, data, v, flow"):
        Denoiser(Says(), PROCESSES["flow"], "velocity")


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
