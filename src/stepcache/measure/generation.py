"""Make a clip with a diffusers Wan pipeline: load it, check a request, run it, decode it."""

from __future__ import annotations

import json
import math
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
from stepcache.measure.device import find_device
from stepcache.measure.prompts import check_seed
from stepcache.methods import LeMiCa, MagCache, MagCacheCalibration, TeaCache

TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "WanPipeline", "WanImageToVideoPipeline"
"""Pipelines whose inputs the commands know; the library takes any."""


DEFAULTS_FILE = "generation_defaults.json"
"""A model folder may hold this JSON object of numbers: height, width, num_frames, fps, guidance."""


DEFAULTS: dict[str, tuple[type, ...]] = {
    "height": (int,),
    "width": (int,),
    "num_frames": (int,),
    "fps": (int, float),
    "guidance": (int, float),
}


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


def load_pipeline(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    kinds: tuple[str, ...] = (TEXT_TO_VIDEO,),
) -> Any:
    """Load a diffusers Wan pipeline.

    Args:
        model: folder, or hub id such as owner/name.
        device: default cuda if there is one, else cpu.
        dtype: float32, bfloat16 or float16 of all but the VAE; default bfloat16 on cuda, float32 on cpu.
        kinds: class names of the pipelines that will do.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a pipeline of another kind, or a device that is not there, said before any weights are read; or
            damaged files, or too large ones.
        ImportError: diffusers is not installed.
    """
    place = find_device(device)
    kind = pipeline_kind(model)
    if kind is not None:
        _check_kind(model, kind, kinds)
    try:
        from diffusers import DiffusionPipeline
        from safetensors import SafetensorError
    except ImportError as error:
        raise ImportError("this needs diffusers: pip install 'stepcache[diffusers,video]'.") from error
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    precision = {"default": getattr(torch, dtype), "vae": torch.float32}  # Wan's VAE loses colours in half precision
    try:
        with warnings.catch_warnings():  # newer diffusers say `dtype`, older ones know only `torch_dtype`
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(model if kind is None else _folder(model), torch_dtype=precision)
        _check_kind(model, type(pipe).__name__, kinds)
        return pipe.to(place)
    except (SafetensorError, RuntimeError, LookupError, TypeError) as error:  # damaged files, or no memory for them
        raise ValueError(f"model {model!r} cannot be loaded on {place}: {error}") from error


def _folder(model: str) -> Path:
    return Path(model).expanduser()


def _check_kind(model: str, kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"{model!r} is a {kind}; expected a {' or '.join(kinds)}.")


def pipeline_kind(model: str) -> str | None:
    """Class name of the pipeline in a folder; None for a hub id, which only loading can tell.

    Raises:
        FileNotFoundError: no such folder, or none of a diffusers pipeline.
        ValueError: its model_index.json is damaged.
    """
    folder = _folder(model)
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise FileNotFoundError(
                f"model folder {model!r} does not exist; give a folder or a hub id such as owner/name."
            )
        return None
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"model folder {model!r} has no model_index.json; it is not a diffusers pipeline.")
    return str(_json_object(index, "model index").get("_class_name"))


def model_defaults(model: str) -> dict[str, Any]:
    """The folder's own defaults (`generation_defaults.json`), else none; ValueError for a damaged file."""
    path = _folder(model) / DEFAULTS_FILE
    if not path.is_file():
        return {}
    defaults = _json_object(path, "defaults")
    for name, value in defaults.items():
        if name not in DEFAULTS or type(value) not in DEFAULTS[name]:
            raise ValueError(f"{path}: {name} is {value!r}; expected numbers named {', '.join(DEFAULTS)}.")
    return defaults


def _json_object(path: Path, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path, kind))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object.")
    return found


def check_policy(policy: Policy, request: Request, pipe: Any = None) -> None:
    """Let a policy that does not fit the run say so before anything is computed (ValueError).

    Without a pipeline what the model alone can tell is left out, so that the rest is said before it is loaded.
    """
    if isinstance(policy, MagCacheCalibration) or (pipe is None and _needs_model(policy)):
        return
    shift = None if pipe is None else pipe.scheduler.config.get("flow_shift")
    model = None if pipe is None else model_name(pipe)
    policy.begin(Trajectory(request.steps, model, shift, request.guidance, boundary=policy.boundary))


def _needs_model(policy: Policy) -> bool:
    """Whether a policy looks up figures of the model that runs."""
    if isinstance(policy, MagCache):
        return policy.model is None and policy.ratios is None
    return isinstance(policy, TeaCache) or (isinstance(policy, LeMiCa) and policy.model is None)


def check_request(request: Request) -> None:
    """ValueError for numbers no pipeline can use."""
    if request.steps < 1:
        raise ValueError(f"--steps is {request.steps}; expected at least 1.")
    if not (math.isfinite(request.guidance) and request.guidance >= 0):
        raise ValueError(f"--guidance is {request.guidance}; expected 0 or more (1 switches guidance off).")
    for name in ("height", "width"):
        if (size := getattr(request, name)) < 16 or size % 16:
            raise ValueError(f"--{name} is {size}; expected a multiple of 16.")
    if request.num_frames < 1 or request.num_frames % 4 != 1:
        raise ValueError(f"--num-frames is {request.num_frames}; expected 4n + 1, for example 17 or 81.")
    if request.negative_prompt and request.guidance <= 1:
        raise ValueError(
            f"--negative_prompt has no effect at guidance {request.guidance:g}; leave it out, or guide by more than 1."
        )
    check_seed(request.seed)


def check_fps(fps: float) -> None:
    """ValueError for a frame rate no clip can have."""
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"--fps is {fps}; expected a number above 0.")


def latent_size(pipe: Any, request: Request) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of the latents that a text-to-video pipeline makes for a request."""
    frames = (request.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    space = pipe.vae_scale_factor_spatial
    return pipe.transformer.config.in_channels, frames, request.height // space, request.width // space


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
