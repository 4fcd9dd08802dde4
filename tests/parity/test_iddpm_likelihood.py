"""Bits per dimension, against numbers of Improved DDPM's code (guided-diffusion, ``calc_bpd_loop``) and the prior's of CompVis'
latent-diffusion. Improved DDPM's traps: columns run from
the noisiest step down; the last step's variance is that of the step before; the decoder's CDF is an approximation; x0 is
clamped in some cases. Both count in fp32, in which the prior's term, a small sum of numbers next to 1, has few digits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.cond import Cond
from ldm.denoiser import Denoiser, bind
from ldm.likelihood import bits_per_dim, clamped, discretized_log_likelihood, prior_kl, variance_before, variational_bound
from ldm.process import DDPM, respaced
from ldm.times import linear

FOLDER = Path(__file__).parents[1] / "data" / "parity"
DATA = load_file(FOLDER / "iddpm_core" / "io.safetensors")
CASES = {  # process, channels of the network's output, variance, whether x0 is clamped
    "a": (lambda: respaced(DDPM("linear"), "25"), 6, "learned_range", True),
    "b": (lambda: respaced(DDPM("cosine"), "25"), 3, "large", False),
    "c": (lambda: DDPM("linear"), 3, "small", True),
}


class Toy(torch.nn.Module):
    """Two convolutions, told t / 1000."""

    def __init__(self, channels: int):
        super().__init__()
        self.weights = {name: DATA[f"in.toy{channels}.{name}"] for name in ("w1", "b1", "wt", "w2", "b2")}

    def forward(self, x, t, cond):
        w = self.weights
        told = (t / 1000)[:, None, None, None] * w["wt"][None, :, None, None]
        h = torch.tanh(torch.nn.functional.conv2d(x, w["w1"], w["b1"], padding=1) + told)
        return torch.nn.functional.conv2d(h, w["w2"], w["b2"], padding=1)


def tanh_decoder(x, mean, log_std):
    return discretized_log_likelihood(x, mean, log_std, cdf="tanh")


@pytest.mark.parametrize("case", CASES)
def test_bits_per_dimension(case):
    make, channels, variance, clamp = CASES[case]
    process, x0 = make(), DATA["in.x0_img"]
    steps = len(process.alpha_bar)
    denoiser = Denoiser(Toy(channels), process, "noise", "fixed" if variance in ("small", "large") else variance)
    denoise, times = bind(denoiser, Cond()), linear(process, steps)
    noise = DATA[f"in.noise{steps}"]
    bound = variational_bound(clamped(denoise) if clamp else denoise, x0, times, process, variance=variance,
                              decoder=tanh_decoder, floor=variance_before(process, times), noise=lambda k, shape: noise[k])
    dims = x0[0].numel()
    alpha, sigma = process.exact(times[:-1])
    found = {"vb": bits_per_dim(bound.terms, dims), "prior_bpd": bits_per_dim(bound.prior, dims),
             "total_bpd": bits_per_dim(bound.total, dims), "xstart_mse": bound.error,
             "mse": bound.error * (alpha / sigma).square()}  # fmt: skip
    for name, value in found.items():
        if (key := f"out.bpd.{case}.{name}") in DATA:
            scale = DATA[key].double().abs().max()
            rounded = 1e-7 if name == "prior_bpd" else 0
            assert (value - DATA[key].double()).abs().max() <= 1e-5 * scale + rounded, name


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("out.prior_bpd.")])
def test_prior(key):
    schedule, *respacing = key.removeprefix("out.prior_bpd.").split(".")
    process, x0 = DDPM(schedule), DATA["in.x_start"]
    found = bits_per_dim(prior_kl(x0, respaced(process, *respacing) if respacing else process), x0[0].numel())
    assert (found - DATA[key].double()).abs().max() <= 1e-7  # a small sum of numbers next to 1, theirs in fp32


def test_prior_of_compvis():
    data = load_file(FOLDER / "uncond_vq" / "prior.safetensors")
    x0 = data["in.x_start"]
    found = bits_per_dim(prior_kl(x0, DDPM("scaled_linear", start=0.0015, end=0.0195)), x0[0].numel())
    assert (found - data["out.prior_bpd"].double()).abs().max() <= 1e-7
