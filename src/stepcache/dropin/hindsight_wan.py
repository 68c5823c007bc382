r"""Hindsight for Wan2.1 and Wan2.2: copy this file into a clone of either and add --budget to the usual command.

    python hindsight_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." --budget 25

Without --budget, --plan or --calibration it is upstream's generate.py, step for step.
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.dropin.hindsight import add_flags, chosen, finish
from stepcache.dropin.wan21 import launch, trajectory

RECORDING: dict[str, object] = {}
"""The file and what is recorded into it, when a calibration runs."""


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """What was asked for, checked against the run before anything is loaded."""
    size = None
    if "t2v" in args.task and getattr(args, "frame_num", None):
        width, height = map(int, args.size.split("*"))
        size = (16, (args.frame_num - 1) // 4 + 1, height // 8, width // 8)
    policy, tag = chosen(own, trajectory(args), 0, size)
    if own.calibration is not None:
        RECORDING[own.calibration] = policy
    return policy, tag


def flags() -> argparse.ArgumentParser:
    """Hindsight's own flags."""
    parser = argparse.ArgumentParser(prog="hindsight_generate.py", add_help=False, allow_abbrev=False)
    add_flags(parser.add_argument_group("Hindsight"))
    return parser


def main() -> None:
    """Parse, choose, run upstream; after a calibration run, add it to the file."""
    args = launch(flags(), choose, {"resample=True": "--resample", "the budget is": "--budget is"})
    for path, record in RECORDING.items():
        finish(record, path, args.prompt, args.base_seed)


if __name__ == "__main__":
    main()
