"""Mistakes that people make in configs: main.py --check and a real start tell each in words, with status 2, and leave nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from main import main

ROOT = Path(__file__).parents[2]
D, K, A, DIT = "ldm_txt2img", "class_conditional", "autoencoder_kl", "dit_xl2_256"
M = "model.params."
N, C, AE = M + "network.params.", M + "conditioner.params.", M + "autoencoder.params."
FOLDER = "data.train={target: ldm.data.folder.ImageFolder, params: {root: %s, size: 64}}"

TYPOS = [  # config, what is changed in it, what the answer has in it: the key, and the nearest spelling where there is one
    (D, "nmae=x", "nmae:", "'name'"), (D, "modle={}", "modle:", "'model'"), (D, "trainr.max_steps=3", "trainr:", "'trainer'"),
    (D, "model.parms={}", "model.parms:", "'params'"), (D, "data.trian={target: ldm.data.shapes.Shapes}", "data.trian:", "'train'"),
    (D, M + "optimiser={target: torch.optim.AdamW}", M + "optimiser:", "'optimizer'"),
    (D, N + "modelchannels=3", N + "modelchannels:", "'model_channels'"), (D, C + "widht=32", C + "widht:", "'width'"),
    (D, M + "optimizer.params.weight_decy=1", M + "optimizer.params.weight_decy:", "'weight_decay'"),
    (D, M + "schedule.params.step=5", M + "schedule.params.step:", "'steps'"),
    (D, "loader.batchsize=4", "loader.batchsize:", "'batch_size'"), (D, "cache.latent=true", "cache.latent:", "'latents'"),
    (D, "sampling.step=4", "sampling.step:", "'steps'"), (D, "validation.evry=4", "validation.evry:", "'every'"),
    (D, "logging.wandbb=4", "logging.wandbb:", "'wandb'"), (D, "checkpoint.keeps=4", "checkpoint.keeps:", "'keep'"),
    (D, "trainer.max_stepz=4", "trainer.max_stepz:", "'max_steps'"), (D, "data.train.params.counts=4", "data.train.params.counts:", "'count'"),
    (D, "autoencoder.cfg=x", "autoencoder.cfg:", "config, ckpt, target"), (D, "sampling.guidance={scal: 3}", "sampling.guidance.scal:", "'scale'"),
    (D, "stage1." + AE + "mults=[1]", "autoencoder_kl.yaml: " + AE + "mults:", "'mult'"),
    (D, "stage1.trainer.max_step=4", "autoencoder_kl.yaml: trainer.max_step:", "'max_steps'"),
    (D, "sampling.times={name: karras, rh: 5}", "sampling.times:", "'rho'"), (D, "sampling.times=karass", "sampling.times:", "'karras'"),
    (D, "sampling.sampler=dpmpp2m", "sampling.sampler:", "'dpmpp_2m'"), (D, "sampling.sampler={name: ddimm}", "sampling.sampler:", "'ddim'"),
    (D, "sampling.sampler={name: ddim, etaa: 1}", "sampling.sampler:", "'eta'"), (D, "sampling.x0=clp", "sampling.x0:", "'clip'"),
    (D, "trainer.precision=bf16-mixd", "trainer.precision:", "'bf16-mixed'"), (D, "trainer.strategy=dpp", "trainer.strategy:", "'ddp'"),
    (D, "trainer.accelerator=cpuu", "trainer.accelerator:", "'cpu'"), (D, M + "variance=learnd", M + "variance:", "'learned'"),
    (D, M + "weight=min_snrr", M + "weight:", "'min_snr'"), (D, M + "parameterization=flwo", M + "parameterization:", "'flow'"),
    (D, M + "schedule.params.decay=linaer", M + "schedule.params.decay:", "'linear'"),
    (D, "data.train.params.split=trian", "data.train.params.split:", "'train'"), (D, C + "encoder=minilmm", "minilm", ""),
    ("ldm_txt2img_lora", M + "lora.targets=attentoin", M + "lora.targets:", "'attention'"),
    ("super_resolution", "data.train.params.degradation=blidn", "data.train.params.degradation:", "'blind'"),
]  # fmt: skip
TYPES = [
    (D, "name=3", "name: expected str", "quotes"), (D, "name=[]", "name: expected str"), (D, "seed=abc", "seed: expected int", "'abc'"),
    (D, "seed=1.5", "seed: expected int", "1.5"), (D, "loader.batch_size=eight", "loader.batch_size: expected int", "'eight'"),
    (D, "loader.batch_size=2.0", "loader.batch_size: expected int", "write 2"), (D, "loader=[]", "loader: expected"),
    (D, "loader=null", "loader.batch_size: missing"), (D, "model=null", "model: expected block"), (D, "model=unet", "model: expected block", "'unet'"),
    (D, "model=[1]", "model: expected block"), (D, "data=shapes", "data: expected", "'shapes'"), (D, "data.train=null", "data.train: expected block"),
    (D, "trainer=5", "trainer: expected", "5"), (D, "trainer.max_steps=many", "trainer.max_steps: expected", "'many'"),
    (D, "trainer.max_steps=1.5", "trainer.max_steps: expected", "1.5"), (D, "trainer.precision=17", "trainer.precision: expected", "17"),
    (D, "trainer.accumulate_grad_batches=two", "trainer.accumulate_grad_batches: expected", "'two'"),
    (D, "trainer.devices={}", "trainer.devices: expected"), (D, "sampling.steps=x", "sampling.steps: expected int", "'x'"),
    (D, "sampling.guidance=strong", "sampling.guidance: expected", "'strong'"), (D, "sampling.sampler=5", "sampling.sampler: expected"),
    (D, "sampling.prompts=a fox", "sampling.prompts: expected list", "'a fox'"), (D, "sampling.prompts=[1]", "sampling.prompts[0]: expected str"),
    (D, "logging.wandb=maybe", "logging.wandb: expected", "'maybe'"), (D, "cache.latents=yess", "cache.latents: expected bool", "'yess'"),
    (D, "cache.dir=5", "cache.dir: expected str"), (D, M + "process=rectified", M + "process: expected block", "'rectified'"),
    (D, M + "optimizer=null", M + "optimizer: expected block"), (D, M + "optimizer.params.lr=high", M + "optimizer.params.lr: expected float"),
    (D, M + "network=null", M + "network: expected block"), (D, N + "channel_mult=2", N + "channel_mult: expected list"),
    (D, M + "draws=sobol", M + "draws: expected one of"), (D, M + "latents=mean", M + "latents: expected one of"),
    (D, M + "statistics=skip", M + "statistics: expected one of"), (D, "trainer.max_steps=???", "trainer.max_steps: must be filled in"),
    (A, M + "loss.params.pixel=l4", M + "loss.params.pixel: expected one of 'l1', 'l2'"),
]  # fmt: skip
TARGETS = [
    (D, "model.target=ldm.lit.DifusionModule", "model.target:", "'DiffusionModule'"), (D, "model.target=ldm.litt.DiffusionModule", "model.target:", "'lit'"),
    (D, "model.target=ldmm.lit.DiffusionModule", "model.target:", "'ldm'"), (D, "model.target=5", "model.target:", "5"),
    (D, "model.target=ldm.lit", "model.target: ldm.lit is a module"), (D, "model.target=''", "model.target:"),
    (D, "model.target=ldm.networks.unet.UNet", "model.target: ldm.networks.unet.UNet is not trained"),
    (D, "model.target=os.system", "model.target: os.system is not trained"), (D, M + "network.target=ldm.networks.unet.Unet", M + "network.target:", "'UNet'"),
    (D, M + "network.target=ldm.networks.layers", M + "network.target: ldm.networks.layers is a module"),
    (D, M + "conditioner.target=ldm.conditioners.text.TextConditionr", M + "conditioner.target:", "'TextConditioner'"),
    (D, M + "conditioner={target: ldm.networks.unet.UNet}", M + "conditioner.target: expected", "ldm.networks.unet.UNet"),
    (D, M + "conditioner={target: builtins.dict}", M + "conditioner.target: expected"),
    (D, M + "process={target: ldm.process.RectifiedFloww}", M + "process.target:", "'RectifiedFlow'"),
    (D, M + "process={target: ldm.loss.Huber}", M + "process.target: expected block that makes Process", "ldm.loss.Huber"),
    (D, M + "density={target: ldm.process.DDPM}", M + "density.target: expected block that makes Density"),
    (D, M + "optimizer={target: torch.optim.AdmW, params: {lr: 0.001}}", M + "optimizer.target:", "'Adam"),
    (D, M + "schedule={target: ldm.common.schedules.Warmpu, params: {steps: 1}}", M + "schedule.target:", "'Warmup'"),
    (D, "data.train.target=ldm.data.shapes.Shape", "data.train.target:", "'Shapes'"), (A, "data.train={target: ldm.networks.unet.UNet}", "data.train", "UNet"),
    (A, "data.train={target: builtins.list}", "data.train: the data set is empty"), (D, "autoencoder={target: autoencoder.base.Identityy}", "autoencoder.target:", "'Identity'"),
    (D, "autoencoder={target: ldm.networks.unet.UNet}", "autoencoder.target: expected what makes an autoencoder"),
    (A, M + "autoencoder.params.bottleneck.target=autoencoder.bottlenecks.KLL", AE + "bottleneck.target:", "'KL'"),
    (K, M + "optimizer={target: ldm.networks.unet.UNet}", M + "optimizer:", "UNet"), (K, M + "optimizer={target: builtins.print}", M + "optimizer: builtins.print makes no optimizer"),
    (K, M + "network={target: torch.nn.Linear, params: {in_features: 3, out_features: 3}}", "stage 2 of 2, diffusion: model:"),
]  # fmt: skip
MISSING = [
    (D, "autoencoder=null", "autoencoder: missing", "config, ckpt, target"), (D, "autoencoder={config: nowhere.yaml}", "autoencoder.config: no such file", "nowhere.yaml"),
    (D, "autoencoder={ckpt: nowhere.ckpt}", "autoencoder.ckpt: no such file nowhere.ckpt", "autoencoder_kl.yaml -t"),
    (K, "autoencoder={ckpt: configs/tiny/pixel.yaml}", "pixel.yaml"), (K, "autoencoder={ckpt: configs}", "configs"), (D, "autoencoder={ckpt: null}", "autoencoder.ckpt: expected path"),
    (D, "autoencoder={config: configs/tiny/autoencoder_kl.yaml, ckpt: x.ckpt}", "autoencoder: expected exactly one"),
    (D, "autoencoder={config: configs/tiny/pixel.yaml}", "pixel.yaml: expected the config of an autoencoder"),
    (D, "autoencoder={config: configs/tiny}", "autoencoder.config: no such file configs/tiny"), (D, "autoencoder={config: README.md}", "README.md"),
    (D, "autoencoder={target: autoencoder.pretrained.pretrained, params: {path: nowhere}}", "nowhere"),
    (A, FOLDER % "/nowhere", "data.train: /nowhere: no such folder"), (A, FOLDER % "configs", "data.train: configs: no image"),
    (D, "data.train={target: ldm.data.folder.ImageFolder, params: {size: 64}}", "data.train.params.root: missing"),
    (A, "data.train={target: ldm.data.webdataset.WebDataset, params: {shards: nowhere.tar, size: 64}}", "nowhere.tar: no such file"),
    (D, C + "encoder=/nowhere", "/nowhere"), (D, C + "encoder=configs", "configs"), (D, "trainer=null", "trainer.max_steps: missing"), (D, "data=null", "data: expected"),
    (K, "model.params.network={target: ldm.networks.classifier.Classifier}", "classes: missing"), ("ldm_txt2img_lora", "seed=1", "--init-from"),
    (D, "sampling.steps=${nowhere}", "sampling.steps:", "nowhere"), (D, "name=${oc.env:NOT_THERE}", "name:", "NOT_THERE"),
    (D, "trainer.max_steps", "trainer.max_steps: no such config file"), (D, "trainer.max_steps=[3", "not valid YAML"), (D, "a..b=3", "'a..b=3'"),
    (A, "stage1.seed=3", "stage1.seed=3: there is no other stage"),
]  # fmt: skip
NUMBERS = [
    (D, "seed=-1", "seed: expected 0 to 4294967295, got -1"), (D, "seed=99999999999999999999", "seed: expected 0 to"), (D, "name=../../x", "name:", "'../../x'"),
    (D, "name=''", "name:"), (D, "name=..", "name: expected a name for a folder, got '..'"), (D, "name='a\tb'", "name:"), (D, "loader.batch_size=0", "loader.batch_size: 0"),
    (D, "loader.workers=-1", "loader.workers: -1"), (D, "trainer.max_steps=0", "trainer.max_steps:"), (D, "trainer.max_time=soon", "trainer.max_time:", "DD:HH:MM:SS"),
    (D, "trainer.devices=none", "trainer.devices:", "'none'"), (D, "trainer.devices=0", "trainer.devices:"), (D, "trainer.devices=-2", "trainer.devices:", "-2"),
    (D, "trainer.gradient_clip_val=-1", "trainer.gradient_clip_val: expected 0 or more"), (D, "trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: expected 1 or more"),
    (D, "trainer.num_nodes=0", "trainer.num_nodes: expected 1 or more"), (D, "sampling.steps=0", "sampling.steps: expected 1 or more"), (D, "sampling.count=0", "sampling.count:"),
    (D, "validation.every=0", "validation.every:"), (D, "validation.batches=-1", "validation.batches:"), (D, "checkpoint.every=0", "checkpoint.every:"), (D, "checkpoint.keep=0", "checkpoint.keep:"),
    (D, "logging.every=0", "logging.every:"), (D, "logging.images_every=-1", "logging.images_every:"), (D, M + "optimizer.params.lr=-1", M + "optimizer.params.lr: expected 0 or more"),
    (D, M + "schedule.params.steps=-5", M + "schedule.params.steps:"), (D, M + "ema_decay=1.5", M + "ema_decay: expected"), (D, M + "offset_noise=-1", M + "offset_noise: expected"),
    (A, "data.train.params.count=0", "data.train", "count"), (D, N + "model_channels=-32", N + "model_channels: expected 1 or more"), (D, N + "channel_mult=[0,1]", N + "channel_mult: expected"),
    (D, N + "num_res_blocks=0", N + "num_res_blocks:"), (D, N + "transformer_depth=[0,-1]", N + "transformer_depth:"), (D, N + "head_channels=0", N + "head_channels:"),
    (D, N + "patch_size=0", N + "patch_size:"), (D, N + "ff_mult=-2", N + "ff_mult:"), (D, N + "dropout=1.5", N + "dropout: expected 0 to 1"), (D, C + "heads=0", C + "heads:"),
    (D, C + "width=0", C + "width:"), (D, C + "depth=-1", C + "depth:"), (D, C + "dropout=-0.1", C + "dropout:"), (D, C + "max_length=0", C + "max_length:"), (D, C + "max_length=100000", "max_length 100000"),
    (D, C + "layer=99", "layer 99"), (D, M + "lora={rank: 0}", M + "lora.rank:"), (A, AE + "bottleneck.params.channels=0", AE + "bottleneck.params.channels:"), (A, AE + "width=0", AE + "width:"),
    (A, AE + "patch=0", AE + "patch:"), (A, M + "loss.params.kl=-1", M + "loss.params.kl:"), (A, M + "accumulate=0", M + "accumulate:"), ("autoencoder_fsq", AE + "bottleneck.params.levels=[0]", "bottleneck.levels: [0]"),
    ("autoencoder_fsq", AE + "bottleneck.params.levels=[]", "bottleneck.levels: []"), ("autoencoder_vq", AE + "bottleneck.params.codes=0", "codes"), (DIT, N + "depth=0", N + "depth:"),
    ("classifier", M + "classifier.params.classes=0", M + "classifier.params.classes:"), ("layout_to_image", C + "objects=0", C + "objects:"), (K, C + "classes=0", C + "classes:"),
    ("super_resolution", C + "max_noise_level=2000", "max_noise_level"), ("inpainting", C + "parts=[]", "parts"),
]  # fmt: skip
TOGETHER = [
    (D, M + "parameterization=noise", M + "parameterization: parameterization 'noise' cannot name x0", "take 'v' or 'flow'"),
    (D, [M + "parameterization=noise", M + "process={target: ldm.process.DDPM, params: {zero_terminal: true}}"], M + "parameterization:", "pure noise"),
    (D, M + "parameterization=previous", M + "parameterization:", "has no steps"), (D, M + "variance=learned", M + "variational:", "ldm.loss.Variational"),
    (D, N + "context_dim=64", N + "context_dim: the program supplies this"), (D, N + "in_channels=3", N + "in_channels: the program supplies this"),
    (D, "trainer.max_epochs=3", "trainer.max_epochs: not used here; instead: trainer.max_steps"), (D, "trainer.callbacks=[]", "trainer.callbacks: the program supplies this"),
    (A, "trainer.gradient_clip_val=1.0", "instead: model.params.gradient_clip"), (A, "cache={latents: true}", "cache: belongs to diffusion models"),
    (A, "sampling={steps: 3}", "sampling: belongs to diffusion models"), ("classifier", "sampling={steps: 4}", "sampling: belongs to diffusion models"),
    (D, "trainer.strategy=ddp_spawn", "trainer.strategy:", "take ddp"), (D, "trainer.precision=bf16-true", "trainer.precision:", "take bf16-mixed"),
    (K, "sampling.times=[0,1]", "sampling.times: times: expected two or more decreasing times"), (K, "sampling.times=[]", "sampling.times:"), (K, "sampling.times=leading", "sampling.times:"),
    (K, C + "dropout=0", "sampling.guidance: 2", "dropout"), (K, C + "classes=4", "classes: 4 for ClassLabel, but 'class' of data.train has 48"),
    ("classifier", M + "classifier.params.classes=4", "classes: 4 for ClassifierModule"), ("classifier", M + "key=klass", "items have no 'klass'", "'class'"),
    (K, "data.train={target: ldm.data.shapes.Shapes, params: {count: 4}}", "data.train: items have no 'class'"),
    (K, N + "model_channels=33", "66 channels"), (K, N + "transformer_depth=[0]", "transformer_depth"), (K, N + "channel_mult=[]", "channel_mult"), (K, N + "head_channels=24", "head_channels 24"),
    (K, [N + "head_channels=null", N + "num_heads=5"], "heads"), (K, N + "patch_size=3", "16x16", "multiples of 6"), (DIT, N + "heads=5", "heads"), (DIT, N + "patch_size=5", "multiples of 5"),
    (DIT, N + "width=65", "65"), (DIT, C + "width=32", "32"), (K, "stage1." + AE + "patch=3", "factor 3: take 63 or 66"), ("super_resolution", "data.train.params.factor=3", "factor"),
    ("inpainting", "cache.latents=true", "cache.latents: the conditioner encodes pictures"), ("pixel", N + "patch_size=24", "64x64"), (D, C + "heads=5", "heads"),
    (K, "autoencoder={target: autoencoder.base.Identity, params: {channels: 4}}", "autoencoder", "channels"), (A, AE + "image_channels=1", "image_channels: 1", "data.train"),
]  # fmt: skip
EVERY = [*TYPOS, *TYPES, *TARGETS, *MISSING, *NUMBERS, *TOGETHER]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("NOT_THERE", raising=False)


def test_there_are_enough():
    assert len({(name, str(change)) for name, change, *_ in EVERY}) == len(EVERY) >= 60


def told(capsys, logs, *arguments) -> list[str]:
    """What the command says is wrong."""
    assert main([*arguments, "-l", str(logs)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("error: ") and len(line) < 1000 for line in said), said
    assert not logs.exists()
    return said


@pytest.mark.parametrize(("name", "changes", "parts"), [
    pytest.param(name, [changes] if isinstance(changes, str) else changes, parts, id=f"{name} {changes}",
                 marks=[pytest.mark.slow] * (i % 3 > 0))  # a third of them is quick
    for i, (name, changes, *parts) in enumerate(EVERY)
])  # fmt: skip
def test_is_told_and_leaves_nothing(tmp_path, capsys, name, changes, parts):
    base = ["-b", f"configs/tiny/{name}.yaml", *changes]
    checked = told(capsys, tmp_path / "logs", *base, "--check")
    assert all(part in "\n".join(checked) for part in parts), checked
    assert told(capsys, tmp_path / "logs", *base, "-t") == checked


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path, capsys):
    """In one file with mistakes at every level, of every kind; in its first stage; beside a combination that cannot be."""
    text = (ROOT / "configs/tiny/ldm_txt2img.yaml").read_text()
    for right, wrong in (("model_channels:", "modelchannels:"), ("seed: 23", "seed: many"), ("keep: 1", "keep: 0"), ("dpmpp_2m", "dpmp_2m"),
                         ("ldm.common.optim.Muon", "ldm.common.optim.Moun"), ("parameterization: flow", "parameterization: noise"),
                         ("config: autoencoder_kl.yaml", "config: ae.yaml"), ("batch_size: 8", "batch_size: 0"), ("dropout: 0.1", "dropout: 2")):
        assert right in text
        text = text.replace(right, wrong)
    (tmp_path / "wrong.yaml").write_text(text)
    first = (ROOT / "configs/tiny/autoencoder_kl.yaml").read_text()
    (tmp_path / "ae.yaml").write_text(first.replace("patch: 4", "pacht: 4").replace("every: 20", "every: x"))
    base = ["-b", str(tmp_path / "wrong.yaml")]
    checked = told(capsys, tmp_path / "logs", *base, "--check")
    text = "\n".join(checked)
    for part in ("'model_channels'", "seed: expected int", "checkpoint.keep:", "'dpmpp_2m'", "'Muon'", "parameterization 'noise' cannot",
                 "loader.batch_size: 0", "dropout: expected 0 to 1", "ae.yaml: model.params.autoencoder.params.pacht:", "'patch'",
                 "ae.yaml: validation.every:", "ae.yaml: checkpoint.every:"):
        assert part in text, part
    assert told(capsys, tmp_path / "logs", *base, "-t") == checked


def test_data_and_model_are_told_together(tmp_path, capsys):
    base = ["-b", f"configs/tiny/{K}.yaml", FOLDER % "/nowhere", N + "transformer_depth=[1]", C + "dropout=0.1", "loader.workers=2"]
    checked = told(capsys, tmp_path / "logs", *base, "--check")
    assert "/nowhere" in checked[0] and "transformer_depth" in checked[1] and len(checked) == 2
    assert told(capsys, tmp_path / "logs", *base, "-t") == checked


@pytest.mark.parametrize(("content", "part"), [
    ("a: [1", "not valid YAML"), ("", "expected"), ("- 1", "expected names with values at the top"), ("just text", "just text: Config has no such option"),
    (b"\xff\xfe\x00bin\x80", "cannot be read"), ("name: a\nname: b", "line 2: not valid YAML"), ("name: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ("a: &a [*a]", "not valid YAML"), ("{" * 2000, "YAML"), ("\t- x", "line 1: not valid YAML"), ("? [1, 2]\n: 3", "wrong.yaml"), ("1: 2", "1:"),
])  # fmt: skip
def test_files_that_are_no_config(tmp_path, capsys, content, part):
    (tmp_path / "wrong.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    for action in ("--check", "-t"):
        assert any(part in line for line in told(capsys, tmp_path / "logs", "-b", str(tmp_path / "wrong.yaml"), action))


def test_what_else_the_command_line_says(tmp_path, capsys):
    base = ["-b", f"configs/tiny/{A}.yaml"]
    for more, part in ((["--init-from", "nowhere.ckpt"], "nowhere.ckpt"), (["--init-from", "README.md"], "README.md"), (["-r", "nowhere"], "--resume nowhere"),
                       (["-r", "README.md"], "README.md"), (["-p", "../../x"], "--postfix"), (["-n", "../x"], "name:"), (["-s", "-1"], "seed:")):  # fmt: skip
        for action in ("--check", "-t"):
            assert part in "\n".join(told(capsys, tmp_path / "logs", *base, *more, action))


@pytest.mark.parametrize(("action", "change"), [("-t", "model.params.ema_dcay=1"), ("--check", AE + "patch=3")])
def test_in_processes_of_their_own(tmp_path, action, change):
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), "-b", str(ROOT / f"configs/tiny/{A}.yaml"), action, change],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
