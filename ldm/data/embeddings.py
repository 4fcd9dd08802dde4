"""Embeddings of pictures on disk, and the nearest of them: exact search, by the cosine of the angle between two.

A file is a .safetensors with "embedding" (N,D) and, as metadata, the keys of the pictures that its rows belong to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ldm.common.files import UserError, atomic_write, file_sha256
from ldm.data.add import Add, place, plain_key

ROWS = 2**18  # of a collection that are compared at a time


def write(path: str | Path, embedding: Tensor, keys: Sequence[str]) -> None:
    """embedding (N,D), keys of the N pictures -> the file, whole or not at all."""
    from safetensors.torch import save_file

    if embedding.ndim != 2 or len(embedding) != len(keys):
        raise UserError(f"{path}: embeddings (N,D) with a key each, got {tuple(embedding.shape)} and {len(keys)} keys")
    with atomic_write(Path(path)) as temporary:
        save_file({"embedding": embedding.contiguous()}, temporary, {"keys": json.dumps(list(keys))})


def read(path: str | Path) -> tuple[Tensor, list[str]]:
    """-> embedding (N,D), mapped into memory, and the keys of its rows."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.get_tensor("embedding"), json.loads((file.metadata() or {})["keys"])
    except (OSError, SafetensorError, KeyError) as error:
        wanted = "a .safetensors with a tensor 'embedding' (N,D) and metadata 'keys'"
        raise UserError(f"{path}: expected {wanted}: {error}") from error


def nearest(queries: Tensor, collection: Tensor, k: int, leave_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """queries (B,D), collection (N,D) -> rows (B,k) of the collection, nearest first, and their cosines (B,k).

    leave_out: (B,) a row that is not to be found, such as the query itself; -1: none.
    """
    there = len(collection) - (leave_out is not None)
    if not 1 <= k <= there:
        raise UserError(f"k: {k}; there are {there} to choose from")
    queries = F.normalize(queries.float(), dim=-1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(collection), ROWS):
        part = F.normalize(collection[start : start + ROWS].to(queries), dim=-1)
        cosines = queries @ part.T
        numbers = torch.arange(start, start + len(part), device=queries.device).expand(len(queries), -1)
        if leave_out is not None:
            cosines = cosines.masked_fill(numbers == leave_out.to(numbers)[:, None], -torch.inf)
        best, rows = torch.cat([best, cosines], dim=1), torch.cat([rows, numbers], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return rows, best


class AddEmbedding(Add):
    """"image_embedding" (D,) of each picture, from a file; and, with k, "neighbours" (k,D), the nearest others.

    Args:
        file: see ``write``; it has a row for each picture of the data set.
        k: how many neighbours; 0: none.
        collection: file of the pictures that neighbours are looked for in; None: the same, but for the picture itself.
    """

    needs_picture = False

    def __init__(self, dataset: Dataset, file: Path, k: int = 0, collection: Path | None = None):
        super().__init__(dataset)
        self.embedding, keys = read(file)
        rows = {key: row for row, key in enumerate(keys)}
        wanted = [plain_key(dataset, i)[0] for i in range(len(dataset))]
        if lacking := [key for key in wanted if key not in rows]:
            raise UserError(f"{file}: {len(lacking):,} of {len(wanted):,} pictures have no embedding: {', '.join(lacking[:5])}")
        self.rows, self.k = torch.tensor([rows[key] for key in wanted]), k
        self.same = collection is None
        self.collection = self.embedding if self.same else read(collection)[0]
        self.settings = [file_sha256(Path(path)) for path in (file, *([] if self.same else [collection]))] + [k]

    def more(self, i: int, item: dict) -> dict:
        row = self.rows[place(self.dataset, i, item)]
        found = {"image_embedding": self.embedding[row].float()}
        if self.k:
            near, _ = nearest(self.embedding[row][None], self.collection, self.k, row[None] if self.same else None)
            found["neighbours"] = self.collection[near[0]].float()
        return found

    def told(self) -> str:
        looked = f", {self.k} neighbours of {len(self.collection):,}" if self.k else ""
        return f"embeddings of width {self.embedding.shape[1]}{looked}"
