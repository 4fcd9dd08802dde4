"""A module that trains in no time, with what callbacks rely on."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from torch import nn
from torch.utils.data import Dataset

from ldm.data.loader import make_loader


class Numbers(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict:
        return {"x": torch.tensor([i / 24, 1.0])}


class Tiny(pl.LightningModule):
    """Regression with dropout, so that global random numbers matter; logs "train/loss"."""

    def __init__(self, bad_step: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.images_seen, self.bad_step, self.positions = 0, bad_step, []

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        self.images_seen += len(batch["x"])
        self.positions += batch["position"].tolist()
        loss = (self.net(batch["x"]) - 3 * batch["x"][:, :1]).square().mean()
        self.log("train/loss", loss * float("nan") if self.global_step == self.bad_step else loss)
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        self.log("val/loss", (self.net(batch["x"]) - 3 * batch["x"][:, :1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.images_seen = checkpoint["images_seen"]


def fit(callbacks: list, steps: int = 6, module: Tiny | None = None, resume=None, **options) -> tuple[pl.Trainer, Tiny]:
    torch.manual_seed(0)
    module = module or Tiny()
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, logger=False,
                         enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                         use_distributed_sampler=False, check_val_every_n_epoch=None,
                         enable_checkpointing=any(isinstance(call, Checkpoint) for call in callbacks), **options)  # fmt: skip
    validates = make_loader(Numbers(), 6, seed=0, shuffle=False, infinite=False) if "val_check_interval" in options else None
    trainer.fit(module, make_loader(Numbers(), 4, seed=1, start=lambda: module.images_seen), validates, ckpt_path=resume)
    return trainer, module
