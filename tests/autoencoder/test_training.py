"""What may be switched on in stage 1, in training: half precision, a learned logvar, R1, regularisers, a user's own class."""

import logging

import pytest
import torch
from squares import SIDE, Record, Squares, fit, module, on_two_ranks, weights
from tiny_vision import tiny
from torch import nn

from autoencoder.base import Autoencoder, Bottled
from autoencoder.bottlenecks import KL, VQ
from autoencoder.lit import AutoencoderModule
from autoencoder.losses import ReconstructionLoss
from autoencoder.regularisers import Alignment, DecoderNoise, Equivariance, Regulariser
from ldm.common.files import UserError
from ldm.data.loader import make_loader


class Linear(Regulariser):
    """A user's own, with a weight: latents should be a multiple of the pictures' mean."""

    def connect(self, autoencoder):
        self.slope = nn.Parameter(torch.full((autoencoder.channels, 1, 1), 0.5))

    def term(self, x, z, nll):
        term = (z - self.slope * x.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)).square().mean()
        return 0.1 * term, {"linear": term.detach()}


class Own(Autoencoder):
    """A user's class of the least: no bottleneck, no last layer."""

    def __init__(self, channels=3):
        super().__init__(channels, 4, 2)
        self.down, self.up = nn.Conv2d(channels, 8, 2, 2), nn.ConvTranspose2d(4, channels, 2, 2)

    def moments(self, x):
        mean, logvar = self.down(x).chunk(2, dim=1)
        return mean, logvar - 4

    def decode_raw(self, z):
        return self.up(z)


class Signs(Own):
    """With codes of its own making, which nobody counts."""

    def moments(self, x):
        return super().moments(x)[0], None

    def forward(self, x, noise=None):
        z, _ = self.moments(x)
        codes = ((z > 0).long() * torch.tensor([1, 2, 4, 8]).view(4, 1, 1)).sum(dim=1)
        q = z + (z.sign() - z).detach()
        return self.up(q), Bottled(q, {"own": 0.01 * (z.abs() - 1).square().mean()}, codes)


ALL = dict(critic={"norm": "act"}, adversarial={"start": 1, "lead": 1, "r1": 1.0, "r1_every": 2, "kind": "lsgan"},
           loss={"logvar": 0.0, "learn_logvar": True}, ema_decay=0.9)


def regularisers():
    return [Equivariance(preserve=0.4, smallest=12), DecoderNoise(0.3), Linear()]


@pytest.mark.parametrize("bottleneck", [KL(2), VQ(2, codes=32, learn="ema")], ids=["kl", "vq"])
def test_half_precision_trains_with_losses_in_fp32(bottleneck, tmp_path):
    tiny("vit", tmp_path)
    model, record, kinds = module(bottleneck, **ALL, regularisers=[Alignment(str(tmp_path))], lr=5e-3), Record(), set()
    model.autoencoder.register_forward_hook(lambda module, given, out: kinds.add(("picture", out[0].dtype)))
    model.critic.net.register_forward_hook(lambda module, given, out: kinds.add(("logits", out.dtype)))
    model.loss.register_forward_hook(lambda module, given, out: kinds.update(("loss", term.dtype) for term in out.values()))
    before = weights(model)
    fit(model, 20, callbacks=[record], precision="bf16-mixed")
    assert kinds == {("picture", torch.bfloat16), ("logits", torch.bfloat16), ("loss", torch.float32)}
    assert record.steps[-1]["train/pixel"] < 0.8 * record.steps[0]["train/pixel"]
    after = weights(model)
    assert all(value.dtype != torch.bfloat16 and value.isfinite().all() for value in after.values())
    still = [name for name, _ in model.named_parameters() if torch.equal(before[name], after[name])]
    assert still == []  # the critic's among them: autocast keeps no copy of a weight from when it was frozen


def test_a_learned_logvar_and_a_regularisers_weights_are_trained_and_saved(tmp_path):
    model = module(**ALL, regularisers=regularisers(), lr=1e-2)
    trainer = fit(model, 10)
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    extra = {"loss.logvar", "regularisers.2.slope"}
    assert extra <= set(dict(model.named_parameters())) and extra <= set(model.state_dict())
    first = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(model.loss.logvar), id(model.regularisers[2].slope)} <= first
    assert model.loss.logvar.item() < -0.02 and not torch.allclose(model.regularisers[2].slope, torch.tensor(0.5))
    assert not any("loss" in name or "slope" in name for name in model.best.state_dict())


def test_all_of_it_resumed_is_the_same_as_straight_through(tmp_path):
    straight, first, second = (module(**ALL, regularisers=regularisers()) for _ in range(3))
    fit(straight, 6)
    fit(first, 3).save_checkpoint(tmp_path / "a.ckpt")
    fit(second, 6, ckpt_path=tmp_path / "a.ckpt")
    for (name, a), b in zip(straight.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_regularisers_are_in_the_loss_and_in_the_log():
    record, plain = Record(), Record()
    fit(module(regularisers=[Linear()], loss={"pixel": "l2"}), 1, callbacks=[record])
    fit(module(loss={"pixel": "l2"}), 1, callbacks=[plain])
    with_it, without = record.steps[0], plain.steps[0]
    assert with_it["train/loss"] == pytest.approx(without["train/loss"] + 0.1 * with_it["train/linear"], rel=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_pictures_of_any_number_of_channels(channels):
    model, record = module(channels=channels, regularisers=[Equivariance(preserve=0.5, smallest=12)], **ALL, lr=5e-3), Record()
    fit(model, 30, Squares(channels=channels), callbacks=[record])
    assert record.steps[-1]["train/pixel"] < 0.7 * record.steps[0]["train/pixel"]
    assert model.reconstruct(torch.zeros(1, channels, SIDE, SIDE)).shape == (1, channels, SIDE, SIDE)


@pytest.mark.parametrize("kind", [Own, Signs])
def test_a_users_own_class(kind, caplog):
    critic = dict(critic={"norm": "group"}, adversarial={"adaptive": False, "weight": 0.01})
    asked = regularisers() if kind is Own else [Linear()]
    model, record = module(autoencoder=kind(), **critic, regularisers=asked, lr=1e-2), Record()
    validation = make_loader(Squares(20), 8, seed=0, infinite=False, shuffle=False)
    with caplog.at_level(logging.WARNING):
        trainer = fit(model, 60, validation=validation, callbacks=[record])
    assert record.steps[-1]["train/pixel"] < 0.6 * record.steps[0]["train/pixel"]
    assert "val/latent_std_3" in trainer.callback_metrics and "collapse" not in caplog.text
    assert model.measure_statistics(make_loader(Squares(20), 8, seed=0))["count"] == 20


def test_an_adaptive_critic_asks_a_users_class_for_its_last_layer():
    with pytest.raises(ValueError, match="last_layer.*critic.adaptive=false"):
        module(autoencoder=Own(), critic=True)


def test_channels_that_cannot_be_judged_are_told_before_the_first_batch():
    with pytest.raises(UserError, match="LPIPS judges pictures of 1 or 3 channels, these have 4.*loss.perceptual=0"):
        module(channels=4, loss={"perceptual": 1.0})
    with pytest.raises(ValueError, match="critic.net.image_channels: 3, but the autoencoder's pictures have 4"):
        AutoencoderModule(module(channels=4).autoencoder, ReconstructionLoss(), {}, critic=module(critic=True).critic)


def test_two_ranks_with_all_of_it_end_with_the_same_weights(tmp_path):
    """Plain DDP, which would stop at a weight that a backward pass leaves out."""
    tiny("vit", tmp_path)
    aligned = Alignment(str(tmp_path), cosine_margin=0.0, distance_margin=0.0)
    model = module(KL(2), **ALL, regularisers=[*regularisers(), aligned])
    before = [p.detach().clone() for p in model.parameters()]
    one, other = on_two_ranks(tmp_path, model, 4, batch_size=4)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(one["weights"], other["weights"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, one["weights"], strict=True))
