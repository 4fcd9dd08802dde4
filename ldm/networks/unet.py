"""The cross-attention UNet of LDM and Stable Diffusion (2112.10752) with ADM's options (2105.05233).

    x (B,C,H,W) --conv--> level 0 --down--> level 1 ... middle ... level 1 --up--> level 0 --conv--> (B,C',H,W)

Each level is ``num_res_blocks`` residual blocks (one more on the way up), each followed by a spatial transformer where
``transformer_depth`` of that level is above zero. Every output on the way down is joined to its mirror on the way up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.cond import Cond
from ldm.networks.layers import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    Upsample,
    group_norm,
    timestep_embedding,
    zero,
)


class Stage(nn.Module):
    """A residual block, then (optionally) a spatial transformer, then (optionally) a change of resolution."""

    def __init__(self, res: ResBlock | None, transformer: SpatialTransformer | None = None,
                 resample: nn.Module | None = None):
        super().__init__()
        self.res, self.transformer, self.resample = res, transformer, resample

    def forward(self, x: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        if self.res is not None:
            x = self.res(x, embedding)
        if self.transformer is not None:
            x = self.transformer(x, cond.tokens, cond.mask)
        if isinstance(self.resample, ResBlock):
            return self.resample(x, embedding)
        return x if self.resample is None else self.resample(x)


class UNet(nn.Module):
    """(x, time, cond) -> out.

    Args:
        in_channels: channels of x, spatial conditions included; out_channels: of the output. Given by the program.
        context_dim: width of the condition's tokens. Given by the program.
        vector_dim: width of the condition's vector, which joins the time embedding; None: no vector. Given.
        model_channels: width of the first level; channel_mult: multiplier of each level.
        num_res_blocks: residual blocks a level.
        transformer_depth: transformer blocks after each residual block, a number for each level (0: no attention).
        middle_depth: transformer blocks in the middle; None: as the last level, at least one.
        num_heads or head_channels: heads of a level, or the width of one head.
        patch_size: fold p x p pixels into channels at the entrance and unfold at the exit: p^2 fewer positions.
        scale_shift: AdaGN. resblock_updown: BigGAN resampling. linear_projections: as SD 2. qk_norm, ff_mult,
        dropout: see the layers. checkpointing: recompute activations in the backward pass (less memory, +1/3 time).
    """

    given = ("in_channels", "out_channels", "context_dim", "vector_dim")

    def __init__(self, in_channels: int, out_channels: int, context_dim: int | None = None,
                 vector_dim: int | None = None, model_channels: int = 320, channel_mult: list[int | float] = (1, 2, 4, 4),
                 num_res_blocks: int = 2, transformer_depth: list[int] = (1, 1, 1, 0), middle_depth: int | None = None,
                 num_heads: int = 8, head_channels: int | None = None, patch_size: int = 1, scale_shift: bool = False,
                 resblock_updown: bool = False, linear_projections: bool = True, qk_norm: bool = False,
                 ff_mult: int = 4, dropout: float = 0.0, checkpointing: bool = False):
        super().__init__()
        if len(transformer_depth) != len(channel_mult):
            raise ValueError(f"transformer_depth {list(transformer_depth)} needs one number for each of the "
                             f"{len(channel_mult)} levels of channel_mult {list(channel_mult)}")
        self.model_channels, self.patch_size, self.checkpointing = model_channels, patch_size, checkpointing
        self.multiple = patch_size * 2 ** (len(channel_mult) - 1)  # x's sides have to be multiples of this
        embedding = 4 * model_channels
        self.time = nn.Sequential(nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.vector = None if vector_dim is None else nn.Sequential(
            nn.Linear(vector_dim, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def res(channels: int, out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, out, embedding, dropout, scale_shift, resample)

        def transformer(channels: int, depth: int) -> SpatialTransformer | None:
            if depth == 0:
                return None
            heads = channels // head_channels if head_channels else num_heads
            if heads == 0 or channels % heads:
                raise ValueError(f"a level of {channels} channels does not divide into {heads} heads")
            return SpatialTransformer(channels, context_dim or channels, heads, channels // heads, depth, ff_mult,
                                      linear_projections, qk_norm, dropout)

        widths = [int(model_channels * m) for m in channel_mult]
        last = len(widths) - 1
        channels, skips = model_channels, [model_channels]
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, model_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(Stage(res(channels, width), transformer(width, transformer_depth[level])))
                channels = width
                skips.append(channels)
            if level != last:
                halve = res(channels, channels, "down") if resblock_updown else Downsample(channels)
                self.down.append(Stage(None, resample=halve))
                skips.append(channels)

        depth = max(1, transformer_depth[-1]) if middle_depth is None else middle_depth
        self.middle = nn.ModuleList([Stage(res(channels, channels), transformer(channels, depth)),
                                     Stage(res(channels, channels))])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                double = None
                if level and i == num_res_blocks:
                    double = res(width, width, "up") if resblock_updown else Upsample(width)
                self.up.append(Stage(res(channels + skips.pop(), width),
                                     transformer(width, transformer_depth[level]), double))
                channels = width
        self.norm_out = group_norm(channels)
        self.conv_out = zero(nn.Conv2d(channels, out_channels * patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x (B,C,H,W), time (B,) in 0..1000, cond.tokens (B,L,D) with cond.mask (B,L) -> (B,C',H,W)."""
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"the UNet halves its input {x.shape[2]}x{x.shape[3]}: both sides have to be multiples of "
                             f"{self.multiple}")
        embedding = self.time(timestep_embedding(time, self.model_channels).to(x.dtype))
        if self.vector is not None:
            embedding = embedding + self.vector(cond.vector)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, embedding, cond)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding, cond)
        for stage in self.up:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), embedding, cond)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size)

    def _run(self, stage: Stage, h: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, embedding, cond, use_reentrant=False)
        return stage(h, embedding, cond)
