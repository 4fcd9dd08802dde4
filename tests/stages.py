"""Both stages at their smallest, trained as main.py trains them but for the command line: what they promise is tried out."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from pytorch_lightning import Callback

sys.path.append(str(Path(__file__).parent / "autoencoder"))
import squares  # noqa: E402
import test_diffusion_module as words  # noqa: E402

from autoencoder.bottlenecks import VQ  # noqa: E402
from ldm.callbacks.checkpoints import Checkpoints  # noqa: E402
from ldm.callbacks.clock import Clock  # noqa: E402
from ldm.callbacks.metrics import Metrics  # noqa: E402
from ldm.callbacks.promises import Promises  # noqa: E402
from ldm.callbacks.seeding import Seeding  # noqa: E402
from ldm.callbacks.stop import Stop  # noqa: E402
from ldm.common.equal import differences  # noqa: E402
from ldm.data.loader import make_loader  # noqa: E402
from main import make_trainer, upkeep  # noqa: E402

SCHEDULE = {"target": "ldm.common.schedules.Warmup", "params": {"steps": 4, "decay": "cosine"}}


class Pictures(words.Pictures):
    """Ten of them, so that batches straddle epochs, each drawn anew from the global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        item = super().__getitem__(i % 4)
        return {**item, "image": item["image"] + 0.1 * torch.randn(item["image"].shape), "key": f"{i}.png"}


def first_stage(accumulate=1, bottleneck=None, **options):
    """With a critic, a codebook that follows by averages, and an average of the weights."""
    given = dict(critic={"norm": "act"}, adversarial={"start": 2, "lead": 1, "ramp": 2}, ema_decay=0.9, schedule=SCHEDULE)
    torch.manual_seed(0)
    bottleneck = bottleneck() if bottleneck else VQ(2, codes=32, learn="ema", restart=0.3, decay=0.5)
    return squares.module(bottleneck, **{**given, **options}, accumulate=accumulate), squares.Squares(10)


def second_stage(accumulate=1, **options):
    """With dropped captions, latents drawn from a posterior, and an average of the weights."""
    return words.module(words.kl(), **{"dropout": 0.5, "schedule": SCHEDULE, **options}), Pictures()


class Saved(Callback):
    """The last step, whatever it is."""

    def __init__(self, saver):
        self.saver = saver

    def on_train_end(self, trainer, module):
        self.saver.save(trainer)


def train(folder, make, steps, resume=None, world=1, workers=0, accumulate=1, batch=4, every=100, callbacks=(), strategy="ddp_fork", **options):
    """-> the last checkpoint."""
    module, data = make(accumulate, **options)
    saver, clock = Checkpoints(folder / "checkpoints", every, 3, lambda module: {"kind": "tiny", "config": {"model": {}}}, Clock()), Clock()
    kind = "autoencoder" if hasattr(module, "batches_seen") else "diffusion"
    stage = SimpleNamespace(config={}, kind=kind, accumulate=accumulate, trainer={
        "max_steps": steps, "accelerator": "cpu", "devices": world, "strategy": strategy if world > 1 else "auto",
        **({"accumulate_grad_batches": accumulate} if kind == "diffusion" else {})})  # fmt: skip
    trainer = make_trainer(stage, plugins=[saver.io], callbacks=[
        clock, *upkeep(stage, folder), Seeding(5), Promises(lambda text: None), Metrics(folder / "metrics.jsonl", 1, clock), Stop(),
        *callbacks, Saved(saver), saver])  # fmt: skip
    loader = make_loader(data, batch, seed=5, workers=workers, start=lambda: module.images_seen)
    trainer.fit(module, loader, ckpt_path=resume)
    return saver.last


def differing(one, other) -> dict[str, str]:
    """What two checkpoints do not have in common."""
    return differences(*(torch.load(path, weights_only=True) for path in (one, other)))
