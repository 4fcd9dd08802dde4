"""Folders and shards of which a part is broken: it is named, left out up to a cap and counted; no worker falls over."""

import io
import json
import os
import subprocess
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from broken import broken, odd, pixels, saved
from test_webdataset import sample, write, write_members

from ldm.common.files import UserError
from ldm.data.annotations import AddClass
from ldm.data.folder import ImageFolder
from ldm.data.loader import make_loader
from ldm.data.webdataset import WebDataset

GOOD = 60


def fill(folder, files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def good(count=GOOD) -> dict[str, bytes]:
    return {f"a fox {i:03d}.png": saved(pixels(i)) for i in range(count)}


def keys(data) -> set[str]:
    return {data.key(i) for i in range(len(data))}


@pytest.mark.parametrize("name", odd())
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_odd_files_are_read(tmp_path, name, channels):
    fill(tmp_path, {name: odd()[name]})
    data = ImageFolder(str(tmp_path), size=16, channels=channels, empty_ok=True, captions="names")
    image = data[0]["image"]
    assert image.shape == (channels, 16, 16) and image.isfinite().all() and image.abs().max() <= 1 and not data.broken


@pytest.mark.parametrize("name", broken())
def test_broken_files_are_named_and_nothing_is_started(tmp_path, name, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
    fill(tmp_path, {**good(20), name: broken()[name]})
    data = ImageFolder(str(tmp_path), size=16, captions="names", empty_ok=True)
    assert list(data.broken) == [name] and f"broken images left out: 1 of 21 looked at: {name} (" in data.report()
    assert len(data) == 20 and "\n" not in data.broken[name]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_kinds_at_once(tmp_path, workers):
    fill(tmp_path, {**good(), **odd(), **broken()})
    (tmp_path / "leads nowhere.png").symlink_to(tmp_path / "gone")
    (tmp_path / "a folder.png").mkdir()
    data = ImageFolder(str(tmp_path), size=16, captions="names", max_broken=0.3)
    assert set(data.broken) == {*broken(), "leads nowhere.png"} and keys(data) == {*good(), *odd()}
    batches = list(islice(make_loader(data, 8, seed=1, workers=workers), 15))
    assert all(batch["image"].isfinite().all() for batch in batches)
    with pytest.raises(UserError, match=f"{len(broken()) + 1} of {GOOD + len(odd()) + len(broken()) + 1} images are broken, max_broken allows 5.0%"):
        ImageFolder(str(tmp_path), size=16, captions="names")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_breaks_while_it_is_trained_on(tmp_path, workers, caplog):
    fill(tmp_path, good(30))
    data = ImageFolder(str(tmp_path), size=16, captions="names")
    fill(tmp_path, dict(zip(list(good(30))[::3], broken().values(), strict=False)))
    seen = [key for batch in islice(make_loader(data, 5, seed=1, workers=workers), 12) for key in batch["key"]]
    assert len(seen) == 60 and set(seen) == set(list(good(30))) - set(list(good(30))[::3])
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError) as error:
        next(iter(make_loader(data, 5, seed=1, workers=workers)))
    assert str(error.value) == f"{tmp_path}: 10 images in a row cannot be read; is the disk still there?"


CAPTIONS = {
    "latin": "ein Füchslein".encode("latin-1"), "utf-16": "ein Füchslein".encode("utf-16"), "big utf-16": b"\xfe\xff" + "ein Füchslein".encode("utf-16-be"),
    "with a mark": b"\xef\xbb\xbfa fox", "half of utf-16": b"\xff\xfea", "binary": bytes(range(1, 256)), "long": b"fox " * 300_000, "many lines": b"a\r\nfox\r\n\r\n\tx",
    "a zero": b"a\0fox", "an emoji": "🦊".encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_in_any_encoding(tmp_path, name):
    fill(tmp_path, {"1.png": saved(pixels(1)), "1.txt": CAPTIONS[name]})
    text = ImageFolder(str(tmp_path), size=16, captions="txt")[0]["caption"]
    assert text and text == " ".join(text.split()) and text.encode("utf-8")
    assert {"latin": "ein Füchslein", "utf-16": "ein Füchslein", "big utf-16": "ein Füchslein", "with a mark": "a fox", "an emoji": "🦊",
            "many lines": "a fox x"}.get(name, text) == text  # fmt: skip


def test_images_without_a_caption_are_left_out_up_to_the_cap(tmp_path):
    files = good(40)
    texts = {name.replace(".png", ".txt"): b"a fox" for name in files}
    lacking = ["a fox 007", "a fox 031"]
    texts[f"{lacking[0]}.txt"] = b" \n\t"
    del texts[f"{lacking[1]}.txt"]
    fill(tmp_path, {**files, **texts, "of nothing.txt": b"a fox"})
    data = ImageFolder(str(tmp_path), size=16)
    assert len(data) == 38 and "images without a caption left out: 2: a fox 007.png, a fox 031.png" in data.report()
    assert "other files, not read: 1 .txt" in data.report() and keys(data) == set(files) - {f"{name}.png" for name in lacking}
    with pytest.raises(UserError, match="2 of 40 images have no caption: a fox 007.png, a fox 031.png"):
        ImageFolder(str(tmp_path), size=16, max_broken=0.04)
    assert len(ImageFolder(str(tmp_path), size=16, empty_ok=True)) == 40


def test_text_that_cannot_be_stored(tmp_path):
    """Halves of surrogate pairs, in a table and in the name of a file."""
    fill(tmp_path, {"a.png": saved(pixels(1)), "metadata.jsonl": b'{"image": "a.png", "text": "a \\ud83e fox"}\n'})
    (tmp_path / os.fsdecode(b"na\xffme.png")).write_bytes(saved(pixels(2)))
    data = ImageFolder(str(tmp_path), size=16)
    assert data[0]["caption"] == "a ? fox" and len(data) == 1 and data.report().encode("utf-8")


TABLES = {
    "csv": {"bytes": b"\xff\xfe\0\0,\0", "one column": b"file_name\na.png\n", "a quote that never ends": b'file_name,text\na.png,"fox\n', "zeros": bytes(500),
            "a huge cell": b"file_name,text\na.png," + b"x" * 200_000, "too many cells": b"file_name,text\na.png,fox,1,2\nb.png\n,\n"},
    "jsonl": {"cut off": b'{"file_name": "a.png", "te', "a list": b"[1, 2]", "a number": b"7", "deep": b"[" * 100_000, "numbers": b'{"file_name": 7, "text": 8}',
              "null": b'{"file_name": "a.png", "text": null}', "a dict": b'{"file_name": "a.png", "text": {"de": "x"}}', "nan": b'{"file_name": "a.png", "text": NaN}',
              "digits": b'{"file_name": "a.png", "text": ' + b"1" * 9000 + b"}", "up": b'{"file_name": "../../etc/passwd", "text": "x"}'},
    "parquet": {"empty": b"", "text": b"PAR1 hello PAR1", "zeros": bytes(99)},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, found in TABLES.items() for name in found])
def test_broken_tables_are_named(tmp_path, kind, name):
    """Each is refused in one line about the table, or a row of it, or about the image that then has no caption."""
    fill(tmp_path, {"a.png": saved(pixels(1)), "b.png": saved(pixels(2)), f"metadata.{kind}": TABLES[kind][name]})
    with pytest.raises(UserError) as error:
        ImageFolder(str(tmp_path), size=16)
    said = str(error.value)
    assert said.startswith(str(tmp_path)) and "\n" not in said and len(said) < 600 and (f"metadata.{kind}" in said or "b.png" in said)


def test_a_damaged_table_of_columns(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"file_name": [f"{i}.png" for i in range(300)], "text": [f"fox {i}" * 9 for i in range(300)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "metadata.parquet")
    whole = (tmp_path / "metadata.parquet").read_bytes()
    fill(tmp_path, {"1.png": saved(pixels(1))})
    source, refused = np.random.default_rng(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for place in source.integers(4, len(data), 8):
            data[place] = source.integers(256)
        (tmp_path / "metadata.parquet").write_bytes(data)
        try:
            ImageFolder(str(tmp_path), size=16, empty_ok=True)
        except UserError as error:
            refused += 1
            assert "metadata.parquet" in str(error) and "\n" not in str(error)
    assert refused > 20


def shards(folder, count=20, of=3) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        write(folder / f"set-{number:03d}.tar", [sample(of * number + i) for i in range(of)])


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def scribbled(path) -> None:
    with tarfile.open(path) as tar:
        place = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[place : place + 100] = b"x" * 100
    path.write_bytes(data)


def gone(path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("harm", [cut, scribbled, gone, lambda path: path.write_bytes(b"not a tar" * 99), lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99))])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_is_left_out_up_to_the_cap(tmp_path, harm, workers):
    shards(tmp_path / "s")
    harm(tmp_path / "s" / "set-007.tar")
    data = WebDataset(str(tmp_path / "s"), size=8)
    assert len(data) == 57 and keys(data) == {f"{i:05d}" for i in range(60) if i not in (21, 22, 23)}
    assert "1 of 20 shards are damaged and left out: " in data.report() and "set-007.tar: " in data.report()
    for batch in islice(make_loader(data, 10, seed=1, workers=workers), 12):
        assert all(text == f"caption {int(key)}" for key, text in zip(batch["key"], batch["caption"], strict=True))
    with pytest.raises(UserError, match="set-007.tar: "):
        WebDataset(str(tmp_path / "s"), size=8, max_broken=0.01)


def test_classes_beside_a_shard_that_is_left_out(tmp_path):
    (tmp_path / "s").mkdir()
    for number in range(20):
        write(tmp_path / "s" / f"{number:02d}.tar", [sample(number, cls=str(number % 3).encode())])
    cut(tmp_path / "s" / "07.tar")
    data = AddClass(WebDataset(str(tmp_path / "s"), size=8), of="cls")
    assert [data[i]["class"] for i in range(len(data))] == [i % 3 for i in range(20) if i != 7]


def test_members_that_are_odd(tmp_path):
    """Repeated names, sparse files, links, devices, captions that are no JSON and such as never end."""
    texts = [("1.json", b"{broken"), ("2.json", b'{"caption": "two"}'), ("3.json", b"\xff\xfe\0"), ("2.json", b'{"caption": "again"}')]
    images = [(f"{i}.png", saved(pixels(i))) for i in range(1, 5)]
    write_members(tmp_path / "a.tar", *images, *texts, ("2.png", saved(pixels(9))), ("4.json", b'{"caption": "' + b"x" * (2 << 20) + b'"}'))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("5.png", tarfile.SYMTYPE), ("6.png", tarfile.CHRTYPE), ("7.png", tarfile.FIFOTYPE), ("8.png", tarfile.GNUTYPE_SPARSE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
    data = WebDataset(str(tmp_path), size=8, caption_key="json", empty_ok=True)
    report = data.report()
    assert {"1", "2", "3", "4"} == keys(data) and data.caption(1) == "two"
    assert "3 captions are not JSON that can be read: " in report and "2 members left out, as their sample has an image or caption already" in report


def test_scribbles_in_a_shard(tmp_path):
    """Whatever bytes change, a shard is read, read in part with its broken images named, or refused in one line."""
    shards(tmp_path / "s", count=1, of=6)
    path = tmp_path / "s" / "set-000.tar"
    whole, source = path.read_bytes(), np.random.default_rng(1)
    for _ in range(80):
        data = bytearray(whole)
        for place in source.integers(0, len(data), 6):
            data[place] = source.integers(256)
        path.write_bytes(data[: source.integers(1, len(data))] if source.random() < 0.3 else data)
        try:
            found = WebDataset(str(tmp_path / "s"), size=8, max_broken=0.99, empty_ok=True)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert found[0]["image"].isfinite().all() and found.report().encode("utf-8")


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_files_of_which_one_in_twenty_is_broken(tmp_path, monkeypatch, capsys, kind, workers):
    """It completes, and names exactly those."""
    from main import main

    bad = dict(zip([f"a fox {i:03d}.png" for i in (3, 21, 40)], [broken()[name] for name in ("half.png", "empty.png", "bomb.png")], strict=True))
    files = {**good(60), **bad}
    if kind == "folder":
        fill(tmp_path / "pictures", files)
        block = "{target: ldm.data.folder.ImageFolder, params: {root: %s, size: 16}}" % (tmp_path / "pictures")
    else:
        members = [(name.replace(" ", ""), data) for name, data in files.items()] + [(name.replace(" ", "")[:-3] + "txt", b"a fox") for name in files]
        write_members(tmp_path / "a.tar", *members)
        block = "{target: ldm.data.webdataset.WebDataset, params: {shards: %s, size: 16}}" % (tmp_path / "a.tar")
    argv = ["-b", "configs/tiny/autoencoder_kl.yaml", "-t", "--no-test", "-l", str(tmp_path / "logs"), f"data={{train: {block}}}", "trainer.max_steps=8", f"loader.workers={workers}"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "logs").glob("tiny_autoencoder_kl-*")
    assert json.loads((folder / "DONE").read_text())["steps"] == 8 and "Traceback" not in err
    (line,) = [line for line in out.splitlines() if "broken images left out" in line]
    named = [name for name in files if name.replace(" ", "").removesuffix(".png") in line.replace(" ", "")]
    assert "broken images left out: 3 of 60 looked at: " in line and named == list(bad)


def test_positions_are_whole_batches(tmp_path):
    fill(tmp_path, {**good(7), "half.png": broken()["half.png"]})
    data = ImageFolder(str(tmp_path), size=16, captions="names", max_broken=0.2)
    batch = next(iter(make_loader(data, 7, seed=0)))
    assert sorted(batch["key"]) == list(good(7)) and torch.equal(batch["position"], torch.arange(7))
