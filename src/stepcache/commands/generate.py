"""`stepcache generate`: a clip or picture from a diffusers pipeline, uncached or with a policy, and a record of it.

    stepcache generate --model DIR --prompt "..." --policy lemica:25 --output clip.mp4
    stepcache generate --model DIR --prompt "..." --policy easycache:0.05,ret_steps=10 --output clip.mp4

`--policy magcache-calibration:FILE` computes every step and writes the model's magnitude ratios to FILE, for
`--policy magcache:0.12,ratios=FILE`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepcache import __version__
from stepcache.bench.methods import CALIBRATION, Method, help_text, policy_of, read
from stepcache.commands.flags import Flags, add_device_flags, add_request_flags, request_from
from stepcache.core.summary import RunSummary
from stepcache.files import check_writable, write_atomically
from stepcache.fleet import ranks
from stepcache.hosts.diffusers import model_name
from stepcache.hosts.patching import shift_of
from stepcache.measure.device import find_device
from stepcache.measure.generation import Request, check_fps, check_policy, generate
from stepcache.measure.pipelines import load_pipeline, model_defaults, model_inputs
from stepcache.measure.video import write_clip
from stepcache.methods import MagCacheCalibration

RECORD_SCHEMA, RECORD_VERSION = "stepcache.generation", 2


GONE = {
    "--budget": "write --policy hindsight:25 (or lemica:25, uniform:25)",
    "--lemica_budget": "write --policy lemica:25",
    "--lemica_predict": "write --policy lemica:25, which reuses, or --policy hindsight:25, which forecasts",
    "--thresh": "write --policy easycache:0.05",
    "--ret_steps": "write --policy easycache:0.05,ret_steps=10",
    "--magcache_thresh": "write --policy magcache:0.12",
    "--magcache_K": "write --policy magcache:0.12,K=4",
    "--retention_ratio": "write --policy magcache:0.12,R=0.2",
    "--magcache_ratios": "write --policy magcache:0.12,ratios=FILE",
    "--magcache_interp": "write --policy magcache:0.12,ratios=FILE,interp=product",
    "--magcache_calibration": f"write --policy {CALIBRATION}:FILE",
    "--teacache_thresh": "write --policy teacache:0.2",
    "--use_ret_steps": "write --policy teacache:0.2,ret_steps=1",
    "--interval": "write --policy taylorseer:5 or --policy uniform,interval=2",
    "--order": "write --policy taylorseer:5,order=1",
    "--first_enhance": "write --policy taylorseer:5,first_enhance=1",
    "--schedule": "write --policy hindsight:25, or follow a plan",
}
"""Flags of earlier versions, and their replacements."""


WITH_RATE, LOSSY, RANKS = "an .mp4 or .mkv --output", "an .mp4 --output", "torchrun"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache generate`."""
    parser.description = __doc__
    parser.epilog = "methods:\n" + help_text(bench=False)
    flags = Flags(parser, _modes)
    flags.add("--model", required=True, metavar="DIR_OR_ID", help="folder or hub id of a diffusers pipeline")
    flags.add("--prompt", required=True, metavar="TEXT", help="what to generate")
    flags.add("--image", metavar="FILE", help="input picture, for pipelines that take one")
    flags.add("--seed", type=int, default=0, metavar="N", help="seed of the noise")
    add_request_flags(flags)
    flags.add(
        "--output",
        required=True,
        metavar="FILE",
        help=".mp4 for viewing, .mkv or .npy lossless, .png for a picture; FILE's .json beside it",
    )
    flags.add("--lossless", action="store_true", default=False, needs=LOSSY, help="also write an .mkv beside the .mp4")
    flags.add("--fps", type=float, metavar="N", needs=WITH_RATE, help="default: the model's, else 16")
    add_device_flags(flags)
    _add_policy_flags(flags)
    _add_rank_flags(flags)


def _add_policy_flags(flags: Flags) -> None:
    group = flags.group("policy")
    flags.add("--policy", metavar="METHOD", group=group, help="one of the methods below (default: uncached)")
    flags.add("--plan", metavar="FILE", group=group, help="follow a plan file: short for --policy plan:FILE")
    flags.add("--boundary", choices=("output", "blocks"), group=group, help="short for boundary= of the method")
    flags.add("--table", metavar="MODEL", group=group, help="short for table= of the method, e.g. wan2.1-t2v-1.3B")
    flags.add(
        "--resample",
        action="store_true",
        default=False,
        group=group,
        help="short for resample=1: use a plan or table for other budgets and step counts as well",
    )
    flags.add(
        "--cache_device", metavar="DEV", group=group, help="where cached tensors are held between steps, e.g. cpu"
    )
    flags.add_gone(GONE)


def _add_rank_flags(flags: Flags) -> None:
    group = flags.group("on several ranks (torchrun --nproc_per_node=N -m stepcache generate ...)")
    kinds = ("ulysses", "ring")
    flags.add(
        "--parallel",
        choices=kinds,
        default="ulysses",
        group=group,
        needs=RANKS,
        help="how attention is split (ulysses)",
    )
    flags.add(
        "--rank_timeout",
        type=float,
        default=600.0,
        metavar="S",
        group=group,
        needs=RANKS,
        help="seconds to wait for a rank before giving up (600)",
    )


def _modes(args: argparse.Namespace) -> set[str]:
    suffix = Path(args.output).suffix
    modes = {WITH_RATE} if suffix in (".mp4", ".mkv") else set()
    modes |= {LOSSY} if suffix == ".mp4" else set()
    return modes | ({RANKS} if ranks.world_size() > 1 else set())


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, load, generate, write the clip and its record."""
    output, method = Path(args.output), _method(args)
    policy = policy_of(method)
    defaults = model_defaults(args.model)
    request = request_from(args, args.prompt, args.seed, args.image is not None)
    inputs = model_inputs(args.model, args.image is not None)
    fps = float(defaults.get("fps", 16.0) if args.fps is None else args.fps)
    check_fps(fps)
    _check_outputs(args, output, method, inputs.video)
    _check_devices(args, method)
    given = {} if args.image is None else {"image": read_image(args.image, request)}
    check_policy(policy, request, inputs)
    with ranks.together(args.rank_timeout, args.device) as mine:
        pipe = load_pipeline(args.model, mine.device or args.device, args.dtype)
        mine.split(pipe, args.parallel, request)
        pipe.set_progress_bar_config(disable=mine.rank > 0)
        check_policy(policy, request, inputs, pipe)
        frames, summary = generate(pipe, request, policy, args.cache_device, mine.group, **given)
    if mine.rank:
        return 0  # the first rank writes
    write_clip(output, frames, fps)
    if args.lossless:
        write_clip(output.with_suffix(".mkv"), frames, fps)
    document = json.dumps(record(pipe, request, args, method, summary), indent=1, default=str)
    write_atomically(output.with_suffix(".json"), document + "\n")
    print(summary)
    if isinstance(policy, MagCacheCalibration):
        policy.ratios().save(method.value)
        print(f"ratios written to {method.value}")
    print(f"wrote {output}")
    return 0


def _method(args: argparse.Namespace) -> Method:
    """The method that the flags name; ValueError for flags that contradict each other or have no effect on it."""
    if args.plan and args.policy:
        raise ValueError(f"--plan and --policy {args.policy} exclude each other; give one of them.")
    method = Method(f"plan:{args.plan}", "plan", args.plan) if args.plan else read(args.policy or "uncached")
    given = {"boundary": args.boundary, "table": args.table, "resample": "1" if args.resample else None}
    for key, value in given.items():
        if value is not None:
            method = method.with_option(key, value, f"--{key}")
    return method


def _check_outputs(args: argparse.Namespace, output: Path, method: Method, video: bool) -> None:
    suffixes = (".mp4", ".mkv", ".npy") if video else (".png", ".npy")
    if output.suffix not in suffixes:
        made = "clips" if video else "pictures"
        raise ValueError(f"--output is {args.output!r}; the model makes {made}: expected one of {', '.join(suffixes)}.")
    targets = [output, output.with_suffix(".json")]
    targets += [output.with_suffix(".mkv")] if args.lossless else []
    targets += [Path(method.value)] if method.name == CALIBRATION else []
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"{str(target)!r} would be written twice; choose another name.")
        check_writable(target)


def _check_devices(args: argparse.Namespace, method: Method) -> None:
    if args.device and ranks.world_size() > 1 and args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device is {args.device}; on several ranks expected cpu or cuda, each takes its own card.")
    if args.device:
        find_device(args.device)
    if not args.cache_device:
        return
    if method.name in ("uncached", CALIBRATION):
        raise ValueError(f"--cache_device has no effect on {method.text}, which caches nothing; leave it out.")
    find_device(args.cache_device, "--cache_device")


def read_image(path: str, request: Request) -> Any:
    """A picture, upright and in RGB, scaled and cropped about its middle to the size of the request, if it has one.

    Raises:
        FileNotFoundError, ValueError: no such file, or it cannot be read as a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path!r} does not exist.")
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image {path!r} cannot be read as a picture ({error}).") from error
    if request.width is None or request.height is None:
        return picture
    wide, high = picture.size
    if abs(wide / high / (request.width / request.height) - 1) > 0.01:
        print(
            f"{path} is {wide} x {high}; its middle is cropped to {request.width} x {request.height}.", file=sys.stderr
        )
    return ImageOps.fit(picture, (request.width, request.height), Image.Resampling.LANCZOS)


def record(
    pipe: Any, request: Request, args: argparse.Namespace, method: Method, summary: RunSummary
) -> dict[str, Any]:
    """Everything needed to repeat a run, and its result."""
    import diffusers

    return {
        "schema": RECORD_SCHEMA,
        "version": RECORD_VERSION,
        "model": args.model,
        "transformer": model_name(pipe),
        "scheduler": {"class": type(pipe.scheduler).__name__, "shift": shift_of(pipe.scheduler.config)},
        "request": asdict(request),
        "method": method.text,
        "flags": {name: value for name, value in vars(args).items() if value is not None},
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
            "skipped": summary.skipped,
            "branches": {b.name: {"computed": b.computed, "skipped": b.skipped} for b in summary.branches},
            "ideal_speedup": summary.ideal_speedup,
            "loop_seconds": summary.loop_seconds,
            "seconds_per_computed_step": summary.seconds_per_computed_step,
            "seconds_per_skipped_step": summary.seconds_per_skipped_step,
            "cache_bytes": summary.cache_bytes,
            "forced": summary.forced,
            "notes": summary.notes,
            "warnings": summary.warnings,
            "plan": asdict(summary.plan) if summary.plan else None,
        },
    }
