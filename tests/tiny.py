"""Tiny real diffusers pipelines, shared by the tests (`from conftest import tiny_pipe`)."""

from __future__ import annotations

import argparse
import functools
import json

import torch
import train_tiny_wan as training
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)


def tiny_transformer(seed: int = 0, in_channels: int = 16) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
    )
    for p in transformer.parameters():  # large enough that prompts, steps and guidance matter
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.1)
    return transformer.eval()


@functools.cache
def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def tiny_scheduler(shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def tiny_pipe(seed: int = 0) -> WanPipeline:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=tiny_transformer(seed),
        vae=tiny_vae(),
        scheduler=tiny_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_i2v_pipe() -> WanImageToVideoPipeline:
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        image_encoder=None,
        image_processor=None,
        transformer=tiny_transformer(2, in_channels=36),
        vae=tiny_vae(),
        scheduler=tiny_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, steps=12, guidance=5.0, size=32, seed=1, batch=1, frames=5, **kwargs):
    """One generation, as latents."""
    g = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(batch, 8, 32, generator=g), torch.randn(batch, 8, 32, generator=g)
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond if guidance > 1 else None,
        height=size,
        width=size,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **kwargs,
    ).frames


def untrained_model(folder):
    """Save a real, untrained Wan pipeline, tokenizer and text encoder included."""
    torch.manual_seed(0)
    transformer, tokenizer = training.build_transformer(), training.build_tokenizer()
    for p in transformer.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.04)
    pipe = training.assemble(
        argparse.Namespace(flow_shift=5.0),
        training.build_vae(),
        transformer,
        training.build_text_encoder(len(tokenizer)),
    )
    pipe.save_pretrained(folder)
    defaults = {"height": 32, "width": 32, "num_frames": 5, "fps": 8, "guidance": 3.0}
    (folder / "generation_defaults.json").write_text(json.dumps(defaults))
