"""Names of text encoders: every one of theirs has one place here, and back."""

import json
from pathlib import Path

import pytest
import torch

from ldm.common.build import build
from ldm.common.files import UserError
from ldm.common.weights import without_weights
from ldm.interop import text_names
from ldm.interop.rows import back as write
from ldm.interop.text_names import infer, read

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "manifests" / "text_encoders.json").read_text())


def tensors_of(shapes, device="meta"):
    return {name: torch.empty(shape, device=device) for name, shape in shapes.items()}


def transformer_names(module, prefix):
    return {f"{prefix}{name}": tuple(value.shape) for name, value in module.state_dict().items()}


def both_ways(shapes, prefix, **params):
    """The model built from the shapes alone has a place for every tensor, and gives exactly these back. -> the model."""
    tensors = tensors_of(shapes)
    found = infer(tensors, prefix, **params)
    made = without_weights(lambda: build(found.block))
    ours = read(found, tensors)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in made.state_dict().items()}
    back = {name: list(value.shape) for name, value in write(found.rows, made.state_dict()).items()}
    rest = {name: list(shape) for name, shape in shapes.items() if name not in back}
    assert back == {name: list(shape) for name, shape in shapes.items() if name in back}
    assert all(name.endswith("position_ids") for name in rest) and len({row.theirs for row in found.rows}) == len(found.rows)
    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_fit_both_ways(name):
    made = both_ways(PUBLISHED[name]["keys"], PUBLISHED[name]["prefix"])
    heads = {block.heads for block in made.transformer.blocks}
    assert heads == {{"stable-diffusion 1": 12, "stable-diffusion 2": 16, "latent-diffusion text to image": 8}[name]}


def test_the_two_of_sdxl():
    """The first is Stable Diffusion 1's, the second OpenCLIP's bigG, whose names are those of the one of Stable Diffusion 2."""
    first = PUBLISHED["stable-diffusion 1"]
    renamed = {name.replace(first["prefix"], "conditioner.embedders.0.transformer."): shape for name, shape in first["keys"].items()}
    made = both_ways(renamed, "conditioner.embedders.0.transformer.", layer=11, final_norm=False)
    assert made.width == 768 and made.depth == 11
    old, at = PUBLISHED["stable-diffusion 2"], "conditioner.embedders.1.model."
    wide = {1024: 1280, 3072: 3840, 4096: 5120}
    shapes = {}
    for name, shape in old["keys"].items():
        shape = [wide.get(side, side) for side in shape]
        shapes[name.replace(old["prefix"], at)] = shape
        for layer in range(24, 32):
            if "resblocks.0." in name:
                shapes[name.replace(old["prefix"], at).replace("resblocks.0.", f"resblocks.{layer}.")] = shape
    made = both_ways(shapes, at, layer=-2, final_norm=False, pooled="projected", zero_null=True)
    assert (made.width, made.vector_width, made.transformer.blocks[0].heads, made.pad) == (1280, 1280, 20, 0)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_states_are_those_of_transformers(wrapped, projected):
    import transformers as tf

    config = tf.CLIPTextConfig(vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                               max_position_embeddings=9, bos_token_id=58, eos_token_id=59, projection_dim=8)  # fmt: skip
    torch.manual_seed(0)
    theirs = (tf.CLIPTextModelWithProjection if projected else tf.CLIPTextModel)(config).eval()
    state = {name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()}
    if wrapped:
        state = {name if name.startswith("text_projection") else f"text_model.{name}": value for name, value in state.items()}
    found = infer(state, heads=2, vocabulary=None, pooled="projected" if projected else "state")
    ours = build(found.block)
    ours.load_state_dict(read(found, state))
    ids = torch.tensor([[58, 4, 5, 59, 59, 59, 59, 59, 59]])
    with torch.no_grad():
        out, cond = theirs(ids), ours({"caption": ids})
    torch.testing.assert_close(cond.tokens, out.last_hidden_state)
    torch.testing.assert_close(cond.vector, out.text_embeds if projected else out.pooler_output)
    assert all(torch.equal(value, state[name]) for name, value in write(found.rows, ours.state_dict()).items())


def open_clip_like(width=16, layers=2, projection=8):
    """Weights with OpenCLIP's names."""
    torch.manual_seed(0)
    shapes = {"positional_embedding": (9, width), "text_projection": (width, projection), "logit_scale": (),
              "token_embedding.weight": (60, width), "ln_final.weight": (width,), "ln_final.bias": (width,)}  # fmt: skip
    for i in range(layers):
        at = f"transformer.resblocks.{i}."
        shapes |= {f"{at}attn.in_proj_weight": (3 * width, width), f"{at}attn.in_proj_bias": (3 * width,)}
        for name, (rows, columns) in {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}.items():
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        shapes |= {f"{at}ln_{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_states_are_those_of_torchs_attention_with_stacked_weights():
    """OpenCLIP's block, put together from torch's own MultiheadAttention."""
    state = open_clip_like()
    found = infer(state, heads=2, vocabulary=None, pooled="projected", start=58, end=59)
    ours = build(found.block)
    ours.load_state_dict(read(found, state))
    ids = torch.tensor([[58, 4, 5, 59, 0, 0, 0, 0, 0]])
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((9, 9), -torch.inf).triu(1)
    for i in range(2):
        at = f"transformer.resblocks.{i}."
        inside = {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}
        attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        attention.load_state_dict({name.removeprefix("attn."): value for name, value in inside.items() if name.startswith("attn.")})
        h = torch.layer_norm(x, (16,), inside["ln_1.weight"], inside["ln_1.bias"])
        x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = torch.layer_norm(x, (16,), inside["ln_2.weight"], inside["ln_2.bias"])
        h = torch.nn.functional.gelu(h @ inside["mlp.c_fc.weight"].T + inside["mlp.c_fc.bias"])
        x = x + h @ inside["mlp.c_proj.weight"].T + inside["mlp.c_proj.bias"]
    x = torch.layer_norm(x, (16,), state["ln_final.weight"], state["ln_final.bias"])
    cond = ours({"caption": ids})
    torch.testing.assert_close(cond.tokens, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cond.vector, x[:, 3] @ state["text_projection"], atol=1e-4, rtol=1e-4)
    back = write(found.rows, ours.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_weights_are_views_of_what_was_read():
    state = open_clip_like()
    ours = read(infer(state, heads=2), state)
    stacked = state["transformer.resblocks.0.attn.in_proj_weight"]
    assert ours["transformer.blocks.0.k.weight"].data_ptr() == stacked[16:].data_ptr()
    assert ours["projection.weight"].data_ptr() == state["text_projection"].data_ptr()


def test_harmless_names_are_left_alone():
    state = open_clip_like() | {"attn_mask": torch.zeros(9, 9), "visual.conv1.weight": torch.zeros(1)}
    assert "attn_mask" not in read(infer(state, heads=2), state)
    beside = {f"cond.{name}": value for name, value in state.items()} | {"model.x": torch.zeros(1)}
    assert infer(beside, "cond.", heads=2).block == infer(state, heads=2).block


def test_leftovers_and_gaps_stop_the_reading():
    state = open_clip_like()
    state["transformer.resblocks.1.lora_up"] = state["extra"] = torch.zeros(1)
    del state["transformer.resblocks.0.ln_1.weight"], state["ln_final.bias"]
    with pytest.raises(UserError, match=r"x\.ckpt.*open_clip.*2 missing \(ln_final.bias 1, transformer.resblocks 1\), "
                                        r"2 that there is no place for \(extra 1, transformer.resblocks 1\)"):  # fmt: skip
        read(infer(state, heads=2), state, "x.ckpt")


def test_what_is_no_text_encoder_is_named():
    with pytest.raises(UserError, match=r"x\.ckpt: no text encoder .* under 'cond\.'; names there: none"):
        infer({"a": torch.zeros(1)}, "cond.", "x.ckpt")
    with pytest.raises(UserError, match="do not tell its sizes"):
        infer({"token_emb.weight": torch.zeros(2, 2)})


def test_position_ids_are_as_stable_diffusion_has_them():
    made = text_names.position_ids(77, "cond_stage_model.transformer.")
    assert {name: list(value.shape) for name, value in made.items()} == {
        name: shape for name, shape in PUBLISHED["stable-diffusion 1"]["keys"].items() if name.endswith("position_ids")
    }
