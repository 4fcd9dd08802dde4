"""Encoder and decoder strip by strip: the same as at once, in less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F

from autoencoder import strips
from autoencoder.bottlenecks import KL, VQ
from autoencoder.model import convolutional
from autoencoder.nets import Upsample
from benchmarks.memory import LiveBytes

KINDS = {
    "f4": dict(width=16, mult=[1, 2, 2], blocks=1),
    "attention at other levels": dict(width=16, mult=[1, 2], blocks=2, attention_levels=[0, 1]),
    "strided stem": dict(width=16, mult=[1, 2], blocks=1, patch=2, attention=False),
    "one level": dict(width=16, mult=[1], blocks=1, patch=4, attention=False),
    "narrower below": dict(width=16, mult=[2, 1], blocks=1, attention_kind="linear"),
    "means for halving": dict(width=16, mult=[1, 1, 2], blocks=0, conv_resample=False, groups=4, tanh=True),
    "features": dict(width=16, mult=[1, 2], blocks=1, head=False),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height, width", [(48, 20), (36, 64)])
def test_the_same_as_at_once(kind, height, width):
    model = convolutional(KL(4), **KINDS[kind]).eval()
    exact = copy.deepcopy(model).double()
    x, z = torch.randn(2, 3, height, width), torch.randn(2, 4, height // model.factor, width // model.factor)
    with torch.no_grad():
        for area in (1, 150, 10_000):
            for done, truth in ((strips.encode(model.encoder, x, area), exact.encoder(x.double())),
                                (strips.decode(model.decoder, z, area), exact.decoder(z.double()))):
                torch.testing.assert_close(done.double(), truth, rtol=0, atol=5e-5 * truth.abs().max().item())


@pytest.mark.parametrize("bottleneck", [KL(4), VQ(4, codes=16)])
def test_behind_the_contract(bottleneck):
    model = convolutional(bottleneck, width=16, mult=[1, 2], blocks=1).eval()
    model.set_statistics(torch.full((4,), 0.5), torch.full((4,), 2.0), 1)
    model.to(memory_format=torch.channels_last)
    x, z = torch.rand(1, 3, 160, 96) * 2 - 1, torch.randn(1, 4, 80, 48)  # four strips of 64^2 positions at the top
    with torch.no_grad():
        for tiled, now in zip(model.posterior(x, tile=64), model.posterior(x), strict=True):
            assert tiled is now is None or (torch.allclose(tiled, now, atol=1e-4) and now.is_contiguous())
        assert (model.decode(z, tile=64) - model.decode(z)).abs().mean() < 1e-5 < 1 / 255


def test_norms_see_the_whole_map():
    """A picture whose halves differ in spread: tiles normalised for themselves would come out alike."""
    norm = torch.nn.GroupNorm(4, 8)
    x = torch.randn(1, 8, 24, 6) * torch.linspace(0.1, 9, 24)[:, None] + 50
    map_ = strips.activated(norm, strips.whole(x, 1))
    torch.testing.assert_close(map_.rows(5, 17), F.silu(norm(x))[:, :, 5:17], rtol=0, atol=1e-4)


def test_a_reader_who_is_the_last_leaves_nothing_behind():
    x = torch.randn(1, 2, 40, 5)
    [held] = strips.stored(strips.whole(x, 20))
    assert len(held.strips) == 10 and torch.equal(held.rows(0, 40), x)
    held.last_reading()
    assert torch.equal(held.rows(21, 30), x[:, :, 21:30]) and min(held.strips) == 16  # two rows above 21 may be wanted
    with pytest.raises(AssertionError, match="dropped"):
        held.rows(3, 5)


@pytest.mark.parametrize("name, share", [("encode", 0.4), ("decode", 0.5)])
def test_memory_at_512_pixels(name, share):
    """KL f8 in full size, counted without computing. Attention is left out: on a real device it needs six small maps, on
    this one all pairs of positions."""
    with torch.device("meta"):
        model = convolutional(KL(4), attention=False).eval()
        given = torch.empty(1, 3, 512, 512) if name == "encode" else torch.empty(1, 4, 64, 64)
    largest = 4 * 512 * 512 * (128 if name == "encode" else 256)  # bytes of the largest map
    with torch.no_grad():
        with LiveBytes() as at_once:
            getattr(model, name)(given)
        with LiveBytes() as tiled:
            getattr(model, name)(given, tile=256)
    assert at_once.peak > 2 * largest
    assert largest < tiled.peak < min(1.25 * largest, share * at_once.peak)


def test_memory_is_counted_until_it_is_freed():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)[2:]  # no memory of its own
        del x
        y = y + 1
        del y
        z = torch.zeros(100)
        z += 1
    assert live.peak == 4000 + 3200


@pytest.mark.parametrize("height, width", [(1, 1), (5, 3)])
def test_upsampling_is_nearest_neighbour_and_convolution(height, width):
    layer = Upsample(6).double()
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    expected = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    inputs, weight = (x, layer.conv.weight, layer.conv.bias), torch.randn_like(expected)
    torch.testing.assert_close(layer(x), expected)
    for ours, theirs in zip(torch.autograd.grad(layer(x), inputs, weight), torch.autograd.grad(expected, inputs, weight),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs)
