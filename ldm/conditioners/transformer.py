"""The transformer that reads token ids: CLIP's (2103.00020) and LDM's BERT-like one (2112.10752) are two settings of it.

    x_0 = token[ids] + position          x_i = h_i + mlp(norm(h_i)),  h_i = x_{i-1} + attention(norm(x_{i-1}))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.common.build import near
from ldm.common.files import UserError


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): what OpenAI's CLIP was trained with in place of x Phi(x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Block(nn.Module):
    """Pre-norm attention and MLP (2002.04745), each with a residual."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp: int, bias: bool, activation: str):
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim, bias=bias) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width)
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:  # (B,L,D), (B,L) True where attended
        h = self.norm1(x)
        q, k, v = (rearrange(layer(h), "b l (h d) -> b h l d", h=self.heads) for layer in (self.q, self.k, self.v))
        seen = None if mask is None else mask[:, None, None, :]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)
        x = x + self.out(rearrange(h, "b h l d -> b l (h d)"))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class TextTransformer(nn.Module):
    """Token ids -> hidden states.

    Args:
        length: positions that it knows. mlp: width inside the MLP.
        head_dim: width of one head; inside the attention there are heads * head_dim channels, whatever ``width`` is.
        bias: of q, k, v; the other layers have one always.
        activation: "gelu" or "quick_gelu".
        causal: a token sees those before it, and itself; no mask is taken then, as padding comes last.
    """

    def __init__(self, vocab_size: int, length: int, width: int, layers: int, heads: int, head_dim: int, mlp: int,
                 bias: bool, activation: str, causal: bool):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"activation {activation!r}: there are {', '.join(ACTIVATIONS)}{near(activation, ACTIVATIONS)}")
        self.length, self.causal = length, causal
        self.token = nn.Embedding.from_pretrained(torch.empty(vocab_size, width), freeze=False)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, head_dim, mlp, bias, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        if not self.position.is_meta:  # there, drawing nothing would load a second's worth of torch
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As CLIP begins (2103.00020, section 2.4): residual branches get smaller the more of them there are."""
        width, layers = self.norm.normalized_shape[0], max(1, len(self.blocks))
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        for block in self.blocks:
            for layer in (block.q, block.k, block.v):
                nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.normal_(block.up.weight, std=(2 * width) ** -0.5)
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, ids: Tensor, layers: int | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """ids (B,L), mask (B,L) True where attended -> the embeddings and the outputs of the first ``layers`` blocks (all if
        None), each (B,L,D) and without the final norm."""
        states = [self.token(ids) + self.position[: ids.shape[1]]]
        for block in self.blocks[:layers]:
            states.append(block(states[-1], self.causal, None if self.causal else mask))
        return states
