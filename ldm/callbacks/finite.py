"""Gradient norm, and what happens when it is not a number."""

import logging

import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)


class FiniteGradients(pl.Callback):
    """Logs ``train/grad_norm``; a step whose gradient is not finite is skipped and counted. (Under fp16 the gradient
    scaler does that by itself.)

    Raises:
        RuntimeError: after ``patience`` skipped steps in a row.
    """

    def __init__(self, patience: int = 3):
        self.patience, self.in_a_row, self.skipped = patience, 0, 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # fp16: the scaler itself skips steps whose gradients overflowed, which is how it finds its scale
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        module.log("train/grad_norm", norm)
        if torch.isfinite(norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        log.warning("step %d skipped: the gradient norm is %s", trainer.global_step, float(norm))
        if self.in_a_row >= self.patience:
            raise RuntimeError(f"the gradient was not finite for {self.patience} steps in a row; the last was step "
                               f"{trainer.global_step}; lower the learning rate, or set trainer.gradient_clip_val")
        for p in params:
            p.grad = None
