"""Retrieved pictures as a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, check_dropout, like, tensor
from ldm.conditioners.wants import Want


class Neighbours(Conditioner):
    """"neighbours" (B,k,D), embeddings of the k pictures of a collection that are nearest, as tokens (retrieval-augmented
    diffusion, 2204.11824). ``ldm.data.neighbours`` finds them. The null is zeros, which attention adds nothing for.

    Args:
        embedding_width: D.
        count: k at most; what is planned with.
        width: of the tokens, by a trained projection; None: D, as they are.
        normalise: to length 1.
    """

    def __init__(self, embedding_width: int, count: int, width: int | None = None, normalise: bool = True,
                 dropout: float = 0.0):
        super().__init__()
        self.embedding_width, self.length, self.normalise = embedding_width, count, normalise
        self.width, self.dropout = width or embedding_width, check_dropout(dropout)
        self.wants = (Want("neighbours", "array", f"embeddings of up to {count} pictures", embedding_width),)
        self.project = nn.Identity() if width is None else nn.Linear(embedding_width, width, bias=False)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        x = tensor(batch, "neighbours", self, (None, self.embedding_width)).float()
        x = nn.functional.normalize(x, dim=-1) if self.normalise else x
        return Cond(self.project(like(x, self.project)))

    def null(self, n: int) -> Cond:
        return Cond(torch.zeros(n, 1, self.width))
