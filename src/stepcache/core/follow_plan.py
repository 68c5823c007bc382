"""Follow a plan: decisions and weights that were written down before the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepcache.core.plan import Plan
from stepcache.core.strategy import Call, Policy, Strategy
from stepcache.core.tensors import weighted
from stepcache.core.trajectory import Boundary, Trajectory


class FollowPlan(Strategy):
    """A computed step is evaluated; a skipped one is its weighted sum of the last computed features."""

    def __init__(self, plan: Plan, notes: tuple[str, ...] = ()) -> None:
        self.plan, self.notes, self.skips = plan, notes, bool(plan.skipped)
        self._computed, self._weights = frozenset(plan.computed), dict(plan.weights)
        self.history = max(map(len, self._weights.values()), default=1) if plan.skipped else 0

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return step in self._computed

    def needs(self, step: int) -> int:
        return len(self._weights.get(step, (1.0,)))

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        weights = self._weights.get(call.step, (1.0,))
        return kept[0] if weights == (1.0,) else weighted(weights, kept)


@dataclass(frozen=True)
class Planned:
    """The policy that follows a plan of one's own, by its weights."""

    decided: Plan
    boundary: Boundary = "output"

    def begin(self, run: Trajectory) -> Strategy:
        """The plan as it is; ValueError if it is of another step count."""
        if self.decided.num_steps != run.num_steps:
            raise ValueError(f"the plan is of {self.decided.num_steps} steps and the run has {run.num_steps}.")
        return FollowPlan(self.decided)

    def __str__(self) -> str:
        return f"plan (budget {self.decided.budget})"


def as_policy(policy: Policy | Plan) -> Policy:
    """A plan as the policy that follows it; a policy as itself. TypeError for anything else."""
    if isinstance(policy, Plan):
        return Planned(policy)
    if not hasattr(policy, "begin"):
        raise TypeError(f"{policy!r} is not a policy; expected for example LeMiCa(budget=25) or a Plan.")
    return policy
