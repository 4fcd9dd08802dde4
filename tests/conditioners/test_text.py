"""The text conditioner: what it trains and what not, padding, the empty caption, captions that are too long."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F

from ldm.common.files import UserError
from ldm.conditioners.captions import REPORTED
from ldm.conditioners.none import Unconditional
from ldm.conditioners.text import TextConditioner

WIDTH = 16
CAPTIONS = ["a red circle", "two small blue squares on a green field", ""]


# ---- the frozen part


def test_padding_makes_no_difference(folder):
    conditioner = TextConditioner(folder, width=8, depth=2, heads=2)
    randomize(conditioner)
    together = conditioner({"caption": [*CAPTIONS, "red " * 20]})
    assert together.tokens.shape[1] >= 16 and not together.tokens[~together.mask].any()
    for i, caption in enumerate(CAPTIONS):
        alone = conditioner({"caption": [caption]})
        real = alone.mask[0].sum()
        assert real == together.mask[i].sum()
        torch.testing.assert_close(alone.tokens[0, :real], together.tokens[i, :real], atol=1e-5, rtol=1e-4)


def test_kept_padding_is_text_of_full_length(folders):
    """Stable Diffusion gave its encoder no mask and attended to all 77 states."""
    import transformers as tf

    folder = str(folders["clip"])
    tokens, mask = TextConditioner(folder, keep_padding=True).encode(["a red circle"])
    ids = tf.AutoTokenizer.from_pretrained(folder)("a red circle", padding="max_length", max_length=32)["input_ids"]
    with torch.no_grad():
        expected = tf.CLIPTextModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).last_hidden_state
    assert mask.all() and tokens.shape == (1, 32, WIDTH)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)


def test_encoding_is_deterministic_in_training_mode_and_free_of_autocast(bert):
    conditioner = TextConditioner(bert).train()  # this BERT has dropout 0.1
    first, _ = conditioner.encode(CAPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second, _ = conditioner.encode(CAPTIONS)
    assert torch.equal(first, second) and first.dtype == torch.float32 and not first.requires_grad


# ---- what is the module's own, and what is not


def randomize(module):
    """Away from the initial zeros, where much would be equal by chance."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def test_the_frozen_encoder_is_not_part_of_the_module(bert):
    plain, refined = TextConditioner(bert), TextConditioner(bert, width=8, depth=1, heads=2)
    plain.encode(CAPTIONS), refined.encode(CAPTIONS)
    assert not list(plain.parameters()) and not plain.state_dict()
    assert {key.split(".")[0] for key in refined.state_dict()} == {"project", "blocks", "norm"}
    assert set(refined.state_dict()) == {name for name, _ in refined.named_parameters()}
    assert not any(p.requires_grad for p in refined.encoder.model.parameters())


def test_copies_share_the_frozen_encoder(bert):
    conditioner = TextConditioner(bert, width=8)
    conditioner.encode(CAPTIONS)
    twin = copy.deepcopy(conditioner)
    assert twin.encoder.model is conditioner.encoder.model
    assert twin.project.weight is not conditioner.project.weight
    assert len(pickle.dumps(conditioner)) < 20_000 < sum(p.nbytes for p in conditioner.encoder.model.parameters())


def test_training_changes_the_top_and_not_the_encoder(bert):
    conditioner = TextConditioner(bert, width=8, depth=1, heads=2)
    before = {name: p.clone() for name, p in conditioner.encoder.model.named_parameters()}
    optimizer = torch.optim.SGD(conditioner.parameters(), lr=0.1)
    target = torch.randn(len(CAPTIONS), 8)
    losses = []
    for _ in range(20):
        loss = (conditioner({"caption": CAPTIONS}).tokens[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in conditioner.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name], p) for name, p in conditioner.encoder.model.named_parameters())


def test_blocks_are_the_identity_at_first(bert):
    conditioner = TextConditioner(bert, width=8, depth=3, heads=2)
    states, mask = conditioner.encode(CAPTIONS)
    expected = F.layer_norm(states @ conditioner.project.weight.T + conditioner.project.bias, (8,))
    torch.testing.assert_close(conditioner.refine(states, mask).tokens[mask], expected[mask])


def test_without_a_trainable_part_states_pass_unchanged(bert):
    conditioner = TextConditioner(bert)
    states, mask = conditioner.encode(CAPTIONS)
    assert torch.equal(conditioner({"caption": CAPTIONS}).tokens, states)


def test_stored_states_take_the_place_of_captions(bert):
    conditioner = TextConditioner(bert, width=8, depth=1, heads=2)
    randomize(conditioner)
    states, mask = conditioner.encode(CAPTIONS)
    stored = {"text_states": F.pad(states, (0, 0, 0, 9)), "text_mask": F.pad(mask, (0, 9))}
    live, cached = conditioner({"caption": CAPTIONS}), conditioner(stored)
    assert not cached.mask[:, states.shape[1] :].any()
    torch.testing.assert_close(cached.tokens[cached.mask], live.tokens[live.mask])


def test_works_in_the_dtype_of_the_module(bert):
    cond = TextConditioner(bert, width=8, depth=1, heads=2).to(torch.bfloat16)({"caption": CAPTIONS})
    assert cond.tokens.dtype == torch.bfloat16 and cond.mask.dtype == torch.bool


# ---- the empty caption


def test_null_is_the_empty_caption(folder):
    conditioner = TextConditioner(folder, width=8, depth=1, heads=2)
    randomize(conditioner)
    null, empty = conditioner.null(3), conditioner({"caption": [""] * 3})
    assert len(null) == 3 and null.mask.any(dim=1).all()
    torch.testing.assert_close(null.tokens, empty.tokens)
    assert torch.equal(null.mask, empty.mask)


def test_dropout_replaces_the_captions_whose_number_is_below_it(bert):
    conditioner = TextConditioner(bert, dropout=0.1)
    cond = conditioner({"caption": CAPTIONS})
    dropped = conditioner.with_dropout({"caption": CAPTIONS}, {"drop": torch.tensor([0.1, 0.09, 0.7])}.get)
    assert torch.equal(dropped.tokens[[0, 2]], cond.tokens[[0, 2]])
    length = conditioner.null(1).tokens.shape[1]
    assert torch.equal(dropped.tokens[1, :length], conditioner.null(1).tokens[0])
    assert dropped.mask[1].sum() == conditioner.null(1).mask.sum()


def test_the_empty_caption_outlives_the_encoder(bert):
    conditioner = TextConditioner(bert)
    expected = conditioner.null(1).tokens
    conditioner.release()
    assert "model" not in vars(conditioner.encoder)
    assert torch.equal(conditioner.null(1).tokens, expected)
    assert "model" not in vars(conditioner.encoder)
    conditioner.encode(["red"])  # and it comes back when it is needed


def test_unconditional_is_a_conditioner_too():
    none = Unconditional()
    cond, null = none.with_null({"image": torch.zeros(2, 3, 4, 4)})
    assert null is None
    assert (cond.tokens, cond.vector, cond.spatial, none.null(2).tokens) == (None, None, None, None)


# ---- captions that are too long


def test_cut_words_are_named_once(bert, caplog):
    conditioner = TextConditioner(bert, max_length=8)  # [CLS], 6 pieces, [SEP]
    long = "red blue small circle red blue many many"
    with caplog.at_level(logging.WARNING):
        conditioner.encode(["red blue", long])
        conditioner.encode([long])
    assert conditioner.cut == {long: "many many"} and conditioner.cut_count == 1
    assert len(caplog.records) == 1 and "'many many'" in caplog.text


def test_a_word_that_fits_in_part_is_dropped_whole(bert):
    conditioner = TextConditioner(bert, max_length=8)
    captions = ["red xyzzyxyz blue", "red  blue", "redblueredblue"]
    assert conditioner.dropped_words(captions) == ["xyzzyxyz blue", "", "redblueredblue"]


def test_dropped_words_are_the_ones_without_effect(folder):
    conditioner = TextConditioner(folder, max_length=6)
    long = "red blue small circle red blue many many"
    rest = conditioner.dropped_words([long])[0]
    assert long.endswith(rest) and rest
    whole, short = conditioner.encode([long])[0], conditioner.encode([long.removesuffix(rest).strip()])[0]
    assert whole.shape[1] == 6
    torch.testing.assert_close(whole, short)


def test_many_cut_captions_do_not_flood_the_log(bert, caplog):
    conditioner = TextConditioner(bert, max_length=4)
    words = "abcdefghijklmnopqrstuvwxyz"
    with caplog.at_level(logging.WARNING):
        conditioner.encode([f"{a} {b} red red" for a in words for b in "xy"])
    assert conditioner.cut_count == 52
    assert len(conditioner.cut) == REPORTED and len(caplog.records) == REPORTED + 1


def test_cut_captions_can_be_refused(bert):
    with pytest.raises(UserError, match="more than 8 tokens.*'many'"):
        TextConditioner(bert, max_length=8, long="error").encode(["red blue small circle red blue many"])


def test_long_captions_are_read_in_windows(folder):
    conditioner = TextConditioner(folder, max_length=6, long="window")
    long, short = "red blue small circle red blue many many", "red"
    cond = conditioner({"caption": [long, short]})
    read = conditioner.tokenizer([long], "window").ids[0]
    alone, _ = conditioner.encode(read)
    real = conditioner.real(read)
    assert len(read) == 2 and not cond.tokens[~cond.mask].any()
    torch.testing.assert_close(cond.tokens[0][cond.mask[0]], alone[:, :6][real], atol=1e-5, rtol=1e-4)
    once = conditioner({"caption": [short]})
    torch.testing.assert_close(cond.tokens[1][cond.mask[1]], once.tokens[once.mask], atol=1e-5, rtol=1e-4)
    assert conditioner.dropped_words([long]) == [""] and not conditioner.cut
    assert conditioner.states_hash != TextConditioner(folder, max_length=6).states_hash == conditioner.encoder_hash


def test_weights_move_states_away_from_the_empty_caption(folder):
    plain, weighted = TextConditioner(folder), TextConditioner(folder, prompt_weights=True)
    expected, mask = plain.encode(["a red circle"])
    found, same = weighted.encode(["a (red:1.5) circle"])
    empty, real = plain.null_states()
    first = len(plain.tokenizer.before) + 1  # a
    last = empty[0, real.sum() - 1]  # where the empty caption has ended
    assert torch.equal(mask, same) and torch.equal(found[0, :first], expected[0, :first])
    assert torch.equal(found[0, first + 1 :], expected[0, first + 1 :])
    torch.testing.assert_close(found[0, first], last + 1.5 * (expected[0, first] - last))
    assert torch.equal(weighted.encode(["a red circle"])[0], expected)


def test_token_ids_take_the_place_of_captions(folder):
    conditioner = TextConditioner(folder, width=8, depth=1, heads=2)
    randomize(conditioner)
    ids = conditioner.tokenizer(CAPTIONS).ids[:, 0]
    by_ids, by_text = conditioner({"caption": ids}), conditioner({"caption": CAPTIONS})
    assert torch.equal(by_ids.mask, by_text.mask) and torch.equal(by_ids.tokens, by_text.tokens)
    with pytest.raises(UserError, match=r"token ids: expected whole numbers \(B,L\)"):
        conditioner({"caption": ids[0]})


# ---- options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": 4}, "layer 4.*0 to 3"),
        ({"layer": [0, -5]}, "layer -5"),
        ({"max_length": 41}, "max_length 41.*3 to 40"),
        ({"dropout": 1.5}, "dropout 1.5"),
        ({"long": "chunk"}, "'cut', 'error', 'window'"),
        ({"depth": 1, "heads": 3}, "heads 3: must divide the token width 16"),
        ({"encoder": "/no/such/folder"}, "/no/such/folder: no such folder"),
    ],
)
def test_mistakes_are_named(bert, options, message):
    with pytest.raises(UserError, match=message):
        TextConditioner(**{"encoder": bert, **options})
