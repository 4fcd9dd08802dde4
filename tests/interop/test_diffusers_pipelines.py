"""Pipelines that diffusers itself makes (tiny, random weights) are read, draw the same picture, and are written for it to load."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import (
    CROSS,
    NUMBERS,
    PROMPT,
    SCALE,
    SELF,
    SMALL,
    STEPS,
    bert_pipeline,
    dit_pipeline,
    perturbed,
    saved,
    seeded_call,
    start,
    text_call,
    text_pipeline,
    unconditional_pipeline,
    xl_pipeline,
)

import ldm
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.interop import diffusers_pipelines, diffusers_writing

KINDS = {  # name -> (diffusers' pipeline, how it is called, what ours is given, guidance, channels of the latent)
    "stable diffusion": (text_pipeline, text_call, [PROMPT], SCALE, 4),
    "xl": (xl_pipeline, text_call, {"caption": [PROMPT], **NUMBERS}, SCALE, 4),
    "without text": (unconditional_pipeline, lambda p: seeded_call(p, batch_size=1), 1, 1.0, 3),
    "dit": (dit_pipeline, lambda p: seeded_call(p, class_labels=[3], guidance_scale=SCALE), {"class": [3]}, SCALE, 4),
    "bert": (bert_pipeline, text_call, [PROMPT], SCALE, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (folder that diffusers wrote, its picture)."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    root, found = tmp_path_factory.mktemp("pipelines"), {}

    def get(name):
        if name not in found:
            make, call, *_ = KINDS[name]
            pipeline = saved(make, root / name)
            found[name] = root / name, torch.from_numpy(call(pipeline)).permute(0, 3, 1, 2)
        return found[name]

    return get


def drawn(bundle, name, **more):
    *_, prompts, scale, channels = KINDS[name]
    x = start(channels)
    if bundle.sampling.get("start") == "noise":  # theirs multiplies what it is given
        from ldm.times import make_times

        process = bundle.denoiser.process
        alpha, sigma = process.exact(make_times(bundle.sampling["times"], process, STEPS)[0])
        x = x * float(torch.hypot(alpha, sigma))
    elif name == "xl":
        process = bundle.denoiser.process
    prompts = {key: torch.tensor(value) if key != "caption" and isinstance(value, list) else value
               for key, value in prompts.items()} if isinstance(prompts, dict) else prompts  # fmt: skip
    return (bundle.generate(prompts, steps=STEPS, guidance=scale, x_T=x, **more) + 1) / 2


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_same_picture_as_theirs(made, name):
    folder, expected = made(name)
    found = drawn(ldm.load(folder), name)
    assert found.shape == expected.shape and (found - expected).abs().max() < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_what_is_written_is_loaded_there_and_comes_back_bit_by_bit(made, name, tmp_path):
    from diffusers import DiffusionPipeline

    folder, expected = made(name)
    bundle = ldm.load(folder)
    if name == "stable diffusion":  # statistics of every channel, which a pipeline does not know, fold into the autoencoder
        bundle.autoencoder.set_statistics(torch.tensor([0.3, -0.2, 0.1, 0.5]), torch.tensor([2.0, 3.0, 4.0, 1.5]), 9, "cd" * 8)
        expected = drawn(bundle, name)
    diffusers_writing.write(bundle, tmp_path / "out")
    again = ldm.load(tmp_path / "out")
    ours, theirs = bundle.state_dict(), again.state_dict()
    assert {key for key in ours if "vocabulary" not in key} == {key for key in theirs if "vocabulary" not in key}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items() if "vocabulary" not in key)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    found = torch.from_numpy(KINDS[name][1](pipeline)).permute(0, 3, 1, 2)
    assert (found - expected).abs().max() < 1e-3 and (drawn(again, name) - expected).abs().max() < 1e-3


@torch.no_grad()
def test_negative_prompts_of_xl(made):
    """The empty one is all zeros there; a negative prompt is not."""
    from diffusers import DiffusionPipeline

    folder, expected = made("xl")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = torch.from_numpy(text_call(pipeline, negative_prompt="a dog")).permute(0, 3, 1, 2)
    assert (drawn(ldm.load(folder), "xl", negative_prompt="a dog") - theirs).abs().max() < 2e-5
    assert (theirs - expected).abs().max() > 1e-3


@torch.no_grad()
def test_the_network_of_inpainting(tmp_path):
    """Nine channels: x_t, the mask, the masked picture's latent."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    pipeline = text_pipeline(in_channels=9)
    pipeline.save_pretrained(tmp_path / "sd")
    bundle = ldm.load(tmp_path / "sd")
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, (torch.rand(1, 1, 32, 32) > 0.5).float()
    from ldm.conditioners.base import encoded

    cond = bundle.conditioner(encoded(bundle.conditioner, bundle.autoencoder,
                                      {"caption": [PROMPT], "image": image, "mask": mask}, (16, 16)))  # fmt: skip
    x = start()
    latent = pipeline.vae.encode(torch.where(mask > 0.5, 0.0, image)).latent_dist.mode() * 0.7
    seen = torch.cat([x, torch.nn.functional.interpolate(mask, (16, 16)), latent], dim=1)
    ids = pipeline.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = pipeline.unet(seen, 500, encoder_hidden_states=pipeline.text_encoder(ids)[0]).sample
    assert (bundle.denoiser.raw(x, torch.tensor([500.0]), cond) - expected).abs().max() < 1e-5
    diffusers_writing.write(bundle, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"


@torch.no_grad()
def test_other_unets_of_diffusers():
    """Options that the pipelines above do not have, network by network."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import UNet2DConditionModel, UNet2DModel

    from ldm.common.build import build
    from ldm.cond import Cond
    from ldm.interop import diffusers_unet, unet_names
    from ldm.interop.names import defaults
    from ldm.interop.rows import back, check, existing, to_us

    text = dict(**SMALL, **CROSS, cross_attention_dim=32)
    for make, options in [
        (UNet2DConditionModel, dict(**text, attention_head_dim=(2, 8), use_linear_projection=True, num_class_embeds=7)),
        (UNet2DConditionModel, dict(**text, class_embed_type="projection", projection_class_embeddings_input_dim=12)),
        (UNet2DConditionModel, dict(**text, only_cross_attention=True, transformer_layers_per_block=2)),
        (UNet2DConditionModel, dict(**text, resnet_time_scale_shift="scale_shift", norm_num_groups=8)),
        (UNet2DModel, dict(**SMALL, **SELF, attention_head_dim=None)),
        (UNet2DModel, dict(**SMALL, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
                           up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet",
                           add_attention=False)),
        (UNet2DModel, dict(block_out_channels=(32, 48), layers_per_block=2, norm_num_groups=16, **SELF, sample_size=16)),
    ]:  # fmt: skip
        torch.manual_seed(0)
        theirs = perturbed(make(**options))
        config = json.loads(json.dumps({"_class_name": make.__name__, **theirs.config}))
        block, sizes = diffusers_unet.block_of(config, "config.json")
        ours = build(block, **{key: value for key, value in sizes._asdict().items() if key != "vector"}).eval()
        rows = existing(unet_names.rows(ours, "diffusers", vector=sizes.vector), ours.state_dict())
        tensors = {key: value for key, value in theirs.state_dict().items() if not options.get("num_class_embeds")
                   or key != "class_embedding.weight"}  # fmt: skip
        found = to_us(rows, tensors)
        check(rows, tensors, ours.state_dict(), found, "x")
        ours.load_state_dict(found)
        again = back(rows, ours.state_dict())
        assert all(torch.equal(again[key], value) for key, value in tensors.items())
        x, t = torch.randn(2, sizes.in_channels, 16, 16), torch.tensor([3, 700])
        tokens, said = None, {}
        if sizes.context_dim:
            tokens = torch.randn(2, 5, 32)
            said["encoder_hidden_states"] = tokens
        vector = None
        if sizes.vector_dim:
            labels = torch.tensor([1, 6])
            table = options.get("num_class_embeds")
            vector = theirs.class_embedding(labels) if table else torch.randn(2, sizes.vector_dim)
            said["class_labels"] = labels if table else vector
        expected = theirs(x, t, **said).sample
        assert (ours(x, t.float(), Cond(tokens, None, vector)) - expected).abs().max() < 2e-5, options
        if not options.get("num_class_embeds"):  # and back: the settings that diffusers builds the same network from
            written = diffusers_unet.config_of(ours, defaults(block, *ours.given), sizes, 16)
            same = make.from_config(written)
            same.load_state_dict(theirs.state_dict())
            assert torch.equal(same.eval()(x, t, **said).sample, expected)


# What is refused.


def test_damaged_folders_are_named(made, tmp_path):
    folder, _ = made("stable diffusion")

    def broken(change):
        place = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, place)
        change(place)
        with pytest.raises(UserError) as error:
            ldm.load(place)
        assert "\n" not in str(error.value)
        return str(error.value)

    def edit(name, **values):
        def change(place):
            file = place / name
            file.write_text(json.dumps(json.loads(file.read_text()) | values))

        return change

    weights = "diffusion_pytorch_model.safetensors"
    assert "unet" in broken(lambda place: shutil.rmtree(place / "unet"))
    assert "no weights" in broken(lambda place: (place / "unet" / weights).unlink())
    assert "damaged" in broken(lambda place: (place / "vae" / weights).write_bytes(b"123"))
    assert "not JSON that can be read" in broken(lambda place: (place / "unet" / "config.json").write_text("{"))
    assert "down_block_types" in broken(edit("unet/config.json", down_block_types=["Strange", "DownBlock2D"]))
    assert "freq_shift" in broken(edit("unet/config.json", freq_shift=1))
    assert "encoder_hid_dim" in broken(edit("unet/config.json", encoder_hid_dim=8))
    assert "controlnet" in broken(edit("model_index.json", controlnet=["diffusers", "ControlNetModel"]))
    assert "T5EncoderModel" in broken(edit("model_index.json", text_encoder=["transformers", "T5EncoderModel"]))
    assert "reads tokens of 32 numbers" in broken(edit("model_index.json", text_encoder=[None, None]))
    assert "NoSuchScheduler" in broken(edit("scheduler/scheduler_config.json", _class_name="NoSuchScheduler"))

    def lose(place):
        tensors = load_file(place / "unet" / weights)
        tensors.pop("conv_in.weight")
        save_file(tensors, place / "unet" / weights)

    assert "missing conv_in 1 of 2" in broken(lose)


def test_weights_in_several_files_and_in_half_precision(made, tmp_path):
    folder, expected = made("stable diffusion")
    shutil.copytree(folder, tmp_path / "sd")
    name = "diffusion_pytorch_model"
    tensors = load_file(tmp_path / "sd" / "unet" / f"{name}.safetensors")
    (tmp_path / "sd" / "unet" / f"{name}.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"{name}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, inside in parts.items():
        save_file({key: tensors[key] for key in inside}, tmp_path / "sd" / "unet" / file)
    index = {"weight_map": {key: file for file, inside in parts.items() for key in inside}}
    (tmp_path / "sd" / "unet" / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        assert (drawn(ldm.load(tmp_path / "sd"), "stable diffusion") - expected).abs().max() < 2e-5
    vae = tmp_path / "sd" / "vae" / f"{name}.safetensors"
    save_file({key: value.half() for key, value in load_file(vae).items()}, vae.with_name(f"{name}.fp16.safetensors"))
    vae.unlink()
    assert {p.dtype for p in ldm.load(tmp_path / "sd").parameters()} == {torch.float32}


def test_nothing_is_left_of_a_folder_that_cannot_be_written(made, tmp_path):
    bundle = ldm.load(made("stable diffusion")[0])
    bundle.config["model"]["params"]["process"] = {"target": "ldm.process.VP", "params": {}}
    with pytest.raises(UserError):
        diffusers_writing.write(bundle, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        diffusers_writing.write(bundle, tmp_path / "there")


def test_holds(tmp_path):
    assert not diffusers_pipelines.holds(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline"):
        ldm.load(tmp_path)
    assert issubclass(Bundle, torch.nn.Module)
