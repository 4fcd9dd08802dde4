"""Pictures as files: where they may be written, and what they say of how they were made (JSON, a PNG's text chunk `ldm`)."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from ldm.common.files import UserError, atomic_write, parse_json

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SHEET, SHOWN = "sheet.png", 64  # the contact sheet, and how many pictures it shows at most


def check_free(files: list[Path], overwrite: bool) -> None:
    """UserError where a file would be lost, or cannot be written; before there is anything to write."""
    for file in files:
        standing = next(place for place in file.absolute().parents if place.exists())
        if not standing.is_dir():
            raise UserError(f"{standing}: is a file; expected a folder for what is written, or the name of a new one")
        if not os.access(standing, os.W_OK):
            raise UserError(f"{standing}: nothing can be written here; give another folder")
        if file.is_dir():
            raise UserError(f"{file}: is a folder; expected the name of a file")
    taken = [file for file in files if file.exists()]
    if taken and not overwrite:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise UserError(f"{taken[0]}: is there already{more}; give another --outdir, or --overwrite to replace it")


def is_png(path: str | Path) -> bool:
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def write(path: str | Path, image: Image.Image, about: dict | None) -> None:
    """Whole or not at all; with `about`, plain data, as its metadata."""
    if about is None:
        with atomic_write(path) as temporary:
            image.save(temporary)
    else:
        from ldm.callbacks.sheet import save_png

        save_png(image, path, about)


def read(path: str | Path) -> dict:
    """The metadata of a picture. UserError where there is none, or no PNG."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    from ldm.data.transforms import BrokenImage, opened, small_enough, told

    try:
        with told(), opened(Path(path).read_bytes()) as image:
            small_enough(image)
            image.load()  # text may stand behind the pixels
            text = getattr(image, "text", {}).get("ldm")
    except BrokenImage as error:
        raise UserError(f"{path}: not a PNG that can be read ({error})") from error
    if text is None:
        raise UserError(f"{path}: a picture without metadata of this program (text chunk `ldm`); was it made with "
                        "--no-metadata, or saved again by another program?")
    about = parse_json(text, f"{path}: its metadata (text chunk `ldm`)")
    if not isinstance(about, dict):
        raise UserError(f"{path}: its metadata (text chunk `ldm`) is no JSON object")
    return about
