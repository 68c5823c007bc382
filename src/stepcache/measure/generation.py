"""Make a clip with a diffusers Wan pipeline: load it, check a request, run it, decode it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.files import read_text
from stepcache.hosts.diffusers import accelerate, model_name
from stepcache.methods import (
    MagCacheCalibration,
)

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
"""What this command knows the inputs of; the library takes any pipeline."""


DEFAULTS_FILE = "generation_defaults.json"
"""A model folder may hold this JSON object: height, width, num_frames, fps, guidance."""


@dataclass(frozen=True)
class Request:
    """What to generate; sizes in pixels, defaults those of Wan2.1 at 480p."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    height: int = 480
    width: int = 832
    num_frames: int = 81


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """Load a diffusers Wan pipeline.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a supported pipeline.
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError("this needs diffusers: pip install 'stepcache[diffusers,video]'.") from error
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"model folder {model!r} has no model_index.json; it is not a diffusers pipeline.")
        model = str(folder)
    elif looks_local:
        raise FileNotFoundError(f"model folder {model!r} does not exist; give a folder or a hub id such as owner/name.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    precision = {"default": getattr(torch, dtype), "vae": torch.float32}  # Wan's VAE loses colours in half precision
    with warnings.catch_warnings():  # newer diffusers say `dtype`, older ones know only `torch_dtype`
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=precision)
    if type(pipe).__name__ not in PIPELINES:
        raise ValueError(f"{model!r} is a {type(pipe).__name__}; expected one of {', '.join(PIPELINES)}.")
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error


def model_defaults(model: str) -> dict[str, Any]:
    """The folder's own defaults (`generation_defaults.json`), else none."""
    path = Path(model).expanduser() / DEFAULTS_FILE
    if not path.is_file():
        return {}
    defaults = json.loads(read_text(path, "defaults"))
    if not isinstance(defaults, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return defaults


def check_policy(policy: Policy, pipe: Any, request: Request) -> None:
    """Let a policy that does not fit the run say so before anything is computed (ValueError)."""
    if not isinstance(policy, MagCacheCalibration):
        shift = pipe.scheduler.config.get("flow_shift")
        model = model_name(pipe)
        policy.begin(Trajectory(request.steps, model, shift, request.guidance, boundary=policy.boundary))


def check_request(request: Request) -> None:
    """ValueError for numbers no pipeline can use."""
    if request.steps < 1:
        raise ValueError(f"--steps is {request.steps}; expected at least 1.")
    if request.guidance < 0:
        raise ValueError(f"--guidance is {request.guidance}; expected 0 or more (1 switches guidance off).")
    for name in ("height", "width"):
        if (size := getattr(request, name)) < 16 or size % 16:
            raise ValueError(f"--{name} is {size}; expected a multiple of 16.")
    if request.num_frames < 1 or request.num_frames % 4 != 1:
        raise ValueError(f"--num_frames is {request.num_frames}; expected 4n + 1, for example 17 or 81.")


def _call(pipe: Any, request: Request, output_type: str, **inputs: Any) -> Any:
    """What the pipeline, run once as it stands, returns as frames."""
    return pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
        **inputs,
    ).frames


def generated_frames(pipe: Any, request: Request, **inputs: Any) -> np.ndarray:
    """Run the pipeline once as it stands and return the clip's frames [T, H, W, 3] uint8."""
    return _rounded(_call(pipe, request, "np", **inputs)[0])


def sample_latent(pipe: Any, request: Request, **inputs: Any) -> torch.Tensor:
    """Run the pipeline once as it stands and return the final latent, before the VAE."""
    return torch.as_tensor(_call(pipe, request, "latent", **inputs))


@torch.no_grad()
def decode_latent(pipe: Any, latent: torch.Tensor) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 of one latent (1, C, F, h, w), as a Wan pipeline decodes its last one."""
    vae = pipe.vae
    latent = latent.to(pipe.device, vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latent)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latent)
    video = vae.decode(latent * std + mean, return_dict=False)[0]
    frames = pipe.video_processor.postprocess_video(video, output_type="np")[0]
    return _rounded(frames)


def _rounded(frames: np.ndarray) -> np.ndarray:
    return np.asarray((np.clip(frames, 0, 1) * 255).round().astype(np.uint8))


def generate(
    pipe: Any, request: Request, policy: Policy, cache_device: str | None = None, group: Any = None, **inputs: Any
) -> tuple[np.ndarray, RunSummary]:
    """Run the pipeline once under `policy`; `group`: the ranks that make the clip together.

    Returns:
        frames [T, H, W, 3] uint8, and what the run did.
    """
    with accelerate(pipe, policy, cache_device=cache_device, group=group) as accelerated:
        frames = generated_frames(pipe, request, **inputs)
    return frames, accelerated.summary()
