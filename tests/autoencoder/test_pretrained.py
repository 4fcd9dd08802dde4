"""Published autoencoders: adapters over diffusers, on tiny ones with random weights saved to folders."""

import json
import shutil

import pytest
import torch
import yaml
from two_stages import write_configs

import ldm
from autoencoder.base import Autoencoder
from autoencoder.pretrained import KINDS, PUBLISHED, Pretrained, pretrained
from ldm.bundle import Bundle
from ldm.common.build import build, check
from ldm.common.files import UserError
from main import main

diffusers = pytest.importorskip("diffusers", reason="the package diffusers (extra) is not installed")
DC = dict(latent_channels=8, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
          encoder_block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16, 16), encoder_layers_per_block=(1, 1, 1),
          decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
          scaling_factor=0.41407)  # fmt: skip
KL = dict(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
          latent_channels=4, norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159)  # fmt: skip
TINY = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1), latent_channels=4)  # fmt: skip
SIZES = {"AutoencoderKL": (2, 4, KL), "AutoencoderDC": (4, 8, DC), "AutoencoderTiny": (4, 4, TINY)}


@pytest.fixture(scope="module", params=SIZES)
def saved(request, tmp_path_factory):
    """-> kind, the diffusers model itself, the folder that it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    net = getattr(diffusers, request.param)(**SIZES[request.param][2]).eval()
    net.save_pretrained(folder)
    return request.param, net, folder


@torch.no_grad()
def test_the_contract(saved):
    kind, net, folder = saved
    factor, channels, _ = SIZES[kind]
    model, x = pretrained(path=str(folder)), torch.rand(2, 3, 8, 16) * 2 - 1
    assert isinstance(model, Autoencoder) and (model.spec.factor, model.spec.channels) == (factor, channels)
    z = model.encode(x)
    assert z.shape == (2, channels, 8 // factor, 16 // factor) and model.decode(z).shape == x.shape
    raw = net.encode(x, return_dict=False)[0]
    raw, logvar = (raw.mean, raw.logvar) if kind == "AutoencoderKL" else (raw, None)
    shift, scaling = (0.1159, 0.3611) if kind == "AutoencoderKL" else (0.0, net.config.scaling_factor)
    assert torch.allclose(z, (raw - shift) * scaling, atol=1e-6)
    assert torch.allclose(model.decode(z), net.decode(raw).sample, atol=1e-5)
    assert (model.moments(x)[1] is None) == (logvar is None)
    drawn = model.encode(x, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, z) == (logvar is None)
    assert all(p.dtype == torch.float32 for p in model.parameters()) and not model.training


def test_it_can_be_trained_with_a_critic(saved):
    model = pretrained(path=str(saved[2]))
    reconstruction, bottled = model(torch.rand(1, 3, 8, 8))
    (reconstruction.square().mean() + sum(bottled.losses.values())).backward()
    assert model.last_layer.grad.abs().sum() > 0 and model.last_layer.shape[0] % 3 == 0
    assert set(bottled.losses) == ({"kl"} if saved[0] == "AutoencoderKL" else set())


def test_a_checkpoint_needs_neither_folder_nor_network(saved, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(saved[2], folder)
    block = {"target": "autoencoder.pretrained.pretrained", "params": {"path": str(folder)}}
    model = build(block)
    config = {"model": {"target": "autoencoder.lit.AutoencoderModule", "params": {"autoencoder": block}}}
    Bundle(model, config=config).save(tmp_path / "model.safetensors")
    shutil.rmtree(folder)
    other = ldm.load(tmp_path / "model.safetensors").autoencoder
    assert other.content_hash() == model.content_hash()
    x = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(other.encode(x), model.encode(x), atol=1e-5)
    json.dumps(model.block)
    assert "path" not in str(model.block) and check(model.block) == []


def test_the_folder_of_a_pipeline(saved, tmp_path):
    shutil.copytree(saved[2], tmp_path / "vae")
    assert pretrained(path=str(tmp_path)).content_hash() == pretrained(path=str(saved[2])).content_hash()
    assert pretrained(path=str(tmp_path), subfolder="vae").content_hash() == pretrained(path=str(saved[2])).content_hash()


def test_statistics_for_every_channel():
    config = {"_class_name": "AutoencoderKL", **KL, "latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    spec = Pretrained({**config, "scaling_factor": 0.5}).spec
    assert spec.shift.tolist() == [0, 1, 2, 3] and spec.scale.tolist() == [2, 4, 6, 8]


def test_without_weights_it_takes_no_memory(saved):
    block = pretrained(path=str(saved[2])).block
    bundle = Bundle.from_config({"model": {"params": {"autoencoder": block}}})
    assert {p.device.type for p in bundle.autoencoder.net.parameters()} == {"meta"}


# The table.


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_known_of_published_ones_is_plausible(name):
    known = PUBLISHED[name]
    assert known.kind in KINDS and known.hub.count("/") == 1
    assert known.factor in (8, 16, 32, 64) and known.channels in (4, 16, 32, 128) and 0 < known.scaling < 2


def cached(monkeypatch, tmp_path, name, net):
    """Puts a model into an empty hub cache, as a download would."""
    known = PUBLISHED[name]
    root = tmp_path / f"models--{known.hub.replace('/', '--')}"
    net.save_pretrained(root / "snapshots" / "abc" / (known.subfolder or ""))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    offline(monkeypatch, tmp_path)


def offline(monkeypatch, cache):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_by_name_from_the_cache_with_the_constants_of_the_table(monkeypatch, tmp_path):
    four = dict(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)  # fmt: skip
    cached(monkeypatch, tmp_path, "flux", diffusers.AutoencoderKL(**four, latent_channels=16))
    spec = pretrained("flux").spec
    assert (spec.channels, spec.factor) == (16, 8)
    assert torch.allclose(spec.shift, torch.tensor(0.1159)) and torch.allclose(1 / spec.scale, torch.tensor(0.3611))


def test_another_autoencoder_under_a_known_name(monkeypatch, tmp_path):
    cached(monkeypatch, tmp_path, "sd1", diffusers.AutoencoderKL(**KL))
    with pytest.raises(UserError, match="4 channels and factor 2; the one known by this name has 4 and 8"):
        pretrained("sd1")


def test_offline_the_ways_out_are_told(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path / "empty")
    for name in ("sdxl", "stabilityai/sdxl-vae"):
        with pytest.raises(UserError) as error:
            pretrained(name)
        said = str(error.value)
        assert "\n" not in said and said.startswith("stabilityai/sdxl-vae: not in the cache")
        assert all(words in said for words in ("hf download stabilityai/sdxl-vae", "HF_HUB_CACHE", "path: FOLDER"))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "expected either name .one of sd1, .* or path"),
        ({"name": "sd1", "path": "."}, "either name"),
        ({"name": "sdx"}, "no 'sdx'; nearest: 'sdxl'; there are sd1, "),
        ({"path": "/nowhere"}, "params.path: /nowhere: no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(params, said):
    block = {"target": "autoencoder.pretrained.pretrained", "params": params}
    (line,) = check(block, "autoencoder")
    assert line.startswith("autoencoder.params")
    with pytest.raises(UserError, match=said):
        build(block)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="lacks config.json and diffusion_pytorch_model.safetensors"):
        pretrained(path=str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    for content, said in (('{"_class_name": "UNet2DModel"}', "_class_name: UNet2DModel"), ("nope", "not valid JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=said):
            pretrained(path=str(tmp_path))


def test_stage_2_trains_on_one_by_config(monkeypatch, tmp_path, text_encoder):
    """Four steps of a tiny diffusion model; its checkpoint draws pictures when the folder is gone."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what is set while a test runs is gone afterwards
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                 up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4)  # fmt: skip
    diffusers.AutoencoderKL(**sizes).save_pretrained(tmp_path / "vae")
    config = yaml.safe_load((write_configs(tmp_path, text_encoder) / "ldm.yaml").read_text())
    config["autoencoder"] = {"target": "autoencoder.pretrained.pretrained", "params": {"path": str(tmp_path / "vae")}}
    config["model"]["params"]["statistics"] = "measure"  # published constants are not those of random weights
    config["trainer"]["max_steps"] = 4
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(config))
    assert main(["--base", str(tmp_path / "published.yaml"), "-t", "--logdir", str(tmp_path / "logs")]) == 0
    weights = pretrained(path=str(tmp_path / "vae")).net.state_dict()
    shutil.rmtree(tmp_path / "vae")
    (run,) = (tmp_path / "logs").glob("tiny_ldm-*")
    bundle = ldm.load(run)
    assert all(torch.equal(value, weights[key]) for key, value in bundle.autoencoder.net.state_dict().items())
    assert bundle.generate(["a red circle"], steps=2).shape == (1, 3, 64, 64)
