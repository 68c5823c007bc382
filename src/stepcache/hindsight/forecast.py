"""Forecast: the guided output of a skipped step, from those of the last two computed steps."""

from __future__ import annotations

Row = tuple[float, ...]
"""Coefficients over the computed outputs, newest first."""


def reach(step: int, nodes: list[int]) -> float:
    """How far ahead of the newest computed step, in units of the gap before it, the line through both is followed.

    Never farther than it was measured over: twice as far, an error of the slope counts twice.
    """
    if len(nodes) < 2:
        return 0.0
    return min(step - nodes[0], nodes[0] - nodes[1]) / (nodes[0] - nodes[1])


def order_one(step: int, nodes: list[int]) -> Row:
    """Weights of the forecast over the last two computed outputs; of one alone, reuse.

    Args:
        step: the step that is forecast.
        nodes: computed steps before it, newest first, at least one.
    """
    along = reach(step, nodes)
    return (1 + along, -along) if len(nodes) > 1 else (1.0,)
