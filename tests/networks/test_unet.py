from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.common.build import build
from ldm.cond import Cond
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
