"""An autoencoder of somebody else in our names: weights renamed by a table, all that does not fit told in one line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.bundle import Bundle
from ldm.common.files import UserError
from ldm.interop import names
from ldm.interop.rows import SAME, Change, Row, back, check, existing, pair, to_us

BOTTLENECKS = ("autoencoder.bottlenecks.KL", "autoencoder.bottlenecks.VQ")


def about(block: Mapping, layout: str) -> dict:
    """What a checkpoint of ours with this autoencoder says of itself."""
    config = {"model": {"target": "autoencoder.lit.AutoencoderModule", "params": {"autoencoder": dict(block)}}}
    return {"kind": "autoencoder", "config": config, "layout": layout}


MATRIX = Change(lambda w: w[..., None, None] if w.ndim == 2 else w, lambda w: w.flatten(1))  # there; here a 1x1 convolution
CONVOLUTION = Change(MATRIX.to_us, lambda w: w)


def autoencoder_rows(block: Mapping, layout: str, prefix: str = "") -> list[Row]:
    """The table of the autoencoder that ``block`` describes, for every tensor that may exist (see ``rows.existing``)."""
    if block["target"] != names.CONVOLUTIONAL:
        return []
    rows = [Row(("bottleneck.codebook",), (f"{prefix}quantize.embedding.weight",))]
    for layer in names.layers(names.Layout.of(block)):
        for inner, theirs in layer.inside.items():
            theirs = names.inner(layer, inner, layout, prefix)
            attends = layer.inside in names.ATTENTION.values() and inner != "norm"
            change = SAME if not attends else MATRIX if layout == "diffusers" else CONVOLUTION
            rows += pair(f"{layer.ours}.{inner}" if inner else layer.ours, theirs, weight=change)
    return rows


def translated(block: Mapping, layout: str, tensors: Mapping[str, Tensor], origin: str, prefix: str = "") -> dict[str, Tensor]:
    """The weights of the autoencoder that ``block`` describes, by our names, from tensors in the names of ``layout``.

    They become float32, whatever the file has: the decoders overflow in half precision.

    Raises:
        UserError: with counts for each part, where names or shapes differ.
    """
    expected = made(about(block, layout)["config"], origin).autoencoder.state_dict()
    rows = existing(autoencoder_rows(block, layout, prefix), expected)
    found = to_us(rows, tensors)
    check(rows, tensors, {name: value for name, value in expected.items() if name not in names.OURS_ALONE}, found, origin)
    return {name: value.to(torch.float32) for name, value in found.items()} | names.own(expected)


def made(config: Mapping, origin: str) -> Bundle:
    """A model without weights. UserError where its sizes do not go together."""
    try:
        return Bundle.from_config(config)
    except ValueError as error:
        raise UserError(f"{origin}: the model that its config describes cannot be built: {error}") from error


def block_of(bundle: Bundle) -> dict:
    """The block of its autoencoder."""
    return bundle.config.get("autoencoder") or bundle.config["model"]["params"]["autoencoder"]


def renamed(bundle: Bundle, layout: str) -> dict[str, Tensor]:
    """The weights of the bundle's autoencoder by the names of ``layout``."""
    weights = {name: value.detach().cpu().contiguous() for name, value in bundle.autoencoder.state_dict().items()}
    return back(existing(autoencoder_rows(block_of(bundle), layout), weights), weights)


def settings_for(bundle: Bundle, layout: str) -> dict:
    """The settings of the bundle's autoencoder, its bottleneck's too.

    Raises:
        UserError: where that layout has no place for it.
    """
    params = names.settings(block_of(bundle))
    bottleneck = params["bottleneck"]
    if bottleneck["target"] not in BOTTLENECKS:
        raise UserError(f"{layout} has no bottleneck {bottleneck['target']}; it has {' and '.join(BOTTLENECKS)}")
    params["bottleneck"] = names.defaults(bottleneck)
    if params["bottleneck"].get("cosine"):
        raise UserError(f"{layout} has no codebook of directions (cosine: true)")
    widths = [params["width"] * m for m in params["mult"] or (1, 2, 4, 4)]
    if any(width % params["groups"] for width in widths):
        raise UserError(f"{layout} needs widths that its {params['groups']} groups of normalisation divide, not {widths}")
    return params


def refuse_others(params: Mapping, where: str, **only: object) -> None:
    """UserError unless every setting has the one value that there is elsewhere."""
    for name, value in only.items():
        if params[name] != value:
            raise UserError(f"{where} has no autoencoder with {name}: {params[name]!r}, only {value!r}")
