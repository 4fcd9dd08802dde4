"""Encoder and decoder strip by strip: what they give at once, up to rounding, in the memory of their largest feature map.

Convolutions see a row or two beyond the strip that they fill, attention sees the whole (small) map, and a norm's moments
are those of the whole map. Between them a map is kept as a list of strips, each of which is dropped when its last reader
has passed; whatever is read only once is never kept, but computed row by row as its reader asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.nets import Decoder, Downsample, Encoder, ResBlock, Upsample

ROWS, AREA = 4, 64**2  # rows and positions that a strip has at least: its neighbours' rows and its start cost time
BEHIND = 2  # rows above the last ones asked for that a block may still read: two 3x3 convolutions'


def area(tile: int) -> int:
    """Positions of a strip for whom tiles of that many pixels a side would do: with all that is at work beside it, a strip
    then takes no more than such a tile."""
    return max(AREA, tile**2 // 16)


class Map:
    """A feature map (1,C,height,width) that is computed where it is read, by ``make(a, b)`` -> (1,C,b-a,width).

    area: positions that a strip of it has, in all maps alike.
    """

    def __init__(self, height: int, width: int, area: int, make: Callable[[int, int], Tensor] | None = None):
        self.height, self.width, self.area, self.make = height, width, area, make

    def then(self, make: Callable[[int, int], Tensor], height: int | None = None, width: int | None = None) -> Map:
        """A map made of this one, of its size if no other is said."""
        return Map(height or self.height, width or self.width, self.area, make)

    def rows(self, a: int, b: int) -> Tensor:
        return self.make(a, b)

    @property
    def step(self) -> int:
        """Rows of a strip."""
        return max(ROWS, self.area // self.width)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and end row of each strip."""
        return ((a, min(a + self.step, self.height)) for a in range(0, self.height, self.step))

    def last_reading(self) -> Map:
        """Whoever reads from now on is the last and goes down: what he has passed need not be kept."""
        return self

    def padded(self, a: int, b: int) -> Tensor:
        """Rows a..b, zeros outside of the map, as convolutions see it."""
        rows = self.rows(max(a, 0), min(b, self.height))
        outside = (0, 0, max(-a, 0), max(b - self.height, 0))
        return F.pad(rows, outside) if any(outside) else rows


class Stored(Map):
    """A map in memory."""

    def __init__(self, like: Map, strips: dict[int, Tensor]):  # first row -> (1,C,n,width)
        super().__init__(like.height, like.width, like.area)
        self.strips, self.last = strips, False

    def last_reading(self) -> Map:
        self.last = True
        return self

    def rows(self, a: int, b: int) -> Tensor:
        if self.last:
            self.strips = {top: strip for top, strip in self.strips.items() if top + strip.shape[2] > a - BEHIND}
        found = [strip[:, :, max(a - top, 0) : b - top] for top, strip in self.strips.items()
                 if top < b and a < top + strip.shape[2]]
        assert sum(part.shape[2] for part in found) == b - a, "rows that were dropped are asked for again"
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def whole(x: Tensor, area: int) -> Stored:  # (1,C,H,W)
    # channels last, all that follows from it too: strips are then whole in memory, and convolutions are faster
    return Stored(Map(*x.shape[2:], area), {0: x.contiguous(memory_format=torch.channels_last)})


def stored(*maps: Map) -> list[Stored]:
    """Maps of one height in memory, filled side by side, so that what they all read can be dropped."""
    strips = [{} for _ in maps]
    for a, b in maps[0].spans():
        for mine, x in zip(strips, maps, strict=True):
            mine[a] = x.rows(a, b)
    return [Stored(x, mine) for x, mine in zip(maps, strips, strict=True)]


def kept(x: Map) -> Stored:
    return x if isinstance(x, Stored) else stored(x)[0]


def convolved(conv: nn.Conv2d, x: Map) -> Map:
    (kernel, _), (stride, _), (padding, across) = conv.kernel_size, conv.stride, conv.padding

    def rows(a: int, b: int) -> Tensor:
        window = x.padded(a * stride - padding, (b - 1) * stride - padding + kernel)
        return F.conv2d(window, conv.weight, conv.bias, conv.stride, (0, across))

    return x.then(rows, (x.height + 2 * padding - kernel) // stride + 1, (x.width + 2 * across - kernel) // stride + 1)


def activated(norm: nn.GroupNorm, x: Map) -> Map:
    """silu(norm(x)) by the moments of the whole map, which are put together from the strips'."""
    groups, parts = norm.num_groups, []
    for a, b in x.spans():
        strip = x.rows(a, b).float()
        _, mean, rstd = torch.native_group_norm(strip, None, None, 1, strip.shape[1], strip[0, 0].numel(), groups, norm.eps)
        parts.append(torch.stack([torch.full_like(mean, b - a), mean, rstd.pow(-2) - norm.eps]).double())
    count, means, variances = torch.stack(parts, dim=1)  # (strips,1,groups) each
    mean = (count * means).sum(0) / count.sum(0)
    variance = (count * (variances + (means - mean).square())).sum(0) / count.sum(0)
    each = norm.num_channels // groups
    moments = [value.float().flatten().repeat_interleave(each) for value in (mean, variance)]
    weight, bias = norm.weight.float(), norm.bias.float()

    def rows(a: int, b: int) -> Tensor:
        strip = x.rows(a, b)
        normed = F.batch_norm(strip.float(), *moments, weight, bias, eps=norm.eps)  # each channel by its group's moments
        return F.silu(normed, inplace=True).to(strip.dtype)

    return x.then(rows)


@singledispatch
def through(layer: nn.Module, x: Map, again: bool = False) -> Map:
    """The map that a layer makes of another; a kind without a way of its own sees the whole map.

    again: a residual block computes its first convolution twice rather than keep the result beside its input.
    """
    return whole(layer(kept(x).rows(0, x.height)), x.area)


@through.register
def _(layers: nn.Sequential, x: Map, again: bool = False) -> Map:
    for layer in layers:
        x = through(layer, x, again)
    return x


@through.register
def _(block: ResBlock, x: Map, again: bool = False) -> Map:
    x = kept(x)
    h, shortcut = convolved(block.conv1, activated(block.norm1, x)), x
    if not isinstance(block.shortcut, nn.Identity):
        shortcut = x.then(lambda a, b: block.shortcut(x.rows(a, b)))
    if not again and shortcut is x:
        h = kept(h)
    elif not again:
        x.last_reading()
        h, shortcut = stored(h, shortcut)
    branch = convolved(block.conv2, activated(block.norm2, h))
    for source in (x, h, shortcut):
        source.last_reading()
    return branch.then(lambda a, b: branch.rows(a, b) + shortcut.rows(a, b))


@through.register
def _(layer: Downsample, x: Map, again: bool = False) -> Map:
    def part(a: int, b: int) -> Tensor:
        if layer.conv is None:
            return layer(x.rows(2 * a, 2 * b))
        return layer.conv(F.pad(x.padded(2 * a, 2 * b + 1), (0, 1)))

    def rows(a: int, b: int) -> Tensor:  # in parts, since what is read has four times the positions
        step = x.step // 2
        return torch.cat([part(c, min(c + step, b)) for c in range(a, b, step)], dim=2)

    return x.then(rows, x.height // 2, x.width // 2)


@through.register
def _(layer: Upsample, x: Map, again: bool = False) -> Map:
    weight = None if layer.conv is None else layer.weight()

    def rows(a: int, b: int) -> Tensor:
        top, end = a // 2, -(-b // 2)
        if weight is None:
            out = layer(x.rows(top, end))
        else:  # with a row more on each side, of whose output (6 rows more) the outer 3 are cut off
            out = F.conv_transpose2d(x.padded(top - 1, end + 1), weight, layer.conv.bias, stride=2, padding=(3, 1))
        return out[:, :, a - 2 * top : b - 2 * top]

    return x.then(rows, 2 * x.height, 2 * x.width)


@torch.no_grad()
def encode(encoder: Encoder, x: Tensor, area: int) -> Tensor:
    """encoder(x), (B,C,H,W) -> (B,F,h,w), in strips of ``area`` positions. No gradients pass.

    The maps of the first level are the largest and alike, so its blocks would keep two of them: these compute again.
    """
    features = []
    for picture in x.split(1):
        h = convolved(encoder.conv_in, whole(picture, area))
        for level, layers in enumerate(encoder.levels):
            h = through(layers, h, again=level == 0)
        h = kept(through(encoder.middle, h))
        head = convolved(encoder.conv_out, activated(encoder.norm_out, h))
        features.append(torch.cat([head.rows(a, b) for a, b in head.spans()], dim=2))
    return torch.cat(features)


@torch.no_grad()
def decode(decoder: Decoder, z: Tensor, area: int) -> Tensor:
    """decoder(z), (B,F,h,w) -> (B,C,H,W), in strips of ``area`` positions. No gradients pass."""
    pictures = None
    for i, one in enumerate(z.split(1)):
        h = convolved(decoder.conv_in, whole(one, area))
        for layers in (decoder.middle, *decoder.levels):
            h = through(layers, h)
        out = h
        if decoder.head:
            h = kept(h)
            out = convolved(decoder.conv_out, activated(decoder.norm_out, h))
            h.last_reading()
        for a, b in out.spans():
            strip = decoder.finished(out.rows(a, b)) if decoder.head else out.rows(a, b)
            patch = strip.shape[3] // out.width
            if pictures is None:
                pictures = strip.new_empty(len(z), strip.shape[1], patch * out.height, strip.shape[3])
            pictures[i, :, patch * a : patch * b] = strip[0]
    return pictures
