import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.app.launch import rank, start

ROOT = Path(__file__).parents[2]


def program(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, signal; rank = int(os.environ['RANK']); {text}"]


def test_every_process_knows_its_place(tmp_path):
    told = "open(f'{sys.argv[1]}/{rank}', 'w').write(os.environ['LOCAL_RANK'] + ' ' + os.environ['WORLD_SIZE'])"
    assert start(3, [*program(told), str(tmp_path)]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "0 3", "1": "1 3", "2": "2 3"}


@pytest.mark.parametrize("first, status", [("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_one_that_fails_ends_the_others(monkeypatch, first, status):
    monkeypatch.setattr("ldm.app.launch.PATIENCE", 3.0)
    began = time.monotonic()
    assert start(2, program(f"exec('if rank: {first}'); time.sleep(60)")) == status
    assert time.monotonic() - began < 20


def test_signals_reach_all_of_them():
    text = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); os.write(1, b'%d\\n' % rank); time.sleep(30)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ldm.app.launch import start; "
               f"sys.exit(start(2, {program(text)!r}))"]  # fmt: skip
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert sorted(parent.stdout.readline().strip() for _ in range(2)) == ["0", "1"]
    finally:
        parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 143


def test_rank_before_there_is_a_group(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank() == 0
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    monkeypatch.setitem(os.environ, "RANK", "5")
    assert rank() == 5
