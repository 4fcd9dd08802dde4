"""What a picture shows as a condition: CLIP's embedding of it, given or computed by a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.common.build import Block
from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.base import Conditioner, Draw, check_dropout, like, tensor
from ldm.conditioners.noise import Augmentation
from ldm.conditioners.vision import FrozenVision
from ldm.conditioners.wants import Want
from ldm.networks.layers import timestep_embedding
from ldm.process import Process


class ImageEmbedding(Conditioner):
    """A picture's embedding -> a vector (unCLIP, 2204.06125; Stable unCLIP), or tokens (IP-Adapter, 2308.06721).

    The batch has "image_embedding" (B,D), or pictures (B,3,H,W) in [-1,1] which the encoder reads.

    Args:
        encoder: a folder or a model hub id of CLIP's vision tower, or "random", a small one that knows nothing and needs no
            file, for trying things out; None: embeddings are given.
        embedding_width: D, where there is no encoder.
        to: "vector", "tokens" made of the embedding, or "patches": the encoder's last hidden states as tokens.
        width: of the tokens, by a trained projection; None: as they are. count: tokens that one embedding becomes.
        noise: process of the noise augmentation of the vector, such as DDPM(cosine); None: none. The vector is then
            [D numbers, sinusoids of the level]: with mean and std of the embeddings,
            mean + std (alpha (e - mean) / std + sigma eps). level_width: of the sinusoids; None: D.
        max_noise_level: training draws levels below it. noise_level: where a batch does not say another.
        dropout: share of samples that training gives zeros, which are the null.
        key: of the pictures.

    The encoder is no submodule: it is absent from parameters() and state_dict(), and read when a picture comes.
    """

    def __init__(self, encoder: str | None = None, embedding_width: int | None = None,
                 to: Literal["vector", "tokens", "patches"] = "vector", width: int | None = None, count: int = 1,
                 noise: Process | Block | None = None, max_noise_level: int | None = None, noise_level: int = 0,
                 level_width: int | None = None, dropout: float = 0.0, key: str = "image"):
        super().__init__()
        self.encoder = None if encoder is None else FrozenVision(encoder)
        if (encoder is None) == (embedding_width is None) or (to == "patches" and encoder is None):
            raise UserError(f"ImageEmbedding: encoder {encoder}, embedding_width {embedding_width}, to {to}: give an encoder, "
                            "or the width of embeddings that are given, which are no patches")
        if ((to == "vector" and (width or count != 1)) or (to != "vector" and noise) or (to == "patches" and count != 1)
                or (level_width and noise is None)):  # fmt: skip
            raise UserError(f"ImageEmbedding: to {to!r} does not go with width {width}, count {count}, noise {noise}, "
                            f"level_width {level_width}; width is of tokens, count of tokens of one embedding, noise of a "
                            "vector, level_width of noise")
        self.embedding_width = embedding_width or self.encoder.facts.width
        self.to_what, self.count, self.key, self.dropout = to, count, key, check_dropout(dropout)
        self.noise = None if noise is None else Augmentation(noise, max_noise_level, noise_level)
        self.wants = self._wants(to, encoder is not None)
        self.project = nn.Identity()
        if to == "vector":
            self.level_width = 0 if noise is None else level_width or self.embedding_width
            self.vector_width = self.embedding_width + self.level_width
        else:
            given = self.encoder.facts.hidden if to == "patches" else self.embedding_width
            self.width = width or given
            self.length = self.encoder.facts.length if to == "patches" else count
            if width is not None or count > 1:
                self.project = nn.Sequential(nn.Linear(given, count * self.width), nn.Unflatten(-1, (count, self.width)),
                                             nn.LayerNorm(self.width))  # fmt: skip
        if noise is not None:
            self.register_buffer("mean", torch.zeros(self.embedding_width))
            self.register_buffer("std", torch.ones(self.embedding_width))

    def _wants(self, to: str, reads_pictures: bool) -> tuple[Want, ...]:
        wanted = Want(self.key, "picture", "a picture", 3, instead=None if to == "patches" else "image_embedding")
        embedding = Want("image_embedding", "array", f"{self.embedding_width} numbers", self.embedding_width, needed=False)
        either = (wanted,) if to == "patches" else (wanted, embedding) if reads_pictures else (replace(embedding, needed=True),)
        return either if self.noise is None else (*either, self.noise.wants)

    def prepare(self) -> None:
        """Find the encoder's files, download them if they are missing; UserError, naming them, when that fails."""
        if self.encoder is not None:
            self.encoder.prepare()

    @property
    def encoder_hash(self) -> str | None:
        return None if self.encoder is None else self.encoder.hash

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Of the embeddings (D,), for the noise; saved with the model."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def with_dropout(self, batch: Mapping[str, Any], draw: Draw) -> Cond:
        return super().with_dropout(batch if self.noise is None else self.noise.drawn(batch, draw), draw)

    def forward(self, batch: Mapping[str, Any]) -> Cond:
        if self.to_what == "patches":
            return Cond(self.tokens(self.encoder(tensor(batch, self.key, self, (3, None, None)))[1]))
        if "image_embedding" in batch or self.encoder is None:
            e = tensor(batch, "image_embedding", self, (self.embedding_width,)).float()
        else:
            e = self.encoder(tensor(batch, self.key, self, (3, None, None)))[0]
        if self.to_what == "tokens":
            return Cond(self.tokens(e[:, None]))
        if self.noise is None:
            return Cond(vector=e)
        noisy, level = self.noise((e - self.mean) / self.std, batch, "image_embedding/noise")
        return Cond(vector=torch.cat([self.mean + self.std * noisy, timestep_embedding(level, self.level_width)], dim=1))

    def null(self, n: int) -> Cond:
        if self.to_what == "vector":
            return Cond(vector=torch.zeros(n, self.vector_width))
        given = self.encoder.facts.hidden if self.to_what == "patches" else self.embedding_width
        return Cond(self.tokens(torch.zeros(n, 1, given)))

    def tokens(self, e: Tensor) -> Tensor:  # (B,N,D) -> (B, N * count, width)
        e = self.project(like(e, self.project))
        return e.flatten(1, 2) if e.ndim == 4 else e
