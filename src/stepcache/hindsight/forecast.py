"""Forecast: the guided output of a skipped step, as a sum of those of the last computed steps."""

from __future__ import annotations

Row = tuple[float, ...]
"""Coefficients over the computed outputs, newest first."""


def order_one(step: int, nodes: list[int]) -> Row:
    """Weights that extrapolate linearly to `step` through the last two computed steps; of one alone, reuse.

    Args:
        step: the step that is forecast.
        nodes: computed steps before it, newest first, at least one.
    """
    if len(nodes) < 2:
        return (1.0,)
    along = (step - nodes[0]) / (nodes[0] - nodes[1])
    return (1 + along, -along)
