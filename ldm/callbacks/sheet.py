"""Contact sheets: pictures in rows with their captions underneath, as one PNG."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.common.files import atomic_write

CELL = 160  # pixels, the least width of a cell: smaller pictures are enlarged by a whole number
MARGIN, LINE, LETTER = 8, 13, 6.3  # pixels: between cells, height of a line of text, mean width of a letter
LINES = 4  # of a caption, at most
CHEQUER = 8  # pixels, the side of a square behind transparent pictures


def to_image(picture: Tensor) -> Image.Image:  # (C,H,W) in [-1,1]
    """8 bits: grey of 1 channel, RGB of 3, RGBA of 4; of any other number the channels as grey tiles, row by row."""
    pixels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if len(pixels) in (3, 4):
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    tiles = pixels.new_full((rows * columns, *pixels.shape[1:]), 255)
    tiles[: len(pixels)] = pixels
    return Image.fromarray(rearrange(tiles, "(r c) h w -> (r h) (c w)", c=columns).contiguous().numpy())


def sheet(pictures: Tensor, captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures (N,C,H,W) in [-1,1] row by row, each above its caption; about as wide as high if `columns` is None.
    What is transparent (C = 4) shows a chequered ground."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    images = [to_image(picture) for picture in pictures]
    side = max(1, math.ceil(CELL / images[0].width))
    width, height = side * images[0].width, side * images[0].height
    texts = [_lines(caption, int(width / LETTER)) for caption in captions]
    below = LINE * max(map(len, texts), default=0) + MARGIN // 2
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * (height + below + MARGIN)
        image = image.resize((width, height), Image.Resampling.NEAREST)
        if image.mode == "RGBA":
            image = Image.alpha_composite(chequered(width, height), image)
        page.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=(200, 200, 200))
        draw.multiline_text((x, y + height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page


def chequered(width: int, height: int) -> Image.Image:
    """Light and dark grey squares, opaque: what shows through transparent pictures."""
    dark = (torch.arange(height)[:, None] // CHEQUER + torch.arange(width) // CHEQUER) % 2
    return Image.fromarray((235 - 40 * dark).to(torch.uint8).numpy()).convert("RGBA")


def _lines(caption: str, letters: int) -> list[str]:
    return wrap(caption, letters, max_lines=LINES, placeholder=" ...")


def save_png(image: Image.Image, path: str | Path, about: dict) -> None:
    """`about`, plain data, goes into the text chunk `ldm`."""
    info = PngInfo()
    info.add_itxt("ldm", json.dumps(about))
    with atomic_write(path) as temporary:
        image.save(temporary, pnginfo=info)
