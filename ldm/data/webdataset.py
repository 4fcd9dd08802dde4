"""WebDataset shards on a local disk: tar files whose members of one name make a sample (0001.jpg, 0001.txt).

The tar files are indexed once, then read by seeking: random access, so the order and a resume are as exact as for a
folder. (The webdataset library, which streams, is only needed to write shards.)
"""

import glob
import logging
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm.common.files import UserError, nearest, parse_json
from ldm.data.arrays import SUFFIXES
from ldm.data.captions import CAPTION_COLUMNS, decode_text
from ldm.data.folder import no_folder, picture_suffixes
from ldm.data.pictures import Pictures, Scan, Split

log = logging.getLogger(__name__)

MOST = 2**20  # bytes of a caption
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # how such files begin


class WebDataset(Pictures):
    """shards: a folder of .tar files, a pattern ("data/*.tar", "data/{000..012}.tar"), or one file.

    caption_key: the ending of the members that hold the captions; a json member has them under caption, text or prompt.
    An item's key is the sample's name in the shard, after the shard's own name where several shards have it. The other
    settings: see Pictures.
    """

    def __init__(
        self,
        shards: str,
        size: int,
        caption_key: str = "txt",
        channels: int = 3,
        flip: bool = False,
        split: Split = "all",
        validation_share: float = 0.0,
        scan: Scan = "all",
        max_broken: float = 0.05,
        empty_ok: bool = False,
        value_range: list[float] | None = None,
    ) -> None:
        index = indexed(find_shards(shards), caption_key.lower().removeprefix("."), channels, max_broken)
        self.shards, self.broken_shards = index.shards, index.damaged
        if not index.keys:
            raise UserError(f"{shards}: no image in {len(self.shards):,} shards; they hold {_endings(index.endings)}")
        if not index.captions and not empty_ok:
            raise UserError(
                f"{shards}: caption_key: no .{index.caption_key} in the shards; they hold {_endings(index.endings)}; "
                "name one of these, or set empty_ok: true for images without captions"
            )
        self._shard = np.array(index.shard, dtype=np.int32)
        self._span = np.array(index.span, dtype=np.int64).reshape(-1, 2)  # offset and length of the image in its shard
        keys = index.unique_keys()
        super().__init__(
            shards, keys, [index.captions.get(e) for e in range(len(keys))], size=size, channels=channels,
            value_range=value_range, flip=flip, split=split, validation_share=validation_share, scan=scan,
            max_broken=max_broken, empty_ok=empty_ok,
            caption_source=f".{index.caption_key} members of {len(self.shards):,} shards", notes=index.notes(),
        )  # fmt: skip

    def read(self, entry: int) -> bytes:
        offset, length = self._span[entry]
        with open(self.shards[self._shard[entry]], "rb") as file:  # anew: workers who share a handle share its place
            file.seek(offset)
            return file.read(length)

    def weight(self, entry: int) -> int:
        return int(self._span[entry, 1])


def indexed(shards: list[Path], caption_key: str, channels: int, max_broken: float) -> "Index":
    """What is in the shards. Arrays (.npy, .npz) are images where there are no others, or none of so many channels. Shards
    that are no whole tar files are left out; UserError where they are more than the share `max_broken`."""
    for suffixes in [picture_suffixes()] * (channels <= 4) + [set(SUFFIXES)]:
        index = Index(caption_key, suffixes)
        for shard in shards:
            index.add(shard)
        if len(index.damaged) > max_broken * len(shards):
            first, *others = index.damaged.values()
            raise UserError(first + (f"; so are {len(others):,} other shards of {len(shards):,}" if others else ""))
        if index.keys:
            break
    return index


@dataclass
class Index:
    """Where each sample's image lies, and its caption. Samples are entries 0, 1, 2 ... in the order of the shards."""

    caption_key: str
    suffixes: set[str]  # of images, with the dot
    keys: list[str] = field(default_factory=list)
    shard: list[int] = field(default_factory=list)
    span: list[tuple[int, int]] = field(default_factory=list)
    captions: dict[int, str] = field(default_factory=dict)  # entry -> caption
    endings: Counter = field(default_factory=Counter)
    repeated: list[str] = field(default_factory=list)  # members left out, as their sample has such a member already
    no_image: list[str] = field(default_factory=list)  # samples
    latin: list[str] = field(default_factory=list)  # members which are not UTF-8
    garbled: list[str] = field(default_factory=list)  # members which are not JSON, but should be
    shards: list[Path] = field(default_factory=list)  # that are whole
    damaged: dict[str, str] = field(default_factory=dict)  # shard -> what is wrong with it

    def add(self, shard: Path) -> None:
        """Reads a shard, or tells why it cannot be."""
        try:
            images, captions = self._members(shard)
        except (Damaged, OSError) as error:
            reason = str(error) if isinstance(error, Damaged) else f"{shard}: cannot be read: {error.strerror}"
            self.damaged[str(shard)] = reason
            log.warning("%s", self.damaged[str(shard)])
            return
        self.no_image += [key for key in captions if key not in images]
        for key, span in images.items():
            if caption := captions.get(key):
                self.captions[len(self.keys)] = caption
            self.keys.append(key)
            self.shard.append(len(self.shards))
            self.span.append(span)
        self.shards.append(shard)

    def _members(self, shard: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """-> by the samples' names, where their images lie, and their captions."""
        images, captions = {}, {}
        with open(shard, "rb") as file:
            try:
                tar = tarfile.TarFile(fileobj=file)
                for member in tar:
                    key, ending = split_name(member.name)
                    if not key or not member.isfile() or member.issparse():
                        continue
                    self.endings[ending] += 1
                    if "." + ending in self.suffixes:
                        self._put(images, key, (member.offset_data, member.size), member.name)
                    elif ending == self.caption_key:
                        text = self._caption(f"{shard}: {member.name}", tar.extractfile(member).read(MOST))
                        self._put(captions, key, text, member.name)
            except (tarfile.TarError, ValueError, OSError, EOFError) as error:  # what its reader trips over
                if isinstance(error, UserError):
                    raise
                raise Damaged(f"{shard}: {_trouble(file, error)}") from error
            file.seek(tar.offset)  # tarfile takes a damaged header for the end
            if file.read(512).strip(b"\0"):
                raise Damaged(
                    f"{shard}: damaged or cut off after {len(images):,} images, at byte {tar.offset:,}; copy it again"
                )
        return images, captions

    def _put(self, members: dict, key: str, value: object, name: str) -> None:
        if key in members:
            self.repeated.append(name)
        else:
            members[key] = value

    def _caption(self, where: str, data: bytes) -> str:
        text, utf = decode_text(data)
        if not utf:
            self.latin.append(where)
        if self.caption_key == "json":
            try:
                record = parse_json(text, where)
            except UserError:
                self.garbled.append(where)
                return ""
            text = _from_json(where, record)
        return " ".join(text.split())

    def unique_keys(self) -> list[str]:
        """-> keys, after the shard's name (and folder, if there are several) where another shard has the same."""
        counts, names = Counter(self.keys), names_of(self.shards)
        placed = zip(self.keys, self.shard, strict=True)
        return [key if counts[key] == 1 else f"{names[shard]}/{key}" for key, shard in placed]

    def notes(self) -> list[str]:
        """-> lines for the report."""
        shared = sum(count > 1 for count in Counter(self.keys).values())
        whole = len(self.shards) + len(self.damaged)
        lines = [
            (len(self.damaged), f"of {whole:,} shards are damaged and left out", list(self.damaged.values())),
            (shared, "names are in several shards; there, the shard's name precedes them", []),
            (len(self.repeated), "members left out, as their sample has an image or caption already", self.repeated),
            (len(self.no_image), "captions without an image", self.no_image),
            (len(self.garbled), "captions are not JSON that can be read", self.garbled),
            (len(self.latin), "captions are not UTF-8 and were read as Latin-1", self.latin),
        ]
        return [f"{n:,} {what}" + f": {', '.join(names[:5])}" * bool(names) for n, what, names in lines if n]


def names_of(shards: list[Path]) -> list[str]:
    """-> what precedes the keys that several shards have: each shard's name, and folder if there are several."""
    top = os.path.commonpath([path.absolute().parent for path in shards])
    return [path.absolute().relative_to(top).with_suffix("").as_posix() for path in shards]


class Damaged(ValueError):
    """A shard that is no whole tar file."""


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """-> sample, ending in lower case, as the library has them: "a/0001.seg.PNG" -> "a/0001", "seg.png"."""
    name = name.encode("utf-8", "replace").decode("utf-8")  # where it is not UTF-8, tarfile has halves of surrogate pairs
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, flags=re.DOTALL)
    return (match[1], match[2].lower()) if match else (None, None)


def _from_json(where: str, record: object) -> str:
    name = next((name for name in CAPTION_COLUMNS if isinstance(record, dict) and name in record), None)
    if name is None:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no key is the caption's; found: {found}; known: {', '.join(CAPTION_COLUMNS)}")
    return str(record[name] or "")


def _trouble(file: BinaryIO, error: Exception) -> str:
    file.seek(0)
    start = file.read(6)
    packer = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
    if packer:
        return f"compressed with {packer}, which allows no random access; unpack it to a plain .tar"
    return f"not a whole tar file ({error}); copy it again"


def find_shards(shards: str) -> list[Path]:
    """-> the files that a folder, a pattern with * ? [] or {000..012} or {a,b}, or a path stands for."""
    if "://" in shards or shards.startswith("pipe:"):
        raise UserError(
            f"shards: {shards}: only files on a local disk are read; download the shards and name their folder"
        )
    found: list[Path] = []
    for pattern in expand(os.path.expanduser(shards)):
        path = Path(pattern)
        if path.is_dir():
            hits = sorted(path.glob("*.tar"))
        elif path.is_file():
            hits = [path]
        else:
            hits = sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not hits:
            raise UserError(f"shards: {_nothing(path)}")
        found += hits
    return list(dict.fromkeys(found))


def _nothing(path: Path) -> str:
    if path.is_dir():
        return f"{path}: no .tar file in this folder"
    if not path.parent.is_dir() and not glob.has_magic(str(path.parent)):
        return no_folder(path.parent)
    tars = sorted(other.name for other in path.parent.glob("*.tar"))
    near = nearest(path.name, tars)
    there = (
        f"nearest: {near}"
        if near
        else f"the folder has {', '.join(tars[:5])}"
        if tars
        else "the folder has no .tar file"
    )
    return f"{path}: no such file; {there}"


def expand(pattern: str) -> list[str]:
    """Braces as a shell has them: {000..012} counts with its leading zeros, {a,b} chooses."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    first, last, choices = match.groups()
    words = choices.split(",") if choices else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    return [whole for word in words for whole in expand(pattern[: match.start()] + word + pattern[match.end() :])]


def _endings(endings: Counter) -> str:
    return ", ".join(f"{count:,} .{ending}" for ending, count in endings.most_common(10)) or "no files"
