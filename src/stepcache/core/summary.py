"""What a run did: computed and reused steps, times, memory, warnings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from stepcache.core.plan import Plan, timeline

FEW_STEPS = 10
"""Below this many steps neighbouring evaluations differ so much that reuse rarely pays (see docs/methods.md)."""


def timestamp(x: torch.Tensor) -> Any:
    """A point in time: on CUDA an event (no synchronisation until the summary reads it), else seconds."""
    if x.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(x.device))
        return event
    return time.perf_counter()


def elapsed(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000


@dataclass(frozen=True)
class BranchSummary:
    """Steps computed and reused in one branch, as indices."""

    name: str
    computed: tuple[int, ...]
    reused: tuple[int, ...]


@dataclass(frozen=True)
class RunSummary:
    """What a run did. Seconds are wall time; a step's time is that of all its branches together.

    `loop_seconds` runs from the first call of the transformer to the end of the last one, schedulers included.
    `forced` are (step, branch) computed because what the reuse needed was not there. `cache_bytes` is the peak.
    `plan` is what was followed, if the decisions were known beforehand.
    """

    policy: str
    boundary: str
    num_steps: int
    branches: tuple[BranchSummary, ...]
    forced: tuple[tuple[int, str], ...]
    loop_seconds: float
    seconds_per_computed_step: float | None
    seconds_per_reused_step: float | None
    cache_bytes: int
    warnings: tuple[str, ...]
    plan: Plan | None = None

    @property
    def computed(self) -> tuple[int, ...]:
        """Steps at which at least one branch was computed."""
        return tuple(sorted({k for b in self.branches for k in b.computed}))

    @property
    def reused(self) -> tuple[int, ...]:
        """Steps that were predicted in every branch."""
        return tuple(sorted({k for b in self.branches for k in b.reused} - set(self.computed)))

    @property
    def ideal_speedup(self) -> float:
        """Steps over computed steps."""
        return (len(self.computed) + len(self.reused)) / max(1, len(self.computed))

    def __str__(self) -> str:
        done, steps = len(self.computed), len(self.computed) + len(self.reused)
        lines = [
            f"{self.policy}, boundary {self.boundary}: computed {done} of {steps} steps, "
            f"reused {len(self.reused)}; ideal speed-up {self.ideal_speedup:.2f}x",
            timeline(steps, self.computed),
            *(f"  {b.name}: computed {len(b.computed)}, reused {len(b.reused)}" for b in self.branches),
            f"  loop {self.loop_seconds:.2f} s; cache {self.cache_bytes / 2**20:.2f} MiB at most",
        ]
        if self.seconds_per_computed_step and self.seconds_per_reused_step is not None:
            share = 100 * self.seconds_per_reused_step / self.seconds_per_computed_step
            milliseconds = 1000 * self.seconds_per_computed_step
            lines.append(f"  a computed step took {milliseconds:.1f} ms, a reused one {share:.1f} % of it")
        lines += [f"  note: {note}" for note in (self.plan.notes if self.plan else ())]
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])


def _summarise(cache: Any) -> RunSummary:
    branches = tuple(BranchSummary(b.name, tuple(b.computed), tuple(b.reused)) for b in cache._branches)
    spans = cache._spans
    loop = elapsed(spans[0][2], spans[-1][3]) if spans else 0.0
    per_step: dict[bool, dict[int, float]] = {True: {}, False: {}}
    for computed, step, start, stop in spans[1:]:  # the first call warms caches and allocators up
        per_step[computed][step] = per_step[computed].get(step, 0.0) + elapsed(start, stop)
    mixed = set(per_step[True]) & set(per_step[False])
    mean = {
        kind: sum(times) / len(times) if (times := [s for k, s in steps.items() if k not in mixed and k > 0]) else None
        for kind, steps in per_step.items()
    }
    warnings = list(cache.run.remarks) if cache.run else []
    num_steps = cache.run.num_steps if cache.run else 0
    if spans and cache._expects_reuse and not any(b.reused for b in branches):
        warnings.append("no step was reused: the settings never allowed it")
    if not spans:
        warnings.append("no call of the transformer was seen: nothing has run yet, or it was replaced meanwhile")
    if 0 < num_steps < FEW_STEPS and cache._expects_reuse:
        warnings.append(f"only {num_steps} steps: neighbouring steps differ too much for reuse to make sense")
    if cache._not_back:
        warnings.append(f"missed outputs are not put right in hindsight: {cache._not_back}")
    if cache._forced:
        warnings.append(f"{len(cache._forced)} calls were computed because their branch had nothing to reuse yet")
    return RunSummary(
        policy=str(cache.policy),
        boundary=cache.boundary,
        num_steps=num_steps,
        branches=branches,
        forced=tuple(cache._forced),
        loop_seconds=loop,
        seconds_per_computed_step=mean[True],
        seconds_per_reused_step=mean[False],
        cache_bytes=cache._peak_bytes,
        warnings=tuple(warnings),
        plan=cache._plan,
    )
