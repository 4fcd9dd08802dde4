"""Text encoders of Stable Diffusion 1 and 2, LDM and diffusers, read from their files, against the states that their own code gave.

tests/data/parity: text.safetensors of txt2img_kl, sd2_v and txt2img_bert has the text encoder of a diffusion model with the names
that it has there, token ids and states; diffusers_models has the folders text_encoder and tokenizer. All weights are random.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.common.build import build
from ldm.common.weights import without_weights
from ldm.interop import rows, text_folders, text_names

PARITY = Path(__file__).parents[1] / "data" / "parity"
PROMPTS = ["a photograph of an Astronaut riding a horse!", "the old  oil-painting of a cat, 42 monsters"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-5


def encoder(case: str, prefix: str, **params):
    """-> the conditioner, made without contents and filled by assignment, and what was recorded."""
    tensors = load_file(PARITY / case / "text.safetensors")
    found = text_names.infer(tensors, prefix, case, **params)
    made = without_weights(lambda: build(found.block))
    assert made.device.type == "meta"
    made.load_state_dict(text_names.read(found, tensors, case), assign=True)
    back = rows.back(found.rows, made.state_dict())
    left = {key for key in tensors if key.startswith(prefix)} - set(back)
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in back)
    assert all(key.endswith("position_ids") for key in left)
    return made.float(), tensors


@torch.no_grad()
def test_stable_diffusion_1():
    clip, io = encoder("txt2img_kl", "cond_stage_model.transformer.", heads=4, vocabulary=str(PARITY / "txt2img_kl" / "clip_tiny"))
    for ids, states in (("tokens", "context"), ("tokens_truncated", "context_truncated"), ("tokens_uncond", "context_uncond")):
        cond = clip({"caption": io[f"in.{ids}"]})
        assert cond.mask is None and cond.vector is None
        close(cond.tokens, io[f"out.{states}"])
    close(clip({"caption": PROMPTS}).tokens, io["out.context_from_text"])
    close(clip.null(2).tokens, io["out.context_uncond"])
    assert torch.equal(clip.tokenizer(PROMPTS).ids[:, 0], io["in.tokens"])
    assert torch.equal(text_names.position_ids(77)["text_model.embeddings.position_ids"],
                       io["cond_stage_model.transformer.text_model.embeddings.position_ids"])  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("layer", "states"), [(-2, "context"), (-1, "context_last_layer")])
def test_stable_diffusion_2(layer, states):
    clip, io = encoder("sd2_v", "cond_stage_model.model.", heads=4, layer=layer, vocabulary=None)
    close(clip({"caption": io["in.tokens"]}).tokens, io[f"out.{states}"])
    if layer == -2:
        close(clip.null(2).tokens, io["out.context_uncond"])  # padded with 0


@torch.no_grad()
def test_latent_diffusion():
    bert, io = encoder("txt2img_bert", "cond_stage_model.transformer.", vocabulary=None, start=1, end=2)
    close(bert({"caption": io["in.tokens"]}).tokens, io["out.context"])
    close(bert({"caption": io["in.tokens"][:, :9]}).tokens, io["out.context_len9"])
    close(bert.null(2).tokens, io["out.context_uncond"])


STATES = {"last_hidden_state": (-1, True), "penultimate_final_ln": (-2, True),
          **{f"hidden_states.{k}": (k, False) for k in range(4)}}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("states", STATES)
def test_diffusers(states):
    layer, norm = STATES[states]
    io = load_file(PARITY / "diffusers_models" / "text.safetensors")
    prompts = json.loads((PARITY / "diffusers_models" / "prompts.json").read_text())
    clip = text_folders.clip(str(PARITY / "diffusers_models" / "text_encoder"), layer=layer, final_norm=norm, pooled="state")
    expected = io[f"out.text.{states}"]
    cond = clip({"caption": prompts})
    close(cond.tokens[: len(expected)], expected)
    close(cond.vector, io["out.text.pooler_output"])
    assert torch.equal(clip.tokenizer(prompts).ids[:, 0], io["out.text.input_ids"])
