"""`stepcache presets`: everything that was published and is built in, with its source."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import asdict

from stepcache.commands.flags import Flags
from stepcache.methods.presets import all_presets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache presets`."""
    parser.description = __doc__
    flags = Flags(parser)
    flags.add("filter", nargs="?", default="", help="only models and methods that contain this, e.g. wan2.1")
    flags.add("--json", action="store_true", default=False, help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    chosen = [p for p in all_presets() if args.filter.lower() in f"{p.method}:{p.model}".lower()]
    if not chosen:
        models = sorted({p.model for p in all_presets()})
        near = difflib.get_close_matches(args.filter, models, n=3, cutoff=0.3) or models[:3]
        raise ValueError(f"no preset contains {args.filter!r}; the nearest models are {', '.join(near)}.")
    if args.json:
        print(json.dumps([asdict(p) for p in chosen], indent=1))
        return 0
    width = max(len(p.model) for p in chosen)
    print(f"{'model':{width}}  {'method':8}  {'steps':>5}  {'computed':14}  source")
    for p in chosen:
        budgets = " ".join(map(str, p.budgets)) or "at run time"
        print(f"{p.model:{width}}  {p.method:8}  {p.steps:>5}  {budgets:14}  {p.source}")
    return 0
