r"""LeMiCa for Qwen-Image: one file, beside which nothing of this project is needed (diffusers >= 0.36 is).

    python inference_qwenimage.py --model Qwen/Qwen-Image --prompt "..." --size 1664*928 --cache medium --output out.png

Without --cache every step is computed.
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, say, without_effect
from stepcache.dropin.qwenimage import launch, parser
from stepcache.methods.lemica import LeMiCa

BUDGETS = {"slow": 25, "medium": 17, "fast": 10}
TABLES = {"Qwen/Qwen-Image": "qwen-image", "Qwen/Qwen-Image-2512": "qwen-image-2512"}
"""Hub id -> whose schedules; a folder could hold either, so it must be said (--table)."""


def flags() -> argparse.ArgumentParser:
    """All flags."""
    found = parser("inference_qwenimage.py", __doc__ or "")
    group = found.add_argument_group("LeMiCa")
    group.add_argument(
        "--cache", help="slow (25 computed steps), medium (17), fast (10) or their number; omitted: none"
    )
    group.add_argument("--table", choices=sorted(set(TABLES.values())), help="whose schedules; needed for a folder")
    group.add_argument("--resample", action="store_true", help="allow other budgets and step counts, resampled")
    add_boundary(group, "blocks")
    return found


def choose(args: argparse.Namespace) -> tuple[Policy | None, str]:
    """The policy (`None`: every step computed) and a tag for the file name, before anything is loaded. ValueError."""
    if args.cache is None:
        without_effect(args, ("table", "resample", "boundary"), "without --cache")
        return None, ""
    if args.cache not in BUDGETS and not args.cache.isdecimal():
        raise ValueError(f"--cache is {args.cache!r}; expected {', '.join(BUDGETS)} or a number of computed steps.")
    table = args.table or TABLES.get(args.model)
    if table is None:
        raise ValueError(
            f"--model {args.model!r} may be any of {', '.join(TABLES)}, whose schedules differ; add --table "
            f"{' or '.join(TABLES.values())}."
        )
    budget = BUDGETS.get(args.cache) or int(args.cache)
    policy = LeMiCa(budget, table, args.resample, args.boundary or "blocks")
    for note in policy.notes(num_steps=args.steps):
        say(note)
    return policy, f"lemica{budget}_{policy.boundary}"


def main() -> None:
    """Check, load, generate."""
    launch(flags(), choose, {"resample=True": "--resample", "model=...": "--table"})


if __name__ == "__main__":
    main()
