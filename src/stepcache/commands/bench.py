r"""`stepcache bench`: every method on every prompt and seed, against the uncached run; here, in shards, or on Ray.

    stepcache bench --model DIR --prompts prompts.txt --out results \
        --policies "lemica:25 easycache:@25 magcache:0.12,K=4 plan:plan.json steps:25"
    stepcache report results

One JSON per item (a method on a prompt and seed), written whole or not at all: interrupt at any time, `--resume`
continues.
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace
from pathlib import Path

from stepcache.bench.methods import help_text, parse
from stepcache.bench.results import REFERENCE, Folder, merge
from stepcache.bench.suite import Bench, Suite
from stepcache.commands.flags import (
    Flags,
    absolute,
    add_device_flags,
    add_ray_flags,
    add_request_flags,
    request_from,
    resources_from,
)
from stepcache.fleet.cluster import Resources
from stepcache.fleet.jobs import Pair
from stepcache.fleet.places import alone, check_writable, is_remote, place
from stepcache.fleet.shards import merge_folders, part, shard_from
from stepcache.measure.device import find_device
from stepcache.measure.generation import check_fps
from stepcache.measure.lpips import SIZE
from stepcache.measure.pipelines import model_defaults
from stepcache.measure.prompts import clip_name, read_prompts, read_seeds
from stepcache.measure.video import check_video

RUN, HERE = "runs (no --merge)", "runs of this process (neither --merge nor --ray)"
FETCHED = "runs without --lpips-backbone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache bench`."""
    parser.description = __doc__
    parser.epilog = "methods:\n" + help_text()
    flags = Flags(parser, _modes)
    add = functools.partial(flags.add, needs=RUN)
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a diffusers pipeline")
    add("--prompts", metavar="FILE", help="text file, one prompt per line; or VBench's JSON")
    add("--policies", metavar="LIST", help="methods, separated by spaces: see below")
    flags.add(
        "--out", required=True, metavar="DIR", help="folder for items, clips and the table; or an address such as s3://"
    )
    add("--seeds", default="0", help="seeds for every prompt, separated by commas (0)")
    add(
        "--resume",
        action="store_true",
        default=False,
        help="continue in --out: finished items are kept, failed ones are run again",
    )
    add_request_flags(flags, needs=RUN)
    add("--fps", type=float, help="frame rate of the clips (default: the model's, else 16)")
    add_device_flags(flags, needs=RUN)
    add("--lpips_backbone", metavar="FILE", help="AlexNet's weights (default: torch.hub's checkpoint folder)")
    flags.add(
        "--lpips",
        needs=FETCHED,
        action="store_true",
        default=False,
        help=f"download AlexNet's weights ({SIZE}) if they are missing",
    )
    flags.add(
        "--shard",
        metavar="I/N",
        needs=HERE,
        help="run every N-th prompt and seed from the I-th on; auto, auto/N: numbers from Slurm or torchrun",
    )
    flags.add("--merge", nargs="+", metavar="DIR", help="merge the folders of shards into --out, run nothing")
    add("--vbench", action="store_true", default=False, help="name the clips PROMPT-SEED.mp4, as VBench expects them")
    add_ray_flags(flags, needs=RUN)


def _modes(args: argparse.Namespace) -> set[str]:
    if args.merge:
        return set()
    modes = {RUN, "--ray"} if args.ray is not None else {RUN, HERE}
    return modes if args.lpips_backbone else {*modes, FETCHED}


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, load, run what is not there yet, merge; 1 if a method failed."""
    folder = Folder(place(args.out))
    if args.merge:
        check_writable(folder.root)
        missing = merge_folders([place(path) for path in args.merge], folder.root)
        print(merge(folder))
        print(f"{missing} item(s) are missing; run their shards." if missing else "all items are present")
        return 1 if missing else 0
    if not (args.model and args.prompts and args.policies is not None):
        raise ValueError("give --model, --prompts and --policies, or --merge DIRS.")
    shard = shard_from(args.shard) if args.shard else (0, 1)
    suite, resources = suite_from(args), resources_from(args)
    suite.check()
    check_writable(folder.root)
    description = suite.described(shard, args.resume)
    everything: list[Pair] = [(i, prompt, seed) for i, prompt in enumerate(suite.prompts) for seed in suite.seeds]
    pairs = part(everything, shard)
    if not pairs:
        print(f"shard {shard[0]} of {shard[1]} has none of the {len(everything)} prompts and seeds.")
        return 0
    with alone(folder.root):
        return _directed(suite, resources, description, pairs, args)


def suite_from(args: argparse.Namespace) -> Suite:
    """What the flags ask for; ValueError, OSError or ImportError for what cannot be run."""
    prompts, seeds = read_prompts(args.prompts), read_seeds(args.seeds)
    if args.vbench:
        for prompt in prompts:
            clip_name(prompt, seeds[0])
    contenders, request = parse(args.policies), request_from(args)
    fps = float(model_defaults(args.model).get("fps", 16.0) if args.fps is None else args.fps)
    check_fps(fps)
    if args.device and args.ray is None:
        find_device(args.device)
    check_video()
    return Suite(
        str(Path(args.model)),
        place(args.out),
        request,
        prompts,
        seeds,
        contenders,
        fps,
        args.device,
        args.dtype,
        args.lpips_backbone,
        args.vbench,
        args.lpips,
    )


def _elsewhere(suite: Suite) -> Suite:
    """The suite as workers can run it, who run in other folders."""
    model, backbone = absolute(suite.model) or suite.model, absolute(suite.lpips_backbone)
    root = suite.root if is_remote(suite.root) else suite.root.absolute()
    return replace(suite, model=model, lpips_backbone=backbone, root=root)


def _directed(
    suite: Suite, resources: Resources | None, description: dict, pairs: list[Pair], args: argparse.Namespace
) -> int:
    """Run, print the results; returns the exit code."""
    folder, shared = Folder(suite.root), resources is not None
    began = time.perf_counter()
    with (_elsewhere(suite) if shared else suite).crew(resources) as (crew, about):
        known = {k: v for k, v in description.items() if k in ("searched", "ceiling")}
        bench = Bench(folder, suite.contenders, {**description, **about, **known}, shared=shared)
        folder.write(bench.description)
        wanted = {(index, seed) for index, _, seed in pairs}
        names = {REFERENCE, *(c.name for c in suite.contenders)}
        items = folder.items()
        there = sum(not i.error and i.method in names and (i.index, i.seed) in wanted for i in items)
        print(suite.cost(about["seconds_a_run"], len(pairs), there, bench.description["searched"]))
        try:
            bench.run(crew, pairs, args.max_retries)
        except KeyboardInterrupt:
            if any((folder.root / "items").glob("*/*.json")):
                print(merge(folder))
            print(f"interrupted; everything finished is in {args.out}, --resume continues.")
            return 130
    total = time.perf_counter() - began
    print(merge(folder))
    share = "" if shared else f", {bench.other_seconds / total:.1%} of it for metrics and clips"
    print(f"{total:.0f} s{share}; for the report: stepcache report {args.out}")
    if bench.failed:
        print(f"{bench.failed} item(s) failed; their JSON says why, --resume retries them.")
    return 1 if bench.failed else 0
