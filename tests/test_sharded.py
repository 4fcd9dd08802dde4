"""FSDP2: weights in shares train as whole ones do, and what is saved is whole."""

import json
import shutil

import pytest
import stages as tiny
import torch
from forked import PIXELS, pair, torchrun, write
from pytorch_lightning import Callback
from pytorch_lightning.strategies import StrategyRegistry
from stages import differing, second_stage
from torch.multiprocessing import ProcessExitedException

import ldm
from ldm.app import stages
from ldm.app.stages import Stage
from ldm.app.survey import survey
from ldm.callbacks.sharded import Sharded
from ldm.weights import Uncertainty


class Forked(Sharded):
    """In two processes of this one."""

    def teardown(self):
        super().teardown()
        self.lightning_module.state_dict = dict  # what Lightning would send home


StrategyRegistry.register("fsdp2_fork", Forked, start_method="fork")
SHARED = dict(world=2, strategy="fsdp2_fork")
STEPS, HALF = 7, 3


def train(folder, *arguments, **options):
    """Once more where gloo's own thread has crashed (pt_gloo_runloop, in malloc), which torch 2.13's does once in many runs."""
    try:
        return tiny.train(folder, *arguments, **options)
    except ProcessExitedException as crash:
        if crash.signal_name != "SIGSEGV":
            raise
    shutil.rmtree(folder)
    folder.mkdir()
    return tiny.train(folder, *arguments, **options)


class Weighed(Callback):
    """How many numbers of what is trained, of its average and of its moments lie on each rank."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        (optimizer,) = trainer.optimizers
        moments = [value for state in optimizer.state.values() for name, value in state.items() if name.startswith("exp")]
        averages = [value for name, value in module.ema.shadow.named_parameters()]
        trained = [p for p in module.parameters() if p.requires_grad]
        here, all_ = ([sum(size(value) for value in values) for values in (trained, averages, moments)]
                      for size in (lambda value: value.to_local().numel(), lambda value: value.numel()))  # fmt: skip
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps([here, all_]))


def same_but_for_rounding(one, other, steps):
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    assert a["global_step"] == b["global_step"] == steps and a["images_seen"] == b["images_seen"]
    assert list(a["state_dict"]) == list(b["state_dict"])
    for name, value in a["state_dict"].items():
        assert type(b["state_dict"][name]) is torch.Tensor
        torch.testing.assert_close(b["state_dict"][name], value, atol=5e-4, rtol=0, msg=name)  # Adam enlarges roundings
    (first,), (second,) = a["optimizer_states"], b["optimizer_states"]
    assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
    assert all(value.shape == second["state"][i][name].shape for i, state in first["state"].items() for name, value in state.items())


def losses(folder):
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_with_half_each_train_as_one_with_all(tmp_path):
    def make(accumulate):
        return second_stage(accumulate, uncertainty=Uncertainty(8))

    one = train(tmp_path / "one", make, 10, batch=8)
    two = train(tmp_path / "two", make, 10, batch=4, callbacks=[Weighed(tmp_path)], **SHARED)
    found = losses(tmp_path / "two")
    assert found == pytest.approx(losses(tmp_path / "one"), abs=1e-5) and len(set(found)) == 10
    same_but_for_rounding(one, two, 10)
    (first, all_), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == all_ and max(first[0], second[0]) < 0.6 * all_[0]


def test_the_rest_after_half_is_the_rest_of_the_whole(tmp_path):
    options = dict(accumulate=2, batch=2, every=HALF, **SHARED)
    whole = train(tmp_path / "whole", second_stage, STEPS, **options)
    half = whole.with_name(f"step-{HALF:06d}.ckpt")
    assert differing(whole, train(tmp_path / "rest", second_stage, STEPS, resume=half, workers=2, **options)) == {}


def test_a_run_goes_on_with_shares_and_without(tmp_path):
    whole = train(tmp_path / "whole", second_stage, STEPS, batch=4, every=HALF)
    half = whole.with_name(f"step-{HALF:06d}.ckpt")
    later = train(tmp_path / "later", second_stage, 5, batch=2, resume=half, **SHARED)
    same_but_for_rounding(whole, train(tmp_path / "last", second_stage, STEPS, batch=4, resume=later), STEPS)


class Poison(Callback):
    """A picture of the second rank that is none, once."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            batch["image"][0] = float("nan")


def test_a_step_that_is_not_finite_is_left_out_by_all(tmp_path):
    last = train(tmp_path, second_stage, 4, batch=2, callbacks=[Poison()], **SHARED)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped"] for row in rows] == [0, 0, 1, 1] and [row["train/loss"] is None for row in rows] == [False, False, True, False]
    assert all(value.isfinite().all() for value in torch.load(last, weights_only=True)["state_dict"].values())


def test_the_plan_counts_shares(tmp_path):
    config = {**PIXELS, "trainer": {"max_steps": 4, "strategy": "fsdp2"}}
    whole, half = (survey(Stage(config), world, config["autoencoder"], (3, 64, 64)).memory for world in (1, 2))
    trained = whole["gradients"]
    assert half["gradients"] == -(-trained // 8) * 4 and half["optimizer"] == 2 * half["gradients"] and half["averaged"] == half["gradients"]
    assert whole["weights"] - half["weights"] == trained - half["gradients"] and half["activations"] == whole["activations"]


TEXT = {"target": "ldm.conditioners.text.TextConditioner", "params": dict(width=16, depth=1, heads=2, dropout=0.1)}


def test_from_the_command_line(tmp_path, text_encoder):
    """With text, bf16, clipped gradients, validation and sheets on the way; what is saved draws."""
    network = {"target": "ldm.networks.unet.UNet", "params": {**PIXELS["model"]["params"]["network"]["params"], "transformer_depth": [1]}}
    conditioner = {**TEXT, "params": {**TEXT["params"], "encoder": text_encoder}}
    model = {**PIXELS["model"], "params": {**PIXELS["model"]["params"], "network": network, "conditioner": conditioner}}
    arguments = write(tmp_path, model=model, data={"train": PIXELS["data"]["train"], "validation": {"target": "ldm.data.shapes.Shapes", "params": {"count": 4, "start": 50}}},
                      validation={"every": 2, "batches": 1}, logging={"every": 1, "images_every": 2, "wandb": False}, sampling={"steps": 2, "count": 2},
                      trainer={"max_steps": 4, "accelerator": "cpu", "devices": 2, "strategy": "fsdp2", "precision": "bf16-mixed", "gradient_clip_val": 1.0})  # fmt: skip
    arguments.remove("--no-test")
    codes, (first, second) = pair(torchrun, tmp_path, arguments)
    assert codes == [0, 0], first + second
    assert "denoiser computes in bfloat16, weights float32" in first
    (run,) = (tmp_path / "logs").glob("pixels-*")
    assert {path.name for path in (run / "samples").iterdir()} == {"step-000002.png", "step-000004.png", "final.png"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4] and all(row["train/grad_norm"] > 0 for row in rows if "train/loss" in row)
    pictures = ldm.load(run).generate(["a red star"], steps=2)
    assert pictures.shape == (1, 3, 64, 64) and pictures.isfinite().all()


@pytest.mark.parametrize("change, told", [
    ({"autoencoder": None}, "diffusion models; this config trains another"),
    ({"lora": {"target": "ldm.adapters.Lora"}}, "model.params.lora"), ({"snapshots": {"target": "ldm.common.ema.Snapshots"}}, "model.params.snapshots"),
    ({"optimizer": {"target": "ldm.common.optim.Muon"}}, "Muon"), ({"precision": "16-mixed"}, "bf16-mixed"), ({"strategy": "fsdp"}, "take ddp, or fsdp2"),
])  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_made(tmp_path, change, told):
    config = {**PIXELS, "trainer": {"max_steps": 4, "strategy": "fsdp2", **{key: change[key] for key in ("precision", "strategy") if key in change}}}
    for key in ("lora", "snapshots", "optimizer"):
        if key in change:
            config["model"] = {**config["model"], "params": {**config["model"]["params"], key: change[key]}}
    config |= {key: change[key] for key in ("autoencoder",) if key in change}
    write(tmp_path, **config)
    _, mistakes = stages.read([tmp_path / "pixels.yaml"])
    assert [mistake for mistake in mistakes if mistake.startswith("trainer.strategy: ")] and told in "\n".join(mistakes)


def test_with_nothing_in_the_way_it_is_taken(tmp_path):
    write(tmp_path, trainer={"max_steps": 4, "strategy": "fsdp2", "precision": "bf16-mixed"})
    assert stages.read([tmp_path / "pixels.yaml"])[1] == []
