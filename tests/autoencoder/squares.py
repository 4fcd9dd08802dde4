"""The smallest first stage, and pictures to train it on."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch.utils.data import Dataset

from autoencoder.bottlenecks import KL, VQ
from autoencoder.critics import Adversarial, PatchCritic
from autoencoder.lit import AutoencoderModule
from autoencoder.losses import ReconstructionLoss
from autoencoder.model import convolutional
from ldm.data.loader import make_loader

SIDE = 16


class Squares(Dataset):
    """One bright square on a dark ground; ``broken``: indices that hold inf."""

    def __init__(self, count=64, broken=(), channels=3):
        self.count, self.broken, self.channels = count, broken, channels

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        x = torch.full((self.channels, SIDE, SIDE), -1.0) + torch.rand(self.channels, 1, 1, generator=generator) / 2
        top, left = torch.randint(0, SIDE - 6, (2,), generator=generator).tolist()
        x[:, top : top + 6, left : left + 6] = torch.rand(self.channels, 1, 1, generator=generator)
        return {"image": x * float("inf") if i in self.broken else x, "caption": "a square", "key": str(i)}


def module(bottleneck=None, critic=False, kl=1e-6, loss=None, adversarial=None, autoencoder=None, channels=3, **options):
    """critic: options of its net, adversarial: of how it is heard; loss: options beside kl."""
    torch.manual_seed(0)
    if critic:
        net = PatchCritic(channels, width=8, layers=1, **({} if critic is True else critic))
        options["critic"] = Adversarial(net, **{"start": 0, "lead": 0, "ramp": 0, **(adversarial or {})})
    autoencoder = autoencoder or convolutional(bottleneck or KL(2), channels, width=8, mult=[1, 2], blocks=1, attention=False)
    optimizer = {"target": f"torch.optim.{options.pop('rule', 'AdamW')}", "params": {"lr": options.pop("lr", 2e-3)}}
    return AutoencoderModule(autoencoder, ReconstructionLoss(**{"kl": kl, **(loss or {})}), optimizer, **options)


def fit(model, steps, data=None, validation=None, callbacks=(), ckpt_path=None, batch_size=8, **options):
    loader = make_loader(data or Squares(), batch_size, seed=1, start=lambda: model.images_seen)
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks),
                         enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
                         num_sanity_val_steps=0, val_check_interval=steps if validation else None, **options)
    trainer.fit(model, loader, validation, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


class Record(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Told(Callback):
    """Each rank saves what it has at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        bottleneck = getattr(module.autoencoder, "bottleneck", None)
        torch.save({"weights": [p.detach() for p in module.parameters()], "skipped": module.skipped, "images": module.images_seen,
                    "used": bottleneck.usage() if isinstance(bottleneck, VQ) else None}, self.folder / f"{trainer.global_rank}.pt")


def on_two_ranks(folder, model, steps, **options):
    fit(model, steps, callbacks=[Told(folder)], devices=2, strategy="ddp_fork", **options)  # plain DDP, no unused weights
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
