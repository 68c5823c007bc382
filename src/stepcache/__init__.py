"""stepcache: diffusion transformers 2-4x faster without training.

Compute some denoising steps, predict the rest:

    import stepcache
    from stepcache import LeMiCa

    with stepcache.accelerate(pipe, LeMiCa(budget=25)) as run:
        video = pipe(prompt).frames[0]
    print(run.summary())
"""

from stepcache.core.cache import StepCache
from stepcache.core.plan import Check, Plan
from stepcache.core.summary import BranchSummary, RunSummary
from stepcache.core.trajectory import Trajectory
from stepcache.hosts.diffusers import Run, accelerate, disable, enable
from stepcache.hosts.module import Attached, attach
from stepcache.methods import (
    EasyCache,
    Fixed,
    Hindsight,
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

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "BranchSummary",
    "Check",
    "EasyCache",
    "Fixed",
    "Hindsight",
    "LeMiCa",
    "MagCache",
    "MagCacheCalibration",
    "Off",
    "Plan",
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
