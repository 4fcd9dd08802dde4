"""Tokenizers: from which files they come, that they are those of transformers, that they travel with a model."""

import copy
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.common.files import UserError
from ldm.conditioners import vocabulary
from ldm.conditioners.cleaning import open_clip
from ldm.conditioners.tokens import Tokenizer
from ldm.conditioners.vocabulary import Vocabulary, bert_tokenizer, find

PARITY = Path(__file__).parents[1] / "data" / "parity"
CLIP = str(PARITY / "txt2img_kl" / "clip_tiny")  # vocab.json, merges.txt
JSON = str(PARITY / "diffusers_models" / "tokenizer")  # tokenizer.json too
ODD = [
    "a photo of a cat", "A red car's wheel, 4k, highly-detailed!!", "", "  the   Cat  and the\tCAR  ", "naïve café ☕ 猫 it's they're",
    "zq#$%^ 2026 " + "cat " * 90, "tom &amp; jerry &lt;b&gt;", "“curly” it’s", "ﬁne ﬀ", "ＦＵＬＬ　width", "ΟΔΟΣ İstanbul", "e\u0301 NFC",
    "a\u00a0b\u2003c\u200bd", "line1\nline2\r\nline3", "👩‍👩‍👧 🏳️‍🌈", "１２３ ½ ٣٤", "don't CAN'T we'll", "<|startoftext|> x <|endoftext|> y", "x" * 200,
]  # fmt: skip


@pytest.mark.parametrize("folder", [CLIP, JSON])
def test_clip_tokens_are_those_of_transformers(folder):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder)(ODD, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    backend = find(folder)
    windows = Tokenizer(backend, 77, backend.token_to_id("<|endoftext|>"))(ODD)
    assert torch.equal(windows.ids[:, 0], theirs.input_ids) and torch.equal(windows.mask[:, 0], theirs.attention_mask.bool())


def test_vocabulary_and_merges_make_what_tokenizer_json_has(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(f"{JSON}/{name}", tmp_path)
    assert torch.equal(Tokenizer(find(str(tmp_path)), 77, 0)(ODD).ids, Tokenizer(find(JSON), 77, 0)(ODD).ids)


def test_word_pieces_are_those_of_transformers(tmp_path):
    from transformers import BertTokenizer

    backend = find("bert")
    ours = Tokenizer(backend, 77, 0)(ODD).ids
    words = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    assert len(words) == 30522 and (words[0], words[101], words[102]) == ("[PAD]", "[CLS]", "[SEP]")
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    assert torch.equal(Tokenizer(find(str(tmp_path)), 77, 0)(ODD).ids, ours)
    theirs = BertTokenizer.from_pretrained(tmp_path)(ODD, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ours[:, 0], theirs.input_ids)
    cased = bert_tokenizer({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "A": 3, "a": 4}, lowercase=False)
    assert cased.encode("A a").ids == [1, 3, 4, 2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `open_clip` that holds the list of merges, and must not be run."""
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    merges = (Path(CLIP) / "merges.txt").read_text().splitlines()
    with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(merges) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vocabulary, "MERGES", len(merges) - 1)


def test_clips_own_list_of_merges_gives_the_ids_of_its_vocabulary(package):
    found = find("clip")
    assert found.get_vocab() == json.loads((Path(CLIP) / "vocab.json").read_text())
    assert torch.equal(Tokenizer(found, 77, 0)(ODD).ids, Tokenizer(find(CLIP), 77, 0)(ODD).ids)
    assert "open_clip" not in sys.modules


def test_offline_and_missing_says_what_to_do(tmp_path):
    code = """
from ldm.common.files import UserError
from ldm.conditioners.vocabulary import PUBLISHED, Published, find
PUBLISHED["clip"] = Published("open_clip_torch", "no_such_module", "x.gz", "openai/clip-vit-large-patch14")
for name in ("clip", "some/unknown", "/no/such", "a/b/c"):
    try:
        find(name)
    except UserError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    clip, unknown, *folders = run.stdout.splitlines()
    assert "openai/clip-vit-large-patch14: cannot get tokenizer.json, or vocab.json and merges.txt" in clip
    assert "pip install --no-deps open_clip_torch" in clip and "HF_HUB_OFFLINE" in clip and "hf download" in clip
    assert "some/unknown: cannot get" in unknown and "pip install" not in unknown
    assert all("no such folder" in line for line in folders) and len(folders) == 2


def test_incomplete_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="lacks tokenizer.json, or vocab.json and merges.txt, or vocab.txt"):
        find(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read"):
        find(str(tmp_path))


# ---- as part of a model


def test_a_vocabulary_travels_with_the_weights(tmp_path):
    shutil.copytree(CLIP, tmp_path / "words")
    first = Vocabulary(str(tmp_path / "words"))
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    expected = first.tokenizer.encode("a painting").ids
    shutil.rmtree(tmp_path / "words")
    assert set(saved) == {"text"} and saved["text"].dtype == torch.uint8
    with torch.device("meta"):
        planned = Vocabulary(str(tmp_path / "words"))
    for second, assign in ((Vocabulary(str(tmp_path / "words")), False), (planned, True), (Vocabulary(None), True)):
        second.load_state_dict(saved, assign=assign)
        assert second.tokenizer.encode("a painting").ids == expected
        assert torch.equal(second.half().text, saved["text"])


def test_weights_without_a_vocabulary_leave_the_one_there_is():
    held = Vocabulary(CLIP)
    held.load_state_dict({})
    assert held.tokenizer.get_vocab_size() == 589


def test_copies_do_not_carry_the_tokenizer_twice():
    held = Vocabulary(CLIP)
    assert held.tokenizer is held.tokenizer
    twin = copy.deepcopy(held)
    assert torch.equal(twin.text, held.text) and twin.tokenizer.get_vocab_size() == 589
    assert len(pickle.dumps(held)) < 1.1 * held.text.numel() + 5000


def test_nothing_is_looked_for_where_there_are_no_weights(monkeypatch):
    monkeypatch.setattr(vocabulary, "find", lambda *_, **__: pytest.fail("looked for files"))
    with torch.device("meta"):
        assert Vocabulary(CLIP).text is None
    with pytest.raises(UserError, match="no vocabulary: give token ids"):
        _ = Vocabulary(None).tokenizer


# ---- cleaning


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Tom &amp; Jerry", "tom & jerry"), ("&amp;lt;b", "<b"), ("a&nbsp;b", "a\u00a0b"), ("“It’s”", "\"it's\""), ("ﬁne ĳ", "fine ij"),
        ("ＦＵＬＬ　７", "full 7"), ("be\x07ll\x1b[31mred", "bellred"), ("e\u0301", "é"), ("ΟΔΟΣ", "οδος"), ("5 < 6 &amp; 7", "5 < 6 & 7"),
    ],
)  # fmt: skip
def test_open_clip_cleans_texts(text, clean):
    assert open_clip(text) == clean


def test_open_clips_own_tokenizer_gives_the_same_ids():
    """Where it is installed: with CLIP's real vocabulary."""
    module = pytest.importorskip("open_clip.tokenizer")
    odd = [text for text in ODD if "<|" not in text]  # its marks are spelled otherwise
    assert torch.equal(Tokenizer(find("clip"), 77, 0, open_clip)(odd).ids[:, 0], module.SimpleTokenizer()(odd))
