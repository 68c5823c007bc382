r"""LeMiCa for HunyuanVideo-1.5: copy this file into a clone of Tencent-Hunyuan/HunyuanVideo-1.5, run it as generate.py.

    torchrun --nproc_per_node=4 lemica_generate.py --resolution 480p --model_path ./ckpts --prompt "..." \
        --enable_cache true --cache_type lemica --lemica_step 25

Without --cache_type lemica it is upstream's generate.py, with upstream's own caches.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, add_predict, add_resample, fail, leads, planned, say
from stepcache.hosts.hunyuanvideo15 import MODEL, CacheHelper, DoesNotFit, install
from stepcache.methods.fixed import Fixed
from stepcache.methods.lemica import LeMiCa

CACHE_TYPES = ("lemica", "deepcache", "teacache", "taylorcache")


def flags() -> argparse.ArgumentParser:
    """LeMiCa's own flags."""
    parser = argparse.ArgumentParser(prog="lemica_generate.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("LeMiCa (with --enable_cache true --cache_type lemica)")
    group.add_argument("--lemica_step", type=int, help="computed steps: 25 (default), 20, 15 or 10 of 50")
    add_predict(group)
    add_resample(group)
    add_boundary(group)
    return parser


def main() -> None:
    """Take our own flags, hand all others to upstream's main, and step in where it makes its pipeline."""
    own, rest = flags().parse_known_args()
    _check_place()
    if {"-h", "--help"} & set(rest):
        print(flags().format_help(), "\nAnd all flags of HunyuanVideo-1.5's generate.py:\n", sep="")
    upstream = _upstream()
    sys.argv = [sys.argv[0], *rest]
    generate_video = upstream.generate_video

    def cached(args: argparse.Namespace) -> None:
        try:
            policy = choose(own, args)
        except (ValueError, OSError) as error:
            fail(str(error))
        if policy is None:
            generate_video(args)
            return
        args.output_path = args.output_path or default_file(upstream, args)
        _generate(upstream, generate_video, args, policy)

    upstream.generate_video = cached
    try:
        upstream.main()
    finally:
        upstream.generate_video = generate_video


def choose(own: argparse.Namespace, args: argparse.Namespace) -> Policy | None:
    """The policy, checked before anything is loaded; `None`: upstream's process. ValueError, FileNotFoundError."""
    if args.enable_cache and args.cache_type not in CACHE_TYPES:
        raise ValueError(f"--cache_type {args.cache_type} is unknown; expected one of {', '.join(CACHE_TYPES)}.")
    if not (args.enable_cache and args.cache_type == "lemica"):
        changed = own.boundary != "output" or own.lemica_predict != "reuse"
        if own.lemica_step is not None or own.plan or own.lemica_resample or changed:
            raise ValueError("LeMiCa's flags need --enable_cache true --cache_type lemica.")
        return None
    if args.enable_step_distill:
        raise ValueError(
            "a step-distilled model (--enable_step_distill) has no steps to spare: leave it or the cache out."
        )
    if own.plan:
        if own.lemica_step is not None:
            raise ValueError("--lemica_step and --plan exclude each other; give one of them.")
        fixed = planned(own.plan, MODEL, args.num_inference_steps, own.lemica_resample)
        policy: Fixed | LeMiCa = fixed
        budget = fixed.decided.budget
    else:
        budget = 25 if own.lemica_step is None else own.lemica_step
        policy = LeMiCa(budget, MODEL, own.lemica_resample, own.boundary, own.lemica_predict)
        for note in policy.plan(num_steps=args.num_inference_steps).notes:
            say(note)
    if args.cfg_distilled or args.sparse_attn:
        say("the schedules were published for the model that is not distilled; nothing is known about this one.")
    args.lemica_step, args.boundary = budget, policy.boundary  # into upstream's record of the generation
    if not Path(args.model_path).is_dir() and args.model_path.count("/") != 1:
        raise FileNotFoundError(f"--model_path {args.model_path!r} is not a folder; download the checkpoint first.")
    return policy


def default_file(upstream: Any, args: argparse.Namespace) -> str:
    """Upstream's default file name with the budget before the time."""
    task = "i2v" if args.image_path else "t2v"
    version = upstream.HunyuanVideo_1_5_Pipeline.get_transformer_version(
        args.resolution, task, args.cfg_distilled, args.enable_step_distill, args.sparse_attn
    )
    return f"./outputs/output_{version}_lemica{args.lemica_step}_{datetime.now():%Y-%m-%d %H:%M:%S}.mp4"


def _generate(
    upstream: Any, generate_video: Callable[[argparse.Namespace], None], args: argparse.Namespace, policy: Policy
) -> None:
    """Run upstream with the cache in the one pipeline it makes (its super-resolution stage is another)."""
    pipeline = upstream.HunyuanVideo_1_5_Pipeline
    create = vars(pipeline)["create_pipeline"]
    helpers: list[CacheHelper] = []

    def create_pipeline(cls: Any, *given: Any, **named: Any) -> Any:
        pipe = create.__func__(cls, *given, **named)
        vars(pipe)["apply_infer_optimization"] = _optimise(pipe, policy, helpers)
        return pipe

    pipeline.create_pipeline = classmethod(create_pipeline)
    try:
        generate_video(args)
    except DoesNotFit as error:
        fail(str(error))
    finally:
        pipeline.create_pipeline = create
        for helper in helpers:
            helper.remove()
    if leads():
        for helper in helpers:
            print(helper.cache.summary())


def _optimise(pipe: Any, policy: Policy, helpers: list[CacheHelper]) -> Callable[..., None]:
    """Upstream's optimisations in upstream's order: compile, then the cache, then the hooks of group offloading."""
    original = pipe.apply_infer_optimization

    def apply_infer_optimization(
        infer_state: Any = None, enable_offloading: bool = False, enable_group_offloading: bool = False, **others: Any
    ) -> None:
        original(replace(infer_state, enable_cache=False), enable_offloading=enable_offloading, **others)
        helpers.append(install(pipe, policy))
        if enable_group_offloading:
            original(None, enable_offloading=enable_offloading, enable_group_offloading=True, **others)
        pipe.cache_helper = helpers[-1]  # upstream's method resets it

    return apply_infer_optimization


def _check_place() -> None:
    here = Path(sys.argv[0]).resolve()
    if not (here.parent / "hyvideo").is_dir():
        fail(f"HunyuanVideo-1.5 was not found beside this script; copy {here.name} into the root of a clone of "
             f"Tencent-Hunyuan/HunyuanVideo-1.5, where generate.py lies, and run it there.")  # fmt: skip


def _upstream() -> Any:
    """Upstream's `generate`, which starts its process group on import: for one process, as torchrun would."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return importlib.import_module("generate")


if __name__ == "__main__":
    main()
