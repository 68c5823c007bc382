"""Run the checks of `bench.checks`: outcomes, selection, and the machine."""

from __future__ import annotations

import platform
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stepcache import __version__
from stepcache.bench.checks import CHECKS, NotHere, Wrong
from stepcache.measure.device import machine_name

Result = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Args:
        name: of the check.
        result: how it ended.
        sentence: what was measured, what was wrong, or what is needed.
        seconds: it took.
    """

    name: str
    result: Result
    sentence: str
    seconds: float


def run_check(name: str, device: torch.device) -> Outcome:
    """Run the check of that name, one of `CHECKS`; nothing it raises comes through."""
    began = time.perf_counter()

    def outcome(result: Result, sentence: str) -> Outcome:
        return Outcome(name, result, sentence, time.perf_counter() - began)

    try:
        return outcome("passed", CHECKS[name](device))
    except NotHere as reason:
        return outcome("skipped", str(reason))
    except Wrong as found:
        return outcome("failed", str(found))
    except Exception as error:  # whatever breaks on a machine we do not know is what a check is there to find
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:300]
        return outcome("failed", f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})")


def chosen(names: str | None) -> tuple[str, ...]:
    """The checks of a list such as "control,memory", in the order in which they run; None: all. ValueError."""
    asked = [name.strip() for name in names.split(",")] if names is not None else list(CHECKS)
    if unknown := [name for name in asked if name not in CHECKS]:
        raise ValueError(f"{unknown[0]!r} is no check; expected some of {', '.join(CHECKS)}, separated by commas.")
    return tuple(name for name in CHECKS if name in asked)


def about(device: torch.device) -> dict[str, str]:
    """Versions and the machine."""
    import diffusers

    return {
        "stepcache": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "machine": machine_name(device),
    }
