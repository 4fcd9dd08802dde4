"""Classes and numbers that belong to pictures: from a table, from names of folders, from shards, from the files themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.add import Add, place, plain_key
from ldm.data.members import members
from ldm.data.tables import column_of, complete, number, numbered, some


class AddClass(Add):
    """"class", a number from 0.

    Args:
        of: "table"; "folder": the first folder of the item's key; or a member of WebDataset shards by its ending: "cls".
        column, table: see ``ldm.data.tables``.
        names: in the order of their numbers; None: all that there are, sorted, or whole numbers as they are.
    """

    needs_picture = False

    def __init__(self, dataset: Dataset, of: str = "table", column: str = "class", table: Path | None = None,
                 names: list[str] | None = None):
        super().__init__(dataset)
        if of == "folder":
            keys = [plain_key(dataset, i)[0] for i in range(len(dataset))]
            found = {key: PurePosixPath(key).parts[0] if "/" in key else None for key in keys}
        elif of == "table":
            found = column_of(dataset, table, column)
        else:
            found = {key: data.decode().strip() for key, data in members(dataset, of).items()}
        numbers, self.names = numbered(complete(dataset, found, f"class of {of}"), names)
        self.numbers = np.array(numbers, dtype=np.int32)
        self.settings, self.named = [of, self.names, numbers], {"class": len(self.names)}

    def more(self, i: int, item: dict) -> dict:
        return {"class": int(self.numbers[place(self.dataset, i, item)])}

    def told(self) -> str:
        counts = Counter(self.numbers.tolist())
        named = [f"{name} ({counts[n]:,})" for n, name in enumerate(self.names) if counts[n]]
        return f"class: {len(counts):,} of {len(self.names):,}: {some(named)}"


class AddNumbers(Add):
    """Columns of a table as numbers: {"aesthetic": "score"}, or several as one, {"original_size": ["height", "width"]}."""

    needs_picture = False

    def __init__(self, dataset: Dataset, columns: dict[str, str | list[str]], table: Path | None = None):
        super().__init__(dataset)
        self.numbers = {}
        for key, names in columns.items():
            read = [self._column(table, name) for name in ([names] if isinstance(names, str) else names)]
            self.numbers[key] = torch.tensor(read[0] if isinstance(names, str) else list(zip(*read, strict=True)))
        self.settings = [columns, {key: value.tolist() for key, value in self.numbers.items()}]

    def _column(self, table: Path | None, name: str) -> list[float]:
        values = complete(self.dataset, column_of(self.dataset, table, name), f"column {name!r}")
        return [number(value, name, plain_key(self.dataset, i)[0]) for i, value in enumerate(values)]

    def more(self, i: int, item: dict) -> dict:
        at = place(self.dataset, i, item)
        return {key: values[at] for key, values in self.numbers.items()}

    def told(self) -> str:
        return f"numbers: {', '.join(self.numbers)}"


class AddSizes(Add):
    """"original_size" (height, width), "crop" (top, left) and "target_size", in pixels, as SDXL is told them: pictures are
    made smaller until the shorter side is the target's, and cut out of the middle. Drawn ones have no other size."""

    needs_picture = False

    def __init__(self, dataset: Dataset):
        super().__init__(dataset)
        self._known = np.zeros((len(dataset), 2), dtype=np.int32)

    def more(self, i: int, item: dict) -> dict:
        at, target = place(self.dataset, i, item), self.dataset.size
        if not self._known[at].any():
            self._known[at] = self.dataset.original(at) if hasattr(self.dataset, "original") else (target, target)
        original = self._known[at].tolist()
        crop = [(side - min(original)) // 2 * target // min(original) for side in original]
        sizes = {"original_size": original, "crop": crop, "target_size": [target, target]}
        return {key: torch.tensor(value) for key, value in sizes.items()}
