"""guided-diffusion's files: published models by the flags of its README, by arguments, and by shapes alone, in and out."""

import json
import logging

import pytest
import torch
import yaml

import ldm
from ldm.bundle import Bundle
from ldm.classifier import NoisyClassifier, by_classifier
from ldm.common.files import UserError
from ldm.common.random import generator
from ldm.interop import adm, adm_words
from ldm.load import load_classifier
from ldm.times import make_times

ALL = "class_cond: True, learn_sigma: True, resblock_updown: True, use_scale_shift_norm: True, use_fp16: True"
PUBLISHED = {  # flags, millions of parameters (2105.05233, appendix)
    "64": ("image_size: 64, num_channels: 192, num_res_blocks: 3, num_head_channels: 64, attention_resolutions: '32,16,8', "
           "noise_schedule: cosine, use_new_attention_order: True, dropout: 0.1", 296),
    "128": ("image_size: 128, num_channels: 256, num_heads: 4, attention_resolutions: '32,16,8'", 422),
    "256": ("image_size: 256, num_channels: 256, num_head_channels: 64, attention_resolutions: '32,16,8'", 554),
    "512": ("image_size: 512, num_channels: 256, num_head_channels: 64, attention_resolutions: '32,16,8'", 559),
    "64 to 256": ("large_size: 256, small_size: 64, num_channels: 192, num_heads: 4, attention_resolutions: '32,16,8'", 312),
    "128 to 512": ("large_size: 512, small_size: 128, num_channels: 192, num_head_channels: 64, attention_resolutions: '32,16'",
                   309),
}  # fmt: skip
CLASSIFIERS = {"64": ("image_size: 64, classifier_depth: 4, noise_schedule: cosine", 65), "128": ("image_size: 128", 43),
               "256": ("image_size: 256", 54), "512": ("image_size: 512", 54)}  # fmt: skip
SMALL = dict(image_size=16, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2])
UNETS = {
    "as published": dict(num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True, num_classes=5),
    "second order": dict(num_head_channels=16, use_new_attention_order=True),
    "other heads on the way up": dict(num_heads=4, num_heads_upsample=2, out_channels=3),
    "means for convolutions": dict(conv_resample=False, num_heads=2),
    "narrow first level": dict(model_channels=64, channel_mult=[0.5, 1, 2], attention_resolutions=[1, 4], num_heads=2),
    "upsampler": dict(cls="SuperResModel", num_heads=4, use_scale_shift_norm=True, resblock_updown=True),
    "upsampler with classes": dict(cls="SuperResModel", num_heads=4, num_classes=3),
    "x0, rescaled cosine": dict(num_heads=4, predict_xstart=True, noise_schedule="cosine", diffusion_steps=4000,
                                rescale_timesteps=True, timestep_respacing="ddim50"),
    "one channel": dict(in_channels=1, out_channels=2, num_heads=2), "one level": dict(channel_mult=[1], attention_resolutions=[1], num_heads=2),
}  # fmt: skip
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


def random(tensors):
    """Numbers for tensors that have none."""
    return {name: torch.randn(value.shape, generator=generator(0, name)) * 0.05 for name, value in tensors.items()}


def shapes(words, origin="file"):
    """The state dict that such a model has, without contents."""
    words = {**adm_words.MODEL, **adm_words.DIFFUSION, "cls": "UNetModel", **words}
    bundle = Bundle.from_config(adm.config_of(words, origin))
    return adm.write(bundle, adm.ORDERS[words["use_new_attention_order"]])[0]


def published(name):
    flags = yaml.safe_load(f"{{{ALL}, {PUBLISHED[name][0]}}}")
    stub = {"output_blocks.0": torch.empty(0), "input_blocks.0.0.weight": torch.empty(1, 6 if "large_size" in flags else 3)}
    return flags, shapes(adm_words.words(stub, flags, name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_by_their_flags_and_by_their_shapes(name, caplog):
    flags, tensors = published(name)
    assert round(sum(value.numel() for value in tensors.values()) / 1e6) == PUBLISHED[name][1]
    about, _ = adm.read(tensors, flags, name)
    with caplog.at_level(logging.WARNING):
        assert adm.read(tensors, None, name)[0] == about and caplog.records == []
    assert about["config"]["sampling"]["size"] == [flags.get("large_size", flags.get("image_size"))] * 2
    bundle = Bundle.from_config(about["config"], about=about)
    again, words = adm.write(bundle)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in tensors.items()}
    assert adm.read(tensors, words, name)[0] == about


def test_the_model_without_classes_has_the_same_shapes_but_for_them():
    flags, tensors = published("256")
    del tensors["label_emb.weight"]
    about, _ = adm.read(tensors, flags | {"class_cond": False}, "file")
    assert "conditioner" not in about["config"]["model"]["params"] and adm.read(tensors, None, "file")[0] == about


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_published_classifiers(name):
    text, millions = CLASSIFIERS[name]
    flags = yaml.safe_load(f"{{{text}}}")
    stub = {"out.0.bias": torch.empty(1), "out.2.c_proj.bias": torch.empty(1000)}
    words = adm_words.words(stub, flags, name)
    about = {"network": adm.network_of(words, name), "process": adm.process_of(words)}
    tensors, arguments = adm.write_classifier(NoisyClassifier.from_about(about))
    assert round(sum(value.numel() for value in tensors.values()) / 1e6) == millions
    read = [adm.read_classifier(tensors, config, name).about for config in (flags, arguments, None)]
    assert all(each == read[0] for each in read) and read[0]["network"] == about["network"]


@pytest.mark.parametrize("name", UNETS)
def test_in_and_out_again(name):
    words = SMALL | UNETS[name]
    tensors = random(shapes(words))
    about, weights = adm.read(tensors, words, name)
    bundle = Bundle.from_config(about["config"], about=about).assign(weights)
    again, told = adm.write(bundle)
    assert again.keys() == tensors.keys() and all(torch.equal(value, tensors[key]) for key, value in again.items())
    assert json.loads(json.dumps(told)) == told  # plain data
    about_again, weights_again = adm.read(again, told, name)
    assert about_again == about and all(torch.equal(value, weights[key]) for key, value in weights_again.items())
    assert {name: told[name] for name in words if name != "cls"} == {name: words[name] for name in words if name != "cls"}


def test_the_order_is_chosen_when_written():
    words = SMALL | UNETS["as published"]
    tensors = random(shapes(words))
    about, weights = adm.read(tensors, words, "file")
    bundle = Bundle.from_config(about["config"], about=about).assign(weights)
    other, told = adm.write(bundle, "q k v first")
    assert told["use_new_attention_order"] and not torch.equal(other["middle_block.1.qkv.weight"], tensors["middle_block.1.qkv.weight"])
    found = adm.read(other, told, "file")[1]
    assert all(torch.equal(value, weights[key]) for key, value in found.items())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("options", [dict(resblock_updown=True, use_scale_shift_norm=True), dict(num_res_blocks=2)], ids=["1", "2"])
def test_classifiers_in_and_out_again(pool, options):
    words = {**adm_words.MODEL, **adm_words.DIFFUSION, **SMALL, "cls": "EncoderUNetModel", "out_channels": 7, "pool": pool,
             "num_head_channels": 16, **options}  # fmt: skip
    about = {"network": adm.network_of(words, "file"), "process": adm.process_of(words)}
    tensors = random(adm.write_classifier(NoisyClassifier.from_about(about))[0])
    assert adm.holds_classifier(tensors) and not adm.holds(tensors)
    classifier = adm.read_classifier(tensors, {name: value for name, value in words.items() if value is not None}, "file")
    again, told = adm.write_classifier(classifier)
    assert again.keys() == tensors.keys() and all(torch.equal(value, tensors[key]) for key, value in again.items())
    assert adm.read_classifier(again, told, "file").about == classifier.about
    assert adm_words.structure(tensors, "EncoderUNetModel") | {"image_size": 16} == {
        name: told[name] for name in ("model_channels", "num_res_blocks", "in_channels", "out_channels", "attention_resolutions",
                                      "use_scale_shift_norm", "resblock_updown", "conv_resample", "pool", "image_size")
    } | {"num_classes": None, "channel_mult": (1, 2)}  # fmt: skip


@pytest.mark.parametrize(("spacing", "steps", "first", "last"), [("250", 250, 999, 0), ("", 1000, 999, 0), ("ddim25", 25, 960, 0),
                                                                 ("10,15,20", 45, 999, 0)])  # fmt: skip
def test_respacing(spacing, steps, first, last):
    from ldm.betas import spaced
    from ldm.process import DDPM

    words = {**adm_words.MODEL, **adm_words.DIFFUSION, "timestep_respacing": spacing}
    sampling = adm.sampling_of(words, learned=True)
    times = make_times(sampling["times"], DDPM("linear"), sampling["steps"])
    assert sampling["steps"] == steps and times[:-1].tolist() == spaced(1000, spacing or "1000")[::-1]
    assert (times[0], times[-2], times[-1]) == (first, last, -1)
    assert sampling["sampler"]["name"] == ("ddim" if "ddim" in spacing else "ddpm") and sampling["sampler"]["clip_x0"]


def test_a_model_is_loaded_samples_and_is_guided(tmp_path):
    words = SMALL | UNETS["upsampler with classes"]
    torch.save(random(shapes(words)), tmp_path / "upsampler.pt")
    (tmp_path / "arguments.json").write_text(json.dumps(words))
    bundle = ldm.load(tmp_path / "upsampler.pt", tmp_path / "arguments.json")
    batch = {"class": [0, 2], "low_res": torch.rand(2, 3, 4, 4)}
    pictures = bundle.generate(batch, steps=3)
    assert pictures.shape == (2, 3, 16, 16) and pictures.isfinite().all()
    words = SMALL | dict(cls="EncoderUNetModel", out_channels=3, num_heads=2)
    about = {"network": adm.network_of({**adm_words.MODEL, **words}, "file"), "process": adm.process_of(adm_words.DIFFUSION)}
    torch.save(random(adm.write_classifier(NoisyClassifier.from_about(about))[0]), tmp_path / "classifier.pt")
    classifier = load_classifier(tmp_path / "classifier.pt", words)
    guided = bundle.generate(batch, steps=3, guide=by_classifier(classifier, 50.0, bundle.denoiser.process, bundle.autoencoder))
    assert not torch.allclose(guided, pictures, atol=1e-3) and guided.isfinite().all()
    with pytest.raises(UserError, match="a UNet alone, or a classifier of guided-diffusion"):
        ldm.load(tmp_path / "classifier.pt")
    with pytest.raises(UserError, match="and no classifier"):
        load_classifier(tmp_path / "upsampler.pt")


@pytest.mark.parametrize(("config", "told"), [
    ({**SMALL, "num_heads": 4, "resblok_updown": True}, "resblok_updown: no argument or flag of guided-diffusion; nearest: 'resblock_"),
    ({name: value for name, value in SMALL.items() if name != "num_res_blocks"}, "num_res_blocks: missing"),
    ({"image_size": 48, "num_channels": 32}, "channel_mult: it has to be given for sides of 48"),
    ({**SMALL, "num_heads": 4, "num_res_blocks": 2}, "missing input_blocks .* of .*unknown"),
    ({**SMALL, "num_heads": 4, "use_scale_shift_norm": True}, "of other shapes .input_blocks.1.0.emb_layers.1.weight makes 32x128, not 64x"),
    ({**SMALL, "num_heads": 5}, "does not divide into 5 heads"), ({**SMALL, "out_channels": 4}, "out_channels: 4; of pictures with 3"),
    ({**SMALL, "cls": "SuperResModel"}, "cls: SuperResModel, but its weights are those of a UNetModel"),
    ({**SMALL, "noise_schedule": "sigmoid"}, "noise_schedule: 'sigmoid'; read is linear or cosine"),
    ({**SMALL, "num_classes": 4}, "missing label_emb 1 of 1"),
])  # fmt: skip
def test_arguments_that_do_not_fit(config, told):
    with pytest.raises(UserError, match=f"^file: .*{told}"):
        adm.read(shapes(SMALL | {"num_heads": 4}), config, "file")


def test_shapes_that_no_published_model_has(caplog):
    tensors = shapes(SMALL | {"num_heads": 1})
    adm.read(tensors, None, "file")
    assert "taken are 64 channels a head" in caplog.text
    with pytest.raises(UserError, match="do not tell heads"):
        adm.read(shapes(SMALL | {"num_heads": 1, "channel_mult": [1, 1]}), None, "file")
    with pytest.raises(UserError, match="do not tell the architecture"):
        adm.read({name: value for name, value in tensors.items() if not name.startswith("input_blocks.1.")}, None, "file")


@pytest.mark.parametrize(("path", "value", "told"), [
    (("model", "params", "parameterization"), "v", "parameterization 'v', only 'noise' or 'data'"),
    (("model", "params", "process"), {"target": "ldm.process.RectifiedFlow"}, "not the process"),
    (("model", "params", "process"), {"target": "ldm.process.DDPM", "params": {"schedule": "linear", "end": 0.03}}, "not the process"),
    (("autoencoder", "target"), "autoencoder.model.convolutional", "only 'autoencoder.base.Identity'"),
    (("model", "params", "network", "params", "channel_mult"), [2, 2], "channel_mult .2, 2."),
    (("model", "params", "network", "params", "attention"), "transformer", "attention 'transformer'"),
    (("model", "params", "conditioner"), {"target": "ldm.conditioners.text.TextConditioner", "params": {}}, "not of ldm.conditioners.text"),
])  # fmt: skip
def test_models_that_have_no_place_there(path, value, told):
    about, _ = adm.read(shapes(SMALL | {"num_heads": 4}), SMALL | {"num_heads": 4}, "file")
    bundle = Bundle.from_config(about["config"])
    inner = bundle.config
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=told):
        adm.write(bundle)
