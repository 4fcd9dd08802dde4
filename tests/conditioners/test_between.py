"""Conditions on the way from one to another."""

import pytest
import torch

from ldm.cond import Cond
from ldm.conditioners.between import SHARE, TO, Between, lerp, mixed, slerp
from ldm.conditioners.join import Join
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.spatial import Picture


def test_slerp_keeps_the_norm_and_the_plane():
    a, b = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    a, b = (each / each.flatten(1).norm(dim=1).view(-1, 1, 1) for each in (a, b))
    share = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    found = slerp(a, b, share)
    assert torch.equal(found[0], a[0]) and torch.equal(found[4], b[4])
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(5))
    angle = (a * b).sum(dim=(1, 2)).acos()
    torch.testing.assert_close((a * found).sum(dim=(1, 2)).clamp(-1, 1).acos(), share * angle, atol=1e-3, rtol=0)


def test_slerp_of_parallel_rows_is_the_straight_line():
    a = torch.randn(3, 4)
    for b in (a, 2 * a, -a, torch.zeros(3, 4)):
        found = slerp(a, b, torch.full((3,), 0.25))
        expected = lerp(a, b, torch.full((3,), 0.25))
        assert found.isfinite().all()
        if b.any():
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["lerp", "slerp"])
def test_tokens_of_texts_of_two_lengths(way):
    a = Cond(torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), torch.randn(3, 5))
    b = Cond(torch.randn(3, 3, 4), torch.tensor([[True, True, False], [True] * 3, [True] * 3]), torch.randn(3, 5))
    found = mixed(a, b, torch.tensor([0.0, 0.5, 1.0]), way)
    assert found.mask.tolist() == [[True, True, False], [True] * 3, [True] * 3]
    torch.testing.assert_close(found.tokens[0, :2], a.tokens[0])
    torch.testing.assert_close(found.tokens[2], b.tokens[2])
    share = {"lerp": 0.5, "slerp": 0.5**0.5}[way]  # from zeros, at a right angle
    torch.testing.assert_close(found.tokens[1, 2], share * b.tokens[1, 2])
    assert torch.equal(found.vector[0], a.vector[0]) and torch.equal(found.vector[2], b.vector[2])


def test_a_conditioner_between_two_batches():
    inner = Join([ClassLabel(3, 4, dropout=0.1), Picture("map", 1)])
    between, maps = Between(inner), torch.randn(2, 1, 4, 4)
    assert (between.vector_width, between.spatial_channels, between.has_null, between.wants) == (4, 1, True, inner.wants)
    batch = {"class": torch.tensor([0, 1]), "map": maps, f"{TO}class": torch.tensor([2, 2]), "latent_size": (4, 4),
             SHARE: torch.tensor([0.25, 1.0])}  # fmt: skip
    cond, null = between.with_null(batch)
    rows = inner.parts[0].embedding.weight
    torch.testing.assert_close(cond.vector, torch.stack([torch.lerp(rows[0], rows[2], 0.25), rows[2]]))
    assert torch.equal(cond.spatial, maps) and torch.equal(null.vector, rows[3].expand(2, -1))  # a map of its own for both
