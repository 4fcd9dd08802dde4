"""Checkpoints that hold more than tensors: read without running or importing anything."""

import collections
import pickle
import sys
import types
import zipfile

import pytest
import torch

import ldm
from ldm.common.files import UserError
from ldm.interop import pickles


class Call:
    """Pickles as a call of `function` with these arguments."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def foreign(monkeypatch):
    """A class that nobody has when the file is read, as Lightning's ModelCheckpoint in the files of old versions."""
    module = types.ModuleType("lightning_of_old")
    exec("class ModelCheckpoint:\n    def __init__(self): self.best = 0.5", module.__dict__)
    module.ModelCheckpoint.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.ModelCheckpoint


def saved(path, content, protocol=2):
    torch.save(content, path, pickle_protocol=protocol)
    sys.modules.pop("lightning_of_old", None)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_and_plain_data_come_back(tmp_path, foreign, protocol):
    weight = torch.randn(6, 4)
    state = collections.OrderedDict(a=weight, view=weight[1:, ::2], half=weight.half(), count=torch.tensor(3),
                                    parameter=torch.nn.Parameter(torch.ones(2)), flags=torch.tensor([True]))  # fmt: skip
    content = {"state_dict": state, "epoch": 3, "version": "1.4", "numbers": [1.5, None, (True, "x")],
               "callbacks": {foreign: {"best": foreign()}}, "device": torch.device("cpu"), "set": {1}}  # fmt: skip
    path = saved(tmp_path / "x.ckpt", content, protocol)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found, strange = pickles.read(path)
    assert "lightning_of_old.ModelCheckpoint" in strange
    assert found["epoch"] == 3 and found["version"] == "1.4" and found["numbers"] == [1.5, None, (True, "x")]
    assert list(found["state_dict"]) == list(state)
    for key, value in state.items():
        assert torch.equal(found["state_dict"][key], value) and found["state_dict"][key].dtype == value.dtype
    (name,) = found["callbacks"]
    assert issubclass(name, pickles.StandIn) and name.__name__ == "ModelCheckpoint"
    assert "lightning_of_old" not in sys.modules


def test_numbers_of_a_machine_with_the_other_order_of_bytes(tmp_path):
    torch.save({"a": torch.arange(4.0), "b": torch.tensor([258], dtype=torch.int16)}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "y.ckpt", "w") as archive:
        for name, data in members.items():
            size = {"x/data/0": 4, "x/data/1": 2}.get(name, 1)
            data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
            archive.writestr(name, b"big" if name == "x/byteorder" else data)
    found, _ = pickles.read(tmp_path / "y.ckpt")
    assert found["a"].tolist() == [0, 1, 2, 3] and found["b"].tolist() == [258]


def attacks(target) -> dict:
    """What would leave a file behind, or change something for everybody, if it were carried out."""
    import os

    write = f"open({str(target)!r}, 'w').close()"
    return {
        "system": Call(os.system, f"touch {target}"), "exec": Call(exec, write), "eval": Call(eval, write),
        "open": Call(open, str(target), "w"), "import": Call(__import__, "this"),
        "getattr": Call(getattr, os, "system"), "run in a tensor": Call(torch._utils._rebuild_parameter, Call(exec, write), False, {}),
        "load": Call(torch.load, str(target)), "partial": Call(__import__("functools").partial, exec, write),
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("place", ["callbacks", "state_dict"])
def test_nothing_in_a_pickle_is_run(tmp_path, name, place):
    target = tmp_path / "owned"
    attack = attacks(target)[name]
    if name == "getattr":  # modules do not pickle: name it by hand
        attack = Call(getattr, Call(__import__, "os"), "system")
    weights = {"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}
    content = {"state_dict": weights, "callbacks": attack} if place == "callbacks" else {"state_dict": weights | {"x": attack}}
    sys.modules.pop("this", None)
    path = saved(tmp_path / "evil.ckpt", content)
    with pytest.raises(UserError):  # one weight is no autoencoder
        ldm.load(path)
    try:
        pickles.read(path)
    except pickle.UnpicklingError:
        pass  # a tensor made of a stand-in is refused, which is fine
    assert not target.exists() and "this" not in sys.modules


def test_functions_that_make_tensors_are_nobody_elses(tmp_path):
    """A pickle may set attributes of what it names."""
    before = dict(torch._utils._rebuild_tensor_v2.__dict__)
    stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x06\x00\x00\x00markedK\x01s\x86b."
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        for name, data in (("data.pkl", stream), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"x/{name}", data)
    try:
        pickles.read(tmp_path / "x.ckpt")
    except pickle.UnpicklingError:
        pass
    assert torch._utils._rebuild_tensor_v2.__dict__ == before


def test_a_program_is_no_checkpoint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        pickles.read(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="x.ckpt: "):
        ldm.load(tmp_path / "x.ckpt")


def test_files_from_before_torch_1_6(tmp_path, foreign):
    weight = torch.randn(4, 3)
    content = {"state_dict": {"a": weight, "b": weight.T}, "callbacks": {foreign: Call(exec, "1 / 0")}}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert (tmp_path / "x.ckpt").read_bytes().startswith(pickles.OLD)
    found = pickles.read(tmp_path / "x.ckpt")[0]["state_dict"]
    assert torch.equal(found["a"], weight) and torch.equal(found["b"], weight.T)
    with pytest.raises(UserError, match="could run code"):  # read, but no autoencoder
        ldm.load(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").write_bytes((tmp_path / "x.ckpt").read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged"):
        ldm.load(tmp_path / "x.ckpt")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "bin"])
@pytest.mark.parametrize(("text", "said"), [
    ("<!DOCTYPE html><html><head><title>404</title></head></html>", "a web page, not a checkpoint"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n", "`git lfs pull` fetches it"),
    ("", "x."), ("hello", "x."),
])  # fmt: skip
def test_what_a_download_left(tmp_path, suffix, text, said):
    path = tmp_path / f"x.{suffix}"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        ldm.load(path)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_damaged_files(tmp_path, foreign, share):
    path = saved(tmp_path / "x.ckpt", {"state_dict": {"encoder.down.0.a": torch.zeros(999)}, "callbacks": {foreign: 1}})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError) as error:
        ldm.load(path)
    assert "damaged" in str(error.value) and "\n" not in str(error.value)
