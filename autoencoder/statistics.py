"""What is known of an autoencoder after a walk over a data set: latent moments, codebook use, mean losses.

``measure`` puts the moments into the autoencoder, with their number and the hash of the data: its latents are then of
zero mean and unit variance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.bottlenecks import usage
from ldm.common.files import digest

IMAGES = 10_000  # enough that mean and deviation of a channel are known to a percent, whatever the pictures


class Tally:
    """Sums in float64 on the CPU, on every rank over its own share; ``gathered`` adds up the ranks."""

    def __init__(self, sums: dict[str, Tensor] | None = None):
        self.sums = sums or {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.detach().cpu().double()

    @property
    def count(self) -> int:
        """Pictures so far, on this rank."""
        return int(self.sums.get("count", 0))

    def latents(self, mean: Tensor, logvar: Tensor | None) -> None:
        """Raw latents of a batch: mean and log-variance (B,C,h,w) of q(z|x); None for deterministic kinds."""
        z = mean.detach().cpu().double()
        noise = torch.zeros_like(z) if logvar is None else logvar.detach().cpu().double().exp()
        self.add("latent", torch.stack([torch.ones_like(z), z, z.square(), noise]).sum(dim=(1, 3, 4)))
        self.add("count", torch.tensor(len(mean)))

    def codes(self, codes: Tensor, size: int) -> None:
        self.add("codes", torch.bincount(codes.flatten(), minlength=size))

    def terms(self, terms: dict[str, Tensor], pictures: int) -> None:
        """Named means over a batch."""
        for name, value in terms.items():
            self.add(f"term {name}", value * pictures)

    def gathered(self) -> Tally:
        """The sums of all ranks. All have to call; one without a batch may have nothing to say."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        others: list[dict] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(others, self.sums)
        names = dict.fromkeys(name for sums in others for name in sums)
        return Tally({name: sum(sums[name] for sums in others if name in sums) for name in names})

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per channel (C,): mean, variance of the posterior means, mean variance of the draws around them."""
        values, total, squares, noise = self.sums["latent"]
        mean = total / values
        return mean, (squares / values - mean.square()).clamp(min=0), noise / values

    def summary(self) -> dict[str, float]:
        """Everything by name, of these sums."""
        out = {name.removeprefix("term "): float(value / self.sums["count"])
               for name, value in self.sums.items() if name.startswith("term ")}
        mean, variance, noise = self.moments()
        std = (variance + noise).sqrt()
        for c in range(len(mean)):
            out |= {f"latent_mean_{c}": float(mean[c]), f"latent_std_{c}": float(std[c])}
        if noise.any():  # a unit is active if its mean tells pictures apart: variance above 0.01 (1509.00519, 5.2)
            out["active_units"] = float((variance > 0.01).sum())
        if "codes" in self.sums:
            out |= {f"codebook_{name}": value for name, value in usage(self.sums["codes"]).items()}
        return out


@torch.no_grad()
def measure(autoencoder: Autoencoder, loader: Iterable[dict], images: int = IMAGES, fingerprint: str | None = None) -> dict:
    """Mean and standard deviation per channel of draws from q(z|x), before shift and scale; stored in the autoencoder.

    Over ``images`` pictures of all ranks together, or the whole data set if that is smaller. All ranks have to call, each
    with its share of the pictures; the autoencoder should be in eval mode.

    Args:
        loader: batches {"image": (B,C,H,W) in [-1,1]}, shuffled where the data is sorted.
        fingerprint: of the data set; its hash is stored too.

    Returns:
        {"count", "mean" (C), "std" (C), "collapsed"}: the last lists channels whose draws are noise to nine tenths.

    Raises:
        ValueError: where a channel has no variance at all.
    """
    images = min(images, len(loader.dataset)) if hasattr(loader, "dataset") else images
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    tally, own = Tally(), -(-images // world)
    for batch in loader:
        tally.latents(*autoencoder.moments(batch["image"][: own - tally.count].to(autoencoder.shift)))
        if tally.count >= own:
            break
    tally = tally.gathered()
    mean, variance, noise = tally.moments()
    std = (variance + noise).sqrt()
    autoencoder.set_statistics(mean.float(), std.float(), tally.count, fingerprint and data_hash(fingerprint))
    collapsed = (variance < 0.1 * std.square()).nonzero().flatten().tolist()
    return {"count": tally.count, "mean": mean.tolist(), "std": std.tolist(), "collapsed": collapsed}


def data_hash(fingerprint: str) -> str:
    """16 hex digits that name the data set with this fingerprint, which is itself where it is written so."""
    return fingerprint if re.fullmatch("[0-9a-f]{16}", fingerprint) else digest(fingerprint)
