"""LDM's own text encoder (2112.10752, section 4.3.1): a transformer over BERT's word pieces, trained with the rest."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.conditioners.captions import OwnText
from ldm.conditioners.prompts import Long
from ldm.conditioners.transformer import TextTransformer


class BertText(OwnText):
    """Captions -> Cond(tokens (B,L,width)). Every token sees every other.

    Args:
        vocab_size, width, layers, heads, head_dim, mlp, max_length: sizes; the attention is heads * head_dim wide, whatever
            ``width`` is; mlp None: 4 width.
        logits: keep the layer that the published checkpoint has and nobody uses, from states to words.
        start, end, pad: ids of [CLS], [SEP], [PAD].
        vocabulary: where the tokenizer is: "bert", a folder, a model hub id (``ldm.conditioners.vocabulary``); it is saved with
            the model. None: conditions are token ids.
        trainable: else the encoder is frozen.
        keep_padding: padding counts as text, as LDM was trained; else it is hidden, here and in the Cond.
        long, prompt_weights, dropout: see ``ldm.conditioners.captions.Captions``.
    """

    def __init__(self, vocab_size: int = 30522, width: int = 1280, layers: int = 32, heads: int = 8, head_dim: int = 64,
                 mlp: int | None = None, max_length: int = 77, logits: bool = False, start: int = 101, end: int = 102,
                 pad: int = 0, vocabulary: str | None = "bert", trainable: bool = True, keep_padding: bool = True,
                 long: Long = "cut", prompt_weights: bool = False, dropout: float = 0.0):
        transformer = TextTransformer(vocab_size, max_length, width, layers, heads, head_dim, mlp or 4 * width, bias=False,
                                      activation="gelu", causal=False)  # fmt: skip
        super().__init__(transformer, vocabulary, start, end, pad, "none", [heads], long=long, prompt_weights=prompt_weights,
                         keep_padding=keep_padding, dropout=dropout)  # fmt: skip
        self.logits = nn.Linear(width, vocab_size) if logits else None
        self.width = width
        self.train_only(*([transformer] if trainable else ()))

    def hidden(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:  # (B,L), (B,L) True where attended -> (B,L,D)
        return (self.transformer.norm(self.transformer(ids, mask=None if self.keep_padding else mask)[-1]),)
