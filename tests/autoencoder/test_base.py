import pytest
import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder, Identity


class Pooled(Autoencoder):
    """Means of 2 x 2 pixels, twice as large, as the latent; with a log-variance if ``noisy``."""

    def __init__(self, noisy=False):
        super().__init__(3, 3, 2)
        self.noisy, self.gain = noisy, nn.Parameter(torch.tensor(2.0))

    def moments(self, x: Tensor):
        mean = self.gain * nn.functional.avg_pool2d(x, 2)
        return mean, torch.full_like(mean, 2.0).log() if self.noisy else None

    def decode_raw(self, z: Tensor):
        return nn.functional.interpolate(z / self.gain, scale_factor=2.0)


@pytest.fixture
def pictures():
    torch.manual_seed(0)
    mean, std = torch.tensor([[0.3, -0.2, 0.0], [0.1, 0.5, 0.2]]).view(2, 3, 1, 1)
    small = mean + std * torch.randn(64, 3, 4, 8)
    return small.repeat_interleave(2, 2).repeat_interleave(2, 3)


def measured(model, pictures):
    mean, _ = model.moments(pictures)
    model.set_statistics(mean.mean((0, 2, 3)), mean.std((0, 2, 3)), len(pictures))
    return model


def test_identity_gives_the_picture_back(pictures):
    model = Identity()
    assert torch.equal(model.encode(pictures), pictures) and torch.equal(model.decode(pictures), pictures)
    assert (model.spec.channels, model.spec.factor) == (3, 1)
    measured(model, pictures)
    assert torch.allclose(model.decode(model.encode(pictures)), pictures, atol=1e-6)
    assert Identity(1).spec.channels == 1


def test_measured_latents_have_unit_variance(pictures):
    model = Pooled()
    assert model.statistics_count == 0
    z = measured(model, pictures).encode(pictures)
    assert z.shape == (64, 3, 4, 8)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(3), atol=1e-5)
    assert model.statistics_count == 64


def test_decode_undoes_what_encode_does(pictures):
    model = measured(Pooled(), pictures)
    assert torch.allclose(model.decode(model.encode(pictures)), pictures, atol=1e-5)
    z = torch.randn(2, 3, 4, 8)
    assert torch.allclose(model.denormalise(model.normalise(z)), z, atol=1e-6)
    assert torch.allclose(model.encode(model.decode(z)), z, atol=1e-4)


def test_a_draw_has_the_posterior_spread_at_unit_scale(pictures):
    model = Pooled(noisy=True)
    model.set_statistics(torch.ones(3), torch.tensor([1.0, 2.0, 4.0]), 1)
    mean, std = model.posterior(pictures)
    assert torch.allclose(std, (2.0**0.5 / torch.tensor([1.0, 2.0, 4.0])).view(3, 1, 1).expand_as(std))
    assert torch.equal(model.encode(pictures), mean)
    draws = torch.stack([model.encode(pictures[:1], torch.Generator().manual_seed(seed)) for seed in range(400)])
    assert torch.allclose(draws.mean(0), mean[:1], atol=0.3)
    assert torch.allclose((draws - mean[:1]).std((0, 1, 3, 4)), std[0, :, 0, 0], rtol=0.05)
    first, again = (model.encode(pictures[:1], torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_deterministic_kinds_draw_nothing(pictures):
    model, source = Pooled(), torch.Generator().manual_seed(0)
    state = source.get_state()
    assert torch.equal(model.encode(pictures, source), model.encode(pictures))
    assert model.posterior(pictures)[1] is None and torch.equal(source.get_state(), state)


def test_statistics_travel_with_the_weights(pictures):
    model, other = measured(Pooled(), pictures), Pooled()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.spec.shift, model.shift) and torch.equal(other.spec.scale, model.scale)
    assert torch.equal(other.encode(pictures), model.encode(pictures)) and other.statistics_count == 64


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_dead_channels_are_named(scale):
    model = Pooled()
    with pytest.raises(ValueError, match=r"latent channels \[1\] have no variance"):
        model.set_statistics(torch.zeros(3), torch.tensor([1.0, scale, 2.0]), 5)
    assert model.statistics_count == 0 and torch.equal(model.scale, torch.ones(3))


@pytest.mark.parametrize(("shape", "told"), [
    ((1, 3, 5, 8), "height 5 is no multiple of the autoencoder's factor 2: take 4 or 6"),
    ((1, 3, 8, 1), "width 1 is no multiple of the autoencoder's factor 2: take 2"),
    ((1, 4, 8, 8), r"expected pictures \(B,3,H,W\), got \(1, 4, 8, 8\)"),
    ((3, 8, 8), r"expected pictures \(B,3,H,W\), got \(3, 8, 8\)"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_named(shape, told):
    with pytest.raises(ValueError, match=told):
        Pooled().encode(torch.zeros(shape))


def test_hash_is_of_all_weights_and_statistics(pictures):
    model, same = Pooled(), Pooled()
    before = model.content_hash()
    assert same.content_hash() == before and len(before) == 16 and int(before, 16) >= 0
    with torch.no_grad():
        model.gain += 1e-6
    changed = model.content_hash()
    assert len({before, changed, measured(model, pictures).content_hash()}) == 3
    assert Identity().content_hash() != Identity(1).content_hash() != before
    assert Pooled().bfloat16().content_hash() != before


def test_a_kind_without_its_parts_says_so():
    bare = Autoencoder(3, 4, 8)
    with pytest.raises(NotImplementedError, match="Autoencoder has to implement moments"):
        bare.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(NotImplementedError, match="Autoencoder has to implement decode_raw"):
        bare.decode(torch.zeros(1, 4, 1, 1))


class Wild(Autoencoder):
    """Features of some 1e5, as published autoencoders have them somewhere inside: too large for fp16."""

    def __init__(self):
        super().__init__(3, 3, 1)
        self.up, self.down = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            for layer, gain in ((self.up, 1e5), (self.down, 1e-5)):
                layer.weight.copy_(gain * torch.eye(3).view(3, 3, 1, 1))
                layer.bias.zero_()

    def moments(self, x: Tensor):
        return self.down(self.up(x)), None

    def decode_raw(self, z: Tensor):
        return self.down(self.up(z))


def test_weights_in_float32_are_used_in_float32_whatever_is_around():
    model, x = Wild(), torch.tensor([1.0, -0.7, 0.3]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert not model.decode_raw(x).isfinite().all()  # so it would go
        for done in (model.encode(x), model.decode(x), model.posterior(x.half())[0], model.decode(x.bfloat16())):
            assert done.dtype is torch.float32 and torch.allclose(done, x, atol=4e-3)
        assert torch.allclose(model.decode(model.encode(x)), x, atol=1e-6)


def test_weights_in_half_precision_keep_exact_statistics_and_give_float32(pictures):
    model = measured(Pooled(noisy=True), pictures)
    exact = model.scale.clone()
    z, std = model.posterior(pictures)
    model.to(torch.bfloat16)
    assert model.dtype is model.gain.dtype is torch.bfloat16 and model.shift.dtype is torch.float32
    assert torch.equal(model.scale, exact) and torch.equal(model.spec.scale, exact)
    for done, before in zip((*model.posterior(pictures), model.decode(z)), (z, std, pictures), strict=True):
        assert done.dtype is torch.float32 and 0 < (done - before).abs().max() < 0.05
    assert model.double().decode(z.double()).dtype is torch.float64
    assert torch.equal(model.float().scale, exact) and model.decode(z).dtype is torch.float32


def test_statistics_go_with_the_module():
    assert Pooled().to("meta").shift.is_meta and Pooled().to("meta", torch.bfloat16).scale.is_meta
    assert Pooled().to("meta").to_empty(device="cpu").shift.device.type == "cpu"
