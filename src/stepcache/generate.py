"""`stepcache generate`: a clip from a diffusers Wan pipeline, uncached or with a policy, and a record to repeat it."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepcache import __version__, ranks
from stepcache.cache import Policy, RunSummary
from stepcache.hosts.diffusers import accelerate, model_name
from stepcache.plan import Boundary, Plan, Trajectory, read_text, write_atomically
from stepcache.policies import (
    Checked,
    EasyCache,
    Fixed,
    LeMiCa,
    MagCache,
    MagCacheCalibration,
    Off,
    Ratios,
    TaylorSeer,
    TeaCache,
    Uniform,
)
from stepcache.video import write_clip

RECORD_SCHEMA, RECORD_VERSION = "stepcache.generation", 1
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache generate`."""
    parser.description = __doc__
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="folder or hub id of a diffusers Wan pipeline")
    add("--prompt", required=True)
    add("--negative_prompt", default="")
    add("--image", metavar="FILE", help="first frame, for image-to-video pipelines")
    add("--steps", type=int, default=50, help="steps of the denoising loop (50)")
    add("--guidance", type=float, help="guidance scale; 1 switches guidance off (default: the model's, else 5)")
    add("--seed", type=int, default=0)
    for name in ("height", "width", "num_frames"):
        add(f"--{name}", type=int, help="default: the model's")
    add(
        "--output",
        required=True,
        metavar="FILE",
        help=".mp4 for viewing, .mkv or .npy lossless; FILE's .json beside it",
    )
    add("--lossless", action="store_true", help="also write the frames losslessly, as .mkv beside the clip")
    add("--fps", type=float, help="default: the model's, else 16")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, float32 on cpu")
    ranks.add_arguments(parser)
    add_policy_arguments(parser)


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose and set a policy: as in the drop-ins."""
    group = parser.add_argument_group("policy")
    add = group.add_argument
    add(
        "--policy",
        choices=("none", "checked", "lemica", "easycache", "magcache", "teacache", "taylorseer", "uniform"),
        default=None,
        help="default: none, or --plan",
    )
    add("--plan", metavar="FILE", help="a plan file to follow")
    add("--boundary", choices=("output", "blocks"), help="what is reused (default: the plan's, else output)")
    add("--table", metavar="MODEL", help="use the figures published for this model, e.g. wan2.1-t2v-1.3B")
    add("--resample", action="store_true", help="allow other budgets and step counts than the plan or the table is for")
    add("--cache_device", help="where cached tensors live between steps, e.g. cpu")
    add("--lemica_budget", type=int, default=25, help="LeMiCa: computed steps (25)")
    add(
        "--lemica_predict",
        choices=("reuse", "checked"),
        default="reuse",
        help="LeMiCa: repeat the last output, as published (reuse), or extrapolate it under a self-check (checked)",
    )
    add("--thresh", type=float, default=0.05, help="EasyCache: accumulated change that ends reuse (0.05)")
    add("--ret_steps", type=int, default=10, help="EasyCache: steps computed at the start (10)")
    add("--magcache_thresh", type=float, help="MagCache: accumulated drift that ends reuse (recommended, else 0.12)")
    add("--magcache_K", type=int, help="MagCache: most consecutive reused steps (recommended, else 2)")
    add("--retention_ratio", type=float, help="MagCache: share computed at the start (recommended, else 0.2)")
    add("--magcache_ratios", metavar="FILE", help="MagCache: ratios file to use, or to write when calibrating")
    add("--magcache_interp", choices=("product", "nearest"), help="MagCache: bring ratios to another step count")
    add("--teacache_thresh", type=float, default=0.2, help="TeaCache: accumulated change that ends reuse (0.2)")
    add("--use_ret_steps", action="store_true", help="TeaCache: its second mode, first five steps computed")
    add("--interval", type=int, help="TaylorSeer, uniform: every so many steps are computed (TaylorSeer: 5)")
    add("--order", type=int, default=1, choices=(0, 1, 2), help="TaylorSeer: highest difference used (1)")
    add("--first_enhance", type=int, default=1, help="TaylorSeer: steps computed at the start (1)")
    add("--budget", type=int, help="checked, uniform: computed steps (checked: 25; uniform: instead of --interval)")
    add("--schedule", choices=("uniform", "published"), default="uniform", help="checked: which steps (uniform)")
    add("--magcache_calibration", action="store_true", help="MagCache: compute every step, write --magcache_ratios")


def policy_from(args: argparse.Namespace) -> Policy:
    """The policy the flags describe; ValueError or FileNotFoundError if they contradict each other or a file is bad."""
    if args.plan and args.policy:
        raise ValueError(f"--plan and --policy {args.policy} exclude each other; give one of them.")
    if args.magcache_calibration and not args.magcache_ratios:
        raise ValueError("--magcache_calibration needs --magcache_ratios FILE to write to.")
    if args.plan:
        plan = Plan.load(args.plan)
        if args.boundary and args.boundary != plan.boundary:
            if plan.boundary:
                raise ValueError(f"the plan is for boundary {plan.boundary}; leave --boundary {args.boundary} out.")
            plan = replace(plan, boundary=args.boundary)
        return Fixed(plan, args.resample)
    if args.magcache_calibration:
        return MagCacheCalibration()
    boundary: Boundary = args.boundary or "output"
    if args.policy == "lemica":
        return LeMiCa(args.lemica_budget, args.table, args.resample, boundary, args.lemica_predict)
    if args.policy == "checked":
        return Checked(25 if args.budget is None else args.budget, args.schedule, boundary=boundary)
    if args.policy == "easycache":
        return EasyCache(args.thresh, args.ret_steps, boundary)
    if args.policy == "magcache":
        ratios = Ratios.load(args.magcache_ratios) if args.magcache_ratios else None
        settings = (args.magcache_thresh, args.magcache_K, args.retention_ratio, args.table)
        return MagCache(*settings, ratios, args.magcache_interp, boundary)
    if args.policy == "teacache":
        return TeaCache(args.teacache_thresh, args.use_ret_steps, args.table, boundary)
    if args.policy == "taylorseer":
        return TaylorSeer(5 if args.interval is None else args.interval, args.order, args.first_enhance, boundary)
    if args.policy == "uniform":
        return Uniform(args.budget, args.interval, boundary)
    return Off()


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


def check_writable(path: Path) -> None:
    """Find out before the work that a file can be written (OSError), without leaving one behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".stepcache-"):
        pass


def request_from(args: argparse.Namespace, defaults: dict[str, Any], prompt: str = "", seed: int = 0) -> Request:
    """What the flags ask for, checked (ValueError); sizes and guidance default to the model's, then to Wan2.1's."""
    names = ("guidance", "height", "width", "num_frames")
    sizes = {name: _flag_or_default(args, defaults, name, getattr(Request, name)) for name in names}
    request = Request(prompt, args.negative_prompt, args.steps, seed=seed, **sizes)
    check_request(request)
    return request


def _flag_or_default(args: argparse.Namespace, defaults: dict[str, Any], name: str, otherwise: Any) -> Any:
    given = getattr(args, name)
    return defaults.get(name, otherwise) if given is None else given


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


def record(model: str, pipe: Any, request: Request, args: argparse.Namespace, summary: RunSummary) -> dict[str, Any]:
    """Everything needed to repeat a run, and what it did."""
    import diffusers

    flags = {k: v for k, v in vars(args).items() if k not in ("run", "command") and v is not None}
    return {
        "schema": RECORD_SCHEMA,
        "version": RECORD_VERSION,
        "model": model,
        "transformer": model_name(pipe),
        "scheduler": {"class": type(pipe.scheduler).__name__, "shift": pipe.scheduler.config.get("flow_shift")},
        "request": asdict(request),
        "flags": flags,
        "device": str(pipe.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": {
            "stepcache": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "result": {
            "computed": summary.computed,
            "reused": summary.reused,
            "branches": {b.name: {"computed": b.computed, "reused": b.reused} for b in summary.branches},
            "ideal_speedup": summary.ideal_speedup,
            "loop_seconds": summary.loop_seconds,
            "seconds_per_computed_step": summary.seconds_per_computed_step,
            "seconds_per_reused_step": summary.seconds_per_reused_step,
            "cache_bytes": summary.cache_bytes,
            "forced": summary.forced,
            "warnings": summary.warnings,
            "plan": json.loads(summary.plan.to_json()) if summary.plan else None,
        },
    }


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, load, generate, write the clip and its record."""
    output = Path(args.output)
    if output.suffix not in (".mp4", ".mkv", ".npy"):
        raise ValueError(f"--output is {args.output!r}; expected a name ending in .mp4, .mkv or .npy.")
    policy = policy_from(args)
    defaults = model_defaults(args.model)
    request = request_from(args, defaults, args.prompt, args.seed)
    fps = float(_flag_or_default(args, defaults, "fps", 16.0))
    if not fps > 0:
        raise ValueError(f"--fps is {fps}; expected a number above 0.")
    for target in filter(None, (args.output, args.magcache_ratios if args.magcache_calibration else None)):
        check_writable(Path(target))
    with ranks.together(args.rank_timeout, args.device) as mine:
        pipe = load_pipeline(args.model, mine.device or args.device, args.dtype)
        mine.split(pipe, args.parallel, ranks.video_tokens(pipe, request.num_frames, request.height, request.width))
        pipe.set_progress_bar_config(disable=mine.rank > 0)
        inputs = _image_input(pipe, args.image, request)
        check_policy(policy, pipe, request)
        frames, summary = generate(pipe, request, policy, args.cache_device, mine.group, **inputs)
    if mine.rank:
        return 0  # the first rank writes
    write_clip(output, frames, fps)
    if args.lossless:
        write_clip(output.with_suffix(".mkv"), frames, fps)
    document = json.dumps(record(args.model, pipe, request, args, summary), indent=1, default=str)
    write_atomically(output.with_suffix(".json"), document + "\n")
    print(summary)
    if isinstance(policy, MagCacheCalibration):
        policy.ratios().save(args.magcache_ratios)
        print(f"ratios written to {args.magcache_ratios}")
    print(f"wrote {output}")
    return 0


def _image_input(pipe: Any, image: str | None, request: Request) -> dict[str, Any]:
    wants = "ImageToVideo" in type(pipe).__name__
    if wants != bool(image):
        need = "needs --image FILE" if wants else "takes no --image"
        raise ValueError(f"{type(pipe).__name__} {need}.")
    if not image:
        return {}
    from PIL import Image

    if not Path(image).is_file():
        raise FileNotFoundError(f"image {image!r} does not exist.")
    return {"image": Image.open(image).convert("RGB").resize((request.width, request.height))}
