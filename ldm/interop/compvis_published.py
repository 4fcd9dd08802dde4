"""The published models of CompVis and Stability that the shapes of their weights tell apart: what their yaml files say."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.common.files import UserError

UNET_IN = "model.diffusion_model.input_blocks.0.0.weight"
LATENT, ENCODERS = "ldm.models.diffusion.ddpm.", "ldm.modules.encoders.modules."
SGM = "sgm.modules."
NEEDED = "give the yaml that belongs to it (config=..., --config)"


def recognised(tensors: Mapping[str, Tensor], origin: str) -> dict:
    """The yaml of a published model, by its tensors. UserError where several have these shapes, or none."""
    if UNET_IN not in tensors:
        raise UserError(f"{origin}: its network is no UNet (it lacks {UNET_IN}); of this layout UNets are read, and no "
                        "transformers such as Stable Diffusion 3's")
    width, taken = tensors[UNET_IN].shape[:2]
    names = tuple(tensors)
    kind = next((kind for kind, mark in MARKS.items() if any(name.startswith(mark) for name in names)), None)
    if kind in ("xl", "refiner") and taken == 4 and width in (320, 384):
        return sdxl(refiner=kind == "refiner")
    if kind == "clip" and taken in (4, 9) and width == 320:
        return stable_diffusion(1, inpainting=taken == 9)
    if kind == "bert" and taken == 4 and width == 320:
        return text_1p4b()
    if kind == "open_clip" and taken == 9 and width == 320:
        return stable_diffusion(2, inpainting=True)
    if kind == "open_clip" and taken == 4:
        raise UserError(f"{origin}: Stable Diffusion 2, of which there are models of noise (512-base, v2-inference.yaml) and "
                        f"of v (768, v2-inference-v.yaml) with the same weights: {NEEDED}")
    raise UserError(f"{origin}: a diffusion model in the layout of CompVis whose shapes are not those of a published one known "
                    f"here (Stable Diffusion 1, 2-inpainting, XL, LDM's 1.4B text model): {NEEDED}")


MARKS = {  # what names begin with, the most telling first
    "xl": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model.",
    "clip": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.embeddings."),
    "open_clip": "cond_stage_model.model.transformer.",
    "bert": "cond_stage_model.transformer.token_emb.",
}  # fmt: skip


def autoencoder(kind: str = "ldm.models.autoencoder.AutoencoderKL") -> dict:
    """KL f8 with 4 channels, of all Stable Diffusions."""
    dd = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
          "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    return {"target": kind, "params": {"embed_dim": 4, "ddconfig": dd}}


def unet(**params: object) -> dict:
    common = {"out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
              "channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True, "transformer_depth": 1,
              "legacy": False}  # fmt: skip
    return {"target": f"{LATENT.removesuffix('models.diffusion.ddpm.')}modules.diffusionmodules.openaimodel.UNetModel",
            "params": common | params}


def latent_diffusion(cond_stage: dict, network: dict, kind: str = "LatentDiffusion", **params: object) -> dict:
    return {"model": {"target": f"{LATENT}{kind}", "params": {
        "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "channels": 4, "scale_factor": 0.18215,
        "conditioning_key": "crossattn", "cond_stage_config": cond_stage, "first_stage_config": autoencoder(),
        "unet_config": network, **params}}}  # fmt: skip


def stable_diffusion(version: int, inpainting: bool) -> dict:
    kind = {"kind": "LatentInpaintDiffusion", "conditioning_key": "hybrid"} if inpainting else {}
    channels = 9 if inpainting else 4
    if version == 1:
        text, network = {"target": f"{ENCODERS}FrozenCLIPEmbedder"}, unet(in_channels=channels, num_heads=8, context_dim=768)
    else:
        text = {"target": f"{ENCODERS}FrozenOpenCLIPEmbedder", "params": {"layer": "penultimate"}}
        network = unet(in_channels=channels, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True)
    return latent_diffusion(text, network, image_size=64, **kind)


def text_1p4b() -> dict:
    text = {"target": f"{ENCODERS}BERTEmbedder", "params": {"n_embed": 1280, "n_layer": 32}}
    return latent_diffusion(text, unet(in_channels=4, num_heads=8, context_dim=1280), image_size=32)


def sdxl(refiner: bool) -> dict:
    def text(name: str, **params: object) -> dict:
        return {"input_key": "txt", "target": f"{SGM}encoders.modules.{name}", "params": params}

    big = text("FrozenOpenCLIPEmbedder2", arch="ViT-bigG-14", layer="penultimate", always_return_pooled=True, legacy=False)
    last = "aesthetic_score" if refiner else "target_size_as_tuple"
    numbers = [{"input_key": key, "target": f"{SGM}encoders.modules.ConcatTimestepEmbedderND", "params": {"outdim": 256}}
               for key in ("original_size_as_tuple", "crop_coords_top_left", last)]  # fmt: skip
    clip = [] if refiner else [text("FrozenCLIPEmbedder", layer="hidden", layer_idx=11)]
    sizes = ({"model_channels": 384, "channel_mult": [1, 2, 4, 4], "transformer_depth": 4, "context_dim": 1280,
              "adm_in_channels": 2560} if refiner else
             {"channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 10], "context_dim": 2048, "adm_in_channels": 2816})
    network = unet(in_channels=4, num_classes="sequential", attention_resolutions=[4, 2], num_head_channels=64,
                   use_linear_in_transformer=True, **sizes)  # fmt: skip
    network["target"] = f"{SGM}diffusionmodules.openaimodel.UNetModel"
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": {
        "scale_factor": 0.13025, "network_config": network,
        "conditioner_config": {"params": {"emb_models": [*clip, big, *numbers]}},
        "denoiser_config": {"params": {
            "num_idx": 1000, "scaling_config": {"target": f"{SGM}diffusionmodules.denoiser_scaling.EpsScaling"},
            "discretization_config": {"target": f"{SGM}diffusionmodules.discretizer.LegacyDDPMDiscretization"}},
            "target": f"{SGM}diffusionmodules.denoiser.DiscreteDenoiser"},
        "first_stage_config": autoencoder("sgm.models.autoencoder.AutoencoderKL")}}}  # fmt: skip
