"""Tiny random text encoders of each kind, saved as transformers saves them."""

import pytest
import torch

LAYERS, WIDTH = 3, 16
TEMPLATES = {  # special tokens (pad first) and how they surround a caption
    "bert": (["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]"),
    "clip": (["<|end|>", "<|start|>", "[UNK]"], "<|start|> $A <|end|>"),
    "t5": (["<pad>", "</s>", "[UNK]"], "$A </s>"),
}


def save_tokenizer(folder, kind):
    """A word-piece tokenizer over single letters and a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special, template = TEMPLATES[kind]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*special, *letters, *("##" + c for c in letters), "red", "blue", "circle", "small", "many"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, vocabulary[token]) for token in special if token in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], unk_token="[UNK]").save_pretrained(folder)
    return len(pieces)


def tiny_model(kind, vocabulary):
    import transformers as tf

    torch.manual_seed(0)
    size = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32)
    if kind == "bert":
        return tf.BertModel(tf.BertConfig(vocab_size=vocabulary, max_position_embeddings=40, **size))
    if kind == "clip":  # the whole model, as published checkpoints are: the vision part is to be ignored
        text = dict(vocab_size=vocabulary, max_position_embeddings=32, bos_token_id=1, eos_token_id=0, **size)
        vision = dict(image_size=8, patch_size=4, **size)
        return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    config = dict(d_model=WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=LAYERS, feed_forward_proj="gated-gelu")
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **config))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    for kind in TEMPLATES:
        made[kind] = tmp_path_factory.mktemp(kind)
        tiny_model(kind, save_tokenizer(made[kind], kind)).save_pretrained(made[kind])
    return made


@pytest.fixture(params=list(TEMPLATES))
def folder(request, folders):
    return str(folders[request.param])


@pytest.fixture
def bert(folders):
    return str(folders["bert"])
