"""Folders as they were published, from diffusers 0.2 on: settings that came later are missing, weights have other names."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPT, start, text_pipeline

import ldm
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.interop import diffusers_unet, schedulers

pytest.importorskip("diffusers", reason="diffusers is not installed")

CROSS = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
COMMON = {"act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
          "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32}  # fmt: skip
SD = {"_class_name": "UNet2DConditionModel", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
      "down_block_types": CROSS[0], "up_block_types": CROSS[1], "in_channels": 4, "out_channels": 4, **COMMON}  # fmt: skip
TWO = {**SD, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
       "dual_cross_attention": False, "only_cross_attention": False, "upcast_attention": True}  # fmt: skip
XL = {**SD, "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
      "use_linear_projection": True, "upcast_attention": None}  # fmt: skip
PLAIN = {"_class_name": "UNet2DModel", "attention_head_dim": 32, "in_channels": 3, "out_channels": 3, **COMMON}
PUBLISHED = {  # unet/config.json, numbers of parameters that are published
    "stable diffusion 1": ({**SD, "cross_attention_dim": 768, "sample_size": 64}, 859_520_964),
    "stable diffusion 2": ({**TWO, "sample_size": 96}, 865_910_724),
    "unclip": ({**TWO, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}, None),
    "upscaler": ({**TWO, "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024], "num_class_embeds": 1000,
                  "down_block_types": ["DownBlock2D"] + CROSS[0][:3], "up_block_types": CROSS[1][1:] + ["UpBlock2D"],
                  "only_cross_attention": [True, True, True, False], "in_channels": 7}, None),
    "xl": ({**XL, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D"] + CROSS[0][:2], "up_block_types": CROSS[1][1:3] + ["UpBlock2D"],
            "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10]}, 2_567_463_684),
    "refiner": ({**XL, "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
                 "cross_attention_dim": 1280, "down_block_types": ["DownBlock2D", *CROSS[0][1:]],
                 "up_block_types": [*CROSS[1][:3], "UpBlock2D"], "projection_class_embeddings_input_dim": 2560,
                 "transformer_layers_per_block": 4}, 2_259_526_660),
    "latent diffusion with text": ({**SD, "cross_attention_dim": 1280, "sample_size": 32}, 872_300_484),
    "latent diffusion of faces": ({**PLAIN, "block_out_channels": [224, 448, 672, 896],
                                   "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
                                   "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]}, 274_056_163),
    "latent super-resolution": ({**PLAIN, "block_out_channels": [160, 320, 320, 640], "in_channels": 6,
                                 "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
                                 "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_parameters_of_theirs(name):
    import diffusers

    config, published = PUBLISHED[name]
    block, sizes = diffusers_unet.block_of(config, name)
    with torch.device("meta"):
        ours = build(block, **{key: value for key, value in sizes._asdict().items() if key != "vector"})
        theirs = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    count = sum(p.numel() for key, p in theirs.named_parameters() if key != "class_embedding.weight")  # a condition's, here
    assert sum(p.numel() for p in ours.parameters()) == count == (published or count)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize(("old", "new"), [
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "tensor_format": "pt", "clip_sample": False},
     {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "trained_betas": None, "steps_offset": 0}),
    ({"_class_name": "DDIMScheduler", "timestep_values": None, "clip_sample": False}, {"_class_name": "DDIMScheduler", "clip_sample": False}),
    ({"_class_name": "DDPMScheduler", "predict_epsilon": True}, {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}),
    ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, {"_class_name": "DDPMScheduler", "prediction_type": "sample"}),
])  # fmt: skip
def test_schedulers_of_old_versions(old, new):
    assert schedulers.read(BETAS | old) == schedulers.read(BETAS | new)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("published") / "sd"
    text_pipeline().save_pretrained(path)
    return path


def picture(path):
    return ldm.load(path).generate([PROMPT], steps=2, guidance=3.0, x_T=start())


def renamed(path, change):
    """Every part's weights written again: change(stem, tensors) -> names and contents."""
    for file in list(path.rglob("*.safetensors")):
        tensors = load_file(file)
        file.unlink()
        for name, content in change(file.stem, tensors).items():
            if name.endswith(".json"):
                file.with_name(name).write_text(json.dumps(content))
            elif name.endswith(".bin"):
                torch.save(content, file.with_name(name))
            else:
                save_file(content, file.with_name(name))


def halves(tensors):
    return {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}


def sharded(name, index, ending):
    def change(stem, tensors):
        files = {f"{name(stem)}-0000{k + 1}-of-00002.{ending}": sorted(tensors)[k::2] for k in range(2)}
        where = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
        return {file: {key: tensors[key] for key in keys} for file, keys in files.items()} | {index(stem): where}

    return change


def pickled(stem):
    return "pytorch_model" if stem == "model" else stem


@pytest.mark.parametrize("change", [
    lambda stem, tensors: {f"{pickled(stem)}.bin": tensors},
    lambda stem, tensors: {f"{stem}.fp16.safetensors": halves(tensors)},
    lambda stem, tensors: {f"{pickled(stem)}.fp16.bin": halves(tensors)},
    lambda stem, tensors: {f"{pickled(stem)}.bin": tensors, f"{stem}.fp16.safetensors": halves(tensors)},
    sharded(str, lambda stem: f"{stem}.safetensors.index.json", "safetensors"),
    sharded(pickled, lambda stem: f"{pickled(stem)}.bin.index.json", "bin"),
    sharded(lambda stem: f"{stem}.fp16", lambda stem: f"{stem}.safetensors.index.fp16.json", "safetensors"),
    sharded(lambda stem: f"{stem}.fp16", lambda stem: f"{stem}.fp16.safetensors.index.json", "safetensors"),
], ids=["bin", "fp16", "fp16 bin", "bin before fp16", "shards", "bin shards", "fp16 shards", "fp16 shards, newer"])  # fmt: skip
@torch.no_grad()
def test_weights_by_every_name(folder, tmp_path, change, request):
    shutil.copytree(folder, tmp_path / "sd")
    renamed(tmp_path / "sd", change)
    exact = request.node.callspec.id in ("bin", "bin before fp16") or "shards" in request.node.callspec.id
    assert (picture(tmp_path / "sd") - picture(folder)).abs().max() <= (0 if exact else 0.02)
    assert {p.dtype for p in ldm.load(tmp_path / "sd").parameters()} == {torch.float32}


@torch.no_grad()
def test_a_folder_of_version_0_3(folder, tmp_path):
    """What configs did not say then, and the names of the autoencoder's attention."""
    path = tmp_path / "sd"
    shutil.copytree(folder, path)
    known = {"unet": {*COMMON, "attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "in_channels",
                      "out_channels", "sample_size", "up_block_types", "_class_name"},
             "vae": {"_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels",
                     "layers_per_block", "out_channels", "sample_size", "up_block_types", "scaling_factor"},
             "scheduler": {*BETAS, "_class_name", "clip_sample", "set_alpha_to_one", "steps_offset"}}  # fmt: skip
    for part, names in known.items():
        file = path / part / f"{'scheduler_' * (part == 'scheduler')}config.json"
        file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key in names}))
    weights, old = path / "vae" / "diffusion_pytorch_model.safetensors", {}
    for key, value in load_file(weights).items():
        for new, name in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            key = key.replace(new, name)
        old[key] = value
    assert sum(".query." in key for key in old) == 4
    weights.unlink()
    torch.save(old, weights.with_suffix(".bin"))
    index = json.loads((path / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "_diffusers_version": "0.3.0",
              "feature_extractor": ["transformers", "CLIPFeatureExtractor"]}  # fmt: skip
    (path / "model_index.json").write_text(json.dumps({key: index[key] for key in index if key not in ("image_encoder", "requires_safety_checker")}))
    assert torch.equal(picture(path), picture(folder))


def test_other_variants_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    renamed(tmp_path / "sd" / "unet", lambda stem, tensors: {f"{stem}.non_ema.safetensors": tensors})
    with pytest.raises(UserError, match="no weights; expected diffusion_pytorch_model.safetensors; nearest: .*non_ema"):
        ldm.load(tmp_path / "sd")
