"""Emoji: some 3,800 pictures with their Unicode names as captions, made from a font that most machines can install."""

import importlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ldm.common.files import UserError, atomic_write
from ldm.data.pictures import fraction
from ldm.data.transforms import flatten
from ldm.data.webdataset import WebDataset

SIDE, MARGIN = 64, 2  # pixels of a picture, and of its white border
PER_SHARD = 1000
VARIATION = "\N{VARIATION SELECTOR-16}"  # asks for colour; no glyph has it
FONT = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts",
                "~/Library/Fonts")  # fmt: skip
INSTALL = "install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji) or give the path of the font"

TONE = re.compile(r"\b(medium[ -](light|dark)|medium|light|dark) skin tone\b")
GENDER = re.compile(
    r"\b(and )?(old(er)? )?(man|woman|person|men|women|people|boy|girl|child|adult)\b(?!')"
    r"|\b(mrs\.|mx|santa)(?= claus)|\bfacing right\b"
)
MER = re.compile(r"\bmer(man|maid|person)\b")


class Emoji(Dataset[dict]):
    """Pictures like those of `make`: item {"image": (3,size,size) in [-1,1], "caption": the emoji's name, "key": str}.

    split: "held_out" is about `held_out_share` of the base names (see base_name) with all their variants, chosen by
        hash of `seed` and name; "train" the others. So no held-out picture is another skin tone, gender or direction
        of a training picture.
    match: of the split only those in whose names this is found, a regular expression (upper and lower case alike).
    """

    channels = 3

    def __init__(
        self,
        shards: str,
        size: int = SIDE,
        split: Literal["train", "held_out", "all"] = "train",
        held_out_share: float = 0.05,
        seed: int = 23,
        match: str | None = None,
    ) -> None:
        if not 0 <= held_out_share < 1:
            raise UserError(f"held_out_share: {held_out_share}; it takes a number from 0 to below 1, such as 0.05")
        self.pictures, self.split = WebDataset(shards, size), split
        held = [fraction(seed, base_name(caption)) < held_out_share for caption in self._captions()]
        try:
            wanted = re.compile(match or "", re.IGNORECASE)
        except re.error as error:
            raise UserError(f"match: {match!r} is no regular expression: {error}") from error
        self.pictures.keep([(split == "all" or out == (split == "held_out")) and bool(wanted.search(caption))
                            for out, caption in zip(held, self._captions(), strict=True)])  # fmt: skip
        if not len(self):
            named = "" if match is None else f" and has a name like {match!r}"
            raise UserError(f"{shards}: no picture is in the split {split!r}{named}: held_out_share is {held_out_share}")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict:
        return self.pictures[i]

    def caption(self, i: int) -> str:
        return self.pictures.caption(i)

    def identity(self, i: int) -> str:
        return self.pictures.identity(i)

    @property
    def fingerprint(self) -> str:
        return self.pictures.fingerprint

    def report(self) -> str:
        names = len({base_name(caption) for caption in self._captions()})
        return f"emoji, split {self.split}: {len(self):,} pictures of {names:,} base names\n{self.pictures.report()}"

    def _captions(self) -> Iterator[str]:
        return (self.caption(i) for i in range(len(self)))


def base_name(caption: str) -> str:
    """The name without skin tone, gender and direction: "woman cook medium light skin tone" -> "cook"."""
    name = MER.sub("mer", GENDER.sub(" ", TONE.sub(" ", caption.lower().replace(":", " ").replace(",", " "))))
    return " ".join(name.split()) or ("person" if GENDER.search(caption.lower()) else "skin tone")


def make(out: Path, font: Path | None = None, progress: Callable[[int, int], None] | None = None) -> str:
    """Draws every emoji of the font into WebDataset shards in `out` (made if absent), and returns a report.

    64x64 RGB over white, named by number and code points, with the Unicode CLDR short name as the caption: the fully
    qualified emoji and the skin tone and hair components. Shards of the same names are replaced, each at once.
    progress(done, total) is called after each picture. Raises UserError where the font or a package is missing.
    """
    bitmaps, sequences = Bitmaps(Path(font) if font else find_font()), named_sequences()
    drawn = [(sequence, name) for sequence, name in sequences if sequence in bitmaps]
    if not drawn:
        raise UserError(f"{bitmaps.path}: this font draws none of the {len(sequences):,} emoji; {INSTALL}")
    shards = [drawn[first : first + PER_SHARD] for first in range(0, len(drawn), PER_SHARD)]
    for number, shard in enumerate(shards):
        path = Path(out) / f"noto-emoji-{SIDE}-png-{number:03d}.tar"
        with atomic_write(path) as temporary, open(temporary, "wb") as file, _tar_writer(file) as tar:
            for place, (sequence, name) in enumerate(shard, start=number * PER_SHARD):
                key, image = f"{place:05d}_{codes(sequence)}", png(draw(bitmaps[sequence]))
                tar.write({"__key__": key, "png": image, "txt": name.encode()})
                if progress:
                    progress(place + 1, len(drawn))
    lacking = f"; it lacks {len(sequences) - len(drawn):,} of the {len(sequences):,} that have a name"
    return f"{out}: {len(drawn):,} emoji of {bitmaps.path} ({bitmaps.version}) in {len(shards)} shards{lacking}"


def named_sequences() -> list[tuple[str, str]]:
    """-> (characters, name) in the order of the `emoji` package, which is that of the English names."""
    data, status = _package("emoji").EMOJI_DATA, _package("emoji").STATUS
    wanted = (status["component"], status["fully_qualified"])
    return [(sequence, plain_name(entry["en"])) for sequence, entry in data.items() if entry["status"] in wanted]


def codes(sequence: str) -> str:  # "1f469-200d-1f373"
    return "-".join(f"{ord(character):x}" for character in sequence)


def plain_name(name: str) -> str:  # ":person_medium-dark_skin_tone:" -> "person medium dark skin tone"
    return name.strip(":").replace("_", " ").replace("-", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def draw(bitmap: bytes) -> Image.Image:
    """A bitmap of the font (136x128 PNG, transparent) -> SIDE x SIDE RGB: over white, squared, LANCZOS, bordered."""
    image = flatten(Image.open(io.BytesIO(bitmap)))
    inner = SIDE - 2 * MARGIN
    square = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    return ImageOps.expand(square.resize((inner, inner), Image.Resampling.LANCZOS), MARGIN, fill="white")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


class Bitmaps:
    """A CBDT font as a mapping from characters to PNG bytes. Only what emoji need: code points and ligatures."""

    def __init__(self, path: Path) -> None:
        ttlib = _package("fontTools.ttLib")
        try:
            font = ttlib.TTFont(path)
        except (OSError, ttlib.TTLibError) as error:
            raise UserError(f"{path}: not a font that can be read ({error}); {INSTALL}") from error
        if "CBDT" not in font:
            raise UserError(
                f"{path}: no CBDT table of bitmaps, as drawn outlines are; Debian's {FONT} has one; {INSTALL}"
            )
        self.path, self.glyph_of, self.version = path, font.getBestCmap(), f"{font['head'].fontRevision:.3f}"
        strikes = zip(font["CBLC"].strikes, font["CBDT"].strikeData, strict=True)
        self.bitmaps = max(strikes, key=lambda strike: strike[0].bitmapSizeTable.ppemY)[
            1
        ]  # glyph -> bitmap, the largest
        self.ligatures = dict(_ligatures(font)) if "GSUB" in font else {}

    def _glyph(self, sequence: str) -> str | None:
        glyphs = tuple(self.glyph_of.get(ord(character)) for character in sequence if character != VARIATION)
        return glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs)

    def __contains__(self, sequence: str) -> bool:
        return self._glyph(sequence) in self.bitmaps

    def __getitem__(self, sequence: str) -> bytes:
        return self.bitmaps[self._glyph(sequence)].imageData


def _ligatures(font: Any) -> Iterator[tuple[tuple[str, ...], str]]:  # glyphs in a row, the one that stands for them
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph


def find_font() -> Path:
    for folder in FONT_FOLDERS:
        if found := sorted(Path(folder).expanduser().rglob(FONT)):
            return found[0]
    raise UserError(f"{FONT} is in none of {', '.join(FONT_FOLDERS)}; {INSTALL}")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"making the emoji needs {package}: pip install fonttools emoji webdataset") from error


def _tar_writer(file: BinaryIO) -> Any:
    return _package("webdataset").TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
