import json
import os
import re

import pytest
import torch
import yaml

from ldm.app import runs
from ldm.app.runs import finished, jobs, new_folder, newest, run_folder, unfinished, write_done
from ldm.app.stages import read
from ldm.common.files import UserError


@pytest.fixture
def planned(configs):
    stages, mistakes = read([configs / "ldm.yaml"])
    assert mistakes == [] and [stage.open() for stage in stages] == [[], []]
    return stages


def checkpoint(path, kind="autoencoder", **weights):
    path.parent.mkdir(parents=True, exist_ok=True)
    run = dict.fromkeys(("optimizer_states", "lr_schedulers", "loops", "global_step", "pytorch-lightning_version"), 0)
    torch.save({**run, "state_dict": weights, "ldm": {"kind": kind, "config": {"model": {}}}}, path)


def make_run(logdir, stage, time="20260101-000000", done=False, kind=None, **changes):
    """A run folder as training leaves it."""
    folder = logdir / f"{stage.name}-{time}"
    checkpoint(folder / "checkpoints" / "last.ckpt", kind or stage.kind)
    (folder / "config.yaml").write_text(yaml.safe_dump({**stage.config, **changes}))
    (folder / "run.json").write_text(json.dumps({"autoencoder": stage.autoencoder_key}))
    os.utime(folder / "config.yaml", (0, int(time.replace("-", "")[4:])))
    if done:
        write_done(folder, stage, "checkpoints/last.ckpt")
    return folder


def actions(found):
    return [(job.action, job.number) for job in found[0]]


def test_folders_do_not_collide(tmp_path):
    first = new_folder(tmp_path, "a", "b")
    assert re.fullmatch(r"a_b-\d{8}-\d{6}", first.name)
    first.mkdir()
    again = new_folder(tmp_path, "a", "b")
    assert again != first and not again.exists()


def test_from_nothing_both_stages_are_trained(planned, tmp_path):
    found = jobs(planned, tmp_path / "logs")
    assert actions(found) == [("train", 1), ("train", 2)] and found[1] == []


def test_a_finished_first_stage_is_used(planned, tmp_path):
    folder = make_run(tmp_path, planned[0], done=True)
    assert finished(tmp_path, planned[0].key) == folder and finished(tmp_path, "other") is None
    found = jobs(planned, tmp_path)
    assert actions(found) == [("reuse", 1), ("train", 2)] and found[0][0].checkpoint == folder / "checkpoints/last.ckpt"
    (folder / "checkpoints/last.ckpt").unlink()
    assert actions(jobs(planned, tmp_path)) == [("train", 1), ("train", 2)]


def test_a_finished_second_stage_needs_no_first(planned, tmp_path):
    make_run(tmp_path, planned[1], done=True)
    assert actions(jobs(planned, tmp_path)) == [("reuse", 2)]


def test_what_was_interrupted_goes_on_when_asked(planned, tmp_path):
    folder = make_run(tmp_path, planned[0])
    found, notes = jobs(planned, tmp_path)
    assert [job.action for job in found] == ["train", "train"] and f"{folder} was not finished" in notes[0]
    assert actions(jobs(planned, tmp_path, "auto")) == [("resume", 1), ("train", 2)]
    second = make_run(tmp_path, planned[1])
    found, _ = jobs(planned, tmp_path, "auto")
    assert actions((found,)) == [("resume", 2)] and found[0].run == second  # its autoencoder is in its checkpoint


def test_the_newest_of_this_name_and_postfix(planned, tmp_path):
    make_run(tmp_path, planned[0], "20260101-000000")
    newer = make_run(tmp_path, planned[0], "20260102-000000")
    other = tmp_path / "tiny_ae_more-20260103-000000"
    newer.rename(other)
    assert unfinished(tmp_path, planned[0])[0].parent.parent.name == "tiny_ae-20260101-000000"
    assert unfinished(tmp_path, planned[0], "more")[0].parent.parent == other


def test_another_model_is_not_continued(planned, tmp_path):
    model = json.loads(json.dumps(planned[0].config["model"]))
    model["params"]["autoencoder"]["params"]["width"] = 16
    make_run(tmp_path, planned[0], model=model)
    found, notes = unfinished(tmp_path, planned[0])
    assert found is None and "model.params.autoencoder.params.width" in notes[0]


def test_longer_training_is_continued_and_told(planned, tmp_path):
    make_run(tmp_path, planned[0], trainer={"max_steps": 2, "accelerator": "cpu"})
    found, notes = unfinished(tmp_path, planned[0])
    assert found and notes[0].endswith("its config differs in trainer.max_steps, the new value counts")


def test_another_autoencoder_is_not_continued(planned, tmp_path):
    folder = make_run(tmp_path, planned[1])
    (folder / "run.json").write_text('{"autoencoder": "another"}')
    found, notes = unfinished(tmp_path, planned[1])
    assert found is None and "differs in autoencoder" in notes[0]


def test_nothing_to_continue_is_told(planned, tmp_path):
    assert "no unfinished run of tiny_ldm" in jobs(planned, tmp_path, "auto")[1][0]


def test_a_run_or_file_by_name(planned, tmp_path):
    folder = make_run(tmp_path, planned[0])
    for given in (folder, folder / "checkpoints" / "last.ckpt"):
        assert actions(jobs(planned, tmp_path, str(given))) == [("resume", 1), ("train", 2)]
    (alone,), _ = read([planned[1].config["autoencoder"]["config"]])
    alone.open()
    other = make_run(tmp_path, planned[1])
    with pytest.raises(UserError, match="this is a run of diffusion training"):
        jobs([alone], tmp_path, str(other))


@pytest.mark.parametrize("given", ["nowhere", "."])
def test_resume_from_what_is_no_run(planned, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a run folder that holds checkpoints/last.ckpt"):
        jobs(planned, tmp_path, given)


def saved(folder, name, step):
    checkpoint(folder / "checkpoints" / name)
    torch.save({"global_step": step, "state_dict": {"w": torch.arange(1000.0)}}, folder / "checkpoints" / name)
    return folder / "checkpoints" / name


def spoil(path):
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [spoil, lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path, damage):
    for step in (999998, 1000002):
        saved(tmp_path, f"step-{step:06d}.ckpt", step)
    last, told = saved(tmp_path, "last.ckpt", 1000004), []
    assert newest(tmp_path, told.append) == last and not told
    damage(last)
    assert newest(tmp_path, told.append).name == "step-1000002.ckpt" and told == [f"{last}: damaged, passed over"]
    with pytest.raises(UserError, match="not a whole checkpoint"):
        runs.checkpoint_to_resume(str(last))
    for path in last.parent.glob("step-*.ckpt"):
        damage(path)
    assert newest(tmp_path) is None


def test_the_newest_is_what_was_saved_last(tmp_path):
    steps = [saved(tmp_path, f"step-{step:06d}.ckpt", step) for step in (10, 20, 30)]
    last = saved(tmp_path, "last.ckpt", 20)  # the run went on from step 10 and has not come to 30 yet
    for i, path in enumerate((*steps, last)):
        os.utime(path, (i, i))
    assert newest(tmp_path) == last
    os.utime(steps[2], (9, 9))  # the run was killed between the save and last.ckpt
    assert newest(tmp_path) == steps[2]


def test_no_folder_without_space(planned, tmp_path):
    job = runs.Job("train", 1)
    with pytest.raises(UserError, match="no space for the checkpoints"):
        run_folder(job, planned[0], torch.nn.Linear(1, 1), tmp_path / "logs", None, 2**62, 4)
    assert not (tmp_path / "logs").exists()
    folder = run_folder(job, planned[0], torch.nn.Linear(1, 1), tmp_path / "logs", "p", 10, 4)
    assert folder.name.startswith("tiny_ae-") and yaml.safe_load((folder / "config.yaml").read_text()) == planned[0].config


def test_another_global_batch_is_told(planned, tmp_path):
    folder = make_run(tmp_path, planned[0])
    job = runs.Job("resume", 1, folder / "checkpoints/last.ckpt")
    assert runs.other_batch(job, planned[0], 8) == []  # not known
    run_folder(job, planned[0], torch.nn.Module(), tmp_path, None, 0, 4)
    assert runs.other_batch(job, planned[0], 4) == [] == runs.other_batch(runs.Job("train", 1), planned[0], 8)
    assert "its global batch was 4, this command's is 8" in runs.other_batch(job, planned[0], 8)[0]


def test_a_checkpoint_of_another_model_is_refused(planned, tmp_path):
    folder = make_run(tmp_path, planned[0], done=True)
    module = torch.nn.Linear(2, 3)
    checkpoint(folder / "checkpoints/last.ckpt", weight=torch.ones(3, 2), bias=torch.ones(4))
    job = runs.Job("resume", 1, folder / "checkpoints/last.ckpt")
    with pytest.raises(UserError, match="is not of the model in this config: .*bias"):
        run_folder(job, planned[0], module, tmp_path, None, 0, 4)
    checkpoint(folder / "checkpoints/last.ckpt", weight=torch.ones(3, 2), bias=torch.ones(3))
    assert run_folder(job, planned[0], module, tmp_path, None, 0, 4) == folder
    assert not (folder / "DONE").exists()
