"""BottleneckAutoencoder: an encoder, a bottleneck and a decoder behind the one contract."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from autoencoder import strips
from autoencoder.base import Autoencoder, Bottled, at_least_float32, without_autocast
from autoencoder.nets import Decoder, Encoder
from ldm.common.limits import limits


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

    def tiled_moments(self, x: Tensor, tile: int) -> tuple[Tensor, Tensor | None]:
        if not isinstance(self.encoder, Encoder):
            return super().tiled_moments(x, tile)
        return self.bottleneck.moments(self.pre(strips.encode(self.encoder, x, strips.area(tile))))

    def tiled_decode_raw(self, z: Tensor, tile: int) -> Tensor:
        if not isinstance(self.decoder, Decoder):
            return super().tiled_decode_raw(z, tile)
        return strips.decode(self.decoder, self.post(self.bottleneck.quantise(z)), strips.area(tile))

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
        with without_autocast(x.device):
            return self.bottleneck.indices(self.moments(x.to(self.dtype))[0])

    def decode_codes(self, codes: Tensor) -> Tensor:
        """(B,h,w) code indices -> (B,3,H,W)."""
        self._needs_codebook()
        with without_autocast(codes.device):
            return at_least_float32(self.decoder(self.post(self.bottleneck.lookup(codes).to(self.dtype)))).contiguous()

    def _needs_codebook(self) -> None:
        if not hasattr(self.bottleneck, "lookup"):
            raise ValueError(f"{type(self.bottleneck).__name__} has no codes; kinds that do: VQ, FSQ, LFQ")


def convolutional(bottleneck: nn.Module, image_channels: int = 3, width: int = 128, mult: list[int] | None = None,
                  blocks: int = 2, patch: int = 1, attention: bool = True, attention_levels: list[int] | None = None,
                  dropout: float = 0.0, attention_kind: Literal["softmax", "linear"] = "softmax",
                  decoder_attention_levels: list[int] | None = None, features: int | None = None, pre: bool = True,
                  post: bool = True, groups: int = 32, conv_resample: bool = True, out_channels: int | None = None,
                  tanh: bool = False, head: bool = True) -> BottleneckAutoencoder:
    """The autoencoder of LDM (2112.10752): factor = patch * 2^(len(mult) - 1), all sizes from one list of numbers.

    Args:
        attention_levels: levels (0 = highest resolution) with self-attention beside the one in the middle.
        decoder_attention_levels: those of the decoder, if they are others.
        features: channels on the nets' side of the 1x1 convolutions around the bottleneck, for each latent; None: the
            latent's own. ``z_channels`` of LDM, whose ``embed_dim`` is the bottleneck's channels.
        pre, post: whether there is such a convolution before and after the bottleneck.
        out_channels: of the decoded pictures; None: as many as go in.
        width, blocks, patch, groups, conv_resample, tanh, head: see ``autoencoder.nets``.
    """
    mult, levels = tuple(mult or (1, 2, 4, 4)), tuple(attention_levels or ())
    inner, outward = bottleneck.channels, bottleneck.features
    if features is not None:
        inner, outward = features, features * (bottleneck.features // bottleneck.channels)  # mean and log-variance
    if not (pre and post) and inner != bottleneck.channels:
        raise ValueError(f"features: {inner}, for a latent of {bottleneck.channels} channels, takes both 1x1 convolutions "
                         "(pre, post)")
    shared = dict(width=width, mult=mult, blocks=blocks, patch=patch, attention=attention, dropout=dropout, groups=groups,
                  conv_resample=conv_resample, attention_kind=attention_kind)
    decoder_levels = levels if decoder_attention_levels is None else tuple(decoder_attention_levels)
    return BottleneckAutoencoder(
        Encoder(image_channels, outward, attention_levels=levels, **shared), bottleneck,
        Decoder(inner, out_channels or image_channels, attention_levels=decoder_levels, tanh=tanh, head=head, **shared),
        factor=patch * 2 ** (len(mult) - 1), image_channels=image_channels,
        pre=nn.Conv2d(outward, bottleneck.features, 1) if pre else None,
        post=nn.Conv2d(bottleneck.channels, inner, 1) if post else None)


convolutional.check_params = limits(image_channels=1, width=1, mult=1, blocks=0, patch=1, dropout=(0, 1), features=1, groups=1,
                                    out_channels=1)  # fmt: skip
