"""What is given for conditions -> rows of a batch: numbers, files, at the size of what is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import lcm
from typing import TYPE_CHECKING, Any

from ldm.app import pictures
from ldm.app.conditions import flag_of
from ldm.common.files import UserError, file_sha256

if TYPE_CHECKING:
    from ldm.bundle import Bundle
    from ldm.conditioners.wants import Want
    from ldm.tasks import Frame

PLAIN = ("text", "class", "number")  # kinds of conditions that are no files


@dataclass(frozen=True)
class Row:
    """One picture to be: entries of a batch without its first dimension, and what the picture is to say of them."""

    values: dict[str, Any]
    said: dict[str, Any]


def read(bundle: Bundle, wants: dict[str, Want], given: Mapping[str, Sequence[str]], size: Sequence[int] | None = None,
         fit: str = "error", margins: Sequence[int] = (0, 0, 0, 0)) -> tuple[list[Row], Frame]:
    """A row for each picture, and the frame in which they are drawn.

    Args:
        size: height and width of the pictures, to which what has their sides is cut and resized; None: the sides of that,
            and where there is none the size that is stored with the model.
        fit: see ``ldm.tasks.framed``.
        margins: left, top, right, bottom: the picture is drawn so much larger, see ``ldm.tasks.expanded``.
    """
    from ldm.tasks import expanded, framed

    factor, (left, top, right, bottom) = bundle.autoencoder.factor, margins
    wants = {key: replace(want, size=bundle.autoencoder.image_channels) if want.kind == "picture" and want.sides == "picture"
             and key in ("image", "masked_image") else want for key, want in wants.items()}  # fmt: skip
    inner = size or sides_of(wants, given, factor) or bundle.sampling.get("size")
    if inner is None:
        raise UserError("the checkpoint does not say at what size it was trained; give --height and --width")
    per = {key: scale_of(want, factor) for key, want in wants.items()}
    step = lcm(*(per[key] or 1 for key in given))
    try:
        frame = framed(bundle, inner[0] + top + bottom, inner[1] + left + right, fit, step)
    except UserError as error:
        raise UserError(f"{error}; --fit pad draws the next larger size and cuts out its middle") from error
    rows, n, known, sha256 = [], max(map(len, given.values()), default=1), {}, cache(file_sha256)
    for i in range(n):
        texts = {key: each[i if len(each) > 1 else 0] for key, each in given.items()}
        values: dict[str, Any] = {}
        for key, text in texts.items():
            place = (key, text, texts.get("image") if wants[key].kind == "mask" else None)
            if place not in known:
                known[place] = value_of(bundle, wants[key], text, [side // (per[key] or 1) for side in inner], texts)
            values |= known[place]
        if any(margins):
            image, mask = expanded(values["image"][None], *margins, values["mask"][None] if "mask" in values else None)
            values |= {"image": image[0], "mask": mask[0]}
        for key in (key for key in values if per.get(key)):
            values[key] = frame.pad(values[key], per[key])
        rows.append(Row(values, said_of(wants, texts, sha256)))
    return rows, frame


def scale_of(want: Want, factor: int) -> int | None:
    """Pixels of what is drawn for each of the picture that is given; None: it has sides of its own."""
    return {"picture": 1, "latent": factor, "any": None}.get(want.sides, want.sides)


def sides_of(wants: dict[str, Want], given: Mapping[str, Sequence[str]], factor: int) -> tuple[int, int] | None:
    """Height and width of what is drawn, by the pictures that have its sides; masks follow these."""
    found: dict[tuple[int, int], str] = {}
    for key, want in wants.items():
        scale = scale_of(want, factor)
        for path in given.get(key, ()) if scale and want.kind != "mask" else ():
            sides = pictures.size_of(path, want.size if want.kind == "picture" else 1)
            found.setdefault(tuple(side * scale for side in sides), path)
    if len(found) > 1:
        told = ", ".join(f"{path} {h} x {w}" for (h, w), path in found.items())
        raise UserError(f"pictures of several sizes, as height x width of what would be drawn: {told}; give --height and "
                        "--width, to which they are cut and resized")
    return next(iter(found), None)


def value_of(bundle: Bundle, want: Want, text: str, size: Sequence[int], texts: Mapping[str, str]) -> dict[str, Any]:
    """What a batch holds of one picture under the key, and under those that belong to it. size: of pictures that have no sides
    of their own; texts: all that is given for this picture."""
    import torch

    from ldm.app.judging import trained_on

    key, flag = want.key, flag_of(want.key)
    if want.kind == "text":
        return {key: text}
    if want.kind == "class":
        return {key: torch.tensor(numbers(text, flag, int)[0])}
    if want.kind == "number":
        return {key: torch.tensor(numbers(text, flag, float), dtype=torch.float32)}
    if want.kind == "boxes":
        return layout(text, want.size)
    if want.kind == "array":
        return {key: array(text)}
    if want.kind == "mask":
        of = pictures.size_of(texts["image"], bundle.autoencoder.image_channels) if "image" in texts else size
        return {key: pictures.mask(text, of, size)}
    if want.kind == "map":
        return {key: pictures.class_map(text, size)}
    if want.kind == "depth":
        return {key: pictures.depth(text, size)}
    own = None if want.sides == "any" else size
    return {key: pictures.picture(text, want.size, own, trained_on(bundle)["value_range"])}


def said_of(wants: dict[str, Want], texts: dict[str, str], sha256: Callable[[str], str]) -> dict[str, Any]:
    """What a picture says of its conditions. sha256: of a file."""
    said: dict[str, Any] = {"prompt": texts["caption"]} if "caption" in texts else {}
    plain, files = {}, {}
    for key, text in texts.items():
        if wants[key].kind not in PLAIN:
            files[key] = {"path": text, "sha256": sha256(text)}
        elif key != "caption":
            kind = int if wants[key].kind == "class" else float
            found = numbers(text, flag_of(key), kind)
            plain[key] = found[0] if kind is int else found
    return said | ({"conditions": plain} if plain else {}) | ({"inputs": files} if files else {})


def numbers(text: str, flag: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        told = "a whole number" if kind is int else "numbers, with commas between them"
        raise UserError(f"{flag} {text}: expected {told}") from error


def layout(path: str, objects: int) -> dict[str, Any]:
    """"boxes" (objects,4) and "box_classes" (objects,), -1 where there are fewer."""
    import torch

    try:
        found = json.loads(pictures.contents(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    for one in found if isinstance(found, list) else [None]:
        sides = one.get("box") if isinstance(one, dict) else None
        whole = isinstance(sides, list) and len(sides) == 4 and all(isinstance(side, int | float) for side in sides)
        if not whole or not isinstance(one.get("class"), int):
            raise UserError(f'{path}: expected [{{"box": [left, top, right, bottom], "class": number}}, ...], got '
                            f"{str(one)[:80]}")
    n = max(objects, len(found))  # too many are refused by the model, which says so
    boxes, kinds = torch.zeros(n, 4), torch.full((n,), -1)
    for i, one in enumerate(found):
        boxes[i], kinds[i] = torch.tensor(one["box"]), one["class"]
    return {"boxes": boxes, "box_classes": kinds}


def array(path: str) -> Any:
    import io

    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(io.BytesIO(pictures.contents(path)), allow_pickle=False)).float()
    except (ValueError, EOFError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an array of numpy (.npy): {error}") from error


def stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows -> a batch."""
    import torch

    batch: dict[str, Any] = {}
    for key in rows[0]:
        column = [row[key] for row in rows]
        if not isinstance(column[0], torch.Tensor):
            batch[key] = column
        elif len({value.shape for value in column}) == 1:
            batch[key] = torch.stack(column)
        else:
            raise UserError(f"{flag_of(key)}: several sizes, which are not drawn in one batch; take --batch-size 1")
    return batch
