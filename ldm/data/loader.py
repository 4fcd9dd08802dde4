"""Batches in an order which is a pure function of the seed and of how many samples were seen.

Every sample that training ever sees has a global position p = 0, 1, 2 ...; it belongs to epoch p // n and is
number p % n of that epoch's permutation. Batch k of rank r holds the positions s + (k * world + r) * B + i, i < B,
where s samples were seen before. So nothing about the order has to be saved: a resumed run continues in mid-epoch with
exactly the samples that the uninterrupted run would have seen, whatever the number of workers, and with the next ones on
another number of processes too.
"""

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.common.files import UserError
from ldm.common.random import generator, key_to_seed
from ldm.common.team import place


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    workers: int = 0,
    start: Callable[[], int] = lambda: 0,
    shuffle: bool = True,
    infinite: bool = True,
) -> DataLoader:
    """A loader of dict batches: tensors stacked, strings in lists, and "position", LongTensor (B,).

    `batch_size` is per rank; rank and world are read when the iteration begins, and so is `start()`, the number of
    samples that all ranks together have seen before. Epochs follow one another without a seam: a batch may straddle
    two, and no sample is dropped. With `infinite=False` (validation) there is one pass: each rank gets its share,
    the last batch may be smaller, the order (epoch 0's permutation, or the data set's own without `shuffle`) is the
    same every time. Ranks may then differ by one batch.
    Raises UserError for an empty data set and for sizes that cannot be.
    """
    if len(dataset) == 0:
        raise UserError("the data set is empty: point data.train (or data.validation) at a folder with images")
    if batch_size < 1:
        raise UserError(f"loader.batch_size: {batch_size} samples cannot make a batch; it takes a whole number from 1")
    if workers < 0:
        raise UserError(f"loader.workers: {workers}; it takes 0 (load in the training process) or more processes")
    return DataLoader(
        Placed(dataset, seed),
        batch_sampler=Order(len(dataset), batch_size, seed=seed, start=start, shuffle=shuffle, infinite=infinite),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=generator(seed, "workers"),  # else each iteration draws from torch's global generator
    )


class Order(Sampler[list[tuple[int, int]]]):
    """Batches of (global position, data set index); see the top of this file. Infinite ones have no length."""

    def __init__(
        self, n: int, batch_size: int, *, seed: int, start: Callable[[], int], shuffle: bool, infinite: bool
    ) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.start, self.shuffle, self.infinite = start, shuffle, infinite

    def permutation(self, epoch: int) -> torch.Tensor:  # (n,)
        if not self.shuffle:
            return torch.arange(self.n)
        return torch.randperm(self.n, generator=generator(self.seed, "order", epoch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = place()
        permutation = lru_cache(maxsize=1)(self.permutation)
        for first in count(self.start() + rank * self.batch_size, world * self.batch_size):
            last = first + self.batch_size if self.infinite else min(first + self.batch_size, self.n)
            if first >= last:
                return
            yield [(p, int(permutation(p // self.n)[p % self.n])) for p in range(first, last)]

    def __len__(self) -> int:
        if self.infinite:
            raise TypeError("an infinite order has no length")
        rank, world = place()
        return len(range(self.start() + rank * self.batch_size, self.n, world * self.batch_size))


class Placed(Dataset[dict]):
    """(position, index) -> the data set's item with its position.

    A user's data set may draw from the global generators (torch CPU, numpy, random): each item finds them in a state
    that depends on its position alone, so neither workers nor a resume change it, and they are put back afterwards.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, placed: tuple[int, int]) -> dict:
        return self.__getitems__([placed])[0]

    def __getitems__(self, batch: list[tuple[int, int]]) -> list[dict]:  # what DataLoader calls when it is there
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        many = hasattr(self.dataset, "__getitems__") and not getattr(self.dataset, "draws", False)
        if many:  # a data set that gives many at once, as caches do, and draws nothing
            items = self.dataset.__getitems__([index for _, index in batch])
            return [{**item, "position": position} for item, (position, _) in zip(items, batch, strict=True)]
        try:
            return [self.item(position, index) for position, index in batch]
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])

    def item(self, position: int, index: int) -> dict:
        seed = key_to_seed(self.seed, "item", position) % 2**32  # numpy takes no more bits
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return {**self.dataset[index], "position": position}
