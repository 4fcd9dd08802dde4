"""A class of each picture, as one embedding or as one token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.cond import Cond


class ClassLabel(nn.Module):
    """"class" (B,) of whole numbers -> Cond(vector (B,width)), or tokens (B,1,width).

    The last row of the embedding is no class: what guidance compares with.

    Args:
        classes: how many there are; width: of the embedding.
        to: the field of the condition that it goes to.
        dropout: share of samples that training gives no class (p_uncond; 2207.12598).
    """

    encoder_hash = None

    def __init__(self, classes: int, width: int, to: Literal["vector", "tokens"] = "vector", dropout: float = 0.1):
        super().__init__()
        self.classes, self.field, self.dropout = classes, to, dropout
        self.width, self.vector_width = (width, None) if to == "tokens" else (None, width)
        self.embedding = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, batch: dict) -> Cond:
        return self._of(torch.as_tensor(batch["class"]).to(self.embedding.weight.device))

    def null(self, n: int) -> Cond:
        return self._of(torch.full((n,), self.classes, device=self.embedding.weight.device))

    def drop(self, cond: Cond, keep: Tensor) -> Cond:  # keep: (B,) bool
        return cond.where(keep, self.null(1))

    def _of(self, labels: Tensor) -> Cond:
        embedded = self.embedding(labels)
        return Cond(vector=embedded) if self.field == "vector" else Cond(tokens=embedded[:, None])
