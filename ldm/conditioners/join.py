"""Several conditioners as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.files import UserError, digest
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, Draw, check_dropout
from ldm.conditioners.wants import united, wants_of

TEXT = ("encode", "states_hash", "null_states", "release", "dropped_words", "max_length")  # of one that caches


class Join(Conditioner):
    """The fields of all parts side by side; each part is dropped by itself.

    Args:
        parts: conditioners.
        tokens: one after the other ("sequence": all have the same width), or beside one another ("width").
        dropout: share of samples that training gives the null of all parts at once, beside what each part drops.

    Vectors and spatial conditions stand side by side, in the order of the parts. In training part i draws from streams of
    its own ("drop/0", "drop/1", ...). Where exactly one part keeps text states in a cache, the join does so through it.
    """

    def __init__(self, parts: list[Conditioner], tokens: Literal["sequence", "width"] = "sequence", dropout: float = 0.0):
        super().__init__()
        self.parts, self.tokens, self.dropout = nn.ModuleList(parts), tokens, check_dropout(dropout)
        if not parts:
            raise UserError("Join: parts are conditioners, one or more")
        widths = [part.width for part in parts if part.width is not None]
        if tokens == "sequence" and len(set(widths)) > 1:
            raise UserError(f"Join: tokens one after the other have one width, got {', '.join(map(str, widths))}; give the "
                            "parts the same width, or take tokens: width")
        self.width = (sum(widths) if tokens == "width" else widths[0]) if widths else None
        vectors = [part.vector_width for part in parts if part.vector_width is not None]
        self.vector_width = sum(vectors) if vectors else None
        self.spatial_channels = sum(part.spatial_channels for part in parts)
        self.encodes = _merged(parts)
        self.wants = united([wants_of(part) for part in parts])

    @property
    def encoder_hash(self) -> str | None:
        hashes = [part.encoder_hash for part in self.parts if part.encoder_hash is not None]
        return (hashes[0] if len(hashes) == 1 else digest(*hashes)) if hashes else None

    @property
    def has_null(self) -> bool:
        return self.dropout > 0 or any(part.has_null for part in self.parts)

    def prepare(self) -> None:
        for part in self.parts:
            if hasattr(part, "prepare"):
                part.prepare()

    def __getattr__(self, name: str) -> Any:
        if name in TEXT:
            caching = [part for part in self.parts if hasattr(part, name)]
            if len(caching) == 1:
                return getattr(caching[0], name)
        return super().__getattr__(name)

    def beside(self, channels: int) -> int:
        return sum(part.beside(channels) for part in self.parts)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        return self.joined([part(batch) for part in self.parts])

    def null(self, n: int) -> Cond:
        """Of all parts. UserError where one of them turns off only its share of a field: ``with_null`` knows the rest."""
        nulls, example = [part.null(n) for part in self.parts], [part.example(torch.empty(1, 1, 1, 1)) for part in self.parts]
        for name in ("tokens", "vector", "spatial"):
            turned_off = {getattr(null, name) is not None for null, of in zip(nulls, example, strict=True)
                          if getattr(of, name) is not None}  # fmt: skip
            if len(turned_off) > 1:
                raise UserError(f"Join: not every part turns off its share of the {name}; with_null(batch) gives the null "
                                "beside what stays")
        return self.joined(nulls)

    def with_dropout(self, batch: Mapping[str, Any], draw: Draw) -> Cond:
        conds = [part.with_dropout(batch, lambda stream, i=i: draw(f"{stream}/{i}")) for i, part in enumerate(self.parts)]
        if self.dropout:
            keep = draw("drop") >= self.dropout
            conds = [cond.where(keep, part.null(1)) for cond, part in zip(conds, self.parts, strict=True)]
        return self.joined(conds)

    def with_null(self, batch: Mapping[str, Any]) -> tuple[Cond, Cond | None]:
        pairs = [part.with_null(batch) for part in self.parts]
        cond = self.joined([cond for cond, _ in pairs])
        if all(null is None for _, null in pairs):
            return cond, None
        return cond, self.joined([cond if null is None else null for cond, null in pairs])

    def picture(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        return next(part for part in self.parts if key in part.encodes).picture(key, batch)

    def example(self, z: Tensor) -> Cond:
        return self.joined([part.example(z) for part in self.parts])

    def joined(self, conds: Sequence[Cond]) -> Cond:
        """One condition of several of the same samples."""
        text = [cond for cond in conds if cond.tokens is not None]
        if any(cond.mask is not None for cond in text):
            text = [cond if cond.mask is not None else replace(cond, mask=cond.tokens.new_ones(cond.tokens.shape[:2]).bool())
                    for cond in text]
        tokens, masks = [cond.tokens for cond in text], [cond.mask for cond in text if cond.mask is not None]
        if self.tokens == "width" and text:
            tokens, mask = _beside(tokens, masks)
        else:
            tokens, mask = _cat(tokens, 1), _cat(masks, 1)
        spatial = [cond.spatial for cond in conds if cond.spatial is not None]
        sizes = {each.shape[2:] for each in spatial if each.shape[2:] != (1, 1)}
        if len(sizes) > 1:
            raise UserError(f"Join: spatial conditions of several sizes, {', '.join('x'.join(map(str, s)) for s in sizes)}")
        spatial = [each.expand(-1, -1, *size) for each in spatial for size in sizes] or spatial
        return Cond(tokens, mask, _cat([cond.vector for cond in conds if cond.vector is not None], 1), _cat(spatial, 1))


def _beside(tokens: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Tokens side by side, zeros where one text is shorter; real is what is real in any of them."""
    length = max(each.shape[1] for each in tokens)
    tokens = torch.cat([F.pad(each, (0, 0, 0, length - each.shape[1])) for each in tokens], dim=2)
    if not masks:
        return tokens, None
    return tokens, torch.stack([F.pad(each, (0, length - each.shape[1])) for each in masks]).any(dim=0)


def _cat(values: Sequence[Tensor], dim: int) -> Tensor | None:
    return torch.cat(list(values), dim=dim) if values else None


def _merged(parts: Sequence[Conditioner]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for part in parts:
        for key, raw in part.encodes.items():
            if found.setdefault(key, raw) != raw:
                raise UserError(f"Join: one part wants {key!r} as raw latents and another at unit scale; give them two keys")
    return found
