"""What conditioners read is what they say that they read: none takes anything else, and each works with it."""

import pytest
import torch
from torch import nn

from ldm.conditioners.image import ImageEmbedding
from ldm.conditioners.join import Join
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.layout import Boxes, BoxTokens
from ldm.conditioners.low_resolution import LowResolution
from ldm.conditioners.neighbours import Neighbours
from ldm.conditioners.none import Unconditional
from ldm.conditioners.numbers import Numbers
from ldm.conditioners.spatial import Depth, MaskedImage, Picture, SemanticMap
from ldm.conditioners.wants import completed, missing, wants_of
from ldm.process import DDPM

MADE = {
    "class": lambda n: torch.zeros(n, dtype=torch.long), "number": lambda n, size: torch.zeros(n, size),
    "picture": lambda n, size: torch.zeros(n, size, 8, 8), "mask": lambda n: torch.ones(n, 1, 8, 8),
    "map": lambda n: torch.zeros(n, 8, 8, dtype=torch.long), "depth": lambda n: torch.rand(n, 1, 8, 8),
}  # fmt: skip
KINDS = [ClassLabel(3, 4), Numbers(), Numbers({"weather": 1}), Picture("edges", 2), Depth(), SemanticMap(3), LowResolution(),
         LowResolution(resize="bilinear", noise=DDPM()), BoxTokens(3, 2, 64, 8, 1, 1, 8), Boxes(3, 2, 8), Neighbours(4, 2),
         ImageEmbedding(embedding_width=4), ImageEmbedding(embedding_width=4, noise=DDPM()), Unconditional()]  # fmt: skip


def batch_of(wants, n=2):
    batch = {"latent_size": (8, 8)}
    for want in wants:
        if want.kind == "boxes":
            batch |= {"boxes": torch.tensor([[[0.0, 0.0, 0.5, 0.5]]] * n), "box_classes": torch.zeros(n, 1, dtype=torch.long)}
        elif want.kind == "array":
            batch[want.key] = torch.randn(n, want.size) if want.key == "image_embedding" else torch.randn(n, 2, want.size)
        else:
            make = MADE[want.kind]
            batch[want.key] = make(n, want.size) if want.kind in ("number", "picture") else make(n)
    return batch


@pytest.mark.parametrize("kind", KINDS, ids=lambda part: type(part).__name__)
def test_a_batch_of_what_is_wanted_is_enough(kind):
    batch = batch_of(kind.wants)
    assert not missing(kind.wants, batch)
    cond = kind(batch)
    assert len(cond) == 2 or not kind.wants
    for want in kind.wants:
        less = {key: value for key, value in batch.items() if key != want.key}
        if want.needed:
            assert missing(kind.wants, less) == ([] if want.default is not None else [want])
            with pytest.raises(ValueError, match=want.key):
                kind(less)
        else:
            kind(less)


def test_one_of_two_will_do():
    wants = MaskedImage().wants
    assert [want.key for want in missing(wants, {"mask": 0})] == ["image"]
    assert not missing(wants, {"mask": 0, "masked_image": 0}) and not missing(wants, {"mask": 0, "image": 0})


def test_several_say_all_of_it_once():
    both = Join([ClassLabel(3, 4), LowResolution(noise=DDPM()), Picture("noise_level", 1)])
    assert [want.key for want in both.wants] == ["class", "low_res", "noise_level"] and both.wants[2].needed
    assert Join([ClassLabel(3, 4), Join([Depth()])]).wants[1].key == "depth"

    class Silent(ClassLabel):
        def __init__(self):
            super().__init__(3, 4)
            self.wants = None

    assert Join([ClassLabel(3, 4), Silent()]).wants is None
    assert wants_of(None) == () and wants_of(nn.Identity()) is None


def test_defaults_are_for_sampling():
    batch = completed(Numbers({"original_size": 2, "aesthetic": 1}), {"aesthetic": torch.ones(3, 1)}, (32, 40), 3)
    assert batch["original_size"].tolist() == [[32, 40]] * 3 and batch["aesthetic"].tolist() == [[1]] * 3
    with pytest.raises(ValueError, match="original_size"):
        Numbers()({})
