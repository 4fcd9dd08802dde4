"""Which objects are where in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.common.files import UserError, parse_json
from ldm.data.add import Add, place, plain_key
from ldm.data.tables import column_of, complete, numbered, some


class AddBoxes(Add):
    """"boxes" (N,4), left, top, right, bottom in [0,1] of the square that is shown of a picture, and "box_classes" (N,), -1
    where there are fewer than N. What is outside is left out; of too many objects the largest stay.

    Args:
        objects: N.
        column: of the table, for each picture a list of {"box": [four numbers], "class": name or number}.
        unit: of the four numbers: "pixels" of the picture in its file, or "shares" of its width and height.
        corners: they are left, top, right, bottom; False: left, top, width, height.
        names: of the classes, in the order of their numbers; table: see ``ldm.data.tables``.
    """

    needs_picture = False

    def __init__(self, dataset: Dataset, objects: int, column: str = "objects", unit: Literal["pixels", "shares"] = "pixels",
                 corners: bool = True, names: list[str] | None = None, table: Path | None = None):
        super().__init__(dataset)
        self.objects, self.unit, self.corners = objects, unit, corners
        if not hasattr(dataset, "original"):
            raise UserError(f"dataset: boxes are of picture files, whose sizes are known; {type(dataset).__name__} has none")
        rows = complete(dataset, column_of(dataset, table, column), f"column {column!r}")
        rows = [parse_json(row, f"{plain_key(dataset, i)[0]}: column {column!r}") if isinstance(row, str) else row
                for i, row in enumerate(rows)]
        for i, row in enumerate(rows):
            for one in row:
                if not (isinstance(one, dict) and len(one.get("box", ())) == 4 and "class" in one):
                    raise UserError(f"{plain_key(dataset, i)[0]}: column {column!r} holds {{'box': [4 numbers], 'class': ...}} "
                                    f"for each object, got {one!r}")
        kinds, self.names = numbered([one["class"] for row in rows for one in row], names)
        kinds, counts = torch.tensor(kinds, dtype=torch.int64), [len(row) for row in rows]
        self.kinds = kinds.split(counts)
        self.boxes = torch.tensor([one["box"] for row in rows for one in row], dtype=torch.float32).reshape(-1, 4).split(counts)
        self.named = {"boxes": len(self.names)}
        self.settings = [objects, unit, corners, self.names, kinds.tolist(), [boxes.tolist() for boxes in self.boxes]]

    def more(self, i: int, item: dict) -> dict:
        at = place(self.dataset, i, item)
        height, width = self.dataset.original(at)
        boxes = self.boxes[at]
        if not self.corners:
            boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        if self.unit == "shares":
            boxes = boxes * torch.tensor([width, height, width, height])
        shown = cropped(boxes, height, width, mirrored=plain_key(self.dataset, at)[1])
        return padded(shown, self.kinds[at], self.objects)

    def told(self) -> str:
        return f"boxes: {sum(map(len, self.boxes)):,} objects of {len(self.names):,} classes: {some(self.names)}"


def cropped(boxes: Tensor, height: int, width: int, mirrored: bool = False) -> Tensor:
    """(N,4) in pixels of a picture -> in [0,1] of the square in its middle, cut off at its sides."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    boxes = ((boxes - torch.tensor([left, top, left, top])) / side).clamp(0, 1)
    return torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1) if mirrored else boxes


def padded(boxes: Tensor, kinds: Tensor | Sequence[int], objects: int) -> dict:  # (N,4), (N,)
    """-> "boxes" (objects,4), "box_classes" (objects,): those that can be seen, the largest if there are too many, in order."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = area.argsort(descending=True, stable=True)[: min(objects, int((area > 0).sum()))].sort().values
    out, classes = torch.zeros(objects, 4), torch.full((objects,), -1)
    out[: len(kept)], classes[: len(kept)] = boxes[kept], torch.as_tensor(kinds)[kept]
    return {"boxes": out, "box_classes": classes}
