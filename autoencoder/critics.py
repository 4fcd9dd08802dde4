"""What judges a reconstruction by more than its pixels: features of a trained network, and a trained critic."""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from autoencoder.codes import averaged, summed
from autoencoder.losses import ADVERSARIAL, adaptive_weight, gradient_penalty
from ldm.common.files import UserError

log = logging.getLogger(__name__)

VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"


class Frozen:
    """A network (or any function) that is used as it is: in eval mode, on the device of what it gets, part of no module,
    so that no optimizer, average or checkpoint holds it."""

    def __init__(self, call: Callable[..., Tensor]):
        self.call = call.requires_grad_(False).eval() if isinstance(call, nn.Module) else call

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        if isinstance(self.call, nn.Module):
            self.call.to(x.device)
        return self.call(x, *others)


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

    @staticmethod
    def check(channels: int) -> None:
        if channels not in (1, 3):
            raise UserError(f"loss.perceptual: LPIPS judges pictures of 1 or 3 channels, these have {channels}; train without "
                            "it (loss.perceptual=0), or with a distance of your own (loss.perceptual_distance)")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:  # (B,3 or 1,H,W) in [-1,1] twice -> (B,)
        pairs = zip(self.features(x), self.features(y), self.lins, strict=True)
        return sum(torch.einsum("bchw,c->b", (a - b).square(), lin.to(a)) / a[0, 0].numel() for a, b, lin in pairs)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B,C,h,w) at five depths, of unit length in every position; a grey picture counts as three equal channels."""
        self.check(x.shape[1])
        h = (x - x.new_tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / x.new_tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        out = []
        for n, layer in enumerate(self.trunk.to(x.device)):
            h = layer(h)
            if n in TAPS:
                h = h.float()  # convolutions may be in half precision, small differences between features may not
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
    try:
        state = torch.load(path or cached, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"loss.perceptual_weights: {path or cached} cannot be read as weights "
                        f"({type(error).__name__}); expected torchvision's VGG16 ({VGG}); {ways}") from error
    return state if isinstance(state, dict) else {}


class ActNorm(nn.Module):
    """scale * (x + loc) for each channel, so that the first training batch comes out with mean 0 and deviation 1 (Glow,
    1807.03039, section 3.1), that of all ranks together."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self.ready = False  # what the buffer says, without asking the device in every pass

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) twice
        if self.training and not self.ready:
            self.initialise(x.detach().float())
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        dims, n = (0, 2, 3), x.numel() // x.shape[1]
        mean = averaged(x.mean(dims, keepdim=True))
        variance = averaged((x - mean).square().mean(dims, keepdim=True))
        self.loc.copy_(-mean)
        self.scale.copy_(1 / ((variance * n / max(1, n - 1)).sqrt() + 1e-6))
        self.initialized.fill_(1)
        self.ready = True

    def _load_from_state_dict(self, *args, **options) -> None:
        super()._load_from_state_dict(*args, **options)
        self.ready = bool(self.initialized)


class PatchCritic(nn.Module):
    """One logit for each patch of a picture (pix2pix, 1611.07004; ``NLayerDiscriminator`` of VQGAN, same key names).

    Args:
        image_channels: channels of the pictures.
        width: channels of the first convolution; they double with each layer up to eight times.
        layers: strided convolutions; with 3, a logit sees 70 x 70 pixels.
        norm: "batch" as published, or "act" (``use_actnorm``); "group" where batches are small.
    """

    def __init__(self, image_channels: int = 3, width: int = 64, layers: int = 3,
                 norm: Literal["batch", "act", "group", "none"] = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"critic norm {norm!r} is unknown; it takes {', '.join(NORMS)}")
        if layers < 1:
            raise ValueError(f"critic layers is {layers}; it takes 1 or more")
        self.image_channels, self.smallest = image_channels, 3 * 2**layers  # side of a picture with one logit
        stack = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        for n in range(layers):
            stride = 2 if n + 1 < layers else 1
            stack += [nn.Conv2d(widths[n], widths[n + 1], 4, stride=stride, padding=1, bias=norm in ("act", "none")),
                      NORMS[norm](widths[n + 1]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,1,h,w)
        if x.shape[1] != self.image_channels:
            raise UserError(f"critic.net.image_channels: {self.image_channels}, but the pictures have {x.shape[1]} channels")
        if min(x.shape[2:]) < self.smallest:
            raise UserError(f"critic.net.layers: pictures of {x.shape[3]}x{x.shape[2]} are too small for this many layers, "
                            f"which need {self.smallest} pixels a side; take fewer")
        return self.main(x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0), channels)


NORMS = {"batch": nn.BatchNorm2d, "act": ActNorm, "group": group_norm, "none": lambda channels: nn.Identity()}


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
        kind: the losses of both.
        adaptive: measure that size in every batch; otherwise ``weight`` is the weight of the adversarial loss itself.
        limit: of the factor that the measuring gives, before it is multiplied by ``weight``.
        r1: gamma of the R1 penalty gamma/2 |d D / d x|^2 at real pictures (1801.04406); 0: none. It asks the critic for
            smooth judgements; with norm "batch" a picture's gradient is also that of the others.
        r1_every: batches from one penalty to the next, which counts so many times more (1912.04958, section 3.1).
    """

    def __init__(self, net: nn.Module, start: float = 0.5, ramp: float = 0.05, lead: float = 0.05,
                 weight: float = 0.5, kind: Literal["hinge", "vanilla", "lsgan"] = "hinge", adaptive: bool = True,
                 limit: float = 1e4, r1: float = 0.0, r1_every: int = 16):
        super().__init__()
        if kind not in ADVERSARIAL:
            raise ValueError(f"critic.kind: {kind!r} is unknown; it takes {', '.join(ADVERSARIAL)}")
        self.net, self.weight, self.kind = net, weight, kind
        self.adaptive, self.limit, self.r1, self.r1_every = adaptive, limit, r1, r1_every
        self.times = {"start": start, "ramp": ramp, "lead": lead}
        for name, value in {**self.times, "weight": weight, "limit": limit, "r1": r1}.items():
            if value < 0:
                raise ValueError(f"critic.{name}: {value} is negative; it takes 0 or more")
        for name, value in self.times.items():
            if isinstance(value, float) and value > 1:
                raise ValueError(f"critic.{name}: {value} is no share of a run (0.0 to 1.0); a whole number counts batches")
        if r1_every < 1:
            raise ValueError(f"critic.r1_every: {r1_every}; it takes 1 or more batches")
        self._right: deque[Tensor] = deque(maxlen=50)  # how often the critic was right while it was heard; of this rank

    def check(self, autoencoder: Autoencoder) -> None:
        """Raises ValueError where the autoencoder cannot be trained with this critic."""
        theirs = autoencoder.image_channels
        if (ours := getattr(self.net, "image_channels", theirs)) != theirs:
            raise ValueError(f"critic.net.image_channels: {ours}, but the autoencoder's pictures have {theirs} channels")
        if self.adaptive:
            try:
                _ = autoencoder.last_layer
            except NotImplementedError as error:
                raise ValueError(f"critic: {error}; or set critic.adaptive=false") from error

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

    def judge(self, x_hat: Tensor, nll: Tensor, last_layer: Tensor | None, batch: int) -> dict[str, Tensor]:
        """What the autoencoder is told: weighted "adversarial" term, "generator" and the "adversarial_weight".
        ``last_layer`` of the decoder: where gradients are compared, if they are (``adaptive``)."""
        if not (share := self.share(batch)):
            return {"adversarial": nll.new_zeros(()), "adversarial_weight": nll.new_zeros(())}
        _, loss, _ = ADVERSARIAL[self.kind]
        with frozen(self.net):
            generator = loss(self.net(x_hat).float())
        weight = nll.new_tensor(share * self.weight)
        if self.adaptive:
            weight = weight * adaptive_weight(nll, generator, last_layer, self.limit, size=lambda g: averaged(g).norm())
        return {"adversarial": weight * generator, "generator": generator, "adversarial_weight": weight}

    def learn(self, x: Tensor, x_hat: Tensor, batch: int) -> dict[str, Tensor]:
        """The critic's own loss "critic", its mean logits, the share of them that is right, "r1" where it is its turn.
        Before its time a zero that touches every weight (under DDP each must take part in every backward pass)."""
        if not self.learns(batch):
            return {"critic": 0.0 * sum(p.sum() for p in self.net.parameters())}
        penalised = self.r1 > 0 and batch % self.r1_every == 0
        x = x.detach().requires_grad_(penalised)
        real, fake = self.net(x).float(), self.net(x_hat.detach()).float()
        loss, _, between = ADVERSARIAL[self.kind]
        right = 0.5 * ((real > between).float().mean() + (fake < between).float().mean())
        terms = {"critic": loss(real, fake), "critic_real": real.mean(), "critic_fake": fake.mean(), "critic_right": right}
        if penalised:
            terms["r1"] = gradient_penalty(real, x)
            terms["critic"] = terms["critic"] + 0.5 * self.r1 * self.r1_every * terms["r1"]
        if self.share(batch) * self.weight:
            self._right.append(right)
        return terms

    def right(self) -> dict[str, float]:
        """"critic_right" over the last batches of all ranks in which the autoencoder listened; nothing before there are
        20. All ranks have to call."""
        if len(self._right) < 20:
            return {}
        right = torch.stack(list(self._right)).mean()
        return {"critic_right": (summed(right) / summed(torch.ones_like(right))).item()}


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
