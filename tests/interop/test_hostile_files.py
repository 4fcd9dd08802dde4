"""Checkpoints that were written to do harm, in the layout of every reader, given to every command that reads checkpoints: nothing
is run, little memory is used, the answer is one line and exit status 2."""

import builtins
import codecs
import functools
import io
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.__main__ import main
from ldm.interop import pickles

WEIGHT = torch.zeros(4, 4, 3, 3)
LAYOUTS = {  # what each reader knows its files by, and the name of the file
    "ours": ({"model.denoiser.network.conv_in.weight": WEIGHT}, "last.ckpt"),
    "compvis": ({"model.diffusion_model.input_blocks.0.0.weight": WEIGHT}, "model.ckpt"),
    "autoencoder": ({"encoder.down.0.block.0.conv1.weight": WEIGHT}, "autoencoder.ckpt"),
    "adm": ({"input_blocks.0.0.weight": WEIGHT, "time_embed.0.weight": WEIGHT[..., 0, 0], "output_blocks.0.0.w": WEIGHT}, "adm.pt"),
    "dit": ({"blocks.0.adaLN_modulation.1.weight": WEIGHT[..., 0, 0]}, "dit.pt"),
    "diffusers": ({"encoder.down_blocks.0.resnets.0.conv1.weight": WEIGHT}, "vae/diffusion_pytorch_model.bin"),
    "pipeline": ({"conv_in.weight": WEIGHT}, "pipeline/unet/diffusion_pytorch_model.bin"),
}  # fmt: skip
BESIDE = {  # of the folders of diffusers
    "vae/config.json": '{"_class_name": "AutoencoderKL"}', "pipeline/model_index.json": '{"unet": ["diffusers", "UNet2DModel"]}',
    "pipeline/unet/config.json": '{"_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "block_out_channels": [4]}',
}  # fmt: skip


class Call:
    """Pickles as a call of the function, and as setting a state afterwards."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Name:
    """Pickles as the name of something, whether that is there or not."""

    def __init__(self, module, name):
        self.words = module, name

    def __call__(self):
        """Pickle asks whether it can be called."""


class Stored:
    """Pickles as numbers in another member of the zip."""

    def __init__(self, count, key="0", kind=torch.FloatStorage, location="cpu"):
        self.saved = ("storage", kind, key, location, count)


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.saved if isinstance(value, Stored) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            return self.write(b"c" + "\n".join(value.words).encode() + b"\n")
        return super().save(value, save_persistent_id)


def pickled(value, protocol=2) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def tensor(count, offset, size, stride, **how):
    return Call(torch._utils._rebuild_tensor_v2, Stored(count, **how), offset, size, stride, False, OrderedDict())


def attacks(canary) -> dict:
    """What would leave a file behind, change something for everybody, read or use memory that is not the file's, or run without
    end, if it were carried out."""
    write = f"open({str(canary)!r}, 'w').close()"
    names = Call(OrderedDict, state={"items": 5, "keys": 5, "get": torch.Size, "values": exec})
    hooked = OrderedDict(hook=Call(exec, write))
    return {
        "os.system": Call(os.system, f"touch {canary}"), "posix.system": Call(Name("posix", "system"), f"touch {canary}"),
        "eval": Call(eval, write), "exec": Call(exec, write), "compile": Call(exec, Call(compile, write, "x", "exec")),
        "subprocess": Call(Name("subprocess", "Popen"), ["touch", str(canary)]), "open": Call(open, str(canary), "w"),
        "nested": Call(getattr, Call(Name("importlib", "import_module"), "os"), "system"), "import": Call(__import__, "this"),
        "deep call": Call(list, [Call(dict, [("a", Call(os.system, f"touch {canary}"))])]),
        "getattr chain": Call(functools.reduce, getattr, ["__class__", "__base__", "__subclasses__"], ()),
        "partial": Call(functools.partial(exec, write)), "partial's state": Call(functools.partial, print, state=(exec, (write,), {}, {})),
        "map": Call(list, Call(map, eval, [write])), "lambda": Call(Name("types", "FunctionType"), Call(Name("types", "CodeType"))),
        "codecs": Call(codecs.lookup, "rot13"), "bytearray": Call(bytearray, 3 * 10**9), "bytes": Call(builtins.bytes, 3 * 10**9),
        "__setstate__": Call(Name("torch.nn.modules.module", "Module"), state={"forward": Call(exec, write)}),
        "BUILD of a function": Call(torch._utils._rebuild_tensor_v2, state={"__code__": 1, "__defaults__": (1, 2)}),
        "BUILD of a tensor": Call(torch._utils._rebuild_tensor_v2, Stored(4), 0, (4,), (1,), False, {}, state={"__class__": 1}),
        "numpy reconstruct": np.array([Call(os.system, f"touch {canary}")], dtype=object), "numpy scalar": np.float64(1.0),
        "numpy _reconstruct": Call(np.core.multiarray._reconstruct, Name("subprocess", "Popen"), (0,), b"b"),
        "numpy from file": Call(Name("numpy", "fromfile"), "/etc/passwd"), "numpy load": Call(Name("numpy", "load"), str(canary)),
        "torch.load": Call(torch.load, str(canary)), "hub": Call(Name("torch.hub", "load"), "a/b", "c"),
        "jit": Call(Name("torch.jit._serialization", "load"), str(canary)), "rpc": Call(Name("torch.distributed.rpc.internal", "_run_function")),
        "from_file": Call(Name("torch", "FloatStorage.from_file"), "/etc/passwd", False, 1), "tensor of nothing": Call(torch.Tensor, 3 * 10**9),
        "parameter of a call": Call(torch._utils._rebuild_parameter, Call(exec, write), False, hooked),
        "hooks": Call(torch._utils._rebuild_tensor_v2, Stored(4), 0, (4,), (1,), False, hooked),
        "type": Call(torch._tensor._rebuild_from_type_v2, exec, torch.Tensor, (write,), {}), "OrderedDict's methods": names,
        "device tensor": Call(torch._utils._rebuild_device_tensor_from_numpy, 1, torch.float32, "cpu", False),
        "sparse": Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (1, 2, (10**9,))),
        "quantized": Call(torch._utils._rebuild_qtensor, Stored(4), 0, (4,), (1,), (torch.per_tensor_affine, 1.0, 0), False, {}),
        "set_": Call(torch.Tensor, state=(Stored(4), 0, (10**9,), (1,))), "no end": tensor(4, 0, (10**6, 10**6), (0, 0)),
        "storage too large": tensor(10**7, 0, (10**7,), (1,)), "storage too small": tensor(2, 0, (100,), (1,)),
        "storage below zero": tensor(-100, 0, (1,), (1,)), "storage of all memory": tensor(2**60, 0, (2**60,), (1,)),
        "offset": tensor(4, 10**6, (4,), (1,)), "negative offset": tensor(4, -2, (4,), (1,)), "strides": tensor(4, 0, (2, 2), (10**9, 1)),
        "negative size": tensor(4, 0, (-4,), (1,)), "negative stride": tensor(4, 3, (4,), (-1,)), "no such storage": tensor(4, 0, (4,), (1,), key="9"),
        "a path as key": tensor(4, 0, (4,), (1,), key="../data.pkl"), "a device": tensor(4, 0, (4,), (1,), location="cuda:0; rm"),
        "kind of storage": tensor(4, 0, (4,), (1,), kind=os.system), "size of text": Call(torch._utils._rebuild_tensor_v2, Stored(4), "a", "b", "c"),
        "persistent id": Stored.__new__(Stored), "cycle": cycle(), "billion laughs": laughs([], 40), "laughs of tuples": laughs((), 40),
        "deep lists": deep(90 * 1000),
    }  # fmt: skip


Stored.saved = ("module", os.system, "a", "b")  # of one that was made without __init__


def cycle() -> dict:
    found = {}
    found["again"] = found
    return found


def laughs(value, times):
    for _ in range(times):
        value = type(value)((value, value))
    return value


class deep:  # noqa: N801
    """Pickles as a tuple in tuples, as a name in a dict: as deep as Python breaks on."""

    def __init__(self, depth):
        self.depth = depth


DEEP = b"}" + b")" + b"\x85" * 10**6 + b"K\x01s"


def stream(value) -> bytes:
    """A pickle; what cannot be pickled is written by hand."""
    marker = Name("hand", "written")
    return pickled(replaced(value, marker)).replace(b"chand\nwritten\n", DEEP)


def replaced(value, marker):
    if isinstance(value, dict) and type(value) is dict:
        return {key: value if key == "again" else replaced(item, marker) for key, item in value.items()}
    return marker if isinstance(value, deep) else value


def write_zip(path, value, members=(), compression=zipfile.ZIP_STORED, **others) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        listed = {"data.pkl": value if isinstance(value, bytes) else stream(value), "data/0": bytes(16), "version": b"3\n", **others}
        for name, data in [*listed.items(), *members]:
            archive.writestr(f"archive/{name}", data)


def content(layout, inside=None, beside=None) -> dict:
    """A checkpoint in a layout, with something among its tensors, or beside them."""
    state = {name: tensor(4, 0, (0, *value.shape[1:]), (1,) * value.ndim) for name, value in LAYOUTS[layout][0].items()}
    state |= {} if inside is None else {"x": inside}
    if layout in ("diffusers", "pipeline"):
        return state | ({} if beside is None else {"callbacks": beside})
    about = {"ldm": {"kind": "diffusion", "config": {"model": {}}}} if layout == "ours" else {}
    return {"state_dict": state, **about, **({} if beside is None else {"callbacks": beside})}


@pytest.fixture
def layout_folder(tmp_path):
    for name, text in BESIDE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


SEEN: list | None = None  # what Python does meanwhile
HARM = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "shutil.", "os.remove", "os.rename",
        "os.chmod", "os.link", "os.symlink", "os.kill", "import", "ctypes.")  # fmt: skip


def watch(event, arguments):
    if SEEN is not None and event.startswith(HARM):
        SEEN.append((event, str(arguments)[:100]))
    if SEEN is not None and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        SEEN.append((event, str(arguments)[:100]))


sys.addaudithook(watch)


@contextmanager
def nothing_happens(canary):
    global SEEN
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    SEEN = []
    try:
        yield
    finally:
        seen, SEEN = SEEN, None
    assert not seen and not canary.exists() and "this" not in sys.modules
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024  # KiB


def commands(path, out):
    """Whatever reads checkpoints."""
    return [["info", str(path)], ["txt2img", "--ckpt", str(path), "--prompt", "a fox", "--outdir", str(out)],
            ["convert", "--ckpt", str(path), "--to", "ldm", "--out", str(out / "x.safetensors")]]  # fmt: skip


def refused(path, folder, capsys, which=slice(None)) -> str:
    """The commands say one line about the file, and do nothing."""
    canary, out = folder / "canary", folder / "out"
    for command in commands(path, out)[which]:
        with nothing_happens(canary):
            status = main(command)
        said = capsys.readouterr().err
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1000, (command, said)
        assert "Traceback" not in said and not out.exists()
    return said


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is imported by the first command is not held against the others."""
    folder = tmp_path_factory.mktemp("warm")
    for layout, (_, name) in LAYOUTS.items():
        for other, text in BESIDE.items():
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / other).write_text(text)
        write_zip(folder / name, content(layout))
        for command in commands(folder / name, folder / "out"):
            main(command)


def place(layout, folder):
    return folder / LAYOUTS[layout][1]


def named(layout, folder):
    """What is given to a command: the file, or the folder that it is a part of."""
    return {"diffusers": folder / "vae", "pipeline": folder / "pipeline"}.get(layout, place(layout, folder))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", attacks("x"))
def test_nothing_of_a_pickle_is_carried_out(layout_folder, capsys, name, layout):
    for i, where in enumerate(("inside", "beside")):
        value = attacks(layout_folder / "canary")[name]
        write_zip(place(layout, layout_folder), content(layout, **{where: value}))
        one = (list(attacks("x")).index(name) + list(LAYOUTS).index(layout) + i) % 3
        refused(named(layout, layout_folder), layout_folder, capsys, slice(one, one + 1))


# Files that are no pickles, or lie about their parts.


def patched(path, change) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def directory(data: bytearray) -> int:
    return data.find(b"PK\x01\x02")


def packed(path, value) -> None:
    """How torch saved before 1.6: five pickles, then the numbers."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def old(path, contents: bytes, keys=("0",), numbers: bytes = struct.pack("<q", 4) + bytes(16)) -> None:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    path.write_bytes(pickles.OLD + b"".join(pickle.dumps(each, 2) for each in (1001, system)) + contents
                     + pickle.dumps(list(keys), 2) + numbers)  # fmt: skip


class OldStored(Stored):
    def __init__(self, count, view=None):
        self.saved = ("storage", torch.FloatStorage, "0", "cpu", count, view)


def old_state(count, view=None, size=(4,)) -> bytes:
    made = Call(torch._utils._rebuild_tensor_v2, OldStored(count, view), 0, size, (1,), False, OrderedDict())
    return pickled({"state_dict": {"encoder.down.0.block.0.conv1.weight": made}})


def tar_and_pickle(path) -> None:
    """Begins as torch's old files do, and is a tar file, of which torch's first files were one."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in (pickles.OLD.decode("latin-1"), "storages", "tensors", "pickle"):
            data = pickle.dumps(0)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def symlink_in_tar(path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("storages")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)


def overlapping(path) -> None:
    """A member again and again under other names, so that a small file unpacks to a large one."""
    write_zip(path, content("ours"), members=[("data/big", bytes(10**6)), ("data/more", b"x")])

    def change(data):
        first, second = data.find(b"PK\x03\x04", 0), data.rfind(b"PK\x01\x02")
        data[second + 20 : second + 28] = struct.pack("<II", 10**6, 10**6)  # sizes
        data[second + 42 : second + 46] = struct.pack("<I", data.find(b"archive/data/big") - 30 - first)

    patched(path, change)


def with_size(path, size) -> None:
    write_zip(path, content("ours"))
    patched(path, lambda data: data.__setitem__(slice(directory(data) + 20, directory(data) + 28), struct.pack("<II", size, size)))


def two_directories(path) -> None:
    """One zip in another's comment: which one is read depends on who reads."""
    write_zip(path, content("ours", beside=Call(os.system, "true")))
    inner = path.read_bytes()
    write_zip(path, content("ours"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = inner[:60000]


ZIPS = {
    "bomb of a pickle": lambda path: write_zip(path, b"\x80\x02}X" + struct.pack("<I", 5 * 10**7) + b" " * 5 * 10**7 + b"K\x01s.",
                                               compression=zipfile.ZIP_DEFLATED),
    "bomb of numbers": lambda path: write_zip(path, content("ours"), members=[("data/1", bytes(10**8))], compression=zipfile.ZIP_DEFLATED),
    "bomb, LZMA": lambda path: write_zip(path, content("ours"), members=[("data/1", bytes(10**7))], compression=zipfile.ZIP_LZMA),
    "overlapping members": overlapping, "a size of 4 GB": lambda path: with_size(path, 2**32 - 2),
    "paths upwards": lambda path: write_zip(path, content("ours"), members=[("../../../evil", b"x")]),
    "paths upwards within": lambda path: write_zip(path, content("ours"), members=[("data/../../../evil", b"x")]),
    "one name twice": lambda path: write_zip(path, content("ours"), members=[("data.pkl", stream(content("ours")))]),
    "no pickle": lambda path: zipfile.ZipFile(path, "w").writestr("archive/data/0", b"x"),
    "an empty zip": lambda path: zipfile.ZipFile(path, "w").close(), "an empty pickle": lambda path: write_zip(path, b""),
    "half a pickle": lambda path: write_zip(path, stream(content("ours"))[:-9]), "no stop": lambda path: write_zip(path, b"\x80\x02}"),
    "rubbish in place of a pickle": lambda path: write_zip(path, bytes(range(256)) * 9), "zip in zip's comment": two_directories,
    "a program": lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)),
    "a package": lambda path: write_zip(path, content("ours"), **{"constants.pkl": b"."}),
    "lying header": lambda path: (write_zip(path, content("ours")), patched(path, lambda data: data.__setitem__(slice(26, 30), b"\xff" * 4))),
}  # fmt: skip
OLDS = {
    "another protocol": lambda path: path.write_bytes(pickles.OLD + pickle.dumps(999, 2)), "nothing follows": lambda path: path.write_bytes(pickles.OLD),
    "a call": lambda path: old(path, pickled({"state_dict": {"a": Call(os.system, "true")}})), "a whole one": lambda path: old(path, old_state(4)),
    "too many numbers": lambda path: old(path, old_state(10**9)), "numbers below zero": lambda path: old(path, old_state(-4)),
    "numbers of all memory": lambda path: old(path, old_state(2**60)), "numbers cut off": lambda path: old(path, old_state(4), numbers=bytes(4)),
    "another count": lambda path: old(path, old_state(4), numbers=struct.pack("<q", 2**62)), "no keys": lambda path: old(path, old_state(4), keys=()),
    "unknown keys": lambda path: old(path, old_state(4), keys=("9",)), "a view beyond": lambda path: old(path, old_state(4, ("1", 2, 10**9))),
    "a view before": lambda path: old(path, old_state(4, ("1", -2, 4))), "larger than its numbers": lambda path: old(path, old_state(4, size=(400,))),
    "source code": lambda path: old(path, pickled(("module", torch.nn.Linear, "x.py", "import os"))), "tar and pickle": tar_and_pickle,
    "a tar": symlink_in_tar, "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Call(os.system, "true"))),
    "empty": lambda path: path.write_bytes(b""), "zeros": lambda path: path.write_bytes(bytes(10**6)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [*ZIPS, *OLDS])
def test_files_that_are_no_checkpoints(tmp_path, capsys, name):
    path = tmp_path / "x.ckpt"
    (ZIPS | OLDS)[name](path)
    size = path.stat().st_size
    refused(path, tmp_path, capsys)
    assert path.stat().st_size == size and sorted(os.listdir(tmp_path)) == ["x.ckpt"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_end_too_early(layout_folder, capsys, layout):
    path = place(layout, layout_folder)
    torch.save({"state_dict": LAYOUTS[layout][0]} if layout in ("compvis", "autoencoder") else LAYOUTS[layout][0], path)
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(named(layout, layout_folder), layout_folder, capsys, slice(1))


def safetensors(path, header: bytes | str, data: bytes = bytes(64), length=None) -> None:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(shape="[4]", offsets="[0,16]", dtype="F32", name="model.denoiser.network.conv_in.weight") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


HEADERS = {
    "a length of 10 GB": ("{}", {"length": 10 * 2**30}), "the greatest length": ("{}", {"length": 2**64 - 1}), "no length": ("", {"length": 0}),
    "no JSON": ("{hello", {}), "no UTF-8": (b'{"\xff\xfe": 1}', {}), "zeros": (bytes(100), {}), "a list": ("[]", {}), "a number": ("1", {}),
    "a huge shape": (f"{{{entry('[99999999999,99999999999]')}}}", {}), "a shape of nothing": (f"{{{entry('[0,18446744073709551615]', '[0,0]')}}}", {}),
    "a negative shape": (f"{{{entry('[-4]')}}}", {}), "an overflowing shape": (f"{{{entry('[4294967296,4294967296,4]')}}}", {}),
    "beyond the end": (f"{{{entry('[400]', '[0,1600]')}}}", {}), "backwards": (f"{{{entry('[4]', '[16,0]')}}}", {}),
    "overlapping": (f"{{{entry()},{entry(name='x', offsets='[8,24]')}}}", {}), "gaps": (f"{{{entry()},{entry(name='x', offsets='[32,48]')}}}", {}),
    "one name twice": (f"{{{entry()},{entry()}}}", {}), "an unknown type": (f"{{{entry(dtype='F999')}}}", {}), "4 bits": (f"{{{entry('[32]', dtype='F4')}}}", {}),
    "metadata of numbers": ('{"__metadata__":{"ldm":1}}', {}), "nested deeply": ('{"a":' * 10**5, {}), "a long name": (f"{{{entry(name='x' * 10**6)}}}", {}),
    "data too long": (f"{{{entry()}}}", {"data": bytes(10**6)}), "an infinite number": ('{"a":1e999999}', {}),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(tmp_path, capsys, name):
    header, how = HEADERS[name]
    for path in (tmp_path / "x.safetensors", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        (path.parent / "config.json").write_text(BESIDE["vae/config.json"])
        safetensors(path, header, **how)
        refused(path, tmp_path, capsys)


ABOUT = {
    "lists without end": "[" * 10**5, "no JSON": "{", "a number of 100,000 digits": '{"kind": ' + "9" * 10**5 + "}", "a list": "[]", "text": '"x"',
    "null": "null", "kind of a list": '{"kind": []}', "config of a list": '{"kind": "diffusion", "config": []}', "model of text": '{"kind": "diffusion", "config": {"model": "x"}}',
    "model of a list": '{"kind": "diffusion", "config": {"model": [1]}}', "surrogates": '{"kind": "\\ud800", "config": {"model": {}}}',
    "not a number": '{"kind": NaN}',
}  # fmt: skip


@pytest.mark.parametrize("name", ABOUT)
def test_what_a_file_says_of_itself(tmp_path, capsys, name):
    save_file({"denoiser.network.conv_in.weight": WEIGHT}, tmp_path / "x.safetensors", {"ldm": ABOUT[name]})
    refused(tmp_path / "x.safetensors", tmp_path, capsys)


@pytest.mark.parametrize("about", [1, "x", [1], {"kind": WEIGHT}, {"kind": "diffusion", "config": {"model": {"x": WEIGHT}}}, {1: {}}, {"x": b"x"}, {"x": {1}}])
def test_what_a_pickle_says_of_itself(tmp_path, capsys, about):
    torch.save({"state_dict": {"a": WEIGHT}, "ldm": about, "global_step": WEIGHT}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", tmp_path, capsys)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device", "nothing", "link to nothing"])
def test_what_is_no_file(tmp_path, capsys, kind):
    path = tmp_path / "x.ckpt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "link to nothing"):
        path.symlink_to(path if kind == "loop" else tmp_path / "no")
    refused("/dev/zero" if kind == "device" else path, tmp_path, capsys)
