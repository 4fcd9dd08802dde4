import hashlib
import io
import json
import logging
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.common.files import UserError
from ldm.data.captions import from_name
from ldm.data.folder import ImageFolder
from ldm.data.loader import make_loader
from ldm.data.pictures import fraction

NAMES = ["a_red_fox-003.png", "blue bird.jpg", "deep/er/green-frog (2).webp", "deep/yellow_cat.png"]


def picture(seed: int, kind: str = "PNG", side: int = 24) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """Four images with no captions but their names."""
    folder = tmp_path / "foxes"
    for number, name in enumerate(NAMES):
        write(folder, name, picture(number, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.split(".")[-1]]))
    return folder


def write(root, name, content) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def many(root, n: int, broken=()) -> None:
    for i in range(n):
        data = picture(i)
        write(root, f"fox {i:03d}.png", data[: len(data) // 2] if i in broken else data)


def captions(data) -> dict[str, str]:
    return {data[i]["key"]: data[i]["caption"] for i in range(len(data))}


def test_items(root):
    data = ImageFolder(str(root), size=16)
    assert len(data) == 4 and data.channels == 3
    for i, name in enumerate(sorted(NAMES)):
        item = data[i]
        assert set(item) == {"image", "caption", "key"} and item["key"] == name
        assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
        assert item["image"].abs().max() <= 1 and item["caption"] == data.caption(i)
        assert type(item["caption"]) is type(item["key"]) is str
        assert data.identity(i) == hashlib.sha256((root / name).read_bytes()).hexdigest()
    with pytest.raises(IndexError):
        data[4]


def test_names(root):
    data = ImageFolder(str(root), size=16)
    assert captions(data) == dict(zip(NAMES, ["a red fox", "blue bird", "green frog", "yellow cat"], strict=True))
    assert "4 images, 4 captions, 0 missing" in data.report() and "file names" in data.report()
    assert from_name("x/00012.png") == "" and from_name("t-rex_07.png") == "t rex"


TABLE = [(name, f"caption, number {i}") for i, name in enumerate(NAMES)]


def write_table(
    root, kind: str, image: str = "file_name", caption: str = "text", rows=TABLE, stem: str = "metadata"
) -> None:
    if kind == "jsonl":
        write(
            root, f"{stem}.jsonl", "\n".join(json.dumps({image: a, "other": 1, caption: b}) for a, b in rows) + "\n\n"
        )
    elif kind == "csv":
        write(root, f"{stem}.csv", f"{image},other,{caption}\r\n" + "".join(f'"{a}",1,"{b}"\r\n' for a, b in rows))
    elif kind == "parquet":
        import pandas

        pandas.DataFrame({image: [a for a, _ in rows], "other": 1, caption: [b for _, b in rows]}).to_parquet(
            root / f"{stem}.parquet"
        )
    else:
        for a, b in rows:
            write(root, a.rsplit(".", 1)[0] + ".txt", b + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_layouts_are_found(root, kind):
    write_table(root, kind)
    for wanted in ("auto", kind):
        data = ImageFolder(str(root), size=16, captions=wanted)
        assert captions(data) == dict(TABLE)
        assert ("metadata." + kind if kind != "txt" else ".txt files") in data.report()


@pytest.mark.parametrize("stem", ["metadata", "captions"])
@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("path", "prompt"), ("filename", "text")])
def test_column_names(root, image, caption, stem):
    write_table(root, "csv", image, caption, stem=stem)
    assert captions(ImageFolder(str(root), size=16)) == dict(TABLE)


def test_order_of_layouts(root):
    for kind in ("names", "txt", "parquet", "csv", "jsonl"):
        if kind != "names":
            write_table(root, kind, rows=[(name, kind) for name in NAMES])
            assert set(captions(ImageFolder(str(root), size=16)).values()) == {kind}
    assert "other files, not read: 4 .txt, 1 .csv, 1 .parquet" in ImageFolder(str(root), size=16).report()


def test_table_in_a_subfolder_names_the_images_there(tmp_path):
    for name in ("train/a.png", "train/b.png"):
        write(tmp_path, name, picture(1))
    write(
        tmp_path, "train/metadata.jsonl", '{"file_name": "a.png", "text": "A"}\n{"file_name": "./b.png", "text": "B"}'
    )
    assert captions(ImageFolder(str(tmp_path), size=16)) == {"train/a.png": "A", "train/b.png": "B"}


def test_wrong_columns_are_named(root):
    write_table(root, "csv", "picture", "words")
    with pytest.raises(
        UserError, match="metadata.csv:2: .*found: picture, other, words; known: image, file_name.*caption, text"
    ):
        ImageFolder(str(root), size=16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"image": "a.png", "text": "x"}\n{"image": ', "metadata.jsonl:2: not JSON"),
        ("metadata.jsonl", "[1]", "metadata.jsonl:1: list found"),
        ("metadata.jsonl", '{"image": "a.png", "text": ["x"]}', "column 'text' holds list"),
        (
            "metadata.jsonl",
            '{"image": "fox.png", "text": "x"}',
            "none of its 1 rows names an image.*'fox.png'.*'a_red_fox-003.png'",
        ),
        ("metadata.jsonl", "", "none of its 0 rows"),
        ("metadata.parquet", "no", "not a Parquet file"),
    ],
)
def test_bad_tables(root, name, content, message):
    write(root, name, content)
    with pytest.raises(UserError, match=message):
        ImageFolder(str(root), size=16)


def test_layout_that_is_not_there(root):
    write_table(root, "csv")
    with pytest.raises(
        UserError,
        match="captions: jsonl was asked for.*no metadata.jsonl nor captions.jsonl; the folder has metadata.csv",
    ):
        ImageFolder(str(root), size=16, captions="jsonl")
    with pytest.raises(UserError, match="no image has a .txt file beside it"):
        ImageFolder(str(root), size=16, captions="txt")


def test_mistyped_table_is_pointed_out(root):
    write(root, "metadata.json1", "")
    assert (
        "metadata.json1 is not a known name and was not read; did you mean metadata.jsonl?"
        in ImageFolder(str(root), 16).report()
    )


def test_missing_captions(tmp_path):
    many(tmp_path, 9)
    for i in range(2):
        write(tmp_path, f"fox {i:03d}.txt", "a fox")
    write(tmp_path, "fox 002.txt", " \n")
    with pytest.raises(
        UserError, match="7 of 9 images have no caption: fox 002.png, .*fox 006.png and 2 more.*empty_ok"
    ):
        ImageFolder(str(tmp_path), size=16)
    data = ImageFolder(str(tmp_path), size=16, empty_ok=True)
    assert "9 images, 2 captions, 7 missing" in data.report() and "empty captions: fox 002.png" in data.report()
    assert data[0]["caption"] == "a fox" and data[8]["caption"] == ""


def test_rows_without_image_and_images_with_several_rows_are_reported(root):
    write_table(root, "jsonl", rows=[*TABLE, ("gone.png", "x"), (NAMES[0], "another")])
    data = ImageFolder(str(root), size=16)
    assert "1 rows name images that are not there: gone.png" in data.report()
    assert "1 images have several captions; the first is used: a_red_fox" in data.report()
    assert captions(data) == dict(TABLE)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(root, encoding):
    for name in NAMES:
        write(root, name.rsplit(".", 1)[0] + ".txt", "a café".encode(encoding))
    data = ImageFolder(str(root), size=16)
    assert set(captions(data).values()) == {"a café"}
    assert ("4 caption files are not UTF-8 and were read as Latin-1" in data.report()) == (encoding == "latin-1")


def test_byte_order_mark_is_no_part_of_a_column(root):
    write_table(root, "csv")
    write(root, "metadata.csv", b"\xef\xbb\xbf" + (root / "metadata.csv").read_bytes())
    assert captions(ImageFolder(str(root), size=16)) == dict(TABLE)


def test_broken_images_are_left_out_and_listed(tmp_path, caplog):
    many(tmp_path, 40, broken=[7])
    data = ImageFolder(str(tmp_path), size=16)
    assert len(data) == 39 and "fox 007.png" not in captions(data)
    assert "broken images left out: 1 of 40 looked at: fox 007.png (" in data.report() and "truncated" in data.report()
    assert "39 images, 39 captions" in data.report()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "fox 007.png" in caplog.text


def test_too_many_broken_images(tmp_path):
    many(tmp_path, 10, broken=range(5))
    with pytest.raises(UserError, match="5 of 10 images are broken, max_broken allows 5.0%: fox 000.png .*fox 004.png"):
        ImageFolder(str(tmp_path), size=16)
    assert len(ImageFolder(str(tmp_path), size=16, max_broken=0.5)) == 5
    many(tmp_path, 10, broken=range(10))
    with pytest.raises(UserError, match="10 of 10 images are broken"):
        ImageFolder(str(tmp_path), size=16, max_broken=1.0)


def test_image_that_breaks_during_training_is_replaced(tmp_path, caplog):
    many(tmp_path, 6)
    data = ImageFolder(str(tmp_path), size=16)
    whole = [data[i] for i in range(6)]
    write(tmp_path, "fox 002.png", b"junk")
    (tmp_path / "fox 005.png").unlink()
    assert torch.equal(data[2]["image"], whole[3]["image"]) and data[2]["key"] == "fox 003.png"
    assert data[5]["key"] == "fox 000.png"
    assert "fox 002.png cannot be read (not an image" in caplog.text
    for i in range(6):
        (tmp_path / f"fox {i:03d}.png").unlink(missing_ok=True)
    with pytest.raises(UserError, match="10 images in a row"):
        data[0]


def test_sample_scan_looks_at_few(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.pictures.SAMPLE", 5)
    many(tmp_path, 20, broken=[1, 4])  # 0, 4, 8, 12, 16 are looked at
    with pytest.raises(UserError, match="1 of 5"):
        ImageFolder(str(tmp_path), size=16, scan="sample")
    data = ImageFolder(str(tmp_path), size=16, scan="sample", max_broken=0.2)
    assert len(data) == 19 and data[1]["key"] == "fox 002.png"
    assert len(data.fingerprint) == 16 and data.identity(0) == hashlib.sha256(picture(0)).hexdigest()


def test_small_images_are_reported(root):
    assert "4 images are smaller than 64 pixels" in ImageFolder(str(root), size=64).report()


def test_flip_doubles(root):
    plain, both = ImageFolder(str(root), size=16), ImageFolder(str(root), size=16, flip=True)
    assert len(both) == 8 and len({both.identity(i) for i in range(8)}) == len({both[i]["key"] for i in range(8)}) == 8
    for i in range(4):
        assert torch.equal(both[i]["image"], plain[i]["image"]) and torch.equal(
            both[i + 4]["image"], plain[i]["image"].flip(-1)
        )
        assert both.caption(i + 4) == plain.caption(i) and both.identity(i) == plain.identity(i)


def test_grey(root):
    data = ImageFolder(str(root), size=16, channels=1)
    assert data.channels == 1 and data[0]["image"].shape == (1, 16, 16)


def test_split_is_by_name_and_stable(tmp_path):
    many(tmp_path, 60)
    names = ("train", "validation")
    parts = {part: captions(ImageFolder(str(tmp_path), 16, split=part, validation_share=0.2)) for part in names}
    parts["all"] = captions(ImageFolder(str(tmp_path), 16))
    assert parts["train"].keys() | parts["validation"].keys() == parts["all"].keys()
    assert not parts["train"].keys() & parts["validation"].keys()
    assert set(parts["validation"]) == {f"fox {i:03d}.png" for i in range(60) if fraction(f"fox {i:03d}.png") < 0.2}
    assert 3 <= len(parts["validation"]) <= 21  # 12 +- 3 standard deviations
    many(tmp_path, 90)
    assert (
        parts["validation"].keys()
        <= captions(ImageFolder(str(tmp_path), 16, split="validation", validation_share=0.2)).keys()
    )


def test_fraction_is_uniform():
    values = np.sort([fraction(f"{i}.png") for i in range(2000)])
    assert np.abs(values - np.linspace(0, 1, 2000)).max() < 0.04  # Kolmogorov-Smirnov, p about 0.003


def test_empty_split(root):
    with pytest.raises(
        UserError, match="no image is in the validation split: validation_share is 0.0 of 4 images; give a larger"
    ):
        ImageFolder(str(root), size=16, split="validation")
    with pytest.raises(UserError, match="validation_share: 0.5 says nothing with split: all"):
        ImageFolder(str(root), size=16, validation_share=0.5)
    with pytest.raises(UserError, match="validation_share: 1.5"):
        ImageFolder(str(root), size=16, split="train", validation_share=1.5)


def test_fingerprint(root, tmp_path):
    def fingerprint(**options):
        return ImageFolder(**{"root": str(root), "size": 16, **options}).fingerprint

    first = fingerprint()
    root.rename(tmp_path / "elsewhere")
    assert fingerprint(root=str(tmp_path / "elsewhere")) == first
    (tmp_path / "elsewhere").rename(root)
    variants = [
        fingerprint(size=8),
        fingerprint(flip=True),
        fingerprint(channels=1),
        fingerprint(split="train", validation_share=0.5),
    ]
    write_table(root, "csv")
    variants.append(fingerprint())
    write(root, NAMES[0], picture(99))
    variants.append(fingerprint())
    assert len({first, *variants}) == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("foxs", "no such folder; nearest: .*/foxes"),
        ("qqq/zzz", "no such folder; there is no 'qqq'"),
        ("foxes/blue bird.jpg", "this is a file"),
        ("empty", "no image in this folder or below it, 1 other files"),
        ("shards", "ldm.data.webdataset.WebDataset"),
    ],
)
def test_wrong_folders(root, given, message):
    write(root.parent, "empty/readme.md", "")
    write(root.parent, "shards/0.tar", "")
    with pytest.raises(UserError, match=message):
        ImageFolder(str(root.parent / given), size=16)


def test_hidden_files_and_circular_links_are_passed_over(root):
    write(root, "._a_red_fox.png", b"mac")
    write(root, ".cache/x.png", picture(1))
    (root / "deep" / "up").symlink_to(root)
    assert len(ImageFolder(str(root), size=16)) == 4


def test_with_workers_and_pickle(root):
    data = ImageFolder(str(root), size=16)
    alone = [batch["image"] for batch in islice(make_loader(data, 3, seed=1), 4)]
    apart = [batch["image"] for batch in islice(make_loader(pickle.loads(pickle.dumps(data)), 3, seed=1, workers=2), 4)]
    assert all(torch.equal(a, b) for a, b in zip(alone, apart, strict=True))
