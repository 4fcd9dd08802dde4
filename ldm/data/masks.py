"""Masks to learn inpainting with: rectangles, strokes, one side of the picture, all of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.data.add import Add


def rectangles(draw: ImageDraw.ImageDraw, width: int, height: int, chance: random.Random) -> None:
    """One to four, each side a tenth to a half of the picture's."""
    for _ in range(chance.randint(1, 4)):
        w, h = (max(1, round(side * chance.uniform(0.1, 0.5))) for side in (width, height))
        x, y = chance.randint(0, width - w), chance.randint(0, height - h)
        draw.rectangle((x, y, x + w - 1, y + h - 1), fill=1)


def strokes(draw: ImageDraw.ImageDraw, width: int, height: int, chance: random.Random) -> None:
    """One to five thick lines that bend a few times (as LaMa, 2109.07161, draws them)."""
    for _ in range(chance.randint(1, 5)):
        thick = max(2, round(min(width, height) * chance.uniform(0.05, 0.25)))
        x, y, angle = chance.uniform(0, width), chance.uniform(0, height), chance.uniform(0, 2 * math.pi)
        for _ in range(chance.randint(1, 5)):
            angle += chance.uniform(-1, 1) * math.pi / 2
            length = min(width, height) * chance.uniform(0.1, 0.4)
            to = x + length * math.cos(angle), y + length * math.sin(angle)
            draw.line((x, y, *to), fill=1, width=thick)
            draw.ellipse((to[0] - thick / 2, to[1] - thick / 2, to[0] + thick / 2, to[1] + thick / 2), fill=1)
            x, y = to


def side(draw: ImageDraw.ImageDraw, width: int, height: int, chance: random.Random) -> None:
    """A fifth to three fifths of the picture, from one edge: outpainting."""
    share = chance.uniform(0.2, 0.6)
    x, y = round(width * share), round(height * share)
    left, top = (0, 0, x - 1, height), (0, 0, width, y - 1)
    right, bottom = (width - x, 0, width, height), (0, height - y, width, height)
    draw.rectangle(chance.choice([left, right, top, bottom]), fill=1)


def whole(draw: ImageDraw.ImageDraw, width: int, height: int, chance: random.Random) -> None:
    """All of it: what is learned is to make pictures without any."""
    draw.rectangle((0, 0, width, height), fill=1)


KINDS: dict[str, Callable] = {"rectangles": rectangles, "strokes": strokes, "side": side, "whole": whole}
SHARES = {"rectangles": 0.35, "strokes": 0.35, "side": 0.15, "whole": 0.15}


def random_mask(height: int, width: int, chance: random.Random, shares: dict[str, float] | None = None) -> Tensor:
    """(1,height,width) float32, 1 where the model is to paint; of a kind drawn with these shares."""
    shares = SHARES if shares is None else shares
    kind = chance.choices(list(shares), list(shares.values()))[0]
    image = Image.new("L", (width, height))
    KINDS[kind](ImageDraw.Draw(image), width, height, chance)
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy())[None]


class AddMask(Add):
    """"mask" (1,H,W), another at each time that a picture is seen.

    Args:
        shares: how often each kind of mask is drawn, {"rectangles": 0.5, "whole": 0.5}; None: SHARES.
    """

    def __init__(self, dataset: Dataset, shares: dict[str, float] | None = None):
        super().__init__(dataset)
        self.shares = dict(SHARES if shares is None else shares)
        if unknown := next((kind for kind in self.shares if kind not in KINDS), None):
            raise UserError(f"shares: no masks {unknown!r}{near(unknown, KINDS)}; there are {', '.join(KINDS)}")
        if min(self.shares.values(), default=0) < 0 or not sum(self.shares.values()) > 0:
            raise UserError(f"shares: {self.shares}; each is a number from 0, and one of them is above 0")
        self.settings = [self.shares]

    def more(self, i: int, item: dict) -> dict:
        chance = random.Random(random.getrandbits(64))
        return {"mask": random_mask(*item["image"].shape[-2:], chance, self.shares)}

    def told(self) -> str:
        return "masks: " + ", ".join(f"{kind} {share / sum(self.shares.values()):.0%}" for kind, share in self.shares.items())
