"""What is known of drawn shapes besides their captions: classes, boxes, maps of classes and of depth."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.data.add import Add
from ldm.data.boxes import padded
from ldm.data.shapes import COLOURS, SHAPES, SIDE, Scene, Shapes, coverage

What = Literal["class", "boxes", "segmentation", "depth"]
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]  # classes, by their numbers
OBJECTS = 2  # in one picture, at most


class AddDrawn(Add):
    """Around a ``Shapes``: "class" of the first figure, one of NAMES; "boxes" (2,4) and "box_classes" (2,) of all; a map
    "segmentation" (64,64) of 0, the background, and of classes from 1; "depth" (1,64,64), 0 far, figures nearer the later
    they are drawn, and domed.

    Args:
        also: which of them.
    """

    needs_picture = False

    def __init__(self, dataset: Shapes, also: list[What]):
        super().__init__(dataset)
        if unknown := next((what for what in also if what not in get_args(What)), None):
            raise UserError(f"also: no {unknown!r}{near(unknown, get_args(What))}; there are {', '.join(get_args(What))}")
        if not hasattr(dataset, "scene"):
            raise UserError(f"dataset: drawn shapes are expected (ldm.data.shapes.Shapes), got {type(dataset).__name__}")
        self.also = list(also)
        self.settings, self.named = [self.also], dict.fromkeys({"class", "boxes"} & {*also}, len(NAMES))

    def more(self, i: int, item: dict) -> dict:
        scene, found = self.dataset.scene(i), {}
        kinds = [NAMES.index(f"{noun.colour} {noun.shape}") for noun in scene.said.objects]
        if "class" in self.also:
            found["class"] = kinds[0]
        if "boxes" in self.also:
            found |= padded(boxes(scene), kinds, OBJECTS)
        if "segmentation" in self.also:
            found["segmentation"] = segmentation(scene, kinds)
        if "depth" in self.also:
            found["depth"] = depth(scene)
        return found

    def told(self) -> str:
        return f"with {', '.join(self.also)}; {len(NAMES)} classes"


def boxes(scene: Scene) -> torch.Tensor:  # (N,4), from the pixels that a figure touches
    found = []
    for figure in scene.figures:
        rows, columns, block = coverage(figure.shape, figure.x, figure.y, figure.radius)
        down, right = (np.flatnonzero(block.any(axis)) for axis in (1, 0))
        left, top = columns.start + right[0], rows.start + down[0]
        found.append([left, top, columns.start + right[-1] + 1, rows.start + down[-1] + 1])
    return torch.tensor(found, dtype=torch.float32) / SIDE


def segmentation(scene: Scene, kinds: list[int]) -> torch.Tensor:  # (64,64) int64
    found = np.zeros((SIDE, SIDE), np.int64)
    for figure, kind in zip(scene.figures, kinds, strict=True):
        rows, columns, block = coverage(figure.shape, figure.x, figure.y, figure.radius)
        found[rows, columns][block > 0.5] = kind + 1
    return torch.from_numpy(found)


def depth(scene: Scene) -> torch.Tensor:  # (1,64,64) float32 in 0..1
    found = np.zeros((SIDE, SIDE), np.float32)
    for number, figure in enumerate(scene.figures, start=1):
        rows, columns, block = coverage(figure.shape, figure.x, figure.y, figure.radius)
        y, x = np.ogrid[rows, columns]
        far = ((x + 0.5 - figure.x) ** 2 + (y + 0.5 - figure.y) ** 2) / (1.2 * figure.radius) ** 2
        dome = (number - 0.5 * far.clip(0, 1)) / len(scene.figures)
        found[rows, columns] = np.where(block > 0.5, dome, found[rows, columns])
    return torch.from_numpy(found)[None]
