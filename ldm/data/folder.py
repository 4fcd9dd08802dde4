"""A folder of images with captions in a metadata table, in .txt files beside the images, or in the file names."""

import os
from pathlib import Path

from PIL import Image

from ldm.common.files import UserError, nearest
from ldm.data.arrays import SUFFIXES
from ldm.data.captions import Layout, find_captions
from ldm.data.pictures import Pictures, Scan, Split, storable

NOT_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf"}  # Pillow knows them, but draws or plays


class ImageFolder(Pictures):
    """All images under `root`, subfolders too, hidden files not. An item's key is its path relative to `root`.

    captions: see ldm.data.captions for the layouts and for what "auto" looks for. The other settings: see Pictures.
    """

    def __init__(
        self,
        root: str,
        size: int,
        captions: Layout = "auto",
        channels: int = 3,
        flip: bool = False,
        split: Split = "all",
        validation_share: float = 0.0,
        scan: Scan = "all",
        max_broken: float = 0.05,
        empty_ok: bool = False,
        value_range: list[float] | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        images, others = list_files(self.root, channels)
        found = find_captions(self.root, images, others, captions)
        super().__init__(
            str(root), images, [found.of.get(key) for key in images], size=size, channels=channels,
            value_range=value_range, flip=flip, split=split, validation_share=validation_share, scan=scan,
            max_broken=max_broken, empty_ok=empty_ok, caption_source=found.source, notes=found.notes,
        )  # fmt: skip

    def read(self, entry: int) -> bytes:
        return (self.root / self._keys[entry]).read_bytes()

    def weight(self, entry: int) -> int:
        return (self.root / self._keys[entry]).stat().st_size


def list_files(root: Path, channels: int = 3) -> tuple[list[str], list[str]]:
    """-> paths of the images, and of all other files, relative to `root` with forward slashes, sorted.

    Arrays (.npy, .npz) are images where there are no others, or none that have so many channels: beside pictures they
    are usually something else about them, and stay among the other files.
    """
    if not root.is_dir():
        raise UserError(no_folder(root))
    found = {kind: [] for kind in ("picture", "array", "other")}
    seen, suffixes = {os.path.realpath(root)}, picture_suffixes()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [
            name for name in folders if not name.startswith(".") and _first_time(os.path.join(folder, name), seen)
        ]
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name).relative_to(root).as_posix()
                suffix = Path(name).suffix.lower()
                if not storable(path):  # its name is no text, and keys are
                    suffix, path = "", path.encode("utf-8", "replace").decode("utf-8")
                found["picture" if suffix in suffixes else "array" if suffix in SUFFIXES else "other"].append(path)
    taken = "picture" if found["picture"] and channels <= 4 else "array"
    images = found.pop(taken)
    others = [path for paths in found.values() for path in paths]
    if not images:
        tars = any(path.endswith(".tar") for path in others)
        hint = "; its .tar shards are read by ldm.data.webdataset.WebDataset" if tars else ""
        if found.get("picture"):
            hint = f"; pictures have 4 channels at most, channels: {channels} takes arrays ({', '.join(SUFFIXES)})"
        raise UserError(f"{root}: no image in this folder or below it, {len(others):,} other files{hint}")
    return sorted(images), sorted(others)


def picture_suffixes() -> set[str]:
    """-> endings, with the dot and in lower case, of the formats that this Pillow can read."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN} - NOT_PICTURES


def _first_time(folder: str, seen: set[str]) -> bool:
    real = os.path.realpath(folder)  # a link may lead back up
    first = real not in seen
    seen.add(real)
    return first


def no_folder(root: Path) -> str:
    """-> the message for a folder that is not there, with the nearest that is."""
    if root.is_file():
        return f"{root}: this is a file; a folder is expected"
    parent, wanted = root.absolute().parent, root.absolute().name
    while not parent.is_dir():
        parent, wanted = parent.parent, parent.name
    near = nearest(wanted, [path.name for path in parent.iterdir() if path.is_dir()])
    return f"{root}: no such folder; " + (
        f"nearest: {parent / near}" if near else f"there is no {wanted!r} in {parent}"
    )
