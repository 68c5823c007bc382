"""What the drop-ins for Wan2.1 and Wan2.2 share: their own flags first, all others to upstream's `generate.py`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.dropin.common import checked_file, fail, leads, parsed
from stepcache.hosts.entering import DoesNotFit
from stepcache.hosts.wan21 import first_guidance, installed

SOLVERS = {"unipc": "FlowUniPCMultistepScheduler", "dpm++": "FlowDPMSolverMultistepScheduler"}
"""Upstream's --sample_solver -> the class it makes."""

KIN = {
    "t2i-14B": "wan2.1-t2v-14B",
    "flf2v-14B": "wan2.1-i2v-14B",
    "vace-1.3B": "wan2.1-t2v-1.3B",
    "vace-14B": "wan2.1-t2v-14B",
}
"""Tasks without figures of their own -> the model they were trained from, whose figures they borrow."""
TASKS = {
    "wan2.1": ("t2v-1.3B", "t2v-14B", "i2v-14B", *KIN),
    "wan2.2": ("t2v-A14B", "i2v-A14B", "ti2v-5B", "s2v-14B", "animate-14B"),
}

Choose = Callable[[argparse.Namespace, argparse.Namespace], tuple[Policy | None, str]]


def launch(flags: argparse.ArgumentParser, choose: Choose, words: dict[str, str]) -> argparse.Namespace:
    """Run upstream's generate.py with a cache; returns upstream's arguments.

    Args:
        flags: the drop-in's own flags (a parser without help).
        choose: (own flags, upstream's) -> policy and a tag for the default file name; no policy: the original process.
        words: what a message of the policy calls a setting -> the flag of this script.
    """
    own, rest = parsed(flags)
    upstream, wan = _upstream()
    if {"-h", "--help"} & set(rest):
        print(flags.format_help(), "\nAnd all flags of upstream's generate.py:\n", sep="")
    sys.argv = [sys.argv[0], *rest]
    try:
        args = upstream._parse_args()
        if not Path(args.ckpt_dir).is_dir():
            raise FileNotFoundError(f"--ckpt_dir {args.ckpt_dir!r} is not a folder; download the checkpoint first.")
        name, (policy, tag) = model_name(args), choose(own, args)
        if policy is not None:
            args.save_file = checked_file(args.save_file or default_file(args, upstream.EXAMPLE_PROMPT, tag))
    except (AssertionError, ValueError, OSError) as error:
        fail(str(error), words)
    if policy is None:
        upstream.generate(args)
        return args
    with installed(wan, policy, name) as runs:
        try:
            upstream.generate(args)
        except DoesNotFit as error:
            fail(str(error), words)
    if leads():
        print(*runs, sep="\n")
    return args


def model_name(args: argparse.Namespace) -> str:
    """Under which figures and plans of the model are kept; ValueError for a task that is not known."""
    for upstream, tasks in TASKS.items():
        if args.task in tasks:
            kind = ("-i2v" if args.image else "-t2v") if args.task == "ti2v-5B" else ""
            return f"{upstream}-{args.task}{kind}"
    known = "; ".join(f"{upstream}: {', '.join(tasks)}" for upstream, tasks in TASKS.items())
    raise ValueError(f"this script does not know the task {args.task}. It knows those of {known}.")


def trajectory(args: argparse.Namespace) -> Trajectory:
    """What is known of the run before anything is loaded."""
    scale = args.sample_guide_scale
    # where a second transformer takes over is known later; that there is one, now
    handover = args.sample_steps // 2 if "A14B" in args.task else None
    run = Trajectory(args.sample_steps, model_name(args), args.sample_shift, first_guidance(scale), handover=handover)
    return replace(run, scheduler=SOLVERS.get(getattr(args, "sample_solver", "")))


def _upstream() -> tuple[Any, Any]:
    """Upstream's `generate` and `wan` modules, from the folder this script lies in."""
    name = Path(sys.argv[0]).name
    try:
        upstream, wan = importlib.import_module("generate"), importlib.import_module("wan")
    except ModuleNotFoundError as error:
        if error.name not in ("generate", "wan"):
            raise
        fail(f"Wan was not found beside this script; copy {name} into the root of a clone of Wan-Video/Wan2.1 or "
             f"Wan-Video/Wan2.2, where generate.py lies, and run it there: python {name} --task ...")  # fmt: skip
    if missing := [n for n in ("_parse_args", "generate", "EXAMPLE_PROMPT") if not hasattr(upstream, n)]:
        fail(f"generate.py beside this script has no {missing[0]}; it is not Wan2.1's or Wan2.2's, or too old. Update "
             "the clone.")  # fmt: skip
    return upstream, wan


def default_file(args: argparse.Namespace, examples: dict[str, Any], tag: str) -> str:
    """Upstream's default file name with the method and its setting before the time."""
    prompt = args.prompt or examples[args.task]["prompt"]
    prompt = prompt.replace(" ", "_").replace("/", "_")[:50]
    size = args.size.replace("*", "x") if sys.platform == "win32" else args.size
    suffix = ".png" if "t2i" in args.task else ".mp4"
    ranks = [args.ulysses_size, *([args.ring_size] if hasattr(args, "ring_size") else [])]  # Wan2.2 has no rings
    return "_".join(map(str, (args.task, size, *ranks, prompt, tag, f"{datetime.now():%Y%m%d_%H%M%S}"))) + suffix
