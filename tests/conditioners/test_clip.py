"""CLIP's text encoder as a part of the model. Its states are held to recorded ones in tests/parity/test_text_encoders.py."""

import copy
from pathlib import Path

import pytest
import torch

from ldm.common.files import UserError
from ldm.common.weights import without_weights
from ldm.conditioners.clip import ClipText

FOLDER = str(Path(__file__).parents[1] / "data" / "parity" / "txt2img_kl" / "clip_tiny")
SIZE = dict(vocab_size=589, width=16, layers=3, heads=2, max_length=20, vocabulary=FOLDER)
LONG = "a painting of a cat, " * 8


def clip(**options):
    torch.manual_seed(0)
    made = ClipText(**{**SIZE, **options})
    for weights in made.parameters():
        weights.data = torch.randn_like(weights) * 0.3
    return made.eval()


def ids(*rows):
    return torch.tensor([[587, *row, *[588] * (19 - len(row))] for row in rows])


def test_sizes_are_those_of_the_published_encoders():
    with torch.device("meta"):
        large = ClipText()
        huge = ClipText(width=1024, layers=24, activation="gelu", layer=-2, pad=0, projection=1024, logit_scale=True)
        big = ClipText(width=1280, layers=32, activation="gelu", layer=-2, final_norm=False, pooled="projected", projection=1280)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in (("l", large), ("h", huge), ("g", big))}
    assert count == {"l": 123_060_480, "h": 354_032_641, "g": 694_659_840}  # as transformers and OpenCLIP count
    assert [part.transformer.blocks[0].heads for part in (large, huge, big)] == [12, 16, 20]
    assert (large.width, large.vector_width, big.width, big.vector_width) == (768, None, 1280, 1280)
    assert (large.start, large.end, large.pad, huge.pad, huge.layer, huge.depth, big.depth) == (49406, 49407, 49407, 0, 23, 23, 32)


def test_a_token_sees_those_before_it_alone():
    made = clip()
    one, other = (made({"caption": ids(row)}).tokens for row in ([320, 321, 322], [320, 321, 400]))
    assert torch.equal(one[:, :3], other[:, :3]) and not torch.isclose(one[:, 3], other[:, 3]).all()


@pytest.mark.parametrize(("layer", "same"), [(-1, 3), (-2, 2), (0, 0)])
def test_layers_count_as_in_transformers(layer, same):
    whole = clip().transformer(ids([320]))
    assert len(whole) == 4
    bare = clip(layer=layer, final_norm=False)
    assert torch.equal(bare({"caption": ids([320])}).tokens, whole[same])
    normed = clip(layer=layer)
    assert torch.equal(normed({"caption": ids([320])}).tokens, normed.transformer.norm(whole[same]))


def test_the_pooled_state_is_where_the_caption_ends():
    made = clip(pooled="state", layer=-2)
    cond = made({"caption": ids([320, 321], [])})
    last = made.transformer.norm(made.transformer(ids([320, 321], []))[-1])
    torch.testing.assert_close(cond.vector, torch.stack([last[0, 3], last[1, 1]]))
    projected = clip(pooled="projected", projection=8)
    assert projected({"caption": ids([320])}).vector.shape == (1, 8) == (1, projected.vector_width)


def test_published_models_need_no_mask():
    made = clip()
    assert made({"caption": ["a cat", ""]}).mask is None and made.null(2).mask is None
    torch.testing.assert_close(made({"caption": ["", ""]}).tokens, made.null(2).tokens)


def test_padding_can_be_hidden():
    made = clip(keep_padding=False)
    cond = made({"caption": ["a cat", ""]})
    real = made.tokenizer(["a cat", ""]).mask.sum(dim=(1, 2))
    assert cond.mask.sum(dim=1).tolist() == real.tolist() and cond.tokens.shape[1] == 8
    torch.testing.assert_close(cond.tokens[cond.mask][: real[0]], clip()({"caption": ["a cat"]}).tokens[0, : real[0]])


def test_the_null_may_be_zeros():
    made = clip(zero_null=True, pooled="state")
    null = made.null(2)
    assert null.tokens.shape == (2, 20, 16) and null.vector.shape == (2, 16) and not null.tokens.any() and not null.vector.any()
    assert made({"caption": [""]}).tokens.any()


# ---- what is trained and saved


def test_all_is_frozen_and_part_of_the_model():
    made = clip(pooled="projected", projection=8)
    assert not any(p.requires_grad for p in made.parameters()) and not made.trained
    assert set(made.state_dict()) == {*dict(made.named_parameters()), "vocabulary.text"}
    assert not made({"caption": ["a"]}).tokens.requires_grad


@pytest.mark.parametrize("options", [{}, {"layer": -2}, {"layer": -2, "final_norm": False}, {"layer": 1, "pooled": "state"},
                                     {"pooled": "projected", "projection": 8}, {"projection": 8, "logit_scale": True}])  # fmt: skip
def test_what_is_trained_is_what_the_condition_depends_on(options):
    made = clip(trainable=True, **options)
    cond = made({"caption": ["a cat"]})
    (cond.tokens.square().sum() + (0 if cond.vector is None else cond.vector.square().sum())).backward()
    reached = {name for name, p in made.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in made.named_parameters() if p.requires_grad}
    assert made.states_hash is None


def test_a_frozen_encoder_is_as_exact_under_autocast():
    made, trained = clip(), clip(trainable=True)
    batch = {"caption": ids([320, 321])}
    plain = made(batch).tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(batch).tokens, plain) and not torch.equal(trained(batch).tokens, plain)
    assert made.to(torch.bfloat16)(batch).tokens.dtype == torch.bfloat16


def test_it_is_made_without_contents_and_filled_by_assignment():
    made = clip(pooled="state")
    planned = without_weights(lambda: ClipText(**SIZE, pooled="state"))
    assert planned.device.type == "meta" and "vocabulary.text" not in planned.state_dict()
    assert planned({"caption": ids([320])}).tokens.shape == (1, 20, 16) and planned.null(2).vector.is_meta
    planned.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(planned({"caption": ["a cat"]}).tokens, made({"caption": ["a cat"]}).tokens)
    assert planned.transformer.token.weight.data_ptr() == made.transformer.token.weight.data_ptr()


def test_the_hash_is_of_all_that_the_states_depend_on():
    made = clip()
    base = made.states_hash
    assert base == clip(dropout=0.5, zero_null=True).states_hash == copy.deepcopy(made).states_hash
    others = [clip(layer=-2), clip(final_norm=False), clip(heads=4), clip(activation="gelu"), clip(long="window"), clip(pad=0),
              clip(prompt_weights=True), clip(clean="open_clip")]  # fmt: skip
    moved = clip()
    moved.transformer.norm.bias.data[0] += 1
    assert len({base, moved.states_hash, *(other.states_hash for other in others)}) == 10
    assert made.encoder_hash is None  # nothing has to be found again


# ---- captions


def test_long_captions_become_windows():
    made = clip(long="window", pooled="state")
    cond = made({"caption": [LONG, "a cat"]})
    read = made.tokenizer([LONG], "window").ids[0]
    assert cond.tokens.shape == (2, 20 * len(read), 16) and len(read) > 1
    assert cond.mask[0].all() and cond.mask[1].tolist() == [True] * 20 + [False] * 20 * (len(read) - 1)
    torch.testing.assert_close(cond.tokens[0].view(-1, 20, 16), made({"caption": read}).tokens)
    short = made({"caption": ["a cat"]})
    torch.testing.assert_close(cond.tokens[1, :20], short.tokens[0])
    torch.testing.assert_close(cond.vector, torch.cat([made({"caption": read[:1]}).vector, short.vector]))
    assert short.mask is None and not cond.tokens[1, 20:].any()
    assert made.dropped_words([LONG, "a cat"]) == ["", ""]


def test_long_captions_are_cut_or_refused():
    made = clip()
    cond, rest = made({"caption": [LONG]}), made.dropped_words([LONG])[0]
    assert cond.tokens.shape[1] == 20 and LONG.strip().endswith(rest) and made.cut == {LONG: rest}
    with pytest.raises(UserError, match="more than 20 tokens; not read: "):
        clip(long="error")({"caption": [LONG]})


@pytest.mark.parametrize("keep_padding", [True, False])
def test_weights_move_states_away_from_the_empty_caption(keep_padding):
    made = clip(prompt_weights=True, keep_padding=keep_padding, pooled="state")
    plain = made({"caption": ["a cat on a painting"]})
    for weight in (0.0, 1.7):
        heavy = made({"caption": [f"a (cat:{weight}) on a painting"]})
        weights = made.tokenizer([f"a (cat:{weight}) on a painting"], weighted=True).weights[0, 0, : heavy.tokens.shape[1]]
        chosen = weights != 1
        assert 0 < chosen.sum() < 5 and torch.equal(heavy.vector, plain.vector)
        assert torch.equal(heavy.tokens[0, ~chosen], plain.tokens[0, ~chosen])
        null = made.null(1).tokens[0]
        empty = torch.stack([null[i if keep_padding else min(i, 1)] for i in range(len(weights))])  # "" has two tokens
        torch.testing.assert_close(heavy.tokens[0, chosen], (empty + weight * (plain.tokens[0] - empty))[chosen])
    assert torch.equal(clip(keep_padding=keep_padding)({"caption": ["a cat"]}).tokens, made({"caption": ["a cat"]}).tokens)


def test_negative_captions_take_the_place_of_the_empty_one():
    made = clip(long="window")
    cond, away = made.with_null({"caption": ["a cat"], "negative_caption": [LONG]})
    assert torch.equal(away.tokens, made({"caption": [LONG]}).tokens)
    both = type(cond).cat([cond, away])
    assert both.mask.sum(dim=1).tolist() == [20, away.tokens.shape[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads 3: must divide the width 16"),
        ({"layer": 4}, "layer 4: .* states 0 to 3"),
        ({"pooled": "projected"}, "pooled 'projected': .* width for projection"),
        ({"activation": "quickgelu"}, "activation 'quickgelu'.*nearest: 'quick_gelu'"),
        ({"clean": "x"}, "clean 'x': there are none, open_clip"),
        ({"long": "chunk"}, "long 'chunk': expected 'cut', 'error', 'window'"),
        ({"dropout": 2}, "dropout 2"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ClipText(**{**SIZE, **options})


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (torch.zeros(2, 21, dtype=torch.int64), r"whole numbers \(B,L\), L from 1 to 20, got torch.int64 \(2, 21\)"),
        (torch.zeros(2, 5), "got torch.float32"),
        (torch.full((1, 20), 589), "from 589 to 589, but this model knows 0 to 588"),
    ],
)
def test_wrong_token_ids_are_named(captions, message):
    with pytest.raises(UserError, match=message):
        clip()({"caption": captions})


def test_a_vocabulary_of_another_model_is_refused():
    for options in ({"vocab_size": 500}, {"vocab_size": 600}, {"start": 5}):
        with pytest.raises(UserError, match=r"a vocabulary of 589 with \[587\] before a text"):
            clip(**options)({"caption": ["a cat"]})


def test_stored_states_take_the_place_of_captions(tmp_path):
    from autoencoder.cached import CachedDataset, write_text

    class Captions(torch.utils.data.Dataset):
        captions, fingerprint = ["a cat", LONG, ""], "three"

        def __len__(self):
            return len(self.captions)

        def __getitem__(self, i):
            return {"image": torch.zeros(3, 8, 8), "caption": self.captions[i], "key": str(i)}

        def caption(self, i):
            return self.captions[i]

    for long in ("cut", "window"):
        made, data = clip(long=long, pooled="state"), Captions()
        texts = write_text(data, made.encode, made.states_hash, tmp_path, dtype=torch.float32)
        stored, live = made(CachedDataset(data, texts=texts).batch(range(3))), made({"caption": data.captions})
        assert torch.equal(stored.tokens, live.tokens) and torch.equal(stored.vector, live.vector)
        assert (stored.mask is None) == (live.mask is None) == (long == "cut")
        assert live.mask is None or torch.equal(stored.mask, live.mask)
