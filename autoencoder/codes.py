"""What all codebooks share, learned ones and lattices: entries with numbers, and how many of them are in use.

A kind with codes says how many there are (``codes``), which entry stands for a latent (``indices``) and what an entry
is (``lookup``); the latent of a picture is what comes *before* quantisation (as in LDM), and the decoder quantises.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from ldm.common.team import place

MOST = 2**20  # entries: each is counted, and the window has room for four codes of each


class Codebook(nn.Module):
    """Base of the bottlenecks with a finite number of entries. A kind implements ``indices``, ``lookup``, ``forward``.

    Args:
        channels: size of an entry, and channels of the latent.
        codes: number K of entries.
        window: how many of the last codes ``usage`` looks at, on each rank; None: 65,536, or 4 K if that is more.
    """

    def __init__(self, channels: int, codes: int, window: int | None = None):
        super().__init__()
        if not 2 <= codes <= MOST:
            raise ValueError(f"bottleneck: {codes} codes; a codebook has 2 to {MOST:,}")
        if window is not None and window < codes:
            raise ValueError(f"bottleneck.window: {window} codes cannot show the use of {codes} entries; it takes {codes} "
                             "or more")
        self.channels = self.features = channels
        self.codes, self.window = codes, window or max(65536, 4 * codes)
        self._recent: deque[Tensor] = deque()  # batches of codes of this rank; no buffer, for DDP would copy rank 0's

    def moments(self, features: Tensor) -> tuple[Tensor, None]:  # (B,C,h,w) -> (B,C,h,w): the latent
        return features, None

    def indices(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w): the entry that stands for each latent
        raise NotImplementedError(f"{type(self).__name__} has to implement indices(z)")

    def lookup(self, codes: Tensor) -> Tensor:  # (B,h,w) -> (B,C,h,w): entries
        raise NotImplementedError(f"{type(self).__name__} has to implement lookup(codes)")

    def quantise(self, z: Tensor) -> Tensor:  # (B,C,h,w) -> the entries that stand for it: what the decoder sees
        return self.lookup(self.indices(z)).to(z.dtype)

    def remember(self, codes: Tensor) -> None:
        """For ``usage``: the codes of a training batch."""
        self._recent.append(codes.detach().flatten())
        held = sum(map(len, self._recent))
        while held - len(self._recent[0]) >= self.window:
            held -= len(self._recent.popleft())

    def usage(self) -> dict[str, float]:
        """Of the last ``window`` codes of every rank: share of entries "used" and "perplexity", exp of the entropy.
        All ranks have to call."""
        recent = torch.cat(list(self._recent))[-self.window:] if self._recent else torch.empty(0, dtype=torch.int64)
        return usage(summed(torch.bincount(recent, minlength=self.codes)))


def usage(hits: Tensor) -> dict[str, float]:  # (K,) how often each entry was taken
    """Share of entries that were "used" at all and "perplexity": how many equally used entries say as much."""
    p = hits / hits.sum().clamp(min=1)
    return {"used": (hits > 0).float().mean().item(), "perplexity": torch.special.entr(p).sum().exp().item()}


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """``q``, to the bit, with the gradient of ``z`` (1308.3432)."""
    return q.detach() + (z - z.detach())


def summed(x: Tensor) -> Tensor:
    """``x``, in place the sum over all ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def averaged(x: Tensor) -> Tensor:
    """The mean of ``x`` over all ranks."""
    return summed(x.clone()) / place()[1]
