"""Self-conditioning: what the network is shown in training and in sampling."""

import copy

import pytest
import torch
from oracles import PROCESSES
from test_diffusion_module import SEED, Free, batch, fit, module
from torch import nn

from ldm.bundle import Bundle
from ldm.common.random import normal, uniform
from ldm.cond import Cond
from ldm.denoiser import Denoiser, Remembering, bind
from ldm.loss import diffusion_loss
from ldm.samplers import ddim
from ldm.times import linear


class Shown(nn.Module):
    """Keeps what it is shown; says a mix of x_t and the estimate."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, time, cond):
        x_t, *_, estimate = x.split(2, dim=1)
        self.seen.append(estimate)
        return self.weight * x_t - 0.25 * estimate


def test_half_of_the_samples_see_a_first_answer():
    network, process = Shown(), PROCESSES["flow"]
    denoiser = Denoiser(network, process, "flow", self_conditioning=True)
    z, noise = (normal((2, 3, 3), 1, name, range(4)) for name in "zn")
    t, again = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([True, False, False, True])
    loss = diffusion_loss(denoiser, z, Cond(), t, noise, again=again)
    first, second = network.seen
    x_t = process.add_noise(z, noise, t)
    s = t.view(-1, 1, 1, 1)
    x0 = torch.where(again.view(-1, 1, 1, 1), x_t - s * 0.5 * x_t, torch.zeros_like(x_t))  # of a flow: x_t - t F
    assert not first.any() and torch.allclose(second, x0)
    error = 0.5 * x_t - 0.25 * x0 - (noise - z)
    assert torch.allclose(loss, error.square().flatten(1).mean(1), rtol=1e-5)
    loss.sum().backward()  # no gradient through the first answer
    assert network.weight.grad.item() == pytest.approx((2 * error * x_t).flatten(1).mean(1).sum().item(), rel=1e-4)


def test_gradients_survive_mixed_precision():
    """Casts of weights that autocast keeps from a pass without gradients would cut them off in the next."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 2, 1)

        def forward(self, x, time, cond):
            return self.conv(x)

    network = Net()
    denoiser = Denoiser(network, PROCESSES["flow"], "flow", self_conditioning=True)
    z, noise = (normal((2, 3, 3), 1, name, range(4)) for name in "zn")
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion_loss(denoiser, z, Cond(), torch.full((4,), 0.5), noise, again=torch.ones(4, dtype=torch.bool))
    loss.sum().backward()
    assert network.conv.weight.grad.abs().sum() > 0 and network.conv.bias.grad.abs().sum() > 0


def test_an_estimate_comes_after_spatial_conditions():
    network = Shown()
    denoiser = Denoiser(network, PROCESSES["flow"], self_conditioning=True)
    spatial = Cond(spatial=torch.ones(1, 2, 3, 3))
    denoiser(torch.zeros(1, 2, 3, 3), torch.full((1,), 0.5), spatial)
    assert not network.seen[0].any()
    denoiser(torch.zeros(1, 2, 3, 3), torch.full((1,), 0.5), spatial, torch.full((1, 2, 3, 3), 7.0))
    assert (network.seen[1] == 7).all()


def test_a_walk_remembers_its_last_answer():
    network, process, said = Shown(), PROCESSES["flow"], []
    denoise = bind(Remembering(Denoiser(network, process, "flow", self_conditioning=True)), Cond())
    ddim(denoise, torch.randn(2, 2, 3, 3), linear(process, 4), process, callback=lambda step, t, x, guess: said.append(guess.x0))
    assert len(network.seen) == 4 and not network.seen[0].any()
    assert all(torch.equal(shown, before) for shown, before in zip(network.seen[1:], said, strict=False))
    denoise(torch.randn(3, 2, 3, 3), torch.full((3,), 0.5))  # another batch: nothing is known of it
    assert not network.seen[-1].any()


def test_training_draws_by_position():
    model, positions = module(kind=Free, self_conditioning=True), list(range(8))
    given, again = batch(positions), uniform(SEED, "again", positions) < 0.5
    t, noise = uniform(SEED, "t", positions), normal((3, 8, 8), SEED, "noise", positions)
    expected = diffusion_loss(model.model["denoiser"], given["image"], model.conditioner(given), t, noise, again=again)
    assert 0 < again.sum() < 8 and model.training_step(given, 0).item() == pytest.approx(expected.mean().item(), rel=1e-6)
    fit(module(self_conditioning=True), 2)


def test_such_a_model_is_saved_loaded_and_samples(model_config, tmp_path):
    import ldm

    config = copy.deepcopy(model_config)
    config["model"]["params"]["self_conditioning"] = True
    made = Bundle.from_config(config).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.05)
    made.autoencoder.set_statistics(torch.zeros(4), torch.ones(4), 1)
    assert made.denoiser.network.conv_in.weight.shape[1] == 8
    made.save(tmp_path / "a.safetensors")
    loaded = ldm.load(tmp_path / "a.safetensors")
    one, other = (bundle.generate(["a red circle"], steps=3, seed=1) for bundle in (made, loaded))
    assert torch.equal(one, other)
    loaded.denoiser.self_conditioning = False
    with pytest.raises(RuntimeError, match="channels"):
        loaded.generate(["a red circle"], steps=3, seed=1)
