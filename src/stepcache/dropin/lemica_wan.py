r"""LeMiCa for Wan2.1 and Wan2.2: copy this file into a clone of either and add --lemica_budget to the usual command.

    python inference_wan.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." \
        --lemica_budget 25

Without --lemica_budget it is upstream's generate.py, step for step.
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, say, without_effect
from stepcache.dropin.wan21 import KIN, launch, model_name, trajectory
from stepcache.methods.lemica import LeMiCa
from stepcache.methods.lemica_schedules import SCHEDULES


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """What was asked for, checked against the run before anything is loaded."""
    name, budget = model_name(args), own.lemica_budget
    if budget is None:
        without_effect(own, ("lemica_resample", "boundary"), "without --lemica_budget")
        return None, ""
    table = name if name in SCHEDULES else KIN.get(args.task, f"wan2.1-{'t2v' if 't2v' in name else 'i2v'}-14B")
    if not name.startswith("wan2.1") and not own.lemica_resample:
        raise ValueError(
            f"LeMiCa published nothing for Wan2.2's {args.task}. Add --lemica_resample to take that of {table}, "
            "resampled, or follow a plan of this model: hindsight_generate.py --plan."
        )
    policy = LeMiCa(budget, table, own.lemica_resample, own.boundary or "blocks")
    notes = policy.notes(num_steps=args.sample_steps)
    policy.begin(trajectory(args))
    if table != name:
        say(f"LeMiCa published nothing for {args.task}; its schedule for {table} is used.")
    for note in notes:
        say(note)
    return policy, f"lemica{budget}_{policy.boundary}"


def flags() -> argparse.ArgumentParser:
    """LeMiCa's own flags."""
    parser = argparse.ArgumentParser(prog="inference_wan.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("LeMiCa")
    group.add_argument("--lemica_budget", type=int, help="computed steps: 25, 20, 17 or 14; omitted: original process")
    group.add_argument(
        "--lemica_resample",
        action="store_true",
        help="allow other budgets and step counts than the published, resampled",
    )
    add_boundary(group, "blocks")
    return parser


def main() -> None:
    """Parse, choose, run upstream."""
    words = {"resample=True": "--lemica_resample", "model=...": "another --task"}
    launch(flags(), choose, words)


if __name__ == "__main__":
    main()
