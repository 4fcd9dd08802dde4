"""Overlapping tiles of any autoencoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.base import Autoencoder
from autoencoder.tiled import blended


class Near(Autoencoder):
    """Factor 4; each latent depends on the cells beside its own and each pixel likewise, nothing on what is farther."""

    def __init__(self, noisy=True):
        super().__init__(3, 2, 4)
        self.noisy, self.seen = noisy, []
        self.inward, self.outward = nn.Conv2d(3, 4, 12, stride=4, padding=4), nn.Conv2d(2, 3, 3, padding=1)

    def moments(self, x):
        self.seen.append(tuple(x.shape[2:]))
        mean, logvar = self.inward(x).chunk(2, dim=1)
        return mean, logvar if self.noisy else None

    def decode_raw(self, z):
        self.seen.append(tuple(z.shape[2:]))
        return F.interpolate(self.outward(z), scale_factor=4.0)


@pytest.mark.parametrize("height, width", [(64, 64), (136, 92), (64, 300), (8, 8)])
@pytest.mark.parametrize("noisy", [True, False])
def test_what_only_sees_its_neighbourhood_is_exact(height, width, noisy):
    torch.manual_seed(0)
    model = Near(noisy)
    x, z = torch.randn(2, 3, height, width), torch.randn(2, 2, height // 4, width // 4)
    with torch.no_grad():
        for tiled, now in zip(model.posterior(x, tile=64), model.posterior(x), strict=True):
            assert tiled is now is None or torch.allclose(tiled, now, atol=1e-6)
        assert torch.allclose(model.encode(x, torch.Generator().manual_seed(1), tile=64),
                              model.encode(x, torch.Generator().manual_seed(1)), atol=1e-6)  # fmt: skip
        assert torch.allclose(model.decode(z, tile=64), model.decode(z), atol=1e-6)


def test_no_tile_is_larger_than_asked():
    model = Near()
    model.encode(torch.zeros(1, 3, 200, 64), tile=67)
    assert len(model.seen) > 3 and set(model.seen) == {(64, 64)}
    model.seen.clear()
    model.decode(torch.zeros(1, 2, 50, 16), tile=67)
    assert len(model.seen) > 3 and set(model.seen) == {(16, 16)}


@pytest.mark.parametrize("tile", [2, 3, 8, 9, 40])
def test_where_tiles_agree_so_does_the_blend(tile):
    x = torch.randn(1, 2, 31, 17)
    torch.testing.assert_close(blended(lambda part: part, x, tile), x)


def test_where_tiles_differ_the_blend_goes_over_in_small_steps():
    """Each tile says its number: no step between neighbours is as large as from one tile to the next."""
    numbers = iter(range(100))
    line = blended(lambda part: torch.full_like(part, float(next(numbers))), torch.zeros(1, 1, 4, 80), 32)[0, 0, 0]
    steps = line.diff()
    assert line[0] == 0 and line[-1] == 2 and (steps >= 0).all() and steps.max() < 0.3


def test_a_tile_of_no_size():
    with pytest.raises(ValueError, match="tile: 0; it takes the side of a tile in pixels, from 1"):
        Near().decode(torch.zeros(1, 2, 2, 2), tile=0)
