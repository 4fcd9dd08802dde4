"""Columns of tables, and names as numbers, for the items of a data set.

Tables are .jsonl, .csv or .parquet, with a column for the picture (image, file_name, path, filename) and others. A picture is
named by its path, which counts from the table's folder, or by the item's key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch.utils.data import Dataset

from ldm.common.build import near
from ldm.common.files import UserError
from ldm.data.add import plain_key
from ldm.data.captions import IMAGE_COLUMNS, STEMS, TABLES, inside, records


def column_of(dataset: Dataset, table: Path | None, column: str) -> dict[str, Any]:
    """-> key -> value, of the rows that have one. table: None: the metadata or captions table in the data set's folder."""
    root = Path(getattr(dataset, "root", "."))
    if table is None:
        there = [root / f"{stem}.{kind}" for stem in STEMS for kind in TABLES if (root / f"{stem}.{kind}").is_file()]
        if not there:
            raise UserError(f"{root}: no metadata.jsonl, .csv or .parquet in this folder; name a table")
        table = there[0]
    table = Path(table)
    if not table.is_file() or table.suffix.removeprefix(".") not in TABLES:
        raise UserError(f"{table}: expected a table, {', '.join('.' + kind for kind in TABLES)}")
    folder, found = table.absolute().parent, {}
    beside = PurePosixPath(folder.relative_to(root.absolute())) if folder.is_relative_to(root.absolute()) else PurePosixPath()
    for where, row in records(table):
        image = next((name for name in IMAGE_COLUMNS if name in row), None)
        if image is None or column not in row:
            wanted = column if image else " or ".join(IMAGE_COLUMNS)
            raise UserError(f"{where}: no column {wanted}{near(column, row)}; it has {', '.join(row)}")
        if row[column] not in (None, ""):
            found[inside(root, beside, str(row[image]))] = row[column]
    return found


def complete(dataset: Dataset, found: Mapping[str, Any], what: str) -> list:
    """-> the value of each item, in order; a mirrored one has its picture's. UserError where there is none."""
    keys = [plain_key(dataset, i)[0] for i in range(len(dataset))]
    if lacking := list(dict.fromkeys(key for key in keys if found.get(key) is None)):
        raise UserError(f"{what}: {len(lacking):,} of {len(set(keys)):,} pictures have none: {', '.join(lacking[:5])}")
    return [found[key] for key in keys]


def numbered(values: Sequence[Any], names: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """Names or whole numbers -> numbers from 0, and the names by their numbers. names: None: all that there are, sorted;
    whole numbers stay."""
    texts = [str(value) for value in values]
    if names is None and all(text.isdigit() for text in texts):
        return [int(text) for text in texts], [str(n) for n in range(max(map(int, texts), default=-1) + 1)]
    names = sorted(set(texts)) if names is None else list(names)
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := sorted(set(texts) - numbers.keys()):
        raise UserError(f"names: {unknown[0]!r} is none of the {len(names):,}{near(unknown[0], names)}")
    return [numbers[text] for text in texts], names


def number(value: Any, column: str, key: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: column {column!r} holds {value!r}; a number is expected") from error


def some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + " ..." * (len(names) > most)
