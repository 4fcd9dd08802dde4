"""What is done to texts before they are tokenized, as the tokenizers of published models do it."""

from __future__ import annotations

import html
import re
from unicodedata import normalize

ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
TERMINAL = re.compile("\x1b\\[[\\d;]*[a-zA-Z]")
_LIGATURES = [0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
_WIDE = [0x3000, *range(0xFF01, 0xFFF0)]  # full-width letters, half-width kana
_CONTROL = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
PLAIN = {
    **{code: normalize("NFKC", chr(code)) for code in [*_LIGATURES, *_WIDE]},
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **dict.fromkeys(_CONTROL),
    0xFB05: "\u017ft",  # the long s stays one
}  # fmt: skip


def open_clip(text: str) -> str:
    """As open_clip and OpenAI's CLIP clean: HTML entities, ligatures, wide letters and curled quotes become the plain
    characters that they stand for, control characters go, letters are small. Those two also repair text that was decoded
    wrongly ("schÃ¶n"); this does not."""
    before = None
    while text != before:
        before = text
        if "<" not in text:  # else it may be HTML, where an entity is meant
            text = ENTITY.sub(lambda found: html.unescape(found[0]), text)
        text = normalize("NFC", TERMINAL.sub("", text).translate(PLAIN))
    return html.unescape(html.unescape(text)).lower()


CLEANINGS = {"none": None, "open_clip": open_clip}
