"""Pipelines with more conditions than a text: each draws here what diffusers draws, and its weights are in CompVis' layout those
that diffusers' own converter reads."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from their_yaml import YAML
from tiny_pipelines import (
    PROMPT,
    SCALE,
    STEPS,
    depth_pipeline,
    inpainting_pipeline,
    pix2pix_pipeline,
    pixel_pipeline,
    refiner_pipeline,
    saved,
    seeded_call,
    start,
    superresolution_pipeline,
    text_call,
    unclip_pipeline,
    upscaling_pipeline,
    v_pipeline,
    xl_inpainting_pipeline,
    xl_pipeline,
)

import ldm
from ldm.common.files import UserError
from ldm.common.random import normal
from ldm.interop import compvis_writing, diffusers_writing

pytest.importorskip("diffusers", reason="diffusers is not installed")
torch.manual_seed(5)
IMAGE, MASK = torch.rand(1, 3, 32, 32), (torch.rand(1, 1, 32, 32) > 0.5).float()
SMALL_IMAGE, DEPTH, EMBEDDING = torch.rand(1, 3, 16, 16), torch.rand(1, 32, 32), torch.randn(1, 12)
SIGNED, TEXT = IMAGE * 2 - 1, {"caption": [PROMPT]}


def masked(pipeline, **more):
    """Their masked picture is a draw of the encoder's, ours its mode."""
    latent = pipeline.vae.encode(torch.where(MASK > 0.5, 0.0, SIGNED)).latent_dist.mode()
    return text_call(pipeline, image=IMAGE, mask_image=MASK, masked_image_latents=latent * 0.7, strength=1.0, **more)


def from_noise(pipeline, **given):
    """Of a pipeline that begins with a noisy picture, all of what comes after."""
    pipeline.prepare_latents = lambda *_, **__: start()
    return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="np", strength=1.0, **given).images


def noised(pipeline, stream, shape, **given):
    """With the noise on its condition that ours has."""
    noise = normal(shape, 0, stream, [0], torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise)
        return pipeline(prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="np", latents=start(),
                        **given).images  # fmt: skip


def upscaled(pipeline):
    return noised(pipeline, "low_res/noise", (3, 16, 16), image=SMALL_IMAGE, noise_level=20)


def of_embedding(pipeline):
    return noised(pipeline, "image_embedding/noise", (12,), image_embeds=EMBEDDING, noise_level=7, height=32, width=32)


XL = {**TEXT, "original_size": torch.tensor([[32, 32]]), "crop": torch.tensor([[0, 0]])}
PAINTED = {"image": SIGNED, "mask": MASK}
KINDS = {  # name -> (pipeline, how it is called, what ours is given, guidance, channels of the latent)
    "v": (v_pipeline, text_call, TEXT, SCALE, 4),
    "inpainting": (inpainting_pipeline, masked, TEXT | PAINTED, SCALE, 4),
    "pix2pix": (pix2pix_pipeline, lambda p: p(PROMPT, SIGNED, num_inference_steps=STEPS, guidance_scale=1.0, latents=start(),
                                              output_type="np").images, TEXT | {"image": SIGNED}, 1.0, 4),
    "depth": (depth_pipeline, lambda p: from_noise(p, image=IMAGE, depth_map=DEPTH), TEXT | {"depth": DEPTH}, SCALE, 4),
    "upscaler": (upscaling_pipeline, upscaled, TEXT | {"low_res": SMALL_IMAGE * 2 - 1, "noise_level": torch.tensor([20])}, SCALE, 4),
    "unclip": (unclip_pipeline, of_embedding, TEXT | {"image_embedding": EMBEDDING, "noise_level": torch.tensor([7])}, SCALE, 4),
    "xl": (xl_pipeline, text_call, XL | {"target_size": torch.tensor([[32, 32]])}, SCALE, 4),
    "refiner": (refiner_pipeline, lambda p: from_noise(p, image=IMAGE, original_size=(32, 32), target_size=(32, 32),
                                                       negative_aesthetic_score=6.0),
                XL | {"aesthetic": torch.tensor([[6.0]])}, SCALE, 4),
    "xl inpainting": (xl_inpainting_pipeline, masked, XL | PAINTED | {"target_size": torch.tensor([[32, 32]])}, SCALE, 4),
    "super-resolution": (superresolution_pipeline, lambda p: seeded_call(p, image=SMALL_IMAGE * 2 - 1),
                         {"low_res": SMALL_IMAGE * 2 - 1}, 1.0, 3),
    "pixels": (pixel_pipeline, lambda p: seeded_call(p, batch_size=1), 1, 1.0, 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (folder that diffusers wrote, its pipeline, its picture)."""
    root, found = tmp_path_factory.mktemp("pipelines"), {}

    def get(name):
        if name not in found:
            make, call, *_ = KINDS[name]
            pipeline = saved(make, root / name)
            found[name] = root / name, pipeline, picture(call(pipeline))
        return found[name]

    return get


def picture(images):
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)


def drawn(bundle, name):
    _, _, batch, scale, channels = KINDS[name]
    return (bundle.generate(batch, steps=STEPS, guidance=scale, x_T=start(channels)) + 1) / 2


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_same_picture_as_theirs(made, name):
    folder, _, expected = made(name)
    found = drawn(ldm.load(folder), name)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4


def same(ours, theirs):
    names = {name for name in ours if "vocabulary" not in name}
    return names == {name for name in theirs if "vocabulary" not in name} and all(torch.equal(ours[n], theirs[n]) for n in names)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("pixels", "super-resolution")])
def test_in_the_layout_of_compvis(made, name, tmp_path):
    """diffusers' own converter finds the weights of network and autoencoder; ours reads back every bit."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    folder, pipeline, expected = made(name)
    bundle = ldm.load(folder)
    if name == "xl inpainting":
        with pytest.raises(UserError, match="generative-models has no embedder like ldm.conditioners.spatial.MaskedImage"):
            compvis_writing.write(bundle)
        return
    tensors, _ = compvis_writing.write(bundle)
    network = convert_ldm_unet_checkpoint(dict(tensors), pipeline.unet.config)
    classes = {"class_embedding.weight": tensors["model.diffusion_model.label_emb.weight"]} if name == "upscaler" else {}
    assert same(network | classes, pipeline.unet.state_dict())
    if hasattr(pipeline, "vae"):
        assert same(convert_ldm_vae_checkpoint(dict(tensors), pipeline.vae.config), pipeline.vae.state_dict())
    save_file(tensors, tmp_path / "model.safetensors")
    compvis_writing.write_tokenizer(bundle, tmp_path)
    for said in (compvis_writing.write(bundle)[1], YAML[name]):  # what is written, and what their repository says
        (tmp_path / "model.yaml").write_text(json.dumps(said))
        again = ldm.load(tmp_path / "model.safetensors")
        assert same(again.state_dict(), bundle.state_dict())
        again.sampling = bundle.sampling  # which such files do not say
        assert (drawn(again, name) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_as_a_folder_again(made, name, tmp_path):
    """What diffusers has a pipeline for without parts that we have not comes back bit by bit and is loaded there."""
    from diffusers import DiffusionPipeline

    folder, _, expected = made(name)
    bundle = ldm.load(folder)
    if name in ("depth", "unclip"):
        with pytest.raises(UserError, match="diffusers has no pipeline with"):
            diffusers_writing.write(bundle, tmp_path / "out")
        return
    diffusers_writing.write(bundle, tmp_path / "out")
    assert same(ldm.load(tmp_path / "out").state_dict(), bundle.state_dict())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert (picture(KINDS[name][1](pipeline)) - expected).abs().max() < 1e-3
