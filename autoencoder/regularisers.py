"""What stage 1 may ask of latents so that a diffusion model learns them more easily: each a function with its paper, and
a block that applies it in training.

    regularisers:
    - {target: autoencoder.regularisers.Equivariance, params: {preserve: 0.5}}

There are two ways to ask. ``present`` puts something else before the decoder than the latent, and before the loss what
should come of it. ``term`` adds to the loss. Both work with every autoencoder that has ``moments`` and ``decode_raw``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.base import Autoencoder, Bottled
from autoencoder.codes import averaged
from autoencoder.losses import adaptive_weight
from autoencoder.vision import Vision
from ldm.common.files import UserError
from ldm.common.random import generator, normal, uniform

ROUNDED = ("regularisers: DecoderNoise and Equivariance need a latent that is decoded as it is, but this bottleneck rounds it "
           "to codes; take them out, or use the bottleneck KL or Plain")


def transformed(x: Tensor, z: Tensor, size: tuple[int, int], turns: int) -> tuple[Tensor, Tensor]:
    """Picture (B,C,H,W) and latent (B,c,h,w) under the same map: scaled, so that the latent has ``size``, then turned
    ``turns`` times by 90 degrees (EQ-VAE, 2502.09509)."""
    factor = x.shape[-1] // z.shape[-1]

    def scaled(picture: Tensor, to: tuple[int, int]) -> Tensor:
        same = tuple(picture.shape[2:]) == to
        return picture if same else F.interpolate(picture.float(), to, mode="bilinear", antialias=True)

    larger = (size[0] * factor, size[1] * factor)
    return scaled(x, larger).rot90(turns, (2, 3)), scaled(z, size).rot90(turns, (2, 3))


def noised(z: Tensor, level: Tensor, noise: Tensor) -> Tensor:  # (B,C,h,w), (B,), (B,C,h,w) -> (B,C,h,w)
    """Noise of deviation ``level`` in units of the latent's own, channel by channel, which a diffusion model sees as 1.
    Own units leave the autoencoder no way to drown the noise by making its latents larger."""
    std = z.detach().float().std(dim=(0, 2, 3), keepdim=True, correction=0)
    return z + level.view(-1, 1, 1, 1) * std * noise


def marginal_cosine(z: Tensor, f: Tensor, margin: float) -> Tensor:  # (B,D,h,w) twice -> ()
    """How far the directions of ``z`` and ``f`` differ at each place, beyond a margin (VA-VAE, 2501.01423)."""
    return F.relu(1 - margin - F.cosine_similarity(z, f, dim=1)).mean()


def marginal_distances(z: Tensor, f: Tensor, margin: float) -> Tensor:  # (B,D,h,w) twice -> ()
    """How far the cosines between all places of a picture differ in ``z`` and ``f``, beyond a margin (VA-VAE)."""
    z, f = (F.normalize(part.flatten(2), dim=1) for part in (z, f))
    return F.relu((z.mT @ z - f.mT @ f).abs() - margin).mean()


@dataclass(frozen=True)
class Chance:
    """Where regularisers take random numbers from: functions of the place in the run, so that it can be resumed."""

    seed: int
    batch: int  # its number, the same on all ranks
    positions: Sequence[int]  # of its pictures in the run

    def generator(self, stream: str) -> torch.Generator:
        return generator(self.seed, stream, self.batch)

    def normal(self, stream: str, like: Tensor) -> Tensor:
        return normal(like.shape[1:], self.seed, stream, self.positions, like.device)

    def uniform(self, stream: str, like: Tensor) -> Tensor:  # (B,)
        return uniform(self.seed, stream, self.positions, like.device)


class Regulariser(nn.Module):
    """Base of the blocks; its weights, if it has any, are trained with the autoencoder's and saved in checkpoints of the
    training, not with the autoencoder."""

    def connect(self, autoencoder: Autoencoder) -> None:
        """Make what depends on the autoencoder's sizes. Called once, before there is an optimizer."""

    def prepare(self) -> None:
        """Load what is needed, before the first batch. Raises UserError."""

    def present(self, x: Tensor, z: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        """(B,C,H,W), (B,c,h,w) -> the latent that the decoder gets in place of z, behind the picture it should make."""
        return x, z

    def term(self, x: Tensor, z: Tensor, nll: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the loss (), and what to log. Pictures, raw latents as the encoder gave them, loss of their
        reconstruction, from which the graph leads to z. All weights have to take part (DDP)."""
        return nll.new_zeros(()), {}


class DecoderNoise(Regulariser):
    """The decoder gets latents with noise, of a deviation drawn for each picture from [0, tau]: it learns to forgive the
    small errors of a diffusion model (noise-augmented decoding: RAE, 2510.11690; related: l-DeTok, 2507.15856).

    Args:
        tau: largest deviation, where 1 is that of the latents.
    """

    def __init__(self, tau: float = 0.3):
        super().__init__()
        if tau <= 0:
            raise ValueError(f"regularisers: DecoderNoise.tau: {tau}; it takes a number above 0")
        self.tau = tau

    def present(self, x: Tensor, z: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        level = self.tau * chance.uniform("decoder noise level", z)
        return x, noised(z, level, chance.normal("decoder noise", z))


class Equivariance(Regulariser):
    """A latent scaled down and turned has to decode to the picture scaled down and turned (EQ-VAE, 2502.09509).

    One map for all pictures of a batch: a scale from [``scale``, 1), and 90, 180 or 270 degrees.

    Args:
        preserve: share of batches that are left as they are (the paper's prior preservation).
        scale: smallest side, as a share of the whole.
        smallest: pixels that no side goes below; critic and LPIPS cannot judge very small pictures.
        rotate: whether latents are turned too.
    """

    def __init__(self, preserve: float = 0.5, scale: float = 0.25, smallest: int = 32, rotate: bool = True):
        super().__init__()
        for name, value in {"preserve": preserve, "scale": scale}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"regularisers: Equivariance.{name}: {value}; it takes 0 to 1")
        self.preserve, self.scale, self.smallest, self.rotate = preserve, scale, smallest, rotate

    def present(self, x: Tensor, z: Tensor, chance: Chance) -> tuple[Tensor, Tensor]:
        source = chance.generator("equivariance")
        share, where = torch.rand(2, generator=source).tolist()
        turns = int(torch.randint(1, 4, (), generator=source)) if self.rotate else 0
        if share < self.preserve:
            return x, z
        low = min(1.0, max(self.scale, self.smallest / min(x.shape[2:])))
        size = [max(1, round(side * (low + where * (1 - low)))) for side in z.shape[2:]]
        return transformed(x, z, (size[0], size[1]), turns)


class Alignment(Regulariser):
    """Latents follow the features of a frozen vision model (VA-VAE, 2501.01423): a learned linear map of the latent has
    their directions (within margin m1), and places look as alike as they do there (within margin m2).

    Args:
        encoder: any vision model of transformers: a folder, or an id on the model hub.
        weight: of both terms.
        adaptive: in units of the reconstruction's gradient at the latent, measured in every batch. (The paper measures it at
            the encoder's last convolution, which not every autoencoder has.)
        cosine_margin, distance_margin: m1 and m2. With 0 the latents have to agree wholly.
    """

    def __init__(self, encoder: str, weight: float = 0.1, adaptive: bool = True, cosine_margin: float = 0.5,
                 distance_margin: float = 0.25):
        super().__init__()
        if weight <= 0:
            raise ValueError(f"regularisers: Alignment.weight: {weight}; it takes a number above 0")
        self.vision = Vision(encoder)
        self.weight, self.adaptive, self.margins = weight, adaptive, (cosine_margin, distance_margin)

    def connect(self, autoencoder: Autoencoder) -> None:
        self.vision.check(autoencoder.image_channels)
        self.projection = nn.Conv2d(autoencoder.channels, self.vision.width, 1, bias=False)

    def prepare(self) -> None:
        self.vision.load()

    def term(self, x: Tensor, z: Tensor, nll: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.vision(x)
        features = F.interpolate(features, z.shape[2:], mode="bilinear", antialias=True)
        projected = self.projection(z).float()
        cosine, distances = (measure(projected, features, margin) for measure, margin in
                             zip((marginal_cosine, marginal_distances), self.margins, strict=True))
        weight = nll.new_tensor(self.weight)
        if self.adaptive:
            weight = weight * adaptive_weight(nll, cosine + distances, z, limit=1e8, eps=1e-8,
                                              size=lambda g: averaged(g.square().sum()).sqrt())  # fmt: skip
        logged = {"alignment_cosine": cosine, "alignment_distances": distances, "alignment_weight": weight}
        return weight * (cosine + distances), {name: value.detach() for name, value in logged.items()}


class Regularisers(nn.ModuleList):
    """Those of a run, in the order in which they are named."""

    def connect(self, autoencoder: Autoencoder) -> None:
        codebook = hasattr(getattr(autoencoder, "bottleneck", None), "lookup")
        for regulariser in self:
            if codebook and type(regulariser).present is not Regulariser.present:
                raise UserError(ROUNDED)
            regulariser.connect(autoencoder)

    def prepare(self) -> None:
        for regulariser in self:
            regulariser.prepare()

    def reconstruct(self, autoencoder: Autoencoder, x: Tensor, noise: Tensor | None, chance: Chance
                    ) -> tuple[Tensor, Tensor, Bottled]:
        """The training pass: pictures that should come out, those that do, and what the bottleneck said.

        Where another latent is presented, it is decoded in place of the first one, at the price of a second decoding.
        """
        x_hat, bottled = autoencoder(x, noise)
        goal, z = x, bottled.latent
        for regulariser in self:
            goal, z = regulariser.present(goal, z, chance)
        if z is bottled.latent:
            return x, x_hat, bottled
        if bottled.codes is not None:
            raise UserError(ROUNDED)
        del x_hat  # and with it what its backward pass would have needed
        return goal, autoencoder.decode_raw(z), bottled

    def terms(self, x: Tensor, z: Tensor, nll: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of what is added to the loss, and everything to log."""
        total, logged = nll.new_zeros(()), {}
        for regulariser in self:
            term, more = regulariser.term(x, z, nll)
            total, logged = total + term, logged | more
        return total, logged
