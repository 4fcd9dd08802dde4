"""Keep the averaged weights: one update for each optimizer step."""

import pytorch_lightning as pl


class EmaUpdate(pl.Callback):
    """Updates ``module.ema`` from ``module.model`` after every optimizer step, not after every accumulated batch."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            if module.ema is not None:
                module.ema.update(module.model)
