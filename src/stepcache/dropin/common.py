"""What all drop-ins share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from stepcache.core.plan import Plan
from stepcache.core.trajectory import Trajectory
from stepcache.methods.fixed import Fixed


def add_boundary(group: argparse._ArgumentGroup) -> None:
    """The flag all drop-ins have: where reuse is applied."""
    group.add_argument(
        "--boundary",
        choices=("output", "blocks"),
        default="output",
        help="reuse the transformer's output (default), or the block stack's residual, as LeMiCa's and MagCache's "
        "published code does",
    )


def add_resample(group: argparse._ArgumentGroup) -> None:
    """The flag of LeMiCa's drop-ins that delegate."""
    group.add_argument(
        "--lemica_resample",
        action="store_true",
        help="allow other budgets and step counts, resampled from the published",
    )


def add_predict(group: argparse._ArgumentGroup) -> None:
    """The flags of LeMiCa's drop-ins that choose how reused steps are predicted, and by which plan."""
    group.add_argument(
        "--lemica_predict",
        choices=("reuse", "hindsight"),
        default="reuse",
        help="repeat the last output, as published (reuse), or extrapolate it under a self-check (checked)",
    )
    group.add_argument("--plan", metavar="FILE", help="follow a plan made by `stepcache plan`, instead of a table")


def planned(
    path: str,
    model: str | None,
    steps: int | None,
    resample: bool,
    shift: float | None = None,
    guidance: float | None = None,
) -> Fixed:
    """The policy that follows a plan file, checked against what is known of the run (`None`: not yet).

    ValueError, FileNotFoundError.
    """
    policy = Fixed(Plan.load(path), resample)
    policy.begin(Trajectory(policy.decided.num_steps if steps is None else steps, model, shift, guidance))
    return policy


def fail(message: str) -> NoReturn:
    """One clear sentence, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def leads() -> bool:
    """Whether this process is the first rank, the one that speaks."""
    return int(os.getenv("RANK", "0")) == 0


def say(message: str) -> None:
    """Tell the user, once, on the first rank."""
    if leads():
        print(f"note: {message}", file=sys.stderr)
