"""What pictures are compared by when a Fréchet distance is taken: pictures (B,C,H,W) in [-1,1] -> features (B,D).

An extractor is any callable of that kind. Distances in different features are in different units and must not be
compared; so each has its own name, and only features of the Inception network make a "FID" (1706.08500).
"""

from __future__ import annotations

import importlib
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.common.build import build, check_call, locate
from ldm.common.files import UserError, nearest
from ldm.common.random import generator

log = logging.getLogger(__name__)

Extractor = Callable[[Tensor], Tensor]


class RandomConv(nn.Module):
    """Four layers of 3x3 filters that nobody trained; the same for everybody, as they come from a seed.

    Of each layer's answers: mean and standard deviation over the picture. Half of the first filters sum to zero and see
    edges alone, the others see colours too. Reacts to blur, noise, lost detail and wrong colours; knows nothing of what
    is shown, so that two good autoencoders differ less than people see. Needs no file and takes any number of channels.

    Args:
        image_channels: channels of the pictures.
        width: filters in a layer; the features are 8 times as many.
        seed: of the filters. Another width or seed is another ruler, and becomes part of the name.
    """

    def __init__(self, image_channels: int = 3, width: int = 32, seed: int = 0):
        super().__init__()
        self.name = "random-conv" if (width, seed) == (32, 0) else f"random-conv-{width}-{seed}"
        self.layers, channels = nn.ModuleList(), image_channels
        for depth in range(4):
            layer = nn.Conv2d(channels, width, 3, padding=1, padding_mode="replicate", bias=False)
            spread = (2 / (9 * channels)) ** 0.5  # He et al., 1502.01852: answers keep their size from layer to layer
            weight = torch.randn(layer.weight.shape, generator=generator(seed, "random-conv", depth)) * spread
            if depth == 0:
                weight[: width // 2] -= weight[: width // 2].mean(dim=(2, 3), keepdim=True)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)
            channels = width

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,8*width)
        found = []
        for layer in self.layers:
            x = F.relu(layer(x))
            found += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)]
            x = F.avg_pool2d(x, 2) if min(x.shape[2:]) > 1 else x
        return torch.cat(found, dim=1)


class Inception(nn.Module):
    """The 2048 features that FID is defined by: Inception of 2015-12-05, as the package torch-fidelity has it.

    Args:
        weights: the network's file; None: torch's hub cache.
        image_channels: 3, or 1, which counts as three equal ones.
    Raises:
        UserError: where package or file are missing; names the ways out.
    """

    URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

    def __init__(self, weights: str | None = None, image_channels: int = 3):
        super().__init__()
        if image_channels not in (1, 3):
            raise UserError(f"Inception sees 3 channels or 1, these pictures have {image_channels}; take random-conv")
        file = Path(weights) if weights else self.cached()
        if not file.is_file():
            raise UserError(f"{file}: no such file; Inception's weights are at {self.URL} (91 MB)")
        try:
            module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise UserError("Inception needs the package torch-fidelity: pip install torch-fidelity") from error
        try:
            torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity would run what is pickled in it
            self.network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{file}: not Inception's weights ({str(error).strip().split('.')[0]})") from error

    def forward(self, x: Tensor) -> Tensor:  # (B,3 or 1,H,W) -> (B,2048)
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # what the network was defined on
        return self.network(levels.expand(-1, 3, -1, -1))[0]

    @classmethod
    def cached(cls) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(cls.URL).name


BUILT_IN: dict[str, type] = {"random-conv": RandomConv, "inception": Inception}


def make_extractor(name: str, params: Mapping[str, Any], image_channels: int, where: str = "--features") -> Extractor:
    """One of BUILT_IN, or whatever class or function `package.module:Name` is, called with `params`.

    Raises UserError where there is no such thing, or it takes no such params."""
    if name not in BUILT_IN and not {":", "."} & set(name):
        near = nearest(name, BUILT_IN)
        raise UserError(f"{where}: there is no {name!r}{f'; nearest: {near}' if near else ''}; there are "
                        f"{', '.join(BUILT_IN)}, and any package.module:Class")
    target = f"{__name__}.{BUILT_IN[name].__name__}" if name in BUILT_IN else name.replace(":", ".")
    try:
        mistakes = check_call(locate(target), params, "", given=("image_channels",))
        if mistakes:
            raise UserError("; ".join(mistakes))
        return build({"target": target, "params": dict(params)}, image_channels=image_channels)
    except UserError as error:
        raise UserError(f"{where} {name}: {error}") from error


def default_extractor(image_channels: int) -> Extractor:
    """Inception where its weights are in the cache, else RandomConv; whichever it is, it says so by its name."""
    if image_channels in (1, 3) and Inception.cached().is_file():
        try:
            return Inception(image_channels=image_channels)
        except UserError as error:
            log.warning("%s; the distance is taken in other features", error)
    return RandomConv(image_channels)


def label(extractor: Extractor) -> str:
    """What the Fréchet distance of reconstructions in these features is called."""
    if isinstance(extractor, Inception):
        return "rFID"
    return f"rFD-{getattr(extractor, 'name', None) or getattr(extractor, '__name__', type(extractor).__name__)}"
