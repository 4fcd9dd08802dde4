import math

import pytest
import torch

from ldm.networks.classifier import AttentionPool, Classifier, log_p

SMALL = dict(in_channels=3, classes=5, size=8, model_channels=16, channel_mult=[1, 2], num_res_blocks=1,
             transformer_depth=[0, 1], head_channels=8)  # fmt: skip
POOLS = ["adaptive", "attention", "spatial", "spatial_v2"]
EVERY = pytest.mark.parametrize("pool", POOLS)


def classifier(pool="attention", **options):
    """With weights everywhere, those included that start at zero."""
    torch.manual_seed(0)
    network = Classifier(**{**SMALL, "pool": pool, **options})
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def inputs(batch=3):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 8, 8), torch.tensor([10.0, 400.0, 800.0])[:batch]


@EVERY
def test_logits_of_each_sample_alone(pool):
    network, (x, time) = classifier(pool), inputs()
    logits = network(x, time)
    assert logits.shape == (3, 5)
    for i in range(3):
        assert torch.allclose(network(x[i : i + 1], time[i : i + 1])[0], logits[i], atol=1e-5)
    assert not torch.allclose(network(x, time + 100), logits, atol=1e-4)  # time tells


@EVERY
def test_gradient_reaches_every_weight_and_the_picture(pool):
    network, (x, time) = classifier(pool), inputs()
    x.requires_grad_()
    network(x, time).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == [] and x.grad.abs().amin((1, 2, 3)).shape == (3,) and x.grad.any()


def test_without_training_the_mean_pool_says_nothing():
    assert not Classifier(**{**SMALL, "pool": "adaptive"})(*inputs()).any()


def test_attention_pool_by_its_formula():
    """CLIP, 2103.00020: softmax over all positions and their mean, of the mean's query, heads apart."""
    torch.manual_seed(0)
    pool, x = AttentionPool(6, 4, heads=2, positions=9), torch.randn(2, 6, 3, 3)
    tokens = torch.cat([x.mean((2, 3))[:, :, None], x.flatten(2)], dim=2) + pool.positions
    q, k, v = (tokens.mT @ pool.qkv.weight.T + pool.qkv.bias).split(6, dim=2)  # (B,10,6) each
    seen = []
    for head in (slice(0, 3), slice(3, 6)):
        score = (q[:, :1, head] @ k[:, :, head].mT / math.sqrt(3)).softmax(dim=-1)
        seen.append(score @ v[:, :, head])
    assert torch.allclose(pool(x), pool.out(torch.cat(seen, dim=2)[:, 0]), atol=1e-6)


def test_spatial_pools_see_every_block_by_its_mean():
    """One number a channel of the first convolution, of each block on the way down, and of the middle."""
    network = classifier("spatial")
    widths = [16, 16, 16, 32]  # the convolution, level 0, what halves, level 1
    assert network.head[0].in_features == sum(widths) + 32
    seen = []
    for part in (network.conv_in, *network.down, network.middle[-1]):
        part.register_forward_hook(lambda _, given, out: seen.append(out.mean((2, 3))))
    x, time = inputs()
    logits = network(x, time)
    assert torch.allclose(network.head(torch.cat(seen, dim=1)), logits, atol=1e-6)


def test_it_is_the_way_down_of_the_unet():
    from ldm.networks.unet import UNet

    shared = {name: value for name, value in SMALL.items() if name not in ("classes", "size")}
    unet = UNet(out_channels=3, attention="self", middle_depth=1, scale_shift=True, resblock_updown=True, **shared)
    ours = {name: p.shape for name, p in classifier().named_parameters() if name.split(".")[0] in ("down", "middle", "conv_in")}
    assert ours == {name: p.shape for name, p in unet.named_parameters() if name.split(".")[0] in ("down", "middle", "conv_in")}


@pytest.mark.parametrize(("pool", "sides", "told"), [("attention", (8, 16), "sides of 8x8, got 8x16"),
                                                     ("adaptive", (8, 9), "multiples of 2, got 8x9")])  # fmt: skip
def test_sides_that_it_was_not_made_for(pool, sides, told):
    with pytest.raises(ValueError, match=told):
        classifier(pool)(torch.randn(1, 3, *sides), torch.zeros(1))


@pytest.mark.parametrize("size", [None, 9])
def test_the_attention_pool_needs_a_side(size):
    with pytest.raises(ValueError, match="side of x, a multiple of 2"):
        classifier(size=size)


def test_means_take_any_side():
    assert classifier("adaptive")(torch.randn(2, 3, 4, 12), torch.zeros(2)).shape == (2, 5)


def test_checkpointing_changes_nothing():
    outcomes = []
    for saving in (False, True):
        network, (x, time) = classifier(checkpointing=saving), inputs()
        network(x, time).square().mean().backward()
        outcomes.append([p.grad for p in network.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*outcomes, strict=True))


def test_log_p_is_that_of_the_class_asked_for():
    x, time = inputs()
    logits = torch.randn(3, 5)
    found = log_p(lambda x, t: logits, torch.tensor([4, 0, 2]))(x, time)
    assert torch.allclose(found, logits.log_softmax(-1)[range(3), [4, 0, 2]])
    total = sum(log_p(classifier(), torch.full((3,), y))(x, time).exp() for y in range(5))
    assert torch.allclose(total, torch.ones(3), atol=1e-5)
