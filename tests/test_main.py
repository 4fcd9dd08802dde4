"""Training from the command line, at the smallest size."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from two_stages import write_configs

import ldm
from ldm.__main__ import main as tool
from main import main, parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK"):  # what is set while a test runs is gone afterwards
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.fixture
def configs(tmp_path, text_encoder):
    return write_configs(tmp_path, text_encoder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_encoder):
    """Folder with the configs and `logs`, in which both stages have been trained."""
    folder = write_configs(tmp_path_factory.mktemp("trained"), text_encoder)
    assert main(["--base", str(folder / "ldm.yaml"), "-t", "--logdir", str(folder / "logs")]) == 0
    return folder


def runs(folder, name):
    return sorted((folder / "logs").glob(f"{name}-*"))


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", *command("--help")[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and "--resume" in done.stdout and "--scale-lr" in done.stdout
    assert not {"torch", "numpy", "omegaconf"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("arguments", [
    ["-b", "a.yaml", "trainer.max_steps=3", "-t"], ["-t", "--base", "a.yaml", "trainer.max_steps=3"],
    ["trainer.max_steps=3", "--base", "a.yaml", "-t"]])  # fmt: skip
def test_arguments_in_any_order(arguments):
    args = parse(arguments)
    assert args.base == ["a.yaml"] and args.overrides == ["trainer.max_steps=3"] and args.train


def test_spellings():
    args = parse(["-b", "a.yaml", "b.yaml", "-t", "--no_test", "--scale_lr", "true",
                  "-n", "x", "-p", "y", "-s", "3", "-l", "z"])  # fmt: skip
    assert args.base == ["a.yaml", "b.yaml"] and args.no_test and args.scale_lr is True
    assert (args.name, args.postfix, args.seed, args.logdir) == ("x", "y", 3, "z")


@pytest.mark.parametrize("arguments, told", [(["-b", "a.yaml"], "add -t to train"), (["-t"], "add --base")])
def test_what_to_add(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and told in capsys.readouterr().err


def test_two_stages_with_one_command(trained):
    (first,), (second,) = runs(trained, "tiny_ae"), runs(trained, "tiny_ldm")
    for folder, steps, pictures in ((first, 4, "reconstructions"), (second, 6, "samples")):
        done = json.loads((folder / "DONE").read_text())
        assert done["steps"] == steps and done["images"] == 4 * steps and (folder / done["checkpoint"]).is_file()
        assert {path.name for path in (folder / pictures).iterdir()} == {"step-000004.png", "final.png"}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(2, steps + 1, 2))
        assert [row["step"] for row in rows if "val/loss" in row] == [4]
        assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == steps
    said = json.loads(Image.open(second / "samples" / "final.png").text["ldm"])
    assert len(said["prompts"]) == 3 and said["step"] == 6


def test_the_checkpoint_alone_is_the_model(trained):
    (second,) = runs(trained, "tiny_ldm")
    saved = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    about = saved["ldm"]
    assert about["kind"] == "diffusion" and about["config"]["autoencoder"]["target"] == "autoencoder.model.convolutional"
    bundle = ldm.load(second)
    assert about["autoencoder_hash"] == bundle.autoencoder.content_hash()
    assert bundle.generate(["a red circle"], steps=2).shape == (1, 3, 64, 64)
    (first,) = runs(trained, "tiny_ae")
    autoencoder = ldm.load(first).autoencoder
    assert autoencoder.content_hash() == about["autoencoder_hash"] and autoencoder.statistics_count == 24
    latents = autoencoder.encode(torch.rand(2, 3, 64, 64))
    assert latents.shape == (2, 4, 16, 16)


def test_finished_stages_are_used_again(trained, tmp_path, capsys):
    logs = shutil.copytree(trained / "logs", tmp_path / "logs")
    base = ["--base", str(trained / "ldm.yaml"), "-t", "--logdir", str(logs), "--no-test"]
    assert main(base) == 0
    assert "stage 2 of 2, diffusion: finished already" in capsys.readouterr().out and len(runs(tmp_path, "tiny_*")) == 2
    assert main([*base, "trainer.max_steps=2", "cache.latents=false", "cache.text=false", "sampling.prompts=[a, b]"]) == 0
    out = capsys.readouterr().out
    assert "stage 1 of 2, autoencoder: finished already" in out and '--prompt "a"' in out
    assert len(runs(tmp_path, "tiny_ldm")) == 2 and len(runs(tmp_path, "tiny_ae")) == 1
    assert not (runs(tmp_path, "tiny_ldm")[-1] / "samples").exists()


def test_the_same_command_gives_the_same_checkpoints_whatever_the_workers(trained, tmp_path, capsys):
    workers = ["loader.workers=2", "stage1.loader.workers=2"]
    assert main(["--base", str(trained / "ldm.yaml"), "-t", "--logdir", str(tmp_path / "logs"), "--no-test", *workers]) == 0
    for name in ("tiny_ae", "tiny_ldm"):
        (one,), (other,) = runs(trained, name), runs(tmp_path, name)
        capsys.readouterr()
        assert tool(["info", str(one), "--compare", str(one)]) == 0 and "the same, to the bit" in capsys.readouterr().out
        assert tool(["info", str(one), "--compare", str(other)]) == 1
        told = capsys.readouterr().out.splitlines()
        differ = [line.split(":")[0].strip() for line in told if line.startswith("  ")]
        assert differ == ["ldm.config.loader.workers"] and told[-1].startswith("1 of ")


def test_a_run_that_is_not_finite_ends_with_3_and_its_last_finite_weights(configs, capsys):
    logs = ["-l", str(configs / "logs"), "--no-test"]
    assert main(["-b", str(configs / "ae.yaml"), "-t", *logs, "model.params.optimizer.params.lr=1e30", "trainer.max_steps=50"]) == 3
    out, err = capsys.readouterr()
    assert "not finite" in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: batch ")
    (run,) = runs(configs, "tiny_ae")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert f"the last finite weights, of step {saved['global_step']}, are in {run / 'checkpoints' / 'last.ckpt'}" in out
    assert all(value.isfinite().all() for value in saved["state_dict"].values()) and not (run / "DONE").exists()


def test_a_resumed_stage_2_is_the_uninterrupted_one(trained, tmp_path):
    logs = shutil.copytree(trained / "logs", tmp_path / "logs")
    (second,) = runs(tmp_path, "tiny_ldm")
    (second / "DONE").unlink()
    (second / "checkpoints" / "step-000006.ckpt").unlink()
    (second / "checkpoints" / "last.ckpt").write_bytes(b"PK half")  # the newest is damaged: the one before is taken
    shutil.rmtree(runs(tmp_path, "tiny_ae")[0])  # its autoencoder is in its checkpoint
    assert main(["--base", str(trained / "ldm.yaml"), "-t", "--logdir", str(logs), "--resume", "auto"]) == 0
    assert runs(tmp_path, "tiny_ldm") == [second] and not runs(tmp_path, "tiny_ae")
    (straight,) = runs(trained, "tiny_ldm")
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (straight, second))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    steps = [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4, 6]


def test_stage_1_alone_with_a_scaled_learning_rate(configs, capsys):
    assert main(["-b", str(configs / "ae.yaml"), "-t", "-l", str(configs / "logs"), "-n", "mine", "-p", "x", "--no-test",
                 "--scale-lr", "true", "trainer.max_steps=2"]) == 0  # fmt: skip
    (run,) = runs(configs, "mine_x")
    assert "effective lr 0.004 (scaled by the global batch, 4)" in capsys.readouterr().out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["name"] == "mine" and config["model"]["params"]["optimizer"]["params"]["lr"] == 0.004
    assert not (run / "reconstructions").exists()


@pytest.mark.parametrize("overrides, told", [
    (["trainer.max_stepz=1", "model.params.ema=2"], ["model.params.ema: ", "trainer.max_stepz: "]),
    (["autoencoder={ckpt: nowhere.ckpt}"], ["autoencoder.ckpt: no such file nowhere.ckpt; stage 2 learns on"]),
    (["data.train={target: ldm.data.folder.ImageFolder, params: {root: /no, size: 64}}"], ["stage 2 of 2, diffusion: data."]),
    (["model.params.network.params.transformer_depth=[1]"], ["stage 2 of 2, diffusion: transformer_depth"]),
    (["trainer.accelerator=tpux"], ["trainer.accelerator: there is no 'tpux'; nearest: 'tpu'"]),
])  # fmt: skip
def test_mistakes_leave_nothing_behind(configs, capsys, overrides, told):
    assert main(["-b", str(configs / "ldm.yaml"), "-t", "-l", str(configs / "logs"), *overrides]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert line.startswith(f"error: {part}")
    assert not (configs / "logs").exists()


def test_a_missing_config_is_one_line(tmp_path):
    done = subprocess.run(command("--base", "nope.yaml", "-t"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: nope.yaml: no such config file")
    assert not list(tmp_path.iterdir())


def test_check_prints_the_plan_and_leaves_nothing(configs, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    assert main(["-b", str(configs / "ldm.yaml"), "--check", "trainer.devices=2"]) == 0
    out = capsys.readouterr().out
    assert "stage 1 of 2" in out and "global batch 8 = 4 x 2 devices" in out and out.count("arithmetic of a device") == 2
    assert not list(Path().iterdir())
    missing = "data.train={target: ldm.data.folder.ImageFolder, params: {root: /no, size: 32}}"
    assert main(["-b", str(configs / "ldm.yaml"), "--check", missing]) == 2
    out, err = capsys.readouterr()
    assert out.count("arithmetic of a device") == 2 and len(err.splitlines()) == 1 and "/no" in err


def test_interrupted_and_continued(configs, capsys):
    base = ["-b", str(configs / "ae.yaml"), "-t", "-l", str(configs / "logs")]
    running = subprocess.Popen(command(*base, "trainer.max_steps=100000"), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((configs / "logs").glob("*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and "--resume auto goes on from there" in out
    (run,) = runs(configs, "tiny_ae")
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert not (run / "DONE").exists()
    assert main([*base, "--resume", "auto", f"trainer.max_steps={step + 3}"]) == 0
    assert runs(configs, "tiny_ae") == [run] and json.loads((run / "DONE").read_text())["steps"] == step + 3
    assert "its config differs in trainer.max_steps" in capsys.readouterr().out


def test_two_processes(configs):
    arguments = ["-b", configs / "ldm.yaml", "-t", "-l", configs / "logs", "trainer.devices=2", "--no-test"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "global batch 8 = 4 x 2 devices" in done.stdout
    for name, steps in (("tiny_ae", 4), ("tiny_ldm", 6)):
        (run,) = runs(configs, name)
        facts = json.loads((run / "DONE").read_text())
        assert (facts["steps"], facts["images"]) == (steps, 8 * steps)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(2, steps + 1, 2))
    assert ldm.load(runs(configs, "tiny_ae")[0]).autoencoder.statistics_count == 24
