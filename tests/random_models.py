"""Models of the smallest size with random weights, of any conditions and processes."""

import copy

import torch
from torch import nn

from ldm.bundle import Bundle


def random_model(config, conditioner=None, **params):
    """A model of this config with another conditioner, and random weights everywhere."""
    config = copy.deepcopy(config)
    config["model"]["params"] |= params
    config["model"]["params"]["conditioner"] = conditioner
    made = Bundle.from_config(config).to_empty(device="cpu")
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in made.modules():
            for name, value in part.named_parameters(recurse=False):
                plain = isinstance(part, nn.Embedding) or value.ndim < 2 and name not in ("weight", "bias")
                spread = 1.0 if plain else value[0].numel() ** -0.5
                value.normal_(0, spread, generator=source) if value.ndim > 1 or plain else value.fill_(1.0 if name == "weight" else 0.0)
    made.autoencoder.set_statistics(torch.zeros(4), torch.ones(4), 1)
    return made
