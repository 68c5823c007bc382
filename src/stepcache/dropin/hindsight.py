"""What the drop-ins of hindsight share: so many steps by --budget, a plan by --plan, a calibration by --calibration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.dropin.common import fail, leads, say, without_effect
from stepcache.files import check_writable
from stepcache.hindsight.method import FollowHindsight, Hindsight
from stepcache.planning.plan_file import FOLLOWERS, PlanFile

FOLLOWERS["hindsight"] = FollowHindsight


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that say which steps are computed."""
    group.add_argument("--budget", type=int, help="computed steps; no calibration needed")
    group.add_argument("--plan", metavar="FILE", help="the steps of a plan made by `stepcache plan`")
    group.add_argument("--resample", action="store_true", help="let --plan run where it was not made for, resampled")
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help="compute every step and add what `stepcache plan` needs to FILE; a few prompts and seeds are enough "
        "(needs the package: pip install -e on a clone of stepcache)",
    )


def chosen(
    own: argparse.Namespace, run: Trajectory, channels: int, size: tuple[int, ...] | None = None
) -> tuple[Policy | None, str]:
    """The policy and a tag for file names, checked before anything is loaded; ValueError, FileNotFoundError.

    `channels`: the dimension of the latents that they are, 1 behind a batch dimension or 0; `size`: the latent's.
    """
    asked = [name for name in ("budget", "plan", "calibration") if getattr(own, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"--{' and --'.join(asked)} exclude each other; give one of them.")
    if own.plan is None:
        without_effect(own, ("resample",), "without --plan")
    if not asked:
        return None, ""
    if own.calibration is not None:
        return recorder(own.calibration, run, channels, size), "calibration"
    if own.plan is not None:
        plan = PlanFile.load(own.plan, own.resample)
        if plan.method != "hindsight":
            raise ValueError(
                f"{own.plan} is a plan of {plan.method}; make one with `stepcache plan --method hindsight`."
            )
        strategy = plan.begin(run)
        for note in strategy.notes:
            say(note)
        return plan, f"hindsight{plan.budget}_planned"
    policy = Hindsight(own.budget)
    policy.begin(run)
    return policy, f"hindsight{own.budget}"


def recorder(path: str, run: Trajectory, channels: int, size: tuple[int, ...] | None = None) -> Any:
    """What records a calibration; ValueError if the package is missing or the file is of other runs."""
    check_writable(Path(path))
    calibration = _calibration()
    known = calibration.Calibration.load(path) if Path(path).exists() else None
    if known is not None:
        names = ("num_steps", "guidance", "shift", "model", "scheduler")
        settings = {**{name: getattr(run, name) for name in names}, "size": size}
        for name, asked in settings.items():
            if asked is not None and getattr(known, name) not in (None, asked):
                raise ValueError(
                    f"{path} is a calibration of {name} {getattr(known, name)}, and the run has {asked}; "
                    "use the same settings or another file."
                )
    return calibration.Recorder(size=known.size if known else None, channels=channels)


def finish(record: Any, path: str, prompt: str, seed: int) -> None:
    """Add the run that was recorded to the file."""
    if not leads():
        return
    try:
        found = _calibration().added(path, record.finish((prompt, seed)))
    except (ValueError, OSError) as error:
        fail(str(error))
    plan = f"stepcache plan --calibration {path} --budget 20 --out plan.json"
    print(f"{path} holds {len(found.runs)} run(s); plan with:\n  {plan}")


def _calibration() -> Any:
    try:
        from stepcache.planning import calibration
    except ImportError as error:
        raise ValueError(
            "--calibration needs the package, as `stepcache plan` does: pip install -e on a clone of stepcache."
        ) from error
    return calibration
