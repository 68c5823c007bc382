"""Real diffusers pipelines in miniature: every one builds and samples on a CPU in about a second.

What a step cache must get right is how a pipeline calls its transformer: one call per step or several, guidance as a
second call or as a larger batch, tensors or lists, one output or two. That differs from pipeline to pipeline and from
one diffusers release to the next, and no imitation would show it. So these are the classes of the installed diffusers
with small random transformers, small VAEs and real schedulers; prompts are ready-made random embeddings, no text
encoder runs, and the result is the final latents.

    for tiny in PIPELINES:
        latents = tiny.call(tiny.build(), 6, 0)

Heavy classes are imported inside the functions: a diffusers that lacks one loses that pipeline only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

TOKENS = 8  # length of every prompt
WIDTH = 32  # size of one prompt token
POOLED = 16  # size of a prompt's pooled embedding
TWO_ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


@dataclass(frozen=True)
class Tiny:
    """A pipeline in miniature: `build` makes it, `call(pipe, steps, seed)` runs it once and returns the latents."""

    name: str
    build: Callable[[], Any]
    call: Callable[[Any, int, int], Tensor]
    branches: int
    """Transformer calls per step that is run (where the latents start from an image, the first steps are not)."""


# Parts that the pipelines share


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """The same weights from every call, without touching the caller's random state."""

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(*args, **kwargs)

    return wrapper


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Make every weight matter: layers that start at zero would make outputs trivial and hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
    return module.eval()


def assemble(pipeline: Callable[..., Any], *absent: str, **parts: Any) -> Any:
    """The pipeline of these parts, silent; `absent` are the parts it can do without (text encoders, tokenizers)."""
    pipe = pipeline(**parts, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, steps: int, seed: int, **arguments: Any) -> Tensor:
    """One run of a pipeline, as latents."""
    arguments = {"output_type": "latent", "return_dict": False, **arguments}
    return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **arguments)[0]


def embedding(*shape: int, seed: int) -> Tensor:
    """Larger than a normal distribution's values, as those of text encoders are, so that prompts matter."""
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(padding: int, dtype: torch.dtype = torch.long) -> Tensor:
    return (torch.arange(TOKENS) < TOKENS - padding).to(dtype)[None]


def prompts(suffix: str = "") -> dict[str, Any]:
    """Embeddings of a prompt and of a negative prompt."""
    return {
        f"prompt_embeds{suffix}": embedding(1, TOKENS, WIDTH, seed=1),
        f"negative_prompt_embeds{suffix}": embedding(1, TOKENS, WIDTH, seed=2),
    }


def pooled() -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": embedding(1, POOLED, seed=3),
        "negative_pooled_prompt_embeds": embedding(1, POOLED, seed=4),
    }


def masks(name: str = "prompt_attention_mask", dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """Attention masks of the two prompts, of different lengths."""
    return {name: mask(padding=2, dtype=dtype), f"negative_{name}": mask(padding=4, dtype=dtype)}


def picture(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def flow(shift: float = 3.0, **options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, **options)


@functools.cache
@seeded
def image_vae(channels: int) -> Any:
    """Eight pixels to a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        shift_factor=0.1,
    ).eval()


# Wan and its relatives


@functools.cache
@seeded
def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan_scheduler(shift: float = 3.0) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def wan_size(**options: Any) -> dict[str, Any]:
    """The size of a Wan transformer."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 64,
        **options,
    }


def wan_transformer(seed: int = 0, **options: Any) -> Any:
    from diffusers import WanTransformer3DModel

    return shake(WanTransformer3DModel(**wan_size(**options)), seed)


@seeded
def wan() -> Any:
    from diffusers import WanPipeline

    parts = {"transformer": wan_transformer(), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return assemble(WanPipeline, "tokenizer", "text_encoder", **parts)


@seeded
def wan_two_experts() -> Any:
    from diffusers import WanPipeline

    experts = {"transformer": wan_transformer(0), "transformer_2": wan_transformer(1), "boundary_ratio": 0.55}
    # Without a shift the timesteps are even, and each expert gets half of the steps.
    parts = {"vae": wan_vae(), "scheduler": wan_scheduler(shift=1.0)}
    return assemble(WanPipeline, "tokenizer", "text_encoder", **experts, **parts)


@seeded
def wan_timesteps() -> Any:
    """Wan2.2 5B: every token is given its own timestep."""
    from diffusers import WanPipeline

    parts = {"transformer": wan_transformer(), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return assemble(WanPipeline, "tokenizer", "text_encoder", **parts, expand_timesteps=True)


def call_wan(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), height=32, width=32, num_frames=5, guidance_scale=5.0)


@seeded
def wan_image_to_video() -> Any:
    from diffusers import WanImageToVideoPipeline

    parts = {"transformer": wan_transformer(in_channels=36), "vae": wan_vae(), "scheduler": wan_scheduler()}
    absent = ("tokenizer", "text_encoder", "image_encoder", "image_processor")
    return assemble(WanImageToVideoPipeline, *absent, **parts)


def call_wan_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    size = {"height": 32, "width": 32, "num_frames": 5}
    return sample(pipe, steps, seed, **prompts(), image=picture(32, 32), **size, guidance_scale=5.0)


@seeded
def wan_vace() -> Any:
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    transformer = shake(WanVACETransformer3DModel(**wan_size(vace_layers=[0], vace_in_channels=96)))
    parts = {"transformer": transformer, "vae": wan_vae(), "scheduler": wan_scheduler()}
    return assemble(WanVACEPipeline, "tokenizer", "text_encoder", **parts)


@seeded
def skyreels() -> Any:
    from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

    parts = {"vae": wan_vae(), "scheduler": wan_scheduler()}
    transformer = shake(SkyReelsV2Transformer3DModel(**wan_size()))
    return assemble(SkyReelsV2Pipeline, "tokenizer", "text_encoder", transformer=transformer, **parts)


@seeded
def skyreels_forcing() -> Any:
    """Every latent frame has its own timestep and its own copy of the scheduler."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel

    parts = {"vae": wan_vae(), "scheduler": wan_scheduler()}
    transformer = shake(SkyReelsV2Transformer3DModel(**wan_size(inject_sample_info=True)))
    return assemble(SkyReelsV2DiffusionForcingPipeline, "tokenizer", "text_encoder", transformer=transformer, **parts)


def call_skyreels_forcing(pipe: Any, steps: int, seed: int) -> Tensor:
    size = {"height": 32, "width": 32, "num_frames": 5}
    return sample(pipe, steps, seed, prompt=None, **prompts(), **size, guidance_scale=6.0)


# HunyuanVideo and HunyuanVideo 1.5


@functools.cache
@seeded
def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()


def hunyuan_parts(**options: Any) -> dict[str, Any]:
    from diffusers import HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
        **options,
    )
    return {"transformer": shake(transformer), "vae": hunyuan_vae(), "scheduler": flow(7.0)}


@seeded
def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline

    return assemble(HunyuanVideoPipeline, *TWO_ENCODERS, **hunyuan_parts())


@seeded
def hunyuan_image_to_video() -> Any:
    from diffusers import HunyuanVideoImageToVideoPipeline

    parts = hunyuan_parts(image_condition_type="token_replace")
    return assemble(HunyuanVideoImageToVideoPipeline, *TWO_ENCODERS, "image_processor", **parts)


def call_hunyuan_video(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {**prompts(), **pooled(), **masks()}
    return sample(pipe, steps, seed, **text, height=32, width=32, num_frames=5, true_cfg_scale=3.0)


def call_hunyuan_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"image": picture(32, 32), "height": 32, "width": 32, "num_frames": 5, "true_cfg_scale": 3.0}
    return sample(pipe, steps, seed, **prompts(), **pooled(), **masks(), **options)


@functools.cache
@seeded
def hunyuan15_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo15

    return AutoencoderKLHunyuanVideo15(
        latent_channels=8, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
    ).eval()


def hunyuan15_parts() -> dict[str, Any]:
    """All but the encoders."""
    from diffusers import ClassifierFreeGuidance, HunyuanVideo15Transformer3DModel

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=17,  # latents, those of a first frame, and which frames these are
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        target_size=64,
    )
    guider = ClassifierFreeGuidance(guidance_scale=6.0)
    return {"transformer": shake(transformer), "vae": hunyuan15_vae(), "scheduler": flow(5.0), "guider": guider}


@seeded
def hunyuan15() -> Any:
    from diffusers import HunyuanVideo15Pipeline

    pipe = assemble(HunyuanVideo15Pipeline, *TWO_ENCODERS, **hunyuan15_parts())
    pipe.vision_num_semantic_tokens = 4  # zeros in place of an image's tokens; 729 of them would take most of the time
    return pipe


def hunyuan15_prompts() -> dict[str, Any]:
    return {**prompts(), **masks("prompt_embeds_mask"), **prompts(suffix="_2"), **masks("prompt_embeds_mask_2")}


def call_hunyuan15(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **hunyuan15_prompts(), height=64, width=64, num_frames=5)


@seeded
def hunyuan15_image_to_video() -> Any:
    from diffusers import HunyuanVideo15ImageToVideoPipeline
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=16)).eval()
    parts = {"image_encoder": encoder, "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32})}
    return assemble(HunyuanVideo15ImageToVideoPipeline, *TWO_ENCODERS, **hunyuan15_parts(), **parts)


def call_hunyuan15_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **hunyuan15_prompts(), image=picture(), num_frames=5)


# Qwen-Image


def qwen_parts(halvings: int) -> dict[str, Any]:
    """All but the text encoder; the VAE halves the size of an image so many times."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4, dim_mult=[1] * (halvings + 1), num_res_blocks=0, temperal_downsample=[False] * halvings
    )
    return {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": flow(use_dynamic_shifting=True)}


def qwen_prompts() -> dict[str, Any]:
    return {**prompts(), **masks("prompt_embeds_mask", torch.bool), "true_cfg_scale": 4.0}


@seeded
def qwen_image() -> Any:
    from diffusers import QwenImagePipeline

    return assemble(QwenImagePipeline, "text_encoder", "tokenizer", **qwen_parts(3))


def call_qwen_image(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **qwen_prompts(), height=64, width=64)


@seeded
def qwen_image_edit() -> Any:
    from diffusers import QwenImageEditPipeline

    # The pipeline enlarges every image to a million pixels: this VAE makes 64 tokens of them.
    return assemble(QwenImageEditPipeline, "text_encoder", "tokenizer", "processor", **qwen_parts(6))


def call_qwen_image_edit(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **qwen_prompts(), image=picture(), height=512, width=512)


# Flux, Flux 2 and Chroma


def flux_parts(in_channels: int = 64) -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow(use_dynamic_shifting=True)}


@seeded
def flux() -> Any:
    from diffusers import FluxPipeline

    return assemble(FluxPipeline, *TWO_ENCODERS, **flux_parts())


def call_flux(pipe: Any, steps: int, seed: int) -> Tensor:
    """Distilled guidance: a number that the transformer is given, so one call per step."""
    text = {"prompt_embeds": prompts()["prompt_embeds"], "pooled_prompt_embeds": pooled()["pooled_prompt_embeds"]}
    return sample(pipe, steps, seed, **text, height=64, width=64)


def call_flux_true_guidance(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), **pooled(), height=64, width=64, true_cfg_scale=3.0)


@seeded
def flux_image_to_image() -> Any:
    from diffusers import FluxImg2ImgPipeline

    return assemble(FluxImg2ImgPipeline, *TWO_ENCODERS, **flux_parts())


def call_flux_image_to_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """A strength of 0.6 leaves out the first `int(0.4 * steps)` steps."""
    options = {"image": picture(), "strength": 0.6, "height": 64, "width": 64, "true_cfg_scale": 3.0}
    return sample(pipe, steps, seed, **prompts(), **pooled(), **options)


@seeded
def flux_kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return assemble(FluxKontextPipeline, *TWO_ENCODERS, **flux_parts())


def call_flux_kontext(pipe: Any, steps: int, seed: int) -> Tensor:
    size = {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False}
    return sample(pipe, steps, seed, **prompts(), **pooled(), image=picture(), **size, true_cfg_scale=3.0)


@seeded
def flux_fill() -> Any:
    from diffusers import FluxFillPipeline

    # Latents, those of the masked image, and the mask at full resolution.
    return assemble(FluxFillPipeline, *TWO_ENCODERS, **flux_parts(in_channels=64 + 64 + 256))


def call_flux_fill(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {"prompt_embeds": prompts()["prompt_embeds"], "pooled_prompt_embeds": pooled()["pooled_prompt_embeds"]}
    return sample(pipe, steps, seed, **text, image=picture(), mask_image=picture().convert("L"), height=64, width=64)


def flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=8
    ).eval()
    return {"transformer": shake(transformer), "vae": vae, "scheduler": flow(use_dynamic_shifting=True)}


@seeded
def flux2() -> Any:
    from diffusers import Flux2Pipeline

    return assemble(Flux2Pipeline, "text_encoder", "tokenizer", **flux2_parts(guidance_embeds=True))


def call_flux2(pipe: Any, steps: int, seed: int) -> Tensor:
    """Distilled guidance."""
    return sample(pipe, steps, seed, prompt_embeds=prompts()["prompt_embeds"], height=64, width=64)


def call_flux2_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """With a reference image, whose tokens are appended to the sequence."""
    return sample(pipe, steps, seed, prompt_embeds=prompts()["prompt_embeds"], image=picture(), height=64, width=64)


@seeded
def flux2_klein() -> Any:
    from diffusers import Flux2KleinPipeline

    return assemble(Flux2KleinPipeline, "text_encoder", "tokenizer", **flux2_parts(guidance_embeds=False))


def call_flux2_klein(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), height=64, width=64, guidance_scale=4.0)


@seeded
def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow()}
    return assemble(ChromaPipeline, "text_encoder", "tokenizer", **parts)


def call_chroma(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {**prompts(), **masks(dtype=torch.bool)}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=4.0)


# Images, continued


@seeded
def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow()}
    return assemble(ZImagePipeline, "text_encoder", "tokenizer", **parts)


def call_z_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """Prompts of different lengths, as lists."""
    text = {name: [embeds[0, :length]] for (name, embeds), length in zip(prompts().items(), (8, 5), strict=True)}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=4.0)


@seeded
def stable_diffusion_3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    absent = (*TWO_ENCODERS, "text_encoder_3", "tokenizer_3")
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow()}
    return assemble(StableDiffusion3Pipeline, *absent, **parts)


def call_stable_diffusion_3(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), **pooled(), height=64, width=64, guidance_scale=5.0)


def call_stable_diffusion_3_skipping(pipe: Any, steps: int, seed: int) -> Tensor:
    """Skip-layer guidance, over all steps: a batch of two and then a batch of one with a block left out."""
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    text = {**prompts(), **pooled()}
    return sample(pipe, steps, seed, **text, **skipping, height=64, width=64, guidance_scale=5.0)


@seeded
def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    transformer = CogView4Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": scheduler}
    return assemble(CogView4Pipeline, "tokenizer", "text_encoder", **parts)


def call_image(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), height=64, width=64, guidance_scale=5.0)


def sana_parts(**options: Any) -> dict[str, Any]:
    """All but the scheduler and the text encoder."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        **options,
    )
    layers = {f"{part}_layers_per_block": (1, 1, 1, 1) for part in ("encoder", "decoder")}
    channels = {f"{part}_block_out_channels": (8, 8, 8, 8) for part in ("encoder", "decoder")}
    scales = {f"{part}_qkv_multiscales": ((), (), (), ()) for part in ("encoder", "decoder")}
    vae = AutoencoderDC(latent_channels=4, **layers, **channels, **scales).eval()
    return {"transformer": shake(transformer), "vae": vae}


@seeded
def sana() -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return assemble(SanaPipeline, "tokenizer", "text_encoder", **sana_parts(), scheduler=scheduler)


@seeded
def sana_sprint() -> Any:
    from diffusers import SanaSprintPipeline, SCMScheduler

    parts = sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return assemble(SanaSprintPipeline, "tokenizer", "text_encoder", **parts, scheduler=SCMScheduler())


def call_sana_sprint(pipe: Any, steps: int, seed: int) -> Tensor:
    """Distilled guidance, and an angle for a timestep."""
    text = {name: tensor for name, tensor in {**prompts(), **masks()}.items() if not name.startswith("negative")}
    options = {"height": 64, "width": 64, "intermediate_timesteps": None, "use_resolution_binning": False}
    return sample(pipe, steps, seed, **text, **options)


def call_masked_image(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    text = {**prompts(), **masks()}
    return sample(pipe, steps, seed, **text, **options, height=64, width=64, guidance_scale=4.5)


def call_binned_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """For pipelines whose negative prompt is "" and whose sizes come from a list, unless told otherwise."""
    return call_masked_image(pipe, steps, seed, negative_prompt=None, use_resolution_binning=False)


@seeded
def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 32, 32),
        cap_feat_dim=WIDTH,
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow(use_dynamic_shifting=True)}
    return assemble(Lumina2Pipeline, "text_encoder", "tokenizer", **parts)


@seeded
def lumina() -> Any:
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline

    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=WIDTH,
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": flow()}
    return assemble(LuminaPipeline, "text_encoder", "tokenizer", **parts)


def call_lumina(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_masked_image(pipe, steps, seed, clean_caption=False)


def pixart_parts() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    return {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": DPMSolverMultistepScheduler()}


@seeded
def pixart_alpha() -> Any:
    from diffusers import PixArtAlphaPipeline

    return assemble(PixArtAlphaPipeline, "tokenizer", "text_encoder", **pixart_parts())


@seeded
def pixart_sigma() -> Any:
    from diffusers import PixArtSigmaPipeline

    return assemble(PixArtSigmaPipeline, "tokenizer", "text_encoder", **pixart_parts())


@seeded
def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": flow(1.73)}
    return assemble(AuraFlowPipeline, "tokenizer", "text_encoder", **parts)


@seeded
def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=POOLED,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    absent = (*TWO_ENCODERS, "text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4")
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow()}
    pipe = assemble(HiDreamImagePipeline, *absent, **parts)
    pipe.default_sample_size = 8  # whatever size is asked for, the pipeline scales it to this area
    return pipe


def call_hidream(pipe: Any, steps: int, seed: int) -> Tensor:
    llama = {name: embeds[None].repeat(2, 1, 1, 1) for name, embeds in prompts(suffix="_llama3").items()}
    text = {**prompts(suffix="_t5"), **llama, **pooled()}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=5.0)


@seeded
def ernie_image() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": flow()}
    return assemble(ErnieImagePipeline, "text_encoder", "tokenizer", **parts)


def call_ernie_image(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {name: [embeds[0]] for name, embeds in prompts().items()}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=4.0)


@seeded
def bria() -> Any:
    from diffusers import BriaPipeline, BriaTransformer2DModel

    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": flow(use_dynamic_shifting=True)}
    return assemble(BriaPipeline, "text_encoder", "tokenizer", **parts)


@seeded
def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=POOLED,
        text_len=TOKENS,
        text_len_t5=TOKENS,
    )
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "text_encoder_2", "tokenizer_2")
    parts = {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": DDPMScheduler(clip_sample=False)}
    return assemble(HunyuanDiTPipeline, *absent, **parts, requires_safety_checker=False)


def call_hunyuan_dit(pipe: Any, steps: int, seed: int) -> Tensor:
    second = {**prompts(suffix="_2"), **masks("prompt_attention_mask_2")}
    return call_masked_image(pipe, steps, seed, **second, use_resolution_binning=False)


@seeded
def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=2, sample_size=8
    )
    return assemble(
        DiTPipeline, transformer=shake(transformer), vae=image_vae(4), scheduler=DDIMScheduler(clip_sample=False)
    )


def call_dit(pipe: Any, steps: int, seed: int) -> Tensor:
    """An image: this pipeline keeps its latents to itself."""
    return torch.from_numpy(sample(pipe, steps, seed, class_labels=[7], guidance_scale=4.0, output_type="np"))


# Videos, continued

COGVIDEO_SCHEDULE: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def cogvideo_parts(in_channels: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_height=64, sample_width=64
    )
    return {"transformer": shake(transformer), "vae": vae.eval()}


@seeded
def cogvideo() -> Any:
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

    parts = {**cogvideo_parts(16), "scheduler": CogVideoXDPMScheduler(**COGVIDEO_SCHEDULE)}
    return assemble(CogVideoXPipeline, "tokenizer", "text_encoder", **parts)


def call_video(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    size = {"height": 64, "width": 64, "num_frames": 5}
    return sample(pipe, steps, seed, **prompts(), **{**size, **options}, guidance_scale=6.0)


@seeded
def cogvideo_image_to_video() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXImageToVideoPipeline

    parts = {**cogvideo_parts(32), "scheduler": CogVideoXDDIMScheduler(**COGVIDEO_SCHEDULE)}
    return assemble(CogVideoXImageToVideoPipeline, "tokenizer", "text_encoder", **parts)


def call_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_video(pipe, steps, seed, image=picture())


@seeded
def latte() -> Any:
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=WIDTH,
        video_length=2,
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(4), "scheduler": DDIMScheduler(clip_sample=False)}
    return assemble(LattePipeline, "tokenizer", "text_encoder", **parts)


def call_latte(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"height": 64, "width": 64, "video_length": 2, "negative_prompt": None, "clean_caption": False}
    return sample(pipe, steps, seed, **prompts(), **options, guidance_scale=7.5)


def ltx_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": flow(use_dynamic_shifting=True)}


@seeded
def ltx() -> Any:
    from diffusers import LTXPipeline

    return assemble(LTXPipeline, "text_encoder", "tokenizer", **ltx_parts())


def call_ltx(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return call_video(pipe, steps, seed, **masks(), num_frames=9, height=128, width=128, **options)


@seeded
def ltx_image_to_video() -> Any:
    """Every token is given its own timestep; those of the first frame are done from the start."""
    from diffusers import LTXImageToVideoPipeline

    return assemble(LTXImageToVideoPipeline, "text_encoder", "tokenizer", **ltx_parts())


def call_ltx_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_ltx(pipe, steps, seed, image=picture(128, 128))


@seeded
def mochi() -> Any:
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=POOLED,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        max_sequence_length=TOKENS,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        add_attention_block=(False,) * 5,
    )
    parts = {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": flow(1.0, invert_sigmas=True)}
    return assemble(MochiPipeline, "text_encoder", "tokenizer", **parts)


def call_mochi(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_video(pipe, steps, seed, **masks(dtype=torch.bool), num_frames=7)


@seeded
def allegro() -> Any:
    from diffusers import (
        AllegroPipeline,
        AllegroTransformer3DModel,
        AutoencoderKLAllegro,
        EulerAncestralDiscreteScheduler,
    )

    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=2,
        caption_channels=WIDTH,
    )
    vae = AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    parts = {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": EulerAncestralDiscreteScheduler()}
    return assemble(AllegroPipeline, "tokenizer", "text_encoder", **parts)


def call_allegro(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"num_frames": 8, "negative_prompt": None, "clean_caption": False}
    return call_video(pipe, steps, seed, **masks(), **options)


class Unchecked:
    """The pipelines insist on a safety checker; latents that are never decoded leave it nothing to do but move."""

    def to(self, device: Any) -> None:
        pass


def cosmos_transformer() -> Any:
    from diffusers import CosmosTransformer3DModel

    transformer = CosmosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # it would need torchvision
    )
    return shake(transformer)


@seeded
def cosmos() -> Any:
    from diffusers import AutoencoderKLCosmos, CosmosTextToWorldPipeline, EDMEulerScheduler

    vae = AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )
    sigmas = {"sigma_min": 0.002, "sigma_max": 80, "sigma_data": 0.5, "sigma_schedule": "karras"}
    scheduler = EDMEulerScheduler(**sigmas, final_sigmas_type="sigma_min")
    parts = {"transformer": cosmos_transformer(), "vae": vae.eval(), "scheduler": scheduler}
    return assemble(CosmosTextToWorldPipeline, "text_encoder", "tokenizer", **parts, safety_checker=Unchecked())


@seeded
def cosmos2() -> Any:
    from diffusers import Cosmos2TextToImagePipeline

    parts = {"transformer": cosmos_transformer(), "vae": wan_vae(), "scheduler": flow(use_karras_sigmas=True)}
    return assemble(Cosmos2TextToImagePipeline, "text_encoder", "tokenizer", **parts, safety_checker=Unchecked())


def call_cosmos(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_video(pipe, steps, seed, num_frames=9)


def kandinsky5_parts(visual_cond: bool) -> dict[str, Any]:
    from diffusers import Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=WIDTH,
        in_text_dim2=POOLED,
        time_dim=16,
        out_visual_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=visual_cond,
    )
    return {"transformer": shake(transformer), "vae": hunyuan_vae(), "scheduler": flow(5.0)}


@seeded
def kandinsky5() -> Any:
    from diffusers import Kandinsky5T2VPipeline

    return assemble(Kandinsky5T2VPipeline, *TWO_ENCODERS, **kandinsky5_parts(visual_cond=False))


@seeded
def kandinsky5_image_to_video() -> Any:
    from diffusers import Kandinsky5I2VPipeline

    return assemble(Kandinsky5I2VPipeline, *TWO_ENCODERS, **kandinsky5_parts(visual_cond=True))


def call_kandinsky5(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    clip = {f"{name.replace('pooled_', '')}_clip": embeds for name, embeds in pooled().items()}
    lengths = {f"{sign}prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32) for sign in ("", "negative_")}
    text = {**prompts(suffix="_qwen"), **clip, **lengths}
    options = {"height": 64, "width": 64, "num_frames": 5, **options}
    return sample(pipe, steps, seed, **text, **options, guidance_scale=5.0)


def call_kandinsky5_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    # The first four latent frames are made to look like those after them, so there have to be more.
    return call_kandinsky5(pipe, steps, seed, image=picture(), num_frames=21)


@seeded
def easy_animate() -> Any:
    from diffusers import AutoencoderKLMagvit, EasyAnimatePipeline, EasyAnimateTransformer3DModel

    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=16,
        text_embed_dim=WIDTH,
    )
    vae = AutoencoderKLMagvit(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    parts = {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": flow(5.0)}
    return assemble(EasyAnimatePipeline, "text_encoder", "tokenizer", **parts)


def call_easy_animate(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_video(pipe, steps, seed, **masks())


# Sound


def ltx2_transformer() -> Any:
    from diffusers import LTX2VideoTransformer3DModel

    return shake(
        LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
        )
    )


@seeded
def ltx2() -> Any:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2Pipeline
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    layers = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1)}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    video_vae = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32), **layers, **ratios
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 2), num_res_blocks=1, latent_channels=2, mel_bins=16
    )
    heads = {f"{kind}_connector_num_attention_heads": 2 for kind in ("video", "audio")}
    width = {f"{kind}_connector_attention_head_dim": WIDTH // 2 for kind in ("video", "audio")}
    depth = {f"{kind}_connector_num_layers": 1 for kind in ("video", "audio")}
    registers = {f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=1, **heads, **width, **depth, **registers
    )
    parts = {"vae": video_vae.eval(), "audio_vae": audio_vae.eval(), "connectors": shake(connectors)}
    parts |= {"transformer": ltx2_transformer(), "scheduler": flow(use_dynamic_shifting=True)}
    return assemble(LTX2Pipeline, "text_encoder", "tokenizer", "vocoder", **parts)


def call_ltx2(pipe: Any, steps: int, seed: int) -> Tensor:
    """Video and sound in one row, so that neither can go wrong unseen; all three kinds of guidance."""
    generator = torch.Generator().manual_seed(seed)
    size = {"height": 128, "width": 128, "num_frames": 9}
    options = {"spatio_temporal_guidance_blocks": [1], "output_type": "latent", "return_dict": False}
    outputs = pipe(num_inference_steps=steps, generator=generator, **prompts(), **masks(), **size, **options)
    return torch.cat([output.flatten() for output in outputs])


@seeded
def stable_audio() -> Any:
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    )
    parts = {"transformer": shake(transformer), "projection_model": shake(projection), "vae": vae.eval()}
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500, sigma_data=1.0)
    return assemble(StableAudioPipeline, "text_encoder", "tokenizer", **parts, scheduler=scheduler)


def call_stable_audio(pipe: Any, steps: int, seed: int) -> Tensor:
    audible = {"attention_mask": mask(padding=2), "negative_attention_mask": mask(padding=4)}
    return sample(pipe, steps, seed, **prompts(), **audible, audio_end_in_s=2.0, guidance_scale=7.0)


PIPELINES: tuple[Tiny, ...] = (
    Tiny("WanPipeline", wan, call_wan, 2),
    Tiny("WanPipeline (two experts)", wan_two_experts, call_wan, 2),
    Tiny("WanPipeline (a timestep per token)", wan_timesteps, call_wan, 2),
    Tiny("WanImageToVideoPipeline", wan_image_to_video, call_wan_image_to_video, 2),
    Tiny("WanVACEPipeline", wan_vace, call_wan, 2),
    Tiny("SkyReelsV2Pipeline", skyreels, call_wan, 2),
    Tiny("SkyReelsV2DiffusionForcingPipeline", skyreels_forcing, call_skyreels_forcing, 2),
    Tiny("HunyuanVideoPipeline", hunyuan_video, call_hunyuan_video, 2),
    Tiny("HunyuanVideoImageToVideoPipeline", hunyuan_image_to_video, call_hunyuan_image_to_video, 2),
    Tiny("HunyuanVideo15Pipeline", hunyuan15, call_hunyuan15, 2),
    Tiny("HunyuanVideo15ImageToVideoPipeline", hunyuan15_image_to_video, call_hunyuan15_image_to_video, 2),
    Tiny("QwenImagePipeline", qwen_image, call_qwen_image, 2),
    Tiny("QwenImageEditPipeline", qwen_image_edit, call_qwen_image_edit, 2),
    Tiny("FluxPipeline", flux, call_flux, 1),
    Tiny("FluxPipeline (true guidance)", flux, call_flux_true_guidance, 2),
    Tiny("FluxImg2ImgPipeline (strength 0.6)", flux_image_to_image, call_flux_image_to_image, 2),
    Tiny("FluxKontextPipeline", flux_kontext, call_flux_kontext, 2),
    Tiny("FluxFillPipeline", flux_fill, call_flux_fill, 1),
    Tiny("Flux2Pipeline", flux2, call_flux2, 1),
    Tiny("Flux2Pipeline (reference image)", flux2, call_flux2_image, 1),
    Tiny("Flux2KleinPipeline", flux2_klein, call_flux2_klein, 2),
    Tiny("ChromaPipeline", chroma, call_chroma, 2),
    Tiny("ZImagePipeline", z_image, call_z_image, 1),
    Tiny("StableDiffusion3Pipeline", stable_diffusion_3, call_stable_diffusion_3, 1),
    Tiny("StableDiffusion3Pipeline (skip-layer guidance)", stable_diffusion_3, call_stable_diffusion_3_skipping, 2),
    Tiny("CogView4Pipeline", cogview4, call_image, 2),
    Tiny("SanaPipeline", sana, call_binned_image, 1),
    Tiny("SanaSprintPipeline", sana_sprint, call_sana_sprint, 1),
    Tiny("LuminaPipeline", lumina, call_lumina, 1),
    Tiny("Lumina2Pipeline", lumina2, call_masked_image, 2),
    Tiny("PixArtAlphaPipeline", pixart_alpha, call_binned_image, 1),
    Tiny("PixArtSigmaPipeline", pixart_sigma, call_binned_image, 1),
    Tiny("AuraFlowPipeline", aura_flow, call_masked_image, 1),
    Tiny("HiDreamImagePipeline", hidream, call_hidream, 1),
    Tiny("ErnieImagePipeline", ernie_image, call_ernie_image, 1),
    Tiny("BriaPipeline", bria, call_image, 1),
    Tiny("HunyuanDiTPipeline", hunyuan_dit, call_hunyuan_dit, 1),
    Tiny("DiTPipeline", dit, call_dit, 1),
    Tiny("CogVideoXPipeline", cogvideo, call_video, 1),
    Tiny("CogVideoXImageToVideoPipeline", cogvideo_image_to_video, call_image_to_video, 1),
    Tiny("LattePipeline", latte, call_latte, 1),
    Tiny("LTXPipeline", ltx, call_ltx, 1),
    Tiny("LTXImageToVideoPipeline", ltx_image_to_video, call_ltx_image_to_video, 1),
    Tiny("MochiPipeline", mochi, call_mochi, 1),
    Tiny("AllegroPipeline", allegro, call_allegro, 1),
    Tiny("CosmosTextToWorldPipeline", cosmos, call_cosmos, 2),
    Tiny("Cosmos2TextToImagePipeline", cosmos2, call_image, 2),
    Tiny("Kandinsky5T2VPipeline", kandinsky5, call_kandinsky5, 2),
    Tiny("Kandinsky5I2VPipeline", kandinsky5_image_to_video, call_kandinsky5_image_to_video, 2),
    Tiny("EasyAnimatePipeline", easy_animate, call_easy_animate, 1),
    Tiny("LTX2Pipeline", ltx2, call_ltx2, 3),
    Tiny("StableAudioPipeline", stable_audio, call_stable_audio, 1),
)
