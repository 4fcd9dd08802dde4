"""BottleneckAutoencoder: an encoder, a bottleneck and a decoder behind the one contract."""

from __future__ import annotations

from torch import Tensor, nn

from autoencoder.base import Autoencoder, Bottled
from autoencoder.nets import Decoder, Encoder


class BottleneckAutoencoder(Autoencoder):
    """z = bottleneck(quant(encoder(x))), x = decoder(post_quant(z)).

    Args:
        encoder: (B,3,H,W) -> (B,F,h,w) features.
        bottleneck: features -> latent; see ``autoencoder.bottlenecks``.
        decoder: (B,F',h,w) -> (B,3,H,W); its ``last_layer`` balances the adversarial loss.
        factor: side of a picture / side of its latent.
        pre, post: 1x1 convolutions around the bottleneck (``quant_conv`` and ``post_quant_conv`` of LDM).
    """

    def __init__(self, encoder: nn.Module, bottleneck: nn.Module, decoder: nn.Module, factor: int,
                 image_channels: int = 3, pre: nn.Module | None = None, post: nn.Module | None = None):
        super().__init__(image_channels, bottleneck.channels, factor)
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder
        self.pre, self.post = pre or nn.Identity(), post or nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        return self.pre(self.encoder(x))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.bottleneck.moments(self.features(x))

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.decoder(self.post(self.bottleneck.quantise(z)))

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.last_layer

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Bottled]:
        """The training pass: reconstruction (B,3,H,W) and what the bottleneck said."""
        self.check(x)
        bottled = self.bottleneck(self.features(x), noise)
        return self.decoder(self.post(bottled.latent)), bottled

    def codes(self, x: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,h,w) code indices. Kinds with a codebook only."""
        self._needs_codebook()
        self.check(x)
        return self.bottleneck.indices(self.features(x))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """(B,h,w) code indices -> (B,3,H,W)."""
        self._needs_codebook()
        return self.decoder(self.post(self.bottleneck.lookup(codes)))

    def _needs_codebook(self) -> None:
        if not hasattr(self.bottleneck, "lookup"):
            raise ValueError(f"{type(self.bottleneck).__name__} has no codes; kinds that do: VQ")


def convolutional(bottleneck: nn.Module, image_channels: int = 3, width: int = 128, mult: list[int] | None = None,
                  blocks: int = 2, patch: int = 1, attention: bool = True, attention_levels: list[int] | None = None,
                  dropout: float = 0.0) -> BottleneckAutoencoder:
    """The autoencoder of LDM (2112.10752): factor = patch * 2^(len(mult) - 1), all sizes from one list of numbers."""
    mult = tuple(mult or (1, 2, 4, 4))
    shared = dict(width=width, mult=mult, blocks=blocks, patch=patch, attention=attention,
                  attention_levels=tuple(attention_levels or ()), dropout=dropout)
    return BottleneckAutoencoder(
        Encoder(image_channels, bottleneck.features, **shared), bottleneck,
        Decoder(bottleneck.channels, image_channels, **shared), factor=patch * 2 ** (len(mult) - 1),
        image_channels=image_channels,
        pre=nn.Conv2d(bottleneck.features, bottleneck.features, 1),
        post=nn.Conv2d(bottleneck.channels, bottleneck.channels, 1))
