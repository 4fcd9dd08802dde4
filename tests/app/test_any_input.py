"""Whatever is given, what a person sees is an answer or one line about a mistake: property tests of all that reads what others
wrote. Each finds its way to the command or function that people reach."""

import io
import json
import os
import string
import struct

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.__main__ import main as tool
from ldm.app import png
from ldm.app.again import is_drawn, schema
from ldm.app.stages import mistakes_in as more_mistakes
from ldm.app.stages import read
from ldm.common.build import check_call
from ldm.common.config import check_config
from ldm.common.files import UserError
from ldm.data.captions import from_texts, rows
from ldm.data.folder import ImageFolder
from ldm.data.transforms import BrokenImage, prepare

FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WORDS = st.sampled_from(["target", "params", "name", "ldm.lit.DiffusionModule", "ldm.networks.unet.UNet", "ldm.process.DDPM", "steps", "scale", "lr", "optimizer", "???",
                         "${model}", "${oc.env:HOME}", "network", "process", "conditioner", "train", "validation", "max_steps", "sampler", "times", "guidance", "os.system"])
TEXT = st.one_of(st.text(max_size=12), WORDS)
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
TREE = st.recursive(LEAF, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8)
TOP = ("name", "seed", "model", "data", "autoencoder", "loader", "cache", "sampling", "validation", "logging", "checkpoint", "trainer", "init_from")
CONFIG = yaml.safe_load(open(os.path.join(os.path.dirname(__file__), "../../configs/tiny/class_conditional.yaml")))


def places(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from places(item, (*path, key))


def placed(config, path, value):
    return value if not path else {**config, path[0]: placed(config[path[0]], path[1:], value)}


def one_line(error) -> None:
    assert str(error) and "\n" not in str(error) and "Traceback" not in str(error)


@FEW
@given(st.dictionaries(st.one_of(st.sampled_from(TOP), TEXT), TREE, max_size=6))
def test_any_config(config):
    assert all(isinstance(line, str) and line for line in [*check_config(config), *more_mistakes(config)])


@settings(FEW, max_examples=100)
@given(st.sampled_from([path for path in places(CONFIG) if path]), TREE)
def test_any_value_anywhere_in_a_config(path, value):
    config = placed(CONFIG, path, value)
    assert all(isinstance(line, str) and line for line in [*check_config(config), *more_mistakes(config)])


@FEW
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), TREE.map(lambda tree: yaml.safe_dump(tree).encode())))
def test_any_bytes_as_a_config(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x.yaml"
    path.write_bytes(data)
    try:
        stages, mistakes = read([path])
    except UserError as error:
        one_line(error)
    else:
        assert mistakes


@FEW
@given(st.lists(st.text(string.printable, max_size=20), max_size=3))
def test_any_arguments_as_changes(overrides):
    try:
        stages, mistakes = read([os.path.join(os.path.dirname(__file__), "../../configs/tiny/autoencoder_kl.yaml")], overrides)
    except UserError as error:
        assert str(error)
    else:
        assert stages and all(mistakes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(root / name)
    return root


TABLES = st.one_of(
    st.binary(max_size=80), st.lists(TREE, max_size=3).map(lambda items: "\n".join(map(json.dumps, items)).encode()),
    st.lists(st.dictionaries(st.sampled_from(["file_name", "text", "image", "caption", "x"]), st.one_of(st.just("a.png"), LEAF), max_size=3), max_size=3).map(
        lambda items: "\n".join(map(json.dumps, items)).encode()))


@settings(FEW, max_examples=80)
@given(data=TABLES, kind=st.sampled_from(["jsonl", "csv", "parquet"]))
def test_any_bytes_as_a_table_of_captions(pictures, data, kind):
    path = pictures / f"metadata.{kind}"
    path.write_bytes(data)
    try:
        assert all(isinstance(text, str) for row in rows(path, []) for text in row)
        found = ImageFolder(str(pictures), size=4, empty_ok=True)
        assert all(found.caption(i).encode("utf-8") is not None for i in range(2))
    except UserError as error:
        one_line(error)
    finally:
        path.unlink()


@FEW
@given(data=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: text.encode("utf-16"))))
def test_any_bytes_as_a_caption(pictures, data):
    (pictures / "a.txt").write_bytes(data)
    found = from_texts(pictures, ["a.png"], ["a.txt"], [])
    (pictures / "a.txt").unlink()
    assert all(text == " ".join(text.split()) != "" for text in found.values())


@settings(FEW, max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA"]), st.lists(st.tuples(st.integers(0), st.binary(max_size=9)), max_size=4), st.floats(0, 1))
def test_any_harm_to_a_picture(kind, changes, share):
    file = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(file, kind)
    data = bytearray(file.getvalue())
    for place, change in changes:
        start = place % len(data)
        data[start : start + len(change)] = change
    try:
        image = prepare(bytes(data[: int(share * len(data)) or None]), 8)
    except BrokenImage as error:
        assert str(error)
    else:
        assert image.shape == (3, 8, 8) and image.isfinite().all()


def shown(capsys, *command) -> str:
    """An answer, or one line about a mistake."""
    status, (out, err) = tool(list(map(str, command))), capsys.readouterr()
    assert status == 0 or (status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err), err
    return out


@FEW
@given(text=st.one_of(st.text(max_size=60), TREE.map(json.dumps)), changes=st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=4)), max_size=2))
def test_any_metadata_of_a_png(tmp_path_factory, capsys, text, changes):
    info, path = PngInfo(), tmp_path_factory.mktemp("any") / "x.png"
    info.add_itxt("ldm", text.encode("utf-8", "replace").decode())
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    data = bytearray(path.read_bytes())
    for place, change in changes:
        start = place % len(data)
        data[start : start + len(change)] = change
    path.write_bytes(data)
    shown(capsys, "info", path)


ABOUT = {"seed": 3, "size": [32, 32], "steps": 2, "scale": 2.0, "sampler": "ddim", "times": "linear", "tile": None, "guidance": {"scale": 2.0, "low": 0.1}, "expand": [0, 0, 0, 0],
         "conditions": {"class": 3}, "inputs": {}, "precision": "fp32", "lora": [], "classifier": {"path": "x", "sha256": "y", "scale": 1.0}}


@settings(FEW, max_examples=100)
@given(st.sampled_from([path for path in places(ABOUT) if path]), TREE)
def test_any_value_in_what_a_picture_says_of_itself(path, value):
    """Where it is taken for a drawn picture's, all that is used of it is of the right form, or told."""
    about = placed(ABOUT, path, json.loads(json.dumps(value)))
    known = {key: value for key, value in about.items() if key in ABOUT and key not in ("conditions", "inputs")}
    if is_drawn(about) and not check_call(schema, known, ""):
        assert type(about["seed"]) is int and all(type(side) is int and side > 0 for side in about["size"])
        assert about["tile"] is None or about["tile"] > 0
        assert isinstance((about["guidance"] or {"scale": 1})["scale"], int | float | None)
        assert all(isinstance(file["path"], str) for file in about["inputs"].values())


HEADER = st.one_of(st.binary(max_size=60), TREE.map(lambda tree: json.dumps(tree).encode()), st.dictionaries(TEXT, st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "F4", "?"]), "shape": st.lists(st.integers(-1, 2**64), max_size=3),
    "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3)}), max_size=3).map(lambda tree: json.dumps(tree).encode()))


@FEW
@given(header=HEADER, length=st.one_of(st.none(), st.integers(0, 2**64 - 1)), data=st.binary(max_size=40))
def test_any_safetensors(tmp_path_factory, capsys, header, length, data):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    shown(capsys, "info", path)


@FEW
@given(about=TREE)
def test_anything_that_a_safetensors_says_of_itself(tmp_path_factory, capsys, about):
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    save_file({"denoiser.network.conv_in.weight": torch.zeros(2)}, path, {"ldm": json.dumps(about)})
    shown(capsys, "info", path)


@FEW
@given(data=st.binary(max_size=200), name=st.sampled_from(["x.ckpt", "x.png", "x.yaml", "x.pt", "x.bin", "x"]))
def test_any_bytes_as_a_file(tmp_path_factory, capsys, data, name):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    shown(capsys, "info", path)
    if png.is_png(path):
        with pytest.raises(UserError):
            png.read(path)
