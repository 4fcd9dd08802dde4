"""What judges a reconstruction by more than its pixels: features of a trained network, and a trained critic."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from autoencoder.losses import CRITIC, adaptive_weight
from ldm.common.files import UserError

log = logging.getLogger(__name__)

VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"


class Lpips:
    """Learned perceptual distance (1801.03924) on VGG16, version 0.1 with the weights of the lpips package.

    Not a module of anybody's: its 15 million frozen weights belong in no checkpoint.

    Args:
        weights: torchvision's VGG16 as a file; None: torch's hub cache, else a download of 528 MB.
    Raises:
        UserError: where the weights cannot be had; names the ways out.
    """

    def __init__(self, weights: str | None = None):
        with torch.device("meta"):
            trunk = vgg16()
        state = {name.removeprefix("features."): value for name, value in vgg16_weights(weights).items()}
        state = {name: value for name, value in state.items() if name in trunk.state_dict()}
        if len(state) < len(trunk.state_dict()):
            raise UserError(f"{weights or VGG}: {len(state)} of {len(trunk.state_dict())} convolution tensors of VGG16 "
                            "found; expected torchvision's vgg16 state dict (features.0.weight ...)")
        trunk.load_state_dict(state, assign=True)
        self.trunk = trunk.requires_grad_(False).eval()
        package = find_spec("lpips")
        if package is None:
            raise UserError("loss.perceptual: the package lpips is not installed; pip install lpips, or loss.perceptual=0")
        lins = torch.load(Path(package.origin).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
        self.lins = [lins[f"lin{n}.model.1.weight"].flatten() for n in range(len(TAPS))]  # (C,) each

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:  # (B,3 or 1,H,W) in [-1,1] twice -> (B,)
        pairs = zip(self.features(x), self.features(y), self.lins, strict=True)
        return sum(torch.einsum("bchw,c->b", (a - b).square(), lin.to(a)) / a[0, 0].numel() for a, b, lin in pairs)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B,C,h,w) at five depths, of unit length in every position; a grey picture counts as three equal channels."""
        h = (x - x.new_tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / x.new_tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        out = []
        for n, layer in enumerate(self.trunk.to(x.device)):
            h = layer(h)
            if n in TAPS:
                # vector_norm, not sqrt of a sum: the latter's gradient is nan where all features are 0
                out.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return out


TAPS = (3, 8, 15, 22, 29)  # after relu 1_2, 2_2, 3_3, 4_3, 5_3


def vgg16() -> nn.Sequential:
    """The convolutions of VGG16 (1409.1556) with torchvision's numbering; without the classifier."""
    layers, channels = [], 3
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


def vgg16_weights(path: str | None) -> dict[str, Tensor]:
    """torchvision's VGG16 state dict, from a file, the hub cache or a download. Raises UserError."""
    ways = "give the file as loss.perceptual_weights, or train without it: loss.perceptual=0"
    if path is not None and not Path(path).is_file():
        raise UserError(f"loss.perceptual_weights: {path} does not exist; expected torchvision's VGG16 ({VGG}); {ways}")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG).name
    if path is None and not cached.is_file():
        log.info("downloading VGG16 (528 MB) for the perceptual loss to %s", cached)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VGG, str(cached), hash_prefix="397923af", progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(f"loss.perceptual: VGG16 is not at {cached} and {VGG} gave {error}; put it there, "
                            f"{ways}") from error
    return torch.load(path or cached, map_location="cpu", weights_only=True)


class PatchCritic(nn.Module):
    """One logit for each patch of a picture (pix2pix, 1611.07004; ``NLayerDiscriminator`` of VQGAN, same key names).

    Args:
        image_channels: channels of the pictures.
        width: channels of the first convolution; they double with each layer up to eight times.
        layers: strided convolutions; with 3, a logit sees 70 x 70 pixels.
        norm: "batch" as published; "group" where batches are small.
    """

    def __init__(self, image_channels: int = 3, width: int = 64, layers: int = 3,
                 norm: Literal["batch", "group", "none"] = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"critic norm {norm!r} is unknown; it takes {', '.join(NORMS)}")
        if layers < 1:
            raise ValueError(f"critic layers is {layers}; it takes 1 or more")
        stack = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        for n in range(layers):
            stride = 2 if n + 1 < layers else 1
            stack += [nn.Conv2d(widths[n], widths[n + 1], 4, stride=stride, padding=1, bias=norm == "none"),
                      NORMS[norm](widths[n + 1]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,1,h,w)
        return self.main(x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0), channels)


NORMS = {"batch": nn.BatchNorm2d, "group": group_norm, "none": lambda channels: nn.Identity()}


def _initialise(module: nn.Module) -> None:  # DCGAN, 1511.06434
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Adversarial(nn.Module):
    """A critic, and when and how much the autoencoder listens to it.

    Times count batches; a float is a share of the whole run. The critic learns alone for ``lead`` before ``start``, so
    that its first word is worth hearing; from ``start`` on, its weight grows over ``ramp``.

    Args:
        net: pictures -> logits.
        start: when the autoencoder begins to listen.
        ramp: how long the weight takes to reach ``weight``.
        lead: how long before ``start`` the critic begins to learn.
        weight: size of the adversarial gradient at the last layer, in units of the reconstruction's.
        kind: the critic's loss.
    """

    def __init__(self, net: nn.Module, start: float = 0.5, ramp: float = 0.05, lead: float = 0.05,
                 weight: float = 0.5, kind: Literal["hinge", "vanilla"] = "hinge"):
        super().__init__()
        if kind not in CRITIC:
            raise ValueError(f"critic.kind: {kind!r} is unknown; it takes {', '.join(CRITIC)}")
        self.net, self.weight, self.kind = net, weight, kind
        self.times = {"start": start, "ramp": ramp, "lead": lead}
        for name, value in {**self.times, "weight": weight}.items():
            if value < 0:
                raise ValueError(f"critic.{name}: {value} is negative; it takes 0 or more")
        for name, value in self.times.items():
            if isinstance(value, float) and value > 1:
                raise ValueError(f"critic.{name}: {value} is no share of a run (0.0 to 1.0); a whole number counts batches")

    def plan(self, batches: int | None) -> None:
        """Before the first batch of a run of so many: turn shares into batches. UserError where its length is unknown."""
        for name, value in self.times.items():
            if isinstance(value, float):
                if batches is None:
                    raise UserError(f"critic.{name}: {value} is a share of the run, whose length is unknown; "
                                    "give a number of batches, or trainer.max_steps")
                value = round(value * batches)
            setattr(self, name, value)
        if batches is not None and self.start >= batches:
            log.warning("critic.start: the critic begins at batch %d, but the run has only %d: the autoencoder will "
                        "never hear it", self.start, batches)

    def share(self, batch: int) -> float:
        """0 before ``start``, then growing to 1."""
        return 0.0 if batch < self.start else min(1.0, (batch - self.start + 1) / (self.ramp + 1))

    def learns(self, batch: int) -> bool:
        return batch >= self.start - self.lead

    def judge(self, x_hat: Tensor, nll: Tensor, last_layer: Tensor, batch: int) -> dict[str, Tensor]:
        """What the autoencoder is told: weighted "adversarial" term, "generator" and the "adversarial_weight"."""
        if not (share := self.share(batch)):
            return {"adversarial": nll.new_zeros(()), "adversarial_weight": nll.new_zeros(())}
        with frozen(self.net):
            generator = -self.net(x_hat).mean()
        weight = share * self.weight * adaptive_weight(nll, generator, last_layer)
        return {"adversarial": weight * generator, "generator": generator, "adversarial_weight": weight}

    def learn(self, x: Tensor, x_hat: Tensor, batch: int) -> dict[str, Tensor]:
        """The critic's own loss "critic" and its mean logits; before its time a zero that touches every weight
        (under DDP each must take part in every backward pass)."""
        if not self.learns(batch):
            return {"critic": 0.0 * sum(p.sum() for p in self.net.parameters())}
        real, fake = self.net(x.detach()), self.net(x_hat.detach())
        return {"critic": CRITIC[self.kind](real, fake), "critic_real": real.mean(), "critic_fake": fake.mean()}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients flow through the module, none into its weights."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
