"""Sizes that are no multiples, and sizes larger than trained."""

import pytest
import torch

from ldm import tasks
from ldm.common.files import UserError


def test_the_next_larger_size_and_its_middle(bundle):
    assert tasks.unit(bundle) == 8  # autoencoder 4, network 2
    frame = tasks.framed(bundle, 30, 41, "pad")
    assert (frame.size, frame.drawn, frame.corner) == ((30, 41), (32, 48), (1, 3))
    drawn = bundle.generate(["red"], size=frame.drawn, steps=2)
    assert torch.equal(frame.crop(drawn), drawn[..., 1:31, 3:44])
    whole = tasks.framed(bundle, 32, 48)
    assert whole.drawn == whole.size and whole.corner == (0, 0)
    with pytest.raises(UserError, match="height 30 x width 41: .* nearest: 24 x 40 or 32 x 48"):
        tasks.framed(bundle, 30, 41)


def test_pictures_are_put_in_it_with_their_edges_repeated(bundle):
    frame = tasks.framed(bundle, 30, 41, "pad")
    x = torch.rand(2, 3, 30, 41)
    framed = frame.pad(x)
    assert framed.shape == (2, 3, 32, 48) and torch.equal(frame.crop(framed), x)
    assert torch.equal(framed[:, :, 0, 3:44], x[:, :, 0]) and torch.equal(framed[:, :, 1:31, 47], x[..., 40])
    numbers = torch.arange(30 * 41).view(1, 30, 41)
    assert frame.pad(numbers).dtype == torch.int64


def test_small_pictures_are_put_where_their_pixels_belong(bundle):
    frame = tasks.framed(bundle, 44, 36, "pad", step=4)
    assert (frame.drawn, frame.corner) == ((48, 40), (0, 0))
    small = torch.rand(1, 3, 11, 9)
    assert frame.pad(small, per=4).shape == (1, 3, 12, 10) and torch.equal(frame.pad(small, per=4)[..., :11, :9], small)


def test_larger_than_trained(bundle):
    """Convolutional sampling: the network runs on any size that it can divide; by windows it sees no more than trained."""
    found = bundle.generate(["red"], size=(64, 96), steps=2)
    windows = bundle.generate(["red"], size=(64, 96), steps=2, window=32)
    assert found.shape == windows.shape == (1, 3, 64, 96) and windows.isfinite().all() and not torch.equal(found, windows)
    assert torch.equal(bundle.generate(["red"], size=(32, 32), steps=2, window=32), bundle.generate(["red"], size=(32, 32), steps=2))
