"""Tiny real diffusers pipelines, shared by the tests (`from conftest import tiny_pipe`): the package's, and more."""

from __future__ import annotations

import argparse
import functools
import json

import torch
import train_tiny_wan as training
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline

from stepcache.bench import tiny
from stepcache.bench.tiny import sample, tiny_scheduler, tiny_transformer

__all__ = ["sample", "tiny_i2v_pipe", "tiny_pipe", "tiny_scheduler", "tiny_transformer", "tiny_vae", "untrained_model"]


@functools.cache
def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def tiny_pipe(seed: int = 0) -> WanPipeline:
    """The package's, with a VAE."""
    return tiny.tiny_pipe(seed, tiny_vae())


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
