"""Windows of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from ldm.common.files import UserError
from ldm.conditioners.tokens import Tokenizer, specials, split, up_to_end

WORDS = ["[PAD]", "[S]", "[E]", "[UNK]", "red", "blue", "green", "r", "##e", "##d"]
START, END, RED, BLUE, GREEN = 1, 2, 4, 5, 6


def backend():
    made = Backend(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[S] $A [E]", special_tokens=[("[S]", START), ("[E]", END)])
    return made


@pytest.fixture
def tokenizer():
    return Tokenizer(backend(), 5, 0)


def test_a_window_is_start_text_end_padding(tokenizer):
    windows = tokenizer(["red blue", ""])
    assert windows.ids.tolist() == [[[START, RED, BLUE, END, 0]], [[START, END, 0, 0, 0]]]
    assert windows.mask.sum(dim=2).tolist() == [[4], [2]]
    assert windows.weights is None and windows.unread == ["", ""]


def test_what_does_not_fit_is_cut_from_the_beginning_of_a_word(tokenizer):
    windows = tokenizer(["red blue green red blue", "red red rede"])
    assert windows.ids[:, 0].tolist() == [[START, RED, BLUE, GREEN, END], [START, RED, RED, RED, END]]
    assert windows.unread == ["red blue", "rede"]


def test_all_is_read_in_several_windows_cut_between_words(tokenizer):
    windows = tokenizer(["red blue green red blue", "red blue rede", "red"], "window")
    assert windows.ids[0].tolist() == [[START, RED, BLUE, GREEN, END], [START, RED, BLUE, END, 0]]
    assert windows.ids[1].tolist() == [[START, RED, BLUE, END, 0], [START, RED, 8, END, 0]]  # "rede" is red, ##e
    assert windows.ids[2].tolist() == [[START, RED, END, 0, 0], [0] * 5]
    assert windows.mask[2].sum(dim=1).tolist() == [3, 0] and windows.unread == ["", "", ""]


def test_a_word_longer_than_a_window_is_cut_inside(tokenizer):
    ids = tokenizer(["red" + "e" * 6], "window").ids
    assert ids[0, :, 1:4].tolist() == [[RED, 8, 8], [8, 8, 8], [8, END, 0]]


def test_weights_go_with_the_characters(tokenizer):
    windows = tokenizer(["red (blue green:1.5) red", "blue"], "window", weighted=True)
    assert windows.ids[0].tolist() == [[START, RED, BLUE, GREEN, END], [START, RED, END, 0, 0]]
    assert windows.weights[0].tolist() == [[1, 1, 1.5, 1.5, 1], [1] * 5] and (windows.weights[1] == 1).all()
    assert tokenizer(["(red:1.0)"], weighted=True).weights is None
    assert tokenizer(["(red:1.5)"]).ids[0, 0].tolist() == [START, 3, RED, 3, END]  # brackets are text unless asked for


def test_texts_are_cleaned_first():
    made = Tokenizer(backend(), 5, 0, clean=lambda text: text.replace("rouge", "red"))
    windows = made(["(rouge:2) rouge"], weighted=True)
    assert windows.ids[0, 0].tolist() == [START, RED, RED, END, 0] and windows.weights[0, 0].tolist() == [1, 2, 1, 1, 1]


def test_the_backend_is_left_alone():
    given = backend()
    given.enable_truncation(4)
    given.enable_padding(length=9)
    assert Tokenizer(given, 5, 0)(["red blue green"]).ids[0, 0].tolist() == [START, RED, BLUE, GREEN, END]
    assert given.truncation["max_length"] == 4 and given.padding["length"] == 9


def test_special_tokens_are_found(tokenizer):
    assert (tokenizer.before, tokenizer.after, tokenizer.room) == ([START], [END], 3)
    bare = backend()
    bare.post_processor = processors.TemplateProcessing(single="$A [E]", special_tokens=[("[E]", END)])
    assert specials(bare) == ([], [END])
    with pytest.raises(UserError, match="max_length 2.*puts 2 tokens around"):
        Tokenizer(backend(), 2, 0)


def test_real_tokens_end_with_the_first_end():
    ids = torch.tensor([[1, 4, 2, 2, 2], [1, 2, 0, 0, 0], [1, 4, 4, 4, 4]])
    assert up_to_end(ids, 2).sum(dim=1).tolist() == [3, 2, 5]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["red", "rede", "redede", "blue", "r"]), max_size=30), st.integers(1, 6))
def test_windows_hold_every_token_once_in_order(words, room):
    text = "  ".join(words)
    encoding = backend().encode(text, add_special_tokens=False)
    parts = split(text, encoding.offsets, room)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(encoding.ids)))
    assert all(part.stop - part.start <= room for part in parts)
    if room >= 4:  # longer than any word: each window begins with one
        starts = [encoding.offsets[part.start][0] for part in parts if part.stop > part.start]
        assert all(start == 0 or text[start - 1] == " " for start in starts)
