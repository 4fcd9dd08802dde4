import errno
import os
import resource
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from tiny_training import Tiny, fit

from ldm.callbacks import checkpoints
from ldm.callbacks.checkpoints import Checkpoints, nbytes, plain
from ldm.callbacks.clock import Clock
from ldm.callbacks.seeding import Seeding
from ldm.common.files import UserError


def saver(folder, every=2, keep=2):
    return Checkpoints(folder, every, keep, lambda module: {"kind": "tiny"}, Clock())


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_files_are_read_without_unpickling_and_the_newest_stay(tmp_path):
    save = saver(tmp_path / "new")
    _, module = fit([save], steps=7, plugins=[save.io])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["last.ckpt", "step-000004.ckpt", "step-000006.ckpt"]
    last = torch.load(save.last, weights_only=True)
    assert last["ldm"] == {"kind": "tiny"} and last["global_step"] == 6 and last["images_seen"] == 24
    assert save.last.samefile(tmp_path / "new" / "step-000006.ckpt")


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    straight, half = saver(tmp_path / "a", every=100), saver(tmp_path / "b", every=4)
    trainer, one = fit([Seeding(5), straight], steps=9, plugins=[straight.io])
    straight.save(trainer)
    fit([Seeding(5), half], steps=4, plugins=[half.io])
    trainer, two = fit([Seeding(5), half], steps=9, resume=half.last, plugins=[half.io])
    half.save(trainer)
    assert one.positions[16:] == two.positions == list(range(16, 36))
    a, b = (torch.load(save.last, weights_only=True) for save in (straight, half))
    for part in ("state_dict", "optimizer_states", "images_seen", "global_step"):
        assert same(a[part], b[part]), part


def test_a_save_that_fails_leaves_the_old_file_and_the_training_alone(tmp_path, monkeypatch, caplog):
    save, real = saver(tmp_path), torch.save
    written = []

    def full(value, path):
        written.append(path)
        if len(written) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path)

    monkeypatch.setattr(torch, "save", full)
    trainer, _ = fit([save], steps=6, plugins=[save.io])
    assert trainer.global_step == 6 and len(written) == 3
    assert torch.load(save.last, weights_only=True)["global_step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-000002.ckpt"]
    assert "not saved, training goes on" in caplog.text
    with pytest.raises(UserError, match="the finished model cannot be saved"):
        save.save_final(trainer)


def test_a_limit_of_file_sizes_ends_no_training(tmp_path, caplog):
    save, trained = saver(tmp_path), Tiny()

    class Limit(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))  # half a checkpoint

    try:
        trainer, _ = fit([Limit(), save], 6, trained, plugins=[save.io])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert trainer.global_step == 6 and "not saved, training goes on: [Errno 27] no space to write" in caplog.text
    assert torch.load(save.last, weights_only=True)["global_step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step-000002.ckpt"]


@pytest.mark.parametrize("call", ["replace", "link", "unlink"])
def test_a_folder_that_takes_no_changes_ends_no_training(tmp_path, monkeypatch, caplog, call):
    save = saver(tmp_path, every=1, keep=1)

    def refused(*arguments, **options):
        raise PermissionError(errno.EROFS, "Read-only file system")

    fit([save], steps=1, plugins=[save.io])
    monkeypatch.setattr(checkpoints.shutil, "copyfile", refused)
    monkeypatch.setattr(*((Path, "unlink") if call == "unlink" else (os, call)), refused)
    trainer, _ = fit([save], steps=3, plugins=[save.io])
    assert trainer.global_step == 3 and "not saved, training goes on" in caplog.text
    monkeypatch.undo()
    assert torch.load(save.last, weights_only=True)["global_step"] >= 1


def test_the_older_stay_until_the_newer_is_there(tmp_path, monkeypatch):
    save, seen = saver(tmp_path, every=1, keep=1), []
    real = os.replace

    def replace(a, b):
        seen.append(len(list(tmp_path.glob("step-*.ckpt"))))
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    fit([save], steps=3, plugins=[save.io])
    assert seen == [0, 1, 1, 2, 1, 2] and len(list(tmp_path.glob("step-*.ckpt"))) == 1


def test_what_is_compiled_is_saved_under_its_own_names(tmp_path):
    """And so is what DDP wraps, see two_ranks.py."""
    plain_one, compiled = saver(tmp_path / "a"), saver(tmp_path / "b")
    fit([plain_one], 2, plugins=[plain_one.io])
    module = Tiny()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    assert "net.0._orig_mod.weight" in module.state_dict()
    fit([compiled], 2, module, plugins=[compiled.io])
    keys = [list(torch.load(save.last, weights_only=True)["state_dict"]) for save in (plain_one, compiled)]
    assert keys[0] == keys[1] == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: 10)
    save = saver(tmp_path / "new")
    fit([save], steps=2, plugins=[save.io])
    assert not (tmp_path / "new").exists() and "are needed and 0.0 MiB free" in caplog.text


def test_plain_data_only():
    made = plain({"a": OrderedDict(b=(1, [np.float64(2.5)])), "p": Path("x/y"), "w": torch.nn.Parameter(torch.ones(2))})
    assert made["a"] == {"b": (1, [2.5])} and type(made["a"]["b"][1][0]) is float and made["p"] == "x/y"
    assert type(made["w"]) is torch.Tensor
    with pytest.raises(TypeError, match=r"checkpoint\.a\[1\]: a Tiny cannot"):
        plain({"a": [1, Tiny()]})


def test_shared_memory_counts_once():
    x = torch.zeros(10)
    assert nbytes({"a": x, "b": [x[:5], (torch.zeros(3, dtype=torch.int64),)]}) == 40 + 24
