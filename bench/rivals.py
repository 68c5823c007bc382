"""Published methods that the library does not have: what each predicts for a skipped step, on any schedule.

Those that are linear in past outputs are the weights of a `Plan`; the others are strategies at the model call, one
branch at a time, as published. Descriptions: the papers named; formulas in our own words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from stepcache.core.follow_plan import FollowPlan
from stepcache.core.follow_weights import as_policy
from stepcache.core.plan import Plan
from stepcache.core.strategy import Call, Strategy
from stepcache.core.trajectory import Boundary, Trajectory
from stepcache.methods.spectrum import Row, line, with_rows
from stepcache.methods.taylorseer import taylor_weights


def taylor(plan: Plan, order: int) -> Plan:
    """TaylorSeer (arXiv 2503.06923) at the output: extrapolation of an order."""
    return replace(plan, weights=taylor_weights(plan.computed, plan.num_steps, order))


def spectrum_schedule(num_steps: int, budget: int, warm_up: int = 5) -> Plan:
    """Spectrum's own schedule: a warm-up, then gaps that grow by the flex that gives the budget."""

    def steps(flex: float) -> list[int]:
        found, gap = list(range(warm_up)), 2.0
        while (following := found[-1] + max(1, math.floor(gap))) < num_steps - 1:
            found.append(following)
            gap += flex
        return [*found, num_steps - 1]

    for flex in np.linspace(0, 6, 601):
        if len(found := steps(float(flex))) == budget:
            return Plan(num_steps, tuple(found))
    raise ValueError(f"Spectrum's schedule has no {budget} of {num_steps} steps.")


def zeus(plan: Plan) -> Plan:
    """ZEUS (arXiv 2604.01552): of a gap's steps the first is extrapolated through two outputs, the next repeats it."""

    def row(step: int, nodes: list[int]) -> Row:
        if len(nodes) < 2:
            return (1.0,)
        return line(step - (step - nodes[0] + 1) % 2, nodes)

    return with_rows(plan, row)


def hicache(plan: Plan, order: int, contraction: float = 0.5) -> Plan:
    """HiCache (arXiv 2508.16984): Taylor's powers replaced by Hermite polynomials, contracted; signs mended."""

    def row(step: int, nodes: list[int]) -> Row:
        total, differences = np.zeros(len(nodes)), np.eye(len(nodes))
        for j in range(min(order + 1, len(nodes))):
            if j:  # TaylorSeer's differences of order j at each node, as weights over the outputs
                pairs = itertools.pairwise(range(len(differences)))
                differences = np.stack([(differences[a] - differences[b]) / (nodes[a] - nodes[b]) for a, b in pairs])
            hermite = np.polynomial.hermite.hermval(contraction * (step - nodes[0]), [0.0] * j + [1.0])
            total += differences[0] * contraction**j * hermite / math.factorial(j)
        return tuple(map(float, total))

    return with_rows(plan, row)


@dataclass(frozen=True)
class Following:
    """A policy made of a schedule and a class of strategy."""

    plan: Plan
    strategy: Callable[[Plan], Strategy]
    boundary: Boundary = "output"

    def begin(self, run: Trajectory) -> Strategy:
        """State for one run."""
        return self.strategy(self.plan)


class VDE(FollowPlan):
    """VDE (arXiv 2605.23381): v = a x + b |x| d; a and b extrapolated linearly, the direction d repeated.

    a = <v, x> / |x|^2, d the unit part of v orthogonal to x and b its length over |x|, sample by sample.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._parts: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}

    def feature(self, call: Call, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        v, x, shape = output.detach().float().flatten(1), x.detach().float().flatten(1), output.shape
        x = x[:, : v.shape[1]]
        size = x.square().sum(1, keepdim=True)
        a = (v * x).sum(1, keepdim=True) / size
        rest = v - a * x
        b = rest.norm(dim=1, keepdim=True) / size.sqrt()
        self._parts[call.branch] = [(call.step, a, b), *self._parts.get(call.branch, [])[:1]]
        return (rest / rest.norm(dim=1, keepdim=True)).view(shape)

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        (k1, a, b), *before = self._parts[call.branch]
        if before:
            k2, a2, b2 = before[0]
            along = (call.step - k1) / (k1 - k2)
            a, b = a + along * (a - a2), b + along * (b - b2)
        flat = x.float().flatten(1)
        return (a * flat + b * flat.norm(dim=1, keepdim=True) * kept[0].flatten(1)).view(x.shape)


class DMD(FollowPlan):
    """Dynamic mode decomposition (hicache-pp, cache-dit): a linear propagator from the last equally spaced outputs.

    Of n outputs one gap apart, y = K x takes each to the next; in the basis of their leading singular vectors K is
    small, and its eigenvalues to the power of the horizon give the outputs between.
    """

    def __init__(self, plan: Plan, most: int = 5, cut: float = 1e-3) -> None:
        super().__init__(plan)
        self.history, self._most, self._cut = most, most, cut

    def predict(self, call: Call, kept: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        nodes = [k for k in sorted(self.schedule) if k < call.step][::-1][: len(kept)]
        gap = nodes[0] - nodes[1] if len(nodes) > 1 else 1
        count = 1
        while count < min(len(nodes), self._most) and nodes[count - 1] - nodes[count] == gap:
            count += 1
        if count < 3:  # too few, or not equally spaced: a line
            along = (call.step - nodes[0]) / gap if len(nodes) > 1 else 0.0
            return kept[0] if not along else kept[0] + along * (kept[0] - kept[1])
        rows = torch.stack([k.float().flatten(1) for k in kept[:count][::-1]], 1).double()  # (samples, n, elements)
        found = [self._propagated(r, (call.step - nodes[0]) / gap) for r in rows]
        return torch.stack(found).view(x.shape).to(x.dtype)

    def _propagated(self, rows: torch.Tensor, horizon: float) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(rows[:-1], full_matrices=False)
        keep = s > self._cut * s[0]
        u, s, vh = u[:, keep], s[keep], vh[keep]
        small = vh @ rows[1:].T @ u / s  # K in the basis vh
        values, vectors = torch.linalg.eig(small)
        state = torch.linalg.solve(vectors, (vh @ rows[-1]).to(vectors.dtype))
        grown = (vectors * values.pow(horizon)) @ state
        inside = vh.T @ (vh @ rows[-1])
        return (vh.T @ grown.real) + (rows[-1] - inside)


@dataclass
class Replay:
    """The run once more after its end, skipped outputs interpolated between their computed neighbours: no evaluation.

    (Wan2GP's and xmarre's "offline smoothing replay".) Give `first` to the run, `again` to the same call repeated.
    """

    policy: Any
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def first(self) -> Any:
        """The policy itself, watched."""
        return _Watched(self)

    @property
    def again(self) -> Any:
        """What repeats the run."""
        return _Again(self)


class _Watched:
    boundary: Boundary = "output"

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def begin(self, run: Trajectory) -> Strategy:
        self.replay.outputs.clear()
        inner, outputs = as_policy(self.replay.policy).begin(run), self.replay.outputs
        original, real = inner.guided, inner.predicts_guided

        def guided(step: int, output: torch.Tensor, computed: bool, sampler: Any) -> torch.Tensor:
            given = original(step, output, computed, sampler) if real else output
            if computed:
                node = getattr(inner, "_correctors", {}).get(id(sampler))
                outputs[step] = node.tensors[0].to(output.dtype) if node and node.tensors else output.clone()
            return given

        inner.guided, inner.predicts_guided = guided, True
        return inner


class _Again:
    boundary: Boundary = "output"

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def begin(self, run: Trajectory) -> Strategy:
        return _Interpolated(self.replay.outputs)


class _Interpolated(Strategy):
    history, predicts_guided = 0, True

    def __init__(self, outputs: dict[int, torch.Tensor]) -> None:
        self.outputs = outputs

    def compute(self, step: int, x: torch.Tensor) -> bool:
        return step == 0  # the shape of an output is learnt there

    def can_predict(self, step: int, nodes: list[int], evaluated: bool) -> bool:
        return evaluated

    def guided(self, step: int, output: torch.Tensor, computed: bool, sampler: Any) -> torch.Tensor:
        known = sorted(self.outputs)
        before = max(k for k in known if k <= step)
        after = min((k for k in known if k >= step), default=before)
        along = (step - before) / (after - before) if after > before else 0.0
        return torch.lerp(self.outputs[before], self.outputs[after], along)
