"""Random numbers as a function of what they are for: (seed, stream, position) -> numbers, with no state in between.

A draw for global sample position p is the same whatever the batch size, the number of processes or the step at which
a run was resumed.
"""

import hashlib
from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor


def key_to_seed(seed: int, *keys: int | str) -> int:
    """-> 64-bit seed: BLAKE2b over the keys, each with its type and length: (1, 23), (12, 3) and ("1", 23) differ."""
    named = ((key, "s") if isinstance(key, str) else (index(key), "i") for key in (seed, *keys))
    text = "".join(f"{kind}{len(str(key))}:{key}" for key, kind in named)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """-> CPU generator at the start of the stream that the keys name. Same keys, same stream; other keys, another one.

    torch's CPU generator (mt19937) uses 32 of the 64 bits: two streams coincide with probability 2^-32.
    """
    return torch.Generator(device="cpu").manual_seed(key_to_seed(seed, *keys))


def normal(
    shape: Sequence[int], seed: int, stream: str, positions: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """-> (B, *shape) standard normal, float32: row i is drawn by generator(seed, stream, positions[i]) alone."""
    out = torch.empty((len(positions), *shape), dtype=torch.float32, device="cpu")
    source = torch.Generator(device="cpu")
    for row, position in zip(out, positions, strict=True):
        row.normal_(generator=source.manual_seed(key_to_seed(seed, stream, int(position))))
    return out.to(device)


def uniform(seed: int, stream: str, positions: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """-> (B,) uniform on [0, 1), float32, one generator per position."""
    out = torch.empty(len(positions), dtype=torch.float32, device="cpu")
    source = torch.Generator(device="cpu")
    for row, position in zip(out, positions, strict=True):
        row.uniform_(generator=source.manual_seed(key_to_seed(seed, stream, int(position))))
    return out.to(device)
