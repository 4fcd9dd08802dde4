"""Drawn pictures with captions: as many as wanted, no download, and a picture's obedience can be read off it.

A picture is a pure function of (seed, index): one or two coloured figures on a plain 64x64 background. Some pairs of
colour and shape are held out of training (they measure composition), and so is every eighth caption (the evaluation
split), so that captions used for evaluation were never trained on, however large the training set is.
"""

import hashlib
import math
import random
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.common.files import UserError, digest, nearest

SIDE = 64
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "yellow": (250, 215, 50),
    "blue": (40, 80, 215),
    "pink": (250, 165, 190),
}
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 215),
    "yellow": (250, 215, 50),
    "purple": (140, 55, 175),
    "orange": (245, 135, 30),
    "white": (250, 250, 250),
    "black": (18, 18, 18),
}
SIZES = {"small": 8.0, "large": 13.0}  # radius in pixels
STEP = 16.0  # pixels from the middle of the picture to a place
PLACES = {
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "in the center": (0, 0),
}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # where the first of two is
HELD_OUT = {
    ("red", "star"),
    ("blue", "ring"),
    ("green", "triangle"),
    ("yellow", "cross"),
    ("purple", "square"),
    ("orange", "circle"),
}

HeldOut = Literal["exclude", "only", "any"]
Objects = Literal["mixed", "one", "two"]
Split = Literal["train", "evaluation", "any"]


@dataclass(frozen=True)
class Noun:
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Description:
    """What a caption says: one noun and its place, or two nouns and the relation of the first to the second."""

    objects: tuple[Noun, ...]
    where: str
    background: str

    def __str__(self) -> str:
        first, *second = map(str, self.objects)
        return " ".join([first, self.where, *second, f"on a {self.background} background"])


@dataclass(frozen=True)
class Figure:
    """One drawn object; pixels from the top left corner of the picture, y downwards."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    said: Description
    rgb: tuple[int, int, int]  # of the background
    figures: tuple[Figure, ...]


# Shapes: is (x, y), in units of the radius, inside? x (1,W) and y (H,1) broadcast; y grows downwards.


def _star(x: np.ndarray, y: np.ndarray, outer: float = 1.08, inner: float = 0.45) -> np.ndarray:
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)  # from the nearest point: ten edges become one
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_along, notch_across = inner * math.cos(fifth / 2), inner * math.sin(fifth / 2)
    return notch_across * (along - outer) <= (notch_along - outer) * across


SHAPES = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: (np.abs(x) <= 0.92) & (np.abs(y) <= 0.92),
    "triangle": lambda x, y: (np.abs(x) <= (y + 1) / 1.85) & (y <= 0.85),
    "star": _star,
    "cross": lambda x, y: (np.abs(x) <= 0.34) & (np.abs(y) <= 1) | (np.abs(y) <= 0.34) & (np.abs(x) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2),
}
REACH = 1.08  # of the widest shape, in radii
SAMPLES = 4  # per pixel and axis


def coverage(shape: str, x: float, y: float, radius: float, side: int = SIDE) -> tuple[slice, slice, np.ndarray]:
    """Share of each pixel that the shape covers: rows, columns and the float32 (rows, columns) block within them."""
    (rows, at_y), (columns, at_x) = _samples(y, radius, side), _samples(x, radius, side)
    inside = SHAPES[shape](at_x[None, :], at_y[:, None]).astype(np.float32)
    return rows, columns, inside.reshape(len(at_y) // SAMPLES, SAMPLES, -1, SAMPLES).mean((1, 3))


def _samples(centre: float, radius: float, side: int) -> tuple[slice, np.ndarray]:
    """Along one axis: the pixels that a shape may touch, and where in the shape their samples lie, in radii."""
    low, high = max(0, math.floor(centre - REACH * radius)), min(side, math.ceil(centre + REACH * radius))
    position = (np.arange(low * SAMPLES, high * SAMPLES, dtype=np.float32) + 0.5) / SAMPLES
    return slice(low, high), (position - centre) / radius


def draw(scene: Scene) -> np.ndarray:
    """The picture: uint8 (64, 64, 3)."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = scene.rgb
    for figure in scene.figures:
        rows, columns, block = coverage(figure.shape, figure.x, figure.y, figure.radius)
        below = picture[rows, columns]
        picture[rows, columns] = below + block[..., None] * (np.asarray(figure.rgb, np.float32) - below)
    return np.rint(picture).astype(np.uint8)


# Descriptions, and scenes that obey them.


def reserved(said: Description) -> bool:
    """Whether this caption belongs to the evaluation split (one in eight does, whatever the seed)."""
    return hashlib.sha256(str(said).encode()).digest()[0] % 8 == 0


def holds_out(said: Description) -> bool:
    return any((noun.colour, noun.shape) in HELD_OUT for noun in said.objects)


def _allowed(said: Description, held_out: HeldOut, split: Split) -> bool:
    return (
        all(noun.colour != said.background for noun in said.objects)
        and (held_out == "any" or holds_out(said) == (held_out == "only"))
        and (split == "any" or reserved(said) == (split == "evaluation"))
    )


def scene(
    seed: int,
    index: int,
    *,
    held_out: HeldOut = "exclude",
    objects: Objects = "mixed",
    two_objects: float = 0.6,
    split: Split = "train",
) -> Scene:
    """Picture `index` of the endless data set `seed`; the other arguments are those of `Shapes`."""
    chance = random.Random(f"shapes/{seed}/{index}")

    def pick(choices):
        return list(choices)[int(chance.random() * len(choices))]

    count = {"one": 1, "two": 2}.get(objects) or (2 if chance.random() < two_objects else 1)
    while True:
        nouns = tuple(Noun(pick(SIZES), pick(COLOURS), pick(SHAPES)) for _ in range(count))
        said = Description(nouns, pick(PLACES if count == 1 else RELATIONS), pick(BACKGROUNDS))
        if _allowed(said, held_out, split):
            return obey(said, chance)


def obey(said: Description, chance: random.Random) -> Scene:
    """A scene of which the description is true; what words leave open is drawn from `chance`."""

    def shifted(rgb):
        shift = chance.randint(-6, 6)
        return tuple(min(255, max(0, value + shift)) for value in rgb)

    def figure(noun, right, down, jitter_x, jitter_y):
        x = SIDE / 2 + STEP * right + chance.uniform(-jitter_x, jitter_x)
        y = SIDE / 2 + STEP * down + chance.uniform(-jitter_y, jitter_y)
        return Figure(noun.shape, x, y, SIZES[noun.size] + chance.uniform(-0.8, 0.8), shifted(COLOURS[noun.colour]))

    if len(said.objects) == 1:
        figures = (figure(said.objects[0], *PLACES[said.where], 2.0, 2.0),)
    else:
        right, down = RELATIONS[said.where]
        jitter = (1.2, 5.0) if right else (5.0, 1.2)  # less along the axis that parts them than across it
        figures = tuple(
            figure(noun, sign * right, sign * down, *jitter) for noun, sign in zip(said.objects, (1, -1), strict=True)
        )
    return Scene(said, shifted(BACKGROUNDS[said.background]), figures)


def caption(scene: Scene) -> str:
    return str(scene.said)


def _any(words: Collection[str]) -> str:
    return f"({'|'.join(words)})"


_NOUN = f"a {_any(SIZES)} {_any(COLOURS)} {_any(SHAPES)}"
_BACKGROUND = f"on a {_any(BACKGROUNDS)} background"
_ONE = re.compile(f"{_NOUN} {_any(PLACES)} {_BACKGROUND}")
_TWO = re.compile(f"{_NOUN} {_any(RELATIONS)} {_NOUN} {_BACKGROUND}")


def parse(text: str) -> Description:
    """What the words of a caption say: parse(str(description)) == description."""
    plain = " ".join(text.lower().split()).rstrip(".")
    if match := _ONE.fullmatch(plain):
        *noun, where, background = match.groups()
        return Description((Noun(*noun),), where, background)
    if match := _TWO.fullmatch(plain):
        first, where, second, background = match.groups()[:3], match[4], match.groups()[4:7], match[8]
        return Description((Noun(*first), Noun(*second)), where, background)
    example = "a small red circle on the left on a white background"
    raise UserError(f"{text!r} is no caption of the drawn shapes; an example of one: {example!r}")


def evaluation_scenes(
    n: int, *, objects: Objects, held_out: HeldOut = "exclude", exclude: Collection[str] = (), seed: int = 0
) -> list[Scene]:
    """n scenes whose captions differ from each other, from every training caption and from those in `exclude`."""
    chosen: dict[str, Scene] = {}
    exclude = frozenset(exclude)
    split = "any" if held_out == "only" else "evaluation"  # held-out pairs never are in training captions
    index = latest = 0
    while len(chosen) < n and index - latest < 4000:  # so many in vain: there are no others
        candidate = scene(seed, index, held_out=held_out, objects=objects, split=split)
        if caption(candidate) not in chosen and caption(candidate) not in exclude:
            chosen[caption(candidate)] = candidate
            latest = index
        index += 1
    if len(chosen) < n:
        kind = f"objects={objects}, held_out={held_out}"
        raise UserError(f"n={n}: there are only {len(chosen)} captions outside of training with {kind}")
    return list(chosen.values())


class Shapes(Dataset):
    """Pictures start .. start + count - 1 of the data set `seed`.

    held_out: what of the held-out pairs of colour and shape: "exclude" them, "only" pictures with one, or "any".
    split: "train" leaves out the captions kept for evaluation, "evaluation" has no others.
    two_objects: share of pictures with two objects where `objects` is "mixed".
    """

    size = SIDE  # no option: the pictures are the measure

    def __init__(
        self,
        count: int = 20000,
        seed: int = 0,
        held_out: HeldOut = "exclude",
        objects: Objects = "mixed",
        two_objects: float = 0.6,
        start: int = 0,
        split: Split = "train",
    ):
        choices = {"held_out": (held_out, HeldOut), "objects": (objects, Objects), "split": (split, Split)}
        for name, (given, kind) in choices.items():
            if given not in get_args(kind):
                near = nearest(str(given), get_args(kind)) or get_args(kind)[0]
                raise UserError(f"Shapes.{name}: {given!r} is none of {', '.join(get_args(kind))}; try {near!r}")
        if count < 1 or start < 0 or not 0 <= two_objects <= 1:
            given = f"count={count}, start={start}, two_objects={two_objects}"
            raise UserError(f"Shapes: {given}: count must be positive, start at least 0, two_objects a share")
        self.count, self.seed, self.start = count, seed, start
        self.options = {"held_out": held_out, "objects": objects, "two_objects": float(two_objects), "split": split}

    def __len__(self) -> int:
        return self.count

    def scene(self, i: int) -> Scene:
        if not 0 <= i < self.count:
            raise IndexError(f"picture {i} of a Shapes data set of {self.count}")
        return scene(self.seed, self.start + i, **self.options)

    def __getitem__(self, i: int) -> dict:
        drawn = self.scene(i)
        image = torch.from_numpy(draw(drawn).transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1  # (3,64,64) in [-1,1]
        return {"image": image, "caption": caption(drawn), "key": self.key(i)}

    def caption(self, i: int) -> str:
        return caption(self.scene(i))

    def key(self, i: int) -> str:
        return f"{self.seed}-{self.start + i:08d}"

    def identity(self, i: int) -> str:
        return digest("shapes", repr(self.scene(i)))

    @property
    def fingerprint(self) -> str:
        return digest("shapes", {"count": self.count, "seed": self.seed, "start": self.start, **self.options})

    def report(self) -> str:
        origin = f"seed {self.seed}, from {self.start} on"
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"drawn shapes: {self.count} images of {SIDE}x{SIDE} with captions, {origin}\n{options}"
