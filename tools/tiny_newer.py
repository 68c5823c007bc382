"""More diffusers pipelines in miniature: those that came in the last half year, built as in `tiny_pipelines`.

    for tiny in NEWER:
        latents = tiny.call(tiny.build(), 6, 0)

`NOT_RUN` says which were tried and why they are not here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tiny_pipelines import (
    POOLED,
    TOKENS,
    TWO_ENCODERS,
    WIDTH,
    Tiny,
    Unchecked,
    assemble,
    call_video,
    embedding,
    flow,
    flux2_parts,
    hunyuan_vae,
    image_vae,
    kandinsky5_parts,
    ltx2,
    mask,
    masks,
    picture,
    pooled,
    prompts,
    qwen_parts,
    qwen_prompts,
    sample,
    seeded,
    shake,
    wan_scheduler,
    wan_size,
    wan_transformer,
    wan_vae,
)
from torch import Tensor


class Stand:
    """Stands where a pipeline asks an encoder or a tokenizer for a type or a token number at the most."""

    dtype = torch.float32
    eos_token_id = 1

    @property
    def tokenizer(self) -> Stand:
        return self

    def encode(self, text: str) -> list[int]:
        return [2]

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversation: Any, **options: Any) -> list[list[int]]:
        return [[3] * TOKENS]


def last_latents(pipe: Any, steps: int, seed: int, **arguments: Any) -> Tensor:
    """For pipelines that do not return latents when asked to: the last ones that they showed a callback."""
    seen: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen[:] = [tensors["latents"]]
        return {}

    sample(pipe, steps, seed, callback_on_step_end=keep, **arguments)
    return seen[0]


def both(outputs: Any) -> Tensor:
    """Video and sound in one row, so that neither can go wrong unseen."""
    return torch.cat([output.flatten() for output in outputs])


# Qwen-Image


def qwen_with(halvings: int, **options: Any) -> dict[str, Any]:
    """As `qwen_parts`, with settings of the transformer."""
    from diffusers import QwenImageTransformer2DModel

    size = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    transformer = QwenImageTransformer2DModel(joint_attention_dim=WIDTH, **size, **options)
    return {**qwen_parts(halvings), "transformer": shake(transformer)}


@seeded
def qwen_image_edit_plus() -> Any:
    """Qwen-Image-Edit-2511: tokens of the given images have timestep zero."""
    from diffusers import QwenImageEditPlusPipeline

    absent = ("text_encoder", "tokenizer", "processor")
    return assemble(QwenImageEditPlusPipeline, *absent, **qwen_with(6, zero_cond_t=True))


def call_qwen_image_edit_plus(pipe: Any, steps: int, seed: int) -> Tensor:
    """Two images, each enlarged to a million pixels."""
    images = [picture(), picture(48, 64)]
    return sample(pipe, steps, seed, **qwen_prompts(), image=images, height=512, width=512)


@seeded
def qwen_image_layered() -> Any:
    from diffusers import QwenImageLayeredPipeline

    parts = qwen_with(6, use_additional_t_cond=True, use_layer3d_rope=True)
    return assemble(QwenImageLayeredPipeline, "tokenizer", "processor", text_encoder=Stand(), **parts)


def call_qwen_image_layered(pipe: Any, steps: int, seed: int) -> Tensor:
    """An image taken apart into two layers; a prompt that is not empty keeps the pipeline from captioning it."""
    options = {"prompt": "-", "image": picture(), "layers": 2, "output_type": "pt"}
    return last_latents(pipe, steps, seed, **qwen_prompts(), **options)


@seeded
def qwen_image_to_image() -> Any:
    from diffusers import QwenImageImg2ImgPipeline

    return assemble(QwenImageImg2ImgPipeline, "text_encoder", "tokenizer", **qwen_parts(3))


def call_qwen_image_to_image(pipe: Any, steps: int, seed: int) -> Tensor:
    size = {"height": 64, "width": 64}
    return sample(pipe, steps, seed, **qwen_prompts(), image=picture(), strength=0.6, **size)


def qwen_image_21_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel

    transformer = QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    return {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": flow(use_dynamic_shifting=True)}


@seeded
def qwen_image_21() -> Any:
    from diffusers import QwenImage21Pipeline

    return assemble(QwenImage21Pipeline, "text_encoder", processor=Stand(), **qwen_image_21_parts())


def call_qwen_image_21(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    """Keys and values of the prompt are kept from the first step on, which alone returns its tokens too."""
    return sample(pipe, steps, seed, **qwen_prompts(), height=128, width=128, **options)


@seeded
def qwen_image_21_edit() -> Any:
    """The prompt has 16 slots for four tokens of the image each."""
    pipe = qwen_image_21()
    pipe.encode_prompt = qwen_image_21_prompt
    return pipe


def qwen_image_21_prompt(prompt_embeds: Tensor, prompt_embeds_mask: Tensor, **_: Any) -> tuple[Tensor, ...]:
    slots = torch.zeros(1, TOKENS + 16, dtype=torch.bool)
    slots[:, 2:18] = True
    embeds, visible = torch.zeros(1, TOKENS + 16, WIDTH), torch.ones_like(slots)
    embeds[~slots], visible[~slots] = prompt_embeds[0], prompt_embeds_mask[0]
    return embeds, visible, slots


def call_qwen_image_21_edit(pipe: Any, steps: int, seed: int) -> Tensor:
    """The image's tokens are in front of the noisy ones."""
    return call_qwen_image_21(pipe, steps, seed, image=picture(), output_resolution=128)


def call_qwen_image_21_plain(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_qwen_image_21(pipe, steps, seed, use_kv_cache=False)


# LTX2


def ltx2_as(pipeline: Any) -> Any:
    """Another pipeline of LTX2's parts."""
    names = ("vae", "audio_vae", "connectors", "transformer", "scheduler")
    parts = {name: part for name, part in ltx2().components.items() if name in names}
    return assemble(pipeline, "text_encoder", "tokenizer", "vocoder", **parts)


@seeded
def ltx2_image_to_video() -> Any:
    from diffusers import LTX2ImageToVideoPipeline

    return ltx2_as(LTX2ImageToVideoPipeline)


def call_ltx2(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    options = {"height": 128, "width": 128, "num_frames": 9, "spatio_temporal_guidance_blocks": [1], **options}
    generator = torch.Generator().manual_seed(seed)
    options |= {"output_type": "latent", "return_dict": False}
    return both(pipe(num_inference_steps=steps, generator=generator, **prompts(), **masks(), **options))


def call_ltx2_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_ltx2(pipe, steps, seed, image=picture(128, 128), image_crf=0)


@seeded
def ltx2_condition() -> Any:
    from diffusers import LTX2ConditionPipeline

    return ltx2_as(LTX2ConditionPipeline)


def call_ltx2_condition(pipe: Any, steps: int, seed: int) -> Tensor:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    conditions = [LTX2VideoCondition(picture(128, 128), index, crf=0) for index in (0, 1)]
    return call_ltx2(pipe, steps, seed, conditions=conditions, num_frames=17)


# Cosmos


@seeded
def cosmos25() -> Any:
    from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel

    transformer = CosmosTransformer3DModel(
        in_channels=16 + 1,  # latents, and which of them are given
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # it would need torchvision
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return assemble(Cosmos2_5_PredictBasePipeline, "text_encoder", "tokenizer", **parts, safety_checker=Unchecked())


def call_cosmos25(pipe: Any, steps: int, seed: int) -> Tensor:
    """A video goes on: its first latent frame is given and its velocity is known."""
    video = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(7)) * 2 - 1
    options = {"video": video, "num_latent_conditional_frames": 1}
    return call_video(pipe, steps, seed, num_frames=9, **options)


@seeded
def cosmos3() -> Any:
    from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer

    transformer = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=64,
        latent_channel=16,
        patch_latent_dim=4 * 16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        vocab_size=16,
        rope_axes_dim=[4, 2, 2],
        dtype="float32",
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": wan_scheduler()}
    pipe = assemble(Cosmos3OmniPipeline, **parts, text_tokenizer=Stand(), enable_safety_checker=False)
    pipe.tokenize_prompt = lambda *_, **__: ([3, 4, 5, 6, 1, 2], [7, 8, 1, 2])
    return pipe


def call_cosmos3(pipe: Any, steps: int, seed: int) -> Tensor:
    """The transformer is given token numbers first, and the latents as a list with one video."""
    return sample(pipe, steps, seed, prompt="-", height=64, width=64, num_frames=5)


# Z-Image


def z_image_parts(**options: Any) -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    size = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [4, 6, 6]}
    transformer = ZImageTransformer2DModel(cap_feat_dim=WIDTH, axes_lens=[256, 32, 32], **size, **options)
    return {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow()}


@seeded
def z_image_to_image() -> Any:
    from diffusers import ZImageImg2ImgPipeline

    return assemble(ZImageImg2ImgPipeline, "text_encoder", "tokenizer", **z_image_parts())


def call_z_image_to_image(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {name: [embeds[0, :length]] for (name, embeds), length in zip(prompts().items(), (8, 5), strict=True)}
    size = {"height": 64, "width": 64}
    return sample(pipe, steps, seed, **text, **size, image=picture(), strength=0.6, guidance_scale=4.0)


@seeded
def z_image_omni() -> Any:
    from diffusers import ZImageOmniPipeline

    pipe = assemble(
        ZImageOmniPipeline,
        "text_encoder",
        "tokenizer",
        "siglip",
        "siglip_processor",
        **z_image_parts(siglip_feat_dim=16),
    )
    tokens, latents = embedding(4, 4, 16, seed=5), embedding(16, 1, 8, 8, seed=6) / 4
    pipe.prepare_siglip_embeds = lambda images, batch_size, **_: [[tokens] * len(images)] * batch_size
    pipe.prepare_image_latents = lambda images, batch_size, **_: [[latents] * len(images)] * batch_size
    return pipe


def call_z_image_omni(pipe: Any, steps: int, seed: int) -> Tensor:
    """With one image: its latents are in one list with the noisy ones, the prompt is in two parts around it."""
    text = {name: [[embeds[0, :5], embeds[0, 5:]]] for name, embeds in prompts().items()}
    return sample(pipe, steps, seed, **text, image=picture(), height=64, width=64, guidance_scale=4.0)


# Wan and its relatives


WAN_ENCODERS = ("tokenizer", "text_encoder", "image_encoder", "image_processor")


def seeing(pipe: Any) -> Any:
    """With fixed tokens in place of what an encoder makes of an image."""
    pipe.encode_image = lambda image, device=None: embedding(1, 4, 16, seed=5)
    return pipe


@seeded
def wan_animate() -> Any:
    from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

    transformer = WanAnimateTransformer3DModel(
        **wan_size(),
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return seeing(assemble(WanAnimatePipeline, *WAN_ENCODERS, **parts))


def call_wan_animate(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"image": picture(32, 32), "pose_video": [picture(32, 32)] * 5, "face_video": [picture(16, 16)] * 5}
    options |= {"segment_frame_length": 5, "guidance_scale": 5.0}
    return sample(pipe, steps, seed, **prompts(), **options, height=32, width=32)


@seeded
def wan_video_to_video() -> Any:
    from diffusers import WanVideoToVideoPipeline

    parts = {"transformer": wan_transformer(), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return assemble(WanVideoToVideoPipeline, "tokenizer", "text_encoder", **parts)


def call_wan_video_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"video": [picture(32, 32)] * 5, "strength": 0.6, "height": 32, "width": 32}
    return sample(pipe, steps, seed, **prompts(), **options, guidance_scale=5.0)


@seeded
def chrono_edit() -> Any:
    from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel

    transformer = ChronoEditTransformer3DModel(**wan_size(in_channels=36, image_dim=16))
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return seeing(assemble(ChronoEditPipeline, *WAN_ENCODERS, **parts))


def call_chrono_edit(pipe: Any, steps: int, seed: int, **options: Any) -> Tensor:
    size = {"height": 32, "width": 32}
    return sample(pipe, steps, seed, **prompts(), **size, **options, image=picture(32, 32), guidance_scale=5.0)


# Images


@seeded
def krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    parts = {**qwen_parts(3), "transformer": shake(transformer)}
    return assemble(Krea2Pipeline, "text_encoder", "tokenizer", **parts, text_encoder_select_layers=(0, 1))


def call_krea2(pipe: Any, steps: int, seed: int) -> Tensor:
    """Prompts are hidden states of several layers of the encoder."""
    text = {name: torch.stack([embeds, -embeds], dim=2) for name, embeds in prompts().items()}
    text |= masks("prompt_embeds_mask", torch.bool)
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=4.5)


@seeded
def ideogram4() -> Any:
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel

    size: dict[str, Any] = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 32}
    size |= {"intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": WIDTH, "mrope_section": (4, 2, 2)}
    models = [shake(Ideogram4Transformer2DModel(**size), seed) for seed in (0, 1)]
    vae = flux2_parts(guidance_embeds=False)["vae"]
    parts = {"transformer": models[0], "unconditional_transformer": models[1], "vae": vae, "scheduler": flow(1.0)}
    pipe = assemble(Ideogram4Pipeline, "text_encoder", "tokenizer", **parts)
    pipe.encode_prompt = ideogram4_prompt
    return pipe


def ideogram4_prompt(grid_h: int, grid_w: int, **_: Any) -> tuple[Tensor, ...]:
    """Features, positions, segments and kinds of the tokens of text and picture, as the pipeline makes them."""
    pixels = grid_h * grid_w
    features = torch.cat([prompts()["prompt_embeds"], torch.zeros(1, pixels, WIDTH)], dim=1)
    text = torch.arange(TOKENS).expand(3, -1)
    rows, columns = torch.arange(grid_h).repeat_interleave(grid_w), torch.arange(grid_w).repeat(grid_h)
    image = torch.stack([torch.zeros_like(rows), rows, columns]) + 65536
    kinds = torch.cat([torch.full((TOKENS,), 3), torch.full((pixels,), 2)])[None]
    return features, torch.cat([text, image], dim=1).T[None], torch.ones_like(kinds), kinds


def call_ideogram4(pipe: Any, steps: int, seed: int) -> Tensor:
    """Guidance by a second transformer, which sees no prompt."""
    size = {"height": 64, "width": 64, "max_sequence_length": TOKENS}
    return sample(pipe, steps, seed, prompt="-", **size, guidance_scale=4.0, guidance_schedule=None)


@seeded
def glm_image() -> Any:
    from diffusers import GlmImagePipeline, GlmImageTransformer2DModel

    transformer = GlmImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=16,
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": scheduler}
    absent = ("tokenizer", "processor", "text_encoder", "vision_language_encoder")
    return assemble(GlmImagePipeline, *absent, **parts)


def call_glm_image(pipe: Any, steps: int, seed: int) -> Tensor:
    """The prompts are told apart by their text; tokens of a draft are left out of the second."""
    return sample(pipe, steps, seed, **prompts(), prior_token_ids=torch.arange(16)[None], height=64, width=64)


@seeded
def hunyuan_image() -> Any:
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
    )
    parts = {"transformer": shake(transformer), "vae": vae.eval(), "scheduler": flow(5.0)}
    guiders = {
        name: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3)
        for name in ("guider", "ocr_guider")
    }
    return assemble(HunyuanImagePipeline, *TWO_ENCODERS, **parts, **guiders)


def call_hunyuan_image(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {**prompts(), **masks("prompt_embeds_mask"), **prompts(suffix="_2"), **masks("prompt_embeds_mask_2")}
    return sample(pipe, steps, seed, **text, height=64, width=64)


@seeded
def longcat_image() -> Any:
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    transformer = LongCatImageTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow(use_dynamic_shifting=True)}
    pipe = assemble(LongCatImagePipeline, "text_encoder", "tokenizer", "text_processor", **parts)
    encode = pipe.encode_prompt  # counts the prompts, also where only their embeddings are given
    pipe.encode_prompt = lambda prompt, **options: encode(prompt or "-", **options)
    return pipe


def call_longcat_image(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"height": 64, "width": 64, "guidance_scale": 4.5, "enable_prompt_rewrite": False}
    return sample(pipe, steps, seed, **prompts(), **options)


@seeded
def kandinsky5_image() -> Any:
    from diffusers import Kandinsky5T2IPipeline

    parts = {**kandinsky5_parts(visual_cond=False), "vae": image_vae(16)}
    pipe = assemble(Kandinsky5T2IPipeline, *TWO_ENCODERS, **parts)
    pipe.resolutions = [(64, 64)]
    return pipe


def call_kandinsky5_image(pipe: Any, steps: int, seed: int) -> Tensor:
    clip = {f"{name.replace('pooled_', '')}_clip": embeds for name, embeds in pooled().items()}
    lengths = {f"{sign}prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32) for sign in ("", "negative_")}
    text = {**prompts(suffix="_qwen"), **clip, **lengths}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=3.5)


@seeded
def prx() -> Any:
    from diffusers import PRXPipeline, PRXTransformer2DModel

    transformer = PRXTransformer2DModel(
        in_channels=16, context_in_dim=WIDTH, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow()}
    return assemble(PRXPipeline, "text_encoder", "tokenizer", **parts)


def call_prx(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {**prompts(), **masks(dtype=torch.bool)}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=4.0, use_resolution_binning=False)


@seeded
def ovis_image() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    parts = {"transformer": shake(transformer), "vae": image_vae(16), "scheduler": flow(use_dynamic_shifting=True)}
    return assemble(OvisImagePipeline, "text_encoder", "tokenizer", **parts)


def call_ovis_image(pipe: Any, steps: int, seed: int) -> Tensor:
    size = {"height": 64, "width": 64}
    return sample(pipe, steps, seed, **prompts(), **size, negative_prompt=None, guidance_scale=5.0)


@seeded
def bria_fibo() -> Any:
    from diffusers import BriaFiboPipeline, BriaFiboTransformer2DModel

    transformer = BriaFiboTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        text_encoder_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": flow(use_dynamic_shifting=True)}
    pipe = assemble(BriaFiboPipeline, "tokenizer", **parts, text_encoder=Stand())
    pipe.get_prompt_embeds = bria_fibo_prompt
    return pipe


def bria_fibo_prompt(prompt: Any, **_: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the encoder would give of one prompt: the last states, those of its layers, and a mask."""
    negative = "negative_" if prompt[0] == "" else ""
    embeds = prompts()[f"{negative}prompt_embeds"]
    return embeds, [embeds, -embeds], masks()[f"{negative}prompt_attention_mask"]


def call_bria_fibo(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, prompt="-", negative_prompt="", height=128, width=128, guidance_scale=5.0)


@seeded
def nucleus_moe() -> Any:
    from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="none",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    parts = {**qwen_parts(3), "transformer": shake(transformer)}
    return assemble(NucleusMoEImagePipeline, "text_encoder", "processor", **parts)


def call_nucleus_moe(pipe: Any, steps: int, seed: int) -> Tensor:
    text = {**prompts(), **masks("prompt_embeds_mask", torch.bool)}
    return sample(pipe, steps, seed, **text, height=64, width=64, guidance_scale=4.0)


@seeded
def joy_image_edit() -> Any:
    from diffusers import JoyImageEditPipeline, JoyImageEditTransformer3DModel

    transformer = JoyImageEditTransformer3DModel(
        hidden_size=32, num_attention_heads=2, text_dim=WIDTH, num_layers=2, rope_dim_list=[4, 6, 6]
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": flow()}
    pipe = assemble(JoyImageEditPipeline, "text_encoder", "tokenizer", "processor", **parts)
    pipe.vae_image_processor.get_default_height_width = lambda *_: (64, 64)  # else about a million pixels
    return pipe


def call_joy_image_edit(pipe: Any, steps: int, seed: int) -> Tensor:
    """The given image's latents are in front of the noisy ones and are put back before every step."""
    text = {**prompts(), **masks("prompt_embeds_mask", torch.bool)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the image is encoded with noise of no generator
        return sample(pipe, steps, seed, **text, image=picture(), guidance_scale=4.0)


# Videos and sound


@seeded
def kandinsky6() -> Any:
    from diffusers import Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel

    transformer = Kandinsky6Transformer3DModel(
        in_text_dim=WIDTH,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    parts = {"transformer": shake(transformer), "vae": hunyuan_vae(), "scheduler": flow(5.0)}
    return assemble(Kandinsky6TI2VAPipeline, *TWO_ENCODERS, **parts, audio_vae=SoundShape(), vocoder=Stand())


class SoundShape:
    """All that a pipeline asks of an audio VAE that decodes nothing."""

    config = SimpleNamespace(
        sample_rate=160, sampling_rate=160, scaling_factor=1.0, latent_dim=4, downsampling_ratios=(10,)
    )
    latent_hop_length = downsampling_ratio = 10


def call_kandinsky6(pipe: Any, steps: int, seed: int) -> Tensor:
    """From an image, which is a further frame at the end; video and sound."""
    generator = torch.Generator().manual_seed(seed)
    options = {"image": picture(), "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 5.0}
    options |= {"output_type": "latent", "return_dict": False}
    return both(pipe(num_inference_steps=steps, generator=generator, **prompts(), **pooled(), **options))


@seeded
def sana_video() -> Any:
    from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel

    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        rope_max_seq_len=32,
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": dpm_flow()}
    return assemble(SanaVideoPipeline, "tokenizer", "text_encoder", **parts)


def dpm_flow() -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def call_sana_video(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"height": 64, "width": 64, "frames": 5, "negative_prompt": None, "use_resolution_binning": False}
    return sample(pipe, steps, seed, **prompts(), **masks(), **options, guidance_scale=6.0)


@seeded
def motif_video() -> Any:
    from diffusers import AdaptiveProjectedGuidance, MotifVideoPipeline, MotifVideoTransformer3DModel

    transformer = MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    parts = {"transformer": shake(transformer), "vae": wan_vae(), "scheduler": flow(use_dynamic_shifting=True)}
    guider = AdaptiveProjectedGuidance(guidance_scale=8.0)
    return assemble(MotifVideoPipeline, "text_encoder", "tokenizer", **parts, guider=guider)


def call_motif_video(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"height": 64, "width": 64, "num_frames": 5}
    return sample(pipe, steps, seed, **prompts(), **masks(), **options)


@seeded
def lucy_edit() -> Any:
    from diffusers import LucyEditPipeline

    parts = {"transformer": wan_transformer(in_channels=32), "vae": wan_vae(), "scheduler": wan_scheduler()}
    return assemble(LucyEditPipeline, "tokenizer", "text_encoder", **parts, expand_timesteps=True)


def call_lucy_edit(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"video": [picture(32, 32)] * 5, "height": 32, "width": 32, "num_frames": 5}
    return sample(pipe, steps, seed, **prompts(), **options, guidance_scale=5.0)


@seeded
def skyreels_image_to_video() -> Any:
    from diffusers import SkyReelsV2ImageToVideoPipeline, SkyReelsV2Transformer3DModel

    transformer = shake(SkyReelsV2Transformer3DModel(**wan_size(in_channels=36, image_dim=16)))
    parts = {"transformer": transformer, "vae": wan_vae(), "scheduler": wan_scheduler()}
    return seeing(assemble(SkyReelsV2ImageToVideoPipeline, *WAN_ENCODERS, **parts))


def call_skyreels_image_to_video(pipe: Any, steps: int, seed: int) -> Tensor:
    return call_chrono_edit(pipe, steps, seed, num_frames=5)


@seeded
def any_flow() -> Any:
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    transformer = shake(AnyFlowTransformer3DModel(**wan_size()))
    parts = {"transformer": transformer, "vae": wan_vae(), "scheduler": FlowMapEulerDiscreteScheduler(shift=5.0)}
    return assemble(AnyFlowPipeline, "tokenizer", "text_encoder", **parts)


def call_any_flow(pipe: Any, steps: int, seed: int) -> Tensor:
    """Every step is told where it ends."""
    return call_video(pipe, steps, seed, height=32, width=32)


@seeded
def helios() -> Any:
    from diffusers import HeliosPipeline, HeliosScheduler, HeliosTransformer3DModel

    size = wan_size(rope_dim=(8, 8, 8))
    del size["rope_max_seq_len"]
    parts = {"vae": wan_vae(), "scheduler": HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1)}
    transformer = shake(HeliosTransformer3DModel(**size))
    return assemble(HeliosPipeline, "tokenizer", "text_encoder", **parts, transformer=transformer)


def call_helios(pipe: Any, steps: int, seed: int) -> Tensor:
    """One piece of a video; further ones would go on from it, each with a run of the sampler's own."""
    options = {"num_frames": 9, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}
    return call_video(pipe, steps, seed, **options)


@seeded
def framepack() -> Any:
    from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel

    transformer = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    parts = {"transformer": shake(transformer), "vae": hunyuan_vae(), "scheduler": flow(7.0)}
    absent = (*TWO_ENCODERS, "image_encoder", "feature_extractor")
    return seeing(assemble(HunyuanVideoFramepackPipeline, *absent, **parts))


def call_framepack(pipe: Any, steps: int, seed: int) -> Tensor:
    """One piece of a video; an earlier one would follow, with a run of the sampler's own."""
    options = {"image": picture(), "num_frames": 9, "latent_window_size": 3, "true_cfg_scale": 3.0}
    text = {**prompts(), **pooled(), **masks()}
    return sample(pipe, steps, seed, **text, **options, height=64, width=64)[-1]


@seeded
def flux2_klein_kv() -> Any:
    from diffusers import Flux2KleinKVPipeline

    return assemble(Flux2KleinKVPipeline, "text_encoder", "tokenizer", **flux2_parts(guidance_embeds=False))


def call_flux2_klein_kv(pipe: Any, steps: int, seed: int) -> Tensor:
    """Tokens of a reference image are given in the first step only; keys and values of theirs are kept."""
    return sample(pipe, steps, seed, prompt_embeds=prompts()["prompt_embeds"], image=picture(), height=64, width=64)


@seeded
def longcat_audio() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LongCatAudioDiTPipeline, LongCatAudioDiTTransformer

    transformer = LongCatAudioDiTTransformer(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    parts = {"transformer": shake(transformer), "vae": SoundShape(), "scheduler": scheduler}
    pipe = assemble(LongCatAudioDiTPipeline, "text_encoder", "tokenizer", **parts)
    pipe.encode_prompt = longcat_audio_prompt
    return pipe


def longcat_audio_prompt(prompt: list[str], device: Any) -> tuple[Tensor, Tensor]:
    """Embeddings and their number, of the prompt or of the negative prompt."""
    negative = prompt[0].startswith("no")
    name = "negative_prompt_embeds" if negative else "prompt_embeds"
    return prompts()[name], torch.tensor([TOKENS - 2 - 2 * negative])


def call_longcat_audio(pipe: Any, steps: int, seed: int) -> Tensor:
    options = {"prompt": "rain", "negative_prompt": "noise", "latents": embedding(1, 16, 8, seed=seed) / 4}
    return sample(pipe, steps, seed, **options, guidance_scale=4.0)


@seeded
def stable_audio3() -> Any:
    from diffusers import StableAudio3DiTModel, StableAudio3DurationEmbedder, StableAudio3Pipeline

    transformer = StableAudio3DiTModel(
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=4,
    )
    duration = StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16)
    parts = {"transformer": shake(transformer), "duration_embedder": shake(duration), "vae": SoundShape()}
    return assemble(StableAudio3Pipeline, "text_encoder", "tokenizer", **parts, scheduler=flow(1.0))


def call_stable_audio3(pipe: Any, steps: int, seed: int) -> Tensor:
    audible = {"encoder_attention_mask": mask(padding=2), "negative_encoder_attention_mask": mask(padding=4)}
    return sample(pipe, steps, seed, **prompts(), **audible, duration=1.0, guidance_scale=7.0)


@seeded
def ace_step() -> Any:
    from diffusers import AceStepConditionEncoder, AceStepPipeline, AceStepTransformer1DModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    size |= {"head_dim": 16, "sliding_window": 8}
    transformer = AceStepTransformer1DModel(num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, **size)
    encoder = AceStepConditionEncoder(
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **size,
    )
    parts = {"transformer": shake(transformer), "condition_encoder": shake(encoder), "vae": SoundShape()}
    scheduler = flow(1.0, num_train_timesteps=1)
    pipe = assemble(AceStepPipeline, "text_encoder", "tokenizer", **parts, scheduler=scheduler)
    pipe.encode_prompt = lambda **_: (
        prompts()["prompt_embeds"],
        mask(2),
        embedding(1, 4, WIDTH, seed=5),
        mask(4)[:, :4],
    )
    return pipe


def call_ace_step(pipe: Any, steps: int, seed: int) -> Tensor:
    return sample(pipe, steps, seed, prompt="-", audio_duration=1.0, guidance_scale=7.0)


NOT_RUN: dict[str, str] = {}
"""Pipelines that were tried and are not in `NEWER`, with the reason."""

NEWER: list[Tiny] = [
    Tiny("QwenImageEditPlusPipeline", qwen_image_edit_plus, call_qwen_image_edit_plus, 2),
    Tiny("QwenImageLayeredPipeline", qwen_image_layered, call_qwen_image_layered, 2),
    Tiny("QwenImage21Pipeline", qwen_image_21, call_qwen_image_21, 2),
    Tiny("QwenImage21Pipeline (an image)", qwen_image_21_edit, call_qwen_image_21_edit, 2),
    Tiny("QwenImage21Pipeline (without its own cache)", qwen_image_21, call_qwen_image_21_plain, 2),
    Tiny("QwenImageImg2ImgPipeline (strength 0.6)", qwen_image_to_image, call_qwen_image_to_image, 2),
    Tiny("LTX2ImageToVideoPipeline", ltx2_image_to_video, call_ltx2_image_to_video, 3),
    Tiny("LTX2ConditionPipeline", ltx2_condition, call_ltx2_condition, 3),
    Tiny("Cosmos2_5_PredictBasePipeline", cosmos25, call_cosmos25, 2),
    Tiny("Cosmos3OmniPipeline", cosmos3, call_cosmos3, 2),
    Tiny("ZImageImg2ImgPipeline (strength 0.6)", z_image_to_image, call_z_image_to_image, 1),
    Tiny("ZImageOmniPipeline", z_image_omni, call_z_image_omni, 1),
    Tiny("WanAnimatePipeline", wan_animate, call_wan_animate, 2),
    Tiny("WanVideoToVideoPipeline (strength 0.6)", wan_video_to_video, call_wan_video_to_video, 2),
    Tiny("ChronoEditPipeline", chrono_edit, call_chrono_edit, 2),
    Tiny("Krea2Pipeline", krea2, call_krea2, 2),
    Tiny("Ideogram4Pipeline", ideogram4, call_ideogram4, 2),
    Tiny("GlmImagePipeline", glm_image, call_glm_image, 2),
    Tiny("HunyuanImagePipeline", hunyuan_image, call_hunyuan_image, 2),
    Tiny("LongCatImagePipeline", longcat_image, call_longcat_image, 2),
    Tiny("Kandinsky5T2IPipeline", kandinsky5_image, call_kandinsky5_image, 2),
    Tiny("PRXPipeline", prx, call_prx, 1),
    Tiny("OvisImagePipeline", ovis_image, call_ovis_image, 2),
    Tiny("BriaFiboPipeline", bria_fibo, call_bria_fibo, 1),
    Tiny("NucleusMoEImagePipeline", nucleus_moe, call_nucleus_moe, 2),
    Tiny("JoyImageEditPipeline", joy_image_edit, call_joy_image_edit, 2),
    Tiny("Kandinsky6TI2VAPipeline", kandinsky6, call_kandinsky6, 2),
    Tiny("SanaVideoPipeline", sana_video, call_sana_video, 1),
    Tiny("MotifVideoPipeline", motif_video, call_motif_video, 2),
    Tiny("StableAudio3Pipeline", stable_audio3, call_stable_audio3, 1),
    Tiny("AceStepPipeline", ace_step, call_ace_step, 1),
    Tiny("LucyEditPipeline", lucy_edit, call_lucy_edit, 2),
    Tiny("AnyFlowPipeline", any_flow, call_any_flow, 1),
    Tiny("HeliosPipeline", helios, call_helios, 2),
    Tiny("HunyuanVideoFramepackPipeline", framepack, call_framepack, 2),
    Tiny("Flux2KleinKVPipeline", flux2_klein_kv, call_flux2_klein_kv, 1),
    Tiny("SkyReelsV2ImageToVideoPipeline", skyreels_image_to_video, call_skyreels_image_to_video, 2),
    Tiny("LongCatAudioDiTPipeline", longcat_audio, call_longcat_audio, 2),
]
