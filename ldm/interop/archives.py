"""The zip that torch.save writes: where its members lie. None is unpacked, so that none can be more than the file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple


class Member(NamedTuple):
    """Bytes of a file."""

    start: int
    size: int


def members(path: Path, size: int) -> dict[str, Member]:
    """-> name, without that of the archive -> where it lies. ValueError for whatever torch does not write: compressed members,
    which may unpack to a thousand times the file, members that overlap, and two of one name."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        listed = archive.infolist()
        root = next((each.filename.removesuffix("data.pkl") for each in listed if each.filename.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("a zip, but none of torch")
        if any(each.filename == f"{root}constants.pkl" for each in listed):
            raise ValueError("a TorchScript program, not weights")
        if packed := next((each.filename for each in listed if each.compress_type != zipfile.ZIP_STORED), None):
            raise ValueError(f"{packed!r} is compressed, which torch does not do")
        found: dict[str, Member] = {}
        for each in listed:
            if not each.filename.startswith(root) or ".." in each.filename.split("/") or each.filename in found:
                raise ValueError(f"a member named {each.filename!r}, twice or beside the others")
            file.seek(each.header_offset + 26)  # the header before the data has a name and more, of lengths of its own
            lengths = file.read(4)
            start = each.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            found[each.filename] = Member(start, each.file_size)
        ends = sorted((member.start, member.start + member.size) for member in found.values())
        if any(end > start for (_, end), (start, _) in zip(ends, [*ends[1:], (size, size)], strict=True)):
            raise ValueError("members that overlap, or reach beyond the end of the file")
        return {name.removeprefix(root): member for name, member in found.items()}
