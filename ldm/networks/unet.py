"""The cross-attention UNet of LDM and Stable Diffusion (2112.10752) with ADM's options (2105.05233).

    x (B,C,H,W) --conv--> level 0 --down--> level 1 ... middle ... level 1 --up--> level 0 --conv--> (B,C',H,W)

Each level is ``num_res_blocks`` residual blocks (one more on the way up), each followed by attention where
``transformer_depth`` of that level is above zero. Every output on the way down is joined to its mirror on the way up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.common.limits import limits
from ldm.cond import Cond
from ldm.networks.layers import (
    CONV,
    Downsample,
    ResBlock,
    SelfAttention,
    SpatialTransformer,
    Upsample,
    group_norm,
    timestep_embedding,
    zero,
)

POSITIVE = dict(model_channels=1, channel_mult=0.01, num_res_blocks=1, transformer_depth=0, middle_depth=0, num_heads=1,
                head_channels=1, up_heads=1, groups=1, ff_mult=1, dropout=(0, 1))  # fmt: skip  # see ``ldm.common.limits``


class Stage(nn.Module):
    """A residual block, then (optionally) attention, then (optionally) a change of resolution."""

    def __init__(self, res: ResBlock | None, attention: nn.Module | None = None, resample: nn.Module | None = None):
        super().__init__()
        self.res, self.attention, self.resample = res, attention, resample

    def forward(self, x: Tensor, embedding: Tensor, cond: Cond) -> Tensor:
        if self.res is not None:
            x = self.res(x, embedding)
        if self.attention is not None:
            x = self.attention(x, cond.tokens, cond.mask)
        if isinstance(self.resample, ResBlock):
            return self.resample(x, embedding)
        return x if self.resample is None else self.resample(x)


@dataclass(frozen=True)
class Plan:
    """The numbers that say which blocks there are, and what they are made of; a list has an entry for each level.

    Args:
        model_channels: width of the first level; channel_mult: multiplier of each level.
        num_res_blocks: residual blocks of a level, one number for all or a list.
        transformer_depth: transformer blocks after each residual block, a number for each level (0: no attention).
        attention: "transformer", or "self": ADM's attention without text, of which there is one where the depth is above 0.
        attention_blocks: how many of a level's residual blocks are followed by attention; None: all.
        middle_depth: depth in the middle, 0 for none; None: as the last level, at least one.
        num_heads, or head_channels: heads of a level (one number or a list), or the width of one head.
        up_heads: heads on the way up, if they are others; with attention "self".
        cross_only: levels whose first attention looks at the context too; middle_cross_only: the middle.
        scale_shift: AdaGN. resblock_updown: BigGAN resampling; conv_resample: False halves by means and doubles without a
            convolution. linear_projections: as SD 2. groups: of every normalisation (32 as published; None: see
            ``group_norm``). dims: axes of space, 1, 2 or 3. qk_norm, ff_mult, dropout: see the layers.
    """

    model_channels: int = 320
    channel_mult: tuple[int | float, ...] = (1, 2, 4, 4)
    num_res_blocks: int | list[int] = 2
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    attention: Literal["transformer", "self"] = "transformer"
    attention_blocks: list[int] | None = None
    middle_depth: int | None = None
    num_heads: int | list[int] = 8
    head_channels: int | None = None
    up_heads: int | None = None
    cross_only: list[bool] | None = None
    middle_cross_only: bool = False
    scale_shift: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    linear_projections: bool = True
    groups: int | None = None
    dims: int = 2
    qk_norm: bool = False
    ff_mult: int = 4
    dropout: float = 0.0
    embedding: int = 0  # width of the embedding of time; context: of the tokens, None without
    context: int | None = None

    def __post_init__(self):
        levels = len(self.channel_mult)
        for name in ("transformer_depth", "num_res_blocks", "num_heads", "cross_only", "attention_blocks"):
            given = getattr(self, name)
            if isinstance(given, (list, tuple)) and len(given) != levels:
                raise ValueError(f"{name} {list(given)} needs one number for each of the {levels} levels of channel_mult "
                                 f"{list(self.channel_mult)}")
        if self.up_heads and self.attention != "self":
            raise ValueError(f"up_heads {self.up_heads}: only attention 'self' has other heads on the way up")

    @property
    def widths(self) -> list[int]:
        return [int(self.model_channels * m + 1e-6) for m in self.channel_mult]

    def of(self, name: str, level: int) -> int:
        """A number that may be one for all levels, or a list."""
        given = getattr(self, name)
        return given[level] if isinstance(given, (list, tuple)) else given

    def res(self, channels: int, out: int, resample: Literal["up", "down"] | None = None) -> ResBlock:
        return ResBlock(channels, out, self.embedding, self.dropout, self.scale_shift, resample, self.groups, self.dims)

    def attend(self, level: int, block: int = 0, up: bool = False, depth: int | None = None,
               cross_only: bool | None = None) -> nn.Module | None:
        """What follows a residual block of a level."""
        depth, channels = self.transformer_depth[level] if depth is None else depth, self.widths[level]
        if depth == 0 or (self.attention_blocks is not None and block >= self.attention_blocks[level]):
            return None
        if self.head_channels and channels % self.head_channels:
            raise ValueError(f"head_channels {self.head_channels}: a level of {channels} channels does not divide into heads "
                             "of so many")
        heads = channels // self.head_channels if self.head_channels else self.of("num_heads", level)
        heads = self.up_heads if up and self.up_heads and not self.head_channels else heads
        if heads == 0 or channels % heads:
            raise ValueError(f"a level of {channels} channels does not divide into {heads} heads")
        if self.attention == "self":
            return SelfAttention(channels, heads, self.groups)
        cross_only = bool(self.cross_only and self.cross_only[level]) if cross_only is None else cross_only
        return SpatialTransformer(channels, self.context or channels, heads, channels // heads, depth, self.ff_mult,
                                  self.linear_projections, self.qk_norm, self.dropout, self.groups, cross_only, self.dims)

    def resample(self, channels: int, to: Literal["up", "down"]) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, to)
        return (Downsample if to == "down" else Upsample)(channels, self.conv_resample, self.dims)

    def descent(self) -> tuple[nn.ModuleList, list[int]]:
        """The way down, and the channels of what it leaves behind: of x after the first convolution, and of every stage."""
        stages, left = nn.ModuleList(), [self.model_channels]
        for level, width in enumerate(self.widths):
            for block in range(self.of("num_res_blocks", level)):
                stages.append(Stage(self.res(left[-1], width), self.attend(level, block)))
                left.append(width)
            if level < len(self.widths) - 1:
                stages.append(Stage(None, resample=self.resample(width, "down")))
                left.append(width)
        return stages, left

    def bottom(self) -> nn.ModuleList:
        """The middle."""
        depth = max(1, self.transformer_depth[-1]) if self.middle_depth is None else self.middle_depth
        last, width = len(self.widths) - 1, self.widths[-1]
        attention = self.attend(last, depth=depth, cross_only=self.middle_cross_only)
        return nn.ModuleList([Stage(self.res(width, width), attention), Stage(self.res(width, width))])

    def ascent(self, left: list[int]) -> nn.ModuleList:
        """The way up, whose stages also take what was left behind, the last first."""
        stages, left, channels = nn.ModuleList(), list(left), self.widths[-1]
        for level, width in reversed(list(enumerate(self.widths))):
            blocks = self.of("num_res_blocks", level) + 1
            for block in range(blocks):
                double = self.resample(width, "up") if level and block == blocks - 1 else None
                stages.append(Stage(self.res(channels + left.pop(), width), self.attend(level, block, up=True), double))
                channels = width
        return stages


def run(stage: Stage, h: Tensor, embedding: Tensor, cond: Cond, saving: bool) -> Tensor:
    """saving: activations are computed again in the backward pass, not kept."""
    if saving and torch.is_grad_enabled():
        return checkpoint(stage, h, embedding, cond, use_reentrant=False)
    return stage(h, embedding, cond)


def perceptron(given: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given, width), nn.SiLU(), nn.Linear(width, width))


class UNet(nn.Module):
    """(x, time, cond) -> out.

    Args:
        in_channels: channels of x, spatial conditions included; out_channels: of the output. Given by the program.
        context_dim: width of the condition's tokens. Given by the program.
        vector_dim: width of the condition's vector, which joins the time embedding; None: no vector. Given.
        vector: how it joins: through an "mlp" (SDXL), a "linear" layer, or "add": as it is, for conditioners that give
            vectors of the embedding's width, 4 * time_channels (ADM's and LDM's classes).
        time_channels: width of the sinusoids of time; None: model_channels.
        patch_size: fold p x p pixels into channels at the entrance and unfold at the exit: p^2 fewer positions.
        checkpointing: recompute activations in the backward pass (less memory, +1/3 time).
        The others: see ``Plan``.
    """

    given = ("in_channels", "out_channels", "context_dim", "vector_dim")
    check_params = staticmethod(limits(**POSITIVE, patch_size=1))

    def __init__(self, in_channels: int, out_channels: int, context_dim: int | None = None,
                 vector_dim: int | None = None, model_channels: int = 320, channel_mult: list[int | float] = (1, 2, 4, 4),
                 num_res_blocks: int | list[int] = 2, transformer_depth: list[int] = (1, 1, 1, 0),
                 middle_depth: int | None = None, attention: Literal["transformer", "self"] = "transformer",
                 attention_blocks: list[int] | None = None, num_heads: int | list[int] = 8,
                 head_channels: int | None = None, up_heads: int | None = None, cross_only: list[bool] | None = None,
                 middle_cross_only: bool = False, vector: Literal["mlp", "linear", "add"] = "mlp",
                 time_channels: int | None = None, patch_size: int = 1, scale_shift: bool = False,
                 resblock_updown: bool = False, conv_resample: bool = True, linear_projections: bool = True,
                 groups: int | None = None, dims: Literal[1, 2, 3] = 2, qk_norm: bool = False, ff_mult: int = 4,
                 dropout: float = 0.0, checkpointing: bool = False):
        super().__init__()
        self.dims, self.time_channels = dims, time_channels or model_channels
        self.embedding = 4 * self.time_channels
        said = {name: value for name, value in locals().items() if name in Plan.__dataclass_fields__}
        plan = Plan(**said, embedding=self.embedding, context=context_dim)
        if patch_size > 1 and dims != 2:
            raise ValueError(f"patch_size {patch_size}: patches are of pictures, dims 2, not {dims}")
        if vector_dim is not None and vector == "add" and vector_dim != self.embedding:
            raise ValueError(f"vector 'add': the condition's vector has {vector_dim} numbers, the embedding of time "
                             f"{self.embedding}; take 'mlp', or a conditioner of that width")
        self.patch_size, self.checkpointing = patch_size, checkpointing
        self.multiple = patch_size * 2 ** (len(channel_mult) - 1)  # x's sides have to be multiples of this
        self.time = perceptron(self.time_channels, self.embedding)
        self.vector = None if vector_dim is None else {
            "mlp": lambda: perceptron(vector_dim, self.embedding), "linear": lambda: nn.Linear(vector_dim, self.embedding),
            "add": nn.Identity}[vector]()  # fmt: skip
        self.conv_in = CONV[dims](in_channels * patch_size**2, model_channels, 3, padding=1)
        self.down, left = plan.descent()
        self.middle = plan.bottom()
        self.up = plan.ascent(left)
        self.norm_out = group_norm(plan.widths[0], groups)
        self.conv_out = zero(CONV[dims](plan.widths[0], out_channels * patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x (B,C,H,W), time (B,) in 0..1000, cond.tokens (B,L,D) with cond.mask (B,L), cond.vector (B,E) -> (B,C',H,W).

        Raises:
            ValueError: where a side of x is no multiple of ``multiple``, or the condition lacks the vector.
        """
        sides = x.shape[-min(self.dims, 2):]
        if any(side % self.multiple for side in sides):
            raise ValueError(f"the UNet halves its input {'x'.join(map(str, sides))}: both sides have to be multiples of "
                             f"{self.multiple}")
        embedding = self.time(timestep_embedding(time, self.time_channels).to(x.dtype))
        if self.vector is not None:
            if cond.vector is None:
                raise ValueError("the UNet was built for conditions with a vector, and this one has none")
            embedding = embedding + self.vector(cond.vector.to(x.dtype))
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x)
        skips = [h]
        for stage in self.down:
            h = run(stage, h, embedding, cond, self.checkpointing)
            skips.append(h)
        for stage in self.middle:
            h = run(stage, h, embedding, cond, self.checkpointing)
        for stage in self.up:
            h = run(stage, torch.cat([h, skips.pop()], dim=1), embedding, cond, self.checkpointing)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h
