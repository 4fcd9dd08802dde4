"""Pipelines that diffusers itself makes, tiny and with random weights: what our readers and writers are held against."""

from pathlib import Path

import torch

from ldm.conditioners.encoders import find

TOKENIZER = Path(__file__).parents[1] / "data" / "parity" / "diffusers_models" / "tokenizer"
PROMPT, STEPS, SCALE = "a photo of a cat", 3, 4.0
SMALL = dict(block_out_channels=(32, 64), layers_per_block=1, sample_size=16)
CROSS = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
SELF = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
NUMBERS = {"original_size": [[32, 32]], "crop": [[0, 0]], "target_size": [[32, 32]]}


def saved(make, folder):
    """A pipeline, the same every time, and its folder as diffusers writes it."""
    torch.manual_seed(0)
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def perturbed(module):
    """Weights everywhere, those included that start at zero or one."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return module.eval()


def vae(channels=4):
    from diffusers import AutoencoderKL

    return perturbed(AutoencoderKL(block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, scaling_factor=0.7,
                                   up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=channels))  # fmt: skip


def clip(projection=None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(TOKENIZER)
    config = CLIPTextConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                            num_attention_heads=4, hidden_act="gelu" if projection else "quick_gelu",
                            projection_dim=projection or 32, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                            pad_token_id=words.pad_token_id)  # fmt: skip
    return perturbed((CLIPTextModelWithProjection if projection else CLIPTextModel)(config)), words


def text_pipeline(**unet):
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel

    text, words = clip()
    network = perturbed(UNet2DConditionModel(**SMALL, **CROSS, cross_attention_dim=32, attention_head_dim=4, **unet))
    schedule = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1)
    kind = StableDiffusionInpaintPipeline if unet.get("in_channels") == 9 else StableDiffusionPipeline
    return kind(vae=vae(), text_encoder=text, tokenizer=words, unet=network, scheduler=schedule, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)  # fmt: skip


def xl_pipeline():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    (text, words), (second, words_2) = clip(), clip(48)
    betas = {key: value for key, value in BETAS.items() if key != "clip_sample"}
    return StableDiffusionXLPipeline(vae=vae(), text_encoder=text, text_encoder_2=second, tokenizer=words, tokenizer_2=words_2,
                                     unet=xl_network(), scheduler=EulerDiscreteScheduler(
                                         **betas, timestep_spacing="leading", steps_offset=1))  # fmt: skip


def unconditional_pipeline():
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    network = perturbed(UNet2DModel(in_channels=3, out_channels=3, **SMALL, **SELF, attention_head_dim=16))
    codes = perturbed(VQModel(block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, num_vq_embeddings=64,
                              up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3, scaling_factor=1.0))  # fmt: skip
    return LDMPipeline(vqvae=codes, unet=network, scheduler=DDIMScheduler(**BETAS))


def dit_pipeline():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = perturbed(DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
                                              num_layers=2, sample_size=16, patch_size=2, num_embeds_ada_norm=1000))  # fmt: skip
    schedule = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    return DiTPipeline(transformer=network, vae=vae(), scheduler=schedule)


def bert_pipeline():
    from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    config = LDMBertConfig(vocab_size=30522, encoder_layers=2, encoder_ffn_dim=128, d_model=32)
    network = perturbed(UNet2DConditionModel(**SMALL, **CROSS, cross_attention_dim=32, attention_head_dim=4))
    return LDMTextToImagePipeline(vqvae=vae(), bert=perturbed(LDMBertModel(config)), unet=network,
                                  tokenizer=BertTokenizer.from_pretrained(find("minilm")),
                                  scheduler=DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1))  # fmt: skip


def start(channels=4):
    return torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(3))


def text_call(pipeline, **more):
    side = 128 if "LDM" in type(pipeline).__name__ else 32
    return pipeline(PROMPT, num_inference_steps=STEPS, guidance_scale=SCALE, latents=start(), height=side, width=side,
                    output_type="np", **more).images  # fmt: skip


def seeded_call(pipeline, **more):
    return pipeline(generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np", **more).images


def betas(**more):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1, **more)


def conditional(channels=4, out=4, heads=4, **more):
    """The network of a text-to-image pipeline."""
    from diffusers import UNet2DConditionModel

    sizes = SMALL | CROSS | {"cross_attention_dim": 32, "attention_head_dim": heads} | more
    return perturbed(UNet2DConditionModel(in_channels=channels, out_channels=out, **sizes))


def without_checker(kind, **parts):
    """A pipeline of Stable Diffusion's family, with the parts that all have; ``parts``: those of its own."""
    text, words = clip()
    given = {"vae": vae(), "text_encoder": text, "tokenizer": words, "scheduler": betas(), "safety_checker": None,
             "feature_extractor": None, "requires_safety_checker": False}  # fmt: skip
    return kind(**given | parts)


def v_pipeline():
    """Stable Diffusion 2.x at 768: v, matrices around its transformers, another number of heads on each level."""
    from diffusers import StableDiffusionPipeline

    network = conditional(heads=(2, 4), use_linear_projection=True)
    return without_checker(StableDiffusionPipeline, unet=network, scheduler=betas(prediction_type="v_prediction"))


def inpainting_pipeline():
    return text_pipeline(in_channels=9)


def pix2pix_pipeline():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return without_checker(StableDiffusionInstructPix2PixPipeline, unet=conditional(8))


def depth_pipeline():
    from diffusers import StableDiffusionDepth2ImgPipeline

    text, words = clip()
    return StableDiffusionDepth2ImgPipeline(vae=vae(), text_encoder=text, tokenizer=words, unet=conditional(5),
                                            scheduler=betas(), depth_estimator=None, feature_extractor=None)  # fmt: skip


def upscaling_pipeline():
    """Stable Diffusion's x4 upscaler: v, a noisy small picture, its noise's level as one of 100 classes."""
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    text, words = clip()
    return StableDiffusionUpscalePipeline(
        vae=vae(), text_encoder=text, tokenizer=words, unet=conditional(7, num_class_embeds=100, use_linear_projection=True),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02),
        scheduler=betas(prediction_type="v_prediction"), max_noise_level=35)  # fmt: skip


def unclip_pipeline():
    """Stable unCLIP: an embedding of 12 numbers, and as many of its noise's level."""
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    text, words = clip()
    sees = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                                          num_attention_heads=2, image_size=16, patch_size=8,
                                                          projection_dim=12))  # fmt: skip
    network = conditional(class_embed_type="projection", projection_class_embeddings_input_dim=24)
    return StableUnCLIPImg2ImgPipeline(
        vae=vae(), text_encoder=text, tokenizer=words, unet=network, scheduler=betas(prediction_type="v_prediction"),
        feature_extractor=None, image_encoder=perturbed(sees), image_normalizer=perturbed(StableUnCLIPImageNormalizer(12)),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"))  # fmt: skip


def xl_network(channels=4, tokens=64, vector=48 + 6 * 8):
    from diffusers import UNet2DConditionModel

    return perturbed(UNet2DConditionModel(
        in_channels=channels, **SMALL, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=tokens, attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=vector))  # fmt: skip


def refiner_pipeline():
    from diffusers import StableDiffusionXLImg2ImgPipeline

    second, words = clip(48)
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=second, tokenizer=None, tokenizer_2=words, scheduler=betas(),
        unet=xl_network(tokens=32, vector=48 + 5 * 8), requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False)  # fmt: skip


def xl_inpainting_pipeline():
    from diffusers import StableDiffusionXLInpaintPipeline

    (text, words), (second, words_2) = clip(), clip(48)
    return StableDiffusionXLInpaintPipeline(vae=vae(), text_encoder=text, text_encoder_2=second, tokenizer=words,
                                            tokenizer_2=words_2, unet=xl_network(9), scheduler=betas())  # fmt: skip


def superresolution_pipeline():
    """LDM's, of pixels beside codes."""
    from diffusers import LDMSuperResolutionPipeline, UNet2DModel, VQModel

    network = perturbed(UNet2DModel(in_channels=6, out_channels=3, **SMALL, **SELF, attention_head_dim=16))
    codes = perturbed(VQModel(block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, num_vq_embeddings=64,
                              up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3, scaling_factor=1.0))  # fmt: skip
    return LDMSuperResolutionPipeline(vqvae=codes, unet=network, scheduler=betas())


def pixel_pipeline():
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    network = perturbed(UNet2DModel(in_channels=3, out_channels=3, **SMALL, **SELF, attention_head_dim=16))
    return DDIMPipeline(unet=network, scheduler=DDIMScheduler())
