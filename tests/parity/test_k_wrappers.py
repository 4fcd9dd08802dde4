"""k-diffusion's wrappers of networks, which are processes here: CompVisDenoiser and its v form are DDPM's table with log sigma
linear between the steps, VDenoiser is the cosine process. They are asked at a sigma, ours at the time that has it."""

import pytest
import torch
from test_k_samplers import REFERENCE, Toy, close_to, mixture, stable_diffusion
from torch import Tensor

from ldm.cond import Cond
from ldm.denoiser import Denoiser
from ldm.loss import diffusion_loss
from ldm.process import Cosine, Process

SIGMAS = torch.tensor([0.7, 9.0])


def at(process: Process, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The times (B,), and alpha (B,1,1,1) there."""
    t = process.when(-sigma.double().log())
    return t, process.exact(t)[0].float().view(-1, 1, 1, 1)


@pytest.mark.parametrize(("key", "parameterization"), [("compvis.q0", "noise"), ("compvis.q1", "noise"), ("compvis_v.q0", "v"),
                                                       ("compvis_v.q1", "v")])  # fmt: skip
def test_wrappers_of_stable_diffusion(key, parameterization):
    process = stable_diffusion(key.endswith("q1"))
    denoiser = Denoiser(Toy(), process, parameterization)
    t, alpha = at(process, SIGMAS)
    assert close_to(denoiser(alpha * 3 * REFERENCE["in.net.x0"], t.float(), Cond()).x0, REFERENCE[f"out.{key}.denoised"])
    if f"out.{key}.loss" in REFERENCE:
        t, _ = at(process, REFERENCE["in.net.sigma_loss"])
        loss = diffusion_loss(denoiser, REFERENCE["in.net.x0"], Cond(), t.float(), REFERENCE["in.net.eps"])
        assert close_to(loss, REFERENCE[f"out.{key}.loss"])


def test_times_of_a_sigma():
    """Theirs is clamped to the training steps; ours goes on to the data, t = -1."""
    process, expected = stable_diffusion(False), REFERENCE["out.compvis.q0.sigma_to_t"]
    found = process.when(-REFERENCE["in.q.sigma"].double().log())
    assert found[0] < 0 and torch.allclose(found.clamp(min=0).float(), expected, rtol=1e-5, atol=1e-4)  # theirs is fp32
    found = Cosine().when(-REFERENCE["in.q.sigma"].double().log())
    assert torch.allclose(found.float(), REFERENCE["out.vdenoiser.sigma_to_t"], rtol=1e-5)


def test_wrapper_of_v():
    """Told t in [0, 1], where ours is told t on DDPM's scale."""
    class Told(Toy):
        def forward(self, x, time, cond):
            return super().forward(x, time / 1000, cond)

    process = Cosine()
    t, alpha = at(process, SIGMAS)
    found = Denoiser(Told(), process, "v")(alpha * 3 * REFERENCE["in.net.x0"], t.float(), Cond()).x0
    assert close_to(found, REFERENCE["out.vdenoiser.denoised"])
    times = torch.tensor([0.0, 0.1, 0.5, 0.95]).double()
    alpha, sigma = process.exact(times)
    assert torch.allclose((sigma / alpha).float(), REFERENCE["out.vdenoiser.t_to_sigma"], rtol=1e-5)


def test_the_mixture():
    """Where it is recorded, the best denoiser of the tests is theirs."""
    for key in [key for key in REFERENCE if key.startswith("out.gm.denoised")]:
        x = REFERENCE["in.ll.x"]
        sigma = torch.full((len(x),), float(key.rpartition("denoised.")[2])).double()
        assert torch.allclose(mixture(x, sigma).x0, REFERENCE[key], rtol=1e-9)
