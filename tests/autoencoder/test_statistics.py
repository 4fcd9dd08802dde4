import pytest
import torch

from autoencoder.statistics import Tally


def test_moments_are_those_of_all_draws_whatever_the_batches():
    mean = torch.randn(7, 2, 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.05]).view(2, 1, 1) + 5
    logvar = torch.full_like(mean, 0.25).log()
    tally = Tally()
    for part in (slice(0, 3), slice(3, 7)):
        tally.latents(mean[part], logvar[part])
    center, spread, noise = tally.moments()
    assert tally.count == 7
    assert torch.allclose(center.float(), mean.mean(dim=(0, 2, 3)))
    assert torch.allclose(spread.float(), mean.var(dim=(0, 2, 3), correction=0), rtol=1e-4)
    assert noise.tolist() == pytest.approx([0.25, 0.25])
    assert tally.summary()["active_units"] == 1.0  # the second channel hardly moves


def test_terms_are_means_over_pictures_not_over_batches():
    tally = Tally()
    for pictures, value in ((1, 10.0), (3, 2.0)):
        tally.latents(torch.zeros(pictures, 1, 1, 1), None)
        tally.terms({"loss": torch.tensor(value)}, pictures)
    summary = tally.summary()
    assert summary["loss"] == 4.0 and "active_units" not in summary


def test_codes_become_usage():
    tally = Tally()
    tally.latents(torch.zeros(1, 1, 1, 1), None)
    tally.codes(torch.tensor([[[0, 0], [3, 3]]]), size=4)
    assert tally.summary()["codebook_used"] == 0.5 and tally.summary()["codebook_perplexity"] == pytest.approx(2.0)
