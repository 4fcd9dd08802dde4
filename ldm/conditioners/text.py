"""Text to tokens: a frozen encoder's hidden states, and a small trainable part on top."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.common.files import UserError, digest
from ldm.common.limits import limits
from ldm.cond import Cond
from ldm.conditioners.captions import Captions
from ldm.conditioners.encoders import load_encoder
from ldm.conditioners.prompts import Long
from ldm.conditioners.tokens import Tokenizer


class TextConditioner(Captions):
    """Captions -> Cond(tokens (B,L,width), mask (B,L)).

    encoder: "minilm", a model hub id, or a local folder (see encoders.load_encoder); layer: which hidden state, or
    several to concatenate. max_length: tokens that are read at once, the encoder's own limit if None.
    width, depth, heads: the trainable part, a projection and `depth` transformer blocks, then a LayerNorm; with neither
    width nor depth the frozen states pass unchanged.
    long, prompt_weights, keep_padding, dropout: see captions.Captions.

    The frozen encoder is no submodule: it is absent from parameters() and state_dict(), shared by deep copies, and read
    when a caption is first encoded.
    """

    check_params = staticmethod(limits(max_length=3, width=1, depth=0, heads=1, dropout=(0, 1)))

    def __init__(
        self,
        encoder: str = "minilm",
        layer: int | list[int] = -1,
        max_length: int | None = None,
        width: int | None = None,
        depth: int = 0,
        heads: int = 4,
        dropout: float = 0.0,
        long: Long = "cut",
        prompt_weights: bool = False,
        keep_padding: bool = False,
        revision: str | None = None,
    ):
        frozen = load_encoder(encoder, revision, layer)
        limit = frozen.max_length
        if max_length is not None and not 3 <= max_length <= limit:
            raise UserError(f"max_length {max_length}: text encoder {encoder} takes 3 to {limit} tokens")
        super().__init__(max_length or limit, long, prompt_weights, keep_padding, dropout)
        self.encoder, self.width = frozen, width or frozen.width
        self._null: tuple[Tensor, ...] | None = None
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # tells the device and dtype to work in

        self.project = nn.Identity() if width is None else nn.Linear(self.encoder.width, width)
        self.blocks = nn.ModuleList(Block(self.width, heads) for _ in range(depth))
        self.norm = nn.Identity() if width is None and not depth else nn.LayerNorm(self.width)

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        whole = self.encoder.tokenizer
        return Tokenizer(whole.backend_tokenizer, self.max_length, whole.pad_token_id)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "tokenizer"}

    def states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor]:  # (B,L), (B,L) True where attended -> (B,L,D0) float32
        return (self.encoder.states(ids, mask),)

    def refine(self, states: Tensor, mask: Tensor) -> Cond:  # (B,L,D0), (B,L) True where real
        """The trainable part. Padding stays zero, so that it makes no difference how much of it there is."""
        mask = mask.to(self.anchor.device)
        tokens = self.project(states.to(self.anchor))
        for block in self.blocks:
            tokens = block(tokens, mask)
        return Cond(self.norm(tokens).masked_fill(~mask[..., None], 0), mask)

    def example(self, z: Tensor) -> Cond:
        """The longest caption, without the frozen encoder."""
        states = torch.empty(1, self.max_length, self.encoder.width)
        return self.refine(states, torch.ones(1, self.max_length, dtype=torch.bool))

    def null_states(self) -> tuple[Tensor, ...]:  # (1,L,D0), (1,L)
        """encode([""]), computed once: it outlives the encoder's release."""
        if self._null is None:
            self._null = self.encode([""])
        self._null = tuple(value.to(self.anchor.device) for value in self._null)
        return self._null

    def prepare(self) -> None:
        _ = self.encoder.folder

    def release(self) -> None:
        """Free the frozen encoder's memory (all captions are stored); the empty caption's states are kept."""
        self.null_states()
        self.encoder.release()

    @property
    def encoder_hash(self) -> str:
        """Of all that a model has to find again where it is used: the encoder's weights and vocabulary, layer, max_length,
        padding."""
        return digest(self.encoder.hash, self.max_length, self.keep_padding)

    @property
    def states_hash(self) -> str:
        plain = self.long != "window" and not self.prompt_weights
        return self.encoder_hash if plain else digest(self.encoder_hash, self.long, self.prompt_weights)


class Block(nn.Module):
    """Pre-norm transformer block (2002.04745) over tokens; the identity at initialisation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise UserError(f"heads {heads}: must divide the token width {width}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B,L,D), (B,L) True where real -> (B,L,D)
        q, k, v = rearrange(self.to_qkv(self.norm1(x)), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(rearrange(seen, "b h l d -> b l (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))
