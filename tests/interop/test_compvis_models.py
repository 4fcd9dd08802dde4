"""Diffusion models in the layouts of CompVis and Stability: exact names and shapes both ways, and what is refused.

tests/data/manifests/models.json holds, for published models, the numbers of their yaml and, for each part of their checkpoints,
how many names there are and a hash over names and shapes, as the reference code makes them.
"""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import ldm
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.interop import compvis_configs, compvis_models, compvis_published, compvis_writing, text_names
from ldm.interop.conditions import weights
from ldm.interop.rows import back

DATA = Path(__file__).parents[1] / "data"
MODELS = json.loads((DATA / "manifests" / "models.json").read_text())
PARITY = DATA / "parity"
CASES = ("txt2img_kl", "class_cond", "inpaint_concat", "superres_concat", "txt2img_bert", "sd2_v", "uncond_vq")


def digests(shapes):
    """Part -> number of names, hash of names and shapes."""
    parts = {}
    for name, shape in shapes.items():
        parts.setdefault(name.split(".")[0] if "." in name else "", {})[name] = shape
    return {part: [len(names), hashlib.sha256("\n".join(
        f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(names.items())).encode()).hexdigest()[:16]]
        for part, names in parts.items()}  # fmt: skip


def meta(shapes):
    """Tensors without contents; single numbers are real."""
    return {name: torch.empty(shape, device="meta") if len(shape) else torch.tensor(0.3) for name, shape in shapes.items()}


def planned(config, tensors):
    """A bundle without weights but for the statistics of its latents."""
    ours, parts = compvis_configs.config_of(config, tensors, "model.yaml", Path("/nowhere"))
    bundle = Bundle.from_config(ours)
    state = bundle.state_dict()
    known = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items() if "statistics" in name}
    known |= {"autoencoder.shift": torch.zeros(state["autoencoder.shift"].shape), **weights(parts)}
    known["autoencoder.scale"] = known["autoencoder.shift"] + 1
    bundle.load_state_dict(state | known, assign=True)
    if config["model"]["params"].get("scale_by_std"):
        bundle.autoencoder.statistics_count.fill_(1)
    return bundle


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_exactly_these_names_and_shapes(name):
    known = MODELS[name]
    config = {"model": known["model"]}
    bundle = planned(config, meta(known["text"]))
    tensors, written = compvis_writing.write(bundle)
    found = {key: list(value.shape) for key, value in tensors.items()}
    raw = {part: value for part, value in known["parts"].items() if part != "model_ema"}
    assert digests(found) == raw
    if "model_ema" in known["parts"]:
        averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): shape for key, shape in found.items()
                    if key.startswith("model.")} | {"model_ema.decay": [], "model_ema.num_updates": []}  # fmt: skip
        assert digests(averages)["model_ema"] == known["parts"]["model_ema"]
        found |= averages
    for said in (config, written):  # their yaml, and the one that was written
        about, filled = compvis_models.read(meta(found), said, "/nowhere/model.ckpt")
        assert about["config"]["model"]["params"]["network"] == bundle.config["model"]["params"]["network"]
        names = {key for key in filled if not key.startswith("ema.")}
        assert {key: filled[key].shape for key in names} == {key: value.shape for key, value in bundle.state_dict().items()}
        assert sum(key.startswith("ema.") for key in filled) in (0, sum(key.startswith("denoiser.") for key in names))


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_is_written_bit_by_bit(name):
    """Schedule tables included, which are computed anew."""
    theirs = load_file(PARITY / name / "model.safetensors")
    bundle = ldm.load(PARITY / name / "model.safetensors", PARITY / name / "config.yaml", ema=False)
    tensors, config = compvis_writing.write(bundle)
    kept = {key: value for key, value in theirs.items() if not key.startswith("model_ema.")}
    assert set(kept) <= set(tensors)
    for key, value in tensors.items():
        if key in kept:  # cond_stage_model of __is_first_stage__ is not kept twice here
            assert torch.equal(value, kept[key].to(value.dtype)), key
        else:
            assert key.startswith("cond_stage_model.")
    about, weights = compvis_models.read(tensors, config, str(PARITY / name / "model.ckpt"))
    ours = bundle.state_dict()
    assert all(torch.equal(weights[key], ours[key]) for key in weights)


def test_latents_that_are_shifted_and_scaled_by_channel_fold_into_the_autoencoder(tmp_path):
    """The file's own autoencoder, read as anybody reads it, has latents at unit scale; ours comes back with every bit."""
    case = PARITY / "txt2img_kl"
    bundle = ldm.load(case / "model.safetensors", case / "config.yaml")
    shift, scale = torch.tensor([0.3, -0.2, 0.1, 0.5]), torch.tensor([2.0, 3.0, 4.0, 1.5])
    bundle.autoencoder.set_statistics(shift, scale, 100, "ab" * 8)
    x = load_file(case / "io.safetensors")["in.image"]
    tensors, config = compvis_writing.write(bundle)
    about, weights = compvis_models.read(tensors, config, str(case / "x.ckpt"))
    assert all(torch.equal(weights[key], value) for key, value in bundle.state_dict().items() if key in weights)
    theirs = {key: value for key, value in tensors.items() if not key.startswith("ldm.")}
    plain = Bundle.from_config(about["config"]).assign(compvis_models.read(theirs, config, str(case / "x.ckpt"))[1] | {
        key: value for key, value in bundle.state_dict().items() if "vocabulary" in key})  # fmt: skip
    assert (plain.autoencoder.spec.scale == 1).all() and not plain.autoencoder.spec.shift.any()
    with torch.no_grad():
        (mean, std), (found, spread) = bundle.autoencoder.posterior(x), plain.autoencoder.posterior(x)
        assert torch.allclose(found, mean, atol=1e-5) and torch.allclose(spread, std, rtol=1e-5)
        assert torch.allclose(plain.autoencoder.decode(mean), bundle.autoencoder.decode(mean), atol=1e-4)


def text(layers, width, vocabulary, projection, prefix, kind):
    """Names and shapes of a text encoder, as the published files have them."""
    inner = {"q": (width, width), "k": (width, width), "v": (width, width), "out": (width, width), "up": (4 * width, width),
             "down": (width, 4 * width)}  # fmt: skip
    ours = {"transformer.token.weight": (vocabulary, width), "transformer.position": (77, width), "logit_scale": (),
            "projection.weight": (projection, width), "transformer.norm.weight": (width,), "transformer.norm.bias": (width,)}
    for i in range(layers):
        for name, shape in inner.items():
            ours |= {f"transformer.blocks.{i}.{name}.weight": shape, f"transformer.blocks.{i}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            ours |= {f"transformer.blocks.{i}.{norm}.{kind_}": (width,) for kind_ in ("weight", "bias")}
    rows = text_names.open_clip(layers, prefix) if kind == "open_clip" else text_names.hf_clip(layers, prefix)
    return back(rows, {name: torch.empty(shape, device="meta") for name, shape in ours.items()})


@pytest.mark.parametrize(("refiner", "unet", "texts", "names"), [(False, 2_567_463_684, 817_720_321, 2515),
                                                                 (True, 2_259_526_660, 694_659_841, None)])
def test_sdxl_is_known_by_its_shapes(refiner, unet, texts, names):
    """The published file of the base model has 2,515 tensors; its UNet 2,567,463,684 parameters."""
    clip = {} if refiner else text(12, 768, 49408, None or 1, "conditioner.embedders.0.transformer.", "hf_clip")
    tensors = clip | text(32, 1280, 49408, 1280, f"conditioner.embedders.{0 if refiner else 1}.model.", "open_clip")
    bundle = planned(compvis_published.sdxl(refiner), tensors)
    assert sum(p.numel() for p in bundle.denoiser.parameters()) == unet
    assert sum(p.numel() for p in bundle.conditioner.parameters()) == texts
    written, config = compvis_writing.write(bundle)
    assert names is None or len(written) == names
    found = {key: value.shape for key, value in written.items()}
    for said in (None, config):
        about, weights = compvis_models.read(meta(found), said, "/nowhere/xl.safetensors")
        assert set(weights) == set(bundle.state_dict())
    assert about["sampling"]["size"] == [1024, 1024]


@pytest.mark.parametrize("name", ["stable-diffusion/v1-inference", "stablediffusion/v2-inpainting-inference",
                                  "latent-diffusion/txt2img-1p4B-eval"])  # fmt: skip
def test_some_published_models_need_no_yaml(name):
    known = MODELS[name]
    tensors, _ = compvis_writing.write(planned({"model": known["model"]}, meta(known["text"])))
    (said, _), (told, _) = (compvis_models.read(meta({k: v.shape for k, v in tensors.items()}), config, "/nowhere/sd.ckpt")
                            for config in ({"model": known["model"]}, None))  # fmt: skip
    said, told = (about["config"]["model"]["params"] for about in (said, told))
    for params in (said, told):
        params["network"]["params"].pop("checkpointing")  # of training
    for part in ("network", "process", "parameterization"):
        assert said[part] == told[part]


def test_two_models_of_the_same_shapes_ask_for_their_yaml():
    two = MODELS["stablediffusion/v2-inference"]
    tensors, _ = compvis_writing.write(planned({"model": two["model"]}, meta(two["text"])))
    with pytest.raises(UserError, match="v2-inference-v.yaml"):
        compvis_models.read(meta({k: v.shape for k, v in tensors.items()}), None, "/nowhere/sd2.ckpt")


# What is refused.


def case(name="txt2img_kl"):
    return load_file(PARITY / name / "model.safetensors"), yaml.safe_load((PARITY / name / "config.yaml").read_text())


def refused(tensors, config, *said):
    with pytest.raises(UserError) as error:
        compvis_models.read(tensors, config, str(PARITY / "txt2img_kl" / "model.ckpt"))
    assert "\n" not in str(error.value)
    for words in said:
        assert words in str(error.value), error.value


def test_leftovers_and_gaps_are_counted_by_part():
    tensors, config = case()
    lost = {key: value for key, value in tensors.items() if key != "model.diffusion_model.time_embed.0.weight"}
    refused(lost, config, "missing model.diffusion_model 1 of ", "time_embed.0.weight")
    refused({**tensors, "model.diffusion_model.extra.weight": torch.zeros(1), "something.else": torch.zeros(2)}, config,
            "unknown model.diffusion_model 1 of ", "extra.weight", "something 1 of 1")
    changed = {**tensors, "model.diffusion_model.out.2.bias": torch.zeros(7)}
    refused(changed, config, "1 of other shapes", "model.diffusion_model.out.2.bias makes 7, not 4")
    refused({key: value for key, value in tensors.items() if not key.startswith("first_stage_model.")}, config,
            "missing first_stage_model ")


@pytest.mark.parametrize(("path", "value", "said"), [
    ("unet_config.params.model_channels", 64, "of other shapes"),
    ("unet_config.params.num_heads", 3, "does not divide into 3 heads"),
    ("unet_config.params.chanel_mult", [1, 2], "chanel_mult"),
    ("unet_config.params.channel_mult", [1, 2, 4], "missing model.diffusion_model"),
    ("unet_config.target", "ldm.modules.other.Net", "is not known here"),
    ("beta_schedule", "liner", "nearest: 'linear'"),
    ("parameterization", "epsilon", "parameterization"),
    ("cond_stage_config.target", "ldm.modules.encoders.modules.FrozenCLIPEmbeder", "nearest: 'FrozenCLIPEmbedder'"),
    ("cond_stage_config.params.layer", "pooled", "'last' or 'hidden'"),
    ("first_stage_config.params.ddconfig.ch_mult", [1, 1], "first_stage_model"),
])  # fmt: skip
def test_a_yaml_of_another_model_is_refused(path, value, said):
    tensors, config = case()
    config = copy.deepcopy(config)
    *way, last = ("model.params." + path).split(".")
    inside = config
    for key in way:
        inside = inside[key]
    inside[last] = value
    try:
        refused(tensors, config, said)
    except ValueError as error:  # what a network refuses when it is built
        assert said in str(error)


def test_the_text_encoder_has_to_be_the_yaml_s():
    tensors, config = case("txt2img_bert")
    config["model"]["params"]["cond_stage_config"]["params"]["n_layer"] = 32
    refused(tensors, config, "n_layer 32", "of 2")
    kl = case()[1]
    refused(tensors, kl, "hf_clip", "x_transformer", "belongs to another checkpoint")


def test_averages_that_lack_a_tensor_are_not_taken(caplog):
    tensors, config = case("inpaint_concat")
    name = next(key for key in tensors if key.startswith("model_ema.diffusion_model"))
    about, weights = compvis_models.read({k: v for k, v in tensors.items() if k != name}, config, "x/model.ckpt")
    assert not any(key.startswith("ema.") for key in weights) and "does not cover all weights" in caplog.text
    assert any(key.startswith("ema.") for key in compvis_models.read(tensors, config, "x/model.ckpt")[1])


def test_a_yaml_beside_the_checkpoint_is_found(tmp_path):
    tensors, config = case("uncond_vq")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="give the yaml"):
        ldm.load(tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(config))
    assert ldm.load(tmp_path / "model.safetensors").denoiser is not None


def test_half_precision_becomes_single_on_a_cpu():
    path = PARITY / "superres_concat"
    bundle = ldm.load(path / "model.safetensors", path / "config.yaml")
    assert {p.dtype for p in bundle.parameters()} == {torch.float32}
    kept = ldm.load(path / "model.safetensors", path / "config.yaml", dtype=torch.bfloat16)
    assert {p.dtype for p in kept.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in kept.autoencoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("wrap", [
    lambda state: state, lambda state: {"state_dict": state, "global_step": 7, "epoch": 1, "optimizer_states": [{"state": {}}]},
    lambda state: {**state, "global_step": torch.tensor(7), "epoch": torch.tensor(1)},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {name.replace("model.", "model._orig_mod.", 1) if name.startswith("model.") else name: value for name, value in state.items()},
    lambda state: {name: value.double() if value.is_floating_point() else value for name, value in state.items()},
    lambda state: state | {"first_stage_model.loss.discriminator.main.0.weight": torch.zeros(3), "first_stage_model.loss.logvar": torch.zeros(()),
                           "logvar": torch.zeros(1000), "first_stage_model.model_ema.decay": torch.zeros(())},
    lambda state: {name: value for name, value in state.items() if "." in name},
], ids=["flat", "nested", "steps among the weights", "distributed", "compiled", "double", "left by training", "without tables"])  # fmt: skip
def test_a_checkpoint_as_it_may_come(tmp_path, wrap):
    tensors, config = case("class_cond")
    torch.save(wrap(tensors), tmp_path / "model.ckpt")
    expected = ldm.load(PARITY / "class_cond" / "model.safetensors", PARITY / "class_cond" / "config.yaml").state_dict()
    found = ldm.load(tmp_path / "model.ckpt", config).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_text_encoders_as_other_versions_of_transformers_name_them():
    """position_ids are there or not, as numbers or in half precision; the names of a whole CLIP or of its text part alone."""
    tensors, config = case()
    _, expected = compvis_models.read(tensors, config, str(PARITY / "txt2img_kl" / "model.ckpt"))
    ids = next(name for name in tensors if name.endswith("position_ids"))
    for changed in (
        {name: value for name, value in tensors.items() if name != ids}, tensors | {ids: tensors[ids].half()},
        {name.replace(".text_model.", "."): value for name, value in tensors.items()},
        tensors | {"embedding_manager.embedder.transformer.text_model.embeddings.position_ids": tensors[ids]},
    ):  # fmt: skip
        _, found = compvis_models.read(changed, config, str(PARITY / "txt2img_kl" / "model.ckpt"))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_a_yaml_says_of_training_changes_nothing():
    tensors, config = case("class_cond")
    more = copy.deepcopy(config)
    more["model"]["params"] |= {
        "monitor": "val/loss", "log_every_t": 200, "ckpt_path": "x.ckpt", "ignore_keys": [], "load_only_unet": False, "v_posterior": 0.0,
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {}}, "original_elbo_weight": 0.0,
        "l_simple_weight": 1.0, "learn_logvar": False, "num_timesteps_cond": 1, "unet_trainable": True, "finetune_keys": None,
    }  # fmt: skip
    more |= {"data": {"target": "main.DataModuleFromConfig"}, "lightning": {"trainer": {"benchmark": True}}}
    more["model"]["params"]["unet_config"]["params"] |= {"use_fp16": False, "image_size": 99, "num_attention_blocks": None}
    (about, found), (expected, weights) = (compvis_models.read(tensors, each, "x/model.ckpt") for each in (more, config))
    assert about["config"]["model"] == expected["config"]["model"]
    assert all(torch.equal(found[name], value) for name, value in weights.items())


# What cannot be written.


@pytest.mark.parametrize(("path", "value", "said"), [
    ("network.params.qk_norm", True, "qk_norm"), ("network.params.groups", None, "groups"),
    ("parameterization", "flow", "parameterization"),
    ("process", {"target": "ldm.process.RectifiedFlow", "params": {}}, "RectifiedFlow"),
])  # fmt: skip
def test_what_has_no_place_there(path, value, said):
    tensors, config = case("uncond_vq")
    ours = copy.deepcopy(compvis_models.read(tensors, config, "x/model.ckpt")[0]["config"])
    inside = ours["model"]["params"]
    *way, last = path.split(".")
    for key in way:
        inside = inside[key]
    inside[last] = value
    if last == "process":
        ours["model"]["params"]["parameterization"] = "flow"
    made = Bundle.from_config(ours)
    made.autoencoder.load_state_dict({k: torch.zeros(v.shape, dtype=v.dtype) + (k == "scale") for k, v in
                                      made.autoencoder.state_dict().items()}, assign=True)  # fmt: skip
    with pytest.raises(UserError, match=said):
        compvis_writing.write(made)
