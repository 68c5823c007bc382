"""Hindsight: forecast the guided output of skipped steps, correct the latent at the next computed step.

It acts at the sampler step, so it needs to know no branch, no prompt and no rule of guidance: it sees the one
tensor per step that the pipeline hands to its sampler. It needs no calibration; with one, better schedules can be
found by trials (`stepcache plan --refine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stepcache.core.plan import Plan, check_budget, computed_steps
from stepcache.core.strategy import Strategy
from stepcache.core.summary import FEW_SKIPPED, FEW_STEPS
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.hindsight.corrector import Corrector
from stepcache.hindsight.response import remembered
from stepcache.hindsight.schedule import noise_levels_of, places_of, spaced


@dataclass(frozen=True)
class Hindsight:
    """Hindsight on a schedule in noise levels. (On a planned one: a plan file with method "hindsight".)

    Args:
        budget: computed steps, 2 or more, first and last among them (of 2 nothing can be extrapolated); or a share of
            the run's steps, a float above 0 and up to 1.

    Raises:
        ValueError: a budget that is neither.
    """

    boundary: ClassVar[Boundary] = "output"
    budget: float = 25

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def plan(self, num_steps: int, levels: Sequence[float] | None = None) -> Plan:
        """The schedule for a run of these noise levels, see `schedule.spaced`; ValueError if the budget does not fit.

        Of a share, in a run of few steps, not fewer than are reliable.
        """
        count = computed_steps(self.budget, num_steps)
        if self.budget <= 1 and num_steps <= FEW_STEPS:
            count = max(count, num_steps - int(FEW_SKIPPED * num_steps))
        return spaced(num_steps, count, levels)

    def begin(self, run: Trajectory) -> Strategy:
        """The schedule for the run's noise levels, and a corrector for its sampler."""
        plan = self.plan(run.num_steps, noise_levels_of(run))
        asked = computed_steps(self.budget, run.num_steps)
        why = f"of {run.num_steps} steps {plan.budget} are computed, not {asked}: with fewer it is not reliable"
        return FollowHindsight(plan, run, () if plan.budget == asked else (why,))

    def __str__(self) -> str:
        return f"hindsight (budget {self.budget:g})"


class FollowHindsight(Strategy):
    """A schedule, followed with forecasts and corrections of the guided output."""

    history = 0
    predicts_guided = True

    def __init__(self, plan: Plan, run: Trajectory, notes: tuple[str, ...] = ()) -> None:
        self.plan, self.notes = plan.including(run.handover), notes
        self._computed, self._run = frozenset(self.plan.computed), run
        self._correctors: dict[int, Corrector] = {}
        self.stand_ins: dict[str, torch.Tensor] = {}
        self._warnings: list[str] = []
        self._lost = ""

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return step in self._computed or bool(self._lost)

    def can_predict(self, step: int, nodes: list[int], evaluated: bool) -> bool:
        return evaluated

    def guided(self, step: int, output: torch.Tensor, computed: bool, sampler: Any) -> torch.Tensor:
        corrector = self._correctors.get(id(sampler))
        if corrector is None and step:
            return self._alone("a sampler joins in mid-run", output, computed)
        if corrector is None:
            corrector = self._correctors[id(sampler)] = self._corrector(sampler)
        if corrector.step == step:
            return self._alone("the sampler takes several steps for one evaluation", output, computed)
        guided = corrector.computed(step, output) if computed else corrector.skipped(step, output.device)
        if step == self._run.num_steps - 1:
            corrector.restart()
        return guided.to(output.dtype)

    def _alone(self, why: str, output: torch.Tensor, computed: bool) -> torch.Tensor:
        """An output that no forecast goes with; ValueError if it was not evaluated."""
        if not computed:
            raise ValueError(f"{why}, at a skipped step: hindsight cannot follow that; use uniform, or another method.")
        self._lost = f"{why}, so all of the run is computed"
        return output

    def _corrector(self, sampler: Any) -> Corrector:
        """A corrector for the sampler; where correcting is not possible, one that only forecasts, and a warning."""
        response = None
        try:
            if sampler is None:
                raise ValueError("the host does not know the sampler")
            response = remembered(sampler, self._run.num_steps)
            if len(response) != self._run.num_steps + 1:
                raise ValueError("the run does not walk all of the sampler's steps")
        except ValueError as error:
            response = None
            self._warnings.append(f"steps are forecast but not corrected: {error}")
        levels = noise_levels_of(self._run)
        return Corrector(response, self.cache_device, None if levels is None else places_of(levels))

    def release(self) -> None:
        self.stand_ins.clear()
        for corrector in self._correctors.values():
            corrector.restart()

    handover = reshaped = release

    def warnings(self) -> tuple[str, ...]:
        return (*self._warnings, *filter(None, (self._lost,)))

    def tensors(self) -> list[torch.Tensor]:
        return [*self.stand_ins.values(), *(t for c in self._correctors.values() for t in c.tensors)]
