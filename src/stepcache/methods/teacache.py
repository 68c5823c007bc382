"""TeaCache: reuse while the timestep embedding has moved little (arXiv 2411.19108, section 3.3, equations 4-6).

With m the embedding that modulates the blocks, |.| the mean absolute value and f a fitted polynomial:

    A += f(|m_s - m_(s-1)| / |m_(s-1)|)       at every step s;    reuse while A < thresh, else compute and A = 0

On Wan m depends on nothing but the timestep, so the decisions are known beforehand and compiled to a plan.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.plan import Plan
from stepcache.core.strategy import Strategy
from stepcache.core.tensors import vote
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.methods.teacache_coefficients import COEFFICIENTS


@dataclass(frozen=True)
class TeaCache:
    """TeaCache on Wan.

    Args:
        teacache_thresh: accumulated change that ends a stretch of reuse; 0 computes every step.
        use_ret_steps: the authors' second mode: measure the projected embedding e0 and compute the first five steps;
            else measure e and compute the first step. The last step is always computed (the authors leave it out
            in the second mode).
        model: whose polynomial; `None`: that of the model that runs.
        boundary: "blocks" as published, or "output".
        coefficients: a polynomial of one's own instead, highest power first.
    """

    teacache_thresh: float = 0.2
    use_ret_steps: bool = False
    model: str | None = None
    boundary: Boundary = "output"
    coefficients: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.teacache_thresh >= 0:
            raise ValueError(f"teacache_thresh is {self.teacache_thresh}; expected 0 or more, for example 0.2.")

    def plan(self, run: Trajectory) -> Plan:
        """Compile for a run.

        Raises:
            ValueError: no polynomial for the model, or a host that does not know the model's time embedding.
        """
        name = self.model or run.model
        if self.coefficients is None and name not in COEFFICIENTS:
            near = [n for n in COEFFICIENTS if name and n.startswith(name)] or list(COEFFICIENTS)
            raise ValueError(
                f"TeaCache has no published coefficients for {name or 'this model'}; "
                f"name one (model=...) of {', '.join(near)}."
            )
        if run.modulation is None or run.timesteps is None:
            raise ValueError(
                "TeaCache measures the model's time embedding, which is known here for Wan in diffusers only; "
                "use another policy."
            )
        mode = "ret_steps" if self.use_ret_steps else "no_ret_steps"
        polynomial = self.coefficients or COEFFICIENTS[str(name)][mode]
        m = [run.modulation(t)[1 if self.use_ret_steps else 0].float() for t in run.timesteps]
        moved = [float((b - a).abs().mean() / a.abs().mean()) for a, b in itertools.pairwise(m)]
        first, error, computed = (5 if self.use_ret_steps else 1), 0.0, []
        for step in range(run.num_steps):
            error += 0.0 if step == 0 else _polynomial(polynomial, moved[step - 1])
            if step < first or step == run.num_steps - 1 or error >= self.teacache_thresh:
                computed.append(step)
                error = 0.0
        return Plan(run.num_steps, tuple(computed))

    def begin(self, run: Trajectory) -> Strategy:
        """Compile for the run."""
        return _Measured(self.plan(run))

    def __str__(self) -> str:
        return f"teacache (thresh {self.teacache_thresh:g}{', ret_steps' if self.use_ret_steps else ''})"


class _Measured(FollowPlan):
    """A plan from the model's own modulation: each rank measured it itself, so the ranks agree all the same."""

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return vote(self.wants(step, x), x, self.group)

    def wants(self, step: int, x: torch.Tensor) -> bool:
        """What this rank alone would do."""
        return super().compute(step, x)


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Value at x, highest power first."""
    value = 0.0
    for c in coefficients:
        value = value * x + c
    return value
