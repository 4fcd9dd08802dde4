"""conditioner_config of Stability's generative-models (SDXL): a list of embedders, as conditioners of ours."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby

from ldm.common.files import UserError
from ldm.interop import compvis_texts
from ldm.interop.conditions import DROPOUT, NUMBERS, Around, Part
from ldm.interop.said import Said

KEYS = {"original_size_as_tuple": ("original_size", 2), "crop_coords_top_left": ("crop", 2),
        "target_size_as_tuple": ("target_size", 2), "aesthetic_score": ("aesthetic", 1)}  # fmt: skip
TEXTS = {  # embedder -> reader, where its names begin
    "FrozenCLIPEmbedder": (compvis_texts.clip, "transformer."), "FrozenOpenCLIPEmbedder": (compvis_texts.open_clip, "model."),
    "FrozenOpenCLIPEmbedder2": (partial(compvis_texts.open_clip, pools=True), "model."),
}  # fmt: skip


def embedders(around: Around) -> Iterator[Part]:
    """Numbers that follow one another are one conditioner of ours."""
    found = around.params.block("conditioner_config").block("params").blocks("emb_models")
    has_numbers = any(map(_is_number, found))
    for (is_number, _), group in groupby(enumerate(found), lambda each: (_is_number(each[1]), _width(each[1]))):
        if is_number:
            each = [embedder for _, embedder in group]
            keys = dict(KEYS[embedder["input_key"]] for embedder in each)
            yield Part(NUMBERS, {"keys": keys, "width": _width(each[0])})
            continue
        for i, embedder in group:
            yield _text(embedder, around, f"conditioner.embedders.{i}.", has_numbers)


def _text(embedder: Said, around: Around, prefix: str, xl: bool) -> Part:
    """Guidance compares with zeros, in ``xl`` and where training put them in, or with the empty text (legacy_ucg_value)."""
    name, said = embedder.named
    if name not in TEXTS or embedder.word("input_key", "txt") != "txt":
        raise UserError(f"{embedder.place}: {name} of {embedder.get('input_key')!r} is not known here; there are "
                        f"{', '.join(TEXTS)} of 'txt', and ConcatTimestepEmbedderND of {', '.join(KEYS)}")
    read, at = TEXTS[name]
    part, share = read(said, around, prefix + at), embedder.number("ucg_rate", None)
    values = {"dropout": DROPOUT if share is None else share}
    if (xl or share) and "legacy_ucg_value" not in embedder:
        values["zero_null"] = True
    if embedder.flag("is_trainable"):
        values["trainable"] = True
    return part._replace(params=part.params | values)


def _is_number(embedder: Said) -> bool:
    return embedder.named[0] == "ConcatTimestepEmbedderND" and embedder.word("input_key", "") in KEYS


def _width(embedder: Said) -> int | None:
    """Of the sinusoids of one number."""
    return embedder.named[1].whole("outdim", 256) if _is_number(embedder) else None
