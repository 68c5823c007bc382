"""`stepcache selftest`: check that everything works on this machine. Tiny models, no files, under two minutes."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from stepcache.commands.flags import Flags
from stepcache.files import check_writable, write_atomically
from stepcache.measure.device import find_device

if TYPE_CHECKING:
    from stepcache.bench.selftest import Outcome

WORDS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache selftest`."""
    parser.description = __doc__
    parser.epilog = "The exit code is 0 if nothing failed, 1 otherwise."
    flags = Flags(parser)
    flags.add("--device", metavar="DEV", help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)")
    flags.add("--only", metavar="NAMES", help="run only these checks, separated by commas (default: all)")
    flags.add("--json", metavar="FILE", help="also write the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Print versions, a line per check when it ends, and the counts."""
    device = find_device(args.device)
    if args.json is not None:
        check_writable(args.json)
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("the checks run pipelines of diffusers: pip install 'stepcache[diffusers]'.") from error
    from stepcache.bench.checks import CHECKS
    from stepcache.bench.selftest import about, chosen, run_check

    diffusers.utils.logging.set_verbosity_error()  # its own remarks would stand between the lines
    names, machine = chosen(args.only), about(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    outcomes, width = [], max(map(len, CHECKS))
    for name in names:
        found = run_check(name, device)
        outcomes.append(found)
        print(f"{name:{width}}  {WORDS[found.result]:7}  {found.seconds:5.1f} s  {found.sentence}", flush=True)
    print(counts(outcomes))
    if args.json is not None:
        document = {**machine, "checks": [asdict(found) for found in outcomes]}
        write_atomically(args.json, json.dumps(document, indent=1) + "\n")
    return 1 if any(found.result == "failed" for found in outcomes) else 0


def counts(outcomes: list[Outcome]) -> str:
    """How many passed, failed, and were skipped, and why."""
    numbers = Counter(found.result for found in outcomes)
    reasons = "; ".join(dict.fromkeys(found.sentence for found in outcomes if found.result == "skipped"))
    skipped = f"{numbers['skipped']} skipped" + (f" ({reasons})" if reasons else "")
    return f"{numbers['passed']} passed, {numbers['failed']} failed, {skipped}"
