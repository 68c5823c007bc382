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
    """One run of the denoising loop, as the host sees it: what a plan is checked against.

    `num_steps` is the number of evaluations of the loop, `model` the host's name for the transformer (a published
    name when its configuration is recognised, else its structure), `timesteps` the scheduler's, if known. `None`
    means: not known to the host, so not checked.

    `handover` is the first step of a second transformer that shares the run (Wan2.2's low-noise expert), `modulation`
    gives what the model makes of a timestep, `remarks` are the host's reasons to doubt that reuse will do well here.
    `response` gives the sampler's (`sampler.response`); it is asked for before the first step, if at all.
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
    response: Callable[[], Any] | None = None
