"""Layers that the networks share. Shapes: pictures (B, C, H, W), token sequences (B, N, D)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero: a residual branch that starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def timestep_embedding(time: Tensor, dim: int, max_period: float = 10000.0, endpoint: bool = False) -> Tensor:
    """(B,) -> (B, dim): [cos(time * f_k), sin(time * f_k)], f_k = max_period^(-k / half) (DDPM, 2006.11239).

    ``time`` is in training steps, 0..1000, whatever the process; an odd ``dim`` ends in a zero. ``endpoint``: the slowest
    is 1 / max_period itself, f_k = max_period^(-k / (half - 1)).
    """
    half = dim // 2
    last = half - 1 if endpoint else half
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=time.device, dtype=torch.float32) / last)
    angles = time.float()[:, None] * freqs
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def group_norm(channels: int, groups: int | None = None, eps: float = 1e-5) -> nn.GroupNorm:
    """``groups``, or at most 32 of at least 4 channels: one channel a group would erase the time embedding that is added."""
    groups = groups or next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 4), 1)
    return nn.GroupNorm(groups, channels, eps)


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # dims -> layer
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def strides(dims: int) -> tuple[int, ...]:
    """What a change of resolution does to each axis: of a video (3) the first, time, stays (ADM)."""
    return (1, 2, 2) if dims == 3 else (2,) * dims


def halve(x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2), by the mean
    step = strides(x.ndim - 2)
    return AVERAGE[x.ndim - 2](x, step, step)


def double(x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,2H,2W), nearest neighbour
    return F.interpolate(x, scale_factor=tuple(map(float, strides(x.ndim - 2))), mode="nearest")


class ResBlock(nn.Module):
    """Residual block that sees the embedding of time (and class): DDPM's, with ADM's options (2105.05233).

    Args:
        embedding: width of the embedding (B, E).
        scale_shift: AdaGN, norm(h) * (1 + scale) + shift; otherwise the embedding is added.
        resample: "up", "down" or None: BigGAN's resampling inside the block.
        groups: of the normalisations, see ``group_norm``. dims: 1, 2 or 3 axes of space.
    """

    def __init__(self, channels: int, out_channels: int, embedding: int, dropout: float = 0.0,
                 scale_shift: bool = False, resample: str | None = None, groups: int | None = None, dims: int = 2):
        super().__init__()
        conv = CONV[dims]
        self.scale_shift, self.resample = scale_shift, {"up": double, "down": halve, None: None}[resample]
        self.norm1, self.conv1 = group_norm(channels, groups), conv(channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embedding, out_channels * (2 if scale_shift else 1))
        self.norm2, self.dropout = group_norm(out_channels, groups), nn.Dropout(dropout)
        self.conv2 = zero(conv(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels == out_channels else conv(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (B,C,H,W), (B,E) -> (B,C',H',W')
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        e = self.embed(F.silu(embedding)).view(*h.shape[:1], -1, *[1] * (h.ndim - 2))
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Strided 3x3 convolution, or the mean of 2x2 where ``conv`` is False."""

    def __init__(self, channels: int, conv: bool = True, dims: int = 2):
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, stride=strides(dims), padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,H/2,W/2)
        return halve(x) if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution unless ``conv`` is False."""

    def __init__(self, channels: int, conv: bool = True, dims: int = 2):
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:  # (B,C,H,W) -> (B,C,2H,2W)
        return double(x) if self.conv is None else self.conv(double(x))


class SelfAttention(nn.Module):
    """Attention of the positions of a feature map on one another, without text (ADM's; LDM where it has no transformer)."""

    def __init__(self, channels: int, heads: int, groups: int | None = None):
        super().__init__()
        self.heads, self.norm = heads, group_norm(channels, groups)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # (B,C,H,W)
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = rearrange(self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return x + self.out(seen).transpose(1, 2).reshape(x.shape)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (RoFormer, 2104.09864, eq. 15): pairs of neighbours of x (B,h,N,d) turned by angles (N,d/2), so that
    the product of a query and a key depends on the difference of their positions."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention of x on ``context`` (on itself if None); keys where ``mask`` is False are not seen.

    Args:
        qk_norm: normalise queries and keys per head (2302.05442): steady at high learning rates.
        bias: of queries, keys and values.
    """

    def __init__(self, dim: int, context_dim: int | None = None, heads: int = 8, head_dim: int = 64,
                 qk_norm: bool = False, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=bias)
        self.norm_q = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                angles: Tensor | None = None) -> Tensor:
        # x (B,N,D), context (B,L,E), mask (B,L) True where real, angles (N,d/2) of x's positions -> (B,N,D)
        context = x if context is None else context
        q, k, v = (rearrange(layer(y), "b n (h d) -> b h n d", h=self.heads)
                   for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        q, k = self.norm_q(q), self.norm_k(k)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        seen = None if mask is None else mask[:, None, None, :]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


@contextmanager
def inattentive(part: nn.Module) -> Iterator[None]:
    """In the meantime every position of ``part``'s self-attention sees itself alone: the map is the identity, what comes out
    are the values (PAG, 2403.17377, section 4.1). Attention on a context stays."""
    def alone(module: nn.Module, given: tuple, named: dict, out: Tensor) -> Tensor:
        x, *rest = given
        if isinstance(module, SelfAttention):
            values = module.qkv(module.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)[2]
            return x + module.out(values).transpose(1, 2).reshape(x.shape)
        on_itself = (rest[0] if rest else named.get("context")) is None
        return module.out(module.to_v(x)) if on_itself else out

    hooks = [module.register_forward_hook(alone, with_kwargs=True) for module in part.modules()
             if isinstance(module, (SelfAttention, Attention))]  # fmt: skip
    if not hooks:
        raise ValueError(f"{type(part).__name__} has no attention to perturb; take the network, or a part that has some")
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class GEGLU(nn.Module):
    """value * gelu(gate) (2002.05202), back to ``dim``."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * mult * dim)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B,N,D)
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each pre-normed with a residual (LDM, 2112.10752, table 15).

    Args:
        cross_only: the first attention looks at the context as well (SD's x4 upscaler).
    """

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int, ff_mult: int = 4,
                 qk_norm: bool = False, dropout: float = 0.0, cross_only: bool = False):
        super().__init__()
        shared = dict(heads=heads, head_dim=head_dim, qk_norm=qk_norm, dropout=dropout)
        self.cross_only = cross_only
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, context_dim if cross_only else dim, **shared)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, context_dim, **shared)
        self.norm3, self.ff = nn.LayerNorm(dim), GEGLU(dim, ff_mult, dropout)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:  # (B,N,D), (B,L,E), (B,L)
        first = (context, mask) if self.cross_only else ()
        x = x + self.attn1(self.norm1(x), *first)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map, with text as the context of its cross-attention.

    Args:
        linear: project with Linear layers on tokens (SD 2) in place of 1x1 convolutions (LDM, SD 1): the same map.
        cross_only: see ``TransformerBlock``.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, head_dim: int, depth: int = 1, ff_mult: int = 4,
                 linear: bool = True, qk_norm: bool = False, dropout: float = 0.0, groups: int | None = None,
                 cross_only: bool = False, dims: int = 2):
        super().__init__()
        inner = heads * head_dim
        self.linear = linear
        self.norm = group_norm(channels, groups, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else CONV[dims](channels, inner, 1)
        self.blocks = nn.ModuleList(TransformerBlock(inner, context_dim, heads, head_dim, ff_mult, qk_norm, dropout, cross_only)
                                    for _ in range(depth))
        self.proj_out = zero(nn.Linear(inner, channels) if linear else CONV[dims](inner, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:  # (B,C,H,W)
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B,N,C)
        h = self.proj_in(h) if self.linear else h
        for block in self.blocks:
            h = block(h, context, mask)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        return x + (h if self.linear else self.proj_out(h))
