"""LDM's text encoder. Its states are held to recorded ones in tests/parity/test_text_encoders.py."""

import pytest
import torch
import torch.nn.functional as F

from ldm.common.files import UserError
from ldm.conditioners.bert import BertText

SIZE = dict(vocab_size=50, width=16, layers=2, heads=3, head_dim=4, max_length=12, start=1, end=2, vocabulary=None)
IDS = torch.tensor([[1, 7, 8, 9, 2, *[0] * 7], [1, 7, 2, *[0] * 9]])


def bert(**options):
    torch.manual_seed(0)
    made = BertText(**{**SIZE, **options})
    for weights in made.parameters():
        weights.data = torch.randn_like(weights) * 0.3
    return made


def by_hand(made, ids):
    """Written out: pre-norm attention without biases for q, k, v, then the MLP."""
    x = made.transformer.token.weight[ids] + made.transformer.position[: ids.shape[1]]
    for block in made.transformer.blocks:
        h = block.norm1(x)
        q, k, v = ((h @ layer.weight.T).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (block.q, block.k, block.v))
        h = ((q @ k.mT / 2).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.out(h)
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    return made.transformer.norm(x)


def test_states_and_gradients_are_those_of_the_formula():
    made = bert()
    cond = made({"caption": IDS})
    assert cond.mask is None
    torch.testing.assert_close(cond.tokens, by_hand(made, IDS), atol=1e-5, rtol=1e-4)
    names, weights = zip(*made.named_parameters(), strict=True)
    found, expected = (torch.autograd.grad(x.square().sum(), weights) for x in (cond.tokens, by_hand(made, IDS)))
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4, msg=name)


def test_the_published_size():
    with torch.device("meta"):
        made = BertText(logits=True)
    assert sum(p.numel() for p in made.parameters()) == 581_994_042  # as the published model's key table has it


def test_padding_counts_as_text_unless_it_is_hidden():
    made = bert()
    assert not torch.allclose(made({"caption": IDS[1:]}).tokens[:, :3], made({"caption": IDS[1:, :3]}).tokens)
    hidden = bert(keep_padding=False)
    together, alone = hidden({"caption": IDS}), hidden({"caption": IDS[1:, :3]})
    assert together.mask.sum(dim=1).tolist() == [5, 3] and not together.tokens[~together.mask].any()
    torch.testing.assert_close(together.tokens[1, :3], alone.tokens[0, :3], atol=1e-5, rtol=1e-4)


def test_it_is_trained_but_for_what_nobody_uses():
    made = bert(logits=True)
    assert made.trained and made.states_hash is None
    made({"caption": IDS}).tokens.sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad is None} == {"logits.weight", "logits.bias"}
    assert not any(p.requires_grad for p in bert(trainable=False).parameters())


def test_the_null_follows_the_weights():
    made = bert()
    before = made.null(1).tokens
    made.transformer.norm.bias.data += 1
    torch.testing.assert_close(made.null(2).tokens, before.repeat(2, 1, 1) + 1)


def test_words_come_from_berts_vocabulary():
    made = BertText(**{**SIZE, "vocab_size": 30522, "start": 101, "end": 102, "vocabulary": "bert"})
    cond = made({"caption": ["a red fox", ""]})
    assert cond.tokens.shape == (2, 12, 16)
    assert made.tokenizer(["a red fox"]).ids[0, 0, :6].tolist() == [101, 1037, 2417, 4419, 102, 0]
    assert torch.equal(cond.tokens[1:], made({"caption": [""]}).tokens)
    with pytest.raises(UserError, match="no vocabulary: give token ids"):
        bert()({"caption": ["a red fox"]})
