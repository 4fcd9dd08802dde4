"""DiT and SiT in the layout of their authors and of diffusers: read, written, the same to diffusers itself."""

import argparse
import json
import logging

import pytest
import torch
from safetensors.torch import save_file

import ldm
from autoencoder.base import Identity
from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.denoiser import build_denoiser
from ldm.interop import dit, dit_diffusers

SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=2, num_heads=3, mlp_ratio=4.0,
             class_dropout_prob=0.1, num_classes=5, learn_sigma=True)  # fmt: skip
KINDS = {" ".join(filter(None, key)): dict(zip(("model", "path_type", "prediction"), key, strict=True)) for key in dit.KINDS}
KINDS["DiT"] = {"model": "DiT-S/2"}
X, TIME, CLASSES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), [3, 800], torch.tensor([1, 4])


def state_dict(**changes):
    """Random weights by their names and shapes, written down from the authors' constructor."""
    sizes, source = {**SIZES, **changes}, torch.Generator().manual_seed(0)
    d, p, c, hidden = sizes["hidden_size"], sizes["patch_size"], sizes["in_channels"], int(sizes["hidden_size"] * sizes["mlp_ratio"])
    layers = {"x_embedder.proj": (d, c, p, p), "t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d),
              "final_layer.linear": (p * p * c * (2 if sizes["learn_sigma"] else 1), d),
              "final_layer.adaLN_modulation.1": (2 * d, d)}  # fmt: skip
    for k in range(sizes["depth"]):
        inside = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden),
                  "adaLN_modulation.1": (6 * d, d)}  # fmt: skip
        layers |= {f"blocks.{k}.{name}": shape for name, shape in inside.items()}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()} | {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes["y_embedder.embedding_table.weight"] = (sizes["num_classes"] + 1, d)
    found = {name: 0.2 * torch.randn(*shape, generator=source) for name, shape in shapes.items()}
    return found | {"pos_embed": dit.positions_of(sizes)}


def saved(path, content):
    torch.save(content, path)
    return path


def refused(call, *parts):
    with pytest.raises(UserError) as told:
        call()
    assert all(part in str(told.value) for part in parts) and "\n" not in str(told.value), str(told.value)


# Their authors' layout.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "depth": 1, "patch_size": 4, "mlp_ratio": 2.0}])
def test_in_and_out_again(tmp_path, kind, changes):
    weights, config = state_dict(**changes), {**KINDS[kind], "num_heads": 3}
    bundle = ldm.load(saved(tmp_path / "x.pt", weights), config)
    again, said = dit.write(bundle)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
    assert {**SIZES, **changes} == {name: said[name] for name in SIZES}
    assert ldm.load(saved(tmp_path / "y.pt", again), said).content_hash() == bundle.content_hash()
    bundle.save(tmp_path / "ours.safetensors")
    ours = ldm.load(tmp_path / "ours.safetensors")
    assert ours.content_hash() == bundle.content_hash() and dit.write(ours)[1] == said
    assert bundle.generate({"class": CLASSES}, steps=2).shape == (2, 4, 8, 8)


def test_a_sit_is_known_by_its_config_or_its_name(tmp_path, caplog):
    weights = state_dict()
    for name, config, process in (("SiT-XL-2-256.pt", {}, "RectifiedFlow"), ("DiT-XL-2-256x256.pt", {}, "DDPM"),
                                  ("transit.pt", {}, "DDPM"), ("x.pt", {"path_type": "GVP"}, "Cosine"),
                                  ("sit.pt", {"model": "DiT-XL/2"}, "DDPM")):  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.INFO, "ldm.interop"):
            bundle = ldm.load(saved(tmp_path / name, weights), {**config, "num_heads": 3})
        assert type(bundle.denoiser.process).__name__ == process
        assert ("by its name" in caplog.text) == (not config)


def test_heads_of_published_widths(tmp_path):
    for width, heads in ((384, 6), (128, 2)):
        path = saved(tmp_path / "x.pt", state_dict(hidden_size=width, depth=1))
        assert ldm.load(path).denoiser.network.blocks[0].attention.heads == heads
    refused(lambda: ldm.load(saved(tmp_path / "x.pt", state_dict())), "into how many heads 24 numbers", "give a config with num_heads")
    (tmp_path / "args.json").write_text(json.dumps({**SIZES, "num_heads": 4}))  # beside the file
    assert ldm.load(tmp_path / "x.pt").denoiser.network.blocks[0].attention.heads == 4
    assert ldm.load(tmp_path / "x.pt", {"num_heads": 3}).denoiser.network.blocks[0].attention.heads == 3


@pytest.mark.parametrize("kind", ["DiT", "SiT Linear velocity"])
def test_a_checkpoint_of_their_training(tmp_path, kind):
    weights = state_dict()
    averaged = {name: value if name == "pos_embed" else value + 1 for name, value in weights.items()}
    content = {"model": weights, "ema": averaged, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-S/2")}
    path, config = saved(tmp_path / "0050000.pt", content), {**KINDS[kind], "num_heads": 3}
    for ema, expected in ((True, averaged), (False, weights)):
        found, _ = dit.write(ldm.load(path, config, ema=ema))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrap", [
    lambda weights: {"model": {f"module.{name}": value for name, value in weights.items()}},
    lambda weights: {"model": {f"_orig_mod.{name}": value for name, value in weights.items()}, "opt": {}},
    lambda weights: {"ema": weights}, lambda weights: {"state_dict": weights}, lambda weights: {f"module.{name}": value for name, value in weights.items()},
], ids=["distributed", "compiled", "averages alone", "state_dict", "distributed, flat"])  # fmt: skip
def test_a_file_as_it_may_come(tmp_path, wrap):
    weights, config = state_dict(), {"num_heads": 3, "image_size": 256, "vae": "ema", "model": "DiT-XL/2"}
    found, _ = dit.write(ldm.load(saved(tmp_path / "x.pt", wrap(weights)), config))
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_with_an_autoencoder(tmp_path):
    block = {"target": "autoencoder.model.convolutional", "params": {"width": 8, "mult": [1, 1], "blocks": 1, "attention": False,
             "groups": 4, "bottleneck": {"target": "autoencoder.bottlenecks.KL", "params": {"channels": 4}}}}  # fmt: skip
    path = saved(tmp_path / "x.pt", state_dict())
    bundle = ldm.load(path, {"num_heads": 3, "autoencoder": block})
    assert bundle.generate({"class": [0]}, steps=1, sampler="ddim").shape == (1, 3, 16, 16)
    block["params"]["bottleneck"]["params"]["channels"] = 3
    refused(lambda: ldm.load(path, {"num_heads": 3, "autoencoder": block}), "its latents have 3 channels, the network takes 4")


def test_what_does_not_fit(tmp_path):
    def load(weights, **config):
        return lambda: ldm.load(saved(tmp_path / "x.pt", weights), {"num_heads": 3, **config})

    weights = state_dict()
    refused(load({name: value for name, value in weights.items() if "blocks.1.mlp" not in name}),
            "not those of the model that is described", "missing blocks 4 of 20 (blocks.1.mlp.fc1.weight")  # fmt: skip
    refused(load(weights | {"stray": torch.zeros(1)}), "unknown stray 1 of 1 (stray)")
    refused(load(weights | {"x_embedder.proj.bias": torch.zeros(5)}), "1 of other shapes (x_embedder.proj.bias makes 5, not 24)")
    refused(load({name: value for name, value in weights.items() if name != "pos_embed"}), "sizes cannot be told", "pos_embed")
    refused(load(weights | {"pos_embed": torch.zeros(1, 15, 24)}), "pos_embed is not the fixed table")
    refused(load(weights | {"pos_embed": torch.randn(1, 16, 24)}), "learned positions are not read")
    refused(load(weights, num_head=3), "num_head: no argument of DiT's or SiT's; nearest: 'num_heads'")
    refused(load(weights, hidden_size=48), "its config says hidden_size: 48, its weights 24")
    refused(load(weights, model="UViT-S/2"), "model, path_type, prediction: UVi; read are DiT, SiT Linear velocity")
    refused(load(weights, path_type="Linear", prediction="score"), "SiT Linear score; read are")
    refused(load({"blocks.0.adaLN_modulation.1.weight": torch.zeros(1)}), "sizes cannot be told")


def bundle_of(network=None, conditioner=None, says=("ldm.process.DDPM", {"schedule": "linear"}, "noise"), size=(8, 8)):
    process = {"target": says[0], "params": says[1]}
    label = {"target": dit.TARGETS["conditioner"], "params": {"classes": 5, "width": 24} | (conditioner or {})}
    block = {"target": dit.TARGETS["network"],
             "params": {"width": 24, "depth": 2, "heads": 3, "vector": "direct"} | (network or {})}  # fmt: skip
    torch.manual_seed(0)
    made, autoencoder = build(label), Identity(4)
    denoiser = build_denoiser(block, build(process), says[2], autoencoder, made)
    for p in denoiser.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model = {"params": {"network": block, "conditioner": label, "process": process, "parameterization": says[2]}}
    config = {"autoencoder": {"target": "autoencoder.base.Identity", "params": {"image_channels": 4}}, "model": model}
    return Bundle(autoencoder, made, denoiser, config, {"size": list(size)} if size else None).eval()


@pytest.mark.parametrize("write", [dit.write, dit_diffusers.write])
@pytest.mark.parametrize(("changes", "said"), [
    ({"network": {"positions": "rotary"}, "conditioner": {}}, "no network with positions: 'rotary', only 'sincos'"),
    ({"network": {"qk_norm": True}}, "no network with qk_norm: True"),
    ({"network": {"told": [1.0, 0.0]}}, "told [1.0, 0.0]"),
    ({"conditioner": {"to": "tokens"}, "network": {"vector": "mlp"}}, "no network with vector: 'mlp'"),
    ({"conditioner": {"to": "tokens"}}, "classes as vectors"),
    ({"size": (8, 16)}, "square pictures of one size"), ({"size": None}, "square pictures of one size"),
])  # fmt: skip
def test_what_has_no_place_there(write, changes, said):
    if "rotary" in said:
        changes["network"] |= {"heads": 3}
    refused(lambda: write(bundle_of(**changes)), said)


def test_more_that_has_no_place_in_their_authors_layout():
    refused(lambda: dit.write(bundle_of(says=("ldm.process.DDPM", {}, "noise"))), "has no model of DDPM, noise, told [0.0, 1000.0]")
    refused(lambda: dit.write(bundle_of(says=("ldm.process.RectifiedFlow", {}, "flow"))), "it has DiT, SiT Linear velocity")
    refused(lambda: dit.write(bundle_of({"base_size": 4})), "base_size: 4, only None")
    other = bundle_of()
    other.config["model"]["params"]["network"]["target"] = "my.Own"
    refused(lambda: dit.write(other), "DiT has no network my.Own, only ldm.networks.dit.DiT")


def test_a_flow_of_ours_is_a_sit():
    flow = bundle_of({"told": [1.0, 0.0]}, says=("ldm.process.RectifiedFlow", {"shift": 1.0}, "velocity"))
    weights, said = dit.write(flow)
    assert (said["model"], said["path_type"], said["prediction"]) == ("SiT", "Linear", "velocity")
    assert torch.equal(weights["final_layer.linear.bias"], -flow.denoiser.network.out.bias)


# Of diffusers.


def theirs(folder, same=True, **options):
    """A folder as diffusers saves it, and the network; ``same``: its blocks' embedders are copies, as published."""
    diffusers = pytest.importorskip("diffusers", reason="the package diffusers (extra) is not installed")
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=3, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=5, out_channels=8)
    net = diffusers.DiTTransformer2DModel(**{**sizes, **options}).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if same:
        first = net.transformer_blocks[0].norm1.emb.state_dict()
        for block in net.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    net.save_pretrained(folder)
    return net


@torch.no_grad()
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("options", [{}, dict(out_channels=None, num_layers=1, patch_size=1, sample_size=4, norm_eps=1e-3)])
def test_diffusers_computes_the_same(tmp_path, same, options):
    net = theirs(tmp_path / "theirs", same, **options)
    bundle = ldm.load(tmp_path / "theirs")
    assert (len(bundle.denoiser.network.embedders) == 1) == (same or options.get("num_layers") == 1)
    weights, config = dit_diffusers.write(bundle)
    (tmp_path / "ours").mkdir()
    save_file(weights, tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    again = type(net).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False).eval()
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    side = options.get("sample_size", 8)
    for x in (X[..., :side, :side], torch.randn(2, 4, 12, 12)):  # of another size its positions are brought to its grid
        t = torch.tensor(TIME)
        expected = net(x, t, CLASSES).sample
        found = bundle.denoiser.raw(x, t, bundle.conditioner({"class": CLASSES}))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(again(x, t, CLASSES).sample, expected, rtol=0, atol=0)
    null = net(x, t, torch.full((2,), 5)).sample
    torch.testing.assert_close(bundle.denoiser.raw(x, t, bundle.conditioner.null(2)), null, rtol=0, atol=1e-5)
    assert bundle.generate({"class": CLASSES}, steps=1).shape == (2, 4, side, side)


@torch.no_grad()
def test_ours_in_diffusers(tmp_path, caplog):
    """A network made here, with its numbers and with DiT's own."""
    diffusers = pytest.importorskip("diffusers", reason="the package diffusers (extra) is not installed")
    for options, same in (({"endpoint": True, "base_size": 4}, True), ({}, False)):
        caplog.clear()
        bundle = bundle_of(options)
        weights, config = dit_diffusers.write(bundle)
        save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        net = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
        ours = bundle.denoiser.raw(X, torch.tensor(TIME), bundle.conditioner({"class": CLASSES}))
        difference = (net(X, torch.tensor(TIME), CLASSES).sample - ours).abs().max()
        assert (difference < 1e-5) == same == ("spaces the frequencies" not in caplog.text)


def test_old_names_and_what_is_refused(tmp_path):
    theirs(tmp_path)
    config, path = json.loads((tmp_path / "config.json").read_text()), tmp_path / "diffusion_pytorch_model.safetensors"
    bundle = ldm.load(path)

    def load(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return ldm.load(path)

    assert load(_class_name="Transformer2DModel").content_hash() == bundle.content_hash()
    refused(lambda: load(_class_name="UNet2DModel"), "_class_name: UNet2DModel; expected DiTTransformer2DModel")
    refused(lambda: load(activation_fn="geglu"), "activation_fn: 'geglu'; read is 'gelu-approximate' alone")
    refused(lambda: load(out_channels=5), "out_channels: 5; read are 4, and 8 with a variance")
    refused(lambda: load(num_layers=3), "not those of the model that is described", "missing transformer_blocks 19 of 57 (transformer_blocks.2.")
    (tmp_path / "config.json").unlink()
    refused(lambda: ldm.load(path), "a DiT of diffusers; its config.json is expected beside it")
