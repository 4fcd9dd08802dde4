"""Against numbers computed with guided-diffusion (ADM): its UNets in both attention orders, upsampler, classifiers, and
sampling that a classifier guides, with weights that are read from its files.

The weights of three of the five models are not kept here, for their size; LDM_PARITY names a folder whose adm_unet has them.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.bundle import Bundle
from ldm.cond import Cond
from ldm.denoiser import bind
from ldm.guidance import classifier, classifier_mean, clip, gradient
from ldm.interop import adm
from ldm.networks.classifier import log_p
from ldm.networks.layers import timestep_embedding
from ldm.process import log_variance
from ldm.samplers import ddim, ddpm

HERE = Path(__file__).parents[1] / "data" / "parity" / "adm_unet"
ARGUMENTS, IO = json.loads((HERE / "args.json").read_text()), load_file(HERE / "io.safetensors")
X, T, Y = IO["in.x"], IO["in.t"], IO["in.y"]
NEW = pytest.mark.parametrize("new", [False, True], ids=["heads first", "q k v first"])


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def state(name):
    path = HERE / f"{name}.pt"
    if not path.exists():
        path = Path(os.environ.get("LDM_PARITY", HERE.parent)) / "adm_unet" / path.name
    if not path.exists():
        pytest.skip(f"{path.name} is not kept here: LDM_PARITY names no folder that has it")
    return torch.load(path, weights_only=True)


def bundle(name, **changes):
    about, weights = adm.read(state(name), ARGUMENTS[name] | changes, name)
    return Bundle.from_config(about["config"], about=about).assign(weights).requires_grad_(False)


def noisy_classifier(name, **changes):
    return adm.read_classifier(state(name), ARGUMENTS[name] | changes, name).requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    return bundle("unet")


@NEW
def test_unet(new):
    found = bundle("unet", use_new_attention_order=new)
    close(found.denoiser.raw(X, T, found.conditioner({"class": Y})), IO[f"out.unet.new_attention_{new}"])


@NEW
def test_unet_of_plain_blocks_without_classes(new):
    found = bundle("unet_plain", use_new_attention_order=new)
    assert found.conditioner is None
    close(found.denoiser.raw(X, T, Cond()), IO[f"out.unet_plain.new_attention_{new}"])


def test_times_between_steps(unet):
    """The recorded times are 0.5 and 233.75."""
    out = unet.denoiser.raw(X, torch.tensor([0.5, 233.75]), unet.conditioner({"class": Y}))
    close(out, IO["out.unet.t_fractional"])


@pytest.mark.parametrize("width", [32, 33])
def test_embedding_of_time(width):
    close(timestep_embedding(torch.tensor([0.0, 0.5, 999.0]), width), IO[f"out.timestep_embedding_{width}"])


def test_gradient_and_every_block(unet):
    network, seen = unet.denoiser.network, []
    hooks = [part.register_forward_hook(lambda _, given, out: seen.append(out))
             for part in (network.conv_in, *network.down, network.middle[-1], *network.up)]  # fmt: skip
    x = X.clone().requires_grad_()
    out = unet.denoiser.raw(x, T, unet.conditioner({"class": Y}))
    for hook in hooks:
        hook.remove()
    assert len(seen) == sum(name.startswith("out.unet.block") for name in IO)
    for i, h in enumerate(seen):
        found = torch.stack([h.flatten(1).mean(1), h.flatten(1).std(1)])
        close(found, IO[f"out.unet.block{i:02}.mean_std"])
    close(torch.autograd.grad((out * IO["in.grad_out"]).sum(), x)[0], IO["out.unet.input_grad"])


def test_upsampler():
    found = bundle("superres")
    cond = found.conditioner({"low_res": IO["in.low_res"], "latent_size": (16, 16)})
    close(cond.spatial, IO["out.superres.upsampled"])
    close(found.denoiser.raw(X, T, cond), IO["out.superres.out"])


@pytest.mark.parametrize("name", ["classifier_attention", "classifier_adaptive"])
def test_classifiers_and_their_gradients(name):
    found = noisy_classifier(name)
    close(found(X, T), IO[f"out.{name}.logits"])
    close(IO["in.classifier_scale"] * gradient(log_p(found, Y), X, T), IO[f"out.{name}.cond_fn"])


def test_classifier_in_the_other_order():
    found = noisy_classifier("classifier_attention", use_new_attention_order=True)
    close(found(X, T), IO["out.classifier_attention.logits_new_attention"])


def guided(unet, spacing):
    """-> denoise with clipped x0, log p, scale, process, times."""
    process = unet.denoiser.process
    denoise = clip(bind(unet.denoiser, unet.conditioner({"class": Y})), process)
    times = torch.tensor([*(round(k * 999 / (spacing - 1)) for k in reversed(range(spacing))), -1.0]).double()
    return denoise, log_p(noisy_classifier("classifier_attention"), Y), float(IO["in.classifier_scale"]), process, times


def test_both_forms_of_guidance(unet):
    """25 of the 1000 steps, at the 0th and the 17th."""
    expected = {name.removeprefix("out.guide25."): value for name, value in IO.items() if name.startswith("out.guide25.")}
    denoise, says, scale, process, times = guided(unet, 25)
    index = 24 - IO["in.t_index"]
    t = times[index]
    posterior = process.posterior(t.view(-1, 1, 1, 1), times[index + 1].view(-1, 1, 1, 1))
    floor = process.posterior(times[23], times[24]).variance  # of the step before the last stands for 0

    def mean(guess):
        return posterior.x0 * guess.x0 + posterior.xt * X
    guess = denoise(X, t.float())
    close(guess.x0, expected["pmv.pred_xstart"], 1e-4)  # an error of eps times sigma / alpha, 14 at the later one
    close(mean(guess), expected["pmv.mean"])
    log = log_variance(posterior, guess.var, "learned_range", floor)
    close(log, expected["pmv.log_variance"])
    close(log.exp(), expected["pmv.variance"])
    by_score = classifier(denoise, says, scale, process)(X, t.float())
    close(by_score.x0, expected["condition_score.pred_xstart"], 1e-4)
    close(mean(by_score), expected["condition_score.mean"])
    by_mean = classifier_mean(denoise, says, scale, process, times, "learned_range", floor)(X, t.float())
    close(mean(by_mean), expected["condition_mean"])


def walked(sampler, denoise, times, process):
    seen: list[torch.Tensor] = []
    out = sampler(denoise, IO["in.x_T"], times, process, callback=lambda step, t, x, guess: seen.append(x))
    return torch.stack([*seen[1:], out])


def test_loops_of_five_steps(unet):
    denoise, says, scale, process, times = guided(unet, 5)
    moved = classifier_mean(denoise, says, scale, process, times, "learned_range", process.posterior(times[3], times[4]).variance)

    def ancestral(denoise, *given, **more):
        return ddpm(denoise, *given, **more, variance="learned_range", noise=lambda key, shape: IO["in.noise"][key])
    close(walked(ancestral, moved, times, process), IO["out.guided_loop5.p"], 1e-4)
    close(walked(ddim, classifier(denoise, says, scale, process), times, process), IO["out.guided_loop5.ddim"], 1e-4)
