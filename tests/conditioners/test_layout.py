"""Layouts: LDM's token ids by hand, sizes of its published transformer, and tokens that padding does not change."""

import pytest
import torch

from ldm.common.files import UserError
from ldm.conditioners.layout import Boxes, BoxTokens, box_tokens
from ldm.networks.layers import Attention

BATCH = {"boxes": torch.tensor([[[0.0, 0.0, 1.0, 0.5], [0.2, 0.4, 0.6, 1.0]], [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]]),
         "box_classes": torch.tensor([[3, 1], [-1, 2]])}  # fmt: skip
SMALL = dict(classes=5, objects=3, vocabulary=40, width=16, layers=1, heads=2, head_dim=4)


def test_token_ids():
    """A grid of 4 x 4 cells, as in the docstring of taming's: (2/3, 1/3) is cell 6, (1, 1) cell 15."""
    corner = torch.tensor([[[2 / 3, 1 / 3, 1.0, 1.0]]])
    assert box_tokens(corner, torch.tensor([[7]]), 16).tolist() == [[7, 6, 15, 0, 15]]
    assert box_tokens(corner, torch.tensor([[-1]]), 16, crop=False).tolist() == [[15, 15, 15]]
    assert box_tokens(torch.rand(1, 30, 4), torch.zeros(1, 30, dtype=torch.long), 8192).shape == (1, 92)
    assert box_tokens(torch.ones(1, 1, 4), torch.tensor([[0]]), 8192)[0].tolist() == [0, 8099, 8099, 0, 8099]  # 90 x 90 cells


def test_objects_come_first_then_none():
    conditioner, seen = BoxTokens(**SMALL), []
    conditioner.transformer.token.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    cond = conditioner(BATCH)
    assert cond.tokens.shape == (2, 11, 16) and cond.mask is None and (conditioner.width, conditioner.length) == (16, 11)
    assert seen[0][1].tolist() == [2, 14, 14, *[39] * 6, 0, 35]  # 6 x 6 cells; halves are rounded to even, 0.5 * 5 = 2.5 -> 2
    cond, null = conditioner.with_null(BATCH)
    assert seen[-1][0].tolist() == [39] * 9 + [0, 35] and null.tokens.shape == cond.tokens.shape


def test_the_published_transformer():
    with torch.device("meta"):
        conditioner = BoxTokens(classes=601, logits=True)
    assert sum(p.numel() for p in conditioner.parameters()) == 58_858_496 and conditioner.length == 92


def test_a_box_is_a_token_and_padding_is_hidden():
    conditioner = Boxes(5, objects=4, width=16, dropout=0.1)
    cond = conditioner(BATCH)
    assert cond.tokens.shape == (2, 5, 16) and (conditioner.width, conditioner.length) == (16, 5)
    assert cond.mask.tolist() == [[True, True, True, False, False], [True, True, False, False, False]]
    alone = conditioner({"boxes": BATCH["boxes"][:1, 1:], "box_classes": BATCH["box_classes"][:1, 1:]})
    torch.testing.assert_close(alone.tokens[0, 1], cond.tokens[0, 2])
    attention, x = Attention(8, 16, heads=2, head_dim=4), torch.randn(1, 3, 8)
    one = Boxes(5, objects=1, width=16)
    one.load_state_dict(conditioner.state_dict())
    short, long = (made({key: value[1:, 1:] for key, value in BATCH.items()}) for made in (one, conditioner))
    torch.testing.assert_close(attention(x, short.tokens, short.mask), attention(x, long.tokens, long.mask))


def test_fourier_features_of_gligen():
    conditioner = Boxes(5, objects=1, width=4, frequencies=2)
    seen = []
    conditioner.mlp.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    conditioner({"boxes": torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), "box_classes": torch.tensor([[4]])})
    angles = torch.tensor([b * f for b in (0.1, 0.2, 0.3, 0.4) for f in (1.0, 10.0)])
    torch.testing.assert_close(seen[0][0, 0], torch.cat([conditioner.embedding.weight[4], angles.sin(), angles.cos()]))


def test_a_picture_without_objects_has_the_null():
    conditioner = Boxes(5, objects=2, width=16, dropout=0.5)
    empty = {"boxes": torch.zeros(1, 2, 4), "box_classes": torch.full((1, 2), -1)}
    cond, null = conditioner.with_null(empty)
    assert cond.mask.tolist() == [[True, False, False]] and torch.equal(cond.tokens[:, :1], null.tokens)
    dropped = conditioner.with_dropout(BATCH, {"drop": torch.tensor([0.9, 0.1])}.get)
    assert dropped.mask.tolist() == [[True, True, True], [True, False, False]]


def test_it_is_planned_with_its_transformer():
    conditioner = BoxTokens(**SMALL)
    assert conditioner.example(torch.zeros(1, 4, 8, 8)).tokens.shape == (1, 11, 16)


def test_wrong_layouts_are_told():
    conditioner = Boxes(5, objects=1, width=16)
    with pytest.raises(UserError, match="2 objects in one picture; it takes 1 at most"):
        conditioner(BATCH)
    with pytest.raises(UserError, match=r"in \[0,1\], got \[0.5, 0.5, 0.4, 1.0\]"):
        conditioner({"boxes": torch.tensor([[[0.5, 0.5, 0.4, 1.0]]]), "box_classes": torch.tensor([[0]])})
    with pytest.raises(UserError, match="classes from 0 to 4, or -1, got 5"):
        conditioner({"boxes": torch.zeros(1, 1, 4), "box_classes": torch.tensor([[5]])})
    with pytest.raises(UserError, match=r"'boxes' has to be \(B, 2, 4\), got \(2, 3, 4\)"):
        conditioner({"boxes": torch.zeros(2, 3, 4), "box_classes": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="one is left over"):
        BoxTokens(classes=40, vocabulary=40)
