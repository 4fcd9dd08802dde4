"""ldm.lit.DiffusionModule: what a training step depends on, what it changes, and what it leaves alone."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import Dataset

from autoencoder.base import Identity
from autoencoder.bottlenecks import KL
from autoencoder.model import convolutional
from ldm.callbacks.ema import EmaUpdate
from ldm.callbacks.finite import FiniteGradients
from ldm.common.random import normal, uniform
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner
from ldm.data.loader import make_loader
from ldm.lit import DiffusionModule

SEED, WORDS = 7, ["dot", "line", "circle", "triangle"]


class Words(Conditioner):
    """A token for each caption, another for the empty one; remembers what it was told to keep."""

    width = 8

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout, self.kept = dropout, []
        self.table, self.empty = nn.Parameter(torch.randn(len(WORDS), self.width)), nn.Parameter(torch.randn(1, 1, self.width))

    def forward(self, batch):
        return Cond(self.table[[WORDS.index(caption) for caption in batch["caption"]]][:, None])

    def null(self, n):
        return Cond(self.empty.expand(n, -1, -1))

    def with_dropout(self, batch, draw):
        self.kept.append(draw("drop") >= self.dropout)
        return super().with_dropout(batch, draw)


class Pictures(Dataset):
    """Four pictures of noise with a caption each, or the same numbers under another key; ``broken``: indices that hold inf."""

    def __init__(self, key="image", shape=(3, 8, 8), broken=()):
        self.key, self.shape, self.broken = key, shape, broken

    def __len__(self):
        return 4

    def __getitem__(self, i):
        value = torch.rand(self.shape, generator=torch.Generator().manual_seed(i)) * 2 - 1
        return {self.key: value * float("inf") if i in self.broken else value, "caption": WORDS[i], "key": f"{i}.png"}


class Free(DiffusionModule):
    """Its steps can be called without a Trainer."""

    trainer = SimpleNamespace(world_size=1)

    def log(self, name, value, **options):
        pass


def module(autoencoder=None, kind=DiffusionModule, dropout=0.0, rule="AdamW", lr=1e-3, **options):
    """Random weights everywhere, those included that training begins with at zero."""
    torch.manual_seed(0)
    network = {"target": "ldm.networks.unet.UNet", "params": dict(
        model_channels=32, channel_mult=[1], num_res_blocks=1, transformer_depth=[1], num_heads=2)}  # fmt: skip
    made = kind(autoencoder or Identity(), network, {"target": f"torch.optim.{rule}", "params": {"lr": lr}}, seed=SEED,
                conditioner=Words(dropout), **{"ema_decay": 0.9, **options})
    for model in filter(None, (made.model, made.ema and made.ema.shadow)):
        source = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, 0, 0.05, generator=source)
    return made


def kl():
    torch.manual_seed(2)
    autoencoder = convolutional(KL(2), width=8, mult=[1, 2], blocks=1, attention=False)
    autoencoder.set_statistics(torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0]), 1)
    return autoencoder


def fit(model, steps, data=None, batch_size=2, callbacks=(), ckpt_path=None, **options):
    loader = make_loader(data or Pictures(), batch_size, seed=1, start=lambda: model.images_seen)
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                         callbacks=[FiniteGradients(), EmaUpdate(), *callbacks], **options)
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


class Record(Callback):
    def __init__(self):
        self.losses, self.modes = [], set()

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        self.losses.append(outputs["loss"].item())
        frozen = [*model.autoencoder.modules(), *model.ema.shadow.modules()]
        self.modes.add((model.model.training, any(part.training for part in frozen)))


def batch(positions, key="image", **more):
    items = [Pictures(key)[p % 4] for p in positions]
    return {key: torch.stack([item[key] for item in items]), "caption": [item["caption"] for item in items],
            "position": torch.tensor(positions), **more}


def test_captions_are_dropped_where_their_number_is_below_the_share():
    model, positions = module(kind=Free, dropout=0.2), list(range(1000))
    given = batch(positions)
    with torch.no_grad():
        model.training_step({**given, "image": given["image"][..., :4, :4]}, 0)
        model.validation_step(batch([0, 1]), 0)
        numbers = torch.cat([uniform(SEED, "drop", [p]) for p in positions])
        tokens = model.condition(model.model, given, given["image"], {"drop": numbers}.get).tokens
    keep, seen = model.conditioner.kept  # training and condition(); validation drops nothing
    assert torch.equal(keep, numbers >= 0.2) and torch.equal(seen, keep)
    assert (~keep).float().mean().item() == pytest.approx(0.2, abs=0.03)
    expected = [model.conditioner.table[p % 4] if k else model.conditioner.empty[0, 0] for p, k in enumerate(keep.tolist())]
    assert torch.equal(tokens[:, 0], torch.stack(expected))


def test_the_loss_is_the_flow_matching_loss_of_the_positions():
    model, positions = module(kind=Free, dropout=0.5), [3, 8, 5, 1]
    t, noise = uniform(SEED, "t", positions), normal((3, 8, 8), SEED, "noise", positions)
    given, kept = batch(positions), uniform(SEED, "drop", positions) >= 0.5
    x, s = given["image"], t.view(-1, 1, 1, 1)
    cond = model.conditioner(given).where(kept, Cond(model.conditioner.empty))
    velocity = model.model["denoiser"].network((1 - s) * x + s * noise, 1000 * t, cond)
    assert model.training_step(given, 0).item() == pytest.approx((velocity - (noise - x)).square().mean().item(), rel=1e-5)


def test_noise_and_times_follow_from_positions_alone():
    model = module(kl(), kind=Free, dropout=0.5)
    first = model.training_step(batch([3, 8, 5, 1]), 0)
    torch.manual_seed(99)
    assert torch.equal(model.training_step(batch([3, 8, 5, 1]), 6), first)
    assert model.training_step(batch([7, 8, 5, 1]), 0) != first  # the same pictures
    halves = [model.training_step(batch(positions), 0).item() for positions in ([1, 8], [5, 3])]
    assert sum(halves) / 2 == pytest.approx(first.item(), rel=1e-5)


def test_validation_is_the_same_twice():
    model = module(kl(), dropout=0.5)
    loader = make_loader(Pictures(), 3, seed=0, shuffle=False, infinite=False)
    trainer = fit(model, 2)
    first = trainer.validate(model, loader, verbose=False)[0]
    torch.manual_seed(99)
    assert trainer.validate(model, loader, verbose=False)[0] == first
    assert set(first) == {f"{name}{part}" for name in ("val/loss", "val/loss_ema") for part in ("", "_q1", "_q2", "_q3", "_q4")}
    for name in ("val/loss", "val/loss_ema"):
        assert first[name] == pytest.approx(sum(first[f"{name}_q{i}"] for i in (1, 2, 3, 4)) / 4, rel=1e-5)
    assert first["val/loss"] != first["val/loss_ema"]


def test_modes_ignore_the_deviation_and_draws_use_it():
    mean, std, positions = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4), [5, 9]
    cached = {"latent": mean, "latent_std": std}
    mode, sample = module(latents="mode"), module(latents="sample")
    assert torch.equal(mode.latent(cached, positions, "posterior"), mean)
    assert torch.equal(sample.latent({"latent": mean}, positions, "posterior"), mean)
    expected = mean + std * normal((3, 4, 4), SEED, "posterior", positions)
    assert torch.equal(sample.latent(cached, positions, "posterior"), expected)


@pytest.mark.parametrize("latents", ["sample", "mode"])
def test_cached_latents_give_the_loss_of_pictures(latents):
    autoencoder = kl()
    model, pictures = module(autoencoder, kind=Free, latents=latents), batch([0, 5, 2])
    with torch.no_grad():
        mean, std = autoencoder.posterior(pictures["image"])
    cached = {**batch([0, 5, 2]), "latent": mean, "latent_std": std}
    del cached["image"]
    assert std.min() > 0 and torch.equal(model.training_step(cached, 0), model.training_step(pictures, 0))


def test_training_leaves_the_autoencoder_alone_and_nothing_else():
    autoencoder, record = kl(), Record()
    before, model = autoencoder.content_hash(), module(autoencoder, dropout=0.5)
    trained = dict([*model.model["denoiser"].named_parameters(), *model.conditioner.named_parameters()])
    start = {name: p.detach().clone() for name, p in trained.items()}
    trainer = fit(model, 5, callbacks=[record])
    assert autoencoder.content_hash() == before and record.modes == {(True, False)}
    assert not any(part.training for part in model.train().autoencoder.modules())
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    held = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trained.values()) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sample_with_inf_is_named_and_its_step_skipped(accumulate, caplog):
    model, record = module(kl()), Record()
    trainer = fit(model, 4 // accumulate, Pictures(broken={2}), 1, [record], accumulate_grad_batches=accumulate)
    assert trainer.callback_metrics["train/skipped"] == 1 and sum(not torch.tensor(loss).isfinite() for loss in record.losses) == 1
    (told,) = [message for message in caplog.messages if "skipped" in message]
    assert "the loss is not finite for 2.png (autoencoder.encoder." in told and "was given inf or nan)" in told
    assert all(value.isfinite().all() for value in model.state_dict().values()) and trainer.global_step == 4 // accumulate


def test_samples_with_inf_end_the_run_before_the_weights_are_touched():
    model = module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="3 steps in a row.*for .*png"):
        fit(model, 9, Pictures(broken=range(4)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "updates" not in name)


def test_the_loss_falls():
    record = Record()
    fit(module(lr=3e-3), 60, Pictures("latent"), 4, [record])
    assert sum(record.losses[-10:]) < 0.7 * sum(record.losses[:10])


def test_resumed_is_the_same_as_straight_through(tmp_path):
    straight, first, second = (module(kl(), dropout=0.5) for _ in range(3))
    whole = fit(straight, 4)
    fit(first, 2).save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["images_seen"] == first.images_seen == 4
    resumed = fit(second, 4, ckpt_path=tmp_path / "a.ckpt")
    assert second.images_seen == straight.images_seen == 8 and second.ema.updates == 4
    for (name, a), b in zip(straight.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    moments = [[value for state in t.optimizers[0].state_dict()["state"].values() for value in state.values()] for t in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


class Told(Record):
    """Each rank saves what it has at the end."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer, model):
        torch.save({"weights": model.state_dict(), "losses": self.losses, "images": model.images_seen}, self.folder / f"{trainer.global_rank}.pt")


def test_two_ranks_are_one_with_twice_the_batch(tmp_path):
    alone, halved = (module(kl(), dropout=0.5, rule="SGD", lr=0.05) for _ in range(2))  # Adam makes much of rounding errors
    record = Record()
    fit(alone, 4, batch_size=4, callbacks=[record])
    fit(halved, 4, batch_size=2, callbacks=[Told(tmp_path)], devices=2, strategy="ddp_fork")  # plain DDP, no unused weights
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, other["weights"][name]) for name, a in one["weights"].items())
    assert one["losses"] != other["losses"] and one["images"] == other["images"] == alone.images_seen == 16
    together = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"], strict=True)]
    assert together == pytest.approx(record.losses, rel=1e-4)
    assert all(torch.allclose(a, alone.state_dict()[name], atol=1e-5) for name, a in one["weights"].items())
