import io
import os
import sys
from pathlib import Path

import pytest
import torch
import webdataset
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_sub_table_classes
from PIL import Image

from ldm.common.files import UserError
from ldm.data import emoji
from ldm.data.emoji import Emoji, base_name, codes, make
from ldm.data.transforms import to_tensor
from ldm.data.webdataset import WebDataset

SHARDS = Path(os.environ.get("LDM_EMOJI", Path(__file__).parents[3] / "shared" / "emoji"))
TONES = ["", *(f" {tone} skin tone" for tone in ("light", "medium light", "medium", "medium dark", "dark"))]
real = pytest.mark.skipif(
    not list(SHARDS.glob("*.tar")), reason=f"no emoji shards in {SHARDS}; LDM_EMOJI names another folder"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """60 occupations for man, woman and all, in six skin tones, and 40 things."""
    names = [
        f"{who}worker {'abcdefghij'[i // 6]}{i}{tone}"
        for i in range(60)
        for who in ("", "man ", "woman ")
        for tone in TONES
    ]
    names += [f"thing number {i}" for i in range(40)]
    path = tmp_path_factory.mktemp("emoji") / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for i, name in enumerate(names):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(file, "PNG")
            tar.write({"__key__": f"{i:05d}_{i:x}", "png": file.getvalue(), "txt": name.encode()})
    return str(path)


@pytest.mark.parametrize(
    ("caption", "base"),
    [
        ("woman cook medium light skin tone", "cook"),
        (":man_cook_medium-dark_skin_tone:".replace("_", " "), "cook"),
        ("cook", "cook"),
        ("person walking facing right dark skin tone", "walking"),
        ("couple with heart woman man dark skin tone light skin tone", "couple with heart"),
        ("woman and man holding hands", "holding hands"),
        ("merman medium skin tone", "mer"),
        ("mermaid", "mer"),
        ("Mrs. Claus light skin tone", "claus"),
        ("Santa Claus", "claus"),
        ("old woman", "person"),
        ("boy dark skin tone", "person"),
        ("medium skin tone", "skin tone"),
        ("woman's hat", "woman's hat"),
        ("old key", "old key"),
        ("light bulb", "light bulb"),
        ("french southern and antarctic lands", "french southern and antarctic lands"),
    ],
)
def test_base_name(caption, base):
    assert base_name(caption) == base


def names(data: Emoji) -> list[str]:
    return [data.caption(i) for i in range(len(data))]


def check_split(shards: str, share: float) -> None:
    parts = {split: names(Emoji(shards, split=split, held_out_share=share)) for split in ("train", "held_out", "all")}
    assert sorted(parts["train"] + parts["held_out"]) == sorted(parts["all"])
    toneless = [{emoji.TONE.sub("", name).strip() for name in parts[split]} for split in ("train", "held_out")]
    assert not toneless[0] & toneless[1], "a held-out name is a skin-tone variant of a training name"
    for prefix in ("man ", "woman ", "person "):
        bare = [{name.removeprefix(prefix) for name in part} for part in toneless]
        assert not bare[0] & bare[1], "a held-out name is a gender variant of a training name"
    groups = {base_name(name) for name in parts["all"]}
    held = {base_name(name) for name in parts["held_out"]}
    assert abs(len(held) - share * len(groups)) < 4 * (len(groups) * share * (1 - share)) ** 0.5


def test_no_variant_crosses_the_split(shards):
    check_split(shards, 0.25)


@real
def test_no_variant_crosses_the_split_of_the_real_set():
    assert len(Emoji(str(SHARDS), split="all")) == 3797
    check_split(str(SHARDS), 0.05)


def test_dataset(shards):
    data, whole = Emoji(shards, size=8, split="held_out", held_out_share=0.2), WebDataset(shards, 8)
    assert data.channels == 3 and 0 < len(data) < len(whole)
    of_caption = {whole.caption(i): i for i in range(len(whole))}
    for i in range(0, len(data), 7):
        item, same = data[i], of_caption[data.caption(i)]
        assert torch.equal(item["image"], whole[same]["image"]) and item["caption"] == data.caption(i)
        assert data.identity(i) == whole.identity(same)
    with pytest.raises(IndexError):
        data[len(data)]
    assert f"split held_out: {len(data)} pictures" in data.report() and f"{len(data)} images" in data.report()


def test_split_depends_on_the_seed(shards):
    assert names(Emoji(shards, split="held_out", seed=1)) != names(Emoji(shards, split="held_out", seed=2))
    assert Emoji(shards, split="held_out", seed=1).fingerprint != Emoji(shards, split="held_out", seed=2).fingerprint
    assert Emoji(shards, seed=1).fingerprint == Emoji(shards, seed=1).fingerprint


def test_a_part_by_name(shards):
    whole = names(Emoji(shards))
    part = Emoji(shards, match="worker A|thing number 1")
    assert names(part) == [name for name in whole if "worker a" in name or "thing number 1" in name] != whole
    assert part.fingerprint != Emoji(shards).fingerprint
    with pytest.raises(UserError, match="split 'train' and has a name like 'nothing'"):
        Emoji(shards, match="nothing")
    with pytest.raises(UserError, match="is no regular expression: unterminated"):
        Emoji(shards, match="[")


def test_mistakes(shards):
    with pytest.raises(UserError, match="held_out_share: 5"):
        Emoji(shards, held_out_share=5)
    with pytest.raises(UserError, match="no picture is in the split 'held_out'"):
        Emoji(shards, split="held_out", held_out_share=0.0)


def bitmap(colour: str) -> bytes:
    image = Image.new("RGBA", (136, 128))
    image.paste(colour, (0, 0, 68, 128))
    return emoji.png(image)


def bitmap_tables(bitmaps: dict[str, bytes], glyphs: list[str]) -> dict:
    """CBDT and CBLC with one strike of 109 pixels per em."""
    location, data = newTable("CBLC"), newTable("CBDT")
    location.version, data.version = 3.0, 3.0
    metrics = SmallGlyphMetrics()
    metrics.height, metrics.width, metrics.BearingX, metrics.BearingY, metrics.Advance = 128, 136, 0, 101, 136
    line = SbitLineMetrics()
    for name in ("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset",
                 "minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2"):  # fmt: skip
        setattr(line, name, 0)
    strike = Strike()
    size = strike.bitmapSizeTable
    size.hori = size.vert = line
    size.colorRef, size.ppemX, size.ppemY, size.bitDepth, size.flags = 0, 109, 109, 32, 1
    for glyph in bitmaps:
        index = eblc_sub_table_classes[1](b"", None)
        index.indexFormat, index.imageFormat, index.names = 1, 17, [glyph]
        index.firstGlyphIndex = index.lastGlyphIndex = glyphs.index(glyph)
        strike.indexSubTables.append(index)
    location.strikes = [strike]
    data.strikeData = [{}]
    for glyph, png in bitmaps.items():
        data.strikeData[0][glyph] = cbdt_bitmap_format_17(b"", None)
        data.strikeData[0][glyph].metrics, data.strikeData[0][glyph].imageData = metrics, png
    return {"CBLC": location, "CBDT": data}


@pytest.fixture
def font(tmp_path) -> Path:
    """A font as Noto Color Emoji is one: three bitmaps, of which the last is a ligature."""
    glyphs = [".notdef", "fox", "woman", "joiner", "pan", "woman_cook"]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({0x1F98A: "fox", 0x1F469: "woman", 0x200D: "joiner", 0x1F373: "pan"})
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1024, 0)))
    builder.setupHorizontalHeader()
    builder.setupPost(keepGlyphNames=True)
    builder.addOpenTypeFeatures("feature ccmp { sub woman joiner pan by woman_cook; } ccmp;")
    for tag, table in bitmap_tables(
        {"fox": bitmap("red"), "woman": bitmap("green"), "woman_cook": bitmap("blue")}, glyphs
    ).items():
        builder.font[tag] = table
    path = tmp_path / "font.ttf"
    builder.save(path)
    return path


def test_make(font, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "PER_SHARD", 2)
    seen = []
    text = make(tmp_path / "out", font, progress=lambda done, total: seen.append((done, total)))
    assert "3 emoji of" in text and "in 2 shards" in text and seen == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"noto-emoji-64-png-00{i}.tar" for i in range(2)
    ]
    data = WebDataset(str(tmp_path / "out"), size=64)
    drawn = {data[i]["caption"]: data[i] for i in range(3)}
    assert {name: item["key"].split("_")[1] for name, item in drawn.items()} == {
        "fox": "1f98a", "woman": "1f469", "woman cook": "1f469-200d-1f373"}  # fmt: skip
    for name, channel in (("fox", 0), ("woman cook", 2)):
        image = drawn[name]["image"]
        inside = image[:, 10:54, 6:28]
        assert (inside[channel] == 1).all() and (inside.sum(0) == -1).all()  # the colour alone
        assert (image[:, :, 36:] == 1).all() and (image[:, :2] == 1).all() and (image[:, -2:] == 1).all()  # white


def test_made_twice_is_the_same_file(font, tmp_path):
    for out in ("a", "b"):
        make(tmp_path / out, font)
    name = "noto-emoji-64-png-000.tar"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_make_without_font_or_package(tmp_path, monkeypatch, font):
    monkeypatch.setattr(emoji, "FONT_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(UserError, match="NotoColorEmoji.ttf is in none of .*apt-get install fonts-noto-color-emoji"):
        make(tmp_path / "out")
    (tmp_path / "none").mkdir()
    font.rename(tmp_path / "none" / "NotoColorEmoji.ttf")
    assert "3 emoji" in make(tmp_path / "out")
    (tmp_path / "junk.ttf").write_bytes(b"junk")
    for path in ("junk.ttf", "gone.ttf"):
        with pytest.raises(UserError, match=f"{path}: not a font that can be read.*apt-get"):
            make(tmp_path / "out", tmp_path / path)
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(UserError, match="needs emoji: pip install"):
        make(tmp_path / "out")


def test_font_without_bitmaps(tmp_path):
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.setupPost()
    builder.save(tmp_path / "plain.ttf")
    with pytest.raises(UserError, match="plain.ttf: no CBDT table"):
        make(tmp_path / "out", tmp_path / "plain.ttf")


@real
def test_drawn_as_the_real_set_is():
    try:
        bitmaps = emoji.Bitmaps(emoji.find_font())
    except UserError as error:
        pytest.skip(str(error))
    if bitmaps.version != "2.042":
        pytest.skip(f"the shards were drawn with version 2.042 of the font; installed is {bitmaps.version}")
    drawn = [sequence for sequence, _ in emoji.named_sequences() if sequence in bitmaps]
    theirs = WebDataset(str(SHARDS), 64)
    assert [codes(sequence) for sequence in drawn] == [theirs[i]["key"].split("_")[1] for i in range(len(theirs))]
    for i in range(0, len(drawn), 40):
        assert torch.equal(to_tensor(emoji.draw(bitmaps[drawn[i]])), theirs[i]["image"])
