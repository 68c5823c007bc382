"""Best paths through a graph of steps: from the first step to the last, with exactly B computed steps.

Nodes are steps; an edge i -> j means that i and j are computed and all between them are predicted. LeMiCa
(arXiv 2511.00090) asks for the path whose edge weights, sorted from the largest down, are
lexicographically smallest; other objectives add weights, or powers of them.

All objectives are one dynamic programme over (computed steps so far, last node): a path's cost is a sum in an ordered
group. For the lexicographic one, a weight of rank r among all weights costs n^r in whole numbers, n being larger than
any number of edges: sums of such costs compare exactly as the sorted weights do, ties included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Objective = Literal["lexminimax", "sum", "power"]


OBJECTIVES = ("lexminimax", "sum", "power")


Edges = Mapping[tuple[int, int], float]
"""(i, j) with i < j -> weight, 0 or more; pairs that are not named cannot be jumped."""


def best_path(
    edges: Edges, num_steps: int, budget: int, objective: Objective = "lexminimax", gamma: float = 2.0
) -> tuple[int, ...]:
    """The best schedule of exactly `budget` computed steps.

    Args:
        edges: weights; edges from a step to the next may be left out, they weigh nothing.
        num_steps: S; the path leads from step 0 to step S - 1.
        budget: B, computed steps, both ends included.
        objective: "lexminimax", "sum", or "power" (sum of weight ** gamma).
        gamma: exponent of "power", 1 or more.

    Raises:
        ValueError: no such path; the sentence names the smallest budget that has one.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    if gamma < 1:
        raise ValueError(f"gamma is {gamma}; expected 1 or more.")
    for (i, j), weight in edges.items():
        if not 0 <= i < j < num_steps or not weight >= 0 or math.isinf(weight):
            raise ValueError(f"edge {i} -> {j} of weight {weight} does not fit {num_steps} steps.")
    weights: dict[tuple[int, int], float] = {(k, k + 1): 0.0 for k in range(num_steps - 1)} | dict(edges)
    if objective == "lexminimax":
        limit = _bottleneck(weights, num_steps, budget)
        weights = {edge: w for edge, w in weights.items() if w <= limit}
    into = _by_target(weights, num_steps, _costs(weights, objective, gamma, budget))
    return _solve(into, num_steps, budget)


def fewest(edges: Edges, num_steps: int) -> int:
    """The smallest budget for which there is a path."""
    nodes = [1] + [0] * (num_steps - 1)
    for i, j in sorted({*edges, *((k, k + 1) for k in range(num_steps - 1))}):
        if nodes[i] and (not nodes[j] or nodes[i] + 1 < nodes[j]):
            nodes[j] = nodes[i] + 1
    return nodes[-1]


def _costs(weights: Edges, objective: Objective, gamma: float, budget: int) -> dict[tuple[int, int], Any]:
    if objective != "lexminimax":
        exponent = gamma if objective == "power" else 1.0
        return {edge: w**exponent for edge, w in weights.items()}
    bits = budget.bit_length()  # at most budget - 1 edges, so counts never carry over
    rank = {w: r for r, w in enumerate(sorted(set(weights.values())))}
    return {edge: 0 if w == 0 else 1 << (bits * rank[w]) for edge, w in weights.items()}


def _by_target(weights: Edges, num_steps: int, costs: Mapping[tuple[int, int], Any]) -> list[list[tuple[int, Any]]]:
    into: list[list[tuple[int, Any]]] = [[] for _ in range(num_steps)]
    for i, j in sorted(weights):
        into[j].append((i, costs[i, j]))
    return into


def _solve(into: list[list[tuple[int, Any]]], num_steps: int, budget: int) -> tuple[int, ...]:
    """Layer n holds, for every node, the cheapest way to it over n computed steps, and where it came from."""
    layer: dict[int, Any] = {0: 0}
    parents: list[dict[int, int]] = [{}]
    for count in range(2, budget + 1):
        last = num_steps - 1 - (budget - count)  # leave room for the nodes still to come
        new: dict[int, Any] = {}
        parent: dict[int, int] = {}
        for j in range(count - 1, last + 1):
            for i, cost in into[j]:
                if i in layer and (j not in new or layer[i] + cost < new[j]):
                    new[j], parent[j] = layer[i] + cost, i
        layer = new
        parents.append(parent)
    if num_steps - 1 not in layer or budget < 1:
        least = fewest({(i, j): 0.0 for j, row in enumerate(into) for i, _ in row}, num_steps)
        raise ValueError(
            f"there is no path of {budget} computed steps over {num_steps} steps; with these edges the smallest "
            f"budget is {least}, the largest {num_steps}."
        )
    path = [num_steps - 1]
    for parent in reversed(parents[1:]):
        path.append(parent[path[-1]])
    return tuple(reversed(path))


def _bottleneck(weights: Edges, num_steps: int, budget: int) -> float:
    """The smallest largest weight of any path of `budget` nodes (infinite if there is none).

    Edges above it take no part in the lexicographic optimum, and leaving them out keeps the whole numbers short.
    """
    levels = sorted(set(weights.values()))
    low, high = 0, len(levels) - 1
    if not _reachable(weights, num_steps, budget, levels[-1]):
        return math.inf
    while low < high:
        middle = (low + high) // 2
        if _reachable(weights, num_steps, budget, levels[middle]):
            high = middle
        else:
            low = middle + 1
    return levels[low]


def _reachable(weights: Edges, num_steps: int, budget: int, limit: float) -> bool:
    """Whether some path of exactly `budget` nodes uses no edge above `limit`; bit n of a node: n + 1 nodes so far."""
    counts = [1] + [0] * (num_steps - 1)
    for (i, j), weight in sorted(weights.items()):
        if weight <= limit:
            counts[j] |= counts[i] << 1
    return bool(counts[-1] >> (budget - 1) & 1)
