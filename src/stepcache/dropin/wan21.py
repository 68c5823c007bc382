"""What the Wan2.1 drop-ins share: their own flags first, all others to upstream's `generate.py`, which then runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from stepcache.core.strategy import Policy
from stepcache.dropin.common import checked_file, fail, leads, parsed
from stepcache.hosts.entering import DoesNotFit
from stepcache.hosts.wan21 import installed

KIN = {
    "t2i-14B": "wan2.1-t2v-14B",
    "flf2v-14B": "wan2.1-i2v-14B",
    "vace-1.3B": "wan2.1-t2v-1.3B",
    "vace-14B": "wan2.1-t2v-14B",
}
"""Tasks without figures of their own -> the model they were trained from, whose figures they borrow."""

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
        print(flags.format_help(), "\nAnd all flags of Wan2.1's generate.py:\n", sep="")
    sys.argv = [sys.argv[0], *rest]
    try:
        args = upstream._parse_args()
        if not Path(args.ckpt_dir).is_dir():
            raise FileNotFoundError(f"--ckpt_dir {args.ckpt_dir!r} is not a folder; download the checkpoint first.")
        policy, tag = choose(own, args)
        if policy is not None:
            args.save_file = checked_file(args.save_file or default_file(args, upstream.EXAMPLE_PROMPT, tag))
    except (AssertionError, ValueError, OSError) as error:
        fail(str(error), words)
    if policy is None:
        upstream.generate(args)
        return args
    with installed(wan, policy, f"wan2.1-{args.task}") as caches:
        try:
            upstream.generate(args)
        except DoesNotFit as error:
            fail(str(error), words)
    if leads():
        for cache in caches:
            print(cache.summary())
    return args


def _upstream() -> tuple[Any, Any]:
    """Wan2.1's `generate` and `wan` modules, from the folder this script lies in."""
    try:
        return importlib.import_module("generate"), importlib.import_module("wan")
    except ModuleNotFoundError as error:
        if error.name not in ("generate", "wan"):
            raise
        name = Path(sys.argv[0]).name
        fail(f"Wan2.1 was not found beside this script; copy {name} into the root of a clone of Wan-Video/Wan2.1, "
             f"where generate.py lies, and run it there: python {name} --task ...")  # fmt: skip


def default_file(args: argparse.Namespace, examples: dict[str, Any], tag: str) -> str:
    """Upstream's default file name with the method and its setting before the time."""
    prompt = args.prompt or examples[args.task]["prompt"]
    prompt = prompt.replace(" ", "_").replace("/", "_")[:50]
    size = args.size.replace("*", "x") if sys.platform == "win32" else args.size
    suffix = ".png" if "t2i" in args.task else ".mp4"
    parts = (args.task, size, args.ulysses_size, args.ring_size, prompt, tag, datetime.now().strftime("%Y%m%d_%H%M%S"))
    return "_".join(map(str, parts)) + suffix
