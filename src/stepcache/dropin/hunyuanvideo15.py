"""What the HunyuanVideo-1.5 drop-ins share: their own flags first, all others to upstream's `generate.py`."""

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
from stepcache.dropin.common import checked_file, fail, leads, parsed
from stepcache.hosts.entering import DoesNotFit
from stepcache.hosts.hunyuanvideo15 import CacheHelper, install

OTHERS = ("deepcache", "teacache", "taylorcache")
"""Upstream's own cache types."""

Choose = Callable[[argparse.Namespace, argparse.Namespace], tuple[Policy | None, str]]


def launch(flags: argparse.ArgumentParser, choose: Choose, words: dict[str, str]) -> argparse.Namespace:
    """Run upstream's main with a cache in the pipeline it makes; returns upstream's arguments.

    Args:
        flags: the drop-in's own flags (a parser without help).
        choose: (own flags, upstream's) -> policy and a tag for the default file name; no policy: upstream's process.
        words: what a message of the policy calls a setting -> the flag of this script.
    """
    own, rest = parsed(flags)
    _check_place()
    if {"-h", "--help"} & set(rest):
        print(flags.format_help(), "\nAnd all flags of HunyuanVideo-1.5's generate.py:\n", sep="")
    upstream = _upstream()
    sys.argv = [sys.argv[0], *rest]
    generate_video, seen = upstream.generate_video, argparse.Namespace()

    def cached(args: argparse.Namespace) -> None:
        vars(seen).update(vars(args))
        try:
            policy, tag = choose(own, args)
            if policy is not None:
                _check(args)
                args.output_path = checked_file(args.output_path or default_file(upstream, args, tag))
        except (ValueError, OSError) as error:
            fail(str(error), words)
        if policy is None:
            generate_video(args)
        else:
            try:
                _generate(upstream, generate_video, args, policy)
            except DoesNotFit as error:
                fail(str(error), words)

    upstream.generate_video = cached
    try:
        upstream.main()
    finally:
        upstream.generate_video = generate_video
    return seen


def _check(args: argparse.Namespace) -> None:
    """What no method can do here; ValueError, FileNotFoundError."""
    if args.enable_step_distill:
        raise ValueError(
            "a step-distilled model (--enable_step_distill) has no steps to spare: leave it or the cache out."
        )
    if not Path(args.model_path).is_dir() and args.model_path.count("/") != 1:
        raise FileNotFoundError(f"--model_path {args.model_path!r} is not a folder; download the checkpoint first.")


def default_file(upstream: Any, args: argparse.Namespace, tag: str) -> str:
    """Upstream's default file name with the method and its setting before the time."""
    task = "i2v" if args.image_path else "t2v"
    version = upstream.HunyuanVideo_1_5_Pipeline.get_transformer_version(
        args.resolution, task, args.cfg_distilled, args.enable_step_distill, args.sparse_attn
    )
    return f"./outputs/output_{version}_{tag}_{datetime.now():%Y-%m-%d %H:%M:%S}.mp4"


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

    args.enable_cache, args.cache_type = True, "stepcache"  # upstream looks for a helper then; ours is put there
    pipeline.create_pipeline = classmethod(create_pipeline)
    try:
        generate_video(args)
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
