"""Latents and text states on disk, made once: a run then trains without encoders.

    root/latents-<autoencoder hash>/*.safetensors      mean and standard deviation of q(z|x) at unit scale
    root/text-<encoder hash>/*.safetensors             hidden states of each different caption

Rows are found by the hash of what they were made from (a picture's content and transform, a caption), so another
picture, size, caption, autoencoder or encoder asks for other rows: what is missing is made, the rest is read. Every
file lists its keys in its header and is whole or absent, so writing can be interrupted at any time. Each rank of
torch.distributed makes its share.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from autoencoder.base import Autoencoder
from ldm.common.files import UserError, atomic_write, digest
from ldm.common.team import place, wait

log = logging.getLogger(__name__)

ROWS = 1024  # in one file: what an interruption can cost
RAM = 4 * 2**30  # bytes up to which a table is held in memory; larger ones stay in the files, mapped

Progress = Callable[[int, int], None]  # rows made, rows to make


class Table:
    """Named tensors in rows; row i is the one with ``keys[i]``. Several i may share one.

    Args:
        folder: where the files are; not there yet: empty.
        keys: hexadecimal digits.
    """

    def __init__(self, folder: str | Path, keys: Sequence[str]):
        self.folder, self.keys = Path(folder), keys
        self.places: dict[str, tuple[Path, int]] = {}  # key -> file, row in it
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    listed = json.loads(file.metadata()["keys"])
            except SafetensorError as error:
                log.warning("%s is damaged (%s): its rows are made again", path, error)
            else:
                self.places |= {key: (path, row) for row, key in enumerate(listed)}
        self.columns: dict[str, list[Tensor] | Tensor] | None = None

    def missing(self) -> dict[str, int]:
        """key -> first i that wants it, of the rows that this rank has to make."""
        first = {key: i for i, key in reversed(list(enumerate(self.keys))) if key not in self.places}
        rank, world = place()
        return {key: i for key, i in sorted(first.items(), key=lambda item: item[1]) if int(key, 16) % world == rank}

    def write(self, rows: Iterator[tuple[str, dict[str, Tensor]]], total: int, progress: Progress | None = None,
              dtype: torch.dtype = torch.float32) -> None:
        """Add (key, named tensors) to the files. ``dtype`` is that of fractions in a file, unless they overflow in it."""
        began, done = time.perf_counter(), 0
        while part := list(islice(rows, ROWS)):
            keys = [key for key, _ in part]
            columns = {name: shrunk(stack([row[name] for _, row in part]), dtype) for name in part[0][1]}
            path = self.folder / f"{digest(*keys)}.safetensors"
            with atomic_write(path) as temporary:
                save_file(columns, temporary, {"keys": json.dumps(keys)})
            self.places |= {key: (path, row) for row, key in enumerate(keys)}
            done += len(keys)
            if progress is not None:
                progress(done, total)
        if done:
            seconds = time.perf_counter() - began
            log.info("%s: %d rows made in %.1f s (%.2f s for 1000)", self.folder, done, seconds, 1000 * seconds / done)
        wait()

    def open(self, ram: int = RAM) -> Table:
        """Make ``take`` ready. Raises UserError where a row is not there (any longer)."""
        if place()[1] > 1:
            self.places = Table(self.folder, ()).places  # the other ranks' too
        unique = list(dict.fromkeys(self.keys))
        if lost := [key for key in unique if key not in self.places]:
            raise UserError(f"{self.folder}: {len(lost)} of {len(unique)} rows are missing (first {lost[0]}); "
                            "make the cache again")
        number = {key: n for n, key in enumerate(unique)}
        self.index = torch.tensor([number[key] for key in self.keys])
        files: dict[Path, dict[str, Tensor]] = {}
        for key in unique:
            path = self.places[key][0]
            if path not in files:
                with safe_open(path, "pt") as file:
                    names = file.keys()
                    files[path] = {name: file.get_tensor(name) for name in names}  # mapped into memory, not read
        rows = [(files[path], row) for path, row in map(self.places.get, unique)]
        views = {name: [columns[name][row] for columns, row in rows] for name in rows[0][0]}
        self.shapes = {name: tuple(map(max, zip(*(v.shape for v in column), strict=True))) for name, column in views.items()}
        size = sum(len(column) * math.prod(self.shapes[name]) * column[0].itemsize for name, column in views.items())
        held = size <= ram
        self.columns = {name: stack(column, self.shapes[name]) if held else column for name, column in views.items()}
        return self

    def take(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Rows of these i, stacked; shorter ones end in zeros."""
        rows = self.index[torch.as_tensor(indices)]
        return {name: column[rows] if isinstance(column, Tensor) else stack([column[r] for r in rows], self.shapes[name])
                for name, column in self.columns.items()}


def stack(rows: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Tensor:  # of equal shape but the first size
    """(N, *shape), shorter rows filled up with zeros; ``shape``: of the longest row if None."""
    shape = shape or tuple(max(rows, key=lambda row: row.shape).shape)
    if all(row.shape == shape for row in rows):
        return torch.stack(tuple(rows))
    out = torch.zeros(len(rows), *shape, dtype=reduce(torch.promote_types, {row.dtype for row in rows}))
    for to, row in zip(out, rows, strict=True):
        to[: len(row)] = row
    return out


def shrunk(column: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``dtype`` where these are fractions that fit into it."""
    small = column.to(dtype) if column.is_floating_point() else column
    return small if small.isfinite().all() else column


def write_latents(dataset: Dataset, autoencoder: Autoencoder, root: str | Path, batch_size: int = 32,
                  device: torch.device | str = "cpu", progress: Progress | None = None, workers: int = 0) -> Table:
    """Encode what is not encoded yet; gives the data set's rows {"latent", "latent_std"}, float32 (N,C,h,w), at unit scale.

    Deterministic autoencoders have no "latent_std". Half precision is not used: it overflows in some autoencoders.
    The autoencoder is left on ``device``, in eval mode.
    """
    autoencoder = autoencoder.to(device, memory_format=torch.channels_last).eval()  # faster without gradients
    transform = getattr(dataset, "transform_fingerprint", None)
    if transform is None:  # safe, but one changed picture then costs the whole cache
        transform = dataset.fingerprint
    keys = [digest(dataset.identity(i), transform) for i in range(len(dataset))]
    table = Table(Path(root) / f"latents-{autoencoder.content_hash()}", keys)
    missing = table.missing()
    loader = DataLoader(Subset(dataset, list(missing.values())), batch_size, num_workers=workers, collate_fn=_pictures)

    @torch.no_grad()
    def rows() -> Iterator[tuple[str, dict[str, Tensor]]]:
        names = iter(missing)
        for x in loader:
            with torch.autocast(torch.device(device).type, enabled=False):
                mean, std = autoencoder.posterior(x.to(device))
            columns = {"latent": mean} if std is None else {"latent": mean, "latent_std": std}
            columns = {name: column.float().cpu() for name, column in columns.items()}
            for i in range(len(x)):
                yield next(names), {name: column[i] for name, column in columns.items()}

    table.write(rows(), len(missing), progress)
    return table.open()


def write_text(dataset: Dataset, encode: Callable[[Sequence[str]], tuple[Tensor, ...]], key: str, root: str | Path,
               batch_size: int = 64, progress: Progress | None = None, dtype: torch.dtype = torch.float16) -> Table:
    """Encode each different caption once; gives the data set's rows {"text_states" (N,L,D), "text_length" (N,)}, and
    "text_vector" (N,E) where there is one.

    Args:
        encode: captions -> states (B,L,D), mask (B,L) True where real, and a vector (B,E) if it gives one; only real
            positions are stored.
        key: hash of all that the states depend on (weights, layer, vocabulary, longest length).
        dtype: of the states in the files; states that do not fit into it are stored in float32.
    """
    captions = [dataset.caption(i) for i in range(len(dataset))]
    table = Table(Path(root) / f"text-{key}", [digest(caption) for caption in captions])
    missing = table.missing()

    @torch.no_grad()
    def rows() -> Iterator[tuple[str, dict[str, Tensor]]]:
        # by length, so that short captions are not padded for long ones
        order = iter(sorted(missing.items(), key=lambda item: len(captions[item[1]])))
        while part := list(islice(order, batch_size)):
            states, mask, *vectors = (value.cpu() for value in encode([captions[i] for _, i in part]))
            for b, (name, _) in enumerate(part):
                row = {"text_states": states[b, mask[b]].float(), "text_length": mask[b].sum()}
                yield name, row | ({"text_vector": vectors[0][b].float()} if vectors else {})

    table.write(rows(), len(missing), progress, dtype)
    return table.open()


class CachedDataset(Dataset[dict]):
    """A data set whose pictures, captions or both were encoded before.

    Items: {"latent" (C,h,w), "latent_std" (same; not of deterministic autoencoders)} instead of "image", and
    {"text_states" (L,D), "text_mask" (L,), "text_vector" (E,) where there is one} beside "caption", with L the longest
    caption of the whole set; "key"; and what else the data set's items hold: all of it beside pictures, what its ``extra``
    knows without them beside latents.

    draws: pictures are read anew each time, and may be drawn or changed at random.
    """

    def __init__(self, dataset: Dataset, latents: Table | None = None, texts: Table | None = None):
        self.dataset, self.latents, self.texts = dataset, latents, texts
        self.draws = latents is None
        self.captions = [dataset.caption(i) for i in range(len(dataset))]
        self.fingerprint = dataset.fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:  # DataLoader asks for a batch at a time
        columns = self.batch(indices)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def batch(self, indices: Sequence[int]) -> dict:
        """The items, stacked: what a collate function would make of them."""
        if self.latents is None:
            out = default_collate([self.dataset[i] for i in indices])
        else:
            out = {**self.latents.take(indices), "key": [self.latents.keys[i] for i in indices]}
            if hasattr(self.dataset, "extra"):
                out |= default_collate([self.dataset.extra(i) for i in indices])
        if self.texts is not None:
            text = self.texts.take(indices)
            states = text["text_states"].float()
            out["text_states"] = states
            out["text_mask"] = torch.arange(states.shape[1]) < text["text_length"][:, None]
            out |= {name: value.float() for name, value in text.items() if name == "text_vector"}
        return {**out, "caption": [self.captions[i] for i in indices]}

    def caption(self, i: int) -> str:
        return self.captions[i]

    def identity(self, i: int) -> str:
        return self.dataset.identity(i)

    def report(self) -> str:
        held = {"latents": self.latents, "text": self.texts}
        lines = [f"{name} from {table.folder}" for name, table in held.items() if table is not None]
        return "\n".join([self.dataset.report(), *lines])


def _pictures(items: list[dict]) -> Tensor:
    return torch.stack([item["image"] for item in items])
