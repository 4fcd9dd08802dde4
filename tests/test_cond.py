"""Cond: cutting, joining and mixing per sample, against plain tensor operations."""

import pytest
import torch

from ldm.cond import Cond


def make(batch=3, length=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=g)
    return Cond(
        torch.randn(batch, length, 5, generator=g) * mask[..., None],
        mask,
        torch.randn(batch, 6, generator=g),
        torch.randn(batch, 2, 3, 3, generator=g),
    )


def equal(a: Cond, b: Cond) -> bool:
    return all(
        torch.equal(getattr(a, f), getattr(b, f)) if getattr(a, f) is not None else getattr(b, f) is None
        for f in ("tokens", "mask", "vector", "spatial")
    )


def test_length_is_the_batch():
    assert len(make(3)) == 3
    assert len(Cond(vector=torch.zeros(7, 2))) == 7
    assert len(Cond()) == 0


def test_slices_and_masks_select_samples():
    cond = make(4)
    assert equal(Cond.cat([cond[:1], cond[1:]]), cond)
    assert equal(cond[torch.tensor([2, 0])], Cond.cat([cond[2:3], cond[:1]]))
    assert len(cond[torch.tensor([True, False, True, True])]) == 3
    with pytest.raises(TypeError, match="slice or a tensor"):
        cond[0]


def test_a_cond_has_no_truth_value():
    with pytest.raises(TypeError, match="neither true nor false"):
        bool(make())


def test_repeat_interleave_keeps_samples_together():
    cond = make(2)
    repeated = cond.repeat_interleave(3)
    assert len(repeated) == 6
    for i in range(6):
        assert equal(repeated[i : i + 1], cond[i // 3 : i // 3 + 1])


def test_cat_pads_tokens_and_hides_the_padding():
    short, long = make(2, 3, seed=1), make(1, 5, seed=2)
    both = Cond.cat([short, long])
    assert both.tokens.shape == (3, 5, 5)
    assert torch.equal(both.tokens[:2, :3], short.tokens) and not both.tokens[:2, 3:].any()
    assert torch.equal(both.mask[:2, :3], short.mask) and not both.mask[:2, 3:].any()
    assert torch.equal(both.mask[2:], long.mask) and torch.equal(both.vector[2:], long.vector)


def test_cat_without_masks():
    tokens = torch.randn(2, 3, 4)
    assert Cond.cat([Cond(tokens), Cond(tokens)]).mask is None
    padded = Cond.cat([Cond(tokens), Cond(torch.randn(1, 5, 4))])
    assert padded.mask.tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] * 5]


def test_cat_refuses_different_fields():
    with pytest.raises(ValueError, match="vector"):
        Cond.cat([make(), Cond(make().tokens, make().mask)])


@pytest.mark.parametrize("shared", [False, True], ids=["one for each", "one for all"])
def test_where_replaces_whole_samples(shared):
    cond, other = make(3, 3), make(1 if shared else 3, 5, seed=3)
    keep = torch.tensor([True, False, True])
    mixed = cond.where(keep, other)
    for i in range(3):
        source = cond[i : i + 1] if keep[i] else (other if shared else other[i : i + 1])
        length = source.tokens.shape[1]
        assert torch.equal(mixed.tokens[i, :length], source.tokens[0]) and not mixed.tokens[i, length:].any()
        assert torch.equal(mixed.mask[i, :length], source.mask[0]) and not mixed.mask[i, length:].any()
        assert torch.equal(mixed.vector[i], source.vector[0]) and torch.equal(mixed.spatial[i], source.spatial[0])


def test_gradients_reach_only_what_was_kept():
    tokens = torch.randn(2, 3, 4, requires_grad=True)
    Cond(tokens).where(torch.tensor([True, False]), Cond(torch.zeros(1, 3, 4))).tokens.sum().backward()
    assert tokens.grad[0].eq(1).all() and tokens.grad[1].eq(0).all()


def test_to_leaves_the_mask_boolean():
    cond = make().to(dtype=torch.float64)
    assert cond.tokens.dtype == cond.vector.dtype == cond.spatial.dtype == torch.float64
    assert cond.mask.dtype == torch.bool
    assert make().to("meta").mask.is_meta


def test_an_empty_cond_goes_through_everything():
    empty = Cond()
    results = [empty[:2], empty.repeat_interleave(4), empty.to("cpu", torch.float16), Cond.cat([empty, empty])]
    results.append(empty.where(torch.tensor([True, False]), empty))
    assert all(equal(result, empty) for result in results)


def test_filled_takes_what_is_missing_and_a_mask_with_its_tokens():
    cond, text = make(2), Cond(torch.zeros(2, 4, 5))
    filled = text.filled(cond)
    assert filled.tokens is text.tokens and filled.mask is None
    assert filled.vector is cond.vector and filled.spatial is cond.spatial
    filled = Cond(vector=torch.ones(2, 6)).filled(cond)
    assert filled.tokens is cond.tokens and filled.mask is cond.mask and filled.vector.eq(1).all()
    assert equal(Cond().filled(cond), cond) and equal(cond.filled(Cond()), cond)


def test_where_leaves_what_the_other_does_not_have():
    cond, keep = make(3), torch.tensor([True, False, False])
    mixed = cond.where(keep, Cond(vector=torch.zeros(1, 6)))
    assert torch.equal(mixed.tokens, cond.tokens) and torch.equal(mixed.mask, cond.mask)
    assert torch.equal(mixed.vector, cond.vector * keep[:, None]) and torch.equal(mixed.spatial, cond.spatial)


def test_a_spatial_condition_of_one_pixel_is_everywhere():
    cond, grey = make(2), Cond(spatial=torch.tensor([7.0, 8.0]).view(1, 2, 1, 1))
    both = Cond.cat([Cond(spatial=cond.spatial), grey.repeat_interleave(2)])
    assert torch.equal(both.spatial[:2], cond.spatial) and both.spatial[2:, 0].eq(7).all() and both.spatial[2:, 1].eq(8).all()
    mixed = cond.where(torch.tensor([False, True]), grey)
    assert mixed.spatial[0, 1].eq(8).all() and torch.equal(mixed.spatial[1], cond.spatial[1])
