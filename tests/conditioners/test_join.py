"""Join: every field of every part at its place, dropped and turned off part by part."""

import pytest
import torch
from torch import nn

from autoencoder.base import Identity
from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, encoded
from ldm.conditioners.join import Join


class Part(Conditioner):
    """Tokens, vector and spatial condition that are all one number; the null is that number, negative."""

    def __init__(self, number, width=None, vector_width=None, spatial_channels=0, length=2, dropout=0.0, nullable=True, mask=None):
        super().__init__()
        self.number, self.width, self.vector_width, self.length = number, width, vector_width, length
        self.spatial_channels, self.dropout, self.nullable, self.mask = spatial_channels, dropout, nullable, mask

    def made(self, n, value, h):
        mask = None if self.mask is None or self.width is None else torch.tensor(self.mask).expand(n, -1)
        return Cond(None if self.width is None else torch.full((n, self.length, self.width), value), mask,
                    None if self.vector_width is None else torch.full((n, self.vector_width), value),
                    torch.full((n, self.spatial_channels, h, h), value) if self.spatial_channels else None)

    def forward(self, batch):
        return self.made(len(batch["x"]), self.number, 4)

    def null(self, n):
        return self.made(n, -self.number, 1) if self.nullable else Cond()


BATCH = {"x": torch.zeros(3)}


def test_fields_stand_side_by_side_in_the_order_of_the_parts():
    join = Join([Part(1.0, width=5, spatial_channels=2), Part(2.0, vector_width=3), Part(3.0, 5, 4, 1, length=4)])
    assert (join.width, join.vector_width, join.spatial_channels, join.beside(7)) == (5, 7, 3, 3)
    cond = join(BATCH)
    assert cond.tokens[0, :, 0].tolist() == [1, 1, 3, 3, 3, 3] and cond.tokens.shape == (3, 6, 5) and cond.mask is None
    assert cond.vector[1].tolist() == [2, 2, 2, 3, 3, 3, 3]
    assert cond.spatial[2, :, 0, 0].tolist() == [1, 1, 3] and cond.spatial.shape == (3, 3, 4, 4)


def test_masks_where_any_part_has_one():
    cond = Join([Part(1.0, width=5, mask=[True, False]), Part(2.0, width=5)])(BATCH)
    assert cond.mask.tolist() == [[True, False, True, True]] * 3


def test_tokens_side_by_side_are_padded_and_real_where_one_is():
    join = Join([Part(1.0, width=2, length=3, mask=[True, True, False]), Part(2.0, width=3, length=1)], tokens="width")
    cond = join(BATCH)
    assert join.width == 5 and cond.tokens[0].tolist() == [[1, 1, 2, 2, 2], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert cond.mask[0].tolist() == [True, True, False]
    assert Join([Part(1.0, width=2), Part(2.0, width=3)], tokens="width")(BATCH).mask is None


def test_each_part_is_dropped_by_its_own_numbers():
    numbers = {"drop/0": torch.tensor([0.1, 0.9, 0.9]), "drop/1": torch.tensor([0.9, 0.1, 0.9])}
    join = Join([Part(1.0, vector_width=1, dropout=0.5), Part(2.0, vector_width=1, dropout=0.5), Part(3.0, vector_width=1)])
    assert join.with_dropout(BATCH, numbers.get).vector.tolist() == [[-1, 2, 3], [1, -2, 3], [1, 2, 3]]
    assert join.has_null and not Join([Part(1.0, vector_width=1)]).has_null


def test_all_parts_are_dropped_together():
    join = Join([Part(1.0, vector_width=1), Part(2.0, spatial_channels=1), Part(3.0, vector_width=1, nullable=False)], dropout=0.5)
    cond = join.with_dropout(BATCH, {"drop": torch.tensor([0.1, 0.5, 0.9])}.get)
    assert cond.vector.tolist() == [[-1, 3], [1, 3], [1, 3]]
    assert cond.spatial[:, 0, 3, 3].tolist() == [-2, 2, 2]


def test_the_null_keeps_what_a_part_does_not_turn_off():
    join = Join([Part(1.0, 5, 1, 1), Part(2.0, 5, 1, 1, nullable=False), Part(3.0, spatial_channels=1, nullable=False)])
    cond, null = join.with_null(BATCH)
    assert null.vector[0].tolist() == [-1, 2] and null.tokens[0, :, 0].tolist() == [-1, -1, 2, 2]
    assert null.spatial[0, :, 2, 3].tolist() == [-1, 2, 3] and cond.spatial[0, :, 2, 3].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="share of the tokens"):
        join.null(2)
    assert Join([Part(1.0, vector_width=1), Part(2.0, width=3)]).null(2).vector.tolist() == [[-1], [-1]]
    assert Join([Part(1.0, vector_width=1, nullable=False)]).with_null(BATCH)[1] is None


def test_joins_may_be_joined():
    inner = Join([Part(1.0, vector_width=1, dropout=0.5), Part(2.0, vector_width=1, dropout=0.5)])
    numbers = {"drop/0": torch.full((3,), 0.9), "drop/0/1": torch.full((3,), 0.9), "drop/1/1": torch.zeros(3)}
    join = Join([Part(3.0, vector_width=1, dropout=0.5), inner])
    assert join.with_dropout(BATCH, numbers.get).vector[0].tolist() == [3, 1, -2]


def test_one_part_keeps_text_states():
    class Caching(Part):
        max_length = 7

        def encode(self, captions):
            return len(captions)

    join = Join([Part(1.0, width=2), Caching(2.0, width=2)])
    assert join.encode(["a", "b"]) == 2 and join.max_length == 7 and not hasattr(join, "release")
    assert not hasattr(Join([Caching(1.0), Caching(2.0)]), "encode")


def test_the_hash_is_of_all_encoders():
    def hashed(*hashes):
        parts = [Part(1.0, vector_width=1) for _ in hashes]
        for part, value in zip(parts, hashes, strict=True):
            part.encoder_hash = value
        return Join(parts).encoder_hash

    assert hashed(None, None) is None and hashed(None, "a") == "a" == hashed("a", None)
    assert len({hashed("a", "b"), hashed("b", "a"), hashed("a", "c")}) == 3


def test_pictures_are_encoded_for_the_part_that_wants_them():
    class Doubled(Part):
        encodes = {"low_res": False}

        def picture(self, key, batch):
            return 2 * batch[key]

    join = Join([Part(1.0, vector_width=1), Doubled(2.0, spatial_channels=1)])
    assert join.encodes == {"low_res": False} and join.beside(3) == 4
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(encoded(join, Identity(3), {"low_res": x})["low_res_latent"], 2 * x)


def test_what_does_not_fit_together_is_told():
    with pytest.raises(UserError, match="got 3, 4; give the parts the same width, or take tokens: width"):
        Join([Part(1.0, width=3), Part(2.0, width=4)])
    with pytest.raises(UserError, match="one or more"):
        Join([])

    class Raw(Part):
        encodes = {"low_res": True}

    class Unit(Part):
        encodes = {"low_res": False}

    with pytest.raises(UserError, match="two keys"):
        Join([Raw(1.0), Unit(1.0)])


def test_parts_are_saved_in_order():
    class Weighted(Part):
        def __init__(self):
            super().__init__(1.0, vector_width=2)
            self.weight = nn.Parameter(torch.zeros(2))

    assert list(Join([Part(1.0), Weighted()]).state_dict()) == ["parts.1.weight"]
