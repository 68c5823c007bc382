"""Make a clip or a picture with a diffusers pipeline: check a request, run it, keep the frames."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.diffusers import accelerate, model_name
from stepcache.hosts.patching import shift_of
from stepcache.measure.pipelines import Inputs, inputs_of, model_defaults
from stepcache.measure.prompts import check_seed
from stepcache.methods import LeMiCa, MagCache, MagCacheCalibration, TeaCache


@dataclass(frozen=True)
class Request:
    """What to generate; sizes in pixels, `max_sequence_length` in tokens. None: the pipeline's own default."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What runs of several prompts and seeds have in common."""
        return {name: value for name, value in asdict(self).items() if name not in ("prompt", "seed")}


def requested(model: str, prompt: str = "", **given: Any) -> Request:
    """A request whose settings are the model's defaults where they are not given."""
    names = {each.name for each in fields(Request)}
    known = {name: value for name, value in model_defaults(model).items() if name in names}
    return Request(prompt, **{**known, **given})


def check_policy(policy: Policy, request: Request, inputs: Inputs, pipe: Any = None) -> None:
    """ValueError for a policy that does not fit the run, before anything is computed.

    Without a pipeline, checks that need the model are omitted, so that the others come before it is loaded.
    """
    if isinstance(policy, MagCacheCalibration) or (pipe is None and _needs_model(policy)):
        return
    shift = None if pipe is None else shift_of(pipe.scheduler.config)
    model = None if pipe is None else model_name(pipe)
    guidance = request.guidance if inputs.mixes else None
    policy.begin(Trajectory(request.steps, model, shift, guidance, boundary=policy.boundary))


def _needs_model(policy: Policy) -> bool:
    """Whether a policy looks up figures of the model that runs."""
    if isinstance(policy, MagCache):
        return policy.model is None and policy.ratios is None
    return isinstance(policy, TeaCache) or (isinstance(policy, LeMiCa) and policy.model is None)


def check_request(request: Request, inputs: Inputs) -> None:
    """ValueError for numbers the pipeline cannot use, and for what it does not take."""
    if request.steps < 1:
        raise ValueError(f"--steps is {request.steps}; expected at least 1.")
    if request.guidance is not None:
        if inputs.scale is None:
            raise ValueError(f"--guidance has no effect on {inputs.kind}, which takes no guidance scale; leave it out.")
        if not (math.isfinite(request.guidance) and request.guidance >= 0):
            raise ValueError(f"--guidance is {request.guidance}; expected 0 or more (1 switches guidance off).")
    for name in ("height", "width"):
        if (size := getattr(request, name)) is not None and (size < 16 or size % 16):
            raise ValueError(f"--{name} is {size}; expected a multiple of 16.")
    if request.num_frames is not None:
        if not inputs.video:
            raise ValueError(f"--num-frames has no effect on {inputs.kind}, which makes pictures; leave it out.")
        if request.num_frames < 1 or (inputs.kind.startswith("Wan") and request.num_frames % 4 != 1):
            raise ValueError(f"--num-frames is {request.num_frames}; expected 4n + 1, for example 17 or 81.")
    if request.negative_prompt:
        if "negative_prompt" not in inputs.defaults or (inputs.scale is not None and not inputs.mixes):
            raise ValueError(f"--negative-prompt has no effect on {inputs.kind}; leave it out.")
        if inputs.mixes and request.guidance is not None and request.guidance <= 1:
            raise ValueError(
                f"--negative-prompt has no effect at guidance {request.guidance:g}; leave it out, or guide by more "
                "than 1."
            )
    check_seed(request.seed)


def check_fps(fps: float) -> None:
    """ValueError for a frame rate no clip can have."""
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"--fps is {fps}; expected a number above 0.")


def _call(pipe: Any, request: Request, output_type: str, **inputs: Any) -> Any:
    """What the pipeline, run once as it stands, returns as frames or pictures."""
    takes = inputs_of(pipe)
    negative = request.negative_prompt or None
    if takes.scale == "true_cfg_scale" and (request.guidance or 2) > 1:
        negative = negative or " "  # without one Qwen-Image's pipelines do not guide
    wanted = {
        "negative_prompt": negative,
        "num_inference_steps": request.steps,
        takes.scale or "": request.guidance,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "max_sequence_length": request.max_sequence_length,
    }
    found = pipe(
        prompt=request.prompt,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
        **{name: value for name, value in wanted.items() if name in takes.defaults and value is not None},
        **inputs,
    )
    return found.frames if hasattr(found, "frames") else found.images


def generated_frames(pipe: Any, request: Request, **inputs: Any) -> np.ndarray:
    """Run the pipeline once as it stands and return the clip's frames [T, H, W, 3] uint8; of a picture T is 1."""
    found = np.asarray(_call(pipe, request, "np", **inputs))
    frames = found[0] if found.ndim == 5 else found
    return np.asarray((np.clip(frames, 0, 1) * 255).round().astype(np.uint8))


def sample_latent(pipe: Any, request: Request) -> torch.Tensor:
    """Run the pipeline once as it stands and return the final latent, before the VAE, as the pipeline gives it."""
    return torch.as_tensor(_call(pipe, request, "latent"))


def sample_both(pipe: Any, request: Request) -> tuple[torch.Tensor, np.ndarray]:
    """Run the pipeline once as it stands: the latent after its last step, and the frames [T, H, W, 3] uint8.

    Raises:
        ValueError: its call takes no `callback_on_step_end`, by which the latent is seen.
    """
    if not shows_latents(pipe):
        raise ValueError(f"{type(pipe).__name__} does not show its latents (callback_on_step_end).")
    latents: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [tensors["latents"]]
        return {}

    frames = generated_frames(pipe, request, callback_on_step_end=keep)
    return latents[0].detach().clone(), frames


def shows_latents(pipe: Any) -> bool:
    """Whether its call takes `callback_on_step_end`."""
    return "callback_on_step_end" in inputs_of(pipe).defaults


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
