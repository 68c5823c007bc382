"""Follow a plan whose skipped steps are weighted sums of computed ones, or any plan given as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import Plan
from stepcache.core.strategy import Call, Policy, Strategy
from stepcache.core.tensors import weighted
from stepcache.core.trajectory import Boundary, Trajectory


def check_weights(plan: Plan) -> Plan:
    """The plan itself; ValueError if its weights are not for its skipped steps, or of outputs that are not known."""
    for step, weights in plan.weights:
        before = sum(k < step for k in plan.computed)
        if not 0 < step < plan.num_steps or step in plan.computed:
            raise ValueError(f"weights are given for step {step}, which is not a skipped step of this plan.")
        if not 1 <= len(weights) <= before:
            raise ValueError(f"step {step} has {len(weights)} weights; {before} outputs are known by then.")
        if not all(math.isfinite(w) for w in weights):
            raise ValueError(f"step {step} has a weight that is not a finite number.")
    return plan


class FollowWeights(FollowPlan):
    """A skipped step is the weighted sum of the last computed features."""

    def __init__(self, plan: Plan, notes: tuple[str, ...] = ()) -> None:
        super().__init__(check_weights(plan), notes)
        self._weights = dict(plan.weights)
        self.history = max(map(len, self._weights.values()), default=1) if plan.skipped else 0

    def can_predict(self, step: int, nodes: list[int], evaluated: bool) -> bool:
        count = len(self._weights.get(step, (1.0,)))
        wanted = [k for k in sorted(self.schedule) if k < step][: -count - 1 : -1]
        return bool(nodes) if count == 1 else nodes[:count] == wanted

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        # Weights over several outputs were made for the planned steps: others would only stand between them.
        planned = self.history == 1 or call.step in self.schedule
        return super().feature(call, x, output) if planned else None

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        weights = self._weights.get(call.step)
        return kept[0] if weights is None else weighted(weights, kept[: len(weights)])


@dataclass(frozen=True)
class Planned:
    """The policy that follows a plan of one's own, by its weights."""

    decided: Plan
    boundary: Boundary = "output"

    def begin(self, run: Trajectory) -> Strategy:
        """The plan as it is; ValueError if it is of another step count."""
        if self.decided.num_steps != run.num_steps:
            raise ValueError(f"the plan is of {self.decided.num_steps} steps and the run has {run.num_steps}.")
        return FollowWeights(self.decided)

    def __str__(self) -> str:
        return f"plan (budget {self.decided.budget})"


def as_policy(policy: Policy | Plan) -> Policy:
    """A plan as the policy that follows it; a policy as itself. TypeError for anything else."""
    if isinstance(policy, Plan):
        return Planned(policy)
    if not hasattr(policy, "begin"):
        raise TypeError(f"{policy!r} is not a policy; expected for example LeMiCa(budget=25) or a Plan.")
    return policy
