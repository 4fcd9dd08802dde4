"""Reconstructions of known quality: a perfect autoencoder, one with a known error, one with a known rate."""

import math

import pytest
import torch
from torch import nn

from autoencoder.base import Autoencoder, Identity
from autoencoder.bottlenecks import KL, VQ, Plain
from autoencoder.lattices import FSQ, LFQ
from autoencoder.model import convolutional
from autoencoder.statistics import Tally
from ldm.common.files import UserError
from ldm.metrics.features import RandomConv
from ldm.metrics.reconstruction import SHOWN, compare, measure


class Off(Identity):
    """Every value comes back 0.2 too large, but the first picture of all comes back whole."""

    whole = True

    def decode_raw(self, z):
        y = z + 0.2
        if self.whole:
            self.whole, y[0] = False, z[0]
        return y


class Noisy(Autoencoder):
    """q(z|x) = N(x / 2, 1 / 4): its KL divergence, moments and rate are known."""

    def __init__(self):
        super().__init__(3, 3, 1)

    def moments(self, x):
        return x / 2, torch.full_like(x, math.log(0.25))

    def decode_raw(self, z):
        return 2 * z


def pictures(count=10, channels=3, height=16, width=24, low=-1.0, high=0.7):
    source = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(count, channels, height, width, generator=source)


def batches(x, size=4):
    parts = x.split(size)
    return [{"image": part, "key": [f"{i}.png" for i in range(len(part))]} for part in parts]


def figures(autoencoder, x, **more):
    return measure(autoencoder, batches(x), Tally(), **more).table


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_identity_is_perfect(channels):
    table = figures(Identity(channels), pictures(channels=channels), extractor=RandomConv(channels))
    assert table["pictures"] == 10 and table["picture"] == [channels, 16, 24]
    assert table["psnr"] == table["psnr_of_mean_error"] == 100 and table["ssim"] == pytest.approx(1)
    assert table["rFD-random-conv"] < 1e-9 and "rFID" not in table
    assert table["rate"] is None and table["lpips"] is None and table["latents"]["active_units"] is None
    assert table["latents"]["shape"] == [channels, 16, 24] and table["latents"]["factor"] == 1


def test_psnr_over_pictures_and_over_all_values():
    table = figures(Off(), pictures())
    assert table["psnr"] == pytest.approx((9 * 20 + 100) / 10, rel=1e-5)  # range 2, error 0.2: 20 dB
    assert table["psnr_of_mean_error"] == pytest.approx(20 + 10 * math.log10(10 / 9), rel=1e-5)


def test_reconstructions_are_clamped():
    x = torch.ones(2, 3, 16, 16)
    assert figures(Off(), x)["psnr"] == 100


def test_distance_grows_with_the_error():
    x = pictures(24)
    table = figures(Off(), x, extractor=RandomConv())
    assert table["rFD-random-conv"] > 1e-3


def test_rate_and_moments_of_a_known_posterior():
    x = pictures(50)
    table = figures(Noisy(), x)
    nats = 0.5 * ((x / 2).square() + 0.25 - 1 - math.log(0.25)).sum(dim=(1, 2, 3)).mean().item()
    assert table["rate"]["bits"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert table["rate"]["bits_per_pixel"] == pytest.approx(table["rate"]["bits"] / (16 * 24))
    latents = table["latents"]
    for c in range(3):
        values = x[:, c] / 2
        assert latents["mean"][c] == pytest.approx(values.mean().item(), abs=1e-6)
        assert latents["std"][c] == pytest.approx((values.var(correction=0) + 0.25).sqrt().item(), rel=1e-5)
    assert latents["active_units"] == 3 and latents["as_stored"] is None and latents["stored"]["count"] == 0


def test_statistics_are_held_against_those_stored():
    x, model = pictures(50), Noisy()
    plain = figures(model, x)["latents"]
    model.set_statistics(torch.tensor(plain["mean"]), torch.tensor(plain["std"]), 50, "0123456789abcdef")
    told = figures(model, x)
    latents = told["latents"]
    assert latents["as_stored"] is True and latents["overall_std"] == pytest.approx(1, rel=1e-4)
    assert latents["stored"]["count"] == 50 and latents["stored"]["data"] == "0123456789abcdef"
    assert latents["mean"] == pytest.approx(plain["mean"], abs=1e-6)  # raw ones, whatever is stored
    assert told["rate"]["bits"] == pytest.approx(figures(Noisy(), x)["rate"]["bits"], rel=1e-5)
    model.set_statistics(torch.tensor(plain["mean"]), torch.tensor(plain["std"]) / 2, 50)
    latents = figures(model, x)["latents"]
    assert latents["as_stored"] is False and latents["unit_std"] == pytest.approx([2, 2, 2], rel=1e-4)
    assert latents["overall_std"] == pytest.approx(2, rel=1e-4)
    model.set_statistics(torch.tensor(plain["mean"]) + torch.tensor([0, 0.1, 0]), torch.tensor(plain["std"]), 50)
    assert figures(model, x)["latents"]["as_stored"] is False


def test_codes_cost_their_length_and_their_entropy():
    vq = VQ(channels=1, codes=4)
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[-1.0], [0.0], [1.0], [50.0]]))
    model = convolutional(vq, image_channels=1, width=8, mult=[1], blocks=1, attention=False)
    model.encoder, model.decoder, model.pre, model.post = (nn.Identity() for _ in range(4))
    x = torch.cat([torch.full((1, 1, 16, 16), value) for value in (-1.0, -0.9, 0.1, 1.0)])
    table = figures(model, x)
    rate = table["rate"]
    assert rate["bits"] == 16 * 16 * 2 and rate["bits_per_pixel"] == 2 and rate["codes"] == 4 and rate["used"] == 0.75
    entropy = 0.5 * 1 + 2 * 0.25 * 2  # bits, of the shares 1/2, 1/4, 1/4
    assert rate["perplexity"] == pytest.approx(2**entropy) and rate["entropy_bits_per_pixel"] == pytest.approx(entropy)
    assert table["psnr"] == pytest.approx((100 + 26.0206 + 26.0206 + 100) / 4, rel=1e-5)  # errors of 0, 0.1, 0.1, 0


@pytest.mark.parametrize(("bottleneck", "bits"), [
    (FSQ([8, 5, 5]), math.log2(200)), (LFQ(channels=3), 3), (KL(channels=3), None), (Plain(channels=3), None),
])  # fmt: skip
def test_every_kind_has_its_rate(bottleneck, bits):
    model = convolutional(bottleneck, width=8, mult=[1], blocks=1, attention=False).eval()
    rate = figures(model, pictures())["rate"]
    if bits is None:
        assert (rate or {}).get("kind") == ("kl" if isinstance(bottleneck, KL) else None)
    else:
        assert rate["bits_per_pixel"] == pytest.approx(bits) and 0 <= rate["entropy_bits_per_pixel"] <= bits + 1e-9
        assert rate["entropy_bits"] == pytest.approx(16 * 24 * math.log2(rate["perplexity"]))


def test_pictures_to_look_at():
    report = measure(Off(), batches(torch.cat([pictures(20), torch.full((1, 3, 16, 24), 0.95)])), Tally())
    assert [pair.number for pair in report.first] == list(range(SHOWN))
    assert len(report.worst) == SHOWN and all(pair.psnr == pytest.approx(20, abs=1e-3) for pair in report.worst)
    assert 0 not in [pair.number for pair in report.worst]
    pair = report.first[1]
    assert pair.name == "1.png" and torch.allclose(pair.made, pair.original + 0.2)


def test_throughput_says_where(monkeypatch):
    speed = figures(Identity(), pictures())["throughput"]
    assert speed["encode_per_second"] > 0 and speed["decode_per_second"] > 0
    assert speed["device"] == "cpu" and speed["batch"] == 4 and speed["threads"] == torch.get_num_threads()


def test_lpips_is_left_out_where_it_says_nothing():
    x = pictures(2)
    assert "lpips" not in compare(x, x) and "lpips" not in compare(x, x, lambda x, y: None)
    found = compare(x, x + 1, lambda x, y: (y - x).mean(dim=(1, 2, 3)))
    assert found["lpips"].tolist() == pytest.approx([1, 1])
    table = figures(Identity(), x, lpips=lambda x, y: torch.tensor([0.1, 0.3]))
    assert table["lpips"] == pytest.approx(0.2)


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="no picture"):
        measure(Identity(), [], Tally())
    with pytest.raises(UserError, match="two or more"):
        figures(Identity(), pictures(1), extractor=RandomConv())
    with pytest.raises(ValueError, match=r"\(B,1,H,W\), got \(4, 3, 16, 24\)"):
        figures(Identity(1), pictures())
    with pytest.raises(UserError, match=r"expected features \(pictures, D\), got \(4, 3, 16, 24\)"):
        figures(Identity(), pictures(), extractor=lambda x: x)
