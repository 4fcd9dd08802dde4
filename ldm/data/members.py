"""What else WebDataset shards hold of a sample: small members, read at once."""

from __future__ import annotations

import tarfile

from torch.utils.data import Dataset

from ldm.common.files import UserError
from ldm.data.webdataset import names_of, split_name


def members(dataset: Dataset, ending: str) -> dict[str, bytes]:
    """-> item's key -> content of the member of that ending ("0001.cls" beside "0001.jpg"). UserError where there are no
    shards, or none of their members ends so."""
    shards = getattr(dataset, "shards", None)
    if shards is None:
        raise UserError(f".{ending} members are in WebDataset shards; {type(dataset).__name__} has none")
    known, found, endings = {dataset.key(i) for i in range(len(dataset))}, {}, set()
    for shard, name in zip(shards, names_of(shards), strict=True):
        with tarfile.TarFile(shard) as tar:
            for member in tar:
                key, kind = split_name(member.name)
                if key and member.isfile():
                    endings.add(kind)
                if kind == ending.lower():
                    full = f"{name}/{key}"
                    found[full if full in known else key] = tar.extractfile(member).read()
    if not found:
        raise UserError(f"{shards[0]}: no .{ending} in the shards; they hold {', '.join('.' + e for e in sorted(endings))}")
    return found
