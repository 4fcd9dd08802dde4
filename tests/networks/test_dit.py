import math

import pytest
import torch

from autoencoder.base import Identity
from ldm.cond import Cond
from ldm.conditioners.label import ClassLabel
from ldm.denoiser import build_denoiser
from ldm.networks.dit import DiT, position_angles, sincos
from ldm.networks.layers import rotated
from ldm.process import DDPM

SMALL = dict(in_channels=3, out_channels=2, width=24, depth=2, heads=2, patch_size=2)
VARIANTS = {
    "plain": {},
    "class": dict(vector_dim=5),
    "class, directly": dict(vector_dim=24, vector="direct"),
    "class, to each block": dict(vector_dim=48, vector="direct", embedders="own"),
    "cross": dict(context_dim=6),
    "in context": dict(context_dim=6, text="in_context"),
    "rotary": dict(context_dim=6, text="in_context", positions="rotary", qk_norm=True, width=32),
    "every option": dict(context_dim=6, vector_dim=4, embedders="own", positions="rotary", qk_norm=True, base_size=4, width=32,
                         mlp_ratio=2.0, told=[1.0, 0.0], endpoint=True, mlp_eps=1e-5, checkpointing=True),
}  # fmt: skip
EVERY = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
TEXT = pytest.mark.parametrize("options", [o for o in VARIANTS.values() if "context_dim" in o],
                               ids=[name for name, o in VARIANTS.items() if "context_dim" in o])  # fmt: skip
# width, depth, heads -> millions of parameters (2212.09748, table 1 and the published checkpoints), patches of 2, learned sigma
PUBLISHED = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


def inputs(options, length=5, size=(8, 12)):
    torch.manual_seed(1)
    mask = torch.arange(length) < torch.tensor([length, 2])[:, None]
    vector = torch.randn(2, options["vector_dim"]) if "vector_dim" in options else None
    tokens = (torch.randn(2, length, 6), mask) if "context_dim" in options else (None, None)
    return torch.randn(2, 3, *size), torch.tensor([10.0, 800.0]), Cond(*tokens, vector)


def dit(options, perturb=True):
    """With weights everywhere, those included that start at zero."""
    torch.manual_seed(0)
    network = DiT(**{**SMALL, **options})
    with torch.no_grad():
        for p in network.parameters() if perturb else ():
            p.add_(0.1 * torch.randn_like(p))
    return network


@EVERY
def test_starts_as_zero_and_its_blocks_as_the_identity(options):
    network, seen = dit(options, perturb=False), []
    for block in network.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    out = network(*inputs(options))
    assert out.shape == (2, 2, 8, 12) and not out.any()
    assert len(seen) == 2 and all(torch.equal(x, y) and x.any() for x, y in seen)


@EVERY
def test_gradient_reaches_every_weight(options):
    network = dit(options)
    network(*inputs(options)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert [name for name in silent if not name.endswith("to_k.bias")] == []  # a softmax does not see it


@EVERY
def test_time_and_every_condition_tell(options):
    network, (x, time, cond) = dit(options), inputs(options)
    out = network(x, time, cond)
    others = {"time": (x, time + 100, cond)}
    if cond.vector is not None:
        others["vector"] = (x, time, Cond(cond.tokens, cond.mask, cond.vector.flip(0)))
    if cond.tokens is not None:
        others["tokens"] = (x, time, Cond(cond.tokens.flip(0), cond.mask, cond.vector))
    for other in others.values():
        assert (network(*other) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@EVERY
def test_samples_do_not_see_each_other(options):
    network, (x, time, cond) = dit(options), inputs(options)
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1], cond[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(network(x, time, cond), alone, rtol=0, atol=1e-5)


@TEXT
def test_padding_makes_no_difference(options):
    network, (x, time, cond) = dit(options), inputs(options)
    out = network(x, time, cond)
    torch.manual_seed(2)
    longer = Cond(torch.cat([cond.tokens.masked_fill(~cond.mask[..., None], 7.0), torch.randn(2, 4, 6)], dim=1),
                  torch.cat([cond.mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1), cond.vector)
    torch.testing.assert_close(network(x, time, longer), out, rtol=0, atol=1e-5)
    short = Cond(cond.tokens[1:, :2], None, None if cond.vector is None else cond.vector[1:])
    torch.testing.assert_close(network(x[1:], time[1:], short), out[1:], rtol=0, atol=1e-5)


def test_a_patch_comes_out_where_it_went_in():
    """Blocks that are the identity: each output patch depends on its own input patch alone, in the order of its pixels."""
    network = DiT(**SMALL)
    with torch.no_grad():
        network.out.weight.normal_()
    x = torch.zeros(1, 3, 8, 12)
    changed = x.clone()
    changed[..., 2:4, 6:8] = 1
    difference = network(changed, torch.zeros(1), Cond()) - network(x, torch.zeros(1), Cond())
    assert difference[..., 2:4, 6:8].any() and difference.count_nonzero() == 2 * 4
    with torch.no_grad():  # the second pixel of a patch, second channel
        network.out.weight.zero_()
        network.out.bias.copy_(torch.arange(8.0))
    out = network(x, torch.zeros(1), Cond())
    assert out[0, :, :2, :2].tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


@EVERY
def test_activations_can_be_computed_again(options):
    kept, again = (dit({**options, "checkpointing": on}) for on in (False, True))
    for network in (kept, again):
        network(*inputs(options)).square().mean().backward()
    for a, b in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_is_one_graph():
    options = {**VARIANTS["rotary"], "vector_dim": 4, "depth": 1}
    network, given = dit(options).eval(), inputs(options)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), network(*given))
    torch._dynamo.reset()


def test_positions_are_those_of_the_paper():
    """One number written out: row 2, column 1 of a grid of 3 x 4, D = 16."""
    table = sincos(position_angles(3, 4, 16))
    omega = [10000 ** (-k / 4) for k in range(4)]
    column, row = ([f(at * w) for f in (math.sin, math.cos) for w in omega] for at in (1, 2))
    assert table.shape == (12, 16) and table[2 * 4 + 1].tolist() == pytest.approx(column + row)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_other_sizes_than_trained(positions):
    """Coordinates of a grid of 8 brought to 4: every second patch is where a patch of a grid of 4 is."""
    small, large = (position_angles(n, n, 16, 4).unflatten(0, (n, n)) for n in (4, 8))
    torch.testing.assert_close(large[::2, ::2], small)
    torch.testing.assert_close(position_angles(8, 8, 16, 8), position_angles(8, 8, 16))
    x, time, cond = inputs({}, size=(12, 4))
    for base in (None, 4):
        assert dit({"positions": positions, "base_size": base, "width": 32})(x, time, cond).shape == (2, 2, 12, 4)


def test_rotary_positions_tell_differences_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 20, 16)
    angles = position_angles(4, 5, 16).flatten(1)
    shifted = angles + (position_angles(8, 9, 16).flatten(1)[3 * 9 + 2] - 0)  # all by two columns and three rows
    scores = [torch.einsum("...nd,...md->...nm", rotated(q, a), rotated(k, a)) for a in (angles, shifted)]
    torch.testing.assert_close(*scores)
    assert not torch.allclose(scores[0], torch.einsum("...nd,...md->...nm", q, k), atol=0.1)


def test_what_the_network_is_told_of_time():
    """0 to 1000 as it is, or any other two ends."""
    steps, flow = dit({}), dit({"told": [1.0, 0.0]})
    x, time, cond = inputs({})
    torch.testing.assert_close(steps(x, 1 - time / 1000, cond), flow(x, time, cond))


def test_own_embedders_that_are_all_the_same_are_one():
    shared, own = dit({"vector_dim": 24, "vector": "direct"}), dit({"vector_dim": 48, "vector": "direct", "embedders": "own"})
    weights = {name: value for name, value in shared.state_dict().items() if not name.startswith("embedders")}
    for block in range(2):
        part = own.embedders[block].state_dict()
        weights |= {f"embedders.{block}.{name}": shared.embedders[0].state_dict()[name] for name in part}
    own.load_state_dict(weights)
    x, time, _ = inputs({})
    vector = torch.randn(2, 24)
    torch.testing.assert_close(own(x, time, Cond(vector=vector.repeat(1, 2))), shared(x, time, Cond(vector=vector)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Built without contents, with the class embedding of 1000 classes and none."""
    width, depth, heads, millions = PUBLISHED[name]
    block = {"target": "ldm.networks.dit.DiT", "params": {"width": width, "depth": depth, "heads": heads, "vector": "direct"}}
    process = DDPM("linear")
    with torch.device("meta"):
        label = ClassLabel(1000, width)
        denoiser = build_denoiser(block, process, "noise", Identity(4), label, variance="learned_range")
    parts = [*denoiser.parameters(), *label.parameters()]
    table = 16 * 16 * width  # of positions: counted there, computed here
    assert all(p.is_meta for p in parts)
    assert abs(sum(p.numel() for p in parts) + table - 1e6 * millions) < 0.52e6
    assert denoiser.network.out.out_features == 2 * 4 * 2**2


@pytest.mark.parametrize(("options", "told"), [
    (dict(heads=5), "width 24: with 5 heads and sincos positions it has to be a multiple of 20"),
    (dict(positions="rotary", heads=4), "with 4 heads and rotary positions it has to be a multiple of 16"),
    (dict(vector_dim=5, vector="direct"), "'direct' adds a vector of 24 numbers, and the condition's has 5"),
    (dict(vector_dim=5, embedders="own"), "shares the condition's 5 numbers out among 2 blocks"),
])  # fmt: skip
def test_sizes_that_cannot_be(options, told):
    with pytest.raises(ValueError, match=told):
        DiT(**{**SMALL, **options})


def test_what_does_not_go_in():
    x, time, _ = inputs({})
    with pytest.raises(ValueError, match="input 7x12 into patches: both sides have to be multiples of 2"):
        dit({})(x[:, :, :7], time, Cond())
    for options, kind in ((dict(context_dim=6), "text"), (dict(vector_dim=6), "a vector")):
        with pytest.raises(ValueError, match=f"made for {kind}, and the condition has none"):
            dit(options)(x, time, Cond())
