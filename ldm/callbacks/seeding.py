"""Global random numbers (dropout layers and the like) as a function of the seed, the rank and the pictures seen."""

import torch
from pytorch_lightning import Callback

from ldm.common.random import key_to_seed


class Seeding(Callback):
    """Seeds torch before each batch: a resumed run draws what the uninterrupted one would have drawn, and no two ranks
    draw the same. (Noise and times of the objective come from streams of their own, keyed by the sample.)"""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        torch.manual_seed(key_to_seed(self.seed, "step", trainer.global_rank, module.images_seen))
