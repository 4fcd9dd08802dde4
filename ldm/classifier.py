"""A classifier of noisy latents, with the noise that it was trained on: what a checkpoint of one holds, and what guides by it.

    guide = by_classifier(load_classifier(path), 2.0, bundle.denoiser.process, bundle.autoencoder)
    pictures = bundle.generate({"class": [3, 5]}, guide=guide)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm import guidance
from ldm.common.build import TRUSTED, Block, build, near
from ldm.common.files import UserError
from ldm.common.weights import compare, without_weights
from ldm.networks.classifier import log_p
from ldm.parameterization import Denoise
from ldm.process import Process

Guide = Callable[[Denoise, Mapping[str, Any]], Denoise]  # (denoise, batch) -> denoise


class NoisyClassifier(nn.Module):
    """p(y | x_t): a network, and the process whose noise it knows.

    Args:
        about: what a checkpoint says of it: "network" and "process", blocks that build both anew; "autoencoder_hash", of
            whose latents it knows.
    """

    def __init__(self, network: nn.Module, process: Process, about: Mapping[str, Any] | None = None):
        super().__init__()
        self.network, self.process, self.about = network, process, dict(about or {})

    @classmethod
    def from_about(cls, about: Mapping[str, Any], trust: bool = False) -> NoisyClassifier:
        """In eval mode and without weights (meta device). trust: build targets outside of TRUSTED too."""
        allowed = None if trust else TRUSTED
        network = without_weights(lambda: build(about["network"], allowed=allowed))
        return cls(network, build(about["process"], allowed=allowed), about).eval()

    def assign(self, weights: Mapping[str, Tensor], origin: str = "weights") -> NoisyClassifier:
        """Take these tensors as the weights. UserError where names or shapes differ."""
        if problems := compare(self.state_dict(), weights):
            raise UserError(f"{origin}: the weights do not fit the classifier that is described: {problems}")
        self.load_state_dict(weights, assign=True, strict=True)
        return self

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:  # (B,C,h,w), (B,) of the process -> logits (B,classes)
        return self.network(x_t, self.process.time(t))


def build_classifier(network: Block, process: Block, autoencoder: Autoencoder, size: Sequence[int] | None) -> NoisyClassifier:
    """A new classifier of an autoencoder's latents; the one place where its network's sizes are derived.

    size: height and width of the pictures; a network that needs the side of the latents takes them from it.
    """
    with torch.device("cpu"):  # its tables are numbers even where a model is planned without any
        process_made = build(process)
    side = size[0] // autoencoder.factor if size and size[0] == size[1] else None
    derived = {"in_channels": autoencoder.channels, "size": side}
    about = {"network": {"target": network["target"], "params": {**(network.get("params") or {}), **derived}},
             "process": getattr(process_made, "block", process)}  # fmt: skip
    return NoisyClassifier(build(network, **derived), process_made, about)


def cross_entropy(classifier: nn.Module, z: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(y | x_t) of latents z (B,C,h,w) noised to t, and whether y is the likeliest class: (B,), (B,) bool."""
    logits = classifier(classifier.process.add_noise(z, noise, t), t).float()
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(dim=1) == y


def by_classifier(classifier: NoisyClassifier, scale: float, process: Process, autoencoder: Autoencoder | None = None,
                  key: str = "class") -> Guide:
    """Guidance towards batch[key], (B,) int (2105.05233, algorithm 2): what ``Bundle.generate`` takes as ``guide``.

    Args:
        scale: factor of the classifier's gradient.
        process, autoencoder: of the model that is guided.

    Raises:
        UserError: for another process or autoencoder than those that the classifier was trained with.
    """
    if not same(classifier.process, process):
        known = classifier.about.get("process") or type(classifier.process).__name__
        raise UserError(f"the classifier knows the noise of {known}, the model samples another process "
                        f"({type(process).__name__}); take a classifier that was trained with the model's process")
    expected = classifier.about.get("autoencoder_hash")
    if expected and autoencoder is not None and (found := autoencoder.content_hash()) != expected:
        raise UserError(f"the classifier was trained on the latents of another autoencoder (hash {expected}) than the model's "
                        f"(hash {found})")

    def guide(denoise: Denoise, batch: Mapping[str, Any]) -> Denoise:
        if key not in batch:
            raise UserError(f"guidance by a classifier: the batch has no {key!r}{near(key, batch)}; it has {', '.join(batch)}")
        y, classes = torch.as_tensor(batch[key]), classifier.network.classes
        if y.is_floating_point() or ((y < 0) | (y >= classes)).any():
            raise UserError(f"{key!r} holds whole numbers from 0 to {classes - 1}, got {y.tolist()[:5]}")
        return guidance.classifier(denoise, log_p(classifier, y), scale, process)

    return guide


def same(a: Process, b: Process) -> bool:
    """Whether two processes have the same noise at the same times, and tell a network the same."""
    if (a.t_min, a.t_max) != (b.t_min, b.t_max):
        return False
    t = torch.linspace(a.t_min, a.t_max, 9, dtype=torch.float64)
    pairs = zip((*a.exact(t), a.time(t)), (*b.exact(t), b.time(t)), strict=True)
    return all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in pairs)
