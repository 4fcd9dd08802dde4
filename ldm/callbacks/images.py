"""Pictures while training: the same ones at every time, so that two sheets can be compared."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule
from torch import Tensor

from ldm.callbacks.clock import Clock
from ldm.callbacks.sheet import save_png, sheet
from ldm.classifier import cross_entropy
from ldm.common.random import normal

log = logging.getLogger(__name__)

SHARES = (0.0, 0.25, 0.5, 0.75)  # of the way to noise, at which a classifier is looked at


@dataclass(frozen=True)
class Panel:
    """What one sheet shows."""

    pictures: Tensor  # (N,C,H,W) in [-1,1]
    captions: Sequence[str]
    columns: int | None = None
    about: dict = field(default_factory=dict)  # goes into the PNG


class Viewer(Protocol):
    """Whoever else wants to see sheets."""

    def picture(self, name: str, image: Image.Image, caption: str, step: int) -> None: ...


def reconstructions(originals: Tensor) -> Callable[[LightningModule], Panel]:
    """(N,C,H,W) -> a panel of the originals above what the module makes of them."""

    def panel(module: LightningModule) -> Panel:
        made = module.reconstruct(originals.to(module.device)).float().cpu().clamp(-1, 1)
        error = (made - originals).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        captions = ["original"] * len(made) + [f"{db:.1f} dB" for db in (10 * torch.log10(4 / error)).tolist()]
        return Panel(torch.cat([originals, made]), captions, columns=len(made))

    return panel


def samples(batch: dict, bundle_of: Callable[[LightningModule], Any], seed: int = 0) -> Callable[[LightningModule], Panel]:
    """-> a panel of what the averaged model draws for batch["caption"], from the same noise each time.

    bundle_of: module -> what has ``generate``.
    batch: of what the conditioner takes, {"caption": [...]}, with "text_states" and "text_mask" where they are known.
    """

    def panel(module: LightningModule) -> Panel:
        pictures = bundle_of(module).generate(batch, seed=seed).float().cpu()
        about = {"prompts": list(batch["caption"]), "seed": seed, "weights": "ema"}
        return Panel(pictures, batch["caption"], about=about)

    return panel


def judged(originals: Tensor, classes: Tensor, seed: int = 0) -> Callable[[LightningModule], Panel]:
    """(N,C,H,W), (N,) -> a panel of these with more and more noise, and what the averaged classifier gives their class."""

    def panel(module: LightningModule) -> Panel:
        classifier, y = module.classifier(), classes.to(module.device)
        z = module.autoencoder.encode(originals.to(module.device))
        noise = normal(z.shape[1:], seed, "judged", range(len(z)), z.device)
        process, pictures, captions = classifier.process, [], []
        for share in SHARES:
            t = torch.full((len(z),), process.t_min + share * (process.t_max - process.t_min), device=z.device)
            losses, _ = cross_entropy(classifier, z, y, t, noise)
            pictures.append(module.autoencoder.decode(process.add_noise(z, noise, t)).float().cpu().clamp(-1, 1))
            captions += [f"t {t[0]:.3g}: p {p:.2f}" for p in (-losses).exp().tolist()]
        return Panel(torch.cat(pictures), captions, columns=len(z), about={"classes": classes.tolist(), "seed": seed})

    return torch.no_grad()(panel)


class Pictures(Callback):
    """Every so many steps a sheet in `folder` (and to the viewers), drawn by rank 0, or by all together where weights lie in
    shares; 0: none on the way."""

    def __init__(self, panel: Callable[[LightningModule], Panel], folder: Path, every: int, clock: Clock,
                 viewers: Sequence[Viewer] = ()) -> None:
        self.panel, self.folder, self.every, self.clock, self.viewers = panel, Path(folder), every, clock, viewers
        self._step = 0

    def on_train_start(self, trainer, module) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        if self.every and step != self._step and step % self.every == 0:
            with self.clock.pause("pictures"):
                self.draw(trainer, module, step)
        self._step = step

    def draw(self, trainer: Any, module: LightningModule, step: int, name: str | None = None) -> Path | None:
        """-> the sheet; None on other ranks, and where the disk is full, which ends no training. All ranks have to call."""
        if not (trainer.is_global_zero or getattr(trainer.strategy, "sharded", False)):
            return None
        panel = self.panel(module)
        if not trainer.is_global_zero:
            return None
        image = sheet(panel.pictures, panel.captions, panel.columns)
        path = self.folder / (name or f"step-{step:06d}.png")
        try:
            save_png(image, path, {"step": step, **panel.about})
        except OSError as error:
            log.warning("%s: no pictures this time, training goes on", error)
            return None
        for viewer in self.viewers:
            viewer.picture(self.folder.name, image, " | ".join(panel.captions), step)
        return path
