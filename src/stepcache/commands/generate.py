"""`stepcache generate`: a clip from a diffusers Wan pipeline, uncached or with a policy, and a record to repeat it."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from stepcache import __version__
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy
from stepcache.core.summary import RunSummary
from stepcache.core.trajectory import Boundary
from stepcache.files import check_writable, write_atomically
from stepcache.fleet import ranks
from stepcache.hosts.diffusers import model_name
from stepcache.measure.generation import Request, check_policy, check_request, generate, load_pipeline, model_defaults
from stepcache.measure.video import write_clip
from stepcache.methods import (
    EasyCache,
    Fixed,
    Hindsight,
    LeMiCa,
    MagCache,
    MagCacheCalibration,
    Off,
    Ratios,
    TaylorSeer,
    TeaCache,
    Uniform,
)

RECORD_SCHEMA, RECORD_VERSION = "stepcache.generation", 1


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
        choices=("none", "hindsight", "lemica", "easycache", "magcache", "teacache", "taylorseer", "uniform"),
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
        choices=("reuse", "hindsight"),
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
    if args.policy == "hindsight":
        return Hindsight(25 if args.budget is None else args.budget, args.schedule, boundary=boundary)
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
