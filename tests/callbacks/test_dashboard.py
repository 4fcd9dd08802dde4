import sys
import types

import pytest
from PIL import Image

from ldm.callbacks.dashboard import Dashboard, has_key, mode


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class Run:
    def __init__(self):
        self.logged, self.ended, self.broken = [], False, False

    def log(self, values, step):
        if self.broken:
            raise RuntimeError("the service is gone\nmore")
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


@pytest.fixture
def wandb(monkeypatch):
    """The package, as far as it is used, without its processes."""
    fake = types.ModuleType("wandb")
    fake.errors = types.SimpleNamespace(CommError=type("CommError", (Exception,), {}))
    fake.Settings = lambda **values: values
    fake.Image = lambda image, caption: (image.size, caption)
    fake.calls, fake.run, fake.offline_only = [], Run(), False

    def init(**arguments):
        fake.calls.append(arguments)
        if fake.offline_only and arguments["mode"] != "offline":
            raise fake.errors.CommError("timed out")
        return fake.run

    fake.init = init
    fake.teardown = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_offline_without_a_key(monkeypatch, tmp_path):
    assert mode() == "offline" and not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert mode() == "online"
    (tmp_path / "netrc").write_text("machine elsewhere login user password x\n")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"


def test_numbers_and_pictures_of_a_run(wandb, tmp_path):
    board = Dashboard(tmp_path / "run", {"name": "x"}, {"project": "mine"})
    board.log({"step": 3, "train/loss": 0.5, "bad": None})
    board.picture("samples", Image.new("RGB", (4, 5)), "a | b", 3)
    board.finish()
    (call,) = wandb.calls
    assert call["project"] == "mine" and call["mode"] == "offline" and call["dir"] == str(tmp_path / "run")
    assert wandb.run.logged == [(3, {"step": 3, "train/loss": 0.5}), (3, {"samples": ((4, 5), "a | b")})]
    assert wandb.run.ended


def test_a_resumed_run_keeps_its_id(wandb, tmp_path):
    ids = [Dashboard(tmp_path / name, {}) and wandb.calls[-1]["id"] for name in ("a", "a", "b")]
    assert ids[0] == ids[1] != ids[2]


def test_without_network_it_is_written_offline(wandb, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    wandb.offline_only = True
    board = Dashboard(tmp_path, {})
    assert board.run is wandb.run and [call["mode"] for call in wandb.calls] == ["online", "offline"]
    assert "cannot be reached (timed out)" in caplog.text


def test_failures_are_told_once_and_end_nothing(wandb, tmp_path, caplog):
    board = Dashboard(tmp_path, {})
    wandb.run.broken = True
    for step in range(3):
        board.log({"step": step})
    board.finish()
    assert [record.message for record in caplog.records] == [
        "wandb failed to log (the service is gone): training goes on without it"
    ]


def test_a_package_that_does_not_start(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    board = Dashboard(tmp_path, {})
    board.log({"step": 1})
    assert board.run is None and len(caplog.records) == 1
