"""ldm.load: what training writes, whole and damaged, and what others write."""

import copy
import json
import logging
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.load import load, read


@pytest.fixture(scope="module")
def training(bundle, model_config) -> dict:
    """A checkpoint with all that the training module puts into it: averaged weights as in `bundle`, raw ones plus 1."""
    block = copy.deepcopy(model_config["model"])
    module = build(block, autoencoder=copy.deepcopy(bundle.autoencoder), seed=1, sampling=model_config["sampling"])
    with torch.no_grad():
        for model, more in ((module.ema.shadow, 0.0), (module.model, 1.0)):
            for key, value in model.state_dict().items():
                value.copy_(bundle.state_dict()[key] + more)
    optimizers = [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}]
    rest = {"global_step": 120, "optimizer_states": optimizers, "ldm": bundle.describe()}
    return {"state_dict": module.state_dict(), **rest}


@pytest.fixture
def checkpoint(training, tmp_path):
    torch.save(training, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def saved(path, content):
    torch.save(content, path)
    return path


def test_the_averaged_weights_are_taken_and_that_is_said(checkpoint, bundle, caplog):
    with caplog.at_level(logging.INFO):
        averaged, raw = ldm.load(checkpoint), ldm.load(checkpoint, ema=False)
    assert [record.getMessage().split(": ")[1] for record in caplog.records if "its config names" not in record.getMessage()] == [
        "averaged (EMA) weights", "raw, not the averaged (EMA), weights"]  # fmt: skip
    assert averaged.content_hash() == bundle.content_hash()
    key = "denoiser.network.conv_in.weight"
    assert torch.equal(raw.state_dict()[key], bundle.state_dict()[key] + 1)
    assert raw.autoencoder.content_hash() == bundle.autoencoder.content_hash()
    assert not any(part.training for part in averaged.modules())
    assert torch.equal(averaged.generate(["a red star"]), bundle.generate(["a red star"]))


def test_traces_of_compile_and_ddp_are_removed(training, bundle, tmp_path):
    wrapped = {}
    for key, value in training["state_dict"].items():
        key = key.replace("network.", "network._orig_mod.module.").replace("model.", "module.model.", 1)
        wrapped[f"_orig_mod.{key}"] = value
    path = saved(tmp_path / "wrapped.ckpt", training | {"state_dict": wrapped})
    assert load(path).content_hash() == bundle.content_hash()


def test_an_autoencoders_own_checkpoint(bundle, model_config, tmp_path):
    critic = {"target": "autoencoder.critics.Adversarial",
              "params": {"net": {"target": "autoencoder.critics.PatchCritic", "params": {"width": 4}}}}
    params = {"autoencoder": model_config["autoencoder"], "critic": critic, "ema_decay": 0.9,
              "loss": {"target": "autoencoder.losses.ReconstructionLoss"}, "optimizer": {"target": "torch.optim.AdamW"}}
    config = {"name": "ae", "model": {"target": "autoencoder.lit.AutoencoderModule", "params": params}}
    module = build(copy.deepcopy(config["model"]), seed=1)
    module.ema.shadow.load_state_dict(bundle.autoencoder.state_dict())
    about = Bundle(module.best, config=config).describe()
    trained_beside = {"loss.logvar": torch.zeros(()), "regularisers.0.projection.weight": torch.zeros(4, 4, 1, 1)}
    path = saved(tmp_path / "ae.ckpt", {"state_dict": module.state_dict() | trained_beside, "ldm": about})
    found, raw = load(path), load(path, ema=False)
    assert found.conditioner is None and found.denoiser is None
    assert found.autoencoder.content_hash() == bundle.autoencoder.content_hash()
    assert raw.autoencoder.content_hash() == module.autoencoder.content_hash() != found.autoencoder.content_hash()
    found.save(tmp_path / "ae.safetensors")
    assert load(tmp_path / "ae.safetensors").content_hash() == found.content_hash()


def test_a_run_folder(training, tmp_path):
    folder = tmp_path / "tiny-20250101-000000"
    (folder / "checkpoints").mkdir(parents=True)
    saved(folder / "checkpoints" / "last.ckpt", training)
    assert read(folder).path == folder / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=f"run folders in it: {re.escape(str(folder))}"):
        load(tmp_path)
    saved(folder / "final.ckpt", training)
    (folder / "DONE").write_text(json.dumps({"key": "0", "checkpoint": "final.ckpt"}))
    assert read(folder).path == folder / "final.ckpt"
    assert read(folder).step == 120


def test_dtype_and_device(checkpoint):
    found = load(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"))
    kinds = {p.dtype for part in (found.denoiser, found.conditioner) for p in part.parameters()}
    assert kinds == {torch.bfloat16} and found.autoencoder.shift.dtype == torch.float32


def test_a_config_that_differs_is_compared_not_obeyed(checkpoint, model_config, tmp_path, caplog):
    other = tmp_path / "other.yaml"
    other.write_text("model: {params: {network: {params: {model_channels: 64, num_heads: 2}}}}")
    with caplog.at_level(logging.WARNING):
        found = load(checkpoint, other)
    assert found.config == model_config
    assert "model.params.network.params.model_channels: 32 (given: 64)" in caplog.text
    assert "num_heads" not in caplog.text
    caplog.clear()
    load(checkpoint, model_config)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# What is not ours, damaged, or put together from two.


def refused(path, *said):
    with pytest.raises(UserError) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    for words in (path.name, *said):
        assert words in text


def test_an_autoencoder_that_the_model_was_not_trained_with(training, tmp_path):
    state = dict(training["state_dict"])
    state["autoencoder.shift"] = state["autoencoder.shift"] + 1
    refused(saved(tmp_path / "x.ckpt", training | {"state_dict": state}), training["ldm"]["autoencoder_hash"])


def test_missing_weights(training, tmp_path):
    state = {key: value for key, value in training["state_dict"].items() if "network" not in key}
    refused(saved(tmp_path / "x.ckpt", training | {"state_dict": state}), "denoiser 0/", "missing denoiser.network.")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_that_end_too_early(bundle, tmp_path, suffix, share):
    path = tmp_path / f"half{suffix}"
    bundle.save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "" if share == 0 and suffix == ".ckpt" else "damaged")


def test_a_checkpoint_whose_middle_is_lost(bundle, tmp_path):
    path = tmp_path / "x.ckpt"
    bundle.save(path)
    data = bytearray(path.read_bytes())
    data[:2000] = bytes(2000)
    path.write_bytes(data)
    refused(path, "damaged")


def test_pickles_are_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))

    refused(saved(tmp_path / "evil.ckpt", {"state_dict": {}, "ldm": Evil()}), "could run code", "exec")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path / "old.ckpt", "not a checkpoint")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["unet.down_blocks.0.lora_A.weight"], "a LoRA"),
        (["lora_unet_down.lora_up.weight"], "a LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.a"], "names of compvis's"),
        (["down_blocks.0.resnets.0.conv1.weight"], "of diffusers"),
        (["fc.weight"], "does not say what model it holds"),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_other_programs_files(tmp_path, names, kind, suffix):
    path, weights = tmp_path / f"foreign{suffix}", {name: torch.zeros(1) for name in names}
    if suffix == ".ckpt":
        torch.save({"state_dict": weights} if "fc" in names[0] else weights, path)
    else:
        save_file(weights, path)
    refused(path, kind, *["read are a .ckpt or .safetensors that this program wrote, a run folder"] * ("names of" not in kind))


def test_other_things(tmp_path):
    refused(saved(tmp_path / "optimizer.pt", {"state": {}, "param_groups": []}), "optimizer's state")
    for name, said in (("control_model.input_blocks.0.0.weight", "a ControlNet"), ("double_blocks.0.img_attn.qkv.weight", "of flux"),
                       ("model.diffusion_model.joint_blocks.0.x.weight", "its network is no UNet")):
        refused(saved(tmp_path / "other.pt", {name: torch.zeros(3)}), said)
    refused(saved(tmp_path / "words.pt", {"string_to_param": {"*": torch.zeros(3)}}), "a textual inversion")
    refused(saved(tmp_path / "tensor.pt", torch.zeros(3)), "holds a Tensor")
    refused(saved(tmp_path / "x.ckpt", {"state_dict": {}, "ldm": {"kind": "diffusion"}}), "lacks its kind or the")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "not a checkpoint (5 bytes)")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    refused(tmp_path / "pipeline", "diffusers")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "a folder without a checkpoint", "checkpoints/last.ckpt")


def test_a_config_that_does_not_build(training, tmp_path):
    about = copy.deepcopy(training["ldm"])
    about["config"]["model"]["params"]["network"]["params"]["num_haeds"] = 2
    refused(saved(tmp_path / "a.ckpt", training | {"ldm": about}), "cannot be built", "nearest: 'num_heads'")
    del about["config"]["model"]["params"]["network"]
    refused(saved(tmp_path / "b.ckpt", training | {"ldm": about}), "cannot be built", "expected a block")
    about["config"]["autoencoder"] = {"config": "stage1.yaml"}
    refused(saved(tmp_path / "c.ckpt", training | {"ldm": about}), "config holds it as a block")


def test_a_path_that_is_not_there_names_the_nearest(checkpoint):
    with pytest.raises(UserError, match=f"lost.ckpt: no such file or folder; nearest: {checkpoint}"):
        load(checkpoint.with_name("lost.ckpt"))
