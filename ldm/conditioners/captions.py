"""What conditioners on text have in common: captions or token ids -> hidden states -> Cond.

    caption --tokens--> windows of ids (B,N,L) --states--> (B, N L, D0) --refine--> Cond
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ldm.common.files import UserError, digest
from ldm.common.weights import content
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, check_dropout, entry
from ldm.conditioners.cleaning import CLEANINGS
from ldm.conditioners.prompts import Long, weigh
from ldm.conditioners.tokens import Tokenizer, up_to_end
from ldm.conditioners.transformer import TextTransformer
from ldm.conditioners.vocabulary import Vocabulary
from ldm.conditioners.wants import Want

log = logging.getLogger(__name__)
MULTIPLE = 8  # batches are padded to multiples of this many tokens: few different shapes for compiled networks
REPORTED = 20  # so many cut captions are logged and remembered one by one, the others are counted
STORED = ("text_states", "text_mask", "text_vector")  # what a batch holds of captions that were encoded before


class Captions(Conditioner):
    """Captions (a list of B texts, or token ids (B,L)) -> Cond. A kind has ``device``, ``tokenizer``, ``states``, ``refine``.

    Args:
        max_length: L, tokens that the encoder reads at once.
        long: of a caption of more tokens, "cut" reads the first L and logs what is not read, "error" refuses it, and "window"
            reads all of it, L tokens at a time, cut between words; the states of the windows follow one another. In a batch,
            and beside its null, those with fewer windows end in tokens that the mask hides.
        prompt_weights: captions may have weights in them, "(word:1.3)"; see ``ldm.conditioners.prompts``.
        keep_padding: every window has L tokens and padding counts as text, as Stable Diffusion was trained; else padding is
            hidden by the mask and makes no difference.
        dropout: share of captions that training replaces by the empty one (p_uncond; 2207.12598).
    """

    wants = (Want("caption", "text", "a text"),)

    def __init__(self, max_length: int, long: Long, prompt_weights: bool, keep_padding: bool, dropout: float):
        super().__init__()
        if long not in get_args(Long):
            raise UserError(f"long {long!r}: expected {', '.join(map(repr, get_args(Long)))}")
        self.max_length = self.length = max_length
        self.long, self.prompt_weights, self.keep_padding = long, prompt_weights, keep_padding
        self.dropout = check_dropout(dropout)
        self.cut: dict[str, str] = {}  # caption -> the words that did not fit; the first REPORTED of them
        self.cut_count = 0

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        """batch: "text_states" (B,L,D0), "text_mask" (B,L) and, if there is one, "text_vector" (B,E) when they are stored, else
        "caption"."""
        if STORED[0] in batch:
            return self.refine(*(batch[name] for name in STORED if name in batch))
        return self.refine(*self.encode(entry(batch, "caption", self)))

    def null(self, n: int) -> Cond:
        """The empty caption, n times: what guidance compares with and caption dropout puts in."""
        return self.refine(*self.null_states()).repeat_interleave(n)

    def with_null(self, batch: Mapping[str, Any]) -> tuple[Cond, Cond | None]:
        """The captions, and "negative_caption" (as "caption") if the batch has it, else the empty one."""
        if "negative_caption" not in batch:
            return super().with_null(batch)
        return self(batch), self({"caption": batch["negative_caption"]})

    def encode(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, ...]:
        """-> states (B,L,D0), zero at padding; mask (B,L) True where real; and a vector (B,E) if the kind gives one, of the
        first window. Without kept padding, L is the longest window's, rounded up to MULTIPLE."""
        ids, mask, weights = self._read(captions)
        exists = mask.any(dim=-1)  # (B,N)
        if self.keep_padding:
            mask = exists[..., None].expand_as(mask)
        else:
            longest = -(-int(mask.sum(dim=-1).max()) // MULTIPLE) * MULTIPLE
            ids, mask = ids[..., :longest], mask[..., :longest]
        (b, n, length), every = ids.shape, exists.all()
        given = [value.flatten(0, 1).to(self.device) for value in (ids, mask)]
        rows = exists.flatten().to(self.device)
        found = self.states(*(given if every else [value[rows] for value in given]))
        if not every:
            found = [value.new_zeros(b * n, *value.shape[1:]).index_put((rows,), value) for value in found]
        states, vector = found[0].reshape(b, n * length, -1), [value.unflatten(0, (b, n))[:, 0] for value in found[1:]]
        if weights is not None:
            states = weigh(states, weights[..., :length].flatten(1).to(states.device), self._empty(n, length))
        mask = mask.flatten(1).to(self.device)
        return states.masked_fill(~mask[..., None], 0), mask, *vector

    def null_states(self) -> tuple[Tensor, ...]:
        """encode([""])."""
        return self.encode([""])

    def dropped_words(self, captions: Sequence[str]) -> list[str]:
        """For each caption the end that is not read; "" where all of it is."""
        return self.tokenizer(captions, self.long, self.prompt_weights).unread

    def prepare(self) -> None:
        """Find the files that are needed, download them if they are missing; UserError, naming them, when that fails."""

    def release(self) -> None:
        """Free what encoding alone needs: all captions are stored."""

    @property
    def states_hash(self) -> str | None:
        """Of all that ``encode`` depends on; None: it is trained, and its states cannot be stored."""
        raise NotImplementedError(f"{type(self).__name__} has to say what its states depend on")

    def real(self, ids: Tensor) -> Tensor:  # (B,L) -> (B,L) True where a token is no padding
        return self.tokenizer.real(ids)

    def _read(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # (B,N,L), (B,N,L), (B,N,L)
        if not isinstance(captions, Tensor):
            windows = self.tokenizer(captions, self.long, self.prompt_weights)
            self._report(captions, windows.unread)
            return windows[:3]
        if captions.ndim != 2 or captions.is_floating_point() or not 1 <= captions.shape[1] <= self.max_length:
            raise UserError(f"token ids: expected whole numbers (B,L), L from 1 to {self.max_length}, got {captions.dtype} "
                            f"{tuple(captions.shape)}")  # fmt: skip
        mask = torch.ones_like(captions, dtype=torch.bool) if self.keep_padding else self.real(captions)
        return captions[:, None], mask[:, None], None

    def _empty(self, n: int, length: int) -> Tensor:  # (1, n * length, D0)
        """States of the empty caption at the places of n windows; where it has ended, its last one."""
        states, mask = self.null_states()[:2]
        places = torch.arange(length, device=states.device).clamp(max=mask.sum() - 1)
        return states[:, places].repeat(1, n, 1)

    def _report(self, captions: Sequence[str], unread: Sequence[str]) -> None:
        for caption, words in zip(captions, unread, strict=True):
            message = f"caption {caption[:60]!r}... has more than {self.max_length} tokens; not read: {words!r}"
            if words and self.long == "error":
                raise UserError(message)
            if not words or caption in self.cut:
                continue
            self.cut_count += 1
            if self.cut_count <= REPORTED:
                self.cut[caption] = words
                log.warning(message)
            elif self.cut_count == REPORTED + 1:
                log.warning(f"more captions have over {self.max_length} tokens; from here on they are only counted")


class OwnText(Captions):
    """Text conditioner whose encoder and vocabulary are part of the model: saved with it, frozen or trained with it.

    Args:
        transformer: what it reads ids with.
        vocabulary: see ``ldm.conditioners.vocabulary.find``; None: there is none, and conditions are token ids.
        start, end, pad: ids before a caption, after it, and after that.
        clean: what is done to captions first, a name in ``ldm.conditioners.cleaning.CLEANINGS``.
        settings: what the states depend on besides weights and vocabulary: plain data.
        others: as ``Captions`` has them.

    A kind has ``hidden`` in place of ``states``.
    """

    _made: tuple[Any, Tokenizer] | None = None  # the tokenizer, and what it was made of

    def __init__(self, transformer: TextTransformer, vocabulary: str | None, start: int, end: int, pad: int, clean: str,
                 settings: list, **others: Any):
        super().__init__(transformer.length, **others)
        if clean not in CLEANINGS:
            raise UserError(f"clean {clean!r}: there are {', '.join(CLEANINGS)}")
        self.transformer, self.vocabulary = transformer, Vocabulary(vocabulary)
        self.start, self.end, self.pad, self.clean, self.settings = start, end, pad, clean, settings

    def train_only(self, *parts: nn.Module | nn.Parameter) -> None:
        """Of all weights, these are trained; the others are kept as they are."""
        self.requires_grad_(False)
        for part in parts:
            part.requires_grad_(True)

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.transformer.position.device

    @property
    def tokenizer(self) -> Tokenizer:
        """UserError where there is none, or one that belongs to another model."""
        backend = self.vocabulary.tokenizer
        if self._made is None or self._made[0] is not backend:
            made = Tokenizer(backend, self.max_length, self.pad, CLEANINGS[self.clean])
            size, count = self.transformer.token.num_embeddings, backend.get_vocab_size()
            if (made.before, made.after) != ([self.start], [self.end]) or count > size:
                raise UserError(f"{type(self).__name__}: a vocabulary of {count} with {made.before} before a text and "
                                f"{made.after} after it is not this model's, of {size} with {self.start} and {self.end}")
            self._made = backend, made
        return self._made[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": None}

    def states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """A frozen encoder is no less exact for its network's being trained in half precision."""
        with nullcontext() if self.trained or ids.is_meta else torch.autocast(ids.device.type, enabled=False):
            return self.hidden(ids, mask)

    def example(self, z: Tensor) -> Cond:
        """The encoder is run where it is trained, so that its work is seen."""
        if not self.trained:
            return super().example(z)
        mask = z.new_ones(1, self.max_length).bool()
        states, *vector = self.states(mask.long(), mask)
        return self.refine(states, mask, *vector)

    def refine(self, states: Tensor, mask: Tensor, *vector: Tensor) -> Cond:
        """Published models attend to padding: one window of it needs no mask."""
        like = self.transformer.position
        whole = self.keep_padding and states.shape[1] <= self.max_length
        return Cond(states.to(like), None if whole else mask.to(like.device), *(value.to(like) for value in vector))

    def null_states(self) -> tuple[Tensor, ...]:
        """Of the empty caption; needs no vocabulary."""
        ids = torch.full((1, self.max_length), self.pad)
        ids[:, 0], ids[:, 1] = self.start, self.end
        return self.encode(ids)

    def real(self, ids: Tensor) -> Tensor:
        return up_to_end(ids, self.end)

    def _read(self, captions: Sequence[str] | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        ids, *rest = super()._read(captions)
        size = self.transformer.token.num_embeddings
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise UserError(f"token ids: from {ids.min()} to {ids.max()}, but this model knows 0 to {size - 1}")
        return ids, *rest

    def prepare(self) -> None:
        self.vocabulary.prepare()

    @property
    def states_hash(self) -> str | None:
        if self.trained:
            return None
        _ = self.vocabulary.name and self.vocabulary.tokenizer  # in the state dict from now on
        weights = {name: content(value) for name, value in self.state_dict().items()}
        return digest(weights, self.start, self.end, self.pad, self.clean, self.settings, self.max_length, self.keep_padding,
                      self.long, self.prompt_weights)
