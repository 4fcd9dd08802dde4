"""LoRA files: written for diffusers and read from everybody, held against diffusers' and peft's own layers."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from autoencoder.base import Identity
from ldm import lora
from ldm.adapters import adapt, changes
from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.cond import Cond
from ldm.conditioners.clip import ClipText
from ldm.denoiser import Denoiser
from ldm.interop import rows, text_names, unet_names
from ldm.networks.unet import UNet
from ldm.process import DDPM

pytest.importorskip("peft")
KINDS = {"transformer": {}, "conv": {"linear_projections": False}, "self": {"attention": "self"}}
X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([3.0, 700.0])
COND = Cond(tokens=torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(6)))


def noisy(module, seed=0, scale=0.1):
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, scale, generator=source)
    return module


def make(kind="transformer", text=False):
    """A model of latents that are pictures; its vocabulary is absent."""
    network = noisy(UNet(4, 4, None if kind == "self" else 16, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
                         transformer_depth=[0, 1], num_heads=2, groups=16, **KINDS[kind]))  # fmt: skip
    conditioner = None
    if text:
        conditioner = noisy(ClipText(vocab_size=99, width=16, layers=2, heads=2, max_length=8, vocabulary=None), 1, 0.3)
    return Bundle(Identity(4), conditioner, Denoiser(network, DDPM(), "noise")).eval()


def trained(bundle, **options):
    """The same with adapters that have learned something."""
    model = nn.ModuleDict({"denoiser": copy.deepcopy(bundle.denoiser)})
    if bundle.conditioner is not None:
        model["conditioner"] = copy.deepcopy(bundle.conditioner)
    adapt(model, options)
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(0, 0.2, generator=source)
    return model.eval()


def out(network):
    with torch.no_grad():
        return network(X, T, COND)


def save(model, path):
    lora.save(model["denoiser"], model["conditioner"] if "conditioner" in model else None, path)
    return path


@pytest.mark.parametrize("targets", ["attention", "all", ["to_q", "attention.qkv", "conv1"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapters_output(kind, targets, tmp_path):
    bundle = make(kind)
    targets = [each for each in targets if (each in ("to_q", "conv1")) == (kind != "self") or each == "conv1"] if isinstance(
        targets, list) else targets  # fmt: skip
    model = trained(bundle, rank=4, alpha=2.0, targets=targets)
    before, adapted = out(bundle.denoiser.network), out(model["denoiser"].network)
    assert lora.apply(bundle, save(model, tmp_path / "a.safetensors")) >= len(list(changes(model)))
    after = out(bundle.denoiser.network)
    assert (after - adapted).abs().max() < 1e-5 < 1e-2 < (after - before).abs().max()
    lora.apply(bundle, tmp_path / "a.safetensors", weight=-1.0)
    assert (out(bundle.denoiser.network) - before).abs().max() < 1e-5


def test_half_of_it_is_half_of_the_change(tmp_path):
    whole, half, plain = make(), make(), make()
    path = save(trained(plain, rank=4), tmp_path / "a.safetensors")
    lora.apply(whole, path)
    lora.apply(half, path, weight=0.5)
    for name, value in half.denoiser.named_parameters():
        base, full = plain.denoiser.get_parameter(name), whole.denoiser.get_parameter(name)
        assert torch.allclose(value, base + 0.5 * (full - base), atol=1e-6)


# Held against diffusers.


def twin(bundle):
    """diffusers' UNet with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    network = bundle.denoiser.network
    common = dict(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16)
    if network.middle[0].attention.__class__.__name__ == "SelfAttention":
        made = diffusers.UNet2DModel(down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=32, freq_shift=0,
                                     up_block_types=("AttnUpBlock2D", "UpBlock2D"), flip_sin_to_cos=True, **common)  # fmt: skip
    else:
        linear = isinstance(network.middle[0].attention.proj_in, nn.Linear)
        made = diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16, attention_head_dim=2, use_linear_projection=linear, **common)  # fmt: skip
    table = rows.existing(unet_names.rows(network, "diffusers"), network.state_dict())
    made.load_state_dict(rows.back(table, network.state_dict()))
    return made.eval()


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("kind", ["transformer", "conv"])
def test_diffusers_loads_what_is_written(kind, targets, tmp_path):
    bundle = make(kind)
    theirs = twin(bundle)
    with torch.no_grad():
        assert (theirs(X, T, COND.tokens).sample - out(bundle.denoiser.network)).abs().max() < 1e-5
    path = save(trained(bundle, rank=4, alpha=6.0, targets=targets), tmp_path / "pytorch_lora_weights.safetensors")
    theirs.load_lora_adapter(str(path), prefix="unet")
    lora.apply(bundle, path)
    with torch.no_grad():
        assert (theirs(X, T, COND.tokens).sample - out(bundle.denoiser.network)).abs().max() < 1e-5


def test_queries_keys_and_values_of_one_layer_are_three_there(tmp_path):
    bundle = make("self")
    path = save(trained(bundle, rank=4), tmp_path / "a.safetensors")
    written, theirs = load_file(path), twin(bundle)
    names = {name for name, part in theirs.named_modules() if isinstance(part, nn.Linear)}
    layers = {key.removeprefix("unet.").split(".lora_")[0] for key in written}
    assert layers <= names and {"to_q", "to_k", "to_v"} <= {name.rpartition(".")[2] for name in layers}
    weights = theirs.state_dict()
    for layer in layers:
        down, up = (written[f"unet.{layer}.lora_{side}.weight"] for side in "AB")
        weights[f"{layer}.weight"] += up @ down
    lora.apply(bundle, path)
    with torch.no_grad():
        assert (theirs(X, T).sample - out(bundle.denoiser.network)).abs().max() < 1e-5


def test_the_text_encoder_too_in_a_pipeline(tmp_path):
    """A tiny Stable Diffusion pipeline: UNet and text encoder take their parts of the file."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    bundle = make(text=True)
    config = transformers.CLIPTextConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                         intermediate_size=64, max_position_embeddings=8, eos_token_id=98)  # fmt: skip
    encoder, ours = transformers.CLIPTextModel(config).eval(), bundle.conditioner
    wrapped = hasattr(encoder, "text_model")
    table = rows.existing(text_names.hf_clip(2, wrapped=wrapped), ours.state_dict())
    encoder.load_state_dict(rows.back(table, ours.state_dict()), strict=False)
    ids = torch.tensor([[97, 5, 7, 98, 98, 98, 98, 98]])

    def states():
        with torch.no_grad():
            return encoder(ids).last_hidden_state, bundle.conditioner({"caption": ids}).tokens

    theirs, own = states()
    assert (theirs - own).abs().max() < 1e-5
    unet = twin(bundle)
    pipe = diffusers.StableDiffusionPipeline(diffusers.AutoencoderKL(), encoder, None, unet, diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
                                             requires_safety_checker=False)  # fmt: skip
    save(trained(bundle, rank=4, text=True, targets="all"), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(str(tmp_path))
    lora.apply(bundle, tmp_path)
    changed, own = states()
    assert (changed - own).abs().max() < 1e-4 and (changed - theirs).abs().max() > 1e-2
    with torch.no_grad():
        assert (unet(X, T, COND.tokens).sample - out(bundle.denoiser.network)).abs().max() < 1e-5


# Other people's files.


def kohya(name):
    return "lora_" + name.replace("unet.", "unet.", 1).replace("text_encoder.", "te.", 1).replace(".", "_")


def old(name):
    if ".attn" not in name or "self_attn" in name:
        return None
    before, _, last = name.removesuffix(".0").rpartition(".")
    return f"{before}.processor.{last}_lora"


def foreign(layout, path, tmp_path):
    """The file at ``path`` in another layout, with alpha / rank 1/2 where that can be said."""
    given, found = load_file(path), {}
    layers = {key.split(".lora_")[0] for key in given}
    for layer in layers:
        down, up = (given[f"{layer}.lora_{side}.weight"] for side in "AB")
        if layout == "kohya":
            found |= {f"{kohya(layer)}.lora_down.weight": down, f"{kohya(layer)}.lora_up.weight": up,
                      f"{kohya(layer)}.alpha": torch.tensor(2.0)}  # fmt: skip
        elif layout == "peft":
            name = "base_model.model." + layer.removeprefix("unet.")
            found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        elif layout == "diffusers":
            found |= {f"{layer}.lora.down.weight": down, f"{layer}.lora.up.weight": up}
        else:
            found |= {f"{old(layer)}.down.weight": down, f"{old(layer)}.up.weight": up}
    folder = tmp_path / layout
    folder.mkdir()
    name = "adapter_model.safetensors" if layout == "peft" else "pytorch_lora_weights.safetensors"
    if layout == "peft":
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "peft_type": "LORA"}))
    if layout == "old":
        torch.save(found, folder / "pytorch_lora_weights.bin")
    else:
        save_file(found, folder / name)
    return folder


@pytest.mark.parametrize("layout, share", [("kohya", 0.5), ("peft", 0.5), ("diffusers", 1.0), ("old", 1.0)])
def test_every_layout_says_the_same(layout, share, tmp_path):
    ours, theirs = make(), make()
    path = save(trained(ours, rank=4), tmp_path / "a.safetensors")
    lora.apply(ours, path, weight=share)
    lora.apply(theirs, foreign(layout, path, tmp_path))
    for name, value in theirs.denoiser.named_parameters():
        assert torch.allclose(value, ours.denoiser.get_parameter(name), atol=1e-6)


def test_kohyas_names_of_compvis(tmp_path):
    bundle, plain = make(), make()
    table = unet_names.rows(bundle.denoiser.network, "compvis")
    row = next(row for row in table if row.theirs[0].endswith("attn1.to_q.weight"))
    name = "lora_unet_" + row.theirs[0].removesuffix(".weight").replace(".", "_")
    save_file({f"{name}.lora_down.weight": torch.ones(1, 64), f"{name}.lora_up.weight": torch.ones(64, 1)}, tmp_path / "x.safetensors")
    assert lora.apply(bundle, tmp_path / "x.safetensors") == 1
    changed = bundle.denoiser.network.get_parameter(row.ours[0]) - plain.denoiser.network.get_parameter(row.ours[0])
    assert torch.allclose(changed, torch.ones(64, 64), atol=1e-6)


def test_the_settings_are_written_as_diffusers_does(tmp_path):
    path = save(trained(make(), rank=4, alpha=2.0), tmp_path / "a.safetensors")
    with safe_open(path, "pt") as opened:
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert about["unet.r"] == about["unet.lora_alpha"] == 4 and len(about["unet.target_modules"]) == 32


# What is refused.


def refused(bundle, path, said):
    before = copy.deepcopy(bundle.state_dict())
    with pytest.raises(UserError, match=said) as error:
        lora.apply(bundle, path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in bundle.state_dict().items())


def test_what_is_refused(tmp_path):
    bundle = make()

    def file(name, tensors):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    pair = {"lora_A.weight": torch.ones(1, 64), "lora_B.weight": torch.ones(64, 1)}
    middle = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    refused(bundle, tmp_path / "nowhere", "no such file or folder")
    refused(bundle, tmp_path, "a folder without pytorch_lora_weights.safetensors")
    refused(bundle, file("a.safetensors", {"conv.weight": torch.ones(1)}), r"no LoRA: none of its 1 tensors \(conv.weight\) is a change of a layer")
    refused(bundle, file("h.safetensors", {"conv.lora": torch.ones(1)}), "no LoRA, or a damaged one: of its 1 tensors 1 unknown")
    refused(bundle, file("b.safetensors", {f"{middle}.lora_A.weight": torch.ones(1, 64)}), "1 without their other half")
    refused(bundle, file("c.safetensors", {f"unet.nothing.{key}": value for key, value in pair.items()}), r"1 of its 1 layers are none")
    refused(bundle, file("d.safetensors", {f"{middle}.{key}": value[..., :32] if "A" in key else value for key, value in pair.items()}),
            "is changed by 64x32, but the model's is 64x64; it belongs to another model")  # fmt: skip
    refused(bundle, file("e.safetensors", {f"{middle}.hada_w1_a": torch.ones(1)}), "of the kind LoHa")
    (tmp_path / "f.safetensors").write_bytes(b"PK half")
    refused(bundle, tmp_path / "f.safetensors", "damaged, or no .safetensors file")
    (tmp_path / "g.bin").write_bytes(b"nothing")
    refused(bundle, tmp_path / "g.bin", "damaged, or no file of weights")
    alone = Bundle(Identity(4))
    with pytest.raises(UserError, match="holds an autoencoder alone"):
        lora.apply(alone, tmp_path / "a.safetensors")
