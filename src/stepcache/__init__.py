"""stepcache: diffusion transformers, faster without training.

Compute some denoising steps, predict the rest:

    import stepcache
    from stepcache import Hindsight

    with stepcache.accelerate(pipe, Hindsight(budget=25)) as run:
        video = pipe(prompt).frames[0]
    print(run.summary())
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepcache.core.cache import StepCache
    from stepcache.core.plan import Plan
    from stepcache.core.summary import BranchSummary, RunSummary
    from stepcache.core.trajectory import Trajectory
    from stepcache.hindsight.method import Hindsight
    from stepcache.hosts.diffusers import Run, accelerate, disable, enable
    from stepcache.hosts.module import Attached, attach
    from stepcache.methods import (
        EasyCache,
        LeMiCa,
        MagCache,
        MagCacheCalibration,
        Off,
        Ratios,
        Spectrum,
        TaylorSeer,
        TeaCache,
        Uniform,
    )
    from stepcache.methods.presets import Preset, all_presets, preset
    from stepcache.planning.plan_file import PlanFile

__version__ = "0.3.0"

__all__ = [
    "Attached",
    "BranchSummary",
    "EasyCache",
    "Hindsight",
    "LeMiCa",
    "MagCache",
    "MagCacheCalibration",
    "Off",
    "Plan",
    "PlanFile",
    "Preset",
    "Ratios",
    "Run",
    "RunSummary",
    "Spectrum",
    "StepCache",
    "TaylorSeer",
    "TeaCache",
    "Trajectory",
    "Uniform",
    "accelerate",
    "all_presets",
    "attach",
    "disable",
    "enable",
    "preset",
]


_PLACES = {
    "stepcache.core.cache": ("StepCache",),
    "stepcache.core.plan": ("Plan",),
    "stepcache.core.summary": ("BranchSummary", "RunSummary"),
    "stepcache.core.trajectory": ("Trajectory",),
    "stepcache.hindsight.method": ("Hindsight",),
    "stepcache.hosts.diffusers": ("Run", "accelerate", "disable", "enable"),
    "stepcache.hosts.module": ("Attached", "attach"),
    "stepcache.methods": (
        "EasyCache",
        "LeMiCa",
        "MagCache",
        "MagCacheCalibration",
        "Off",
        "Ratios",
        "Spectrum",
        "TaylorSeer",
        "TeaCache",
        "Uniform",
    ),
    "stepcache.methods.presets": ("Preset", "all_presets", "preset"),
    "stepcache.planning.plan_file": ("PlanFile",),
}
"""Module -> what comes from it, imported when it is asked for: the command line need not wait for torch."""


def __getattr__(name: str) -> object:
    """Import on demand; old names say what they are called now."""
    if name == "Checked":
        raise AttributeError("stepcache.Checked is now called Hindsight: use stepcache.Hindsight(budget).")
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'stepcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
