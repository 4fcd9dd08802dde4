"""Maps that lie beside pictures in a folder of their own: classes, depths, other pictures."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.common.files import UserError
from ldm.data.add import Add, place, plain_key
from ldm.data.arrays import BrokenImage, is_array, read_array
from ldm.data.transforms import middle, opened, prepare, small_enough, told

SUFFIXES = (".png", ".npy", ".npz", ".tif", ".tiff", ".jpg", ".jpeg", ".webp")


class AddMap(Add):
    """A map of each picture, from ``root``/<the picture's path, with any ending>: cut and resized as the picture is.

    Args:
        key: what it is called in the batch: segmentation, depth, or the name of a picture.
        kind: "classes": numbers (size,size), not mixed by resizing; "depth": (1,size,size) in [-1,1]; "picture": (3,...).
        nothing: number of a class that means none, and becomes -1.
        value_range: of depths and pictures, see ``ldm.data.pictures``.
    """

    def __init__(self, dataset: Dataset, root: str, key: str = "segmentation",
                 kind: Literal["classes", "depth", "picture"] = "classes", nothing: int | None = 255,
                 value_range: list[float] | None = None):
        super().__init__(dataset)
        self.folder, self.map_key, self.kind = Path(root).expanduser(), key, kind
        self.nothing, self.range = nothing, value_range
        if not self.folder.is_dir():
            raise UserError(f"{root}: no such folder; it is to hold a map for each picture")
        keys = dict.fromkeys(plain_key(dataset, i)[0] for i in range(len(dataset)))
        there = {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in sorted(self.folder.rglob("*"))
                 if path.suffix.lower() in SUFFIXES}  # fmt: skip
        self.paths = {key: there.get(str(PurePosixPath(key).with_suffix(""))) or there.get(key) for key in keys}
        if lacking := [key for key, path in self.paths.items() if path is None]:
            raise UserError(f"{root}: {len(lacking):,} of {len(keys):,} pictures have no map: {', '.join(lacking[:5])}")
        stamps = [f"{path}\0{path.stat().st_size}" for path in self.paths.values()]
        self.settings = [key, kind, nothing, value_range, stamps]

    def more(self, i: int, item: dict) -> dict:
        key, mirrored = plain_key(self.dataset, place(self.dataset, i, item))
        data, size = self.paths[key].read_bytes(), self.dataset.size
        try:
            value = class_map(data, size, self.nothing) if self.kind == "classes" else prepare(
                data, size, 1 if self.kind == "depth" else 3, self.range)  # fmt: skip
        except (BrokenImage, OSError) as error:
            raise UserError(f"{self.paths[key]}: {error}") from error
        return {self.map_key: value.flip(-1) if mirrored else value}

    def told(self) -> str:
        return f"{self.map_key}: {len(self.paths):,} maps of {self.kind} from {self.folder}"


def class_map(data: bytes, size: int, nothing: int | None = None) -> Tensor:
    """-> (size,size) int64, the square in the middle of ``numbers_in`` a file, nearest pixels. Raises BrokenImage."""
    numbers = nearest(numbers_in(data), size, size)
    return numbers if nothing is None else numbers.masked_fill(numbers == nothing, -1)


def numbers_in(data: bytes) -> Tensor:
    """-> (H,W) int64 of a picture whose pixels are numbers (grey or palette, 8 or 16 bits), or of an array. Raises
    BrokenImage."""
    if is_array(data):
        numbers = read_array(data, 1)[..., 0]
    else:
        with told(), opened(data) as image:
            small_enough(image)
            if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                raise BrokenImage(f"a map of classes has one number a pixel (grey or palette), this is {image.mode}")
            numbers = np.asarray(image)
    return torch.from_numpy(numbers.astype(np.int64))


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """(...,H,W) -> (...,height,width): the part in the middle that has this shape, the pixel under the middle of each."""
    top, left, h, w = middle(*x.shape[-2:], height, width)
    rows, columns = ((2 * torch.arange(side) + 1) * part // (2 * side) for side, part in ((height, h), (width, w)))
    return x[..., top + rows, :][..., left + columns]
