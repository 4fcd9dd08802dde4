"""The diffusion transformer DiT (2212.09748): patches are tokens, and every block is steered by the embedding of time and of
the condition's vector through its normalisations (adaLN-Zero).

    x (B,C,H,W) --patches, positions--> tokens (B,N,D) --blocks--> tokens --norm, linear--> patches, (B,C',H,W)

Text is attended to by every block (PixArt-alpha, 2310.00426), or stands in front of the patches as further tokens (in
context, section 3.2).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.common.limits import limits
from ldm.cond import Cond
from ldm.networks.layers import Attention, timestep_embedding, zero

FREQUENCIES = 256  # of the time embedding, halves of cosines and sines


def position_angles(height: int, width: int, dim: int, base_size: int | None = None,
                    device: torch.device | str | None = None) -> Tensor:
    """(N, 2, dim / 4): column and row of each of the N = height * width patches, times 10000^(-4 k / dim).

    base_size: patches a side to which coordinates are brought: 0 .. base_size whatever the height and width.
    """
    exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
    row, column = (torch.arange(side, device=device, dtype=exact) * (base_size / side if base_size else 1)
                   for side in (height, width))  # fmt: skip
    place = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1).reshape(-1, 2)
    omega = 10000.0 ** (torch.arange(dim // 4, device=device, dtype=exact) / (-dim / 4))
    return place[..., None] * omega


def sincos(angles: Tensor) -> Tensor:
    """(N, 2, D / 4) -> (N, D): sines and cosines of the column, then of the row."""
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (B,N,D), (B,1,D) twice
    return x * (1 + scale) + shift


def norm(width: int, eps: float = 1e-6) -> nn.LayerNorm:
    """Without scale and shift of its own: they are the embedding's."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=eps)


class Embedder(nn.Module):
    """Time, and the condition's vector: (B, FREQUENCIES), (B, E) -> (B, D). ``direct``: the vector is added as it is."""

    def __init__(self, width: int, vector_dim: int | None, direct: bool):
        super().__init__()
        self.time = _mlp(FREQUENCIES, width, nn.SiLU())
        self.vector = None if vector_dim is None else nn.Identity() if direct else _mlp(vector_dim, width, nn.SiLU())

    def forward(self, time: Tensor, vector: Tensor | None) -> Tensor:
        embedding = self.time(time)
        return embedding if self.vector is None else embedding + self.vector(vector)


class Block(nn.Module):
    """Self-attention, cross-attention if there is a context, feed-forward; the identity at the start (section 3.2)."""

    def __init__(self, width: int, heads: int, hidden: int, context: bool, qk_norm: bool, mlp_eps: float, dropout: float):
        super().__init__()
        shared = dict(heads=heads, head_dim=width // heads, qk_norm=qk_norm, dropout=dropout, bias=True)
        self.norm1, self.attention = norm(width), Attention(width, **shared)
        self.cross = Attention(width, **shared) if context else None
        self.norm2 = norm(width, mlp_eps)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor | None, mask: Tensor | None, angles: Tensor | None) -> Tensor:
        """x (B,N,D), embedding (B,D), text (B,L,D); mask (B,L) of the text, or (B,N) of x; angles (N,d/2) of rotary
        positions."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(embedding))[:, None].chunk(6, dim=-1)
        own = mask if self.cross is None else None
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1), mask=own, angles=angles)
        if self.cross is not None:
            x = x + self.cross(x, text, mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """(x, time, cond) -> out.

    Args:
        in_channels: channels of x, spatial conditions included; out_channels: of the output. Given by the program.
        context_dim: width of the condition's tokens; None: no text. Given by the program.
        vector_dim: width of the condition's vector, which joins the time embedding; None: no vector. Given.
        width: of the tokens; depth: blocks; heads: of each attention. Published: S 384, 12, 6; B 768, 12, 12; L 1024, 24,
            16; XL 1152, 28, 16.
        patch_size: side of a patch in pixels of x.
        mlp_ratio: hidden width of the feed-forward layers over ``width``.
        text: "cross" attends to the tokens in every block, "in_context" puts them in front of the patches.
        positions: "sincos", a fixed table that is added; "rotary", queries and keys turned (2104.09864), one half of each
            head by the column and one by the row.
        base_size: patches a side of the pictures trained on, to which the coordinates of others are brought; None: a
            patch is a step of 1 at any size.
        vector: "mlp", or "direct" where the vector has the embedding's width already, as DiT's class embedding.
        embedders: "own" gives every block a time embedder of its own, and its own part of the vector (depth x width
            numbers if direct), as diffusers has it; the output takes the first block's.
        told: what the time embedding is told of clean data and of pure noise: [0, 1000] DDPM's steps; SiT's is [1, 0].
        endpoint: of the time embedding's frequencies, see ``timestep_embedding``; diffusers has it.
        qk_norm, dropout: see the layers. mlp_eps: of the feed-forward layer's norm; diffusers has 1e-5 there.
        checkpointing: recompute activations in the backward pass (less memory, +1/3 time).

    Raises:
        ValueError: for sizes that do not divide, also of x.
    """

    given = ("in_channels", "out_channels", "context_dim", "vector_dim")
    check_params = staticmethod(limits(width=1, depth=1, heads=1, patch_size=1, mlp_ratio=0.01, base_size=1, dropout=(0, 1)))

    def __init__(self, in_channels: int, out_channels: int, context_dim: int | None = None, vector_dim: int | None = None,
                 width: int = 1152, depth: int = 28, heads: int = 16, patch_size: int = 2, mlp_ratio: float = 4.0,
                 text: Literal["cross", "in_context"] = "cross", positions: Literal["sincos", "rotary"] = "sincos",
                 base_size: int | None = None, vector: Literal["mlp", "direct"] = "mlp",
                 embedders: Literal["shared", "own"] = "shared", told: list[float] = (0.0, 1000.0),
                 endpoint: bool = False, qk_norm: bool = False, mlp_eps: float = 1e-6, dropout: float = 0.0,
                 checkpointing: bool = False):
        super().__init__()
        own = depth if embedders == "own" else 1
        _check(width, heads, own, vector_dim, vector, positions)
        self.patch_size = self.multiple = patch_size  # x's sides have to be multiples of this
        self.positions, self.base_size, self.told, self.endpoint = positions, base_size, tuple(told), endpoint
        self.checkpointing = checkpointing

        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        each = None if vector_dim is None else vector_dim // own
        self.embedders = nn.ModuleList(Embedder(width, each, vector == "direct") for _ in range(own))
        self.text = None if context_dim is None else _mlp(context_dim, width, nn.GELU("tanh"))
        cross = context_dim is not None and text == "cross"
        self.blocks = nn.ModuleList(Block(width, heads, int(width * mlp_ratio), cross, qk_norm, mlp_eps, dropout)
                                    for _ in range(depth))
        self.norm_out, self.modulation_out = norm(width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_size**2 * out_channels)
        self.in_context = context_dim is not None and not cross
        self._initialise()

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(part.weight.flatten(1))
                nn.init.zeros_(part.bias)
        for embedder in self.embedders:
            for layer in (embedder.time[0], embedder.time[2]):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:  # gates of 0: every block is the identity
            zero(block.modulation)
            if block.cross is not None:
                zero(block.cross.out[0])
        zero(self.modulation_out)
        zero(self.out)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x (B,C,H,W), time (B,) in 0..1000, cond.tokens (B,L,E) with cond.mask (B,L), cond.vector (B,E) -> (B,C',H,W)."""
        height, width = self._grid(x, cond)
        tokens = rearrange(self.patches(x), "b d h w -> b (h w) d")
        count, angles = tokens.shape[1], None
        if self.positions == "sincos":
            table = sincos(position_angles(height, width, tokens.shape[2], self.base_size, x.device))
            tokens = tokens + table.to(tokens.dtype)
        else:
            dim = tokens.shape[2] // self.blocks[0].attention.heads
            angles = position_angles(height, width, dim, self.base_size, x.device).flatten(1).float()
        embeddings = self._embed(time, cond, x.dtype)
        text, mask = (None, None) if self.text is None else (self.text(cond.tokens.to(x.dtype)), cond.mask)
        if self.in_context:
            tokens = torch.cat([text.to(tokens.dtype), tokens], dim=1)
            mask = None if mask is None else F.pad(mask, (0, count), value=True)
            angles = None if angles is None else F.pad(angles, (0, 0, text.shape[1], 0))  # text is not turned
        for block, embedding in zip(self.blocks, embeddings * (len(self.blocks) // len(embeddings)), strict=True):
            tokens = self._run(block, tokens, embedding, text, mask, angles)
        shift, scale = self.modulation_out(F.silu(embeddings[0]))[:, None].chunk(2, dim=-1)
        out = self.out(modulate(self.norm_out(tokens[:, -count:]), shift, scale))
        p = self.patch_size
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)

    def _embed(self, time: Tensor, cond: Cond, dtype: torch.dtype) -> list[Tensor]:  # of (B,D)
        first, last = self.told
        told = first + (last - first) / 1000 * time.float()
        features = timestep_embedding(told, FREQUENCIES, endpoint=self.endpoint).to(dtype)
        parts = [None] * len(self.embedders)
        if self.embedders[0].vector is not None:
            parts = cond.vector.to(dtype).chunk(len(parts), dim=-1)
        return [embedder(features, part) for embedder, part in zip(self.embedders, parts, strict=True)]

    def _grid(self, x: Tensor, cond: Cond) -> tuple[int, int]:
        """Patches in height and width."""
        for what, needed, there in (("text", self.text, cond.tokens), ("a vector", self.embedders[0].vector, cond.vector)):
            if needed is not None and there is None:
                raise ValueError(f"this network was made for {what}, and the condition has none")
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"the DiT cuts its input {x.shape[2]}x{x.shape[3]} into patches: both sides have to be multiples "
                             f"of {self.multiple}")
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def _run(self, block: Block, *given: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *given, use_reentrant=False)
        return block(*given)


def _mlp(dim: int, width: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, width), activation, nn.Linear(width, width))


def _check(width: int, heads: int, own: int, vector_dim: int | None, vector: str, positions: str) -> None:
    unit = 4 * heads if positions == "rotary" else math.lcm(4, heads)
    if width % unit:
        raise ValueError(f"width {width}: with {heads} heads and {positions} positions it has to be a multiple of {unit}")
    if vector_dim is not None and vector == "direct" and vector_dim != own * width:
        raise ValueError(f"vector: 'direct' adds a vector of {own * width} numbers, and the condition's has {vector_dim}; "
                         "give the conditioner that width, or take 'mlp'")
    if vector_dim is not None and vector_dim % own:
        raise ValueError(f"embedders: 'own' shares the condition's {vector_dim} numbers out among {own} blocks; take a "
                         "multiple, or 'shared'")
