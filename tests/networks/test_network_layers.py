import math

import pytest
import torch
from torch import nn

from ldm.networks.layers import (
    GEGLU,
    Attention,
    Downsample,
    ResBlock,
    SpatialTransformer,
    Upsample,
    group_norm,
    timestep_embedding,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def perturbed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("options", [dict(), dict(scale_shift=True), dict(dropout=0.5)])
def test_residual_block_starts_as_its_shortcut(options):
    x, embedding = torch.randn(2, 8, 6, 4), torch.randn(2, 12)
    assert torch.equal(ResBlock(8, 8, 12, **options)(x, embedding), x)
    wider = ResBlock(8, 16, 12, **options)
    assert torch.equal(wider(x, embedding), wider.shortcut(x))


def test_residual_block_starts_as_resampling():
    x, embedding = torch.randn(2, 8, 6, 4), torch.randn(2, 12)
    assert torch.allclose(ResBlock(8, 8, 12, resample="down")(x, embedding), x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)))
    assert torch.equal(ResBlock(8, 8, 12, resample="up")(x, embedding), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_sees_the_embedding_of_each_sample(scale_shift):
    block = perturbed(ResBlock(8, 8, 12, scale_shift=scale_shift))
    x, embedding = torch.randn(1, 8, 4, 4).expand(2, -1, -1, -1), torch.randn(2, 12)
    out = block(x, embedding)
    assert not torch.allclose(out[0], out[1], atol=1e-4)
    assert torch.allclose(out[1:], block(x[1:], embedding[1:]), atol=1e-6)


def test_scale_shift_is_adagn():
    block = perturbed(ResBlock(8, 8, 12, scale_shift=True))
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 12)
    h = block.conv1(nn.functional.silu(block.norm1(x)))
    scale, shift = block.embed(nn.functional.silu(embedding)).view(2, 2, 8, 1, 1).unbind(1)  # 2105.05233, eq. 3
    h = block.norm2(h) * (1 + scale) + shift
    assert torch.allclose(block(x, embedding), x + block.conv2(nn.functional.silu(h)), atol=1e-6)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_spatial_transformer_starts_as_the_identity(linear, qk_norm):
    layer = SpatialTransformer(8, 5, heads=2, head_dim=4, linear=linear, qk_norm=qk_norm)
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(layer(x, torch.randn(2, 7, 5), None), x)


def test_projections_as_convolutions_are_the_same_map():
    shape = dict(channels=8, context_dim=5, heads=2, head_dim=4, depth=2)
    ours, theirs = (perturbed(SpatialTransformer(**shape, linear=linear)) for linear in (True, False))
    weights = {key: value.view_as(theirs.state_dict()[key]) for key, value in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    x, context, mask = torch.randn(2, 8, 3, 5), torch.randn(2, 7, 5), torch.rand(2, 7) < 0.8
    assert torch.allclose(ours(x, context, mask), theirs(x, context, mask), atol=1e-5)


def test_attention_by_hand():
    layer = Attention(6, 5, heads=3, head_dim=4)
    x, context, mask = torch.randn(2, 7, 6), torch.randn(2, 4, 5), torch.tensor([[True] * 4, [True, True, False, False]])
    out = torch.zeros(2, 7, 12)
    for b in range(2):
        real = context[b][mask[b]]
        for head in range(3):
            rows = slice(4 * head, 4 * head + 4)
            q, k, v = x[b] @ layer.to_q.weight[rows].T, real @ layer.to_k.weight[rows].T, real @ layer.to_v.weight[rows].T
            out[b, :, rows] = torch.softmax(q @ k.T / 2, dim=-1) @ v  # 2 = sqrt(head_dim)
    assert torch.allclose(layer(x, context, mask), layer.out(out), atol=1e-6)
    assert torch.allclose(layer(x[:1], context[:1]), layer.out(out[:1]), atol=1e-6)


def test_normalised_queries_bound_the_logits():
    layer = Attention(6, 5, heads=3, head_dim=4, qk_norm=True)
    small, large = (layer(x, context) for x, context in ((torch.ones(1, 2, 6), torch.eye(5)[None]),
                                                         (100 * torch.ones(1, 2, 6), torch.eye(5)[None])))  # fmt: skip
    assert torch.allclose(small, large, atol=1e-5)


def test_geglu_is_value_times_exact_gelu():
    layer, x = GEGLU(3, mult=2), torch.randn(2, 4, 3)
    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(6, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    assert torch.allclose(layer(x), layer.out(value * gelu), atol=1e-6)


def test_resampling_convolutions():
    x = torch.randn(1, 3, 6, 4)
    for layer in (Downsample(3), Upsample(3)):
        nn.init.dirac_(layer.conv.weight)
        nn.init.zeros_(layer.conv.bias)
        expected = x[:, :, ::2, ::2] if isinstance(layer, Downsample) else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.equal(layer(x), expected)
    means = x.unflatten(3, (2, 2)).unflatten(2, (3, 2)).mean((3, 5))  # of squares of four
    assert torch.allclose(Downsample(3, conv=False)(x), means, atol=1e-6)
    assert torch.equal(Upsample(3, conv=False)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("dim", [8, 9])
def test_timestep_embedding_formula(dim):
    out = timestep_embedding(torch.tensor([0.0, 3.5, 999.0]), dim)
    for row, t in zip(out, (0.0, 3.5, 999.0), strict=True):
        angles = [t * 10000 ** (-k / 4) for k in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim - 8)
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("channels", [3, 4, 6, 8, 32, 64, 96, 100, 128, 320, 1280])
def test_groups_are_wide_enough_to_let_the_time_through(channels):
    norm = group_norm(channels)
    width = channels // norm.num_groups
    assert channels % norm.num_groups == 0 and width >= min(4, channels)
    h = torch.randn(1, channels, 2, 2)
    moved = h + torch.randn(1, channels, 1, 1)  # what an added embedding does
    assert not torch.allclose(norm(h), norm(moved), atol=1e-2)
