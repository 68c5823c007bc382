"""stepcache: diffusion transformers 2-4x faster without training.

Compute some denoising steps, predict the rest:

    import stepcache
    from stepcache import Hindsight

    with stepcache.accelerate(pipe, Hindsight(budget=25)) as run:
        video = pipe(prompt).frames[0]
    print(run.summary())
"""

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


def __getattr__(name: str) -> object:
    """Old names say what they are called now."""
    if name == "Checked":
        raise AttributeError("stepcache.Checked is now called Hindsight: use stepcache.Hindsight(budget).")
    raise AttributeError(f"module 'stepcache' has no attribute {name!r}")
