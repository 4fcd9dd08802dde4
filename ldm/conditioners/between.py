"""Conditions between two others: what interpolation walks along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.cond import Cond
from ldm.conditioners.base import Conditioner

Way = Literal["lerp", "slerp"]
TO, SHARE = "to/", "share"  # in a batch: what begins so belongs to the second condition; how far each sample is on the way


def lerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:  # (B,...) twice, (B,)
    """A straight line, from a at 0 to b at 1."""
    return torch.lerp(a, b, _wide(share, a))


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:  # (B,...) twice, (B,)
    """Along the great circle between the rows' directions: mixed noise keeps its standard deviation (Shoemake 1985; for
    diffusion 2010.02502, section 5.3).

        sin((1 - share) w) / sin w a + sin(share w) / sin w b,  w the angle between a and b

    Rows that point the same way, or opposite ways, lie on no such circle: they go along the straight line.
    """
    x, y = (row.flatten(1).double() for row in (a, b))
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1, eps=1e-30)
    w, share = cosine.clamp(-1, 1).acos(), share.to(a.device, torch.float64)
    straight = w.sin() < 1e-6
    sine = w.sin().where(~straight, 1.0)
    first = ((1 - share) * w).sin().div(sine).where(~straight, 1 - share)
    second = (share * w).sin().div(sine).where(~straight, share)
    return _wide(first, a) * a + _wide(second, a) * b


WAYS = {"lerp": lerp, "slerp": slerp}


def _wide(share: Tensor, like: Tensor) -> Tensor:
    return share.to(like).view(-1, *[1] * (like.ndim - 1))


def _token_by_token(way: Way, a: Tensor, b: Tensor, share: Tensor) -> Tensor:  # (B,L,D) twice, (B,)
    return WAYS[way](a.flatten(0, 1), b.flatten(0, 1), share.repeat_interleave(a.shape[1])).view_as(a)


def mixed(a: Cond, b: Cond, share: Tensor, way: Way = "lerp") -> Cond:
    """Conditions (B) and (B), share (B,): field by field; at 0 and 1 those themselves. A token that only one of two texts has
    fades in from zeros; the mask is that of both texts, at the ends that of one."""
    n = len(share)
    both = Cond.cat([a, b])  # of one length
    a, b = both[:n], both[n:]
    share = share if both.device is None else share.to(both.device)
    tokens = None if a.tokens is None else _token_by_token(way, a.tokens, b.tokens, share)
    mask = None if a.mask is None else (a.mask & (share < 1)[:, None]) | (b.mask & (share > 0)[:, None])
    vector = None if a.vector is None else WAYS[way](a.vector, b.vector, share)
    return Cond(tokens, mask, vector, None if a.spatial is None else lerp(a.spatial, b.spatial, share))


def replaced(batch: Mapping[str, Any], what: str | Mapping[str, Any]) -> dict[str, Any]:
    """The batch with other conditions: a text, or entries, each of them for all pictures; at both ends, where it has two."""
    n, given = len(batch["position"]), {"caption": what} if isinstance(what, str) else what
    rest = {key: value for key, value in batch.items() if key.removeprefix(TO) not in given}
    return rest | {key: [value] * n if isinstance(value, str) else torch.stack([torch.as_tensor(value)] * n)
                   for key, value in given.items()}  # fmt: skip


class Between(Conditioner):
    """A conditioner whose batch has two conditions of each sample, the second under keys that begin with TO, and SHARE (B,):
    how far it is from the first, 0, to the second, 1."""

    def __init__(self, conditioner: nn.Module, way: Way = "lerp"):
        super().__init__()
        self.inner, self.way = conditioner, way
        for name in ("width", "vector_width", "spatial_channels", "length", "dropout", "wants"):
            setattr(self, name, getattr(conditioner, name, None))
        keys = getattr(conditioner, "encodes", {})
        self.encodes = {f"{prefix}{key}": raw for prefix in ("", TO) for key, raw in keys.items()}

    @property
    def encoder_hash(self) -> str | None:
        return getattr(self.inner, "encoder_hash", None)

    @property
    def has_null(self) -> bool:
        return self.inner.has_null

    def picture(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        return self.inner.picture(key.removeprefix(TO), self._ends(batch)[key.startswith(TO)])

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        return mixed(*(self.inner(end) for end in self._ends(batch)), batch[SHARE], self.way)

    def with_null(self, batch: Mapping[str, Any]) -> tuple[Cond, Cond | None]:
        (a, null_a), (b, null_b) = (self.inner.with_null(end) for end in self._ends(batch))
        cond = mixed(a, b, batch[SHARE], self.way)
        return cond, None if null_a is None else mixed(null_a, null_b, batch[SHARE], self.way)

    def _ends(self, batch: Mapping[str, Any]) -> tuple[dict, dict]:
        own = {key: value for key, value in batch.items() if not key.startswith(TO)}
        return own, own | {key.removeprefix(TO): value for key, value in batch.items() if key.startswith(TO)}
