"""Fréchet distance: closed forms, invariances, and the numbers of four other implementations."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.common.files import UserError
from ldm.metrics.frechet import Gaussian, distance, frechet_distance, root

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "metrics" / "io.safetensors")


def gaussian(samples, *sizes) -> Gaussian:
    found = Gaussian()
    for part in samples.split(list(sizes) or len(samples)):
        found.add(part)
    return found


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(), (1, 99, 100), (64, 64, 72)])
def test_moments_are_those_of_numpy_whatever_the_batches(sizes):
    found = gaussian(REFERENCE["in.fid.a"], *sizes)
    assert torch.allclose(found.mean, REFERENCE["out.fid.mu_a"], rtol=1e-12, atol=1e-14)
    assert torch.allclose(found.covariance, REFERENCE["out.fid.cov_a"], rtol=1e-12, atol=1e-14)


def test_moments_far_from_zero_keep_their_digits():
    samples = normal(4000, 3)
    far = gaussian((samples + 1e7), 1000, 1000, 2000)
    assert torch.allclose(far.covariance, torch.cov(samples.T), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("other", ["scipy", "cleanfid", "torchmetrics", "torch_fidelity"])
def test_against_other_implementations(other):
    found = distance(gaussian(REFERENCE["in.fid.a"], 50, 150), gaussian(REFERENCE["in.fid.b"]))
    assert found == pytest.approx(REFERENCE[f"out.fid.{other}"].item(), rel=1e-10)
    few = distance(gaussian(REFERENCE["in.fid.low_a"]), gaussian(REFERENCE["in.fid.low_b"]))  # they agree to 4e-8 here
    assert few == pytest.approx(REFERENCE[f"out.fid.low_{other}"].item(), abs=1e-7)


def test_diagonal_gaussians_have_a_closed_form():
    mean, other = normal(2, 5)
    std, spread = normal(2, 5, seed=1).abs()
    found = frechet_distance(mean, torch.diag(std**2), other, torch.diag(spread**2))
    assert found == pytest.approx(((mean - other).square() + (std - spread).square()).sum().item(), rel=1e-12)


def test_a_shift_alone_is_its_square():
    samples, step = normal(50, 6), torch.arange(6.0)
    assert distance(gaussian(samples), gaussian(samples + step)) == pytest.approx(55.0, rel=1e-10)


@pytest.mark.parametrize("count", [4, 300])  # fewer samples than features as well
def test_equal_sets_have_none_in_any_order(count):
    samples = 100 * normal(count, 40)
    assert distance(gaussian(samples), gaussian(samples.flip(0), 1, count - 1)) < 1e-8


def test_symmetric_and_blind_to_rotation():
    a, b = normal(60, 7), normal(80, 7, seed=1) * 2 + 1
    turn, _ = torch.linalg.qr(normal(7, 7, seed=2))
    found = distance(gaussian(a), gaussian(b))
    assert distance(gaussian(b), gaussian(a)) == pytest.approx(found, rel=1e-10)
    assert distance(gaussian(a @ turn), gaussian(b @ turn)) == pytest.approx(found, rel=1e-10)
    assert distance(gaussian(3 * a), gaussian(3 * b)) == pytest.approx(9 * found, rel=1e-10)


def test_root_squares_to_the_matrix():
    factor = normal(5, 3)
    covariance = factor @ factor.T  # of rank 3
    assert torch.allclose(root(covariance) @ root(covariance), covariance, atol=1e-12)


@pytest.mark.parametrize(("samples", "said"), [
    (torch.zeros(3, 5), r"expected features \(pictures, 4\), got \(3, 5\)"),
    (torch.zeros(3, 4, 1), r"got \(3, 4, 1\)"),
    (torch.full((3, 4), float("nan")), "inf or nan"),
])  # fmt: skip
def test_what_is_no_table_is_refused(samples, said):
    found = gaussian(torch.zeros(2, 4))
    with pytest.raises(UserError, match=said):
        found.add(samples)


def test_one_picture_has_no_covariance():
    with pytest.raises(UserError, match="two or more"):
        _ = gaussian(torch.zeros(1, 4)).covariance
