"""Super-resolution: the size, the noise level, and windows."""

import pytest
import torch
from exact import exact, pictures
from torch import nn

from autoencoder.base import Identity
from ldm import tasks
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.conditioners.low_resolution import LowResolution
from ldm.denoiser import Denoiser
from ldm.process import DDPM, RectifiedFlow
from ldm.windows import Windows


class Blocks(Identity):
    """Latents are the means of 4 x 4 pixels."""

    def __init__(self):
        super().__init__(3)
        self.factor = 4

    def moments(self, x):
        return torch.nn.functional.avg_pool2d(x, 4), None

    def decode_raw(self, z):
        return z.repeat_interleave(4, 2).repeat_interleave(4, 3)


class Copy(nn.Module):
    """x0 is what stands beside x_t."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x, time, cond):
        self.seen.append(tuple(x.shape[2:]))
        return self.weight * x[:, 3:6]


def upscaler(autoencoder=None, **params):
    model = Bundle(autoencoder or Blocks(), LowResolution(**params), Denoiser(Copy(), RectifiedFlow(), "data"),
                   sampling={"size": [32, 32], "sampler": "euler", "steps": 2, "guidance": 1.0})  # fmt: skip
    return model.eval()


def test_the_factor_is_the_autoencoders():
    model, x = upscaler(), pictures(2, 6, 10)
    found = tasks.upscale(model, x, seed=3)
    assert tasks.enlargement(model) == 4 and found.shape == (2, 3, 24, 40)
    torch.testing.assert_close(found, model.autoencoder.decode_raw(x), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="factor: 2; this model enlarges 4 times"):
        tasks.upscale(model, x, factor=2)


def test_of_pictures_that_are_resized_the_data_tells_it():
    model = upscaler(Identity(3), resize="bilinear")
    with pytest.raises(UserError, match="does not say by how much"):
        tasks.upscale(model, pictures(1, 8, 8))
    assert tasks.upscale(model, pictures(1, 8, 8), factor=3).shape == (1, 3, 24, 24)
    small = {"target": "ldm.data.degrade.AddLowResolution", "params": {"factor": 2, "dataset": {}}}
    model.config = {"data": {"train": {"target": "ldm.data.masks.AddMask", "params": {"dataset": small}}}}
    assert tasks.upscale(model, pictures(1, 8, 8)).shape == (1, 3, 16, 16)


def test_the_noise_level_reaches_the_condition():
    model, x = upscaler(noise=DDPM()), pictures(1, 8, 8)
    plain, noisy, own = (tasks.upscale(model, x, noise_level=level, seed=4) for level in (0, 300, None))
    process, low = model.conditioner.noise.process, torch.nn.functional.avg_pool2d(noisy, 4)
    alpha, sigma = process.exact(torch.tensor(300.0).double())
    eps = (low - float(alpha) * x) / float(sigma)
    assert torch.equal(plain, own) and (plain - noisy).abs().mean() > 0.05 and eps.abs().max() < 5
    again = tasks.upscale(model, x.repeat(2, 1, 1, 1), noise_level=300, seed=3)
    torch.testing.assert_close(again[1:], noisy)  # by its own seed
    with pytest.raises(UserError, match="trained on small pictures without noise"):
        tasks.upscale(upscaler(), x, noise_level=3)
    with pytest.raises(UserError, match="has no LowResolution condition"):
        tasks.upscale(exact(), x)


def test_by_windows_a_local_network_gives_the_same():
    model, x = upscaler(), pictures(2, 20, 28)
    whole = tasks.upscale(model, x, seed=1)
    model.denoiser.network.seen.clear()
    found = tasks.upscale(model, x, seed=1, window=32)  # 8 latent pixels
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert set(model.denoiser.network.seen) == {(8, 8)} and len(model.denoiser.network.seen) > 12
    with pytest.raises(UserError, match="nearest: 28 x 28 or 32 x 32"):
        tasks.upscale(model, x, window=30)


def test_windows_and_all_kinds_of_networks(bundle):
    """One window is the denoiser itself; several see their own part, with the estimate of before, and the variance."""
    x, t = torch.randn(2, 4, 8, 12), torch.full((2,), 0.5)
    with torch.no_grad():
        cond = bundle.conditioner({"caption": ["red", "blue"]})
        one, plain = Windows(bundle.denoiser, 12)(x, t, cond), bundle.denoiser(x, t, cond)
        several = Windows(bundle.denoiser, 8)(x, t, cond)
    torch.testing.assert_close(one.x0, plain.x0, atol=1e-6, rtol=0)
    assert several.x0.shape == plain.x0.shape and several.var is None and (several.x0 - plain.x0).abs().max() > 1e-3
    torch.testing.assert_close(0.5 * several.x0 + 0.5 * several.eps, x, atol=1e-5, rtol=0)

    class Told(nn.Module):
        def forward(self, x, time, cond):
            return torch.cat([x[:, :3] + x[:, 3:6], x[:, 3:6]], dim=1)

    denoiser = Denoiser(Told(), RectifiedFlow(), "data", variance="learned", self_conditioning=True)
    x, estimate = torch.randn(1, 3, 8, 20), torch.randn(1, 3, 8, 20)
    cond = bundle.conditioner.null(1)
    found, plain = (each(x, t[:1], cond, estimate) for each in (Windows(denoiser, 8), denoiser))
    for name in ("x0", "eps", "var"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), atol=1e-5, rtol=0)
