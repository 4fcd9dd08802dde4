"""Bundle: built from a config, saved, sampled from."""

import copy
import logging
import math
from functools import partial

import pytest
import torch

from ldm.bundle import Bundle, check_size
from ldm.common.files import UserError
from ldm.denoiser import bind
from ldm.guidance import cfg
from ldm.load import load
from ldm.samplers import SAMPLERS, ddim, heun
from ldm.times import karras, linear

PROMPTS = ["a small red circle", "a large blue star on a white background", "green", "a black square of the background"]


def filled(config):
    """A model of this config with small random weights."""
    bundle = Bundle.from_config(config)
    source = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(value.shape, generator=source) * 0.1 for key, value in bundle.state_dict().items()}
    return bundle.assign(weights | {"autoencoder.shift": torch.zeros(4), "autoencoder.scale": torch.ones(4)})


# Built and saved.


def test_sizes_are_derived(model_config):
    bundle = Bundle.from_config(model_config)
    network = bundle.denoiser.network
    assert (network.conv_in.in_channels, network.conv_out.out_channels) == (4, 4)
    assert network.up[0].attention.blocks[0].attn2.to_k.in_features == bundle.conditioner.width == 32
    assert not any(part.training for part in bundle.modules())


def test_what_a_state_dict_brings_is_made_without_memory_and_all_else_for_real(model_config):
    config = copy.deepcopy(model_config)
    config["model"]["params"] |= {"process": {"target": "ldm.process.DDPM"}, "parameterization": "noise"}
    config["autoencoder"]["params"]["bottleneck"] = {"target": "autoencoder.bottlenecks.VQ", "params": {"codes": 8}}
    bundle = Bundle.from_config(config)
    assert all(p.is_meta for p in bundle.denoiser.parameters())
    assert not bundle.denoiser.process.alpha_bar.is_meta  # a table, not a weight
    assert not bundle.conditioner.anchor.is_meta
    assert filled(config).generate(PROMPTS[:2], steps=3).isfinite().all()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_gives_the_same_model(bundle, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    bundle.save(path)
    other = load(path)
    ours, theirs = bundle.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert other.config == bundle.config and other.sampling == bundle.sampling
    assert other.content_hash() == bundle.content_hash()
    assert torch.equal(other.generate(PROMPTS, seed=5), bundle.generate(PROMPTS, seed=5))
    assert path.stat().st_size <= 1.05 * 4 * sum(value.numel() for value in ours.values()) + 40_000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_ckpt_holds_plain_data_only(bundle, tmp_path):
    bundle.save(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert saved["ldm"]["kind"] == "diffusion" and saved["ldm"]["sampling"]["size"] == [32, 32]
    assert saved["ldm"]["autoencoder_hash"] == bundle.autoencoder.content_hash()
    assert saved["ldm"]["encoder_hash"] == bundle.conditioner.encoder_hash  # the frozen encoder is there by its hash
    assert not any(key.startswith("conditioner.encoder") for key in saved["state_dict"])


def test_saved_over_the_file_that_it_was_loaded_from(bundle, tmp_path):
    for name in ("model.ckpt", "model.safetensors"):
        bundle.save(tmp_path / name)
        mapped = load(tmp_path / name)
        mapped.save(tmp_path / name)
        assert load(tmp_path / name).content_hash() == mapped.content_hash() == bundle.content_hash()


def test_other_suffixes_are_refused(bundle, tmp_path):
    with pytest.raises(UserError, match="model.pt: .*safetensors or .ckpt"):
        bundle.save(tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_told_part_by_part(model_config, bundle):
    weights = bundle.state_dict()
    dropped = {key: value for key, value in weights.items() if not key.startswith("conditioner.blocks")}
    dropped["denoiser.network.conv_in.weight"] = torch.zeros(3, 4)
    dropped["denoiser.network.head.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        Bundle.from_config(model_config).assign(dropped, "some.ckpt")
    autoencoder = sum(key.startswith("autoencoder.") for key in weights)
    said = str(error.value)
    assert said.startswith("some.ckpt:") and "\n" not in said
    assert f"autoencoder {autoencoder}/{autoencoder}, conditioner 4/" in said
    assert "missing conditioner.blocks.0." in said
    assert "denoiser.network.conv_in.weight is 3x4, not 32x4x3x3" in said
    assert "1 that it has no place for (denoiser.network.head.weight)" in said


def test_foreign_code_is_not_run(model_config):
    config = copy.deepcopy(model_config)
    config["model"]["params"]["network"] = {"target": "os.system", "params": {"command": "touch owned"}}
    with pytest.raises(UserError, match="os.system.*--trust"):
        Bundle.from_config(config)


# Pictures.


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim", "ddpm", "heun"])
def test_a_picture_depends_on_its_own_seed_and_prompt_alone(bundle, sampler):
    together = bundle.generate(PROMPTS, sampler=sampler, seed=7)
    assert together.shape == (4, 3, 32, 32) and together.abs().max() <= 1 and together.std() > 0.1
    for size in (1, 3):
        parts = bundle.generate(PROMPTS, sampler=sampler, seed=7, batch_size=size)
        torch.testing.assert_close(parts, together, rtol=0, atol=1e-5)
        if size == 1:  # to the last bit
            assert torch.equal(parts[2:3], bundle.generate(PROMPTS[2:3], sampler=sampler, seed=9))
            assert torch.equal(parts[2:3], bundle.generate(PROMPTS[2:3], sampler=sampler, seed=2, indices=[7]))


def test_seeds(bundle):
    first, same, other = (bundle.generate(["a red star"] * 2, sampler="ddpm", seed=seed) for seed in (0, 0, 10))
    assert torch.equal(first, same)
    assert (first - other).abs().mean() > 0.05 and (first[0] - first[1]).abs().mean() > 0.05


def test_generate_is_sampler_guidance_and_decoder(bundle):
    steps, scale = 3, 2.5
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cond, null = bundle.conditioner({"caption": PROMPTS[:2]}), bundle.conditioner({"caption": ["", ""]})
        denoise = cfg(bind(bundle.denoiser, cond), bind(bundle.denoiser, null), scale)
        z = heun(denoise, x, linear(bundle.denoiser.process, steps), bundle.denoiser.process)
        by_hand = bundle.autoencoder.decode(z).clamp(-1, 1)
    made = bundle.generate(PROMPTS[:2], x_T=x, sampler="heun", steps=steps, guidance=scale)
    torch.testing.assert_close(made, by_hand, rtol=0, atol=1e-5)
    times = linear(bundle.denoiser.process, steps)
    torch.testing.assert_close(bundle.generate(PROMPTS[:2], x_T=x, sampler=heun, times=times, guidance=scale), made)


def test_the_start_has_the_spread_of_the_process(model_config):
    config = copy.deepcopy(model_config)
    config["model"]["params"]["process"] = {"target": "ldm.process.EDM"}
    seen = []
    filled(config).generate(["a"] * 8, callback=lambda step, t, x, guess: seen.append(float(x.std())), sampler="euler")
    assert math.isclose(seen[0], 80, rel_tol=0.1)


def test_the_start_and_the_range_of_x0_are_the_models(bundle):
    """A flow begins with noise alone; here 0.9 of the way there is 0.1 of the data's deviation too."""
    seen = []

    def first(step, t, x, guess):
        seen.append((x, guess))

    plain, times = copy.copy(bundle), [0.9, 0.5, 0.0]
    for start, spread in ((None, math.hypot(0.1, 0.9)), ("noise", 0.9), (2.0, 2.0)):
        plain.sampling = bundle.sampling | {"start": start, "x0": {"name": "clip", "bound": 0.25}}
        plain.generate("green", times=times, sampler="euler", callback=first)
        assert torch.allclose(seen[-2][0] / spread, seen[0][0] / math.hypot(0.1, 0.9), atol=1e-6)
    assert all(guess.x0.abs().max() == 0.25 for _, guess in seen)


def test_words_steer(bundle):
    plain, *others = (
        bundle.generate(["a red circle"], guidance=guidance, negative_prompt=negative)
        for guidance, negative in ((1, None), (1, "blue"), (3, None), (3, ""), (3, "blue star"), (3, ["blue star"]))
    )
    unguided, guided, empty, negative, listed = others
    assert torch.equal(plain, unguided)  # without guidance there is nothing to lead away from
    assert torch.equal(guided, empty) and torch.equal(negative, listed)
    assert not torch.equal(plain, guided) and not torch.equal(guided, negative)


def test_stored_text_states_are_taken_as_captions(bundle):
    states, mask = bundle.conditioner.encode(PROMPTS)
    batch = {"caption": PROMPTS, "text_states": states, "text_mask": mask}
    for size in (None, 3):
        made = bundle.generate(batch, batch_size=size)
        torch.testing.assert_close(made, bundle.generate(PROMPTS, batch_size=size), rtol=0, atol=1e-5)


def test_training_mode_comes_back(bundle):
    other = copy.deepcopy(bundle).train()
    other.denoiser.network.down.eval()
    other.denoiser.network.up[0].res.dropout.p = 0.9
    assert torch.equal(other.generate(PROMPTS), bundle.generate(PROMPTS))
    assert other.training and other.denoiser.network.up[0].res.dropout.training
    assert not other.denoiser.network.down[0].training
    assert other.denoiser.network.conv_in.weight.requires_grad and torch.is_grad_enabled()


def test_null_states_made_while_sampling_can_be_trained_on(bundle):
    other = copy.deepcopy(bundle)
    other.generate(["a"])
    other.conditioner.null(1).tokens.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in other.conditioner.parameters())


def test_every_step_is_reported(bundle):
    seen = []
    bundle.generate(PROMPTS, steps=3, batch_size=3, callback=lambda step, t, x, guess: seen.append((step, len(x))))
    assert seen == [(0, 3), (1, 3), (2, 3), (0, 1), (1, 1), (2, 1)]


def test_half_precision_is_close(bundle, tmp_path):
    bundle.save(tmp_path / "model.safetensors")
    half = load(tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    assert half.autoencoder.content_hash() == bundle.autoencoder.content_hash()
    made, exact = half.generate(PROMPTS), bundle.generate(PROMPTS)
    assert made.dtype == torch.float32 and 0 < (made - exact).abs().mean() < 0.05


def test_decoded_by_tiles(bundle):
    size = dict(size=(96, 160), steps=1, guidance=1.0)
    at_once = bundle.generate(PROMPTS[:2], **size)
    seen = []
    handle = bundle.autoencoder.decoder.levels[-1][0].register_forward_hook(lambda *_: seen.append(1))
    try:
        tiled = bundle.generate(PROMPTS[:2], tile=64, **size)
    finally:
        handle.remove()
    assert not seen and (tiled - at_once).abs().mean() < 1e-5  # the layers were not called on whole maps


def test_an_autoencoder_in_half_precision(bundle):
    half = copy.deepcopy(bundle)
    half.autoencoder.to(torch.bfloat16)
    options = dict(seed=5, steps=1, guidance=1.0)
    pictures, exact = half.generate(PROMPTS, **options), bundle.generate(PROMPTS, **options)
    assert pictures.dtype is torch.float32 and 0 < (pictures - exact).abs().mean() < 0.02
    assert (half.generate(PROMPTS[:1], tile=64, **options) - pictures[:1]).abs().mean() < 0.02


def test_convolutions_are_channels_last_when_something_is_drawn(bundle, tmp_path):
    """Not when they are loaded: the file stays mapped."""
    bundle.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.denoiser.network.conv_in.weight.is_contiguous()
    loaded.generate(PROMPTS[:1], steps=1)
    for weight in (loaded.autoencoder.decoder.levels[0][0].conv1.weight, loaded.denoiser.network.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_without_a_conditioner(model_config):
    config = copy.deepcopy(model_config)
    del config["model"]["params"]["conditioner"]
    config["model"]["params"]["network"]["params"]["transformer_depth"] = [0, 0]
    config["model"]["params"]["network"]["params"]["middle_depth"] = 0
    bundle = filled(config)
    assert bundle.conditioner is None and bundle.generate(["", ""]).shape == (2, 3, 32, 32)


# What cannot be.


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((100, 72), "96 x 72 or 104 x 72"), ((4, 9), "8 x 8 or 8 x 16"), ((0, 32), "8 x 32")],
)
def test_a_size_that_does_not_divide_names_the_nearest(bundle, size, nearest):
    with pytest.raises(UserError, match=rf"height {size[0]} x width {size[1]}: .*multiples of 8 .*nearest: {nearest}$"):
        bundle.generate(["a"], size=size)


def test_sizes_that_divide():
    check_size(64, 96, 8, 4)
    with pytest.raises(UserError, match="64 x 96 or 64 x 128"):
        check_size(64, 100, 8, 4)


def test_other_sizes_than_the_stored(bundle):
    assert bundle.generate(["a"], size=(40, 24)).shape == (1, 3, 40, 24)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampler": "dpmpp2m"}, "sampler: there is no 'dpmpp2m'; nearest: 'dpmpp_2m'; there are ddpm"),
        ({"times": "lines"}, "nearest: 'linear'"),
        ({"steps": 0}, "steps: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"indices": [1]}, "indices: 1 for 2 prompts"),
        ({"negative_prompt": ["a"]}, "negative_prompt: 1 for 2"),
    ],
)
def test_mistakes_are_told(bundle, options, said):
    with pytest.raises(UserError, match=said):
        bundle.generate(["a", "the"], **options)


def test_no_prompt(bundle):
    with pytest.raises(UserError, match="prompts"):
        bundle.generate([])


def test_an_autoencoder_alone_draws_nothing(bundle):
    with pytest.raises(UserError, match="autoencoder alone"):
        Bundle(bundle.autoencoder).generate(["a"])


def test_guidance_without_caption_dropout_is_warned_of_once(model_config, caplog):
    config = copy.deepcopy(model_config)
    config["model"]["params"]["conditioner"]["params"]["dropout"] = 0.0
    bundle = filled(config)
    with caplog.at_level(logging.WARNING):
        bundle.generate(["a"], guidance=1)
        assert not caplog.records
        bundle.generate(["a"])
        bundle.generate(["a"])
    assert [record.getMessage()[:12] for record in caplog.records] == ["guidance 2: "]


def test_another_text_encoder_is_refused(bundle):
    about = {"encoder_hash": "0123456789abcdef"}
    other = Bundle(bundle.autoencoder, bundle.conditioner, bundle.denoiser, bundle.config, bundle.sampling, about)
    with pytest.raises(UserError, match=f"hash {bundle.conditioner.encoder_hash}.*0123456789abcdef"):
        other.generate(["a"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_is_its_own_with_every_sampler(bundle, name):
    together = bundle.generate(PROMPTS[:3], sampler=name, steps=3, seed=7)
    assert together.isfinite().all()
    alone = bundle.generate(PROMPTS[1:2], sampler=name, steps=3, seed=7, indices=[1])
    rounding = 0.1 if name == "dpm_adaptive" else 1e-3  # whose steps depend on the error that it measures
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=rounding)


def test_options_of_samplers_and_times(bundle):
    def draw(**more):
        return bundle.generate(PROMPTS[:2], **{"steps": 3, "sampler": "ddim", **more})

    process = bundle.denoiser.process
    assert torch.equal(draw(sampler={"name": "ddim", "eta": 1.0}), draw(sampler=partial(ddim, eta=1.0)))
    assert not torch.equal(draw(sampler={"name": "ddim", "eta": 1.0}), draw())
    assert torch.equal(draw(times={"name": "karras", "rho": 5}), draw(times=karras(process, 3, rho=5), steps=None))
    assert torch.equal(draw(times=[1, 0.7, 0.2, 0]), draw(times=torch.tensor([1, 0.7, 0.2, 0]).double(), steps=None))
    assert torch.equal(draw(times=[1, 0.3, 0], steps=None), draw(times=[1, 0.3, 0], steps=2))
    assert not torch.equal(draw(times=[1, 0.3, 0], steps=4), draw(times=[1, 0.3, 0], steps=2))


def test_parts_of_guidance(bundle):
    def draw(guidance, other=bundle):
        return other.generate(PROMPTS[:2], steps=4, guidance=guidance)

    everywhere, nowhere = draw(3.0), draw(1.0)
    assert torch.equal(draw({"scale": 3, "low": 0, "high": 1}), everywhere)
    assert torch.equal(draw({"scale": 3, "low": 2}), nowhere) and torch.equal(draw({"scale": 3, "high": -1}), nowhere)
    early = draw({"scale": 3, "low": 0.5})
    rescaled = draw({"scale": 3, "rescale": 0.7})
    assert not any(torch.equal(a, b) for a, b in ((early, everywhere), (early, nowhere), (rescaled, everywhere)))
    stored = bundle.sampling | {"guidance": {"scale": 2.0, "low": 0.5}}
    other = Bundle(bundle.autoencoder, bundle.conditioner, bundle.denoiser, bundle.config, stored)
    assert torch.equal(draw(3, other), early) and torch.equal(draw({"scale": 3, "low": None}, other), everywhere)
    assert other.plan()["guidance"] == {"scale": 2.0, "low": 0.5, "high": None, "rescale": None, "channels": None}
