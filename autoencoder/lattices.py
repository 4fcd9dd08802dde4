"""Codebooks that are not learned: the entries are the points of a lattice, and rounding finds the nearest."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.base import Bottled
from autoencoder.codes import MOST, Codebook, straight_through

EXACT = 10  # bits up to which the entropy of the mean distribution is formed over all entries


class FSQ(Codebook):
    """Every channel is bounded and rounded to one of L levels (finite scalar quantisation, 2309.15505).

    With h = (L - 1) / 2 · 1.001 and s = 0 for odd, 1/2 for even L, a feature y becomes ``tanh(y + artanh(s / h)) h - s``: y = 0
    falls on the lattice, and rounding gives the L integers from -floor(L/2) on. Divided by floor(L/2) that is the latent,
    in [-1, 1]. Nothing is learned, nothing can collapse, and there is no loss.

    Args:
        levels: L of each channel. Those of the paper (table 1): [8, 6, 5] for 2^8 codes, [8, 5, 5, 5] for 2^10,
            [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
        window: how many of the last codes ``usage`` looks at.
    """

    def __init__(self, levels: list[int], window: int | None = None):
        if not levels or min(levels) < 2 or math.prod(levels) > MOST:
            raise ValueError(f"bottleneck.levels: {list(levels)}; it takes one number from 2 for each channel, with a product "
                             f"of at most {MOST:,}")
        super().__init__(len(levels), math.prod(levels), window)
        self.levels = tuple(levels)

    def moments(self, features: Tensor) -> tuple[Tensor, None]:  # (B,C,h,w) -> (B,C,h,w) in [-1,1]
        y, levels = features.float(), self.column(self.levels, features)
        shift = (levels + 1) % 2 / 2
        half = (levels - 1) / 2 * 1.001  # with a factor of 1, artanh would be infinite at two levels
        z = torch.tanh(y + torch.atanh(shift / half)) * half - shift
        return (z / (levels // 2)).to(features.dtype), None

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w)
        levels = self.column(self.levels, z)
        digits = (z.float() * (levels // 2)).round() + levels // 2  # 0 ... L - 1
        digits = torch.minimum(digits.clamp(min=0), levels - 1)  # a diffusion model may leave [-1, 1]
        return (digits.long() * self.column(self.places, z).long()).sum(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w)
        levels, places = (self.column(values, codes) for values in (self.levels, self.places))
        digits = codes.unsqueeze(1) // places.long() % levels.long()
        return (digits - levels // 2) / (levels // 2)

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Rounded latents, no losses, codes (B,h,w)."""
        z, _ = self.moments(features)
        codes = self.indices(z)
        if self.training:
            self.remember(codes)
        return Bottled(straight_through(z, self.lookup(codes).to(z.dtype)), {}, codes)

    @property
    def places(self) -> tuple[int, ...]:  # what a step in each channel is worth in a code: 1, L0, L0 L1, ...
        return tuple(math.prod(self.levels[:n]) for n in range(self.channels))

    @staticmethod
    def column(values: tuple[int, ...], like: Tensor) -> Tensor:  # -> (C,1,1), exact in fp32
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)


class LFQ(Codebook):
    """The sign of every channel: C bits, 2^C codes, entries in {-1, 1}^C (lookup-free quantisation, 2310.05737).

    With p(c|z) = softmax over the entries c of -|z - c|^2 / temperature, the loss asks for decisions (small entropy of
    each p) and for all entries to be used (large entropy of their mean over the batch): E[H(p)] - gamma H(E[p]), in nats.
    The bits of one p are independent: its entropy is the sum of theirs, H(p) = sum_i H_b(sigmoid(4 z_i / temperature)).
    Those of the mean are not. Up to 10 channels it is formed over all 2^C entries; above, H(E[p]) is replaced by the sum
    over bits H_b(E[p_i]), an upper bound that does not see bits repeat one another.

    Args:
        channels: number C of bits.
        entropy: weight of that loss.
        gamma: weight of the second entropy in it.
        beta: weight of the commitment term |z - sg(sign z)|^2.
        temperature: of p; the smaller, the fewer latents near 0 feel the entropies.
        window: how many of the last codes ``usage`` looks at.
    """

    def __init__(self, channels: int = 10, entropy: float = 0.1, gamma: float = 1.0, beta: float = 0.25,
                 temperature: float = 1.0, window: int | None = None):
        if not 1 <= channels <= math.log2(MOST):
            raise ValueError(f"bottleneck.channels: {channels}; LFQ takes 1 to {math.log2(MOST):.0f} bits")
        if temperature <= 0:
            raise ValueError(f"bottleneck.temperature: {temperature}; it takes a number above 0")
        super().__init__(channels, 2**channels, window)
        self.entropy, self.gamma, self.beta, self.temperature = entropy, gamma, beta, temperature

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w): bit i is the sign of channel i
        return ((z > 0).long() << self.bits(z)).sum(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w)
        return (codes.unsqueeze(1) >> self.bits(codes) & 1) * 2.0 - 1.0

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Bottled:
        """Signs, {"codebook": commitment, "entropy": weighted}, codes (B,h,w)."""
        codes = self.indices(features)
        if self.training:
            self.remember(codes)
        z, q = features.float(), self.lookup(codes)
        decided, used = self.entropies(z)
        losses = {"codebook": self.beta * F.mse_loss(z, q), "entropy": self.entropy * (decided - self.gamma * used)}
        return Bottled(straight_through(features, q.to(features.dtype)), losses, codes)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(p)] and H(E[p]) in nats of latents (B,C,h,w); above 10 channels the second is its bound by bits."""
        logits = z.movedim(1, -1).flatten(0, -2) * 4 / self.temperature  # (N,C): log p(1) - log p(-1)
        p = logits.sigmoid()
        # log p and log (1 - p) from the logits: finite where p is 0 or 1
        each = -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).sum(dim=1).mean()
        if self.channels > EXACT:
            mean = p.mean(dim=0)
            return each, entropy(torch.stack([mean, 1 - mean]))
        joint = p.new_ones(len(p), 1)  # (N,2^n) after n bits, bit i of the column's number for channel i
        for bit in p.unbind(dim=1):
            joint = torch.cat([joint * (1 - bit[:, None]), joint * bit[:, None]], dim=1)
        return each, entropy(joint.mean(dim=0))

    def bits(self, like: Tensor) -> Tensor:  # (C,1,1)
        return torch.arange(self.channels, device=like.device).view(-1, 1, 1)


def entropy(p: Tensor) -> Tensor:
    """In nats; the slope at 0, which is infinite, counts as 0."""
    return torch.special.entr(p.clamp(min=torch.finfo(p.dtype).tiny)).sum()
