"""What is added to items, from tables, folder names and shards, on pictures with another shape than the square that is shown."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.common.files import UserError
from ldm.data.annotations import AddClass, AddNumbers, AddSizes
from ldm.data.boxes import AddBoxes, cropped, padded
from ldm.data.folder import ImageFolder
from ldm.data.loader import make_loader
from ldm.data.maps import AddMap, class_map
from ldm.data.shapes import Shapes
from ldm.data.webdataset import WebDataset

NAMES = ["cats/a.png", "cats/b.png", "dogs/c.png"]
SIZE = {"cats/a.png": (40, 20), "cats/b.png": (20, 40), "dogs/c.png": (24, 24)}  # width, height


def picture(width, height, seed=0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "animals"
    rows = [{"file_name": name, "caption": name, "label": name[5:6], "score": n + 0.5, "objects": [
        {"box": [0, 0, 20, 10], "class": "ear"}, {"box": [10, 5, 30, 15], "class": "nose"}]} for n, name in enumerate(NAMES)]  # fmt: skip
    for n, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(*SIZE[name], seed=n))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def images(root, **more):
    return ImageFolder(str(root), size=8, **more)


def test_classes_are_folders_or_columns(root):
    by_folder = AddClass(images(root), of="folder")
    assert [by_folder[i]["class"] for i in range(3)] == [0, 0, 1] and by_folder.names == ["cats", "dogs"]
    assert "class: 2 of 2: cats (2), dogs (1)" in by_folder.report()
    by_column = AddClass(images(root), column="label", names=["c", "b", "a"])
    assert [by_column[i]["class"] for i in range(3)] == [2, 1, 0]
    assert by_column[1]["caption"] == "cats/b.png" and by_column[1]["image"].shape == (3, 8, 8)
    assert by_column.caption(2) == "dogs/c.png" and len(by_column) == 3 and by_column.size == 8


def test_classes_may_be_numbers_in_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            for ending, data in (("png", picture(8, 8, n)), ("txt", b"x"), ("cls", str(10 * n).encode())):
                member = tarfile.TarInfo(f"{n:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = AddClass(WebDataset(str(tmp_path), size=8), of="cls")
    assert [data[i]["class"] for i in range(3)] == [0, 10, 20] and len(data.names) == 21
    with pytest.raises(UserError, match="no .json in the shards; they hold .cls, .png, .txt"):
        AddClass(WebDataset(str(tmp_path), size=8), of="json")


def test_two_shards_may_use_the_same_names(tmp_path):
    for shard in ("a", "b"):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for ending, data in (("png", picture(8, 8)), ("txt", b"x"), ("cls", shard.encode())):
                member = tarfile.TarInfo(f"1.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    data = AddClass(WebDataset(str(tmp_path), size=8), of="cls")
    assert [(data[i]["key"], data[i]["class"]) for i in range(2)] == [("a/1", 0), ("b/1", 1)]


def test_numbers_of_a_table(root):
    data = AddNumbers(images(root), {"aesthetic": "score", "pair": ["score", "score"]})
    assert data[1]["aesthetic"].item() == 1.5 and data[2]["pair"].tolist() == [2.5, 2.5]


def test_sizes_as_sdxl_is_told_them(root):
    data = AddSizes(images(root))
    wide, tall = data[0], data[1]
    assert wide["original_size"].tolist() == [20, 40] and wide["target_size"].tolist() == [8, 8]
    assert wide["crop"].tolist() == [0, 4]  # 40 x 20 becomes 16 x 8, of which columns 4 to 12 stay
    assert tall["crop"].tolist() == [4, 0] and data[2]["crop"].tolist() == [0, 0]
    assert AddSizes(Shapes(count=1))[0]["original_size"].tolist() == [64, 64]


def test_boxes_follow_the_crop_and_the_mirror(root):
    data = AddBoxes(images(root, flip=True), objects=3, names=["ear", "nose"])
    wide, mirrored = data[0], data[3]
    assert wide["boxes"][0].tolist() == [0.0, 0.0, 0.5, 0.5] and wide["boxes"][1].tolist() == [0.0, 0.25, 1.0, 0.75]
    assert wide["box_classes"].tolist() == [0, 1, -1] and not wide["boxes"][2].any()
    assert mirrored["boxes"][0].tolist() == [0.5, 0.0, 1.0, 0.5] and mirrored["key"].endswith("|mirrored")
    tall = data[1]  # the square begins 10 pixels down: nothing of the first box is seen
    assert tall["box_classes"].tolist() == [1, -1, -1] and tall["boxes"][0].tolist() == [0.5, 0.0, 1.0, 0.25]


def test_units_of_boxes(root):
    (root / "t.jsonl").write_text("\n".join(json.dumps({"path": name, "o": [{"box": [0.25, 0.5, 0.5, 0.5], "class": 4}]}) for name in NAMES))
    data = AddBoxes(images(root), objects=1, column="o", unit="shares", corners=False, table=root / "t.jsonl")
    assert data[2]["boxes"].tolist() == [[0.25, 0.5, 0.75, 1.0]] and data[2]["box_classes"].tolist() == [4]
    assert data[0]["boxes"].tolist() == [[0.0, 0.5, 1.0, 1.0]]  # left 10 and width 20 of 40: the whole square


def test_the_largest_of_too_many_stay():
    boxes = torch.tensor([[0, 0, 0.1, 0.1], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.9], [0, 0, 0.5, 0.5]])
    found = padded(boxes, [0, 1, 2, 3], 2)
    assert found["box_classes"].tolist() == [1, 3]
    assert cropped(torch.tensor([[0.0, 0, 4, 2]]), 2, 4).tolist() == [[0, 0, 1, 1]]


def test_maps_from_a_folder_beside(root, tmp_path):
    for n, name in enumerate(NAMES):
        width, height = SIZE[name]
        numbers = np.full((height, width), n, dtype=np.uint8)
        numbers[:, : width // 2] = 255
        path = tmp_path / "maps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(path)
    data = AddMap(images(root, flip=True), str(tmp_path / "maps"))
    assert data[2]["segmentation"].tolist() == [[-1] * 4 + [2] * 4] * 8
    assert data[5]["segmentation"].tolist() == [[2] * 4 + [-1] * 4] * 8
    depth = AddMap(images(root), str(tmp_path / "maps"), key="depth", kind="depth")[2]["depth"]
    assert depth.shape == (1, 8, 8) and depth[0, 4, 0] == 1 and depth[0, 4, 7] < -0.9
    (tmp_path / "maps" / NAMES[0]).unlink()
    with pytest.raises(UserError, match="1 of 3 pictures have no map: cats/a.png"):
        AddMap(images(root), str(tmp_path / "maps"))


def test_a_map_of_classes_takes_nearest_pixels():
    file = io.BytesIO()
    np.save(file, np.arange(36).reshape(6, 6))
    assert class_map(file.getvalue(), 3).tolist() == [[7, 9, 11], [19, 21, 23], [31, 33, 35]]
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    with pytest.raises(ValueError, match="this is RGB"):
        class_map(file.getvalue(), 2)


def test_what_is_missing_is_told(root):
    with pytest.raises(UserError, match="no column scores; nearest: 'score'"):
        AddNumbers(images(root), {"aesthetic": "scores"})
    with pytest.raises(UserError, match="column 'label' holds 'a'; a number is expected"):
        AddNumbers(images(root), {"aesthetic": "label"})
    with pytest.raises(UserError, match="names: 'a' is none of the 2"):
        AddClass(images(root), column="label", names=["b", "c"])
    (root / "part.csv").write_text(f"image,class\n{NAMES[0]},1\n")
    with pytest.raises(UserError, match="2 of 3 pictures have none: cats/b.png, dogs/c.png"):
        AddClass(images(root), table=root / "part.csv")
    with pytest.raises(UserError, match="expected a table"):
        AddClass(images(root), table=root / "nothing.csv")
    with pytest.raises(UserError, match="for each object, got 1"):
        (root / "bad.jsonl").write_text("\n".join(json.dumps({"path": name, "objects": [1]}) for name in NAMES))
        AddBoxes(images(root), objects=1, table=root / "bad.jsonl")
    with pytest.raises(UserError, match="Shapes has none"):
        AddBoxes(Shapes(count=1), objects=1)


def test_wrappers_go_around_one_another_and_into_workers(root):
    data = AddSizes(AddClass(images(root, flip=True), of="folder"))
    assert set(data[0]) == {"image", "caption", "key", "class", "original_size", "crop", "target_size"}
    assert data.extra(4).keys() == {"class", "original_size", "crop", "target_size"} and data.extra(5)["class"] == 1
    other = AddSizes(AddClass(images(root, flip=True), of="folder", names=["dogs", "cats"]))
    assert data.fingerprint != other.fingerprint != other.dataset.fingerprint and data.identity(0) == other.identity(0)
    assert pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint
    batch = next(iter(make_loader(data, 4, seed=1, workers=1)))
    assert batch["class"].dtype == torch.int64 and batch["crop"].shape == (4, 2)


def test_a_broken_picture_s_place_is_taken_with_its_annotations(root):
    data = AddClass(images(root), of="folder")
    (root / NAMES[1]).write_bytes(b"broken since")
    assert data[1]["key"] == "dogs/c.png" and data[1]["class"] == 1
