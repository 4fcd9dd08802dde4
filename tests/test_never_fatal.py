"""No network, a dead wandb, a folder or a disk that takes nothing: training goes on, or does not begin."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import free_port, start, status, write

from ldm.app import runs
from ldm.callbacks import dashboard

STEPS = 30


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """-> what makes wandb's own files stay here; there is no key."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "NETRC": str(tmp_path / "netrc")}


def arguments(folder, steps=STEPS):
    return write(folder, logging={"every": 1, "images_every": 0}, trainer={"max_steps": steps, "accelerator": "cpu"}, checkpoint={"every": 10, "keep": 1})


def steps(folder):
    (run,) = (folder / "logs").glob("pixels-*")
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def service_of(pid) -> int | None:
    """wandb's own process of this one."""
    for said in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = said.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"wandb-core") and str(pid).encode() in words:
            return int(said.parent.name)
    return None


@pytest.mark.parametrize("number, told", [(signal.SIGKILL, "wandb failed to"), (signal.SIGSTOP, "no answer in 2 s")])
def test_a_wandb_process_that_dies_or_hangs(tmp_path, wandb, monkeypatch, number, told):
    monkeypatch.setattr(dashboard, "PATIENCE", 2)
    monkeypatch.setattr(dashboard.Dashboard, "_start", hurt(dashboard.Dashboard._start, number))
    child = start(arguments(tmp_path), tmp_path / "said.txt", wandb)
    assert status(child, 60) == 0, (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert said.count("training goes on without it") == 1 and told in said and "Traceback" not in said
    assert steps(tmp_path) == list(range(1, STEPS + 1)) and service_of(child) is None


def hurt(begin, number):
    """Starts wandb, and sends its process a signal."""

    def started(self, *given):
        begin(self, *given)
        os.kill(service_of(os.getpid()), number)

    return started


def test_no_network(tmp_path, wandb, monkeypatch):
    """A key is there, a server is not: what is sent later lies on the disk."""
    monkeypatch.setattr(dashboard, "PATIENCE", 2)
    key = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    child = start(arguments(tmp_path), tmp_path / "said.txt", wandb | key)
    assert status(child, 60) == 0, (tmp_path / "said.txt").read_text()
    said = (tmp_path / "said.txt").read_text()
    assert "this run is written offline" in said and "goes on without it" not in said and "Traceback" not in said
    assert steps(tmp_path) == list(range(1, STEPS + 1)) and len(list(tmp_path.glob("logs/*/wandb/offline-run-*/*.wandb"))) == 1


def test_not_a_single_connection_is_tried_without_a_key(tmp_path, wandb, monkeypatch):
    def refused(self, place, *more):
        if self.family != socket.AF_UNIX and place[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(101, f"somebody called {place}")
        return connect(self, place, *more)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refused)
    child = start(arguments(tmp_path, 2), tmp_path / "said.txt", wandb)
    assert status(child, 60) == 0 and "somebody called" not in (tmp_path / "said.txt").read_text()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("logs, told", [("file", "the run folder cannot be written"), ("file/below", "the run folder cannot be written"),
                                        ("/proc/nothing", "no space for the checkpoints")])  # fmt: skip
def test_a_log_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path, logs, told):
    (tmp_path / "file").write_text("mine")
    words = write(tmp_path)
    words[words.index("-l") + 1] = str(tmp_path / logs)
    began = time.monotonic()
    assert status(start(words, tmp_path / "said.txt")) == 2
    said = (tmp_path / "said.txt").read_text()
    assert said.count("error: ") == 1 and f"{tmp_path / logs}: {told}" in said
    assert "training;" not in said and "Traceback" not in said and time.monotonic() - began < 30
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "free_bytes", lambda path: 1000)
    assert status(start(write(tmp_path), tmp_path / "said.txt")) == 2
    said = (tmp_path / "said.txt").read_text()
    assert said.count("error: ") == 1 and "no space for the checkpoints" in said and "training;" not in said
    assert not (tmp_path / "logs").exists()
