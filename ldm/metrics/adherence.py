"""Prompt adherence on the drawn shapes: a picture is read without its caption, then compared with the caption.

The reader finds the background's colour at the border, parts what differs from it into connected objects, and gives
each object the name of the rendered template (shape, radius, place within a pixel) that its soft coverage resembles
most. It tolerates the slight blur and noise of an autoencoder; what is near no name gets None, which is never right.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.common.team import collected
from ldm.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDE,
    STEP,
    Description,
    coverage,
    evaluation_scenes,
)

COLOUR_TOLERANCE = 56.0  # RGB distance to the nearest name; the closest two names are 84 apart, uses shift by up to 10
DIFFERS = 34.0  # RGB distance from the background at which a pixel is not background
SPECK = 12  # pixels: less is not an object; the least of the drawn objects has 70
WIDEST = 32  # pixels: a component wider or taller than this is two objects
MEDIUM = (9.9, 11.1)  # pixels: radii between these are neither small nor large
LIKENESS = 0.965  # least resemblance with a template for a shape to have a name; drawings have 0.97 or more
BLOT = 0.6  # what resembles no template even so much is no object, and a picture with it has no count
MARGIN = 0.012  # least distance to the next best shape; drawings have 0.035, blurred by 1 px 0.02
WINDOW = 40  # pixels: side of a template
OFFSETS = 4  # templates per pixel and axis
RADII = np.arange(6.0, 15.6, 0.4)
ATTRIBUTES = ("background", "count", "colour", "shape", "size", "position", "all")


@dataclass(frozen=True)
class Seen:
    """One object in a picture; None where it has no name. Centre in pixels from the top left corner."""

    size: str | None
    colour: str | None
    shape: str | None
    x: float
    y: float
    radius: float
    likeness: float


@dataclass(frozen=True)
class Reading:
    background: str | None
    objects: tuple[Seen, ...]


def _pixels(image: np.ndarray | Tensor) -> np.ndarray:
    """-> float32 (64,64,3) in 0..255."""
    if isinstance(image, Tensor) and image.shape == (3, SIDE, SIDE) and image.is_floating_point():
        return ((image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray) and image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8:
        return image.astype(np.float32)
    got = f"{type(image).__name__} of {getattr(image, 'dtype', None)}, shape {tuple(getattr(image, 'shape', ()))}"
    wanted = f"a float tensor (3,{SIDE},{SIDE}) in [-1,1] or a uint8 array ({SIDE},{SIDE},3)"
    raise ValueError(f"the reader of drawn shapes takes {wanted}; got {got}")


def _name(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    distance = np.linalg.norm(np.array(list(palette.values())) - rgb, axis=1)
    return list(palette)[distance.argmin()] if distance.min() <= COLOUR_TOLERANCE else None


def _background(pixels: np.ndarray) -> np.ndarray:
    """The colour (3,) that most of the border has."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])
    palette = np.array(list(BACKGROUNDS.values()), np.float32)
    nearest = np.linalg.norm(border[:, None] - palette, axis=2).argmin(1)
    return np.median(border[nearest == np.bincount(nearest).argmax()], axis=0)


def _grown(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    for _ in range(steps):
        wide = np.pad(mask, 1)
        mask = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return mask


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a boolean (H,W), each as a boolean (H,W)."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the greatest label among its neighbours, then the label that label has got
        wide = np.pad(label, 1)
        around = np.maximum.reduce([wide[1:-1, 1:-1], wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]])
        around = np.append(0, np.where(mask, around, 0).ravel())
        grown = around[around[1:]].reshape(mask.shape)
        if (grown == label).all():
            return [label == name for name in np.unique(label[mask])]
        label = grown


def _parted(mask: np.ndarray) -> list[np.ndarray]:
    """A component, or its two halves where it is too long for one object: cut in its middle third, where narrowest."""
    ends = [np.flatnonzero(mask.any(1 - axis))[[0, -1]] for axis in (0, 1)]
    axis = int(np.argmax([high - low for low, high in ends]))
    low, high = ends[axis]
    if high - low < WIDEST:
        return [mask]
    third = (high - low) // 3
    cut = low + third + mask.sum(1 - axis)[low + third : high - third].argmin()
    first = np.expand_dims(np.arange(mask.shape[axis]) <= cut, 1 - axis)
    return [mask & first, mask & ~first]


@dataclass(frozen=True)
class _Templates:
    """Rendered shapes by their place within a pixel: cover (O*O,T,W*W), its squared norm (O*O,T), and what they are."""

    cover: np.ndarray
    norm: np.ndarray
    shape: np.ndarray  # (T,) index into SHAPES
    radius: np.ndarray  # (T,)
    drop: np.ndarray  # (T,) from the middle of the covered area up to the centre of the figure, pixels


@functools.cache
def _templates() -> _Templates:
    names = [(index, radius) for index in range(len(SHAPES)) for radius in RADII]
    drops = {}
    for index, shape in enumerate(SHAPES):
        rows, _, block = coverage(shape, 200, 200, 150, 400)
        drops[index] = ((np.arange(400)[rows] + 0.5) @ block.sum(1) / block.sum() - 200) / 150
    cover = np.zeros((OFFSETS, OFFSETS, len(names), WINDOW, WINDOW), np.float32)
    for down in range(OFFSETS):
        for right in range(OFFSETS):
            for k, (index, radius) in enumerate(names):
                x, y = WINDOW / 2 + right / OFFSETS, WINDOW / 2 + down / OFFSETS - drops[index] * radius
                rows, columns, block = coverage(list(SHAPES)[index], x, y, radius, WINDOW)
                cover[down, right, k, rows, columns] = block
    for axis in (3, 4):  # as slightly blurred as an autoencoder leaves them, sigma 0.5
        cover = 0.75 * cover + 0.125 * (np.roll(cover, 1, axis) + np.roll(cover, -1, axis))
    cover = cover.reshape(OFFSETS**2, len(names), WINDOW**2)
    shape, radius = np.array([index for index, _ in names]), np.array([radius for _, radius in names])
    return _Templates(cover, (cover**2).sum(2), shape, radius, np.array([drops[index] for index in shape]) * radius)


def _likeness(soft: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best Dice resemblance 2ab / (aa + bb) of soft (H,W) with each template (T,) over small shifts; its x, y (T,)."""
    bank = _templates()
    down, right = np.meshgrid(np.arange(-1, 2), np.arange(-1, 2), indexing="ij")
    ys, xs = np.arange(len(soft)) + 0.5, np.arange(soft.shape[1]) + 0.5
    steps_y = np.rint(ys @ soft.sum(1) / soft.sum() * OFFSETS).astype(int) + down.ravel()  # middle, in template steps
    steps_x = np.rint(xs @ soft.sum(0) / soft.sum() * OFFSETS).astype(int) + right.ravel()
    wide = np.pad(soft, WINDOW // 2 + 1)
    scores = np.empty((9, len(bank.shape)), np.float32)
    for k, (y, x) in enumerate(zip(steps_y, steps_x, strict=True)):
        top, left = y // OFFSETS + 1, x // OFFSETS + 1
        patch = wide[top : top + WINDOW, left : left + WINDOW].ravel()
        place = y % OFFSETS * OFFSETS + x % OFFSETS
        scores[k] = 2 * (bank.cover[place] @ patch) / (bank.norm[place] + (soft**2).sum())
    best = scores.argmax(0)
    return scores.max(0), steps_x[best] / OFFSETS, steps_y[best] / OFFSETS - bank.drop


def _see(pixels: np.ndarray, mask: np.ndarray, others: np.ndarray, background: np.ndarray) -> Seen:
    """Name the object that covers `mask` (H,W); `others` (H,W) belongs to other objects."""
    away = pixels - background
    distance = np.linalg.norm(away, axis=2)
    purest = mask & (distance >= np.quantile(distance[mask], 0.75))  # a thin blurred shape is pure in few pixels
    rgb = np.median(pixels[purest], axis=0)
    axis = rgb - background
    share = away @ axis / max(axis @ axis, DIFFERS**2)  # (H,W): how far from the background's colour to the object's
    strange = np.linalg.norm(away - share[..., None] * axis, axis=2) > COLOUR_TOLERANCE
    soft = np.clip((share - 0.1) / 0.8, 0, 1) * (mask | _grown(mask, 2) & ~others) * ~strange  # less noise, less blur
    if soft.sum() < SPECK:  # no one colour: a blot
        y, x = np.argwhere(mask).mean(0) + 0.5
        return Seen(None, None, None, float(x), float(y), 0.0, 0.0)
    scores, xs, ys = _likeness(soft)
    bank = _templates()
    best = scores.argmax()
    rival = scores[bank.shape != bank.shape[best]].max()
    sure = scores[best] >= LIKENESS and scores[best] - rival >= MARGIN
    radius = float(bank.radius[best])
    return Seen(
        size="small" if radius <= MEDIUM[0] else "large" if radius >= MEDIUM[1] else None,
        colour=_name(rgb, COLOURS),
        shape=list(SHAPES)[bank.shape[best]] if sure else None,
        x=float(xs[best]),
        y=float(ys[best]),
        radius=radius,
        likeness=float(scores[best]),
    )


def read(image: np.ndarray | Tensor) -> Reading:
    """uint8 (64,64,3) or float (3,64,64) in [-1,1] -> what is in the picture, its objects in no particular order."""
    pixels = _pixels(image)
    if not np.isfinite(pixels).all():
        return Reading(None, ())
    background = _background(pixels)
    differs = np.linalg.norm(pixels - background, axis=2) > DIFFERS
    masks = [half for part in _components(differs) if part.sum() >= SPECK for half in _parted(part)]
    objects = np.any(masks, axis=0) if masks else differs
    return Reading(
        background=_name(background, BACKGROUNDS),
        objects=tuple(_see(pixels, mask, objects & ~mask, background) for mask in masks),
    )


# Comparing with the words.


def _placed(objects: tuple[Seen, ...], where: str) -> bool:
    if len(objects) == 1:
        middle = SIDE / 2
        distance = {
            place: math.dist((objects[0].x, objects[0].y), (middle + STEP * right, middle + STEP * down))
            for place, (right, down) in PLACES.items()
        }
        return min(distance, key=distance.get) == where
    right, down = objects[0].x - objects[1].x, objects[0].y - objects[1].y
    seen = (np.sign(right), 0) if abs(right) > abs(down) else (0, np.sign(down))
    return seen == RELATIONS[where]


def _compare(objects: tuple[Seen, ...], said: Description) -> dict[str, bool]:
    pairs = list(zip(objects, said.objects, strict=True))
    return {
        "colour": all(seen.colour == noun.colour for seen, noun in pairs),
        "shape": all(seen.shape == noun.shape for seen, noun in pairs),
        "size": all(seen.size == noun.size for seen, noun in pairs),
        "position": _placed(objects, said.where),
    }


def score(reading: Reading, said: Description) -> dict[str, bool]:
    """Which of ATTRIBUTES the picture has right. A wrong count makes all that is said of the objects wrong.

    Two objects are matched with the two nouns in the order that makes most right; every attribute, the position too,
    is judged in that one order.
    """
    countable = all(seen.likeness >= BLOT for seen in reading.objects)
    right = {
        "background": reading.background == said.background,
        "count": countable and len(reading.objects) == len(said.objects),
    }
    about = dict.fromkeys(("colour", "shape", "size", "position"), False)
    if right["count"]:
        orders = (reading.objects, reading.objects[::-1])
        about = max((_compare(order, said) for order in orders), key=lambda same: sum(same.values()))
    right |= about
    return right | {"all": all(right.values())}


def evaluate(
    generate: Callable[[list[str]], Sequence[np.ndarray] | Tensor | None],
    *,
    n: int = 256,
    n_held_out: int = 128,
    exclude_captions: Collection[str] = (),
    seed: int = 0,
    batch: int = 64,
) -> dict[str, dict[str, float]]:
    """Adherence of a generator: for each group of captions their number and the share with each attribute right.

    generate: up to `batch` captions -> as many pictures that `read` takes; None where another process draws them. Half of the
    n captions have one object, half two; they differ from each other, are in no training split and not in `exclude_captions`.
    The n_held_out captions have one object of a colour and shape never seen together in training.
    """
    groups = {
        "one object": dict(n=n // 2, objects="one"),
        "two objects": dict(n=n - n // 2, objects="two"),
        "held-out pair, one object": dict(n=n_held_out, objects="one", held_out="only"),
    }
    table = {}
    for name, kind in groups.items():
        said = [scene.said for scene in evaluation_scenes(**kind, exclude=exclude_captions, seed=seed)]
        rows = []
        for start in range(0, len(said), batch):
            some = said[start : start + batch]
            images = generate([str(one) for one in some])
            rows += [score(read(image), one) for image, one in zip(images, some, strict=True)] if images is not None else []
        rows = collected(rows)
        if rows:
            shares = {attribute: sum(row[attribute] for row in rows) / len(rows) for attribute in ATTRIBUTES}
            table[name] = {"captions": len(rows)} | shares
    return table


def format_table(table: dict[str, dict[str, float]]) -> str:
    """One line for each group: number of captions, then the share of each attribute in percent."""
    width = max(len("captions"), *map(len, table))
    lines = [" " * width + "  captions  " + "  ".join(f"{name:>10}" for name in ATTRIBUTES)]
    for group, row in table.items():
        shares = "  ".join(f"{100 * row[name]:9.1f}%" for name in ATTRIBUTES)
        lines.append(f"{group:<{width}}  {row['captions']:>8}  {shares}")
    return "\n".join(lines)
