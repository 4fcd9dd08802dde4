import pytest
import torch

from autoencoder.base import Autoencoder
from autoencoder.statistics import Tally, data_hash, measure
from ldm.common.files import digest


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


class Noisy(Autoencoder):
    """Channel c of the latent: the picture's channel c; its draws have variance 0.25 where c is 0, else 4."""

    def __init__(self):
        super().__init__(2, 2, 1)

    def moments(self, x):
        return x, torch.tensor([0.25, 4.0]).log().view(-1, 1, 1).expand_as(x)


def test_measured_statistics_are_those_of_draws_over_as_many_pictures_as_asked():
    x = torch.randn(40, 2, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 0.3]).view(2, 1, 1) + 1
    model = Noisy()
    found = measure(model, [{"image": part} for part in x.split(16)], images=36, fingerprint="a b")
    seen = x[:36].double()
    std = (seen.var(dim=(0, 2, 3), correction=0) + torch.tensor([0.25, 4.0])).sqrt()
    assert model.spec.count == found["count"] == 36 and model.spec.data_hash == digest("a b")
    assert found["collapsed"] == [1] and found["std"] == pytest.approx(std.tolist())
    assert torch.allclose(model.shift.double(), seen.mean(dim=(0, 2, 3))) and torch.allclose(model.scale.double(), std)


def test_measuring_again_forgets_what_was_known():
    model, x = Noisy(), torch.randn(8, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    model.set_statistics(torch.tensor([5.0, 5.0]), torch.tensor([9.0, 9.0]), 3, "f" * 16)
    measure(model, [{"image": x}])
    first = model.spec.scale.clone()
    measure(model, [{"image": x}])
    assert torch.equal(model.spec.scale, first) and (model.spec.count, model.spec.data_hash) == (8, None)


def test_a_fingerprint_that_is_a_hash_is_kept():
    assert data_hash("0123456789abcdef") == "0123456789abcdef"
    assert data_hash("0123456789ABCDEF") != "0123456789ABCDEF" and len(data_hash("folder of pictures")) == 16
