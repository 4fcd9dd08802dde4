"""--init-from and LoRA from the command line, at the smallest size."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from two_stages import write_configs

import ldm
from ldm.__main__ import main as tool
from ldm.app import starts
from ldm.common.files import UserError
from main import main


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK"):  # what is set while a test runs is gone afterwards
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory, text_encoder):
    """Folder with the configs and `logs`, in which both stages have been trained."""
    folder = write_configs(tmp_path_factory.mktemp("base"), text_encoder)
    assert main(["--base", str(folder / "ldm.yaml"), "-t", "--logdir", str(folder / "logs"), "--no-test"]) == 0
    return folder


def run_of(folder, name):
    (found,) = folder.glob(f"{name}-*")
    return found


def train(base, logs, *arguments, config="ldm.yaml"):
    return main(["--base", str(base / config), "-t", "--logdir", str(logs), "--no-test", "cache.text=false", "cache.latents=false",
                 *map(str, arguments)])  # fmt: skip


def state(run, name="last.ckpt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


# --init-from.


def test_a_diffusion_model_brings_weights_and_autoencoder_and_nothing_else(base, tmp_path, capsys):
    model = run_of(base / "logs", "tiny_ldm")
    frozen = ["model.params.optimizer.params.lr=0.0", "trainer.max_steps=2", "checkpoint.every=1"]
    assert train(base, tmp_path, "--init-from", model, "-n", "tuned", *frozen) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "begins with" in line)
    bundle = ldm.load(model)
    counts = [len(part.state_dict()) for part in (bundle.denoiser, bundle.conditioner)]
    assert line == (f"stage 1 of 1, diffusion: begins with the averaged (EMA) weights of {model}: denoiser ({counts[0]} tensors), "
                    f"conditioner ({counts[1]} tensors); step 0, new optimizer")  # fmt: skip
    tuned = run_of(tmp_path, "tuned")
    assert not list(tmp_path.glob("tiny_ae-*")) and json.loads((tuned / "DONE").read_text())["steps"] == 2
    assert [json.loads(row)["step"] for row in (tuned / "metrics.jsonl").read_text().splitlines()] == [2]
    saved, found = state(tuned), ldm.load(tuned)
    assert saved["global_step"] == 2 and saved["images_seen"] == 8
    assert found.content_hash() == bundle.content_hash()  # with a learning rate of 0 nothing has moved, averages included
    assert yaml.safe_load((tuned / "config.yaml").read_text())["init_from"] == str(model)


def test_what_was_begun_so_is_known_again_and_goes_on(base, tmp_path, capsys):
    model = run_of(base / "logs", "tiny_ldm")
    arguments = ["--init-from", model, "--resume", "auto", "trainer.max_steps=3", "checkpoint.every=1"]
    assert train(base, tmp_path, *arguments) == 0  # nothing to go on with yet
    out = capsys.readouterr().out
    assert "no unfinished run" in out and "begins with the averaged (EMA) weights" in out
    assert train(base, tmp_path, *arguments) == 0
    assert "finished already" in capsys.readouterr().out
    run = run_of(tmp_path, "tiny_ldm")
    weights = state(run)["state_dict"]
    (run / "DONE").unlink()
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "checkpoints" / "step-000003.ckpt").unlink()
    for how in (["--resume", str(run), "-t", "--no-test", "--logdir", str(tmp_path)], None):
        assert (main(how) if how else train(base, tmp_path, *arguments)) == 0
        assert "begins with" not in capsys.readouterr().out
        again = state(run)["state_dict"]
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
        for name in ("DONE", "checkpoints/last.ckpt", "checkpoints/step-000003.ckpt"):
            (run / name).unlink()


def test_an_autoencoder_begins_with_one(base, tmp_path, capsys):
    frozen = ["model.params.optimizer.params.lr=0.0", "trainer.max_steps=1"]
    for number, model in enumerate(("tiny_ae", "tiny_ldm")):  # or with that of a diffusion model
        logs = tmp_path / str(number)
        assert main(["-b", str(base / "ae.yaml"), "-t", "-l", str(logs), "--no-test", "--init-from",
                     str(run_of(base / "logs", model)), *frozen]) == 0  # fmt: skip
        assert "stage 1 of 1, autoencoder: begins with the " in capsys.readouterr().out
        expected, found = (ldm.load(run).autoencoder for run in (run_of(base / "logs", "tiny_ae"), run_of(logs, "tiny_ae")))
        for name, value in expected.encoder.state_dict().items():
            assert torch.equal(found.encoder.state_dict()[name], value)
    bundle = ldm.load(run_of(base / "logs", "tiny_ae"))
    bundle.save(tmp_path / "model.safetensors")  # the first of two stages, from a file
    assert train(base, tmp_path / "both", "--init-from", tmp_path / "model.safetensors", "trainer.max_steps=1",
                 *(f"stage1.{each}" for each in frozen)) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "stage 1 of 2, autoencoder: begins with the weights, of which there is one set, of" in out
    assert "stage 2 of 2, diffusion: begins" not in out


def test_what_does_not_fit_is_refused_before_anything_is_written(base, tmp_path, capsys):
    model = run_of(base / "logs", "tiny_ldm")
    assert train(base, tmp_path, "--init-from", model, "model.params.network.params.num_res_blocks=2") == 2
    told = error(capsys)
    assert f"--init-from {model}: it is not the model of this config: denoiser " in told and "--resume goes on" in told
    assert main(["-b", str(base / "ldm.yaml"), "--check", "--init-from", str(model),
                 "model.params.conditioner.params.width=8"]) == 2  # fmt: skip
    assert "conditioner " in error(capsys)
    assert train(base, tmp_path, "--init-from", tmp_path / "nowhere") == 2
    assert "no such file or folder" in error(capsys)
    assert train(base, tmp_path, "--init-from", run_of(base / "logs", "tiny_ae"),
                 "autoencoder={target: autoencoder.base.Identity}") == 2  # fmt: skip
    assert "holds an autoencoder model, and this config trains a diffusion model; to train on its latents: autoencoder={ckpt: " in error(
        capsys)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        train(base, tmp_path, "--init-from", model, "--resume", model)
    assert "--resume goes on with a run: give one of them" in capsys.readouterr().err


# LoRA.

LORA = ["model.params.lora={rank: 2, alpha: 4, text: true, targets: all}", "model.params.optimizer.params.lr=0.01"]


@pytest.fixture(scope="module")
def adapted(base):
    """Folder with the logs of a LoRA training of the base."""
    pytest.importorskip("peft")
    logs = base / "lora"
    assert train(base, logs, "--init-from", run_of(base / "logs", "tiny_ldm"), "-n", "lora", "checkpoint.every=2", *LORA) == 0
    return logs


def test_the_base_is_unchanged_and_the_checkpoint_small(base, adapted):
    run, model = run_of(adapted, "lora"), run_of(base / "logs", "tiny_ldm")
    saved = state(run)
    names = [name for name in saved["state_dict"] if ".lora_" not in name]
    assert names == ["ema.updates"] and saved["ldm"]["kind"] == "lora" and saved["ldm"]["base"]["path"] == str(model)
    sizes = [(each / "checkpoints" / "last.ckpt").stat().st_size for each in (run, model)]
    assert 3 * sizes[0] < sizes[1]
    moments = saved["optimizer_states"][0]["state"]
    assert len(moments) == sum(name.startswith("model.") for name in saved["state_dict"])
    assert {name.split(".")[1] for name in saved["state_dict"] if name.startswith("model.")} == {"denoiser", "conditioner"}
    learned = [value for name, value in saved["state_dict"].items() if ".lora_B." in name]
    assert all(value.abs().max() > 0 for value in learned)


def test_training_leaves_the_frozen_weights_bit_by_bit(base, adapted, monkeypatch):
    """As the training module has them at its end, under the adapters."""
    seen = {}
    monkeypatch.setattr(starts, "write_lora", lambda module, folder: seen.update(module.model.state_dict()))
    model = run_of(base / "logs", "tiny_ldm")
    assert train(base, base / "again", "--init-from", model, "-n", "again", "trainer.max_steps=3", *LORA) == 0
    bundle = ldm.load(model)
    for part in ("denoiser", "conditioner"):
        for name, value in getattr(bundle, part).state_dict().items():
            layer, _, kind = name.rpartition(".")
            found = seen.get(f"{part}.{name}", seen.get(f"{part}.{layer}.base_layer.{kind}"))
            assert torch.equal(found, value), name


def test_merged_it_draws_as_the_training_did(base, adapted, tmp_path, capsys):
    run, model = run_of(adapted, "lora"), run_of(base / "logs", "tiny_ldm")
    plain = ldm.load(model).generate(["a red circle"], steps=2)
    merged = ldm.load(model)
    written = load_file(run / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in written} == {"unet", "conditioner"}
    assert ldm.lora.apply(merged, run) == len(written) // 2
    from_checkpoint = ldm.load(model)
    ldm.lora.apply(from_checkpoint, run / "checkpoints" / "last.ckpt")
    picture = merged.generate(["a red circle"], steps=2)
    assert (picture - from_checkpoint.generate(["a red circle"], steps=2)).abs().max() < 1e-4
    assert (picture - plain).abs().max() > 1e-3
    draw = ["txt2img", "--ckpt", str(model), "--prompt", "a red circle", "--steps", "2", "--outdir"]
    for number, weight in enumerate((":0", "", ":-1")):
        assert tool([*draw, str(tmp_path / str(number)), "--lora", f"{run}{weight}"]) == 0
    assert tool([*draw, str(tmp_path / "plain")]) == 0
    pictures = [(tmp_path / name / "00000.png").read_bytes() for name in ("0", "1", "2", "plain")]
    assert len(set(pictures)) == 4  # the first differs from the last in its metadata alone
    capsys.readouterr()
    assert tool(["txt2img", "--from-image", str(tmp_path / "1" / "00000.png"), "--ckpt", str(model), "--outdir", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "00000.png").read_bytes() == pictures[1]


def test_a_lora_is_no_model(base, adapted, tmp_path, capsys):
    run = run_of(adapted, "lora")
    for path in (run, run / "pytorch_lora_weights.safetensors"):
        assert tool(["txt2img", "--ckpt", str(path), "--prompt", "a", "--outdir", str(tmp_path / "out")]) == 2
        assert "this is a LoRA, which changes another model and is none by itself" in capsys.readouterr().err
    assert tool(["txt2img", "--ckpt", str(run), "--lora", "x:y", "--prompt", "a", "--outdir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_an_interrupted_lora_goes_on_as_if_it_had_not_been(base, adapted, tmp_path):
    logs = shutil.copytree(adapted, tmp_path / "logs")
    run = run_of(logs, "lora")
    whole = state(run)
    (run / "DONE").unlink()
    for name in ("last.ckpt", "step-000006.ckpt"):
        (run / "checkpoints" / name).unlink()
    assert main(["--resume", str(run), "-t", "--no-test", "--logdir", str(logs)]) == 0
    again = state(run)
    assert again["global_step"] == 6 and all(torch.equal(value, again["state_dict"][name]) for name, value in
                                             whole["state_dict"].items())  # fmt: skip


def test_lora_without_a_model_or_with_wrong_numbers(base, tmp_path, capsys):
    assert train(base, tmp_path, "model.params.lora={rank: 2}") == 2
    assert "model.params.lora changes a given model: name it, --init-from" in error(capsys)
    model = run_of(base / "logs", "tiny_ldm")
    assert train(base, tmp_path, "--init-from", model, "model.params.lora={rank: 0, alpha: -1.0}") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(";")[0] for line in told] == ["error: model.params.lora.rank: 0", "error: model.params.lora.alpha: -1.0"]
    assert train(base, tmp_path, "--init-from", model, "model.params.lora={rnk: 2}") == 2
    assert "model.params.lora.rnk: no such option; nearest: 'rank'" in error(capsys)
    assert train(base, tmp_path, "--init-from", model, "model.params.lora={targets: [to_p]}") == 2
    assert "lora.targets: no layer ends in 'to_p'; nearest: 'to_" in error(capsys)
    assert not list(tmp_path.iterdir())


def test_another_base_is_not_gone_on_with(base, adapted, tmp_path, capsys):
    logs = shutil.copytree(adapted, tmp_path / "logs")
    run, model = run_of(logs, "lora"), shutil.copytree(run_of(base / "logs", "tiny_ldm"), tmp_path / "model")
    bundle = ldm.load(model)
    with torch.no_grad():
        next(bundle.denoiser.parameters()).add_(1)
    bundle.save(tmp_path / "moved.ckpt")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"init_from": str(tmp_path / "moved.ckpt")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["--resume", str(run), "-t", "--no-test", "--logdir", str(logs)]) == 2
    assert "is no longer the model that" in error(capsys)


def test_one_model_or_another(base):
    """What a stage begins with is decided by what is in the file."""
    from ldm.app.stages import read

    stages, mistakes = read([base / "ldm.yaml"], init_from=str(run_of(base / "logs", "tiny_ldm")))
    assert mistakes == []
    (placed,) = starts.placed(stages, resumed=False)
    assert placed.before is None and placed.config["autoencoder"] == {"ckpt": str(run_of(base / "logs", "tiny_ldm"))}
    assert starts.placed(stages, resumed=True) == stages
    stages, _ = read([base / "ae.yaml"], init_from=str(base / "ae.yaml"))
    with pytest.raises(UserError, match="not a checkpoint"):
        starts.placed(stages, resumed=False)


def test_without_peft_one_line_says_so(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert train(base, tmp_path, "--init-from", run_of(base / "logs", "tiny_ldm"), *LORA) == 2
    told = error(capsys)
    assert "lora needs the peft library" in told and "pip install -c constraints.txt peft" in told and not list(tmp_path.iterdir())


def test_a_lora_of_a_published_model_is_loaded_by_diffusers(tmp_path, capsys):
    """Stable Diffusion's layout -> LoRA of UNet and text encoder -> a diffusers pipeline: both compute the same."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    source = Path(__file__).parent / "data/parity/txt2img_kl"
    for name, here in (("model.safetensors", "model.safetensors"), ("config.yaml", "model.yaml")):
        shutil.copy(source / name, tmp_path / here)
    shutil.copytree(source / "clip_tiny", tmp_path / "clip_tiny")
    model = tmp_path / "model.safetensors"
    config = {"name": "lora", "autoencoder": {"ckpt": str(model)}, "model": ldm.load(model).config["model"],
              "data": {"train": {"target": "ldm.data.shapes.Shapes", "params": {"count": 8}}}, "loader": {"batch_size": 2},
              "trainer": {"max_steps": 3, "accelerator": "cpu"}, "logging": {"wandb": False}}  # fmt: skip
    config["model"]["params"] |= {
        "lora": {"rank": 2, "text": True}, "statistics": "force",
        "optimizer": {"target": "torch.optim.AdamW", "params": {"lr": 0.01}}}  # fmt: skip
    config["model"]["params"]["conditioner"]["params"]["vocabulary"] = str(tmp_path / "clip_tiny")
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    logs = tmp_path / "logs"
    assert main(["-b", str(tmp_path / "lora.yaml"), "-t", "--init-from", str(model), "-l", str(logs), "--no-test"]) == 0
    run = run_of(logs, "lora")
    assert {name.split(".")[0] for name in load_file(run / "pytorch_lora_weights.safetensors")} == {"unet", "text_encoder"}
    assert tool(["convert", "--ckpt", str(model), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    ids, x, t = torch.arange(77)[None] * 7 % 580, torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    with torch.no_grad():
        before = pipe.text_encoder(ids)[0]
        pipe.load_lora_weights(str(run))
        theirs = pipe.text_encoder(ids)[0]
        noise = pipe.unet(x, t, theirs).sample
        bundle = ldm.load(model)
        ldm.lora.apply(bundle, run)
        ours = bundle.conditioner({"caption": ids})
        assert (theirs - before).abs().max() > 1e-3
        torch.testing.assert_close(ours.tokens, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(bundle.denoiser.raw(x, t, ours), noise, atol=1e-4, rtol=0)
