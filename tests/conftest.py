"""A whole model of the smallest size, randomly initialised, for what is done with models."""

import logging

import pytest
import torch
from torch import nn

import ldm  # noqa: F401  before transformers: it repairs torchvision

WORDS = "a the small large red green blue circle square star on white black background of"


@pytest.fixture(autouse=True)
def nobody_listens_to_the_log():
    """main.py sets up what a terminal shows, and fixtures run main.py: each test begins without."""
    from ldm.app.terminal import Records

    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, Records)]
    for name in ("ldm", "autoencoder"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory) -> str:
    """Folder of a BERT of two blocks, width 16, at most 24 tokens; it knows WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS.split()]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=24, **size)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_config(text_encoder) -> dict:
    """Text to pictures of 32 x 32: KL autoencoder f4, UNet of two levels, flow matching."""
    bottleneck = {"target": "autoencoder.bottlenecks.KL", "params": {"channels": 4}}
    convolutional = dict(bottleneck=bottleneck, width=16, mult=[1, 2], blocks=1, patch=2, attention=False)
    unet = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, transformer_depth=[0, 1], num_heads=2)
    conditioner = dict(encoder=text_encoder, width=32, depth=1, heads=2, dropout=0.1)
    return {
        "name": "tiny", "autoencoder": {"target": "autoencoder.model.convolutional", "params": convolutional},
        "model": {"target": "ldm.lit.DiffusionModule", "params": {
            "network": {"target": "ldm.networks.unet.UNet", "params": unet},
            "conditioner": {"target": "ldm.conditioners.text.TextConditioner", "params": conditioner},
            "process": {"target": "ldm.process.RectifiedFlow"},
            "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}},
        }},
        "sampling": {"sampler": "dpmpp_2m", "steps": 4, "times": "linear", "guidance": 2.0, "size": [32, 32]},
    }  # fmt: skip


@pytest.fixture(scope="session")
def bundle(model_config):
    """A model with random weights everywhere, those included that training begins with at zero."""
    from ldm.bundle import Bundle

    made = Bundle.from_config(model_config).to_empty(device="cpu")
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                spread = part.weight[0].numel() ** -0.5
                part.weight.normal_(0, spread, generator=source)
            for name, value in part.named_parameters(recurse=False):
                if value.ndim < 2:
                    value.fill_(1.0 if name == "weight" else 0.0)
    made.autoencoder.set_statistics(torch.zeros(4), torch.ones(4), 1)
    return made
