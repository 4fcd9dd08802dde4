"""Autoencoders in the layout of diffusers: read natively, written so that diffusers itself computes the same."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.interop import compvis
from ldm.interop import diffusers as layout

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
SMALL = dict(block_out_channels=[16, 32], down_block_types=[DOWN] * 2, up_block_types=[UP] * 2, norm_num_groups=8,
             layers_per_block=1)  # fmt: skip
OPTIONS = {
    "as stable diffusion": {}, "as flux": dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
    "attention on the way down": dict(down_block_types=[DOWN, f"Attn{DOWN}"]),
    "attention on the way up": dict(up_block_types=[f"Attn{UP}", UP]), "no attention": dict(mid_block_add_attention=False),
    "channels": dict(in_channels=4, out_channels=1, latent_channels=3), "blocks": dict(layers_per_block=2),
    "statistics": dict(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 3.0, 4.0], scaling_factor=0.5),
    "three levels": dict(block_out_channels=[16, 16, 32], down_block_types=[DOWN] * 3, up_block_types=[UP] * 3),
}  # fmt: skip
VQ = {key: OPTIONS[key] for key in ("as stable diffusion", "attention on the way down", "no attention", "blocks")}
VQ["narrower codes"] = dict(latent_channels=5, vq_embed_dim=3, num_vq_embeddings=20)
CASES = [pytest.param("AutoencoderKL", options, id=f"kl: {name}") for name, options in OPTIONS.items()]
CASES += [pytest.param("VQModel", options, id=f"vq: {name}") for name, options in VQ.items()]


def written(folder, config: dict):
    """A folder as diffusers saves it, and the model: made here, without that package."""
    block = layout.block_of(config)
    torch.manual_seed(0)
    model = build(block).eval()
    bundle = Bundle(model, config={"model": {"params": {"autoencoder": block}}})
    for parameter in bundle.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    shift, scale = layout.statistics(config, "x")
    model.shift.copy_(shift.expand_as(model.shift))
    model.scale.copy_(scale.expand_as(model.scale))
    weights, said = layout.write(bundle)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(said))
    return model


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_out_and_in_again(tmp_path, kind, options):
    model = written(tmp_path, {"_class_name": kind, **SMALL, **options})
    bundle = ldm.load(tmp_path)
    assert bundle.conditioner is None and bundle.denoiser is None
    found, x = bundle.autoencoder, torch.randn(1, model.image_channels, 8, 12)
    assert torch.allclose(found.spec.scale, model.spec.scale) and torch.equal(found.spec.shift, model.spec.shift)
    assert torch.equal(found.moments(x)[0], model.moments(x)[0])
    z = model.moments(x)[0]
    assert torch.equal(found.decode_raw(z), model.decode_raw(z))
    assert ldm.load(tmp_path / "diffusion_pytorch_model.safetensors").content_hash() == bundle.content_hash()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_diffusers_computes_the_same(tmp_path, kind, options):
    """What it saved we read, what we write it loads: the same latents and pictures."""
    theirs = pytest.importorskip("diffusers", reason="the package diffusers (extra) is not installed")
    torch.manual_seed(0)
    net = getattr(theirs, kind)(**{**SMALL, **options}).eval()
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path / "theirs")
    bundle = ldm.load(tmp_path / "theirs")
    weights, config = layout.write(bundle)
    (tmp_path / "ours").mkdir()
    save_file(weights, tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    again = getattr(theirs, kind).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False).eval()
    assert again.state_dict().keys() == net.state_dict().keys()
    model, x = bundle.autoencoder, torch.rand(2, net.config.in_channels, 8, 12) * 2 - 1
    for other in (net, again):
        if kind == "VQModel":
            raw = other.encode(x).latents
            shift, scaling, std = 0.0, other.config.scaling_factor, 1.0
        else:
            posterior = other.encode(x).latent_dist
            raw = posterior.mean
            assert torch.allclose(model.moments(x)[1], posterior.logvar, atol=1e-5)
            mean, std = other.config.latents_mean, other.config.latents_std
            shift = torch.tensor(mean).view(-1, 1, 1) if mean else other.config.shift_factor or 0.0
            std, scaling = torch.tensor(std).view(-1, 1, 1) if std else 1.0, other.config.scaling_factor
        z = model.encode(x)
        assert torch.allclose(z, (raw - shift) * scaling / std, atol=1e-5 * float(raw.abs().max()))
        picture = other.decode(raw).sample
        assert torch.allclose(model.decode_raw(raw), picture, atol=1e-5 * float(picture.abs().max()))


def test_between_the_layouts(tmp_path):
    """From diffusers to CompVis and back nothing is lost but shift and scale, which are told."""
    config = {"_class_name": "AutoencoderKL", **SMALL, "block_out_channels": [32, 32], "norm_num_groups": 32}
    written(tmp_path, config)
    bundle = ldm.load(tmp_path)
    weights, yaml = compvis.write(bundle)
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")
    other = ldm.load(tmp_path / "x.ckpt", yaml).autoencoder
    assert not other.shift.any() and (other.scale == 1).all()
    other.scale.copy_(bundle.autoencoder.scale)
    assert other.content_hash() == bundle.autoencoder.content_hash()


def test_shift_and_scale_have_no_place_in_compvis(tmp_path, caplog):
    written(tmp_path, {"_class_name": "AutoencoderKL", **SMALL, "block_out_channels": [32, 32], "norm_num_groups": 32})
    with caplog.at_level(logging.WARNING):
        compvis.write(ldm.load(tmp_path))
    assert "shift and scale of the latents have no place" in caplog.text


def test_names_of_old_versions(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    written(tmp_path, {"_class_name": "AutoencoderKL", **SMALL})
    expected = ldm.load(tmp_path).content_hash()
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for new, name in old.items():
        weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in weights.items()}
    assert any(".query." in key for key in weights) and not any(".to_q." in key for key in weights)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    assert ldm.load(tmp_path).content_hash() == expected


def test_what_is_read_is_saved_as_ours(tmp_path):
    written(tmp_path, {"_class_name": "VQModel", **SMALL})
    bundle = ldm.load(tmp_path)
    bundle.save(tmp_path / "ours.ckpt")
    assert ldm.load(tmp_path / "ours.ckpt").content_hash() == bundle.content_hash()


# What is not to be read, and why.


def refused(call, *said):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_a_pipelines_folder_names_the_autoencoders(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    refused(lambda: ldm.load(tmp_path), "a pipeline folder of diffusers without a unet", "its autoencoder alone is in", str(tmp_path / "vae"))


def test_weights_without_their_config(tmp_path):
    written(tmp_path, {"_class_name": "AutoencoderKL", **SMALL})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    refused(lambda: ldm.load(file), "its config.json is expected beside it")
    assert ldm.load(file, config).autoencoder.factor == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderDC"}, "read are AutoencoderKL and VQModel; others run through diffusers itself: {target:"),
        ({"act_fn": "gelu"}, "act_fn: 'gelu'"),
        ({"norm_type": "spatial"}, "norm_type: 'spatial'"),
        ({"block_out_channels": [16, 24]}, "expected multiples of the first"),
        ({"down_block_types": ["DownBlock2D", DOWN]}, "blocks DownBlock2D; known are DownEncoderBlock2D"),
        ({"scaling_factor": 0}, "scaling_factor: 0"),
        ({"layers_per_block": 2}, "its tensors are not those of the model that is described: missing encoder 16 of"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, change, said):
    written(tmp_path, {"_class_name": "AutoencoderKL", **SMALL})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refused(lambda: ldm.load(tmp_path), str(tmp_path), said)


def test_a_config_that_is_none(tmp_path):
    written(tmp_path, {"_class_name": "AutoencoderKL", **SMALL})
    for text, said in (("{", "not JSON"), ("[1]", "expected the names and values of a config, got a list")):
        (tmp_path / "config.json").write_text(text)
        refused(lambda: ldm.load(tmp_path), "config.json", said)


def test_what_has_no_place_there():
    def bundle(channels=4, **params):
        bottleneck = {"target": "autoencoder.bottlenecks.KL", "params": {"channels": channels}}
        block = {"target": "autoencoder.model.convolutional",
                 "params": {"bottleneck": bottleneck, "width": 32, "mult": [1, 1], "blocks": 1} | params}  # fmt: skip
        return Bundle(build(block), config={"model": {"params": {"autoencoder": block}}})

    vq = {"target": "autoencoder.bottlenecks.VQ", "params": {"channels": 4, "codes": 8}}
    for params, said in (({"tanh": True}, "tanh: True"), ({"conv_resample": False}, "conv_resample: False"),
                         ({"attention_kind": "linear"}, "attention_kind: linear"), ({"features": 6}, "features: 6, only 4"),
                         ({"bottleneck": vq, "post": False}, "post: False")):  # fmt: skip
        refused(lambda params=params: layout.write(bundle(**params)), said)
    shifted = bundle(bottleneck=vq)
    shifted.autoencoder.shift.fill_(1)
    refused(lambda: layout.write(shifted), "no shift")
