"""Convolutional encoder and decoder (LDM, 2112.10752, appendix; VQGAN, 2012.09841, table 7).

Both are written for pictures (B, 3, H, W) and features (B, C, H/f, W/f) with f = patch * 2^(levels - 1). ``patch`` > 1
replaces the highest-resolution levels by one strided convolution (pixel shuffle on the way out): on small pictures
that is where nearly all the time goes.
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(gcd(channels, groups), channels, eps=1e-6)


def activated(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)). Without gradients the norm's output is overwritten: on large maps taking fresh memory costs time."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, channels: int, out_channels: int, dropout: float = 0.0, groups: int = 32):
        super().__init__()
        self.norm1, self.conv1 = norm(channels, groups), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels, groups), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C',H,W)
        h = self.conv1(activated(self.norm1, x))
        h = activated(self.norm2, h)  # by this name, so that conv1's output is freed before conv2's is made
        h = self.conv2(self.dropout(h))
        h += self.shortcut(x)
        return h


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W)
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class LinearAttention(nn.Module):
    """sum_n k_n v_n^T, with k a softmax over positions, read out by q (1812.01243). No norm, no residual: as LDM has it."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1, bias=False), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W)
        q, k, v = rearrange(self.qkv(x), "b (three c) h w -> three b c (h w)", three=3)
        memory = torch.einsum("bdn,ben->bed", k.softmax(dim=-1), v)
        return self.out(rearrange(memory @ q, "b c (h w) -> b c h w", h=x.shape[2]))


ATTENTION = {"softmax": Attention, "linear": LinearAttention}


class Downsample(nn.Module):
    """Strided 3x3 convolution, padded on the right and at the bottom only, as the published autoencoders do; or a mean."""

    def __init__(self, channels: int, conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if conv else None

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2)
        return F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution, or none.

    Of three neighbours in the enlarged map two are the same pixel of the small one. So both steps together are a transposed
    convolution by sums of the 3x3 weights: 4 products for each output instead of 9, and no enlarged copy.
    """

    def __init__(self, channels: int, conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def weight(self) -> Tensor:  # (C,C,4,4), input channels first: sums over 2x2 boxes of the mirrored 3x3
        sums = F.avg_pool2d(self.conv.weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
        return sums.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,2H,2W)
        if self.conv is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.conv_transpose2d(x, self.weight(), self.conv.bias, stride=2, padding=1)


class Middle(nn.Sequential):
    """ResBlock, attention (optional), ResBlock at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, dropout: float = 0.0, groups: int = 32,
                 attention_kind: str = "softmax"):
        attend = [ATTENTION[attention_kind](channels, groups)] if attention else []
        res = partial(ResBlock, channels, channels, dropout, groups)
        super().__init__(res(), *attend, res())


class Encoder(nn.Module):
    """Pictures (B, in_channels, H, W) -> features (B, out_channels, H/f, W/f).

    Args:
        width: channels of the first level.
        mult: width multiplier of each level; the resolution halves between levels.
        blocks: residual blocks a level.
        patch: stride of the first convolution.
        attention: self-attention in the middle.
        attention_levels: levels (0 = highest resolution) whose blocks are followed by self-attention.
        groups: of the group norms; fewer where these do not divide the channels.
        conv_resample: a convolution does the halving, or else a mean over 2x2.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 128, mult: tuple[int, ...] = (1, 2, 4, 4),
                 blocks: int = 2, patch: int = 1, attention: bool = True, attention_levels: tuple[int, ...] = (),
                 dropout: float = 0.0, groups: int = 32, conv_resample: bool = True,
                 attention_kind: Literal["softmax", "linear"] = "softmax"):
        super().__init__()
        stem = dict(kernel_size=3, padding=1) if patch == 1 else dict(kernel_size=patch, stride=patch)
        self.conv_in = nn.Conv2d(in_channels, width, **stem)
        levels, channels = [], width
        for level, m in enumerate(mult):
            layers = [Downsample(channels, conv_resample)] if level else []
            for _ in range(blocks):
                layers.append(ResBlock(channels, width * m, dropout, groups))
                channels = width * m
                layers += [ATTENTION[attention_kind](channels, groups)] if level in attention_levels else []
            levels.append(nn.Sequential(*layers))
        self.levels = nn.Sequential(*levels)
        self.middle = Middle(channels, attention, dropout, groups, attention_kind)
        self.norm_out, self.conv_out = norm(channels, groups), nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.levels(self.conv_in(x)))
        return self.conv_out(activated(self.norm_out, h))


class Decoder(nn.Module):
    """Features (B, in_channels, h, w) -> pictures (B, out_channels, h*f, w*f): the encoder's mirror, one block more a level.

    Args:
        tanh: bounds the pictures to (-1, 1).
        head: without it the last features (B, width * mult[0], h*f, w*f) are given.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int = 128, mult: tuple[int, ...] = (1, 2, 4, 4),
                 blocks: int = 2, patch: int = 1, attention: bool = True, attention_levels: tuple[int, ...] = (),
                 dropout: float = 0.0, groups: int = 32, conv_resample: bool = True,
                 attention_kind: Literal["softmax", "linear"] = "softmax", tanh: bool = False, head: bool = True):
        super().__init__()
        channels = width * mult[-1]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.middle = Middle(channels, attention, dropout, groups, attention_kind)
        levels = []
        for level, m in reversed(list(enumerate(mult))):
            layers = []
            for _ in range(blocks + 1):
                layers.append(ResBlock(channels, width * m, dropout, groups))
                channels = width * m
                layers += [ATTENTION[attention_kind](channels, groups)] if level in attention_levels else []
            layers += [Upsample(channels, conv_resample)] if level else []
            levels.append(nn.Sequential(*layers))
        self.levels = nn.Sequential(*levels)
        self.norm_out = norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, out_channels * patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(patch)
        self.tanh, self.head = tanh, head

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels(self.middle(self.conv_in(z)))
        return self.finished(self.conv_out(activated(self.norm_out, h))) if self.head else h

    def finished(self, h: Tensor) -> Tensor:  # what conv_out gave -> pictures
        x = self.shuffle(h)
        return x.tanh() if self.tanh else x

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial term (VQGAN, eq. 7)."""
        return self.conv_out.weight
