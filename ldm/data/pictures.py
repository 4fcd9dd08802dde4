"""Captioned image files: what a folder and a set of shards have in common, once their entries are listed."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from ldm.common.files import UserError, digest
from ldm.common.random import key_to_seed
from ldm.data.transforms import VERSION, BrokenImage, prepare, sides, unpack

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "all"]
Scan = Literal["all", "sample"]
SAMPLE = 1000  # pictures that scan="sample" looks at
MIRRORED = "|mirrored"  # how the keys of mirrored items end
TRIES = 10  # pictures in a row that may turn out unreadable during training
LISTED = 20  # names in a report
KINDS = {1: "grey", 2: "grey and opacity", 3: "RGB", 4: "RGBA"}  # by the number of channels


class Pictures(Dataset[dict]):
    """Items {"image": (C,size,size) float32 in [-1,1], "caption": str, "key": str}. A subclass `read`s an entry.

    keys, captions: of all entries, None where an entry has no caption: such images are left out and listed, and are an
        error where they are more than the share `max_broken`; with `empty_ok` their caption is "".
    split: "validation" is about the share `validation_share` of the entries, those whose key has a low hash;
        "train" the others; which is which does not change when entries are added.
    scan: "all" decodes every image once before training, with threads; "sample" up to 1,000, evenly spread. Broken
        ones are left out and listed; more than the share `max_broken` of those looked at is an error. An image that
        turns out broken later is replaced by the next whole one, with a warning in the log.
    channels: 3 RGB, 1 grey, 4 RGBA, 2 grey and opacity, converted from one another; arrays (.npy, .npz) of shape (H,W),
        (H,W,C) or (C,H,W) may have any number C, and have to have this one.
    value_range: the numbers in the files that become -1 and 1, such as [0, 4095]. Without it integers are scaled by the
        range of their type (8 bits: 0 to 255, 16 bits: 0 to 65,535), and fractions are taken to be in [-1, 1].
    flip: the data set is twice as long, its second half mirrored (keys end in "|mirrored").
    """

    def __init__(
        self,
        where: str,
        keys: Sequence[str],
        captions: Sequence[str | None],
        *,
        size: int,
        channels: int,
        value_range: Sequence[float] | None,
        flip: bool,
        split: Split,
        validation_share: float,
        scan: Scan,
        max_broken: float,
        empty_ok: bool,
        caption_source: str,
        notes: Sequence[str] = (),
    ) -> None:
        if size < 1:
            raise UserError(f"size: {size} pixels; it takes a whole number from 1")
        if channels < 1:
            raise UserError(f"channels: {channels}; it takes 1 (grey), 3 (RGB), 4 (RGBA), or as many as arrays have")
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise UserError(f"value_range: {list(value_range)}; it takes two numbers, the lower first, such as [0, 4095]")
        self.where, self.size, self.channels, self.flip, self.scan = where, size, channels, flip, scan
        self.value_range = value_range
        self.caption_source, self.notes = caption_source, notes
        # packed strings: worker processes would copy a list's pages one by one as they count references
        self._keys = np.array(list(keys), dtype=np.dtypes.StringDType())
        self._captions = np.array([stored(caption or "") for caption in captions], dtype=np.dtypes.StringDType())
        self._hashes = np.zeros(len(self._keys), dtype="S64")  # SHA-256 of the file in hex, empty until known
        self.kept = self._part(split, validation_share)
        self._share = f" ({split} split of {len(keys):,})" if split != "all" else ""
        self.untold = [] if empty_ok else self._without_captions(max_broken)
        self._scan(max_broken)

    def read(self, entry: int) -> bytes:
        """-> the image file of an entry."""
        raise NotImplementedError

    def weight(self, entry: int) -> int:
        """-> size of the image file in bytes."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.kept) * (2 if self.flip else 1)

    def __getitem__(self, i: int) -> dict:
        self._locate(i)
        for j in range(i, i + TRIES):
            entry, mirrored = self._locate(j % len(self))
            try:
                image = prepare(self.read(entry), self.size, self.channels, self.value_range)
            except (BrokenImage, OSError) as error:
                log.warning(
                    "%s: %s cannot be read (%s); the next image takes its place", self.where, self._keys[entry], error
                )
            else:
                return {"image": image.flip(-1) if mirrored else image, "caption": self.caption(j % len(self)),
                        "key": self._keys[entry] + MIRRORED * mirrored}  # fmt: skip
        raise UserError(f"{self.where}: {TRIES} images in a row cannot be read; is the disk still there?")

    def caption(self, i: int) -> str:
        return self._captions[self._locate(i)[0]]

    def key(self, i: int) -> str:
        entry, mirrored = self._locate(i)
        return str(self._keys[entry]) + MIRRORED * mirrored

    def original(self, i: int) -> tuple[int, int]:
        """-> height and width of the picture in its file, before the square in its middle is cut out."""
        return sides(self.read(self._locate(i)[0]), self.channels)

    def identity(self, i: int) -> str:
        """-> SHA-256 of the file's bytes, kept in memory; a mirrored item's ends in "|mirrored"."""
        entry, mirrored = self._locate(i)
        if not self._hashes[entry]:
            self._hashes[entry] = hashlib.sha256(self.read(entry)).hexdigest()
        return self._hashes[entry].decode() + MIRRORED * mirrored

    @property
    def fingerprint(self) -> str:
        """Hash over names, captions, settings and contents (with scan="sample": file sizes instead of contents)."""
        contents = hashlib.sha256()
        for entry in self.kept:
            mark = self._hashes[entry].decode() if self.scan == "all" else str(self.weight(entry))
            contents.update(f"{self._keys[entry]}\0{self._captions[entry]}\0{mark}\0".encode())
        # what came later is named where it is used: caches of all other data stay what they are
        later = ["deep"] * bool(self._seen["deep"]) + [[float(x) for x in self.value_range or ()]] * bool(self.value_range)
        return digest(contents.hexdigest(), self.size, self.channels, self.flip, VERSION, *later)

    def keep(self, wanted: Sequence[bool]) -> None:
        """Leaves out the images (not counting mirrored ones) whose place in `wanted` says False."""
        self.kept = self.kept[np.array(wanted, dtype=bool)]

    def report(self) -> str:
        n, missing = len(self.kept), self._missing()
        kind = KINDS.get(self.channels, f"{self.channels} channels")
        found = f"{n - len(missing):,} captions, {len(missing):,} missing"
        lines = [f"{self.where}: {n:,} images{self._share}, {found}; {kind}, {self.size}x{self.size}"]
        if self.flip:
            lines.append("each image is used as it is and mirrored")
        example = next((caption for e in self.kept if (caption := self._captions[e])), None)
        lines.append(f"captions from {self.caption_source}" + (f', such as "{example[:80]}"' if example else ""))
        if len(missing):
            lines.append(f"empty captions: {_some(missing, 5)}")
        if self.untold:
            lines.append(f"images without a caption left out: {len(self.untold):,}: {_some(self.untold, LISTED)}")
        if self.broken:
            listed = [f"{key} ({reason})" for key, reason in self.broken.items()]
            lines.append(
                f"broken images left out: {len(self.broken):,} of {self.scanned:,} looked at: {_some(listed, LISTED)}"
            )
        if seen := self._seen["small"]:
            lines.append(f"{seen:,} images are smaller than {self.size} pixels and are enlarged")
        if seen := self._seen["deep"]:
            lines.append(f"{seen:,} images have more than 8 bits a channel, or are arrays; all of it is used")
        return "\n".join([*lines, *self.notes])

    def _locate(self, i: int) -> tuple[int, bool]:  # entry, mirrored
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        return int(self.kept[i % len(self.kept)]), i >= len(self.kept)

    def _missing(self) -> np.ndarray:  # keys
        kept = self._keys[self.kept]
        return kept[self._captions[self.kept] == ""]

    def _without_captions(self, most: float) -> list[str]:  # keys of images that are left out
        missing = self._missing()
        if len(missing) > most * len(self.kept):
            raise UserError(
                f"{self.where}: {len(missing):,} of {len(self.kept):,} images have no caption: {_some(missing, 5)}; "
                f"captions were taken from {self.caption_source}; add them, or set empty_ok: true to use empty ones"
            )
        self.kept = self.kept[self._captions[self.kept] != ""]
        return list(map(str, missing))

    def _part(self, split: Split, share: float) -> np.ndarray:
        """-> entries of the split, in order."""
        if not 0 <= share < 1:
            raise UserError(f"validation_share: {share}; it takes a number from 0 to below 1, such as 0.05")
        if split == "all":
            if share:
                raise UserError(
                    f"validation_share: {share} says nothing with split: all; set split: train or validation"
                )
            return np.arange(len(self._keys))
        held = np.array([fraction(key) < share for key in self._keys], dtype=bool)
        kept = np.flatnonzero(held if split == "validation" else ~held)
        if len(kept) == 0:
            raise UserError(
                f"{self.where}: no image is in the {split} split: validation_share is {share} of {len(self._keys):,} "
                f"images; give a {'larger' if split == 'validation' else 'smaller'} share, such as 0.1, or more images"
            )
        return kept

    def _scan(self, max_broken: float) -> None:
        """Decodes images, leaves the broken ones out, and sets `broken` (key -> reason), `scanned`, and how many are what."""
        picked = self.kept if self.scan == "all" else self.kept[:: max(1, -(-len(self.kept) // SAMPLE))]
        log.info("%s: looking at %d images", self.where, len(picked))
        reasons, self._seen, self.scanned = {}, Counter(), len(picked)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for first in range(0, len(picked), 1024):  # in pieces: a million futures at once would be a gigabyte
                piece = picked[first : first + 1024]
                for entry, (reason, traits) in zip(piece, pool.map(self._examine, piece), strict=True):
                    self._seen.update(traits)
                    if reason:
                        reasons[entry] = reason
        self.broken = {str(self._keys[entry]): reason for entry, reason in reasons.items()}
        for key, reason in self.broken.items():
            log.warning("%s: %s is broken: %s", self.where, key, reason)
        if self.broken and (len(self.broken) == len(picked) or len(self.broken) > max_broken * len(picked)):
            listed = [f"{key} ({reason})" for key, reason in self.broken.items()]
            raise UserError(
                f"{self.where}: {len(self.broken):,} of {len(picked):,} images are broken, "
                f"max_broken allows {max_broken:.1%}: {_some(listed, LISTED)}"
            )
        self.kept = self.kept[~np.isin(self.kept, list(reasons))]

    def _examine(self, entry: int) -> tuple[str | None, list[str]]:
        """-> why it is broken, and which of "small" (below `size`) and "deep" (more than 8 bits) it is."""
        try:
            data = self.read(entry)
            image = unpack(data, self.channels, self.value_range, at_least=2 * self.size)[0]
        except (BrokenImage, OSError) as error:
            return str(error), []
        self._hashes[entry] = hashlib.sha256(data).hexdigest()
        return None, ["small"] * (min(image.size) < self.size) + ["deep"] * (image.mode == "F")


def storable(text: str) -> bool:
    """Whether it has no halves of surrogate pairs, which JSON and names of files can spell and nothing can store."""
    return text == stored(text)


def stored(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def fraction(*keys: int | str) -> float:
    """-> number in [0, 1) that depends on the keys alone, as if drawn uniformly."""
    return key_to_seed(0, "split", *keys) / 2**64


def _some(names: Sequence[str], n: int) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n:,} more" if len(names) > n else "")
