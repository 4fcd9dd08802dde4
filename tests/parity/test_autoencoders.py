"""Autoencoders of CompVis and diffusers, read from their files, against the numbers that their own code gave.

tests/data/parity: ae_kl_f4, ae_vq_f4 and ae_vq_interface are checkpoints of autoencoders, diffusers_models folders of
diffusers; inpaint_concat and txt2img_bert hold the first stages of diffusion models, with the names and the numbers (in half
precision) that they have there. All weights are random.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ldm
from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.interop import compvis, diffusers, names

DATA = Path(__file__).parents[1] / "data"
PARITY = DATA / "parity"
CONFIGS = [pytest.param(True, id="yaml"), pytest.param(False, id="shapes")]  # the architecture from either


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of the tensor's scale."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def numbers(case: str) -> dict[str, torch.Tensor]:
    return load_file(PARITY / case / "io.safetensors")


def autoencoder(case: str, config: bool = True, file: str = "model.ckpt"):
    path = PARITY / case
    bundle = ldm.load(path / file, path / "config.yaml" if config else None)
    assert bundle.conditioner is None and bundle.denoiser is None
    spec = bundle.autoencoder.spec
    assert not spec.shift.any() and (spec.scale == 1).all() and spec.count == 0
    return bundle.autoencoder


def first_stage(case: str):
    """The autoencoder inside a diffusion model's checkpoint."""
    path, prefix = PARITY / case, compvis.FIRST_STAGE
    weights, config = load_file(path / "model.safetensors"), yaml.safe_load((path / "config.yaml").read_text())
    assert {value.dtype for name, value in weights.items() if name.startswith(prefix)} == {torch.float16}
    about, tensors = compvis.read(weights, config, case, prefix)
    assert about["kind"] == "autoencoder"
    return Bundle.from_config(about["config"]).assign(tensors).autoencoder


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_kl_f4(config):
    io, model = numbers("ae_kl_f4"), autoencoder("ae_kl_f4", config, "model.safetensors")
    x, noise = io["in.image"], io["in.posterior_noise"]
    mean, logvar = model.moments(x)
    close(mean, io["out.mode"])
    close(model.features(x), io["out.moments"])
    close((0.5 * logvar).exp(), io["out.std"])
    close(model.features(50 * x), io["out.moments_extreme"])
    close(model.encode(x), io["out.mode"])
    close(model.decode(mean), io["out.decoded_mode"])
    close(model.decode(io["in.z_in"]), io["out.decoded_from_z"])
    reconstruction, bottled = model(x, noise)
    close(bottled.latent, io["out.z_sample"])
    close(reconstruction, io["out.reconstruction"])
    for row, kl in enumerate(io["out.kl"]):
        close(model(x[row : row + 1], noise[row : row + 1])[1].losses["kl"], kl)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_vq_f4(config):
    io, model = numbers("ae_vq_f4"), autoencoder("ae_vq_f4", config)
    x = io["in.image"]
    codes = model.codes(x)
    assert torch.equal(codes.flatten(), io["out.indices"]) and codes.shape == (2, 16, 12)
    close(model.encode(x), io["out.prequant"])
    close(model.bottleneck.lookup(codes), io["out.codebook_entry"])
    close(model.decode(model.encode(x)), io["out.reconstruction"])  # the decoder quantises
    close(model.decode_codes(codes), io["out.reconstruction"])
    close(model.decoder(model.post(io["out.prequant"])), io["out.decoded_prequant_noquant"])
    reconstruction, bottled = model(x)
    close(bottled.latent, io["out.quant"])
    close(bottled.losses["codebook"], io["out.emb_loss"])
    close(reconstruction, io["out.reconstruction"])


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_vq_interface(config):
    io, model = numbers("ae_vq_interface"), autoencoder("ae_vq_interface", config)
    h = io["in.h_in"]
    close(model.encode(io["in.image"]), io["out.h"])
    close(model.decode(io["out.h"]), io["out.decoded_roundtrip"])
    close(model.decode(h), io["out.decoded"])
    close(model.decoder(model.post(h)), io["out.decoded_not_quantized"])
    bottled = model.bottleneck(h)
    close(model.bottleneck.quantise(h), io["out.quant_h_in"])
    close(bottled.losses["codebook"], io["out.emb_loss_h_in"])
    assert torch.equal(bottled.codes.flatten(), io["out.indices_h_in"])


@torch.no_grad()
def test_first_stage_of_inpainting():
    io, model = numbers("inpaint_concat"), first_stage("inpaint_concat")
    image, mask = io["in.image01"], io["in.mask01"]
    close(model.encode(2 * (1 - mask) * image - 1), io["out.c_masked_image"])
    decoded = model.decode(io["out.ddim10_ema"])
    close(decoded, io["out.decoded"])
    close((1 - mask) * image + mask * (0.5 * decoded + 0.5).clamp(0, 1), io["out.inpainted01"])


@torch.no_grad()
def test_first_stage_of_text_to_image():
    io, model = numbers("txt2img_bert"), first_stage("txt2img_bert")
    scale_factor = yaml.safe_load((PARITY / "txt2img_bert" / "config.yaml").read_text())["model"]["params"]["scale_factor"]
    model.scale.fill_(1 / scale_factor)
    close(model.decode(io["out.ddim10_cfg5"]), io["out.decoded"])


@torch.no_grad()
def test_kl_of_diffusers():
    io, model = numbers("diffusers_models"), ldm.load(PARITY / "diffusers_models" / "vae").autoencoder
    x, noise = io["in.image"], io["in.vae_noise"]
    mean, logvar = model.moments(x)
    close(mean, io["out.vae.mean"])
    close(logvar, io["out.vae.logvar"])
    close(model.encode(x), io["out.vae.mode_scaled"])
    close(model.decode_raw(io["in.z"]), io["out.vae.decode"])
    close(model.decode(0.18215 * io["in.z"]), io["out.vae.decode"])
    for row, kl in enumerate(io["out.vae.kl"]):
        _, bottled = model(x[row : row + 1], noise[row : row + 1])
        close(bottled.latent[0], io["out.vae.sample"][row])
        close(bottled.losses["kl"], kl)


@torch.no_grad()
def test_vq_of_diffusers():
    io, model = numbers("diffusers_models"), ldm.load(PARITY / "diffusers_models" / "vqmodel").autoencoder
    raw = model.moments(io["in.vq_image"])[0]
    close(raw, io["out.vq.encode"])
    close(model.decode(model.encode(io["in.vq_image"])), io["out.vq.decode_of_encode"])
    close(model.decode_raw(io["in.vq_z"]), io["out.vq.decode"])
    close(model.decoder(model.post(io["in.vq_z"])), io["out.vq.decode_not_quantized"])
    bottled = model.bottleneck(raw)
    close(bottled.latent, io["out.vq.quantized"])
    close(bottled.losses["codebook"], io["out.vq.loss"])
    assert torch.equal(bottled.codes.flatten(), io["out.vq.indices"])


# Published sizes: every key and shape of their checkpoints, on the meta device.

PUBLISHED = json.loads((DATA / "manifests" / "first_stages.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_of_published_autoencoders(name):
    listed = {key: torch.empty(shape, device="meta") for key, shape in PUBLISHED[name]["keys"].items()}
    block = compvis.block_of({"model": PUBLISHED[name]["model"]}, name)
    assert names.settings(compvis.infer(listed, name)) == names.settings(block)
    with torch.device("meta"):
        model = build(block).state_dict()
    table = names.table(names.Layout.of(block), "compvis")
    renamed = {table[key]: list(value.shape) for key, value in model.items() if key not in names.OURS_ALONE}
    assert renamed == PUBLISHED[name]["keys"]


def test_names_of_diffusers_for_stable_diffusion():
    """The same autoencoder, kl-f8 with 4 channels, has as many weights in either layout, each under one name."""
    block = compvis.infer({key: torch.empty(shape, device="meta") for key, shape in PUBLISHED["kl-f8"]["keys"].items()}, "x")
    with torch.device("meta"):
        model = build(block).state_dict()
    for layout in ("compvis", "diffusers"):
        table = names.table(names.Layout.of(block), layout)
        theirs = [table[key] for key in model if key in table]
        assert len(set(theirs)) == len(theirs) == len(PUBLISHED["kl-f8"]["keys"])
        assert compvis.holds(theirs) == (layout == "compvis")
        assert diffusers.holds(theirs) == (layout == "diffusers")
