"""CLIP's text encoder (2103.00020), as Stable Diffusion 1, 2 and XL read prompts with it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.captions import OwnText
from ldm.conditioners.prompts import Long
from ldm.conditioners.transformer import TextTransformer

HEAD = 64  # width of a head in every published CLIP
Pooled = Literal["state", "projected"]


class ClipText(OwnText):
    """Captions -> Cond(tokens (B,77,width), vector (B,E) where it is asked for).

    Each token is read with those before it in view, padding included: there is no mask, and none in the Cond but for captions
    of several windows.

    Args:
        vocab_size, width, layers, heads, mlp, max_length, activation: sizes; heads None: width / 64; mlp None: 4 width.
        layer: whose states are the tokens, as transformers counts: 0 the embeddings, i the output of block i, -1 the last, -2
            the one before (SD 2; clip_skip 1 of diffusers is -2, clip_skip k is -1 - k).
        final_norm: the encoder's last LayerNorm is applied to that state, whichever it is (SD 1 and 2, not XL).
        pooled: a vector for the whole caption: the last block's state, after the final norm, where the caption ends, as it is
            or projected to where CLIP compares texts with images (SDXL). Of captions of several windows, that of the first.
        projection: width of that projection; it is kept in the model where a checkpoint has it, used or not.
        logit_scale: keep CLIP's temperature, a number without use here, for checkpoints that have it.
        start, end, pad: ids before a caption, after it, and after that; None: the last but one, the last, the end's. OpenCLIP
            pads with 0.
        zero_null: the empty caption, which guidance compares with, is all zeros (SDXL).
        vocabulary: where the tokenizer is: "clip", a folder, a model hub id (``ldm.conditioners.vocabulary``); it is saved
            with the model. None: conditions are token ids.
        clean: what is done to captions first: "none", as transformers' tokenizer, or "open_clip".
        trainable: what the condition depends on is trained too; else all of it is frozen.
        keep_padding, long, prompt_weights, dropout: see ``ldm.conditioners.captions.Captions``.
    """

    def __init__(self, vocab_size: int = 49408, width: int = 768, layers: int = 12, heads: int | None = None,
                 mlp: int | None = None, max_length: int = 77, activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
                 layer: int = -1, final_norm: bool = True, pooled: Pooled | None = None, projection: int | None = None,
                 logit_scale: bool = False, start: int | None = None, end: int | None = None, pad: int | None = None,
                 zero_null: bool = False, vocabulary: str | None = "clip", clean: Literal["none", "open_clip"] = "none",
                 trainable: bool = False, keep_padding: bool = True, long: Long = "cut", prompt_weights: bool = False,
                 dropout: float = 0.0):
        heads = heads or max(1, width // HEAD)
        if width % heads:
            raise UserError(f"heads {heads}: must divide the width {width}")
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"layer {layer}: an encoder of {layers} blocks has states 0 to {layers} (-1 is {layers})")
        if pooled not in (None, *get_args(Pooled)) or (pooled == "projected" and not projection):
            raise UserError(f"pooled {pooled!r}: it takes 'state', or 'projected' with a width for projection")
        end = vocab_size - 1 if end is None else end
        transformer = TextTransformer(vocab_size, max_length, width, layers, heads, width // heads, mlp or 4 * width, bias=True,
                                      activation=activation, causal=True)  # fmt: skip
        super().__init__(transformer, vocabulary, vocab_size - 2 if start is None else start, end, end if pad is None else pad,
                         clean, [heads, activation, layer % (layers + 1), final_norm, pooled], long=long,
                         prompt_weights=prompt_weights, keep_padding=keep_padding, dropout=dropout)  # fmt: skip
        self.projection = nn.Linear(width, projection, bias=False) if projection else None
        self.logit_scale = nn.Parameter(torch.full((), 100.0).log()) if logit_scale else None
        self.layer, self.final_norm, self.pooled, self.zero_null = layer % (layers + 1), final_norm, pooled, zero_null
        self.depth = layers if pooled else self.layer  # blocks that are run
        self.width = width
        self.vector_width = {None: None, "state": width, "projected": projection}[pooled]
        used = [transformer.token, transformer.position, *transformer.blocks[: self.depth]]
        used += [transformer.norm] if final_norm or pooled else []
        used += [self.projection] if pooled == "projected" else []
        self.train_only(*(used if trainable else ()))

    def hidden(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:  # (B,L), (B,L) -> (B,L,D), and (B,E) if pooled
        found, norm = self.transformer(ids, self.depth), self.transformer.norm
        tokens = norm(found[self.layer]) if self.final_norm else found[self.layer]
        if not self.pooled:
            return (tokens,)
        ends = (ids == self.end).long().argmax(dim=1)  # the first one
        vector = norm(found[-1][torch.arange(len(ids), device=ids.device), ends])
        return tokens, vector if self.pooled == "state" else self.projection(vector)

    def null(self, n: int) -> Cond:
        null = super().null(1)
        if self.zero_null:
            null = Cond(*(None if value is None else torch.zeros_like(value) for value in (null.tokens, None, null.vector)))
        return null.repeat_interleave(n)
