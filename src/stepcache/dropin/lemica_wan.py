r"""LeMiCa for Wan2.1: copy this file into a clone of Wan-Video/Wan2.1 and add --lemica_budget to the usual command.

    python inference_wan.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." \
        --lemica_budget 25

Without --lemica_budget it is upstream's generate.py, step for step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from stepcache.cache import Policy
from stepcache.dropin.common import add_boundary, add_resample, say
from stepcache.dropin.wan21 import KIN, launch
from stepcache.policies.lemica import LeMiCa
from stepcache.published.lemica import SCHEDULES


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """The published schedule of the task, checked against the step count before anything is loaded."""
    if own.lemica_budget is None:
        return None, ""
    name = f"wan2.1-{args.task}"
    table = name if name in SCHEDULES else KIN[args.task]
    policy = LeMiCa(own.lemica_budget, table, own.lemica_resample, own.boundary)
    plan = policy.plan(num_steps=args.sample_steps)
    if table != name:
        say(f"LeMiCa published nothing for {args.task}; its schedule for {table} is used.")
    for note in plan.notes:
        say(note)
    return replace(policy, model=table), f"lemica{own.lemica_budget}"


def flags() -> argparse.ArgumentParser:
    """LeMiCa's own flags."""
    parser = argparse.ArgumentParser(prog="inference_wan.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("LeMiCa")
    group.add_argument("--lemica_budget", type=int, help="computed steps: 25, 20, 17 or 14; omitted: original process")
    add_resample(group)
    add_boundary(group)
    return parser


def main() -> None:
    """Parse, choose, run upstream."""
    launch(flags(), choose)


if __name__ == "__main__":
    main()
