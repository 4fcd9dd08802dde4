"""PSNR and SSIM: closed forms and torchmetrics' own numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.metrics import pictures
from ldm.metrics.pictures import mse, psnr, ssim

REFERENCE = load_file(Path(__file__).parents[1] / "data" / "parity" / "metrics" / "io.safetensors")
A, B = (REFERENCE[f"in.img.{name}"] * 2 - 1 for name in "ab")  # from [0,1]
GREY = tuple(REFERENCE[f"in.img.gray_{name}"] * 2 - 1 for name in "ab")


def test_psnr_against_reference():
    error = mse(A, B)
    assert torch.allclose(psnr(error), REFERENCE["out.psnr.range1.per_image"], rtol=1e-5)
    assert psnr(error.mean()).item() == pytest.approx(REFERENCE["out.psnr.range1.batch"].item(), rel=1e-5)


def test_psnr_of_a_constant_error():
    x = torch.zeros(1, 5, 4, 6)
    assert psnr(mse(x, x + 0.2)).item() == pytest.approx(20.0, rel=1e-5)  # (2 / 0.2)^2
    assert psnr(mse(x, x)).item() == 100.0


@pytest.mark.parametrize("strip", [pictures.STRIP, 3 * 32 * 32, 3 * 32 * 4, 1])
def test_ssim_against_reference_whole_and_in_strips(strip, monkeypatch):
    monkeypatch.setattr(pictures, "STRIP", strip)
    assert torch.allclose(ssim(A, B), REFERENCE["out.ssim.range1.per_image"], atol=1e-5)
    assert torch.allclose(ssim(*GREY), REFERENCE["out.ssim.gray.per_image"], atol=1e-5)


def test_ssim_of_equal_pictures_and_of_small_ones():
    assert ssim(A[:1], A[:1]).tolist() == pytest.approx([1.0])
    five = torch.rand(1, 5, 11, 12, generator=torch.Generator().manual_seed(0))
    assert ssim(five, -five).shape == (1,) and ssim(five, -five).item() < 0.5
    assert ssim(A[..., :10], A[..., :10]) is None
