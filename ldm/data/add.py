"""Data sets whose items have more than a picture and a caption: a wrapper adds it to the items of another data set.

    data:
      train:
        target: ldm.data.annotations.AddClass
        params: {dataset: {target: ldm.data.folder.ImageFolder, params: {...}}, of: folder}

Wrappers go around one another. Whoever draws at random uses Python's global generator, which the loader sets anew for each
place in the run (``ldm.data.loader.Placed``).
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from ldm.common.files import digest
from ldm.data.pictures import MIRRORED, TRIES


class Add(Dataset[dict]):
    """A data set, and ``more`` in each item. A kind sets ``settings``, plain data of all that it depends on.

    needs_picture: what is added is made of the picture, or drawn at random; else it is known without (``extra``), and can
        stand beside latents from a cache.
    """

    needs_picture = True

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.settings: list = []
        self.named: dict[str, int] = {}

    def more(self, i: int, item: dict) -> dict:
        """What is added to item i; ``item`` is empty where its picture is not read."""
        raise NotImplementedError(f"{type(self).__name__} has to implement more(i, item)")

    def told(self) -> str:
        """A line about it."""
        return f"{type(self).__name__}: {', '.join(map(str, self.settings))}"

    @property
    def classes(self) -> dict[str, int]:
        """How many classes there are, by the keys of items that name one."""
        return getattr(self.dataset, "classes", {}) | self.named

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict:
        item = self.dataset[i]
        return {**item, **self.more(i, item)}

    def extra(self, i: int) -> dict:
        """All that item i has beside picture, caption and key and that is known without its picture."""
        inner = self.dataset.extra(i) if hasattr(self.dataset, "extra") else {}
        return inner if self.needs_picture else {**inner, **self.more(i, {})}

    @property
    def fingerprint(self) -> str:
        return digest(self.dataset.fingerprint, type(self).__name__, self.settings)

    def report(self) -> str:
        return f"{self.dataset.report()}\n{self.told()}"

    def __getattr__(self, name: str) -> Any:  # caption, identity, size ... of what is inside
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def place(dataset: Dataset, i: int, item: dict) -> int:
    """-> i, or the one whose picture was taken where that of i turned out to be unreadable."""
    if "key" not in item or not hasattr(dataset, "key"):
        return i
    return next(j % len(dataset) for j in range(i, i + TRIES) if dataset.key(j % len(dataset)) == item["key"])


def plain_key(dataset: Dataset, i: int) -> tuple[str, bool]:
    """-> key of item i, and whether it is mirrored."""
    key = dataset.key(i)
    return key.removesuffix(MIRRORED), key.endswith(MIRRORED)
