import logging

import pytest
import torch

from autoencoder.base import LatentSpec
from ldm.common.files import UserError
from ldm.latents import HIGH, LOW, check_scale, spread

SPEC = LatentSpec(3, 4, torch.zeros(3), torch.ones(3), 500, "0123456789abcdef")


def latents(*stds, shift=0.0, n=64):
    z = torch.randn(n, len(stds), 4, 5, generator=torch.Generator().manual_seed(0))
    return shift + z * torch.tensor(stds).view(-1, 1, 1)


def test_spread_is_torchs_whatever_the_batches():
    z = latents(0.5, 2.0, 1.0, shift=torch.tensor([3.0, 0.0, -1.0]).view(-1, 1, 1))
    found = spread([z[:5], z[5:6], z[6:]])
    assert found.pictures == 64 and found.mean == pytest.approx(z.mean().item(), abs=1e-6)
    assert found.std == pytest.approx(z.std(correction=0).item(), rel=1e-6)  # the channels' means are part of it
    assert found.channels == pytest.approx(z.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-6)


@pytest.mark.parametrize("std", [LOW - 0.02, HIGH + 0.1, 5.0, 0.0, float("nan")])
def test_latents_of_another_scale_are_refused_unless_forced(std, caplog):
    found = spread([latents(std, std, std)])
    with pytest.raises(UserError, match=f"first 64 images have standard deviation {found.std:.3g} .* expects 1, and 0.5 to 2"):
        check_scale(found, SPEC)
    assert not caplog.records
    check_scale(found, SPEC, force=True)
    assert len(caplog.records) == 1 and f"{found.std:.3g}" in caplog.text


def test_the_error_says_where_the_statistics_come_from():
    found = spread([latents(5.0, 5.0, 5.0)])
    by_hand = LatentSpec(3, 4, torch.zeros(3), torch.ones(3))
    for spec, data, told in ((SPEC, "f" * 16, "over 500 images of other data .hash 0123456789abcdef, this is f{16}"),
                             (SPEC, SPEC.data_hash, "over 500 images. Ways out"), (by_hand, None, "set by hand")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            check_scale(found, spec, data)


def test_one_small_channel_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_scale(spread([latents(1.0, 0.17, 1.0)]), SPEC)
        assert "1 (0.17)" in caplog.text and "0 (" not in caplog.text
        caplog.clear()
        check_scale(spread([latents(1.0, 0.6, 1.9)]), SPEC)
    assert not caplog.records
