"""Plan: which denoising steps are computed, and the weights that predict the others. Plain data."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A schedule, and weights for its skipped steps.

    Args:
        num_steps: steps S of the denoising loop, at least 1.
        computed: strictly increasing indices in 0..S-1 at which the transformer is evaluated; step 0 is one of them.
        weights: pairs (step, (w0, w1, ...)): that skipped step is predicted as w0 * (last computed output) +
            w1 * (the one before) + ...; a skipped step that is not named reuses the last output, weights (1.0,).

    Raises:
        ValueError: a schedule that is none; the sentence says what was expected. (Of weights: `check_weights`.)
    """

    num_steps: int
    computed: tuple[int, ...]
    weights: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        steps, count = self.computed, self.num_steps
        if type(count) is not int or count < 1:
            raise ValueError(f"num_steps is {count!r}; a plan needs a whole number of steps, at least 1.")
        if not isinstance(steps, tuple) or not all(type(k) is int for k in steps):
            raise ValueError(f"computed is {steps!r}; expected a tuple of step indices.")
        if steps[:1] != (0,):
            raise ValueError(f"computed is {list(steps)}; it must start with step 0, there is nothing to reuse before.")
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"computed is {list(steps)}; indices must increase strictly.")
        if steps[-1] >= count:
            raise ValueError(f"computed names step {steps[-1]}, but a run of {count} steps ends at {count - 1}.")

    @property
    def budget(self) -> int:
        """Number of computed steps, B."""
        return len(self.computed)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Indices of the steps that are predicted."""
        computed = set(self.computed)
        return tuple(k for k in range(self.num_steps) if k not in computed)

    @property
    def ideal_speedup(self) -> float:
        """S / B: the speed-up of the loop if skipped steps cost nothing."""
        return self.num_steps / self.budget

    def including(self, step: int | None) -> Plan:
        """The schedule with `step` among its computed ones, in place of the nearest but the first and the last.

        So the budget holds where a second transformer takes over at `step` and begins with an evaluation.

        Raises:
            ValueError: the budget is too small for that.
        """
        if step is None or step in self.computed or not 0 < step < self.num_steps:
            return self
        between = self.computed[1:-1]
        if not between:
            raise ValueError(
                f"a budget of {self.budget} is the first and the last step, and a second transformer begins at step "
                f"{step} with an evaluation of its own; use 3 or more."
            )
        nearest = min(between, key=lambda k: abs(k - step))
        return Plan(self.num_steps, tuple(sorted({*self.computed, step} - {nearest})))

    def resampled(self, num_steps: int, budget: int | None = None) -> Plan:
        """The schedule mapped through its normalised step position k / (S - 1) onto another step count or budget.

        `budget` defaults to the plan's own; it is kept exactly, first and last step included, and is at most
        `num_steps`. Weights belong to a step count, so the new plan has none.

        Raises:
            ValueError: if the budget does not fit the step count.
        """
        budget = min(self.budget, num_steps) if budget is None else budget
        least = min(2, num_steps)
        if not least <= budget <= num_steps:
            raise ValueError(f"a budget of {budget} does not fit {num_steps} steps; use {least} to {num_steps}.")
        scale = (num_steps - 1) / max(self.num_steps - 1, 1)
        return Plan(num_steps, spread([k * scale for k in stretch(self.computed, budget)], num_steps))


def even(num_steps: int, budget: int) -> Plan:
    """Evenly spread computed steps, first and last among them.

    Raises:
        ValueError: a budget below 2, or above the step count.
    """
    if budget < 2:
        raise ValueError(f"the budget is {budget}; expected 2 or more, for the first and the last step.")
    if budget > num_steps:
        raise ValueError(f"a budget of {budget} does not fit {num_steps} steps; use at most {num_steps}.")
    return Plan(num_steps, spread([i * (num_steps - 1) / (budget - 1) for i in range(budget)], num_steps))


def check_budget(budget: float) -> None:
    """ValueError for a budget that is neither 2 steps or more nor a share: a float above 0 and up to 1."""
    if not (budget >= 2 and float(budget).is_integer()) and not (isinstance(budget, float) and 0 < budget <= 1):
        raise ValueError(f"the budget is {budget:g}; expected 2 or more, or a share above 0 and up to 1.0.")


def computed_steps(budget: float, num_steps: int) -> int:
    """How many steps a budget stands for: itself, or a share of `num_steps`, at least 2; ValueError."""
    check_budget(budget)
    if budget <= 1:
        return min(max(2, round(budget * num_steps)), num_steps)
    return even(num_steps, int(budget)).budget


def timeline(num_steps: int, computed: tuple[int, ...], width: int = 100) -> str:
    """One mark a step, `█` computed and `·` skipped, wrapped at `width` marks."""
    marks = "".join("█" if k in computed else "·" for k in range(num_steps))
    return "\n".join(marks[i : i + width] for i in range(0, num_steps, width))


def stretch(values: tuple[int, ...], count: int) -> list[float]:
    """`count` values read off the polygon through `values`, ends included."""
    if count == 1 or len(values) == 1:
        return [float(values[0])] + [float(values[-1])] * (count - 1)
    positions = [i * (len(values) - 1) / (count - 1) for i in range(count)]
    lower = [min(int(p), len(values) - 2) for p in positions]
    return [values[j] + (p - j) * (values[j + 1] - values[j]) for p, j in zip(positions, lower, strict=True)]


def spread(wanted: list[float], num_steps: int) -> tuple[int, ...]:
    """Distinct indices in 0..num_steps-1 near the rising positions `wanted`, the first at 0 and the last at the end."""
    count, chosen = len(wanted), [0]
    for i, position in enumerate(wanted[1:], start=1):
        latest = num_steps - (count - i)  # leave room for those still to come
        chosen.append(min(max(round(position), chosen[-1] + 1), latest))
    if count > 1:
        chosen[-1] = num_steps - 1
    return tuple(chosen)
