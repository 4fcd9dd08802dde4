"""What the weights of text encoders are called: here, by transformers, by OpenCLIP, by LDM's x_transformer.

    found = infer(tensors, "cond_stage_model.model.")          # which of them it is, its sizes, the table of its names
    weights = read(found, tensors, "v2.ckpt")                  # by our names: those of the conditioner
    tensors = back(found.rows, conditioner.state_dict())       # and back (``rows.back``)

Weights are views of what was read, not copies: q, k and v are three layers here, which a stacked one divides into.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.common.files import UserError
from ldm.interop.rows import TRANSPOSED, Row, pair, to_us

CLIP, BERT = "ldm.conditioners.clip.ClipText", "ldm.conditioners.bert.BertText"


class Found(NamedTuple):
    """A text encoder among somebody else's tensors."""

    layout: str  # a name in LAYOUTS
    prefix: str  # what its names begin with
    block: dict  # our conditioner
    rows: list[Row]


def hf_clip(layers: int, prefix: str = "", wrapped: bool = True, projection: bool = False) -> list[Row]:
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection. ``wrapped``: its names have "text_model." in them, as all
    had before transformers 5."""
    inside = {"norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
              "v": "self_attn.v_proj", "out": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip
    at = f"{prefix}text_model." if wrapped else prefix
    rows = [_row("transformer.token.weight", f"{at}embeddings.token_embedding.weight"),
            _row("transformer.position", f"{at}embeddings.position_embedding.weight"),
            *pair("transformer.norm", f"{at}final_layer_norm")]  # fmt: skip
    for i in range(layers):
        for ours, theirs in inside.items():
            rows += pair(f"transformer.blocks.{i}.{ours}", f"{at}encoder.layers.{i}.{theirs}")
    return rows + [_row("projection.weight", f"{prefix}text_projection.weight")] * projection


def open_clip(layers: int, prefix: str = "", projection: bool = True, logit_scale: bool = True) -> list[Row]:
    """OpenCLIP's text tower, and OpenAI's: q, k, v are one layer, and the projection is a matrix on the right."""
    inside = {"norm1": "ln_1", "norm2": "ln_2", "out": "attn.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    rows = [_row("transformer.token.weight", f"{prefix}token_embedding.weight"),
            _row("transformer.position", f"{prefix}positional_embedding"),
            *pair("transformer.norm", f"{prefix}ln_final")]  # fmt: skip
    for i in range(layers):
        block, theirs_block = f"transformer.blocks.{i}", f"{prefix}transformer.resblocks.{i}"
        rows += [Row(tuple(f"{block}.{name}.{kind}" for name in "qkv"), (f"{theirs_block}.attn.in_proj_{kind}",))
                 for kind in ("weight", "bias")]
        for ours, theirs in inside.items():
            rows += pair(f"{block}.{ours}", f"{theirs_block}.{theirs}")
    rows += [Row(("projection.weight",), (f"{prefix}text_projection",), TRANSPOSED)] * projection
    return rows + [_row("logit_scale", f"{prefix}logit_scale")] * logit_scale


def x_transformer(layers: int, prefix: str = "", logits: bool = True) -> list[Row]:
    """LDM's BERTEmbedder: attention and MLP count as layers of their own, 0 and 1, 2 and 3 ..."""
    inside = {"norm1": "{0}.0", "out": "{0}.1.to_out", "norm2": "{1}.0", "up": "{1}.1.net.0.0", "down": "{1}.1.net.2"}
    rows = [_row("transformer.token.weight", f"{prefix}token_emb.weight"),
            _row("transformer.position", f"{prefix}pos_emb.emb.weight"), *pair("transformer.norm", f"{prefix}norm")]
    for i in range(layers):
        block, theirs_layers = f"transformer.blocks.{i}", f"{prefix}attn_layers.layers."
        rows += [_row(f"{block}.{name}.weight", f"{theirs_layers}{2 * i}.1.to_{name}.weight") for name in "qkv"]
        for ours, theirs in inside.items():
            rows += pair(f"{block}.{ours}", theirs_layers + theirs.format(2 * i, 2 * i + 1))
    return rows + (pair("logits", f"{prefix}to_logits") if logits else [])


def diffusers_bert(layers: int, prefix: str = "", logits: bool = True) -> list[Row]:
    """LDM's text encoder as diffusers keeps it (LDMBertModel)."""
    inside = {"norm1": "self_attn_layer_norm", "out": "self_attn.out_proj", "norm2": "final_layer_norm", "up": "fc1",
              "down": "fc2"}  # fmt: skip
    rows = [_row("transformer.token.weight", f"{prefix}model.embed_tokens.weight"),
            _row("transformer.position", f"{prefix}model.embed_positions.weight"),
            *pair("transformer.norm", f"{prefix}model.layer_norm")]  # fmt: skip
    for i in range(layers):
        block, theirs_block = f"transformer.blocks.{i}", f"{prefix}model.layers.{i}"
        rows += [_row(f"{block}.{name}.weight", f"{theirs_block}.self_attn.{name}_proj.weight") for name in "qkv"]
        for ours, theirs in inside.items():
            rows += pair(f"{block}.{ours}", f"{theirs_block}.{theirs}")
    return rows + (pair("logits", f"{prefix}to_logits") if logits else [])


def _row(ours: str, theirs: str) -> Row:
    return Row((ours,), (theirs,))


def position_ids(length: int, prefix: str = "") -> dict[str, Tensor]:
    """0, 1, 2 ...: transformers once kept them among the weights, and files of Stable Diffusion 1 have them."""
    return {f"{prefix}text_model.embeddings.position_ids": torch.arange(length)[None]}


def infer(tensors: Mapping[str, Tensor], prefix: str = "", origin: str = "weights", **given: Any) -> Found:
    """The text encoder whose names begin with ``prefix``. given: params of our conditioner, such as layer, heads or vocabulary;
    they come before what follows from shapes (heads of 64 channels) and from habit (OpenCLIP: gelu, padded with 0).

    Raises:
        UserError: where there is none, or its shapes do not tell its sizes.
    """
    shape = {key.removeprefix(prefix): tuple(value.shape) for key, value in tensors.items() if key.startswith(prefix)}
    for layout, (mark, sizes, table, target) in LAYOUTS.items():
        if any(re.match(mark, key) for key in shape):
            try:
                params, names = sizes(shape)
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(f"{origin}: a text encoder under {prefix!r} whose shapes do not tell its sizes "
                                f"({type(error).__name__}: {error})") from error  # fmt: skip
            return Found(layout, prefix, {"target": target, "params": params | given}, table(params["layers"], prefix, **names))
    raise UserError(f"{origin}: no text encoder of CLIP, OpenCLIP or LDM under {prefix!r}; names there: "
                    f"{', '.join(list(shape)[:3]) or 'none'}")  # fmt: skip


def _hf_sizes(shape: Mapping[str, tuple]) -> tuple[dict, dict]:
    at = "text_model." if any(key.startswith("text_model.") for key in shape) else ""
    vocab_size, width = shape[f"{at}embeddings.token_embedding.weight"]
    projection = shape.get("text_projection.weight", (None,))[0]
    params = {"vocab_size": vocab_size, "width": width, "layers": _count(rf"{at}encoder\.layers\.(\d+)\.", shape),
              "mlp": shape[f"{at}encoder.layers.0.mlp.fc1.weight"][0], "projection": projection,
              "max_length": shape[f"{at}embeddings.position_embedding.weight"][0]}  # fmt: skip
    return params, {"wrapped": bool(at), "projection": projection is not None}


def _open_clip_sizes(shape: Mapping[str, tuple]) -> tuple[dict, dict]:
    vocab_size, width = shape["token_embedding.weight"]
    kept = {"projection": shape.get("text_projection", (0, None))[1], "logit_scale": "logit_scale" in shape}
    params = {"vocab_size": vocab_size, "width": width, "layers": _count(r"transformer\.resblocks\.(\d+)\.", shape),
              "mlp": shape["transformer.resblocks.0.mlp.c_fc.weight"][0], "max_length": shape["positional_embedding"][0],
              "activation": "gelu", "pad": 0, "clean": "open_clip", **kept}  # fmt: skip
    return params, {"projection": kept["projection"] is not None, "logit_scale": kept["logit_scale"]}


def _x_sizes(shape: Mapping[str, tuple]) -> tuple[dict, dict]:
    vocab_size, width = shape["token_emb.weight"]
    logits = "to_logits.weight" in shape
    params = {"vocab_size": vocab_size, "width": width, "layers": _count(r"attn_layers\.layers\.(\d+)\.", shape) // 2,
              "heads": shape["attn_layers.layers.0.1.to_q.weight"][0] // 64, "max_length": shape["pos_emb.emb.weight"][0],
              "mlp": shape["attn_layers.layers.1.1.net.0.0.weight"][0], "logits": logits}  # fmt: skip
    return params, {"logits": logits}


def _diffusers_bert_sizes(shape: Mapping[str, tuple]) -> tuple[dict, dict]:
    vocab_size, width = shape["model.embed_tokens.weight"]
    logits = "to_logits.weight" in shape
    params = {"vocab_size": vocab_size, "width": width, "layers": _count(r"model\.layers\.(\d+)\.", shape),
              "heads": shape["model.layers.0.self_attn.q_proj.weight"][0] // 64, "mlp": shape["model.layers.0.fc1.weight"][0],
              "max_length": shape["model.embed_positions.weight"][0], "logits": logits}  # fmt: skip
    return params, {"logits": logits}


def _count(pattern: str, names: Iterable[str]) -> int:
    return len({found[1] for name in names if (found := re.match(pattern, name))})


LAYOUTS = {  # name -> by what it is known, its sizes from shapes, its table, our conditioner
    "hf_clip": (r"(text_model\.)?embeddings\.token_embedding\.weight$", _hf_sizes, hf_clip, CLIP),
    "open_clip": (r"token_embedding\.weight$", _open_clip_sizes, open_clip, CLIP),
    "x_transformer": (r"token_emb\.weight$", _x_sizes, x_transformer, BERT),
    "diffusers_bert": (r"model\.embed_tokens\.weight$", _diffusers_bert_sizes, diffusers_bert, BERT),
}
HARMLESS = {  # names that say nothing of the text encoder: positions counted, masks, a CLIP's other half
    "hf_clip": r"(text_model\.)?embeddings\.position_ids$|(vision_model|visual_projection)\.|logit_scale$",
    "open_clip": r"attn_mask$|visual\.",
    "x_transformer": r"$^", "diffusers_bert": r"$^",
}


def read(found: Found, tensors: Mapping[str, Tensor], origin: str = "weights") -> dict[str, Tensor]:
    """The encoder's weights by our names, which are the conditioner's.

    Raises:
        UserError: unless every tensor under its prefix has one row of the table and every row its tensor.
    """
    named = {name for row in found.rows for name in row.theirs}
    inside = [key for key in tensors if key.startswith(found.prefix)]
    left = [key for key in inside if key not in named and not re.match(HARMLESS[found.layout], key.removeprefix(found.prefix))]
    missing = [key for key in named if key not in tensors]
    if left or missing:
        told = [f"{len(names)} {what} ({', '.join(f'{part} {count}' for part, count in _grouped(names, found.prefix))})"
                for what, names in (("missing", missing), ("that there is no place for", left)) if names]  # fmt: skip
        raise UserError(f"{origin}: the text encoder under {found.prefix!r} is not what it seems ({found.layout}): "
                        f"{', '.join(told)}")  # fmt: skip
    return to_us(found.rows, tensors)


def _grouped(names: Iterable[str], prefix: str) -> Iterator[tuple[str, int]]:
    """The first two words of these names, with how many begin so."""
    yield from Counter(".".join(name.removeprefix(prefix).split(".")[:2]) for name in sorted(names)).items()
