"""A whole Stable Diffusion 1 pipeline of diffusers (tiny, random weights), and the same in the original layout, against the numbers
that diffusers gave for each of its schedulers.

The networks' weights are not kept here, for their size; LDM_PARITY names a folder whose diffusers_models has them.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ldm
from ldm.common.build import build
from ldm.common.named import pick
from ldm.cond import Cond
from ldm.guidance import batched, cfg, rescale
from ldm.interop import compvis_models, diffusers_unet, schedulers, unet_names
from ldm.interop.component import read
from ldm.interop.rows import check, existing, to_us
from ldm.samplers import SAMPLERS
from ldm.times import make_times

HERE = Path(__file__).parents[1] / "data" / "parity" / "diffusers_models"
FOLDER = Path(os.environ.get("LDM_PARITY", HERE.parent)) / "diffusers_models"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}
DDIM = {**BETAS, "_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
DPM = {**BETAS, "_class_name": "DPMSolverMultistepScheduler"}
SCHEDULERS = {
    "ddim": DDIM, "ddim_eta1": DDIM, "ddim_g1": DDIM, "ddim_negative": DDIM, "ddim_rescale": DDIM, "ddim_clip_skip1": DDIM,
    "pndm": {**BETAS, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "euler": {**BETAS, "_class_name": "EulerDiscreteScheduler"}, "dpmpp": DPM, "dpmpp_karras": {**DPM, "use_karras_sigmas": True},
}  # fmt: skip


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def numbers():
    torch.set_num_threads(1)
    if not (FOLDER / "sd1_pipeline" / "unet").is_dir():
        pytest.skip("the pipeline is not kept here: LDM_PARITY names no folder that has it")
    return load_file(FOLDER / "io.safetensors"), json.loads((FOLDER / "prompts.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_of_every_scheduler(numbers, name):
    io, prompts = numbers
    bundle, said = ldm.load(FOLDER / "sd1_pipeline"), schedulers.read(SCHEDULERS[name], steps=10)
    process = build(said.process)
    bundle.denoiser.process = process
    batch = {"caption": prompts[:1]} | ({"negative_caption": prompts[1:2]} if name == "ddim_negative" else {})
    cond, null = bundle.conditioner.with_null(batch)
    if name == "ddim_clip_skip1":  # which leaves the negative prompt as it is
        bundle.conditioner.layer = bundle.conditioner.depth = bundle.conditioner.layer - 1
        cond = bundle.conditioner(batch)
    towards, away = batched(bundle.denoiser, cond, null)
    denoise = towards if name == "ddim_g1" else cfg(towards, away, 5.0)
    if name == "ddim_rescale":
        denoise = rescale(denoise, towards, process, 0.7, of="noise")
    times, states = make_times(said.sampling["times"], process, 10), []
    x = io["in.x_T"] * (float(process.exact(times[0])[1]) if said.sampling.get("start") == "noise" else 1.0)
    options = said.sampling["sampler"] | ({"eta": 1.0} if name == "ddim_eta1" else {})
    x = pick(options, SAMPLERS, "sampler")(denoise, x, times, process, noise=lambda k, shape: io["in.ddim_noise"][k],
                                           callback=lambda k, t, x, guess: states.append(x))  # fmt: skip
    expected = io[f"out.pipe.{name}.latents"]
    close(x, expected[-1])
    if name not in ("pndm", "euler"):  # their PNDM keeps a state twice, their Euler x / alpha
        close(torch.stack(states[1:]), expected[:-1])
    if f"out.pipe.{name}.decoded" in io:
        close(bundle.autoencoder.decode(x), io[f"out.pipe.{name}.decoded"])


@torch.no_grad()
def test_pictures_as_the_folder_says(numbers):
    io, prompts = numbers
    bundle = ldm.load(FOLDER / "sd1_pipeline")
    close(bundle.conditioner({"caption": prompts[:1]}).tokens, io["out.pipe.prompt_embeds"])
    close(bundle.conditioner.null(1).tokens, io["out.pipe.uncond_embeds"])
    found = bundle.generate(prompts[:1], steps=10, guidance=5.0, x_T=io["in.x_T"])
    close((found.permute(0, 2, 3, 1) + 1) / 2, io["out.pipe.ddim.image_np"])


def test_the_original_layout_is_the_same_model(numbers):
    """By the yaml of Stable Diffusion 1 with these sizes: every weight is equal."""
    folder = ldm.load(FOLDER / "sd1_pipeline")
    dd = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 2],
          "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    unet = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
            "channel_mult": [1, 1, 1, 2], "num_heads": 4, "use_spatial_transformer": True, "context_dim": 32, "legacy": False}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "linear_start": 0.00085, "linear_end": 0.012, "channels": 4, "scale_factor": 0.18215, "conditioning_key": "crossattn",
        "unet_config": {"params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": dd}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}}}}  # fmt: skip
    tensors = load_file(FOLDER / "sd1_original_layout.safetensors")
    _, weights = compvis_models.read(tensors, config, str(FOLDER / "x.ckpt"))
    expected = {name: value for name, value in folder.state_dict().items() if "vocabulary" not in name}
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], value) or "scale" in name and torch.allclose(weights[name], value)
               for name, value in expected.items())  # fmt: skip


@torch.no_grad()
def test_networks_and_gradients(numbers):
    io, _ = numbers
    for name, folder, key in (("unet1", "sd1_pipeline/unet", "in.ctx"), ("unet2", "unet_sd2", "in.ctx40")):
        config, tensors = read(FOLDER / folder)
        block, sizes = diffusers_unet.block_of(config, folder)
        network = build(block, **{key: value for key, value in sizes._asdict().items() if key != "vector"}).eval()
        rows = existing(unet_names.rows(network, "diffusers"), network.state_dict())
        found = to_us(rows, tensors)
        check(rows, tensors, network.state_dict(), found, folder)
        network.load_state_dict(found)
        x, tokens, time = io["in.x"], io[key], io["in.t"].float()
        close(network(x, time, Cond(tokens)), io[f"out.{name}.out"])
        if name == "unet2":
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
            mask[1, 7:] = False
            close(network(x, time, Cond(tokens, mask)), io["out.unet2.out_masked_ctx"])
            continue
        with torch.enable_grad():
            x, tokens = x.clone().requires_grad_(), tokens.clone().requires_grad_()
            out = network(x, time, Cond(tokens))
            grads = torch.autograd.grad((out * io["in.grad"]).sum(), (x, tokens))
        close(grads[0], io["out.unet1.grad_x"])
        close(grads[1].sum(1), io["out.unet1.grad_ctx_sum"], 1e-4)
