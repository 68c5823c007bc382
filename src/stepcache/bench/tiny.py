"""Tiny real diffusers pipelines with random weights, built in memory: what `selftest` and the tests run.

Prompts are given as embeddings and clips are latents, so there is no text encoder, no VAE and no file.
"""

from __future__ import annotations

from typing import Any

import torch

TOKENS, WIDTH = 8, 32
"""Of a prompt: tokens, and the size of an embedding."""


def tiny_transformer(seed: int = 0, in_channels: int = 16) -> Any:
    """Wan's transformer with three blocks, in float32 on the CPU; `in_channels`: more than 16 for image to video."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=64,
    )
    return _shaken(transformer)


def tiny_scheduler(shift: float = 3.0) -> Any:
    """UniPC on flow matching's noise levels, Wan's own sampler."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def tiny_pipe(seed: int = 0, vae: Any = None) -> Any:
    """A Wan pipeline, text to video, guided."""
    from diffusers import WanPipeline

    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, transformer=tiny_transformer(seed), vae=vae, scheduler=tiny_scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gentle_pipe(seed: int = 0) -> Any:
    """`tiny_pipe`, whose outputs move smoothly enough with time that a part of them can be foretold."""
    pipe = tiny_pipe(seed)
    _calm(pipe.transformer.condition_embedder.time_embedder)
    return pipe


def gentle_image_pipe() -> Any:
    """A PixArt pipeline, as gentle: it takes the samplers of noise prediction, which Wan's pipeline does not."""
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        patch_size=2,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, transformer=_shaken(transformer), vae=None, scheduler=DDIMScheduler()
    )
    _calm(transformer.adaln_single.emb.timestep_embedder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _shaken(transformer: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that prompts, steps and guidance matter."""
    for p in transformer.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, 0, 0.1)
    return transformer.eval()


@torch.no_grad()
def _calm(time_embedder: Any) -> None:
    time_embedder.linear_1.weight.mul_(0.4)


def sample(
    pipe: Any,
    steps: int = 12,
    guidance: float = 5.0,
    size: int = 32,
    seed: int = 1,
    batch: int = 1,
    frames: int = 5,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor:
    """One generation of a Wan pipeline, as latents (batch, 16, frames in latents, size / 8, size / 8).

    Args:
        pipe: of `tiny_pipe`.
        steps: of the loop.
        guidance: its scale; 1: one branch only.
        size: height and width in pixels.
        seed: of the noise; prompts are always the same.
        batch: clips at once, each with a prompt of its own.
        frames: of a clip.
        device: where the transformer runs.
        **options: the pipeline's, in place of those.
    """
    cond, uncond = prompts(batch, device)
    given = {
        "prompt_embeds": cond,
        "negative_prompt_embeds": uncond if guidance > 1 else None,
        "height": size,
        "width": size,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    made: torch.Tensor = pipe(**given | options).frames
    return made


def sample_image(pipe: Any, steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """One generation of `gentle_image_pipe`, as latents (1, 4, 8, 8)."""
    cond, uncond = prompts(1, device)
    mask = torch.ones(1, TOKENS, dtype=torch.long, device=device)
    made: torch.Tensor = pipe(
        prompt_embeds=cond,
        negative_prompt=None,
        negative_prompt_embeds=uncond,
        prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        use_resolution_binning=False,
    ).images
    return made


def prompts(batch: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (batch, TOKENS, WIDTH), for and against."""
    g = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(batch, TOKENS, WIDTH, generator=g) for _ in range(2))
    return cond.to(device), uncond.to(device)
