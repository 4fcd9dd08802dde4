"""What CompVis' and Stability's repositories say of each kind of model, with the sizes of tiny_pipelines: keys of inference, of
training, and those that say nothing, as they stand side by side there."""

LDM, SGM = "ldm.models.diffusion.ddpm.", "sgm.modules."
DD = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
      "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
IDENTITY = {"target": "torch.nn.Identity"}
UNET = {"image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
        "num_res_blocks": 1, "channel_mult": [1, 2], "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 32,
        "use_checkpoint": True, "legacy": False}  # fmt: skip
TWO = {"use_fp16": True, "use_linear_in_transformer": True}
NOISE = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def latent(kind, unet, **params):
    return {"model": {"base_learning_rate": 1e-4, "target": f"{LDM}{kind}", "params": {
        "linear_start": 0.00085, "linear_end": 0.012, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 16, "channels": 4, "cond_stage_trainable": False,
        "conditioning_key": "crossattn", "monitor": "val/loss_simple_ema", "scale_factor": 0.7, "use_ema": False,
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"warm_up_steps": [10000], "f_max": [1.0]}},
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET | unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": DD, "lossconfig": IDENTITY}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": "tokenizer"}},
        **params}}}  # fmt: skip


def embedder(name, key="txt", **params):
    return {"is_trainable": False, "input_key": key, "target": f"{SGM}encoders.modules.{name}", "params": params}


def engine(embedders, unet):
    numbers = [embedder("ConcatTimestepEmbedderND", key, outdim=8) for key in embedders if isinstance(key, str)]
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": {
        "scale_factor": 0.7, "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{SGM}diffusionmodules.denoiser.DiscreteDenoiser", "params": {
            "num_idx": 1000, "scaling_config": {"target": f"{SGM}diffusionmodules.denoiser_scaling.EpsScaling"},
            "weighting_config": {"target": f"{SGM}diffusionmodules.denoiser_weighting.EpsWeighting"},
            "discretization_config": {"target": f"{SGM}diffusionmodules.discretizer.LegacyDDPMDiscretization"}}},
        "network_config": {"target": f"{SGM}diffusionmodules.openaimodel.UNetModel", "params": {
            "num_classes": "sequential", "use_checkpoint": True, "in_channels": 4, "out_channels": 4, "model_channels": 32,
            "attention_resolutions": [2], "num_res_blocks": 1, "channel_mult": [1, 2], "num_head_channels": 16,
            "use_linear_in_transformer": True, "transformer_depth": [1, 2], "spatial_transformer_attn_type": "softmax-xformers",
            **unet}},
        "conditioner_config": {"target": f"{SGM}GeneralConditioner", "params": {
            "emb_models": [each for each in embedders if not isinstance(each, str)] + numbers}},
        "first_stage_config": {"target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper", "params": {
            "embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": DD | {"attn_type": "vanilla-xformers"}, "lossconfig": IDENTITY}},
    }}}  # fmt: skip


BIG = embedder("FrozenOpenCLIPEmbedder2", arch="tiny", version="laion2b_s39b_b160k", freeze=True, layer="penultimate",
               always_return_pooled=True, legacy=False)  # fmt: skip
SIZES = ("original_size_as_tuple", "crop_coords_top_left")
YAML = {
    "v": latent("LatentDiffusion", {**TWO, "num_head_channels": 16}, parameterization="v"),
    "inpainting": latent("LatentInpaintDiffusion", {"in_channels": 9, "num_heads": 4}, conditioning_key="hybrid", finetune_keys=None,
                         concat_keys=["mask", "masked_image"]),
    "pix2pix": latent("LatentDiffusion", {"in_channels": 8, "num_heads": 4}, first_stage_key="edited", cond_stage_key="edit",
                      conditioning_key="hybrid", load_ema=True),
    "depth": latent("LatentDepth2ImageDiffusion", {"in_channels": 5, "num_heads": 4}, conditioning_key="hybrid", finetune_keys=None,
                    depth_stage_config={"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}}),
    "upscaler": latent("LatentUpscaleDiffusion", {**TWO, "in_channels": 7, "num_classes": 100, "num_heads": 4, "disable_middle_self_attn": False,
                                                  "disable_self_attentions": [False, False]},
                       scale_factor=0.08333, parameterization="v", conditioning_key="hybrid-adm", low_scale_key="lr", low_scale_config={
                           "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
                           "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 0.02}, "max_noise_level": 35}}),
    "unclip": latent("ImageEmbeddingConditionedLatentDiffusion", {"num_classes": "sequential", "adm_in_channels": 24, "num_heads": 4},
                     parameterization="v", conditioning_key="crossattn-adm", embedding_dropout=0.25,
                     embedder_config={"target": "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder"},
                     noise_aug_config={"target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",
                                       "params": {"timestep_dim": 12, "noise_schedule_config": NOISE}}),
    "xl": engine([embedder("FrozenCLIPEmbedder", layer="hidden", layer_idx=2, version="tokenizer"), BIG, *SIZES, "target_size_as_tuple"],
                 {"adm_in_channels": 96, "context_dim": 64}),
    "refiner": engine([{**BIG, "legacy_ucg_value": ""}, *SIZES, "aesthetic_score"], {"adm_in_channels": 88, "context_dim": 32}),
}  # fmt: skip
