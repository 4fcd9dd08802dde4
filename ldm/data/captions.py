"""Where a folder's captions are: every layout that we know, found by itself and told in the report.

jsonl, csv, parquet: metadata.jsonl or captions.jsonl (.csv, .parquet) with a column image, file_name, path or filename,
    and a column caption, text or prompt. Paths are relative to the table's folder; it may be a subfolder.
txt: a_fox.txt beside a_fox.png
names: "a_red_fox-003.png" -> "a red fox"
"auto" takes the first of these that is there, in this order.
"""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ldm.common.files import UserError, nearest, parse_json

Layout = Literal["auto", "txt", "names", "csv", "jsonl", "parquet"]
STEMS = ("metadata", "captions")
TABLES = ("jsonl", "csv", "parquet")
IMAGE_COLUMNS = ("image", "file_name", "path", "filename")
CAPTION_COLUMNS = ("caption", "text", "prompt")
COUNTER = re.compile(r"[\s_-]*\(?\d+\)?$")  # tells apart the files of one caption: fox-003, fox (2)


@dataclass
class Captions:
    of: dict[str, str]  # image -> caption, where there is one
    source: str  # for people: where they came from
    notes: list[str]  # lines for the report


def find_captions(root: Path, images: list[str], others: list[str], layout: Layout) -> Captions:
    """Captions of `images`; `others` are the other files of the folder (all relative to `root`).

    Raises UserError where the layout that was asked for is not there and where a table cannot be understood.
    """
    files = files_of(images, others)
    if layout == "auto":
        layout = next(name for name in (*TABLES, "txt", "names") if files[name])
    if not files[layout]:
        raise UserError(f"{root}: captions: {layout} was asked for, but {_absent(layout, others)}")
    used = set() if layout == "names" else set(files[layout])
    notes = [f"{path} is not a known name and was not read; did you mean {near}?" for path, near in typos(others)]
    if layout == "names":
        captions, source = {image: caption for image in images if (caption := from_name(image))}, "file names"
    elif layout == "txt":
        captions, source = from_texts(root, images, used, notes), ".txt files beside the images"
    else:
        captions, source = from_tables(root, images, files[layout], notes), ", ".join(files[layout])
    if unread := Counter(PurePosixPath(path).suffix or path for path in others if path not in used):
        notes.append(
            "other files, not read: " + ", ".join(f"{count:,} {kind}" for kind, count in unread.most_common(10))
        )
    return Captions(captions, source, notes)


def files_of(images: list[str], others: list[str]) -> dict[str, list[str]]:
    """-> layout -> the files which would hold the captions."""
    beside = {beside_of(image) for image in images}
    files = {"txt": [path for path in others if path in beside], "names": images}
    for kind in TABLES:
        by_stem = [[path for path in others if PurePosixPath(path).name == f"{stem}.{kind}"] for stem in STEMS]
        files[kind] = next(filter(None, by_stem), [])
    return files


def beside_of(image: str) -> str:
    return str(PurePosixPath(image).with_suffix(".txt"))


def from_name(image: str) -> str:
    return " ".join(re.sub(r"[_-]", " ", COUNTER.sub("", PurePosixPath(image).stem)).split())


def from_texts(root: Path, images: list[str], texts: Collection[str], notes: list[str]) -> dict[str, str]:
    captions, latin = {}, []
    for image in images:
        path = beside_of(image)
        if path in texts:
            text, utf = read_text(root / path)
            if not utf:
                latin.append(path)
            if text.split():
                captions[image] = " ".join(text.split())
    if latin:
        notes.append(f"{len(latin):,} caption files are not UTF-8 and were read as Latin-1: {', '.join(latin[:5])}")
    return captions


def from_tables(root: Path, images: list[str], tables: list[str], notes: list[str]) -> dict[str, str]:
    known, captions, lost, more, total = set(images), {}, [], set(), 0
    for table in tables:
        folder = PurePosixPath(table).parent
        for path, caption in rows(root / table, notes):
            total += 1
            image = inside(root, folder, path)
            if image not in known:
                lost.append(path)
            elif image in captions:
                more.add(image)
            elif caption.split():
                captions[image] = " ".join(caption.split())
    if total == len(lost):
        raise UserError(
            f"{root / tables[0]}: none of its {total:,} rows names an image of this folder"
            + (f"; the first is {lost[0]!r}, the folder has {images[0]!r}" if lost else "")
        )
    if lost:
        notes.append(f"{len(lost):,} rows name images that are not there: {', '.join(lost[:5])}")
    if more:
        notes.append(f"{len(more):,} images have several captions; the first is used: {', '.join(sorted(more)[:5])}")
    return captions


def inside(root: Path, folder: PurePosixPath, path: str) -> str:
    """-> a table's path as we name images: relative to root, forward slashes, no detours."""
    path = path.replace("\\", "/")
    if os.path.isabs(path):
        return PurePosixPath(os.path.relpath(path, root.absolute())).as_posix()
    return os.path.normpath(folder / path).replace(os.sep, "/")


def records(table: Path) -> Iterator[tuple[str, dict]]:
    """-> (where in the table, all columns) of each row of a .jsonl, .csv or .parquet file. Raises UserError."""
    if table.suffix == ".parquet":
        with _parquet(table) as file:
            yield from ((f"{table}, row {number}", row) for number, row in enumerate(_batches(table, file), start=1))
    else:
        text, _ = read_text(table)
        lines = _csv_rows(table, text) if table.suffix == ".csv" else _json_rows(table, text)
        yield from ((f"{table}:{number}", row) for number, row in lines)


def rows(table: Path, notes: list[str]) -> Iterator[tuple[str, str]]:
    """-> (image path, caption or "") of each row of a .jsonl, .csv or .parquet file. Raises UserError."""
    if table.suffix == ".parquet":
        yield from _parquet_rows(table)
        return
    text, utf = read_text(table)
    if not utf:
        notes.append(f"{table.name} is not UTF-8 and was read as Latin-1")
    for number, row in _csv_rows(table, text) if table.suffix == ".csv" else _json_rows(table, text):
        where = f"{table}:{number}"
        image, caption = columns(where, row)
        yield _cell(where, image, row[image]), _cell(where, caption, row[caption])


def _json_rows(table: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = parse_json(line, f"{table}:{number}")
            if not isinstance(row, dict):
                raise UserError(f"{table}:{number}: {type(row).__name__} found; one JSON object a line is expected")
            yield number, row


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{table}:{reader.line_num}: not CSV: {error}") from error


def _parquet(table: Path) -> Any:
    """-> the file, open. Raises UserError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{table}: to read it, install pyarrow: pip install pyarrow") from error
    try:
        return ParquetFile(table)
    except (ArrowException, OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{table}: not a Parquet file: {said}") from error


def _parquet_rows(table: Path) -> Iterator[tuple[str, str]]:
    with _parquet(table) as file:
        image, caption = columns(str(table), file.schema_arrow.names)
        for number, row in enumerate(_batches(table, file, [image, caption]), start=1):
            where = f"{table}, row {number}"
            yield _cell(where, image, row[image]), _cell(where, caption, row[caption])


def _batches(table: Path, file: Any, columns: list[str] | None = None) -> Iterator[dict]:
    """-> rows. UserError where they cannot be unpacked."""
    batches = file.iter_batches(columns=columns)
    while True:
        try:
            found = next(batches).to_pylist()
        except StopIteration:
            return
        except Exception as error:  # pyarrow passes on what its readers run into: OSError, ArrowInvalid, UnicodeDecodeError ...
            raise UserError(f"{table}: damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
        yield from found


def columns(where: str, names: Collection[str]) -> tuple[str, str]:
    """-> the column of the images and the one of the captions."""
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    if image and caption:
        return image, caption
    wanted = " or ".join([", ".join(IMAGE_COLUMNS)] * (not image) + [", ".join(CAPTION_COLUMNS)] * (not caption))
    lacking = (
        "the images' and the captions'" if not image and not caption else "the captions'" if image else "the images'"
    )
    raise UserError(f"{where}: no column is {lacking}; found: {', '.join(map(str, names))}; known: {wanted}")


def _cell(where: str, column: str, value: Any) -> str:
    if value is None or value != value:  # a gap in a table is None or NaN
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: column {column!r} holds {type(value).__name__}; text is expected")
    return str(value)


def read_text(path: Path) -> tuple[str, bool]:
    return decode_text(path.read_bytes())


def decode_text(data: bytes) -> tuple[str, bool]:
    """-> text, and whether it was UTF-8 (or UTF-16, which names itself) rather than taken for Latin-1."""
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"), True
    except UnicodeDecodeError:
        return data.decode("latin-1"), False


def typos(others: list[str]) -> Iterator[tuple[str, str]]:
    """-> files that look like a table of captions with a wrong name (metadata.json1), and the right name."""
    known = [f"{stem}.{kind}" for stem in STEMS for kind in TABLES]
    for path in others:
        name = PurePosixPath(path).name
        if name not in known and PurePosixPath(name.lower()).stem in STEMS and (near := nearest(name, known)):
            yield path, near


def _absent(layout: Layout, others: list[str]) -> str:
    names = " nor ".join(f"{stem}.{layout}" for stem in STEMS)
    found = ", ".join(sorted({PurePosixPath(path).name for path in others})[:5]) or "images only"
    return (
        "no image has a .txt file beside it" if layout == "txt" else f"there is no {names}"
    ) + f"; the folder has {found}"
