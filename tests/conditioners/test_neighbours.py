"""Neighbours: embeddings as tokens."""

import pytest
import torch

from ldm.common.files import UserError
from ldm.conditioners.neighbours import Neighbours
from ldm.networks.layers import Attention

BATCH = {"neighbours": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))}


def test_embeddings_of_length_one_are_the_tokens():
    conditioner = Neighbours(6, count=4)
    assert (conditioner.width, conditioner.length, conditioner.vector_width) == (6, 4, None)
    tokens = conditioner(BATCH).tokens
    torch.testing.assert_close(tokens, BATCH["neighbours"] / BATCH["neighbours"].norm(dim=-1, keepdim=True))
    assert torch.equal(Neighbours(6, 4, normalise=False)(BATCH).tokens, BATCH["neighbours"])
    projected = Neighbours(6, 4, width=3, normalise=False)
    torch.testing.assert_close(projected(BATCH).tokens, BATCH["neighbours"] @ projected.project.weight.T)


def test_attention_adds_nothing_for_the_null():
    cond, null = Neighbours(6, 4, dropout=0.1).with_null(BATCH)
    attention, x = Attention(8, 6, heads=2, head_dim=4), torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(x, null.tokens), attention.out[0].bias.expand(2, 5, -1))
    dropped = Neighbours(6, 4, dropout=0.5).with_dropout(BATCH, {"drop": torch.tensor([0.9, 0.1])}.get)
    assert dropped.mask[0].all() and not dropped.tokens[1].any()


def test_misshapen_embeddings_are_told():
    with pytest.raises(UserError, match=r"'neighbours' has to be \(B, any, 6\), got \(2, 4, 5\)"):
        Neighbours(6, 4)({"neighbours": torch.zeros(2, 4, 5)})
