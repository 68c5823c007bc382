r"""Hindsight for Qwen-Image: one file, beside which nothing of this project is needed (diffusers >= 0.36 is).

    python hindsight_generate.py --model Qwen/Qwen-Image --prompt "..." --size 1664*928 --budget 25 --output out.png

Without --budget or --plan every step is computed.
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.dropin.hindsight import add_flags, chosen, finish
from stepcache.dropin.qwenimage import launch, parser

RECORDING: dict[str, object] = {}
"""The file and what is recorded into it, when a calibration runs."""


def flags() -> argparse.ArgumentParser:
    """All flags."""
    found = parser("hindsight_generate.py", __doc__ or "")
    add_flags(found.add_argument_group("Hindsight"))
    return found


def choose(args: argparse.Namespace) -> tuple[Policy | None, str]:
    """The policy (`None`: every step computed) and a tag for the file name, before anything is loaded. ValueError."""
    policy, tag = chosen(args, Trajectory(args.steps, guidance=args.true_cfg_scale), channels=1)
    if args.calibration is not None:
        RECORDING[args.calibration] = policy
    return policy, tag


def main() -> None:
    """Check, load, generate; after a calibration run, add it to the file."""
    args = launch(flags(), choose, {"resample=True": "--resample", "the budget is": "--budget is"})
    for path, record in RECORDING.items():
        finish(record, path, args.prompt, args.seed)


if __name__ == "__main__":
    main()
