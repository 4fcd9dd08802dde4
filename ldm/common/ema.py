"""Exponential moving average of a module's weights, as a second module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def warmed_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + n) / (10 + n)): a young average follows quickly. ``updates`` n counts from 1."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema(nn.Module):
    """A shadow of ``module`` in fp32: call it where you would call the original.

    Args:
        module: what to average; it is copied, not kept.
        decay: weight of the past in one update, in [0, 1).
        warmup: shorten the memory of the first updates (``warmed_decay``).
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; it must be in [0, 1)")
        self.shadow = copy.deepcopy(module).float().requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """shadow += (1 - decay) * (module - shadow), buffers copied."""
        self.updates += 1
        decay = warmed_decay(self.decay, int(self.updates)) if self.warmup else self.decay
        shadows = list(self.shadow.parameters())
        torch._foreach_lerp_(shadows, [p.detach().to(s.dtype) for s, p in zip(shadows, module.parameters(), strict=True)],
                             1 - decay)
        for s, b in zip(self.shadow.buffers(), module.buffers(), strict=True):
            s.copy_(b)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.shadow(*args, **kwargs)
