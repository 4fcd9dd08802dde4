"""ADM's classifier of noisy pictures: the way down of the UNet and its middle, then a pool (2105.05233, section 4.3).

    x (B,C,H,W) --conv--> level 0 --down--> level 1 ... middle --pool--> logits (B,classes)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.common.limits import limits
from ldm.cond import Cond
from ldm.networks.layers import group_norm, timestep_embedding, zero
from ldm.networks.unet import POSITIVE, Plan, perceptron, run

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
HIDDEN = 2048  # of the perceptron over spatial means


class AttentionPool(nn.Module):
    """What the mean of all positions sees of them and of itself (CLIP, 2103.00020, section 2.4). (B,C,H,W) -> (B,C')."""

    def __init__(self, channels: int, out_channels: int, heads: int, positions: int):
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)  # the mean's first
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2) + self.positions.to(x.dtype)
        q, k, v = rearrange(self.qkv(x.transpose(1, 2)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        seen = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.out(rearrange(seen, "b h 1 d -> b (h d)"))


class Classifier(nn.Module):
    """(x, time) -> logits.

    Args:
        in_channels: of x; size: side of x, which the pool "attention" has a table for. Given by the program.
        classes: how many there are.
        pool: of the middle's features, their mean ("adaptive") or CLIP's attention; or, of all blocks, the means over
            space, through a perceptron with ReLU ("spatial") or with a norm and SiLU ("spatial_v2").
        time_channels: width of the sinusoids of time; None: model_channels.
        checkpointing: recompute activations in the backward pass (less memory, +1/3 time).
        The others: see ``ldm.networks.unet.Plan``.
    """

    given = ("in_channels", "size")
    check_params = staticmethod(limits(**POSITIVE, classes=1, time_channels=1))

    def __init__(self, in_channels: int, classes: int, size: int | None = None, pool: Pool = "attention",
                 model_channels: int = 128, channel_mult: list[int | float] = (1, 2, 3, 4),
                 num_res_blocks: int | list[int] = 2, transformer_depth: list[int] = (0, 1, 1, 1),
                 num_heads: int | list[int] = 1, head_channels: int | None = 64, time_channels: int | None = None,
                 scale_shift: bool = True, resblock_updown: bool = True, conv_resample: bool = True,
                 groups: int | None = None, dropout: float = 0.0, checkpointing: bool = False):
        super().__init__()
        self.time_channels = time_channels or model_channels
        self.multiple, self.checkpointing = 2 ** (len(channel_mult) - 1), checkpointing
        self.spatial, self.size = pool.startswith("spatial"), size if pool == "attention" else None
        said = {name: value for name, value in locals().items() if name in Plan.__dataclass_fields__}
        plan = Plan(**said, attention="self", middle_depth=1, embedding=4 * self.time_channels)
        self.time = perceptron(self.time_channels, plan.embedding)
        self.conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.down, left = plan.descent()
        self.middle, width = plan.bottom(), plan.widths[-1]
        self.norm_out = None if self.spatial else group_norm(width, groups)
        if pool == "attention":
            if size is None or size % self.multiple:
                raise ValueError(f"pool 'attention' needs the side of x, a multiple of {self.multiple}, got {size}")
            heads = self.middle[0].attention.heads
            self.head = AttentionPool(width, classes, heads, (size // self.multiple) ** 2)
        elif pool == "adaptive":
            self.head = zero(nn.Linear(width, classes))
        else:
            between = [nn.ReLU()] if pool == "spatial" else [nn.GroupNorm(32, HIDDEN), nn.SiLU()]
            self.head = nn.Sequential(nn.Linear(sum(left) + width, HIDDEN), *between, nn.Linear(HIDDEN, classes))
        self.pool, self.classes = pool, classes

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B,C,H,W), time (B,) in 0..1000 -> logits (B,classes).

        Raises:
            ValueError: where the sides of x are not those that it was made for.
        """
        sides = tuple(x.shape[2:])
        if any(side % self.multiple for side in sides) or (self.size and sides != (self.size, self.size)):
            wanted = f"{self.size}x{self.size}" if self.size else f"multiples of {self.multiple}"
            raise ValueError(f"the classifier takes sides of {wanted}, got {sides[0]}x{sides[1]}")
        embedding, none = self.time(timestep_embedding(time, self.time_channels).to(x.dtype)), Cond()
        h = self.conv_in(x)
        means = [h.mean(dim=(2, 3))]  # ADM counts the middle as one block
        for stages in (*([stage] for stage in self.down), self.middle):
            for stage in stages:
                h = run(stage, h, embedding, none, self.checkpointing)
            means += [h.mean(dim=(2, 3))] if self.spatial else []
        if self.spatial:
            return self.head(torch.cat(means, dim=1))
        h = F.silu(self.norm_out(h))
        return self.head(h if self.pool == "attention" else h.mean(dim=(2, 3)))


def log_p(classifier: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t (B,C,h,w), t (B,)) -> log p(y | x_t), (B,): what ``ldm.guidance.classifier`` takes.

    Args:
        classifier: (x_t, t) -> logits (B,classes), for t of the process that is sampled.
        y: (B,) int, the classes.
    """
    return lambda x, t: -F.cross_entropy(classifier(x, t).float(), y.to(x.device), reduction="none")
