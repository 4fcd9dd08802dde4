"""A run that is killed again and again, by whatever, always has a whole checkpoint, never goes back behind it, and ends as the
run that nobody touched."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import start, status, write

from ldm.app.runs import newest
from ldm.common.equal import differences
from ldm.data.shapes import Shapes

KILL, USR1 = signal.SIGKILL, signal.SIGUSR1
LIMIT = "limit"  # killed, and before that its saves failed


def limited(arguments):
    """main, where no file may be larger than a part of a checkpoint."""
    from main import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    return main(arguments)


def wait_for(there, seconds=60):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.005)


def step_of(folder):
    """Of the newest whole checkpoint of the one run that there is; -1 before the first."""
    found = [newest(path) for path in folder.glob("pixels-*")]
    assert len(found) <= 1
    return torch.load(found[0], weights_only=True)["global_step"] if found and found[0] else -1


def survived(folder, ends, steps, seed=0) -> dict[str, int]:
    """Ends the same command in each of these ways, each time at another moment, then lets it come to its end."""
    moments, counts, logs, done = random.Random(seed), {"killed": 0, "while saving": 0, "at the start": 0, "signals": 0}, folder / "logs", -1
    command = [*write(folder, checkpoint={"every": 1, "keep": 2}, trainer={"max_steps": steps, "accelerator": "cpu"}), "--resume", "auto"]
    for i, end in enumerate(ends):
        output, small, number = folder / f"{i}.txt", end is LIMIT, KILL if end is LIMIT else end
        child = start(command, output, call=limited if small else None)
        if number is KILL and not small and moments.random() < 0.2:
            time.sleep(moments.uniform(0, 1))
            counts["at the start"] += 1
        elif small:
            wait_for(lambda output=output: output.exists() and output.read_text().count("not saved, training goes on") > 2)
        else:
            wait_for(lambda done=done: any((path / "checkpoints" / f"step-{done + 2:06d}.ckpt").exists() for path in logs.glob("pixels-*")))
            if moments.random() < 0.5:
                wait_for(lambda: any(True for _ in logs.glob("pixels-*/checkpoints/.tmp-*")))
            else:
                time.sleep(moments.uniform(0, 0.15))
        os.kill(child, number)
        assert status(child) == 128 + number, output.read_text()
        counts["killed" if number is KILL else "signals"] += 1
        counts["while saving"] += any(True for _ in logs.glob("pixels-*/checkpoints/.tmp-*"))
        before, done = done, step_of(logs)
        assert before <= done < steps and not (small and done != before)
    assert status(start(command, folder / "last.txt"), 600) == 0, (folder / "last.txt").read_text()
    assert not list(logs.glob("pixels-*/checkpoints/.tmp-*"))
    assert status(start([*command[:-2], "-l", str(folder / "straight")], folder / "straight.txt"), 600) == 0
    (one,), (other,) = (list((folder / name).glob("pixels-*/checkpoints/last.ckpt")) for name in ("logs", "straight"))
    found = differences(*(torch.load(path, weights_only=True) for path in (one, other)))
    assert all(path == "epoch" or path.startswith("loops.fit_loop.epoch_progress") for path in found)  # Lightning's, without meaning
    return counts


def test_ends_of_every_kind(tmp_path):
    counts = survived(tmp_path, [KILL, USR1, LIMIT], steps=40)
    assert counts["killed"] == 2 and counts["signals"] == 1
    assert "--resume auto goes on from there" in (tmp_path / "1.txt").read_text()


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    counts = survived(tmp_path, [KILL, KILL, KILL, KILL, LIMIT] * 6, steps=250)
    print(counts)
    assert counts["killed"] == 30 and counts["while saving"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, USR1])
def test_a_second_signal_ends_a_run_at_once(tmp_path, number):
    """Even where the step at hand never ends; the last checkpoint is whole."""
    command = write(tmp_path, data={"train": {"target": "test_killed.Stuck", "params": {"count": 10}}}, checkpoint={"every": 1, "keep": 1})
    child = start(command, tmp_path / "said.txt", {"STUCK": str(tmp_path / "logs")})
    wait_for(lambda: (tmp_path / "said.txt").exists() and "stuck" in (tmp_path / "said.txt").read_text())
    os.kill(child, number)
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it waits for the step
    os.kill(child, number)
    assert status(child, 5) == 128 + number
    assert step_of(tmp_path / "logs") >= 1


class Stuck(Shapes):
    """Cannot be read for a long time, once there is a checkpoint."""

    def __getitem__(self, i):
        if any(True for _ in Path(os.environ["STUCK"]).glob("*/checkpoints/last.ckpt")):
            print("stuck", flush=True)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.1)
        return super().__getitem__(i)
