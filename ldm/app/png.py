"""What a picture says of how it was made: JSON in the text chunk `ldm` of a PNG."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ldm.common.files import UserError, atomic_write, parse_json

SIGNATURE = b"\x89PNG\r\n\x1a\n"


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
    try:
        with Image.open(path) as image:
            image.load()  # text may stand behind the pixels
            text = getattr(image, "text", {}).get("ldm")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a PNG that can be read ({error})") from error
    if text is None:
        raise UserError(f"{path}: a picture without metadata of this program (text chunk `ldm`); was it made with "
                        "--no-metadata, or saved again by another program?")
    about = parse_json(text, f"{path}: its metadata (text chunk `ldm`)")
    if not isinstance(about, dict):
        raise UserError(f"{path}: its metadata (text chunk `ldm`) is no JSON object")
    return about
