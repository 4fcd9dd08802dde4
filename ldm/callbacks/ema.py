"""Keep the averaged weights: one update for each optimizer step; and save those that others are put together from."""

import logging
from pathlib import Path

import pytorch_lightning as pl

log = logging.getLogger(__name__)


class EmaUpdate(pl.Callback):
    """Updates ``module.ema`` from ``module.model`` after every optimizer step, not after every accumulated batch; and where
    the module has ``snapshots``, their averages, which are saved in ``folder`` as often as it says and at the end."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.step = folder, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if trainer.global_step == self.step:
            return
        self.step, images = trainer.global_step, getattr(module, "images_seen", 0)
        averages = getattr(module, "averages", None) or ()
        for ema in filter(None, (module.ema, *averages)):
            ema.update(module.model, images)
        if averages and self.step % module.snapshots.every == 0:
            self.save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if getattr(module, "averages", None) and self.step % module.snapshots.every:
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.folder is None or not trainer.is_global_zero:
            return
        try:
            module.snapshots.save(module.averages, module.model, self.folder)
        except OSError as error:
            log.warning("snapshot of the averages not saved, training goes on: %s", error)
