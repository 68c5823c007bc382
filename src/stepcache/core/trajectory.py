"""One run of the denoising loop, as its host sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Boundary = Literal["output", "blocks"]
BOUNDARIES = ("output", "blocks")
Modulation = Callable[[float], tuple[Any, Any]]
"""timestep -> (time embedding e, its projection e0), the tensors that modulate the blocks: what TeaCache measures."""


@dataclass(frozen=True)
class Trajectory:
    """What a host knows of a run before its first step. `None` means: not known, so not checked.

    Args:
        num_steps: evaluations of the denoising loop, S.
        model: the host's name for the transformer: a published name when its configuration is recognised, else its
            structure.
        shift: of the noise levels (flow matching).
        guidance: the guidance scale that acts: 1 where there is none, `None` where it is not known.
        timesteps: the scheduler's.
        boundary: where a reused output is put in.
        handover: first step of a second transformer (Wan2.2's low-noise expert).
        modulation: what the model makes of a timestep.
        remarks: the host's reasons to doubt that skipping steps will do well here.
        scheduler: the sampler's class name.
        sampler: what steps with the guided outputs, its timesteps set.
    """

    num_steps: int
    model: str | None = None
    shift: float | None = None
    guidance: float | None = None
    timesteps: tuple[float, ...] | None = None
    boundary: Boundary | None = None
    handover: int | None = None
    modulation: Modulation | None = None
    remarks: tuple[str, ...] = ()
    scheduler: str | None = None
    sampler: Any = None
