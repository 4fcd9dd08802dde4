"""Text to tokens: a frozen encoder's hidden states, and a small trainable part on top."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.common.files import UserError, digest
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner
from ldm.conditioners.encoders import load_encoder

log = logging.getLogger(__name__)
MULTIPLE = 8  # batches are padded to multiples of this many tokens: few different shapes for compiled networks
REPORTED = 20  # so many cut captions are logged and remembered one by one, the others are counted


class TextConditioner(Conditioner):
    """Captions -> Cond(tokens (B,L,width), mask (B,L)).

    encoder: "minilm", a model hub id, or a local folder (see encoders.load_encoder); layer: which hidden state, or
    several to concatenate. max_length: tokens a caption may have, the encoder's own limit if None.
    width, depth, heads: the trainable part, a projection and `depth` transformer blocks, then a LayerNorm; with neither
    width nor depth the frozen states pass unchanged.
    dropout: share of captions that training replaces by the empty one (p_uncond; 2207.12598).
    truncate: "report" logs the words that do not fit, "error" refuses such captions.
    keep_padding: every caption has max_length tokens, and padding counts as text, as Stable Diffusion was trained.

    The frozen encoder is no submodule: it is absent from parameters() and state_dict(), shared by deep copies, and read
    when a caption is first encoded.
    """

    def __init__(
        self,
        encoder: str = "minilm",
        layer: int | list[int] = -1,
        max_length: int | None = None,
        width: int | None = None,
        depth: int = 0,
        heads: int = 4,
        dropout: float = 0.0,
        truncate: Literal["report", "error"] = "report",
        keep_padding: bool = False,
        revision: str | None = None,
    ):
        super().__init__()
        self.encoder = load_encoder(encoder, revision, layer)
        limit = self.encoder.max_length
        if max_length is not None and not 3 <= max_length <= limit:
            raise UserError(f"max_length {max_length}: text encoder {encoder} takes 3 to {limit} tokens")
        if not 0 <= dropout <= 1:
            raise UserError(f"dropout {dropout}: the share of dropped captions lies between 0 and 1")
        if truncate not in ("report", "error"):
            raise UserError(f"truncate {truncate!r}: expected 'report' or 'error'")
        self.max_length = max_length or limit
        self.width = width or self.encoder.width
        self.dropout, self.truncate, self.keep_padding = dropout, truncate, keep_padding
        self.cut: dict[str, str] = {}  # caption -> the words that did not fit; the first REPORTED of them
        self.cut_count = 0
        self._null: tuple[Tensor, Tensor] | None = None
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # tells the device and dtype to work in

        self.project = nn.Identity() if width is None else nn.Linear(self.encoder.width, width)
        self.blocks = nn.ModuleList(Block(self.width, heads) for _ in range(depth))
        self.norm = nn.Identity() if width is None and not depth else nn.LayerNorm(self.width)

    def forward(self, batch: dict) -> Cond:
        """batch: "text_states" (B,L,D0) and "text_mask" (B,L) when they are stored, else "caption", list of B str."""
        if "text_states" in batch:
            return self.refine(batch["text_states"], batch["text_mask"])
        return self.refine(*self.encode(batch["caption"]))

    def null(self, n: int) -> Cond:
        """The empty caption, n times: what guidance compares with and caption dropout puts in."""
        return self.refine(*self.null_states()).repeat_interleave(n)

    def with_null(self, batch: dict) -> tuple[Cond, Cond | None]:
        """The captions, and "negative_caption" (list of B) if the batch has it, else the empty one."""
        if "negative_caption" not in batch:
            return super().with_null(batch)
        return self(batch), self({"caption": batch["negative_caption"]})

    def example(self, z: Tensor) -> Cond:
        """The longest caption, without the frozen encoder."""
        states = torch.empty(1, self.max_length, self.encoder.width)
        return self.refine(states, torch.ones(1, self.max_length, dtype=torch.bool))

    def refine(self, states: Tensor, mask: Tensor) -> Cond:  # (B,L,D0), (B,L) True where real
        """The trainable part. Padding stays zero, so that it makes no difference how much of it there is."""
        mask = mask.to(self.anchor.device)
        tokens = self.project(states.to(self.anchor))
        for block in self.blocks:
            tokens = block(tokens, mask)
        return Cond(self.norm(tokens).masked_fill(~mask[..., None], 0), mask)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:  # -> (B,L,D0) float32, (B,L) True where real
        """The frozen part: hidden states, zero at padding. L is the longest caption's, rounded up to MULTIPLE."""
        tokenized = self._tokenize(captions)
        self._report(captions, [_left_over(c, e) for c, e in zip(captions, tokenized.encodings, strict=True)])
        ids, mask = tokenized["input_ids"].to(self.anchor.device), tokenized["attention_mask"].bool()
        if not self.keep_padding:
            longest = int(mask.sum(dim=1).max())
            ids, mask = (value[:, : -(-longest // MULTIPLE) * MULTIPLE] for value in (ids, mask))
        mask = mask.to(ids.device) | self.keep_padding
        return self.encoder.states(ids, mask).masked_fill(~mask[..., None], 0), mask

    def null_states(self) -> tuple[Tensor, Tensor]:  # (1,L,D0), (1,L)
        """encode([""]), computed once."""
        if self._null is None:
            self._null = self.encode([""])
        self._null = tuple(value.to(self.anchor.device) for value in self._null)
        return self._null

    def prepare(self) -> None:
        """Find the encoder's files, download them if they are missing; UserError, naming them, when that fails."""
        _ = self.encoder.folder

    def release(self) -> None:
        """Free the frozen encoder's memory (all captions are stored); the empty caption's states are kept."""
        self.null_states()
        self.encoder.release()

    @property
    def encoder_hash(self) -> str:
        """Of all that encode() depends on: the encoder's weights and vocabulary, layer, max_length, padding."""
        return digest(self.encoder.hash, self.max_length, self.keep_padding)

    def dropped_words(self, captions: Sequence[str]) -> list[str]:
        """For each caption the end that does not fit into max_length tokens; "" where all of it fits."""
        return [_left_over(c, e) for c, e in zip(captions, self._tokenize(captions).encodings, strict=True)]

    def _tokenize(self, captions: Sequence[str]):
        options = dict(truncation=True, padding="max_length", max_length=self.max_length, return_tensors="pt")
        return self.encoder.tokenizer(list(captions), **options)

    def _report(self, captions: Sequence[str], dropped: Sequence[str]) -> None:
        for caption, words in zip(captions, dropped, strict=True):
            if not words or caption in self.cut:
                continue
            message = f"caption {caption[:60]!r}... has more than {self.max_length} tokens; not read: {words!r}"
            if self.truncate == "error":
                raise UserError(message)
            self.cut_count += 1
            if self.cut_count <= REPORTED:
                self.cut[caption] = words
                log.warning(message)
            elif self.cut_count == REPORTED + 1:
                log.warning(f"more captions have over {self.max_length} tokens; from here on they are only counted")


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


def _left_over(caption: str, encoding) -> str:
    """The end of a caption that its tokens (a tokenizers.Encoding) do not reach, from the beginning of a word on."""
    if not encoding.overflowing:
        return ""
    end = max(stop for _, stop in encoding.offsets)
    while 0 < end < len(caption) and not (caption[end - 1].isspace() or caption[end].isspace()):
        end -= 1
    return caption[end:].strip()
