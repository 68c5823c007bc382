"""Real diffusers Modular pipelines in miniature: every one samples on a CPU in about a second.

A modular pipeline is assembled from blocks. These hold the blocks that denoise and those that make ready for it (the
`CoreDenoiseStep` of a family), with small random transformers and real schedulers; prompts and images are ready-made
random embeddings, and the result is the final latents. Guidance is by the family's own guider.

    for tiny in MODULAR:
        latents = tiny.call(tiny.build(), 6, 0)

As in `tiny_pipelines`, a diffusers that lacks a family loses that pipeline only. Of each family the main pipelines are
here; not tried are turbo and distilled checkpoints (Flux 2 Klein is), Helios' pyramids, Qwen-Image's edit plus and
layers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from tiny_pipelines import (
    TOKENS,
    WIDTH,
    Tiny,
    cosmos_transformer,
    embedding,
    ernie_image,
    flow,
    flux2_parts,
    flux_parts,
    hunyuan15_parts,
    ltx2,
    ltx2_transformer,
    ltx_parts,
    mask,
    masks,
    pooled,
    prompts,
    qwen_parts,
    seeded,
    shake,
    stable_diffusion_3,
    wan_scheduler,
    wan_size,
    wan_transformer,
    wan_vae,
    z_image,
)
from torch import Tensor

NOT_RUN: dict[str, str] = {
    "EchoModularPipeline": "has no scheduler: its loop adds fresh noise at every step by itself.",
    "StableDiffusionXLModularPipeline": "has no transformer: its model is a U-Net.",
}
"""Modular pipelines that are not below, and why."""

# Parts that the pipelines share


def compose(blocks: str, **parts: Any) -> Any:
    """The pipeline of these blocks ("family.module.Class"), silent; `parts` the blocks have no use for are left out."""
    module, _, name = blocks.rpartition(".")
    made = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()
    return fill(made.init_pipeline(), **parts)


def fill(pipe: Any, **parts: Any) -> Any:
    """The pipeline with those of the parts that it has use for, silent."""
    wanted = {c.name for c in pipe.blocks.expected_components} | {c.name for c in pipe.blocks.expected_configs}
    pipe.update_components(**{name: part for name, part in parts.items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guidance(scale: float) -> Any:
    from diffusers import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=scale)


def sample(pipe: Any, steps: int, seed: int, **arguments: Any) -> Any:
    """One run of a pipeline, as latents; `output`: another of its results."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(num_inference_steps=steps, generator=generator, **{"output": "latents", **arguments})


def sample_all(pipe: Any, steps: int, seed: int, outputs: list[str], **arguments: Any) -> Tensor:
    """One run of a pipeline with several results, in one row, so that none can go wrong unseen."""
    generator = torch.Generator().manual_seed(seed)
    found = pipe(num_inference_steps=steps, generator=generator, output=outputs, **arguments)
    return torch.cat([found[name].flatten() for name in outputs])


def positive(texts: dict[str, Any]) -> dict[str, Any]:
    """Without the negative prompt."""
    return {name: value for name, value in texts.items() if not name.startswith("negative")}


# Wan


@seeded
def wan() -> Any:
    parts = {"transformer": wan_transformer(), "scheduler": wan_scheduler()}
    return compose("wan.modular_blocks_wan.WanCoreDenoiseStep", **parts)


@seeded
def wan_two_experts() -> Any:
    """Without a shift the timesteps are even, and each expert gets about half of the steps."""
    experts = {"transformer": wan_transformer(0), "transformer_2": wan_transformer(1), "boundary_ratio": 0.55}
    blocks = "wan.modular_blocks_wan22.Wan22CoreDenoiseStep"
    return compose(blocks, **experts, scheduler=wan_scheduler(shift=1.0))


def call_wan(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), height=32, width=32, num_frames=5, **options)


@seeded
def wan_image_to_video() -> Any:
    transformer = wan_transformer(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=48)
    parts = {"transformer": transformer, "scheduler": wan_scheduler()}
    return compose("wan.modular_blocks_wan_i2v.WanImage2VideoCoreDenoiseStep", **parts)


@seeded
def wan_image_to_video_two_experts() -> Any:
    experts = {f"transformer{name}": wan_transformer(i, in_channels=36) for i, name in enumerate(("", "_2"))}
    blocks = "wan.modular_blocks_wan22_i2v.Wan22Image2VideoCoreDenoiseStep"
    return compose(blocks, **experts, boundary_ratio=0.55, scheduler=wan_scheduler(shift=1.0))


def call_wan_image_to_video(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return call_wan(pipe, steps, seed, image_condition_latents=embedding(1, 20, 2, 4, 4, seed=5), **options)


def call_wan_image_to_video_embeds(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_wan_image_to_video(pipe, steps, seed, image_embeds=embedding(1, TOKENS, WIDTH, seed=6))


@seeded
def wan_vace() -> Any:
    from diffusers import WanVACETransformer3DModel

    size = wan_size(vace_layers=[0], vace_in_channels=96)
    experts = {f"transformer{n}": shake(WanVACETransformer3DModel(**size), i) for i, n in enumerate(("", "_2"))}
    blocks = "wan.modular_blocks_wan_vace.Wan22VaceCoreDenoiseStep"
    return compose(blocks, **experts, boundary_ratio=0.55, scheduler=wan_scheduler(shift=1.0))


def call_wan_vace(pipe: Any, steps: int, seed: int) -> Tensor:
    control = {"control_hidden_states": embedding(1, 96, 2, 4, 4, seed=5)}
    return call_wan(pipe, steps, seed, denoiser_input_fields=control)


@seeded
def wan_animate() -> Any:
    """Videos in segments, each with timesteps of its own; here one. Before its first step, one more call reads it."""
    from diffusers import DPMSolverMultistepScheduler, WanAnimate2Transformer3DModel

    transformer = WanAnimate2Transformer3DModel(
        text_len=TOKENS, dim=64, ffn_dim=64, freq_dim=32, text_dim=WIDTH, num_heads=2, num_layers=2
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": scheduler}
    return compose("wan_animate_2.modular_blocks_wan_animate_2.WanAnimate2CoreDenoiseStep", **parts)


def call_wan_animate(pipe: Any, steps: int, seed: int) -> Tensor:
    frames = 5
    size = {"height": 32, "width": 32, "num_segments": 1, "segment_frame_length": frames, "effective_segment": 4}
    clip = {"encoder_hidden_states_image": embedding(1, 4, 1280, seed=7)}
    images = {
        "reference_image_latents": embedding(20, 1, 4, 4, seed=5),
        "driving_video_pixels": embedding(1, 3, frames, 32, 32, seed=8).tanh(),
        "condition_clip_context": embedding(1, 4, 1280, seed=6),
    }
    text = {**prompts(), "prompt_ref_embeds": embedding(1, TOKENS, WIDTH, seed=9)}
    segments = sample(pipe, steps, seed, output="segment_frames", **text, **images, **size, denoiser_input_fields=clip)
    return torch.cat(segments, dim=2)


# Flux


def call_flux(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    """Distilled guidance: a number that the transformer is given, so one call per step."""
    return sample(pipe, steps, seed, **positive(prompts() | pooled()), height=64, width=64, **options)


@seeded
def flux() -> Any:
    return compose("flux.modular_blocks_flux.FluxCoreDenoiseStep", **flux_parts())


def call_flux_image_to_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """A strength of 0.6 leaves out the first `int(0.4 * steps)` steps."""
    return call_flux(pipe, steps, seed, image_latents=embedding(1, 16, 8, 8, seed=5), strength=0.6)


@seeded
def flux_kontext() -> Any:
    return compose("flux.modular_blocks_flux_kontext.FluxKontextCoreDenoiseStep", **flux_parts())


def call_flux_kontext(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_flux(pipe, steps, seed, image_latents=embedding(1, 16, 8, 8, seed=5), max_area=64 * 64)


@seeded
def flux2() -> Any:
    return compose("flux2.modular_blocks_flux2.Flux2CoreDenoiseStep", **flux2_parts(guidance_embeds=True))


def call_flux2(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return sample(pipe, steps, seed, **positive(prompts()), height=64, width=64, **options)


@seeded
def flux2_image() -> Any:
    """With a reference image, whose tokens are appended to the sequence."""
    parts = flux2_parts(guidance_embeds=True)
    return compose("flux2.modular_blocks_flux2.Flux2ImageConditionedCoreDenoiseStep", **parts)


def call_flux2_image(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_flux2(pipe, steps, seed, image_latents=[embedding(1, 32, 4, 4, seed=5)])


@seeded
def flux2_klein() -> Any:
    """Distilled to few steps, and without guidance."""
    return compose("flux2.modular_blocks_flux2_klein.Flux2KleinCoreDenoiseStep", **flux2_parts(guidance_embeds=False))


@seeded
def flux2_klein_base() -> Any:
    blocks = "flux2.modular_blocks_flux2_klein_base.Flux2KleinBaseCoreDenoiseStep"
    return compose(blocks, **flux2_parts(guidance_embeds=False))


@seeded
def flux3() -> Any:
    from diffusers import Flux3Transformer2DModel

    transformer = Flux3Transformer2DModel(
        in_channels=32,
        cond_in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    parts = {"transformer": shake(transformer), "scheduler": flow(6.93)}
    return compose("flux3.modular_blocks_flux3.Flux3CoreDenoiseStep", **parts)


def call_image(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), height=64, width=64, **options)


# Qwen-Image


def call_qwen(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return call_image(pipe, steps, seed, **masks("prompt_embeds_mask", torch.bool), **options)


@seeded
def qwen_image() -> Any:
    return compose("qwenimage.modular_blocks_qwenimage.QwenImageCoreDenoiseStep", **qwen_parts(3))


@seeded
def qwen_image_edit() -> Any:
    return compose("qwenimage.modular_blocks_qwenimage_edit.QwenImageEditCoreDenoiseStep", **qwen_parts(3))


def call_qwen_image_edit(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_qwen(pipe, steps, seed, image_latents=embedding(1, 16, 1, 8, 8, seed=5))


@seeded
def qwen_image_21() -> Any:
    from diffusers import QwenImage21Transformer2DModel

    transformer = QwenImage21Transformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    parts = {"transformer": shake(transformer), "scheduler": flow(use_dynamic_shifting=True)}
    return compose("qwenimage21.modular_blocks_qwenimage21.QwenImage21CoreDenoiseStep", **parts, guider=guidance(4.0))


def call_qwen_image_21(pipe: Any, steps: int, seed: int) -> Tensor:
    """The keys and values of the text are kept from the first step on by the pipeline itself."""
    images = {f"{sign}image_pad_mask": torch.zeros(1, TOKENS, dtype=torch.bool) for sign in ("", "negative_")}
    return call_qwen(pipe, steps, seed, **images)


# Images, continued


@seeded
def z_image_modular() -> Any:
    pipe = z_image()
    parts = {"transformer": pipe.transformer, "scheduler": pipe.scheduler, "guider": guidance(5.0)}
    return compose("z_image.modular_blocks_z_image.ZImageCoreDenoiseStep", **parts)


def call_listed_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """Prompts of different lengths, as lists."""
    text = {name: [embeds[0, :length]] for (name, embeds), length in zip(prompts().items(), (8, 5), strict=True)}
    return sample(pipe, steps, seed, **text, height=64, width=64)


@seeded
def stable_diffusion_3_modular() -> Any:
    pipe = stable_diffusion_3()
    blocks = "stable_diffusion_3.modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep"
    return compose(blocks, transformer=pipe.transformer, scheduler=pipe.scheduler)


def call_stable_diffusion_3(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_image(pipe, steps, seed, **pooled())


@seeded
def ernie_image_modular() -> Any:
    pipe = ernie_image()
    blocks = "ernie_image.modular_blocks_ernie_image.ErnieImageCoreDenoiseStep"
    return compose(blocks, transformer=pipe.transformer, scheduler=pipe.scheduler)


@seeded
def anima() -> Any:
    """Cosmos' transformer; a small network makes its prompt of one that it is given in two forms."""
    from diffusers import AnimaTextConditioner

    conditioner = AnimaTextConditioner(
        source_dim=WIDTH,
        target_dim=WIDTH,
        model_dim=WIDTH,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=16,
        min_sequence_length=TOKENS,
    )
    parts = {"transformer": cosmos_transformer(), "text_conditioner": shake(conditioner), "scheduler": flow()}
    return compose("anima.modular_blocks_anima.AnimaCoreDenoiseStep", **parts)


def call_anima(pipe: Any, steps: int, seed: int) -> Tensor:
    text: dict[str, Any] = {}
    for sign, (embeds, first, padding) in {
        "": (embedding(1, TOKENS, WIDTH, seed=1), 0, 2),
        "negative_": (embedding(1, TOKENS, WIDTH, seed=2), 8, 4),
    }.items():
        text[f"{sign}qwen_prompt_embeds"] = embeds
        text[f"{sign}t5_input_ids"] = torch.arange(first, first + TOKENS)[None]
        text[f"{sign}qwen_attention_mask"] = text[f"{sign}t5_attention_mask"] = mask(padding)
    return sample(pipe, steps, seed, **text, height=64, width=64)


@seeded
def krea2() -> Any:
    from diffusers import Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    parts = {"transformer": shake(transformer), "scheduler": flow(use_dynamic_shifting=True)}
    return compose("krea2.modular_blocks_krea2.Krea2CoreDenoiseStep", **parts)


def call_krea2(pipe: Any, steps: int, seed: int) -> Tensor:
    """The transformer takes what several layers of the text encoder give."""
    signs = {"": 1, "negative_": 2}
    text = {f"{sign}prompt_embeds": embedding(1, TOKENS, 2, WIDTH, seed=number) for sign, number in signs.items()}
    text |= masks("prompt_embeds_mask", torch.bool)
    return sample(pipe, steps, seed, **text, height=64, width=64)


@seeded
def ideogram4() -> Any:
    """Guidance is by a transformer of its own, which is given no text."""
    from diffusers import Ideogram4Transformer2DModel

    def transformer(seed: int) -> Any:
        size = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
        width = {"intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": WIDTH, "mrope_section": (4, 2, 2)}
        return shake(Ideogram4Transformer2DModel(**size, **width), seed)

    parts = {"transformer": transformer(0), "unconditional_transformer": transformer(1), "scheduler": flow(1.0)}
    return compose("ideogram4.modular_blocks_ideogram4.Ideogram4CoreDenoiseStep", **parts)


def call_ideogram4(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {"text_features": embedding(1, TOKENS, WIDTH, seed=1), "text_lengths": [TOKENS]}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_schedule=(7.0,) * steps)


# Videos


@seeded
def hunyuan15() -> Any:
    """Where there is no VAE, the blocks take its latents to have 32 channels."""
    parts = hunyuan15_parts()
    small = parts["transformer"]
    transformer = type(small).from_config({**small.config, "in_channels": 65, "out_channels": 32})
    blocks = "hunyuan_video1_5.modular_blocks_hunyuan_video1_5.HunyuanVideo15CoreDenoiseStep"
    return compose(blocks, **parts | {"transformer": shake(transformer)})


def call_hunyuan15(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {**prompts(), **masks("prompt_embeds_mask"), **prompts(suffix="_2"), **masks("prompt_embeds_mask_2")}
    return sample(pipe, steps, seed, **text, height=64, width=64, num_frames=5)


@seeded
def ltx() -> Any:
    return compose("ltx.modular_blocks_ltx.LTXCoreDenoiseStep", **ltx_parts())


def call_ltx(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    return sample(pipe, steps, seed, **prompts(), **masks(), height=128, width=128, num_frames=9, **options)


@seeded
def ltx_image_to_video() -> Any:
    """Every token is given its own timestep; those of the first frame are done from the start."""
    return compose("ltx.modular_blocks_ltx.LTXImage2VideoCoreDenoiseStep", **ltx_parts())


def call_ltx_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_ltx(pipe, steps, seed, image_latents=embedding(1, 8, 1, 4, 4, seed=5))


@seeded
def helios() -> Any:
    """Frames in chunks, each with timesteps of its own; here one chunk."""
    from diffusers import HeliosScheduler, HeliosTransformer3DModel

    transformer = HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_dim=(8, 8, 8),
    )
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return compose(
        "helios.modular_blocks_helios.HeliosCoreDenoiseStep", transformer=shake(transformer), scheduler=scheduler
    )


def call_helios(pipe: Any, steps: int, seed: int, num_frames: int = 33) -> Tensor:
    chunks = sample(pipe, steps, seed, output="latent_chunks", **prompts(), height=64, width=64, num_frames=num_frames)
    return torch.cat(chunks, dim=2)


def cosmos3_transformer(**options: Any) -> Any:
    from diffusers import Cosmos3OmniTransformer

    transformer = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=16,
        patch_latent_dim=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        vocab_size=32,
        rope_axes_dim=(4, 2, 2),
        **options,
    )
    return shake(transformer)


@seeded
def cosmos3() -> Any:
    """The transformer's first input is the prompt; that which is denoised comes later."""
    parts = {"transformer": cosmos3_transformer(), "scheduler": wan_scheduler()}
    return compose("cosmos.modular_blocks_cosmos3.Cosmos3VisionCoreDenoiseStep", **parts)


def call_cosmos3(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {"cond_input_ids": list(range(TOKENS)), "uncond_input_ids": list(range(TOKENS, 2 * TOKENS))}
    return sample(pipe, steps, seed, **text, height=64, width=64, num_frames=5)


# Sound


@seeded
def cosmos3_sound() -> Any:
    """Sound is stepped by a copy of the scheduler."""
    transformer = cosmos3_transformer(sound_gen=True, sound_dim=8)
    blocks = "cosmos.modular_blocks_cosmos3.Cosmos3VisionSoundCoreDenoiseStep"
    return compose(blocks, transformer=transformer, scheduler=wan_scheduler())


def call_cosmos3_sound(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {"cond_input_ids": list(range(TOKENS)), "uncond_input_ids": list(range(TOKENS, 2 * TOKENS))}
    size = {"height": 64, "width": 64, "num_frames": 5}
    return sample_all(pipe, steps, seed, ["latents", "sound_latents"], **text, **size)


def ltx2_guiders() -> dict[str, Any]:
    """Those that the pipelines make by themselves, of which the first leaves out a block that the model here has."""
    from diffusers.guiders import LTX2Guidance

    shared = {"stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}
    return {
        "guider": LTX2Guidance(guidance_scale=3.0, spatio_temporal_guidance_blocks=[1], **shared),
        "audio_guider": LTX2Guidance(guidance_scale=7.0, **shared),
    }


@seeded
def ltx2_modular() -> Any:
    pipe = ltx2()
    parts = {"transformer": pipe.transformer, "audio_vae": pipe.audio_vae, "scheduler": pipe.scheduler}
    return compose("ltx2.modular_blocks_ltx2.LTX2CoreDenoiseStep", **parts, **ltx2_guiders())


@seeded
def ltx25() -> Any:
    """The same blocks in a class of its own, which decodes otherwise; a transformer with gates."""
    from diffusers.modular_pipelines import LTX25ModularPipeline
    from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2CoreDenoiseStep

    pipe, small = ltx2(), ltx2_transformer()
    gates = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
    transformer = shake(type(small).from_config({**small.config, **gates}))
    parts = {"transformer": transformer, "audio_vae": pipe.audio_vae, "scheduler": pipe.scheduler}
    return fill(LTX25ModularPipeline(blocks=LTX2CoreDenoiseStep()), **parts, **ltx2_guiders())


def call_ltx2(pipe: Any, steps: int, seed: int) -> Tensor:
    """Video and sound; sound is stepped by a copy of the scheduler."""
    text: dict[str, Any] = {}
    for sign, number, padding in (("", 1, 2), ("negative_", 2, 4)):
        text[f"{sign}connector_prompt_embeds"] = embedding(1, TOKENS, WIDTH, seed=number)
        text[f"{sign}connector_audio_prompt_embeds"] = embedding(1, TOKENS, WIDTH, seed=number + 2)
        text[f"{sign}connector_attention_mask"] = mask(padding)
    size = {"height": 128, "width": 128, "num_frames": 9, "batch_size": 1, "dtype": torch.float32}
    return sample_all(pipe, steps, seed, ["latents", "audio_latents"], **text, **size)


@seeded
def minimax_h3() -> Any:
    """Video and sound have schedulers of their own, whose noise levels differ."""
    from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel

    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        text_dim=WIDTH,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    schedulers = {"scheduler": MiniMaxH3Scheduler(shift=12.0), "audio_scheduler": MiniMaxH3Scheduler(shift=3.0)}
    return compose(
        "minimax_h3.modular_blocks_minimax_h3.MiniMaxH3CoreDenoiseStep", transformer=shake(transformer), **schedulers
    )


def call_minimax_h3(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {
        "prompt_embeds": embedding(1, TOKENS, WIDTH, seed=1),
        "text_token_tags": torch.ones(TOKENS, dtype=torch.long),
    }
    size = {"height": 32, "width": 32, "num_frames": 124}
    return sample_all(pipe, steps, seed, ["latents", "audio_latents"], **text, **size)


@seeded
def minimax_music3() -> Any:
    """Sound in windows, each with timesteps of its own; here one window. Time runs from 0, which is noise, to 1."""
    from diffusers import MiniMaxMusic3ConditionEncoder, MiniMaxMusic3Transformer1DModel

    transformer = MiniMaxMusic3Transformer1DModel(
        in_channels=8,
        condition_dim=WIDTH,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        ff_inner_dim=64,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    encoder = MiniMaxMusic3ConditionEncoder(condition_hidden_dim=WIDTH, num_condition_layers=2, out_dim=WIDTH)
    parts = {"transformer": shake(transformer), "condition_encoder": shake(encoder)}
    scheduler = flow(1.0, num_train_timesteps=1, invert_sigmas=True)
    blocks = "minimax_music3.modular_blocks_minimax_music3.MiniMaxMusic3CoreDenoiseStep"
    return compose(blocks, **parts, scheduler=scheduler)


def call_minimax_music3(pipe: Any, steps: int, seed: int) -> Tensor:
    chunks = sample(pipe, steps, seed, output="latent_chunks", frame_hiddens=embedding(1, TOKENS, 2 * WIDTH, seed=1))
    return torch.cat(chunks, dim=-1)


MODULAR: list[Tiny] = [
    Tiny("WanModularPipeline", wan, call_wan, 2),
    Tiny("Wan22ModularPipeline (two experts)", wan_two_experts, call_wan, 2),
    Tiny("WanImage2VideoModularPipeline", wan_image_to_video, call_wan_image_to_video_embeds, 2),
    Tiny("Wan22Image2VideoModularPipeline (two experts)", wan_image_to_video_two_experts, call_wan_image_to_video, 2),
    Tiny("Wan22VaceModularPipeline (two experts)", wan_vace, call_wan_vace, 2),
    Tiny("WanAnimate2ModularPipeline", wan_animate, call_wan_animate, 2),
    Tiny("FluxModularPipeline", flux, call_flux, 1),
    Tiny("FluxModularPipeline (image to image)", flux, call_flux_image_to_image, 1),
    Tiny("FluxKontextModularPipeline", flux_kontext, call_flux_kontext, 1),
    Tiny("Flux2ModularPipeline", flux2, call_flux2, 1),
    Tiny("Flux2ModularPipeline (reference image)", flux2_image, call_flux2_image, 1),
    Tiny("Flux2KleinModularPipeline", flux2_klein, call_flux2, 1),
    Tiny("Flux2KleinBaseModularPipeline", flux2_klein_base, call_image, 2),
    Tiny("Flux3ModularPipeline", flux3, call_image, 2),
    Tiny("QwenImageModularPipeline", qwen_image, call_qwen, 2),
    Tiny("QwenImageEditModularPipeline", qwen_image_edit, call_qwen_image_edit, 2),
    Tiny("QwenImage21ModularPipeline", qwen_image_21, call_qwen_image_21, 2),
    Tiny("ZImageModularPipeline", z_image_modular, call_listed_image, 2),
    Tiny("StableDiffusion3ModularPipeline", stable_diffusion_3_modular, call_stable_diffusion_3, 2),
    Tiny("ErnieImageModularPipeline", ernie_image_modular, call_listed_image, 2),
    Tiny("AnimaModularPipeline", anima, call_anima, 2),
    Tiny("Krea2ModularPipeline", krea2, call_krea2, 2),
    Tiny("Ideogram4ModularPipeline", ideogram4, call_ideogram4, 2),
    Tiny("HunyuanVideo15ModularPipeline", hunyuan15, call_hunyuan15, 2),
    Tiny("LTXModularPipeline", ltx, call_ltx, 2),
    Tiny("LTXModularPipeline (image to video)", ltx_image_to_video, call_ltx_image_to_video, 2),
    Tiny("HeliosModularPipeline", helios, call_helios, 2),
    Tiny("Cosmos3OmniModularPipeline", cosmos3, call_cosmos3, 2),
    Tiny("Cosmos3OmniModularPipeline (sound)", cosmos3_sound, call_cosmos3_sound, 2),
    Tiny("LTX2ModularPipeline", ltx2_modular, call_ltx2, 4),
    Tiny("LTX25ModularPipeline", ltx25, call_ltx2, 4),
    Tiny("MiniMaxH3ModularPipeline", minimax_h3, call_minimax_h3, 1),
    Tiny("MiniMaxMusic3ModularPipeline", minimax_music3, call_minimax_music3, 2),
]
