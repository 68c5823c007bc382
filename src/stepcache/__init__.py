"""stepcache: diffusion transformers 2-4x faster without training.

Compute some denoising steps, predict the rest:

    import stepcache
    from stepcache import LeMiCa

    with stepcache.accelerate(pipe, LeMiCa(budget=25)) as run:
        video = pipe(prompt).frames[0]
    print(run.summary())
"""

from stepcache.cache import BranchSummary, RunSummary, StepCache
from stepcache.hosts.diffusers import Run, accelerate, disable, enable
from stepcache.hosts.module import Attached, attach
from stepcache.plan import Check, Plan, Trajectory
from stepcache.policies import (
    Checked,
    EasyCache,
    Fixed,
    LeMiCa,
    MagCache,
    MagCacheCalibration,
    Off,
    Ratios,
    TaylorSeer,
    TeaCache,
    Uniform,
)
from stepcache.presets import Preset, all_presets, preset

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "BranchSummary",
    "Check",
    "Checked",
    "EasyCache",
    "Fixed",
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
