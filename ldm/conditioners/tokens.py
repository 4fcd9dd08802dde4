"""Texts -> windows of token ids, by any tokenizer of the `tokenizers` library.

A window is what an encoder reads at once: L tokens, the special ones around the text included, then padding. Offsets of
tokens tell where words begin, which of them have a weight, and which are not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ldm.common.files import UserError
from ldm.conditioners.prompts import Long, parse

if TYPE_CHECKING:
    import tokenizers

PROBES = ("a", "the", "1", ".")  # texts of which a tokenizer makes tokens of their own


class Windows(NamedTuple):
    """What became of B texts: N windows of L tokens; a text that needs fewer has some that are padding alone."""

    ids: Tensor  # (B,N,L) int64
    mask: Tensor  # (B,N,L) True where a token is real
    weights: Tensor | None  # (B,N,L), 1 where nothing was said; None: nothing was said anywhere
    unread: list[str]  # of each text the end that does not fit, from the beginning of a word on; "" where all is read


class Tokenizer:
    """
    Args:
        backend: what it truncates or pads by itself is not done.
        length: L, tokens of a window.
        pad: id that fills windows up.
        clean: applied to texts first.
    """

    def __init__(self, backend: tokenizers.Tokenizer, length: int, pad: int, clean: Callable[[str], str] | None = None):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of data workers
        if backend.truncation or backend.padding:
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        self.backend, self.length, self.pad, self.clean = backend, length, pad, clean
        self.before, self.after = specials(self.backend)  # ids around every text
        self.room = length - len(self.before) - len(self.after)
        if self.room < 1:
            raise UserError(f"max_length {length}: the tokenizer puts {length - self.room} tokens around a text")

    def __call__(self, texts: Sequence[str], long: Long = "cut", weighted: bool = False) -> Windows:
        """long: "window" reads all of a text in as many windows as it needs; else the first window is all there is.
        weighted: the texts may have weights in them (``ldm.conditioners.prompts``)."""
        pieces = [parse(text) if weighted else [(text, 1.0)] for text in texts]
        if self.clean is not None:
            pieces = [[(self.clean(text), weight) for text, weight in parts] for parts in pieces]
        plain = ["".join(text for text, _ in parts) for parts in pieces]
        found = self.backend.encode_batch(plain, add_special_tokens=False)
        rows, unread = [], []
        for text, encoding in zip(plain, found, strict=True):
            windows = split(text, encoding.offsets, self.room) if long == "window" else [slice(0, self.room)]
            rows.append([encoding.ids[window] for window in windows])
            unread.append(_unread(text, encoding.offsets, windows[-1].stop))
        count = max(map(len, rows))
        ids = torch.full((len(rows), count, self.length), self.pad)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            for n, part in enumerate(row):
                whole = [*self.before, *part, *self.after]
                ids[b, n, : len(whole)] = torch.tensor(whole)
                mask[b, n, : len(whole)] = True
        weights = None
        if any(weight != 1 for parts in pieces for _, weight in parts):
            weights = torch.ones(ids.shape)
            for b, (parts, encoding) in enumerate(zip(pieces, found, strict=True)):
                self._set(weights[b], [weight for text, weight in parts for _ in text], encoding.offsets, rows[b])
        return Windows(ids, mask, weights, unread)

    def _set(self, weights: Tensor, characters: Sequence[float], offsets: Sequence[tuple[int, int]], row: list) -> None:
        """weights (N,L) of one text. A token has the weight of its last character: its first one may be the space before it."""
        of_tokens = [characters[min(max(start, stop - 1), len(characters) - 1)] for start, stop in offsets]
        done, first = 0, len(self.before)
        for n, part in enumerate(row):
            weights[n, first : first + len(part)] = torch.tensor(of_tokens[done : done + len(part)])
            done += len(part)

    def real(self, ids: Tensor) -> Tensor:  # (B,L) -> (B,L) True where a token is no padding
        return up_to_end(ids, self.after[0]) if self.after else ids != self.pad


def up_to_end(ids: Tensor, end: int) -> Tensor:  # (B,L) -> (B,L) True up to the first ``end``; all where there is none
    ends = (ids == end).long()
    return ends.cumsum(dim=1) - ends == 0


def split(text: str, offsets: Sequence[tuple[int, int]], room: int) -> list[slice]:
    """Tokens in parts of at most ``room``, cut between words; inside a word only if it is longer than that."""
    parts, start = [], 0
    while len(offsets) - start > room:
        end = next((i for i in range(start + room, start, -1) if _begins_word(text, offsets, i)), start + room)
        parts.append(slice(start, end))
        start = end
    return [*parts, slice(start, len(offsets))]


def _begins_word(text: str, offsets: Sequence[tuple[int, int]], i: int) -> bool:
    """Whether there is space between token i and the one before it, or at the start of token i."""
    return any(character.isspace() for character in text[offsets[i - 1][1] : offsets[i][0] + 1])


def _unread(text: str, offsets: Sequence[tuple[int, int]], read: int) -> str:
    if len(offsets) <= read:
        return ""
    end = max(stop for _, stop in offsets[:read])
    while 0 < end < len(text) and not (text[end - 1].isspace() or text[end].isspace()):
        end -= 1
    return text[end:].strip()


def specials(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """ids that the tokenizer puts before and after a text; where every text is nothing to it, the last one stands after."""
    for probe in PROBES:
        encoding = backend.encode(probe)
        own = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        if own:
            return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
    return encoding.ids[:-1], encoding.ids[-1:]
