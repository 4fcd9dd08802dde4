"""Options of the convolutional nets that other people's autoencoders have: what each computes."""

import pytest
import torch
import torch.nn.functional as F

from autoencoder.bottlenecks import KL, VQ
from autoencoder.model import convolutional
from autoencoder.nets import Attention, Decoder, Downsample, LinearAttention, Upsample, norm

SMALL = dict(width=16, mult=[1, 2], blocks=1)


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_linear_attention_by_its_formula():
    """out = W_o sum_n softmax(k)_n v_n^T q, every position by itself."""
    layer, x = LinearAttention(8), torch.randn(1, 8, 3, 4)
    q, k, v = (F.conv2d(x, w).flatten(2)[0] for w in layer.qkv.weight.chunk(3))  # (C,N)
    shares = k.exp() / k.exp().sum(dim=1, keepdim=True)
    expected = torch.zeros(8, 12)
    for n in range(12):
        for d in range(8):
            expected[:, n] += q[d, n] * sum(shares[d, m] * v[:, m] for m in range(12))
    assert torch.allclose(layer(x), layer.out(expected.view(1, 8, 3, 4)), atol=1e-5)


def test_softmax_attention_by_its_formula():
    layer, x = Attention(8, groups=4), torch.randn(2, 8, 3, 2)
    q, k, v = (f(layer.norm(x)).flatten(2) for f in (layer.q, layer.k, layer.v))  # (B,C,N)
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 8**0.5, dim=2)
    expected = x + layer.out(torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_levels_without_convolutions():
    x = torch.randn(1, 2, 4, 6)
    means = x.view(1, 2, 2, 2, 3, 2).mean(dim=(3, 5))
    assert torch.allclose(Downsample(2, conv=False)(x), means, atol=1e-6)
    assert torch.equal(Upsample(2, conv=False)(means), means.repeat_interleave(2, 2).repeat_interleave(2, 3))
    model = convolutional(KL(4), **SMALL, conv_resample=False)
    changers = [part for part in model.modules() if isinstance(part, (Downsample, Upsample))]
    assert len(changers) == 2 and not any(list(part.parameters()) for part in changers)
    assert model.decode(model.encode(torch.zeros(1, 3, 8, 8))).shape == (1, 3, 8, 8)


def test_bounded_pictures():
    plain, bounded = (convolutional(KL(4), **SMALL, tanh=tanh) for tanh in (False, True))
    bounded.load_state_dict(plain.state_dict())
    z = 3 * torch.randn(1, 4, 2, 2)
    assert torch.allclose(bounded.decode(z), plain.decode(z).tanh(), atol=1e-6)


def test_features_in_place_of_a_picture():
    whole = Decoder(4, 3, width=16, mult=(2, 1), blocks=1)
    headless = Decoder(4, 3, width=16, mult=(2, 1), blocks=1, head=False)
    headless.load_state_dict(whole.state_dict())
    z = torch.randn(1, 4, 3, 2)
    features = headless(z)
    assert features.shape == (1, 32, 6, 4)
    assert torch.allclose(whole.conv_out(F.silu(whole.norm_out(features))), whole(z), atol=1e-5)


def test_other_sizes_inside_than_the_latents():
    for bottleneck, doubled in ((KL(3), 2), (VQ(3, codes=8), 1)):
        model = convolutional(bottleneck, **SMALL, features=5, out_channels=1)
        assert model.encoder.conv_out.out_channels == 5 * doubled and model.decoder.conv_in.in_channels == 5
        assert model.pre.weight.shape == (3 * doubled, 5 * doubled, 1, 1) and model.post.weight.shape == (5, 3, 1, 1)
        z = model.encode(torch.zeros(1, 3, 4, 4))
        assert z.shape == (1, 3, 2, 2) and model.decode(z).shape == (1, 1, 4, 4)


def test_without_the_convolutions_around_the_bottleneck():
    model = convolutional(KL(3), **SMALL, pre=False, post=False)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(model.features(x), model.encoder(x)) and model.encoder.conv_out.out_channels == 6
    z = torch.randn(1, 3, 2, 2)
    assert torch.equal(model.decode_raw(z), model.decoder(z))
    with pytest.raises(ValueError, match="features: 5, for a latent of 3 channels, takes both 1x1 convolutions"):
        convolutional(KL(3), **SMALL, features=5, post=False)


def test_attention_at_other_levels_on_the_way_back():
    model = convolutional(KL(3), **SMALL, attention=False, attention_levels=[0], decoder_attention_levels=[1])
    places = [name for name, module in model.named_modules() if isinstance(module, Attention)]
    assert places == ["encoder.levels.0.1", "decoder.levels.0.1", "decoder.levels.0.3"]


@pytest.mark.parametrize(("channels", "groups", "expected"), [(64, 32, 32), (48, 32, 16), (20, 8, 4), (7, 32, 1)])
def test_groups_divide_the_channels(channels, groups, expected):
    assert norm(channels, groups).num_groups == expected
