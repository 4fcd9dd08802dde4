"""Convolutional encoder and decoder (LDM, 2112.10752, appendix; VQGAN, 2012.09841, table 7).

Both are written for pictures (B, 3, H, W) and features (B, C, H/f, W/f) with f = patch * 2^(levels - 1). ``patch`` > 1
replaces the highest-resolution levels by one strided convolution (pixel shuffle on the way out): on small pictures
that is where nearly all the time goes.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H,W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W)
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Strided 3x3 convolution; pads on the right and at the bottom only, as the published autoencoders do."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,2H,2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Sequential):
    """ResBlock, attention (optional), ResBlock at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, dropout: float):
        attend = [Attention(channels)] if attention else []
        super().__init__(ResBlock(channels, channels, dropout), *attend, ResBlock(channels, channels, dropout))


class Encoder(nn.Module):
    """Pictures (B, in_channels, H, W) -> features (B, out_channels, H/f, W/f).

    Args:
        width: channels of the first level.
        mult: width multiplier of each level; the resolution halves between levels.
        blocks: residual blocks a level.
        patch: stride of the first convolution.
        attention: self-attention in the middle.
        attention_levels: levels (0 = highest resolution) whose blocks are followed by self-attention.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 128, mult: tuple[int, ...] = (1, 2, 4, 4),
                 blocks: int = 2, patch: int = 1, attention: bool = True, attention_levels: tuple[int, ...] = (),
                 dropout: float = 0.0):
        super().__init__()
        stem = dict(kernel_size=3, padding=1) if patch == 1 else dict(kernel_size=patch, stride=patch)
        self.conv_in = nn.Conv2d(in_channels, width, **stem)
        levels, channels = [], width
        for level, m in enumerate(mult):
            layers = [Downsample(channels)] if level else []
            for _ in range(blocks):
                layers.append(ResBlock(channels, width * m, dropout))
                channels = width * m
                layers += [Attention(channels)] if level in attention_levels else []
            levels.append(nn.Sequential(*layers))
        self.levels = nn.Sequential(*levels)
        self.middle = Middle(channels, attention, dropout)
        self.norm_out, self.conv_out = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.levels(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features (B, in_channels, h, w) -> pictures (B, out_channels, h*f, w*f): the encoder's mirror, one block more a level."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 128, mult: tuple[int, ...] = (1, 2, 4, 4),
                 blocks: int = 2, patch: int = 1, attention: bool = True, attention_levels: tuple[int, ...] = (),
                 dropout: float = 0.0):
        super().__init__()
        channels = width * mult[-1]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.middle = Middle(channels, attention, dropout)
        levels = []
        for level, m in reversed(list(enumerate(mult))):
            layers = []
            for _ in range(blocks + 1):
                layers.append(ResBlock(channels, width * m, dropout))
                channels = width * m
                layers += [Attention(channels)] if level in attention_levels else []
            layers += [Upsample(channels)] if level else []
            levels.append(nn.Sequential(*layers))
        self.levels = nn.Sequential(*levels)
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels * patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels(self.middle(self.conv_in(z)))
        return self.shuffle(self.conv_out(F.silu(self.norm_out(h))))

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial term (VQGAN, eq. 7)."""
        return self.conv_out.weight
