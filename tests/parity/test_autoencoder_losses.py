"""Losses of latent-diffusion's two autoencoders, computed with its own code: before, at and after the critic's start.

What an output differs by when the reference itself runs with other convolution kernels is in its notes; where that is more
than 1e-5 of the tensor's size, it is the tolerance here, and named.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from autoencoder.critics import Adversarial, PatchCritic
from autoencoder.losses import ReconstructionLoss
from ldm.load import load

DATA = Path(__file__).parents[1] / "data/parity"
STEPS = (10, 50, 1000)  # the critic starts at 50


def pooled(x, y):
    """The reference's stand-in for LPIPS."""
    return (F.avg_pool2d(x, 2) - F.avg_pool2d(y, 2)).square().mean(dim=(1, 2, 3), keepdim=True)


class Case:
    """An autoencoder, the loss and the critic that it was trained with, and its reference numbers."""

    def __init__(self, name):
        folder = DATA / name
        self.io = load_file(folder / "io.safetensors")
        path = next(path for path in (folder / "model.ckpt", folder / "model.safetensors") if path.is_file())
        self.autoencoder = load(path, folder / "config.yaml").autoencoder
        if name == "ae_kl_f4":
            self.loss = ReconstructionLoss("l1", perceptual=1.0, perceptual_distance=pooled, kl=1e-3, reduction="sum", logvar=0.37)
            critic = Adversarial(PatchCritic(3, width=64, layers=1), start=50, ramp=0, lead=0, weight=0.5)
        else:
            self.loss = ReconstructionLoss("l1", perceptual=1.0, perceptual_distance=pooled, codebook=1.0)
            critic = Adversarial(PatchCritic(3, width=8, layers=3), start=50, ramp=0, lead=0, weight=0.75)
        critic.plan(2000)
        weights = load_file(folder / "loss.safetensors")
        self.critic, prefix = critic, "loss.discriminator."
        self.state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if name == "ae_kl_f4":
            assert weights["loss.logvar"].item() == pytest.approx(0.37)
        self.x = self.io["in.image"]

    def ready(self, mode):
        """The critic as it was saved; a fresh reconstruction with its terms."""
        self.critic.net.load_state_dict(self.state)
        self.critic.train(mode == "train")
        self.autoencoder.eval()
        self.x_hat, bottled = self.autoencoder(self.x, self.io.get("in.posterior_noise"))
        return self.loss(self.x, self.x_hat, bottled.losses, batch=10**9)

    def judged(self, mode, step):
        terms = self.ready(mode)
        return terms | self.critic.judge(self.x_hat, terms["nll"], self.autoencoder.last_layer, step)

    def learned(self, mode, step):
        self.ready(mode)
        return self.critic.learn(self.x, self.x_hat, step)

    def close(self, found, name, tolerance=1e-5):
        expected = self.io[f"out.{name}"]
        error = (found.detach() - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), 1e-12), f"{name}: off by {error}"


@pytest.fixture(scope="module")
def cases():
    return {name: Case(name) for name in ("ae_kl_f4", "ae_vq_f4")}


EVERY = pytest.mark.parametrize(("name", "mode", "step"), [
    (name, mode, step) for name in ("ae_kl_f4", "ae_vq_f4") for mode in ("train", "eval") for step in STEPS])


@EVERY
def test_what_the_autoencoder_is_told(cases, name, mode, step):
    case = cases[name]
    terms, log = case.judged(mode, step), f"log.{mode}.step{step}.opt0"
    total = terms["loss"] + terms["adversarial"]
    case.close(total, f"loss.{mode}.step{step}.opt0")
    case.close(total, f"{log}.total_loss")
    case.close(terms["reconstruction"], f"{log}.rec_loss")
    case.close(terms["nll"], f"{log}.nll_loss")
    if name == "ae_kl_f4":
        case.close(terms["kl"], f"{log}.kl_loss")
        case.close(terms["logvar"], f"{log}.logvar")
    else:
        case.close(terms["codebook"], f"{log}.quant_loss")
        case.close(terms["perceptual"], f"{log}.p_loss")
    if step < 50:  # not measured before it counts
        assert terms["adversarial"] == 0 and terms["adversarial_weight"] == 0
    else:
        case.close(terms["generator"], f"{log}.g_loss")
        case.close(terms["adversarial_weight"], f"{log}.d_weight", 2e-5)  # the reference's own noise: 0.022 of 2,290


@EVERY
def test_what_the_critic_learns_from(cases, name, mode, step):
    case = cases[name]
    terms = case.learned(mode, step)
    case.close(terms["critic"], f"loss.{mode}.step{step}.opt1")
    if step >= 50:
        case.close(terms["critic_real"], f"log.{mode}.step{step}.opt1.logits_real")
        case.close(terms["critic_fake"], f"log.{mode}.step{step}.opt1.logits_fake")


# of the reference's own float noise: 0.24 of 1,510 in the gradient of ae_kl_f4's last layer (adaptive weight at its limit),
# 2.8e-5 of 0.0168 in that of its critic's first layer
@pytest.mark.parametrize(("name", "last", "first"), [("ae_kl_f4", 2e-4, 2e-3), ("ae_vq_f4", 1e-5, 1e-5)])
def test_gradients(cases, name, last, first):
    case, prefix = cases[name], "grad.train.step1000"
    terms = case.judged("train", 1000)
    gradient, = torch.autograd.grad(terms["loss"] + terms["adversarial"], case.autoencoder.last_layer)
    case.close(gradient, f"{prefix}.opt0.decoder.conv_out.weight", last)
    weights = [case.critic.net.main[n].weight for n in (0, 2)]
    gradients = torch.autograd.grad(case.learned("train", 1000)["critic"], weights)
    for n, gradient in zip((0, 2), gradients, strict=True):
        case.close(gradient, f"{prefix}.opt1.loss.discriminator.main.{n}.weight", first)


@pytest.mark.parametrize("name", ["ae_kl_f4", "ae_vq_f4"])
def test_running_statistics_of_the_critic(cases, name):
    case = cases[name]
    for part, run in (("opt0", case.judged), ("opt1", case.learned)):
        run("train", 1000)
        for kind in ("mean", "var"):
            case.close(getattr(case.critic.net.main[3], f"running_{kind}"),
                       f"bn_after.train.step1000.{part}.discriminator.main.3.running_{kind}")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["ae_kl_f4", "ae_vq_f4"])
def test_logits(cases, name, mode):
    case = cases[name]
    case.critic.net.load_state_dict(case.state)
    case.close(case.critic.net.train(mode == "train")(case.x), f"disc_logits_{mode}")
