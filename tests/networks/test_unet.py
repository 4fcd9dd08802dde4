from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from ldm.common.build import build
from ldm.cond import Cond
from ldm.interop import unet_names
from ldm.networks.unet import UNet

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = dict(in_channels=3, out_channels=2, context_dim=6, model_channels=16, channel_mult=[1, 2], num_res_blocks=1,
             transformer_depth=[0, 1], num_heads=2)  # fmt: skip
VARIANTS = {
    "plain": {},
    "every option": dict(vector_dim=5, scale_shift=True, resblock_updown=True, linear_projections=False, qk_norm=True,
                         ff_mult=2, transformer_depth=[1, 2], middle_depth=1, head_channels=8, num_res_blocks=2),
    "patches": dict(patch_size=2, transformer_depth=[1, 0]),
    "no text": dict(context_dim=None, middle_depth=0, transformer_depth=[0, 0]),
    "three levels": dict(channel_mult=[1, 1.5, 2], transformer_depth=[0, 0, 1]),
}  # fmt: skip
EVERY = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def inputs(options, batch=2, length=5):
    torch.manual_seed(1)
    mask = torch.arange(length) < torch.tensor([length, 2])[:batch, None]
    vector = torch.randn(batch, options["vector_dim"]) if "vector_dim" in options else None
    return torch.randn(batch, 3, 8, 16), torch.tensor([10.0, 800.0])[:batch], Cond(torch.randn(batch, length, 6), mask, vector)


def unet(options, perturb=True):
    """With weights everywhere, those included that start at zero."""
    torch.manual_seed(0)
    network = UNet(**{**SMALL, **options})
    with torch.no_grad():
        for p in network.parameters() if perturb else ():
            p.add_(0.05 * torch.randn_like(p))
    return network


@EVERY
def test_starts_as_zero(options):
    out = unet(options, perturb=False)(*inputs(options))
    assert out.shape == (2, 2, 8, 16) and not out.any()


@EVERY
def test_what_was_seen_on_the_way_down_is_joined_to_its_mirror_on_the_way_up(options):
    network, seen, joined = unet(options), [], []
    for stage in (network.conv_in, *network.down):
        stage.register_forward_hook(lambda _, given, out: seen.append(out))
    for stage in network.up:
        stage.register_forward_pre_hook(lambda _, given: joined.append(given[0]))
    network(*inputs(options))
    assert len(seen) == len(joined)
    for h, mirror in zip(joined, reversed(seen), strict=True):
        assert torch.equal(h[:, -mirror.shape[1] :], mirror)


@EVERY
def test_gradient_reaches_every_weight(options):
    network = unet(options)
    network(*inputs(options)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@EVERY
def test_time_tells(options):
    network, (x, time, cond) = unet(options), inputs(options)
    out = network(x, time, cond)
    assert not torch.allclose(out, network(x, time + 200, cond), atol=1e-4)


@EVERY
def test_samples_do_not_see_each_other(options):
    network, (x, time, cond) = unet(options), inputs(options)
    both = network(x, time, cond)
    for i in range(2):
        one = slice(i, i + 1)
        assert torch.allclose(both[one], network(x[one], time[one], cond[one]), atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "every option", "patches", "three levels"])
def test_padding_tells_nothing_and_words_tell_something(name):
    options = VARIANTS[name]
    network, (x, time, cond) = unet(options), inputs(options)
    out, padding = network(x, time, cond), ~cond.mask[..., None]

    def told(tokens, mask):
        return network(x, time, Cond(tokens, mask, cond.vector))

    noisy = cond.tokens + 100 * padding * torch.randn_like(cond.tokens)
    assert torch.allclose(out, told(noisy, cond.mask), atol=1e-6)
    longer = torch.cat([cond.tokens, torch.randn(2, 3, 6)], dim=1)
    mask = torch.cat([cond.mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    assert torch.allclose(out, told(longer, mask), atol=1e-6)
    assert torch.allclose(out[1:], network(x[1:], time[1:], Cond(cond.tokens[1:, :2], None, cond[1:].vector)), atol=1e-5)
    other = torch.where(padding, cond.tokens, torch.randn_like(cond.tokens))
    changed = told(other, cond.mask)
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(out, changed, strict=True))


def test_class_vectors_tell():
    options = VARIANTS["every option"]
    network, (x, time, cond) = unet(options), inputs(options)
    other = Cond(cond.tokens, cond.mask, torch.randn_like(cond.vector))
    assert not torch.allclose(network(x, time, cond), network(x, time, other), atol=1e-4)


@EVERY
def test_checkpointing_changes_memory_only(options):
    plain, saving = unet(options), unet({**options, "checkpointing": True})
    given, stored = inputs(options), []
    for network in (plain, saving):
        kept = []

        def keep(t, kept=kept):
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = network(*given).square().mean()
        loss.backward()
        stored.append((loss.item(), sum(kept)))
    assert stored[0][0] == stored[1][0] and stored[1][1] < 0.5 * stored[0][1]
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)


@pytest.mark.parametrize("name", ["no text", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "no text")])
def test_is_one_graph(name):
    options = VARIANTS[name]
    network, given = unet(options).eval(), inputs(options)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), network(*given))
    torch._dynamo.reset()


def widened(weight, like, dims):
    """A 2-D kernel in the middle of a larger or smaller one: of three axes the first, time, is new, of one the first is cut."""
    if weight.ndim != 4 or weight.shape == like.shape:
        return weight.reshape(like.shape)
    if dims == 1:
        return weight[:, :, weight.shape[2] // 2]
    return F.pad(weight[:, :, None], (0, 0, 0, 0, like.shape[2] // 2, like.shape[2] // 2))


@torch.no_grad()
@pytest.mark.parametrize("resample", [{}, {"resblock_updown": True}, {"conv_resample": False}], ids=["convolutions", "blocks", "means"])
@pytest.mark.parametrize("attention", ["transformer", "self"])
def test_three_axes_of_frames_that_are_all_the_same(attention, resample):
    """Kernels that look at their own frame alone, and normalisation and attention over copies, give each frame's picture."""
    options = dict(attention=attention, linear_projections=False, **resample, **({"context_dim": None} if attention == "self" else {}))
    flat, deep = unet(options), unet({**options, "dims": 3})
    deep.load_state_dict({name: widened(value, deep.state_dict()[name], 3) for name, value in flat.state_dict().items()})
    x, time, cond = inputs({})
    cond = Cond() if attention == "self" else cond
    frames = deep(x[:, :, None].expand(-1, -1, 3, -1, -1), time, cond)
    assert frames.shape == (2, 2, 3, 8, 16)
    torch.testing.assert_close(frames, flat(x, time, cond)[:, :, None].expand_as(frames), rtol=0, atol=2e-5)


@torch.no_grad()
def test_one_axis_is_a_row_of_rows_that_are_all_the_same():
    flat, row = unet({}), unet({"dims": 1})
    for conv in (module for module in flat.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)):
        conv.weight[:, :, [0, 2]] = 0  # a row sees itself alone
    row.load_state_dict({name: widened(value, row.state_dict()[name], 1) for name, value in flat.state_dict().items()})
    x, time, cond = inputs({})
    rows = x[:, :, :1].expand(-1, -1, 4, -1)
    expected = flat(rows, time, cond)
    torch.testing.assert_close(row(x[:, :, 0], time, cond), expected[:, :, 0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_other_heads_on_the_way_up():
    """As a network with two heads whose way up is taken from one with four."""
    options = dict(attention="self", context_dim=None, transformer_depth=[1, 1])
    two, four, both = (unet(options | more) for more in ({"num_heads": 2}, {"num_heads": 4}, {"num_heads": 2, "up_heads": 4}))
    x, time, _ = inputs({})
    assert (two(x, time, Cond()) - four(x, time, Cond())).abs().max() > 1e-4
    two.up = four.up
    assert torch.equal(both(x, time, Cond()), two(x, time, Cond()))


def test_attention_after_some_of_the_blocks_alone():
    """LDM's num_attention_blocks, by its names: blocks on the way down are counted from 0, and those on the way up too."""
    options = dict(transformer_depth=[1, 1], num_res_blocks=2, attention_blocks=[1, 2])
    rows = unet_names.rows(unet(options), "compvis")
    found = {name.split(".1.norm.")[0] for row in rows for name in row.theirs if ".1.norm." in name}
    assert found == {"input_blocks.1", "input_blocks.4", "input_blocks.5", "middle_block", "output_blocks.0", "output_blocks.1", "output_blocks.3"}


def test_the_middle_may_look_at_the_text_alone():
    """Without attention on itself, two places of the same contents in the middle of a picture cannot tell each other apart."""
    network = unet({"middle_cross_only": True, "context_dim": 6})
    first = network.middle[0].attention.blocks[0].attn1
    assert first.to_k.in_features == first.to_v.in_features == 6 and first.to_q.in_features == 32
    x, other = torch.randn(1, 32, 2, 2), torch.randn(1, 32, 2, 2)
    other[..., 0, 0] = x[..., 0, 0]
    tokens, layer = torch.randn(1, 5, 6), network.middle[0].attention
    layer.norm = nn.Identity()  # which looks at the whole picture
    assert torch.allclose(layer(x, tokens, None)[..., 0, 0], layer(other, tokens, None)[..., 0, 0], atol=1e-6)
    full = unet({"context_dim": 6}).middle[0].attention
    full.norm = nn.Identity()
    assert not torch.allclose(full(x, tokens, None)[..., 0, 0], full(other, tokens, None)[..., 0, 0], atol=1e-4)


@pytest.mark.parametrize(("name", "shape", "multiple"), [("plain", (5, 8), 2), ("patches", (8, 6), 4),
                                                         ("three levels", (8, 2), 4)])  # fmt: skip
def test_sides_that_cannot_be_halved_are_named(name, shape, multiple):
    options = VARIANTS[name]
    _, time, cond = inputs(options)
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}: both sides have to be multiples of {multiple}"):
        unet(options)(torch.randn(2, 3, *shape), time, cond)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_come_back_to_their_place(patch):
    """The entrance folds patches into channels as the exit unfolds them: with the middle cut out, pictures pass through."""
    network = UNet(3, 3, model_channels=3 * patch**2, channel_mult=[1], num_res_blocks=1, transformer_depth=[0],
                   middle_depth=0, patch_size=patch)  # fmt: skip
    for conv in (network.conv_in, network.conv_out):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    network.norm_out = nn.Identity()
    network.down = network.middle = network.up = nn.ModuleList()
    x = torch.rand(2, 3, 8, 12)
    out = network(x, torch.zeros(2), Cond())
    assert torch.allclose(out, nn.functional.silu(x), atol=1e-6)  # which stands before the last convolution


def test_levels_and_depths_have_to_agree():
    with pytest.raises(ValueError, match=r"transformer_depth \[1\] needs one number for each of the 2 levels"):
        UNet(**{**SMALL, "transformer_depth": [1]})


def test_heads_have_to_divide_the_channels():
    with pytest.raises(ValueError, match="a level of 32 channels does not divide into 3 heads"):
        UNet(**{**SMALL, "num_heads": 3})


def test_context_defaults_to_the_picture_itself():
    network, (x, time, _) = unet(dict(context_dim=None)), inputs({})
    assert network(x, time, Cond()).isfinite().all()


@pytest.mark.parametrize("bare", [False, True])
def test_large_recipe_has_the_size_of_stable_diffusion_1(bare):
    """The same layers with the same widths, CLIP's 768 numbers a token: 859,520,964 parameters as published."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / "diffusion" / "ldm_txt2img_256.yaml"))
    block = config["model"]["params"]["network"]
    if bare:  # the defaults of the class
        block = {"target": block["target"]}
    with torch.device("meta"):
        network = build(block, in_channels=4, out_channels=4, context_dim=768, vector_dim=None)
    assert sum(p.numel() for p in network.parameters()) == 859_520_964
