"""`generate`, `upscale`, `interpolate`: what a model reads is given on the command line."""

import json

import numpy as np
import pytest
import torch
from drawn import fails, levels, picture, run, same
from PIL import Image
from random_models import random_model

from ldm import tasks
from ldm.app import png
from ldm.load import load

LABEL = {"target": "ldm.conditioners.label.ClassLabel", "params": {"classes": 5, "width": 16, "dropout": 0.1}}
MAP = {"target": "ldm.conditioners.spatial.SemanticMap", "params": {"classes": 4}}
BOXES = {"target": "ldm.conditioners.layout.Boxes", "params": {"classes": 6, "objects": 3, "width": 32, "dropout": 0.1}}
NUMBERS = {"target": "ldm.conditioners.numbers.Numbers", "params": {"width": 8}}
RATED = {"target": "ldm.conditioners.numbers.Numbers", "params": {"width": 8, "keys": {"weather": 2}}}
DEPTH = {"target": "ldm.conditioners.spatial.Depth"}
SMALL = {"target": "ldm.conditioners.low_resolution.LowResolution",
         "params": {"noise": {"target": "ldm.process.DDPM"}, "level": "sinusoid", "level_width": 8}}  # fmt: skip
NEAR = {"target": "ldm.conditioners.neighbours.Neighbours", "params": {"embedding_width": 8, "count": 3, "width": 32}}


def joined(*parts):
    return {"target": "ldm.conditioners.join.Join", "params": {"parts": list(parts)}}


@pytest.fixture(scope="module")
def model(model_config, tmp_path_factory):
    """-> a checkpoint of a model with this conditioner, made once."""
    made, folder = {}, tmp_path_factory.mktemp("models")

    def get(conditioner):
        key = json.dumps(conditioner)
        if key not in made:
            made[key] = folder / f"{len(made)}.ckpt"
            random_model(model_config, conditioner).save(made[key])
        return made[key]

    return get


def again(command, ckpt, folder, number=0):
    """A picture of the folder, drawn from what it says."""
    return run(command, ckpt, folder.parent / f"{folder.name}-again", "--from-image", folder / f"{number:05d}.png")


def test_classes(model, tmp_path, capsys):
    ckpt = model(LABEL)
    found = run("generate", ckpt, tmp_path / "a", "--class", 3, 1, "--n-samples", 2, "--seed", 4)
    assert same(found, levels(load(ckpt).generate({"class": [3, 3, 1, 1]}, seed=4, batch_size=1)))
    about = png.read(tmp_path / "a" / "00002.png")
    assert about["conditions"] == {"class": 1} and "prompt" not in about and about["seed"] == 6
    assert same(again("generate", ckpt, tmp_path / "a", 2), found[2:3])
    base = ["generate", "--ckpt", ckpt, "--outdir", tmp_path / "out"]
    for more, told in (([], "give --class (a class, 0 to 4)"), (["--class", "cat"], "--class cat: expected a whole number"),
                       (["--class", 9], "'class' holds whole numbers from 0 to 5"),
                       (["--class", 1, "--prompt", "red"], "--prompt: this model has no such condition; it reads --class"),
                       (["--class", 1, "--negative-prompt", "red"], "--negative-prompt: this model reads no text")):  # fmt: skip
        assert told in fails(capsys, *base, *more)
    assert "--prompt: this model has no such condition" in fails(capsys, "txt2img", *base[1:], "--prompt", "a")
    assert not (tmp_path / "out").exists()


def test_nothing(model, tmp_path):
    ckpt = model(None)
    found = run("generate", ckpt, tmp_path / "a", "--n-samples", 3)
    assert same(found, levels(load(ckpt).generate(3, batch_size=1)))
    assert same(again("generate", ckpt, tmp_path / "a", 1), found[1:2])
    way = run("interpolate", ckpt, tmp_path / "b", "--frames", 2, "--seed", 1)
    assert same(way, found[1:])
    picture(tmp_path / "p.png", 32, 32)
    given = ["--image", tmp_path / "p.png", "--strength"]
    assert same(run("img2img", ckpt, tmp_path / "c", *given, 1), found[:1])
    assert run("variations", ckpt, tmp_path / "d", *given, 0.5)[0].shape == (32, 32, 3)


def test_maps_of_classes(model, tmp_path, capsys):
    ckpt = model(MAP)
    numbers = np.random.default_rng(0).integers(0, 4, (8, 12)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(numbers).save(tmp_path / "map.png")
    Image.fromarray(numbers).convert("P").save(tmp_path / "palette.png")
    np.save(tmp_path / "map.npy", numbers)
    expected = levels(load(ckpt).generate({"segmentation": torch.from_numpy(numbers.astype(np.int64))[None]}, size=(32, 48)))
    for name in ("map.png", "palette.png", "map.npy"):  # it has the size of the map
        assert same(run("generate", ckpt, tmp_path / name.replace(".", ""), "--segmentation", tmp_path / name), expected)
    assert same(again("generate", ckpt, tmp_path / "mappng"), expected)
    small = run("generate", ckpt, tmp_path / "small", "--segmentation", tmp_path / "map.png", "--height", 16, "--width", 24)
    half = torch.from_numpy(numbers[1::2, 1::2].astype(np.int64))[None]
    assert same(small, levels(load(ckpt).generate({"segmentation": half}, size=(16, 24))))
    picture(tmp_path / "rgb.png", 32, 32)
    np.save(tmp_path / "odd.npy", np.zeros((30, 30), np.int64))
    base = ["generate", "--ckpt", ckpt, "--outdir", tmp_path / "out", "--segmentation"]
    assert "one number a pixel (grey or palette), this is RGB" in fails(capsys, *base, tmp_path / "rgb.png")
    assert "nearest: 24 x 24 or 32 x 32" in fails(capsys, *base, tmp_path / "odd.npy")
    assert run("generate", ckpt, tmp_path / "pad", "--segmentation", tmp_path / "odd.npy", "--fit", "pad")[0].shape == (30, 30, 3)
    np.save(tmp_path / "many.npy", np.full((32, 32), 7))
    assert "'segmentation' holds classes from 0 to 3" in fails(capsys, *base, tmp_path / "many.npy")


def test_layouts(model, tmp_path, capsys):
    ckpt = model(BOXES)
    layout = [{"box": [0, 0.1, 0.5, 0.6], "class": 2}, {"box": [0.5, 0.5, 1, 1], "class": 5}]
    (tmp_path / "a.json").write_text(json.dumps(layout))
    (tmp_path / "b.json").write_text(json.dumps(layout[:1]))
    found = run("generate", ckpt, tmp_path / "out", "--boxes", tmp_path / "a.json", tmp_path / "b.json", "--batch-size", 2)
    boxes, kinds = torch.zeros(2, 2, 4), torch.tensor([[2, 5], [2, -1]])
    for row, n in ((0, 2), (1, 1)):
        boxes[row, :n] = torch.tensor([one["box"] for one in layout[:n]])
    assert same(found, levels(load(ckpt).generate({"boxes": boxes, "box_classes": kinds})))
    assert np.abs(again("generate", ckpt, tmp_path / "out", 1)[0].astype(int) - found[1]).max() <= 1
    base = ["generate", "--ckpt", ckpt, "--outdir", tmp_path / "no", "--boxes", tmp_path / "x.json"]
    for text, told in (("[{", "x.json: not JSON"), ('{"box": 1}', 'expected [{"box": [left, top, right, bottom]'),
                       ('[{"box": [0, 0, 1], "class": 1}]', "expected"), ('[{"box": [0, 0, 8, 9], "class": 1}]', "in [0,1]"),
                       ('[{"box": [0, 0, 1, 1], "class": 6}]', "classes from 0 to 5"),
                       (json.dumps(layout * 2), "4 objects in one picture; it takes 3")):  # fmt: skip
        (tmp_path / "x.json").write_text(text)
        assert told in fails(capsys, *base)


def test_numbers_have_defaults_where_they_are_known(model, tmp_path, capsys):
    ckpt = model(joined(LABEL, NUMBERS))
    found = run("generate", ckpt, tmp_path / "a", "--class", 1, "--height", 32, "--width", 40)
    sizes = {"original_size": [[32, 40]], "crop": [[0, 0]], "target_size": [[32, 40]]}
    assert same(found, levels(load(ckpt).generate({"class": [1], **sizes}, size=(32, 40))))
    other = run("generate", ckpt, tmp_path / "b", "--class", 1, "--height", 32, "--width", 40, "--condition", "crop=8,4")
    assert same(other, levels(load(ckpt).generate({"class": [1], **sizes, "crop": [[8, 4]]}, size=(32, 40))))
    assert same(again("generate", ckpt, tmp_path / "b"), other)
    ckpt = model(joined(LABEL, RATED))
    base = ["generate", "--ckpt", ckpt, "--outdir", tmp_path / "out", "--class", 1]
    assert "give --condition weather= (2 numbers)" in fails(capsys, *base)
    assert "expected numbers, with commas" in fails(capsys, *base, "--condition", "weather=a")
    assert "'weather' has to be (B, 2), got (1, 1)" in fails(capsys, *base, "--condition", "weather=1")
    assert "--condition wether=: this model has no such condition" in fails(capsys, *base, "--condition", "wether=1,2")
    assert run("generate", ckpt, tmp_path / "c", "--class", 1, "--condition", "weather=1,2")[0].shape == (32, 32, 3)


def test_depths_and_embeddings(model, tmp_path, capsys):
    deep = np.linspace(0, 7, 32 * 32, dtype=np.float32).reshape(32, 32)
    np.save(tmp_path / "depth.npy", deep)
    Image.fromarray((deep / 7 * 65535).astype(np.uint16)).save(tmp_path / "depth.png")
    ckpt = model(DEPTH)
    expected = levels(load(ckpt).generate({"depth": torch.from_numpy(deep)[None]}))[0].astype(int)
    for name in ("depth.npy", "depth.png"):
        (found,) = run("generate", ckpt, tmp_path / name.replace(".", ""), "--depth", tmp_path / name)
        assert np.abs(found - expected).max() <= 1
    e = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    np.save(tmp_path / "e.npy", e)
    ckpt = model(NEAR)
    found = run("generate", ckpt, tmp_path / "near", "--neighbours", tmp_path / "e.npy")
    assert same(found, levels(load(ckpt).generate({"neighbours": torch.from_numpy(e)[None]})))
    (tmp_path / "no.npy").write_text("no")
    assert "not an array of numpy" in fails(capsys, "generate", "--ckpt", ckpt, "--outdir", tmp_path / "x", "--neighbours", tmp_path / "no.npy")


def test_upscale(model, tmp_path, capsys):
    ckpt = model(SMALL)
    x = picture(tmp_path / "a.png", 8, 10)
    small = torch.from_numpy(x / np.float32(127.5) - 1).permute(2, 0, 1)[None].float()
    found = run("upscale", ckpt, tmp_path / "a", "--image", tmp_path / "a.png", "--noise-level", 20, "--window", 40, "--seed", 3)
    batch = {"low_res": small, "noise_level": torch.tensor([20])}
    assert found[0].shape == (32, 40, 3) and same(found, levels(load(ckpt).generate(batch, size=(32, 40), seed=3)))
    assert same(again("upscale", ckpt, tmp_path / "a"), found) and png.read(tmp_path / "a" / "00000.png")["task"] == "upscale"
    picture(tmp_path / "b.png", 10, 22)
    large = run("upscale", ckpt, tmp_path / "b", "--image", tmp_path / "b.png", "--steps", 1)
    assert large[0].shape == (40, 88, 3) and png.read(tmp_path / "b" / "00000.png")["window"] == 32  # as trained
    assert same(again("upscale", ckpt, tmp_path / "b"), large)
    picture(tmp_path / "c.png", 7, 9)
    base = ["upscale", "--ckpt", ckpt, "--outdir", tmp_path / "c", "--image", tmp_path / "c.png"]
    assert "height 28 x width 36: both have to be multiples of 8" in fails(capsys, *base)
    assert run("upscale", ckpt, tmp_path / "c", *base[5:], "--fit", "pad", "--steps", 1)[0].shape == (28, 36, 3)
    assert "factor: 2; this model enlarges 4 times" in fails(capsys, *base[:4], tmp_path / "d", *base[5:], "--factor", 2)
    assert "'noise_level' holds whole numbers" in fails(capsys, *base[:4], tmp_path / "d", "--image", tmp_path / "a.png", "--noise-level", 5000)
    told = fails(capsys, "upscale", "--ckpt", model(LABEL), "--outdir", tmp_path / "d", "--image", tmp_path / "a.png", "--class", 1)
    assert "was not trained to enlarge" in told and "configs/tasks/super_resolution.yaml" in told
    assert "give --low-res (the small picture); or use `python -m ldm upscale`" in fails(capsys, "generate", *base[1:4], tmp_path / "d")


def test_interpolate_between_prompts(bundle, tmp_path, capsys):
    ckpt = tmp_path / "text.ckpt"
    bundle.save(ckpt)
    prompts = ["--prompt", "a red circle", "a blue star"]
    found = run("interpolate", ckpt, tmp_path / "a", *prompts, "--frames", 3, "--seeds", 3, 8, "--sampler", "ddpm", "--animation", tmp_path / "a.gif")
    for frame, prompt, seed in ((0, prompts[1], 3), (2, prompts[2], 8)):
        (plain,) = run("txt2img", ckpt, tmp_path / f"plain{frame}", "--prompt", prompt, "--seed", seed, "--sampler", "ddpm")
        assert np.abs(found[frame].astype(int) - plain).max() <= 1
    about = png.read(tmp_path / "a" / "00001.png")
    assert about["shares"] == [0.5] and about["seeds"] == [3, 8] and about["to"] == {"prompt": "a blue star"}
    assert same(again("interpolate", ckpt, tmp_path / "a", 1), found[1:2])
    moving = Image.open(tmp_path / "a.gif")
    assert moving.n_frames == 3 and moving.info["duration"] == 120
    same_prompt = run("interpolate", ckpt, tmp_path / "b", "--prompt", "red", "--shares", 0, 1, "--animation", tmp_path / "b.webp")
    assert not same(same_prompt[:1], same_prompt[1:]) and png.read(tmp_path / "b" / "00000.png")["seeds"] == [0, 1]
    base = ["interpolate", "--ckpt", ckpt, "--outdir", tmp_path / "c", *prompts]
    for more, told in ((["--shares", 0.5, 2], "--shares 2: each lies between 0 and 1"), (["--animation", "x.mp4"], "ends in .gif or .webp"),
                       (["--animation", tmp_path / "a.gif"], "a.gif: is there already"), (["--strength", 0.5, "--prompt", "a", "b", "c"], "two pictures")):  # fmt: skip
        assert told in fails(capsys, *base, *more)


def test_interpolate_between_classes_and_pictures(model, tmp_path):
    ckpt = model(LABEL)
    for name, seed in (("a", 0), ("b", 1)):
        picture(tmp_path / f"{name}.png", 32, 32, seed)
    pair = ["--class", 1, 4, "--shares", 0, 0.5, 1]
    found = run("interpolate", ckpt, tmp_path / "k", *pair)
    assert same(found[::2], [run("generate", ckpt, tmp_path / f"k{c}", "--class", c)[0] for c in (1, 4)])
    circle = run("interpolate", ckpt, tmp_path / "s", *pair, "--way", "slerp")
    assert same(circle[::2], found[::2]) and not same(circle[1:2], found[1:2])
    found = run("interpolate", ckpt, tmp_path / "p", *pair, "--image", tmp_path / "a.png", tmp_path / "b.png", "--strength", 0.5)
    ends = [run("img2img", ckpt, tmp_path / f"p{c}", "--class", c, "--image", tmp_path / f"{n}.png", "--strength", 0.5)[0] for c, n in ((1, "a"), (4, "b"))]
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(found[::2], ends, strict=True))
    assert same(again("interpolate", ckpt, tmp_path / "p", 1), found[1:2])


def test_a_classifier_guides(model, bundle, tmp_path, capsys):
    """Towards a class that the model itself does not read; drawn again with the same file, which is asked for if it is gone."""
    from ldm.classifier import build_classifier, by_classifier

    network = {"target": "ldm.networks.classifier.Classifier", "params": {
        "classes": 2, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "transformer_depth": [0], "head_channels": 16,
        "pool": "adaptive"}}  # fmt: skip
    ckpt = model(None)
    drawn = load(ckpt)
    torch.manual_seed(0)
    classifier = build_classifier(network, {"target": "ldm.process.RectifiedFlow"}, drawn.autoencoder, [32, 32]).eval()
    for value in classifier.parameters():
        torch.nn.init.normal_(value, std=0.3)
    about = {"kind": "classifier", **classifier.about, "autoencoder_hash": drawn.autoencoder.content_hash()}
    weights = {f"model.classifier.{name}": value for name, value in classifier.state_dict().items()}
    torch.save({"state_dict": weights, "ldm": about}, tmp_path / "classifier.ckpt")
    given = ["--classifier", tmp_path / "classifier.ckpt", "--class", 1, "--sampler", "euler", "--times", "0.9,0.6,0.3,0"]
    found = run("generate", ckpt, tmp_path / "a", *given, "--classifier-scale", 5)
    guide = by_classifier(classifier, 5.0, drawn.denoiser.process, drawn.autoencoder)
    made = drawn.generate({"class": [1]}, guide=guide, sampler="euler", times=[0.9, 0.6, 0.3, 0])
    assert same(found, levels(made)) and not same(found, run("generate", ckpt, tmp_path / "b", *given, "--classifier-scale", 0))
    assert png.read(tmp_path / "a" / "00000.png")["classifier"]["scale"] == 5.0
    assert same(again("generate", ckpt, tmp_path / "a"), found)
    assert "give --class (a class, which --classifier guides towards)" in fails(capsys, "generate", "--ckpt", ckpt, "--outdir", tmp_path / "c", *given[:2])
    (tmp_path / "classifier.ckpt").unlink()
    told = fails(capsys, "generate", "--ckpt", ckpt, "--outdir", tmp_path / "c", "--from-image", tmp_path / "a" / "00000.png")
    assert "classifier.ckpt" in told and "is not there; give it with --classifier" in told


def test_several_conditions_at_once(bundle, model, tmp_path, capsys):
    """The same prompt again with weight w is guidance times 1 + w; one of weight 0 is none."""
    bundle.save(tmp_path / "text.ckpt")
    base = ["--prompt", "a red star", "--steps", 3, "--n-samples", 2]
    found = run("txt2img", tmp_path / "text.ckpt", tmp_path / "a", *base, "--scale", 2, "--also", "a red star:0.5", "a blue circle:0")
    plain = run("txt2img", tmp_path / "text.ckpt", tmp_path / "b", *base, "--scale", 3)
    assert max(abs(a.astype(int) - b).max() for a, b in zip(found, plain, strict=True)) <= 1
    other = run("txt2img", tmp_path / "text.ckpt", tmp_path / "c", *base, "--scale", 2, "--also", "a blue circle")
    made = bundle.generate(["a red star"] * 2, steps=3, guidance=2.0, batch_size=1, also=[("a blue circle", 1.0)])
    assert same(other, levels(made)) and abs(other[0].astype(int) - plain[0]).max() > 3
    away = bundle.generate(["a red star"], steps=3, guidance=2.0, also=[("a red star", -1.0)])
    torch.testing.assert_close(away, bundle.generate(["a red star"], steps=3, guidance=0.0), atol=1e-4, rtol=0)
    assert png.read(tmp_path / "c" / "00000.png")["also"] == ["a blue circle"]
    assert same(again("txt2img", tmp_path / "text.ckpt", tmp_path / "c", 1), other[1:])
    labels = model(LABEL)
    mixed = run("generate", labels, tmp_path / "d", "--class", 3, "--also", "1:0.5", "--steps", 2)
    made = load(labels).generate({"class": [3]}, steps=2, also=[({"class": 1}, 0.5)])
    assert same(mixed, levels(made))
    base = ["generate", "--ckpt", labels, "--outdir", tmp_path / "e", "--class", 3, "--also"]
    assert "--also red: this model reads classes; expected a whole number" in fails(capsys, *base, "red")
    told = fails(capsys, "generate", "--ckpt", model(None), "--outdir", tmp_path / "e", "--also", "red")
    assert "--also: this model reads neither prompts nor classes" in told and not (tmp_path / "e").exists()


def test_a_further_condition_on_the_way_between_two(bundle, tmp_path):
    """Its text is that of both ends: at 0 and 1 these are the pictures that are drawn with it."""
    more = {"steps": 2, "seed": 4, "also": [("a blue circle", 0.5)]}
    found = tasks.interpolate(bundle, "a red star", "a green star", [0, 1], seeds=(4, 4),
                              **{key: value for key, value in more.items() if key != "seed"})
    for picture_, prompt in zip(found, ("a red star", "a green star"), strict=True):
        torch.testing.assert_close(picture_[None], bundle.generate([prompt], **more), atol=1e-4, rtol=0)
