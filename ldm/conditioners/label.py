"""A class as a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from ldm.common.files import UserError
from ldm.common.limits import limits
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, check_dropout, tensor
from ldm.conditioners.wants import Want


class ClassLabel(Conditioner):
    """"class" (B,) int -> a learned embedding, as a vector (ADM, 2105.05233; DiT) or as one token (LDM, 2112.10752).

    Args:
        classes: how many there are; they are numbered from 0.
        width: of the embedding.
        dropout: share of samples whose class training replaces by "no class".
        null_row: the table has a row more, the last, for "no class". False: the last of the classes is "no class", which
            LDM's own tables count.
        key: of the batch.
    """

    check_params = staticmethod(limits(classes=1, width=1, dropout=(0, 1)))

    def __init__(self, classes: int, width: int, to: Literal["vector", "tokens"] = "vector", dropout: float = 0.0,
                 null_row: bool = True, key: str = "class"):
        super().__init__()
        if classes < 1 or width < 1:
            raise UserError(f"ClassLabel: classes {classes}, width {width}; both are whole numbers from 1")
        self.rows, self.key, self.dropout = classes + null_row, key, check_dropout(dropout)
        self.to_vector = to == "vector"
        if self.to_vector:
            self.vector_width = width
        else:
            self.width = width
        self.embedding = nn.Embedding(self.rows, width)
        self.wants = (Want(key, "class", f"a class, 0 to {classes - 1}", classes=classes),)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        return self.embed(tensor(batch, self.key, self, ()))

    def null(self, n: int) -> Cond:
        return self.embed(torch.full((n,), self.rows - 1))

    def embed(self, labels: torch.Tensor) -> Cond:  # (B,)
        wrong = labels if labels.is_floating_point() else labels[(labels < 0) | (labels >= self.rows)]
        if len(wrong):
            raise UserError(f"ClassLabel: {self.key!r} holds whole numbers from 0 to {self.rows - 1}, got "
                            f"{', '.join(map(str, wrong[:5].tolist()))}")
        e = self.embedding(labels.to(self.embedding.weight.device))
        return Cond(vector=e) if self.to_vector else Cond(tokens=e[:, None])
