import pytest
import torch

from autoencoder.bottlenecks import FSQ, KL, VQ, Plain
from autoencoder.model import convolutional
from autoencoder.nets import Downsample
from ldm.common.build import build, check

SMALL = dict(width=16, blocks=1, attention=False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def measured(model, x):
    mean, _ = model.moments(x)
    model.set_statistics(mean.mean((0, 2, 3)), mean.std((0, 2, 3)), len(x))
    return model.eval()


@pytest.mark.parametrize(("mult", "patch", "factor"), [
    ([1], 1, 1), ([1, 1], 1, 2), ([1, 1, 2], 1, 4), ([1], 4, 4), ([1, 2], 2, 4), ([1, 1, 1, 2], 1, 8), ([1, 1], 4, 8),
])  # fmt: skip
@pytest.mark.parametrize("bottleneck", [KL, Plain, VQ])
def test_shapes_follow_from_the_factor(bottleneck, mult, patch, factor):
    model = convolutional(bottleneck(channels=5), mult=mult, patch=patch, **SMALL)
    x = torch.randn(2, 3, 2 * factor, 3 * factor)
    assert model.spec.factor == factor and model.spec.channels == 5
    with torch.no_grad():
        z = model.encode(x)
        assert z.shape == (2, 5, 2, 3) and model.decode(z).shape == x.shape
        assert model(x)[0].shape == x.shape


def test_the_default_is_f8_as_published():
    """kl-f8 of LDM: 83,653,863 parameters with 4 channels."""
    with torch.device("meta"):
        model = convolutional(KL(4))
    assert model.factor == 8
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_moments_of_kl_are_the_two_halves_of_the_features():
    model = convolutional(KL(4), mult=[1, 1], **SMALL)
    x = 0.1 * torch.randn(2, 3, 8, 8)
    mean, logvar = model.moments(x)
    features = model.features(x)
    assert torch.equal(mean, features[:, :4]) and torch.equal(logvar, features[:, 4:])
    wild = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-99.0, 99.0]]]])], dim=1)
    assert KL(1).moments(wild)[1].flatten().tolist() == [-30, 20]


def test_kl_in_nats_a_picture():
    """Against torch's own divergence of diagonal Gaussians."""
    features = torch.randn(3, 4, 2, 2)
    mean, logvar = features.chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    bottled = KL(2)(features, torch.ones(3, 2, 2, 2))
    assert torch.allclose(bottled.losses["kl"], expected)
    assert torch.allclose(bottled.latent, mean + (0.5 * logvar).exp()) and bottled.codes is None


def test_unmeasured_and_measured_models_decode_the_same_picture():
    x = torch.randn(16, 3, 16, 16)
    model = convolutional(KL(4), mult=[1, 2], **SMALL).eval()
    with torch.no_grad():
        before = model.decode(model.encode(x))
        z = measured(model, x).encode(x)
        assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-4) and z.mean((0, 2, 3)).abs().max() < 1e-4
        assert torch.allclose(model.decode(z), before, atol=1e-5)
        assert torch.allclose(model(x, torch.zeros_like(z))[0], before, atol=1e-5)  # training's pass at the mode


def test_forward_draws_with_the_noise_that_it_is_given():
    model, x = convolutional(KL(4), mult=[1, 1], **SMALL), torch.randn(2, 3, 8, 8)
    noise = torch.randn(2, 4, 4, 4)
    mean, logvar = model.moments(x)
    assert torch.allclose(model(x, noise)[1].latent, mean + (0.5 * logvar).exp() * noise, atol=1e-6)
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("learn", ["gradient", "ema"])
def test_codes_are_the_latents_of_the_decoder(learn):
    model = convolutional(VQ(4, codes=32, learn=learn), mult=[1, 2], **SMALL)
    with torch.no_grad():
        x = torch.randn(8, 3, 16, 16)
        measured(model, x)
        model.bottleneck.codebook.copy_(model.features(x)[:, :, 3, :4].transpose(1, 2).flatten(0, 1))  # all near something
        codes = model.codes(x)
        assert codes.shape == (8, 8, 8) and codes.dtype is torch.int64 and len(codes.unique()) > 5
        assert torch.allclose(model.decode_codes(codes), model.decode(model.encode(x)), atol=1e-5)
        assert torch.allclose(model.decode_codes(codes), model(x)[0], atol=1e-5)
        assert torch.equal(codes, model(x)[1].codes)


@torch.no_grad()
@pytest.mark.parametrize("bottleneck", [VQ(3, 64), FSQ([8, 6, 5])], ids=["vq", "fsq"])
def test_codes_do_not_feel_autocast(bottleneck):
    model = convolutional(bottleneck, mult=[1, 2], **SMALL).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    if isinstance(bottleneck, VQ):
        bottleneck.codebook.normal_(std=model.moments(x)[0].std())
    codes = model.codes(x)
    y = model.decode_codes(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.codes(x), codes)
        assert model.decode_codes(codes).dtype == torch.float32 and torch.equal(model.decode_codes(codes), y)
    assert model.to(torch.bfloat16).decode_codes(codes).dtype == torch.float32


def test_asking_for_codes_teaches_the_codebook_nothing():
    model = convolutional(VQ(4, codes=8, learn="ema", restart=0.5), mult=[1], **SMALL).train()
    before = model.content_hash()
    model.codes(torch.randn(2, 3, 8, 8))
    assert model.content_hash() == before
    model(torch.randn(2, 3, 8, 8))
    assert model.content_hash() != before


@pytest.mark.parametrize("bottleneck", [KL(2), Plain(2)])
def test_kinds_without_codes_say_so(bottleneck):
    model = convolutional(bottleneck, mult=[1], **SMALL)
    for ask, given in ((model.codes, torch.zeros(1, 3, 8, 8)), (model.decode_codes, torch.zeros(1, 8, 8, dtype=torch.int64))):
        with pytest.raises(ValueError, match=f"{type(bottleneck).__name__} has no codes; kinds that do: VQ"):
            ask(given)


def test_hash_changes_with_any_one_weight():
    model = convolutional(KL(2), mult=[1], **SMALL)
    hashes = {model.content_hash()}
    for name in ("encoder.conv_in.weight", "pre.bias", "decoder.conv_out.bias", "shift"):
        with torch.no_grad():
            value = model.state_dict()[name]
            value[(0,) * value.ndim] += 1e-3
        hashes.add(model.content_hash())
    assert len(hashes) == 5


@pytest.mark.parametrize("bottleneck", [KL(3), VQ(3, codes=8), Plain(3)])
def test_gradient_reaches_every_weight(bottleneck):
    model = convolutional(bottleneck, mult=[1, 1], width=16, blocks=1, attention=True, attention_levels=[1], patch=2)
    x_hat, bottled = model(torch.randn(2, 3, 8, 8))
    (x_hat.square().mean() + sum(bottled.losses.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert sum(bool(p.grad.any()) for p in model.parameters()) >= len(list(model.parameters())) - 2  # two keys' biases


def test_the_balance_of_losses_looks_at_the_last_layer():
    model = convolutional(KL(2), mult=[1], patch=2, **SMALL)
    assert model.decoder.last_layer is model.decoder.conv_out.weight
    assert model.decoder.last_layer.shape == (12, 16, 3, 3)  # 3 channels, 2 x 2 pixels


def test_downsampling_pads_on_the_right_and_at_the_bottom():
    layer = Downsample(1)
    with torch.no_grad():
        layer.conv.weight.fill_(1.0)
        layer.conv.bias.zero_()
        out = layer(torch.ones(1, 1, 4, 4))
    assert out.flatten().tolist() == [9, 6, 6, 4]


def test_blocks_of_a_config():
    bottleneck = {"target": "autoencoder.bottlenecks.KL", "params": {"channels": 2}}
    block = {"target": "autoencoder.model.convolutional", "params": {**SMALL, "mult": [1, 1], "bottleneck": bottleneck}}
    assert check(block) == [] and build(block).spec.channels == 2
    block["params"]["widht"] = 3
    assert len(check(block)) == 1 and "widht" in check(block)[0]
