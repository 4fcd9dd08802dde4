"""What stage 2 refuses, from the command line: latents of another scale, and another autoencoder than its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from two_stages import write_configs

import ldm
from autoencoder.base import Identity
from ldm.__main__ import main as tool
from ldm.bundle import Bundle
from ldm.common.build import build
from ldm.common.files import UserError
from ldm.data.shapes import Shapes
from main import main

ROOT = Path(__file__).parents[1]
HASH = "[0-9a-f]{16}"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "LOCAL_RANK", "RANK"):  # what is set while a test runs is gone afterwards
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_encoder):
    """Folder with the configs and `logs`, in which both stages have been trained."""
    folder = write_configs(tmp_path_factory.mktemp("trained"), text_encoder)
    assert main(["--base", str(folder / "ldm.yaml"), "-t", "--logdir", str(folder / "logs"), "--no-test"]) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """A copy, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def run_of(folder, name) -> Path:
    (found,) = (folder / "logs").glob(f"{name}-*")
    return found


def train(folder, *arguments) -> int:
    return main(["--base", str(folder / "ldm.yaml"), "-t", "--logdir", str(folder / "logs"), "--no-test",
                 "cache.text=false", "cache.latents=false", "trainer.max_steps=1", *map(str, arguments)])  # fmt: skip


def autoencoder_file(folder, name="other.safetensors", scale=1.0, count=None, nudge=0.0) -> Path:
    """Stage 1's autoencoder with its statistics' scale multiplied, or forgotten (count=0), and its weights moved."""
    bundle = ldm.load(run_of(folder, "tiny_ae"))
    spec, model = bundle.autoencoder.spec, bundle.autoencoder
    with torch.no_grad():
        next(model.encoder.parameters()).add_(nudge)
    if count == 0:
        model.set_statistics(torch.zeros(4), torch.ones(4), 0)
    else:
        model.set_statistics(spec.shift, spec.scale * scale, spec.count, spec.data_hash)
    bundle.save(folder / name)
    return folder / name


def error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_stage_1_stores_what_its_statistics_were_measured_over(trained, capsys):
    data = Shapes(count=24)
    for name in ("tiny_ae", "tiny_ldm"):
        spec = ldm.load(run_of(trained, name)).autoencoder.spec
        assert (spec.count, spec.data_hash) == (24, data.fingerprint)
        assert tool(["info", str(run_of(trained, name))]) == 0
        said = json.loads(capsys.readouterr().out)["latents"]
        assert said == {"mean": spec.shift.tolist(), "std": spec.scale.tolist(), "images": 24, "data": data.fingerprint}
    z = ldm.load(run_of(trained, "tiny_ae")).autoencoder
    images = torch.stack([data[i]["image"] for i in range(24)])
    draws = z.encode(images, torch.Generator().manual_seed(0))
    assert torch.allclose(draws.std(dim=(0, 2, 3)), torch.ones(4), atol=0.05)


@pytest.mark.parametrize("cache", ["false", "true"])
def test_latents_of_another_scale_are_refused(place, capsys, cache):
    spoilt = autoencoder_file(place, scale=0.2)
    assert train(place, f"autoencoder={{ckpt: {spoilt}}}", f"cache.latents={cache}") == 2
    told = error(capsys)
    measured = float(re.search(r"standard deviation ([\d.]+)", told)[1])
    assert measured == pytest.approx(5.0, rel=0.05) and "0.5 to 2" in told and "model.params.statistics=measure" in told
    run_of(place, "tiny_ldm")  # no other folder was made


@pytest.mark.parametrize("way_out, scale", [("force", 0.2), ("measure", 1.0)])
def test_the_ways_out(place, caplog, way_out, scale):
    spoilt = autoencoder_file(place, scale=0.2)
    before = ldm.load(spoilt).autoencoder.spec.scale
    assert train(place, "-n", "out", f"autoencoder={{ckpt: {spoilt}}}", f"model.params.statistics={way_out}") == 0
    spec = ldm.load(run_of(place, "out")).autoencoder.spec
    assert torch.allclose(spec.scale, before * scale / 0.2, rtol=1e-3)
    assert ("statistics: force says so" in caplog.text) == (way_out == "force")
    # the measured statistics are the run's own: it goes on with the same weights
    if way_out == "measure":
        assert train(place, "-n", "out", "--resume", run_of(place, "out"), f"autoencoder={{ckpt: {spoilt}}}",
                     "model.params.statistics=measure", "trainer.max_steps=2") == 0  # fmt: skip
        assert torch.equal(ldm.load(run_of(place, "out")).autoencoder.spec.scale, spec.scale)


def test_an_autoencoder_that_was_never_measured_is(place, capsys):
    unknown = autoencoder_file(place, count=0)
    assert train(place, "-n", "out", f"autoencoder={{ckpt: {unknown}}}") == 0
    assert "were not known and are measured now: latents of 24 images" in capsys.readouterr().out
    spec, known = (ldm.load(run_of(place, name)).autoencoder.spec for name in ("out", "tiny_ae"))
    assert (spec.count, spec.data_hash) == (24, known.data_hash)
    assert torch.allclose(spec.scale, known.scale, rtol=1e-5) and torch.allclose(spec.shift, known.shift, atol=1e-5)
    resume = ["-n", "out", "--resume", run_of(place, "out"), "trainer.max_steps=2"]
    assert train(place, *resume, f"autoencoder={{ckpt: {unknown}}}") == 0


def test_pixels_are_measured_too(place):
    network = "model.params.network={target: ldm.networks.unet.UNet, params: {model_channels: 32, channel_mult: [1], " \
              "num_res_blocks: 1, transformer_depth: [0], num_heads: 2}}"
    assert train(place, "-n", "out", "autoencoder={target: autoencoder.base.Identity}", network) == 0
    pixels = torch.stack([Shapes(count=24)[i]["image"] for i in range(24)])
    model = ldm.load(run_of(place, "out")).autoencoder
    assert isinstance(model, Identity) and model.spec.count == 24
    assert torch.allclose(model.spec.scale, pixels.std(dim=(0, 2, 3), correction=0), rtol=1e-4)
    assert torch.allclose(model.encode(pixels).mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)


def test_all_processes_refuse_alike(place):
    spoilt = autoencoder_file(place, scale=5.0)
    command = [sys.executable, ROOT / "main.py", "--base", place / "ldm.yaml", "-t", "--logdir", place / "logs", "--no-test",
               f"autoencoder={{ckpt: {spoilt}}}", "trainer.devices=2"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=200)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "the first 128 images have standard deviation 0.2" in errors[0]


@pytest.mark.parametrize("ema", [True, False])
def test_a_swapped_autoencoder_is_not_sampled_with(place, ema, capsys):
    path = run_of(place, "tiny_ldm") / "checkpoints" / "last.ckpt"
    own = ldm.load(path).autoencoder.content_hash()
    other = ldm.load(autoencoder_file(place, nudge=0.1)).autoencoder
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] |= {f"autoencoder.{key}": value for key, value in other.state_dict().items()}
    torch.save(saved, path)
    with pytest.raises(UserError, match=f"hash {other.content_hash()}.*hash {own}"):
        ldm.load(path, ema=ema)
    assert tool(["txt2img", "--ckpt", str(path), "--prompt", "a red circle", "--outdir", str(place / "out")]) == 2
    told = error(capsys)
    assert own in told and other.content_hash() in told and not (place / "out").exists()


def test_one_changed_number_is_enough(place):
    bundle = ldm.load(run_of(place, "tiny_ldm"))
    bundle.save(place / "a.ckpt")
    saved = torch.load(place / "a.ckpt", weights_only=True)
    saved["state_dict"]["autoencoder.shift"][2] += 1e-3
    torch.save(saved, place / "a.ckpt")
    with pytest.raises(UserError, match=f"hash {HASH}.*hash {HASH}"):
        ldm.load(place / "a.ckpt")


@pytest.mark.parametrize("name", ["half.ckpt", "half.safetensors"])
def test_halved_by_its_own_save_is_no_other(place, name):
    bundle = ldm.load(run_of(place, "tiny_ldm")).half()
    bundle.save(place / name)
    found = ldm.load(place / name).autoencoder
    assert next(found.parameters()).dtype == torch.float16 and found.content_hash() == bundle.autoencoder.content_hash()


def test_a_checkpoint_from_before_the_hash_of_the_data(place):
    path = run_of(place, "tiny_ldm") / "checkpoints" / "last.ckpt"
    spec = ldm.load(path).autoencoder.spec
    without = ldm.load(path).autoencoder
    without.set_statistics(spec.shift, spec.scale, spec.count)  # the hash that it had then
    saved = torch.load(path, weights_only=True)
    saved["state_dict"] = {key: value for key, value in saved["state_dict"].items() if not key.endswith("statistics_data")}
    saved["ldm"]["autoencoder_hash"] = without.content_hash()
    torch.save(saved, path)
    found = ldm.load(path).autoencoder
    assert (found.spec.count, found.spec.data_hash) == (24, None)


def test_a_run_does_not_go_on_with_another_autoencoder(place, capsys):
    first, other = autoencoder_file(place, "a.safetensors"), autoencoder_file(place, "b.safetensors", nudge=0.1)
    assert train(place, "-n", "out", f"autoencoder={{ckpt: {first}}}") == 0
    run = run_of(place, "out")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    hashes = [ldm.load(path).autoencoder.content_hash() for path in (first, other)]
    again = ["-n", "out", "--resume", run, "trainer.max_steps=3"]
    capsys.readouterr()
    assert train(place, *again, f"autoencoder={{ckpt: {other}}}") == 2
    told = error(capsys)
    assert hashes[0] in told and f"autoencoder.ckpt: {other} is now one with the hash {hashes[1]}" in told
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before and (run / "DONE").exists()
    shutil.copy(other, first)  # the same path, trained anew: the run's own config names it
    assert main(["-t", "--resume", str(run), "--logdir", str(place / "logs"), "--no-test", "trainer.max_steps=3"]) == 2
    told = error(capsys)
    assert hashes[0] in told and hashes[1] in told


def test_a_run_does_not_go_on_after_stage_1_was_trained_anew(place, capsys):
    run = run_of(place, "tiny_ldm")
    again = ["--resume", run, "trainer.max_steps=7", "stage1.seed=5"]
    assert train(place, *again) == 2  # and is not trained for it
    assert re.search(f"comes from another stage 1 .*{HASH}, now {HASH}", error(capsys))
    own = ldm.load(run).autoencoder.content_hash()
    assert main(["--base", str(place / "ae.yaml"), "-t", "--logdir", str(place / "logs"), "--no-test", "seed=5",
                 "name=other_ae"]) == 0  # fmt: skip
    capsys.readouterr()
    assert train(place, *again) == 2
    told = error(capsys)
    assert own in told and ldm.load(run_of(place, "other_ae")).autoencoder.content_hash() in told


def test_another_target_is_refused_and_the_same_is_not(place, capsys):
    run = run_of(place, "tiny_ldm")
    block = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["ldm"]["config"]["autoencoder"]
    config = yaml.safe_load((place / "ldm.yaml").read_text())
    for width, status in ((12, 2), (8, 0)):
        block["params"]["width"] = width
        (place / "ldm.yaml").write_text(yaml.safe_dump({**config, "autoencoder": block}))
        assert train(place, "--resume", run, "trainer.max_steps=7") == status
        if status:
            assert re.search(f"hash {HASH}, but autoencoder.target: .*hash {HASH}", error(capsys))


def test_a_run_folder_alone_goes_on_without_stage_1(place, capsys):
    """Its stage 1 is gone, and was trained with arguments of its own."""
    base = ["-t", "--logdir", str(place / "logs"), "--no-test"]
    assert main(["--base", str(place / "ldm.yaml"), *base, "-n", "out", "stage1.trainer.max_steps=1", "trainer.max_steps=1"]) == 0
    run = run_of(place, "out")
    for folder in (place / "logs").glob("tiny_ae-*"):
        shutil.rmtree(folder)
    (place / "ae.yaml").unlink()
    stage1 = yaml.safe_load((run / "stage1.yaml").read_text())
    assert stage1["trainer"]["max_steps"] == 1
    stage1["data"]["train"] = {"target": "ldm.data.folder.ImageFolder", "params": {"root": "/gone", "size": 64}}
    (run / "stage1.yaml").write_text(yaml.safe_dump(stage1))
    capsys.readouterr()
    assert main([*base, "--resume", str(run), "trainer.max_steps=2"]) == 0
    assert "stage 1" not in capsys.readouterr().out
    assert json.loads((run / "DONE").read_text())["steps"] == 2


def test_changed_sampling_of_a_finished_run_is_told_and_stored_when_asked(place, capsys):
    base = ["--base", str(place / "ldm.yaml"), "-t", "--logdir", str(place / "logs"), "--no-test", "sampling.steps=3"]
    assert main(base) == 0
    assert "sampling differs in steps; the finished checkpoint" in capsys.readouterr().out
    run = run_of(place, "tiny_ldm")
    assert ldm.load(run).sampling["steps"] == 2
    assert main([*base, "--resume", str(run)]) == 0
    assert ldm.load(run).sampling["steps"] == 3


OWN = '''
import torch.nn.functional as F
from autoencoder.base import Autoencoder

class Pooled(Autoencoder):
    def __init__(self):
        super().__init__(3, 3, 4)

    def moments(self, x):
        return F.avg_pool2d(x, 4), None

    def decode_raw(self, z):
        return F.interpolate(z, scale_factor=4.0)
'''


def test_a_class_of_ones_own_is_run_where_the_config_or_the_user_names_it(place, monkeypatch, capsys):
    (place / "own_autoencoder.py").write_text(OWN)
    monkeypatch.syspath_prepend(place)
    block = {"target": "own_autoencoder.Pooled", "params": {}}
    bundle = Bundle(build(block), config={"name": "own", "model": {"target": "autoencoder.lit.AutoencoderModule",
                                                                   "params": {"autoencoder": block}}})  # fmt: skip
    bundle.save(place / "own.safetensors")
    source = f"autoencoder={{ckpt: {place / 'own.safetensors'}}}"
    assert train(place, "-n", "out", source) == 2
    assert "own_autoencoder.Pooled" in (told := error(capsys)) and "--trust" in told
    assert train(place, "-n", "out", source, "--trust") == 0
    assert ldm.load(run_of(place, "out"), trust=True).autoencoder.spec.count == 24
    assert train(place, "-n", "named", "autoencoder={target: own_autoencoder.Pooled}") == 0
    resume = ["-n", "named", "--resume", run_of(place, "named"), "trainer.max_steps=2"]
    assert train(place, *resume, "autoencoder={target: own_autoencoder.Pooled}") == 0  # its own config names it
