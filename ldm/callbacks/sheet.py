"""Contact sheets: pictures in rows with their captions underneath, as one PNG."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.common.files import atomic_write

CELL = 160  # pixels, the least width of a cell: smaller pictures are enlarged by a whole number
MARGIN, LINE, LETTER = 8, 13, 6.3  # pixels: between cells, height of a line of text, mean width of a letter
LINES = 4  # of a caption, at most


def to_image(picture: Tensor) -> Image.Image:  # (3 or 1,H,W) in [-1,1]
    pixels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def sheet(pictures: Tensor, captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures (N,3,H,W) in [-1,1] row by row, each above its caption; about as wide as high if `columns` is None."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    side = max(1, math.ceil(CELL / pictures.shape[3]))
    width, height = side * pictures.shape[3], side * pictures.shape[2]
    texts = [_lines(caption, int(width / LETTER)) for caption in captions]
    below = LINE * max(map(len, texts), default=0) + MARGIN // 2
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        x, y = MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * (height + below + MARGIN)
        page.paste(to_image(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline=(200, 200, 200))
        draw.multiline_text((x, y + height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page


def _lines(caption: str, letters: int) -> list[str]:
    return wrap(caption, letters, max_lines=LINES, placeholder=" ...")


def save_png(image: Image.Image, path: str | Path, about: dict) -> None:
    """`about`, plain data, goes into the text chunk `ldm`."""
    info = PngInfo()
    info.add_itxt("ldm", json.dumps(about))
    with atomic_write(path) as temporary:
        image.save(temporary, pnginfo=info)
