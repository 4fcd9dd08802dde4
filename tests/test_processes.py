"""Several processes: however they are started, they train the same; one that fails ends them all."""

import os
import re
import time

import pytest
import torch
from forked import free_port, pair, slurm, torchrun, write

from ldm.app import launch
from ldm.common.equal import differences
from ldm.common.files import UserError
from ldm.data.shapes import Shapes

DEVICES = "trainer.devices=2"


def test_processes_of_torchrun_and_slurm_train_the_same(tmp_path):
    saved = []
    for kind in (torchrun, slurm):
        (tmp_path / kind.__name__).mkdir()
        codes, (first, second) = pair(kind, tmp_path, [*write(tmp_path / kind.__name__), DEVICES])
        assert codes == [0, 0], first + second
        assert "global batch 4 = 2 x 2 devices" in first and "rank 0 of 2" in first and "stage 1" not in second
        (last,) = (tmp_path / kind.__name__ / "logs").glob("pixels-*/checkpoints/last.ckpt")
        saved.append(torch.load(last, weights_only=True))
    assert saved[0]["images_seen"] == 16 and differences(*saved) == {}


class Failing(Shapes):
    """Cannot be read on the second rank, after a while."""

    def __getitem__(self, i):
        Failing.read = getattr(Failing, "read", 0) + 1
        if os.environ.get("RANK") == "1" and Failing.read > 40:
            raise LookupError(f"the disk of rank 1 is gone at {time.monotonic()} s")
        return super().__getitem__(i)


def test_a_rank_that_fails_ends_the_others_with_its_own_traceback(tmp_path):
    arguments = write(tmp_path, data={"train": {"target": "test_processes.Failing", "params": {"count": 10}}},
                      trainer={"max_steps": 10**6, "accelerator": "cpu"})  # fmt: skip
    codes, (first, second) = pair(torchrun, tmp_path, [*arguments, DEVICES])
    assert codes == [1, 1] and "[rank 1] rank 1 failed" in second
    failed_at = float(re.search(r"LookupError: the disk of rank 1 is gone at ([\d.]+) s", second)[1])
    assert time.monotonic() - failed_at < 30
    assert "rank 0 failed" in first


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_say_why(monkeypatch, rank):
    for name, value in torchrun(rank, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"rank {rank} of 2 on .* did not find one another at 127.0.0.1:.* Likely causes: not 2"):
        launch.meet(rank, 2, torch.device("cpu"), seconds=0.5)
