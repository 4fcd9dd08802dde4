import hashlib
import io
import pickle
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from ldm.common.files import UserError
from ldm.data.loader import make_loader
from ldm.data.webdataset import WebDataset, expand, find_shards, split_name


def picture(seed: int, kind: str = "PNG", side: int = 24) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def sample(number: int, **members) -> dict:
    return {"__key__": f"{number:05d}", "png": picture(number), "txt": f"caption {number}", **members}


def write(path, samples) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for one in samples:
            tar.write(
                {
                    name: value.encode() if isinstance(value, str) and name != "__key__" else value
                    for name, value in one.items()
                }
            )


def write_members(path, *members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three shards of five, four and three samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (first, last) in enumerate([(0, 5), (5, 9), (9, 12)]):
        write(folder / f"set-{number:03d}.tar", [sample(i) for i in range(first, last)])
    return folder


def test_agrees_with_the_webdataset_library(shards):
    theirs = list(
        webdataset.WebDataset([str(path) for path in sorted(shards.iterdir())], shardshuffle=False, empty_check=False)
    )
    ours = WebDataset(str(shards), size=24)
    assert len(ours) == len(theirs) == 12 and ours.channels == 3
    for i, one in enumerate(theirs):
        item = ours[i]
        assert item["key"] == one["__key__"] and item["caption"] == one["txt"].decode() == ours.caption(i)
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(one["png"])))).permute(2, 0, 1)
        assert torch.equal(item["image"], pixels / 127.5 - 1)
        assert ours.identity(i) == hashlib.sha256(one["png"]).hexdigest()


@pytest.mark.parametrize("name", ["a/0001.jpg", "0001.seg.PNG", "a.b/c.txt", "readme", ".hidden.png", "a/.x.jpg", "x."])
def test_names_are_split_as_the_library_does(name):
    key, ending = webdataset.tariterators.base_plus_ext(name)
    assert split_name(name) == (key, ending and ending.lower() if key else None)


def test_patterns(shards):
    names = [f"set-{i:03d}.tar" for i in range(3)]
    for pattern in (
        "",
        "/*.tar",
        "/set-{000..002}.tar",
        "/set-00{0,1,2}.tar",
        "/set-{000,00{1..2}}.tar",
        "/{set-000,set-00?}.tar",
    ):
        assert [path.name for path in find_shards(f"{shards}{pattern}")] == names
    assert [path.name for path in find_shards(f"{shards}/set-001.tar")] == ["set-001.tar"]
    assert expand("a{8..11}{x,y}") == [f"a{i}{c}" for i in (8, 9, 10, 11) for c in "xy"]
    assert expand("a{008..010}b") == ["a008b", "a009b", "a010b"]


@pytest.mark.parametrize(
    ("shards_given", "message"),
    [
        ("https://host/{0..9}.tar", "only files on a local disk"),
        ("pipe:aws s3 cp x -", "only files on a local disk"),
        ("{root}/shards/set-{000..003}.tar", "set-003.tar: no such file; nearest: set-"),
        ("{root}/shards/*.zip", "no such file; the folder has set-000.tar"),
        ("{root}/shard", "no such file"),
        ("{root}/shard/*.tar", "no such folder; nearest: .*/shards"),
        ("{root}/none", "no .tar file in this folder"),
    ],
)
def test_wrong_places(shards, shards_given, message):
    (shards.parent / "none").mkdir()
    with pytest.raises(UserError, match=message):
        WebDataset(shards_given.replace("{root}", str(shards.parent)), size=8)


def test_caption_members(shards):
    write(shards.parent / "json.tar", [sample(1, json='{"url": "x", "caption": "from json"}')])
    path = str(shards.parent / "json.tar")
    assert WebDataset(path, size=8).caption(0) == "caption 1"
    assert WebDataset(path, size=8, caption_key="json").caption(0) == "from json"
    with pytest.raises(UserError, match="caption_key: no .cap in the shards; they hold 1 .json, 1 .png, 1 .txt"):
        WebDataset(path, size=8, caption_key="cap")
    write(shards.parent / "json.tar", [sample(1, json='{"url": "x"}')])
    with pytest.raises(
        UserError, match="json.tar: 00001.json: no key is the caption's; found: url; known: caption, text, prompt"
    ):
        WebDataset(path, size=8, caption_key="json")


def test_missing_captions(tmp_path):
    samples = [sample(i) for i in range(9)]
    for one in samples[2:]:
        del one["txt"]
    write(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match="7 of 9 images have no caption: 00002, .*00006 and 2 more"):
        WebDataset(str(tmp_path), size=8)
    data = WebDataset(str(tmp_path), size=8, empty_ok=True)
    assert "9 images, 2 captions, 7 missing" in data.report() and data[8]["caption"] == ""


def test_oddities_are_reported(tmp_path):
    members = [("1.png", picture(1)), ("1.txt", "café".encode("latin-1")), ("1.txt", b"again"), ("2.txt", b"no image"),
               ("3.PNG", picture(3)), ("3.Txt", b" three\n lines"), ("readme", b"x")]  # fmt: skip
    write_members(tmp_path / "a.tar", *members)
    write_members(tmp_path / "b.tar", ("1.jpg", picture(4, "JPEG")), ("1.txt", b"other"))
    data = WebDataset(str(tmp_path), size=8)
    assert [data[i]["key"] for i in range(3)] == ["a/1", "3", "b/1"]
    assert [data.caption(i) for i in range(3)] == ["café", "three lines", "other"]
    for line in (
        "1 names are in several shards",
        "1 members left out, as their sample has an image or caption already: 1.txt",
        "1 captions without an image: 2",
        "1 captions are not UTF-8 and were read as Latin-1: ",
    ):
        assert line in data.report()


def test_shards_of_one_name_in_two_folders(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "0.tar", [sample(1)])
    data = WebDataset(f"{tmp_path}/{{x,y}}/0.tar", size=8)
    assert [data[i]["key"] for i in range(2)] == ["x/0/00001", "y/0/00001"]


def test_broken_images(tmp_path):
    write(tmp_path / "a.tar", [sample(i) if i != 3 else sample(i, png=picture(3)[:500]) for i in range(30)])
    data = WebDataset(str(tmp_path), size=8)
    assert len(data) == 29 and [data[i]["key"] for i in (2, 3)] == ["00002", "00004"]
    assert "broken images left out: 1 of 30 looked at: 00003 (" in data.report()
    with pytest.raises(UserError, match="1 of 30 images are broken"):
        WebDataset(str(tmp_path), size=8, max_broken=0.0)


@pytest.mark.parametrize("tail", [700, 1500, 2100, 4000])
def test_cut_off_shards_are_refused(shards, tail):
    path = shards / "set-001.tar"
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[:-tail])
    with pytest.raises(UserError, match="set-001.tar: .*copy it again"):
        WebDataset(str(shards), size=8)


def test_damage_in_the_middle_is_refused(shards):
    path = shards / "set-001.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    data[offset : offset + 100] = b"x" * 100
    path.write_bytes(data)
    with pytest.raises(UserError, match="set-001.tar: damaged or cut off after 2 images"):
        WebDataset(str(shards), size=8)


@pytest.mark.parametrize(("compression", "name"), [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_compressed_shards_are_refused(tmp_path, compression, name):
    with tarfile.open(tmp_path / "a.tar", f"w:{compression}") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(UserError, match=f"a.tar: compressed with {name}.*unpack"):
        WebDataset(str(tmp_path), size=8)


def test_shards_without_images(tmp_path):
    write_members(tmp_path / "a.tar", ("1.cls", b"x"), ("1.txt", b"x"))
    with pytest.raises(UserError, match="no image in 1 shards; they hold 1 .cls, 1 .txt"):
        WebDataset(str(tmp_path), size=8)
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="a.tar: not a whole tar file"):
        WebDataset(str(tmp_path), size=8)


def test_split_and_flip(shards):
    parts = [WebDataset(str(shards), 8, split=split, validation_share=0.4) for split in ("train", "validation")]
    keys = [{part[i]["key"] for i in range(len(part))} for part in parts]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 12
    assert len(WebDataset(str(shards), 8, flip=True)) == 24


def test_fingerprint_tells_contents_and_not_places(shards):
    first = WebDataset(str(shards), 8).fingerprint
    shards.rename(shards.parent / "moved")
    assert (
        WebDataset(str(shards.parent / "moved"), 8).fingerprint
        == first
        != WebDataset(str(shards.parent / "moved"), 16).fingerprint
    )
    write(shards.parent / "moved" / "set-002.tar", [sample(i, txt="other") for i in range(9, 12)])
    assert WebDataset(str(shards.parent / "moved"), 8).fingerprint != first


def test_with_workers_and_pickle(shards):
    data = pickle.loads(pickle.dumps(WebDataset(str(shards), size=8)))
    alone, apart = ([batch["image"] for batch in islice(make_loader(data, 5, seed=1, workers=w), 6)] for w in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, apart, strict=True))
