"""Which objects are where, as tokens: boxes (B,N,4), left, top, right, bottom in [0,1], with their classes (B,N), -1 where a
picture has fewer than N."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.files import UserError
from ldm.common.limits import limits
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, check_dropout, tensor
from ldm.conditioners.transformer import TextTransformer
from ldm.conditioners.wants import Want


def layout(batch: Mapping[str, Any], classes: int, objects: int, owner: nn.Module) -> tuple[Tensor, Tensor]:
    """"boxes" and "box_classes" of the batch -> (B,objects,4), (B,objects) with -1 for padding, at the end. UserError for
    boxes outside of the picture, unknown classes, too many objects."""
    kinds = tensor(batch, "box_classes", owner, (None,)).long()
    boxes = tensor(batch, "boxes", owner, (kinds.shape[1], 4)).float()
    real = kinds >= 0
    name = type(owner).__name__
    if (wrong := kinds[(kinds < -1) | (kinds >= classes)]).numel():
        raise UserError(f"{name}: 'box_classes' holds classes from 0 to {classes - 1}, or -1, got {wrong[0].item()}")
    inside = ((boxes >= 0) & (boxes <= 1)).all(-1) & (boxes[..., :2] <= boxes[..., 2:]).all(-1)
    if (wrong := boxes[real & ~inside]).numel():
        sides = [round(x, 4) for x in wrong[0].tolist()]
        raise UserError(f"{name}: 'boxes' are left, top, right, bottom in [0,1], got {sides}")
    if (most := int(real.sum(1).max())) > objects:
        raise UserError(f"{name}: {most} objects in one picture; it takes {objects} at most")
    order = (~real).long().argsort(dim=1, stable=True)[:, :objects]
    kinds, boxes = kinds.gather(1, order), boxes.gather(1, order[..., None].expand(-1, -1, 4))
    missing = objects - kinds.shape[1]
    return nn.functional.pad(boxes, (0, 0, 0, missing)), nn.functional.pad(kinds, (0, missing), value=-1)


def boxes_wanted(classes: int, objects: int) -> tuple[Want, ...]:
    return (Want("boxes", "boxes", f"boxes of classes 0 to {classes - 1}, {objects} at most", objects, classes),)


def box_tokens(boxes: Tensor, kinds: Tensor, vocabulary: int, crop: bool = True) -> Tensor:
    """(B,N,4), (B,N) -> (B,3N + 2) token ids: class, top left corner, bottom right corner of each object, then the corners of
    the part of the picture that is shown, all of it (LDM's layouts, after 2012.09841).

    A corner is the number of its cell, row by row, in a square grid of at most ``vocabulary`` cells; the last token of the
    vocabulary, three times, is no object.
    """
    side = int(vocabulary**0.5)
    cell = (boxes * (side - 1)).round().long()
    corners = [cell[..., 1] * side + cell[..., 0], cell[..., 3] * side + cell[..., 2]]
    triples = torch.stack([kinds, *corners], dim=-1)
    ids = torch.where(kinds[..., None] < 0, vocabulary - 1, triples).flatten(1)
    whole = ids.new_tensor([0, side * side - 1]).expand(len(ids), 2)
    return torch.cat([ids, whole], dim=1) if crop else ids


class BoxTokens(Conditioner):
    """Layouts as LDM reads them (2112.10752, section 4.3.2): a transformer, trained with the model, over ``box_tokens``.

    Args:
        classes: of objects.
        objects: in one picture, at most.
        vocabulary: how many tokens there are, for classes, cells and "no object".
        width, layers, heads, head_dim: of the transformer; its attention is heads * head_dim wide.
        crop: the shown part of the picture is part of the sequence.
        logits: keep the layer that the published checkpoint has and nobody uses, from states to tokens.
        dropout: share of samples that training gives no object; the null.
    """

    check_params = staticmethod(limits(classes=1, objects=1, width=1, layers=1, heads=1, head_dim=1, dropout=(0, 1)))

    def __init__(self, classes: int, objects: int = 30, vocabulary: int = 8192, width: int = 512, layers: int = 16,
                 heads: int = 8, head_dim: int = 64, crop: bool = True, logits: bool = False, dropout: float = 0.0):
        super().__init__()
        if not 1 <= classes < vocabulary:
            raise UserError(f"BoxTokens: classes {classes}, vocabulary {vocabulary}; every class is a token, one is left over")
        self.classes, self.objects, self.vocabulary, self.crop = classes, objects, vocabulary, crop
        self.width, self.length, self.dropout = width, 3 * objects + 2 * crop, check_dropout(dropout)
        self.transformer = TextTransformer(vocabulary, self.length, width, layers, heads, head_dim, 4 * width, bias=False,
                                           activation="gelu", causal=False)  # fmt: skip
        self.logits = nn.Linear(width, vocabulary).requires_grad_(False) if logits else None
        self.wants = boxes_wanted(classes, objects)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        return self.read(*layout(batch, self.classes, self.objects, self))

    def null(self, n: int) -> Cond:
        nothing = self.read(torch.zeros(1, self.objects, 4), torch.full((1, self.objects), -1))
        return nothing.repeat_interleave(n)

    def read(self, boxes: Tensor, kinds: Tensor) -> Cond:
        ids = box_tokens(boxes, kinds, self.vocabulary, self.crop).to(self.transformer.position.device)
        return Cond(self.transformer.norm(self.transformer(ids)[-1]))

    def example(self, z: Tensor) -> Cond:
        """With the transformer, which is trained."""
        ids = torch.zeros(1, self.length, dtype=torch.long, device=z.device)
        return Cond(self.transformer.norm(self.transformer(ids)[-1]))


class Boxes(Conditioner):
    """A token for each object, from its class and its box (after GLIGEN, 2301.07093), behind a learned one that says that
    there may be none.

        token = mlp([class; sin(f_k b), cos(f_k b)]),  f_k = 100^(k / K), b = left, top, right, bottom

    Args:
        classes: of objects.
        objects: in one picture, at most.
        width: of the tokens.
        frequencies: K.
        dropout: share of samples that training gives no object; the null.
    """

    check_params = staticmethod(limits(classes=1, objects=1, width=1, frequencies=1, dropout=(0, 1)))

    def __init__(self, classes: int, objects: int, width: int, frequencies: int = 8, dropout: float = 0.0):
        super().__init__()
        self.classes, self.objects, self.frequencies = classes, objects, frequencies
        self.width, self.length, self.dropout = width, objects + 1, check_dropout(dropout)
        self.wants = boxes_wanted(classes, objects)
        self.nothing = nn.Parameter(0.02 * torch.randn(width))
        self.embedding = nn.Embedding(classes, width)
        self.mlp = nn.Sequential(nn.Linear(width + 8 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width))  # fmt: skip

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        boxes, kinds = (value.to(self.nothing.device) for value in layout(batch, self.classes, self.objects, self))
        steps = torch.arange(self.frequencies, device=boxes.device) / self.frequencies
        angles = (boxes[..., None] * 100**steps).flatten(2)  # (B,N,4K)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.nothing)
        tokens = self.mlp(torch.cat([self.embedding(kinds.clamp(min=0)), features], dim=-1))
        real, nothing = kinds >= 0, self.null(len(kinds))
        tokens = torch.cat([nothing.tokens, tokens.masked_fill(~real[..., None], 0)], dim=1)
        return Cond(tokens, torch.cat([nothing.mask, real], dim=1))

    def null(self, n: int) -> Cond:
        return Cond(self.nothing.expand(n, 1, -1), torch.ones(n, 1, dtype=torch.bool, device=self.nothing.device))
