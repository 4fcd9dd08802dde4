"""Autoencoders in the layout of CompVis, of every option that their configs have, in and out."""

import copy
import logging
import sys
import types

import pytest
import torch
import yaml
from safetensors.torch import save_file
from two_stages import write_configs

import ldm
from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.interop import compvis, names
from main import main

DD = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
          attn_resolutions=[], dropout=0.0)  # fmt: skip
LOSS = {"loss.logvar": torch.tensor(0.3), "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}  # fmt: skip
OPTIONS = {
    "as published": {}, "attention at the side of 16": {"attn_resolutions": [16]}, "everywhere": {"attn_resolutions": [32, 16]},
    "no attention": {"attn_type": "none", "attn_resolutions": [16]}, "memory-saving": {"attn_type": "vanilla-xformers"},
    "linear": {"attn_type": "linear", "attn_resolutions": [16]}, "linear by the old name": {"use_linear_attn": True},
    "no convolution between levels": {"resamp_with_conv": False}, "bounded": {"tanh_out": True}, "features": {"give_pre_end": True},
    "another number of channels out": {"in_channels": 4, "out_ch": 1}, "wider inside": {"z_channels": 6},
    "three levels, first one wide": {"ch_mult": [2, 1, 1], "num_res_blocks": 2}, "one level": {"ch_mult": [1]},
}  # fmt: skip


def yaml_of(kind: str = "AutoencoderKL", embed_dim: int = 4, **options) -> dict:
    params = {"embed_dim": embed_dim, "lossconfig": {"target": "torch.nn.Identity"}, "monitor": "val/rec_loss"}
    if kind != "AutoencoderKL":
        params["n_embed"], options["double_z"] = 16, False
    return {"model": {"target": f"ldm.models.autoencoder.{kind}", "params": {**params, "ddconfig": {**DD, **options}}}}


def made(config: dict) -> tuple[Bundle, dict[str, torch.Tensor]]:
    """A bundle with random weights and the same weights by the names of CompVis."""
    block = compvis.block_of(config)
    torch.manual_seed(0)
    bundle = Bundle(build(block).eval(), config={"model": {"target": "x", "params": {"autoencoder": block}}})
    for parameter in bundle.parameters():  # norms and biases too
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    table, weights = names.table(names.Layout.of(block), "compvis"), bundle.autoencoder.state_dict()
    return bundle, {table[key]: value for key, value in weights.items() if key in table}


@pytest.fixture
def lightning(monkeypatch):
    """A pickled class among the callbacks, as in every checkpoint of theirs."""
    module = types.ModuleType("lightning_of_old")
    exec("class ModelCheckpoint: pass", module.__dict__)
    module.ModelCheckpoint.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return {"epoch": 1, "global_step": 7, "callbacks": {module.ModelCheckpoint: {}}}


def saved(path, weights, **more):
    torch.save({"state_dict": weights, **more}, path)
    return path


def refused(call, *said):
    with pytest.raises(UserError) as error:
        call()
    for words in said:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_goes_out_and_comes_back(tmp_path, lightning, kind, option):
    config = yaml_of(kind, **OPTIONS[option])
    bundle, weights = made(config)
    dd = config["model"]["params"]["ddconfig"]
    path = saved(tmp_path / "model.ckpt", weights | LOSS, **lightning)
    found = ldm.load(path, config).autoencoder
    x = torch.randn(1, dd["in_channels"], 8, 12)
    z = bundle.autoencoder.encode(x)
    assert torch.equal(found.encode(x), z) and torch.equal(found.decode(z), bundle.autoencoder.decode(z))
    assert found.content_hash() == bundle.autoencoder.content_hash()
    assert found.decode(z).shape == (1, 32 if option == "features" else dd["out_ch"], 8, 12)
    assert found.decode(z).abs().max() <= 1 or option != "bounded"
    if option not in ("bounded", "features"):  # those leave no trace in the weights
        assert ldm.load(path).autoencoder.content_hash() == found.content_hash()
        assert torch.equal(ldm.load(path).autoencoder.decode(z), found.decode(z))
    again, said = compvis.write(ldm.load(path, config))
    assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in again)
    assert names.settings(compvis.block_of(said)) == names.settings(compvis.block_of(config))


def test_what_is_read_is_saved_as_ours(tmp_path, lightning):
    config = yaml_of("VQModelInterface", tanh_out=True)
    path = saved(tmp_path / "model.ckpt", made(config)[1], **lightning)
    bundle = ldm.load(path, config)
    bundle.save(tmp_path / "ours.safetensors")
    again = ldm.load(tmp_path / "ours.safetensors")
    assert again.content_hash() == bundle.content_hash() and again.autoencoder.decoder.tanh
    assert not any(part.training for part in bundle.modules())


def test_configs_are_read_from_yaml_files_too(tmp_path):
    from omegaconf import OmegaConf

    config = yaml_of(tanh_out=True)
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    path = saved(tmp_path / "model.ckpt", made(config)[1])
    (tmp_path / "config.json").write_text("{}")  # of whatever else lies there
    assert not ldm.load(path).autoencoder.decoder.tanh
    assert ldm.load(path, tmp_path / "config.yaml").autoencoder.decoder.tanh
    assert ldm.load(path, OmegaConf.create(config)).autoencoder.decoder.tanh


def test_sides_that_do_not_halve_evenly():
    """Their encoder halves the side of a picture with the remainder lost, their decoder doubles what is left."""
    params = compvis.block_of(yaml_of(resolution=30, ch_mult=[1, 1, 1], attn_resolutions=[30, 14, 7]))["params"]
    assert params["attention_levels"] == [0, 2] and params["decoder_attention_levels"] == [1, 2]


def test_what_only_training_needs_is_left_behind(tmp_path, caplog):
    _, weights = made(yaml_of())
    with caplog.at_level(logging.INFO, "ldm.interop"):
        ldm.load(saved(tmp_path / "x.ckpt", weights | LOSS | {"colorize": torch.zeros(3, 9, 1, 1)}))
    assert f"{len(weights)} weights in the layout of CompVis; left behind: 3 of loss, 1 of colorize" in caplog.text


def test_numbers_beside_the_weights_are_left_behind(tmp_path):
    _, weights = made(yaml_of())
    path = saved(tmp_path / "x.ckpt", weights)
    torch.save({**weights, "epoch": 3, "global_step": 7, "note": "x", "lr": None}, tmp_path / "flat.ckpt")
    for config in (yaml_of(), None):
        assert ldm.load(tmp_path / "flat.ckpt", config).content_hash() == ldm.load(path, config).content_hash()


def test_averaged_weights(tmp_path, caplog):
    _, weights = made(yaml_of("VQModel"))
    averages = {"model_ema." + key.replace(".", ""): value + 1 for key, value in weights.items()}
    more = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)}
    path = saved(tmp_path / "x.ckpt", weights | averages | more)
    key = "decoder.mid.attn_1.q.weight"
    for ema, offset in ((True, 1), (False, 0)):
        found = compvis.write(ldm.load(path, ema=ema))[0]
        assert torch.equal(found[key], weights[key] + offset)
        assert torch.equal(found["quantize.embedding.weight"], weights["quantize.embedding.weight"] + offset)
    averages.popitem()
    found = compvis.write(ldm.load(saved(path, weights | averages | more)))[0]
    assert torch.equal(found[key], weights[key]) and "does not cover all weights; the raw ones are taken" in caplog.text


def test_half_precision_is_read_as_float32_unless_asked_for(tmp_path):
    _, weights = made(yaml_of())
    path = saved(tmp_path / "x.ckpt", {key: value.half() for key, value in weights.items()})
    for dtype in (None, torch.float16, torch.bfloat16):
        found = ldm.load(path, dtype=dtype).autoencoder
        assert {p.dtype for p in found.parameters()} == {dtype or torch.float32}
    assert torch.equal(ldm.load(path).autoencoder.post.weight, weights["post_quant_conv.weight"].half().float())


def test_without_the_convolutions_around_the_bottleneck(tmp_path):
    """As in the file of flux's autoencoder, a .safetensors without a word about itself."""
    _, weights = made(yaml_of())
    save_file({key: value.contiguous() for key, value in weights.items() if "quant_conv" not in key}, tmp_path / "ae.safetensors")
    found = ldm.load(tmp_path / "ae.safetensors").autoencoder
    assert isinstance(found.pre, torch.nn.Identity) and found.channels == 4
    assert found.decode(found.encode(torch.zeros(1, 3, 8, 8))).shape == (1, 3, 8, 8)


def test_inside_a_diffusion_models_checkpoint():
    config = yaml_of("VQModelInterface", attn_type="none")
    bundle, weights = made(config)
    around = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "channels": 4, "scale_factor": 0.2, "first_stage_config": config["model"]}}}  # fmt: skip
    whole = {"model.diffusion_model.out.2.weight": torch.zeros(1), "model_ema.decay": torch.zeros(1),
             **{compvis.FIRST_STAGE + key: value for key, value in weights.items()}}  # fmt: skip
    assert compvis.holds(whole, compvis.FIRST_STAGE) and not compvis.holds(whole)
    for given in (around, None):
        about, tensors = compvis.read(whole, given, "x", compvis.FIRST_STAGE)
        assert about["kind"] == "autoencoder"
        assert all(torch.equal(value, tensors[f"autoencoder.{key}"]) for key, value in bundle.autoencoder.state_dict().items())


def test_pixels():
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "channels": 4, "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}}}}  # fmt: skip
    identity = build(compvis.block_of(config))
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(identity.encode(x), x) and identity.factor == 1
    about, tensors = compvis.read({"model.diffusion_model.out.2.weight": x}, config, "x", compvis.FIRST_STAGE)
    assert Bundle.from_config(about["config"]).assign(tensors).autoencoder.content_hash() == identity.content_hash()


# What is not to be read, and why.


def test_missing_and_unknown_weights_are_counted(tmp_path):
    _, weights = made(yaml_of())
    given = {key: value for key, value in weights.items() if not key.startswith("decoder.mid")} | {"stray": torch.zeros(1)}
    given["quant_conv.weight"] = torch.zeros(8, 9)
    n = sum(key.startswith("decoder.") for key in weights)
    path = saved(tmp_path / "x.ckpt", given | LOSS)
    refused(lambda: ldm.load(path, yaml_of()), "x.ckpt: its tensors are not those", f"missing decoder 26 of {n} (decoder.mid.",
            "unknown stray 1 of 1", "quant_conv.weight makes 8x9, not 8x8x1x1")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ch": 64}, "encoder.conv_in.weight makes 32x3x3x3, not 64x3x3x3"),
        ({"attn_type": "flash"}, "ddconfig.attn_type: 'flash' is not known here; there are vanilla"),
        ({"double_z": False}, "ddconfig.double_z: expected true for KL kinds, false for VQ, got False"),
        ({"num_res_blocks": None}, "ddconfig.num_res_blocks: missing"),
        ({"z_channels": "four"}, "model.params.ddconfig.z_channels: expected a whole number from 1, got 'four'"),
        ({"ch_mult": [1, 0]}, "ddconfig.ch_mult: expected a list of whole numbers from 1, got [1, 0]"),
        ({"dropout": 2}, "cannot be built: dropout probability"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, change, said):
    path = saved(tmp_path / "x.ckpt", made(yaml_of())[1])
    refused(lambda: ldm.load(path, yaml_of(**change)), "x.ckpt", said)


def test_configs_of_something_else(tmp_path):
    path = saved(tmp_path / "x.ckpt", made(yaml_of())[1])
    for place, value, said in (
        ("target", "ldm.models.autoencoder.AutoencodrKL", "nearest: 'AutoencoderKL'"),
        ("target", None, "with model.target and model.params.ddconfig"),
        ("params", {"embed_dim": 4}, "model.params.ddconfig.resolution: missing"),
    ):
        config = copy.deepcopy(yaml_of())
        config["model"][place] = value
        refused(lambda config=config: ldm.load(path, config), said)
    vq = yaml_of("VQModel")
    del vq["model"]["params"]["n_embed"]
    refused(lambda: compvis.block_of(vq), "model.params.n_embed: missing")
    vq["model"]["params"] |= {"n_embed": 16, "remap": "used.npy"}
    refused(lambda: compvis.block_of(vq), "remap: 'used.npy'")


def test_codes_under_other_names(tmp_path):
    _, weights = made(yaml_of("VQModel"))
    path = saved(tmp_path / "x.ckpt", weights | {"quantize.used": torch.arange(5)})
    refused(lambda: ldm.load(path), "remapped codes")


def test_shapes_that_do_not_tell(tmp_path):
    path = saved(tmp_path / "x.ckpt", {"encoder.down.0.block.0.conv1.weight": torch.zeros(2, 2, 3, 3)})
    refused(lambda: ldm.load(path), "do not tell the architecture", "give the yaml that it was trained with")


def test_a_diffusion_model_of_no_known_shape_asks_for_its_yaml(tmp_path, lightning):
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3), "first_stage_model.encoder.down.0.block.0.x": torch.zeros(1)}
    refused(lambda: ldm.load(saved(tmp_path / "sd.ckpt", weights)), "not those of a published one", "give the yaml")
    refused(lambda: ldm.load(saved(tmp_path / "sd.ckpt", weights, **lightning)), "sd.ckpt")


def test_what_has_no_place_there():
    def bundle(**params):
        bottleneck = {"target": "autoencoder.bottlenecks.KL", "params": {"channels": 4}}
        block = {"target": names.CONVOLUTIONAL, "params": {"bottleneck": bottleneck, "width": 32, "mult": [1], "blocks": 1} | params}
        return Bundle(build(block), config={"model": {"params": {"autoencoder": block}}})

    assert compvis.write(bundle())[1]["model"]["params"]["ddconfig"]["ch"] == 32
    for params, said in (({"patch": 2}, "patch: 2"), ({"width": 16}, "groups of normalisation"), ({"pre": False}, "pre: False"),
                         ({"bottleneck": {"target": "autoencoder.bottlenecks.Plain"}}, "no bottleneck autoencoder.bottlenecks.Plain")):  # fmt: skip
        refused(lambda params=params: compvis.write(bundle(**params)), said)
    other = Bundle(bundle().autoencoder, config={"autoencoder": {"target": "my.Own"}})
    refused(lambda: compvis.write(other), "my.Own has no counterpart")


def test_stage_2_trains_on_one_by_config(monkeypatch, tmp_path, text_encoder, lightning):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what is set while a test runs is gone afterwards
    _, weights = made(yaml_of("VQModelInterface", embed_dim=3, z_channels=3, ch_mult=[1, 1, 1]))
    saved(tmp_path / "vq.ckpt", weights, **lightning)
    config = yaml.safe_load((write_configs(tmp_path, text_encoder) / "ldm.yaml").read_text())
    config["autoencoder"], config["trainer"]["max_steps"] = {"ckpt": str(tmp_path / "vq.ckpt")}, 2
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump(config))
    assert main(["--base", str(tmp_path / "foreign.yaml"), "-t", "--logdir", str(tmp_path / "logs")]) == 0
    (run,) = (tmp_path / "logs").glob("tiny_ldm-*")
    spec = ldm.load(run).autoencoder.spec
    assert (spec.channels, spec.factor) == (3, 4) and spec.count > 0  # measured, as it came without statistics
