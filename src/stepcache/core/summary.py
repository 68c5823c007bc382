"""What a run did: computed and skipped steps, times, memory, warnings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stepcache.core.plan import timeline

if TYPE_CHECKING:
    from stepcache.core.plan import Plan
    from stepcache.core.strategy import Strategy
    from stepcache.core.trajectory import Trajectory

FEW_STEPS = 10
"""Up to this many steps neighbouring evaluations differ so much that only a few may be skipped (docs/results.md)."""
FEW_SKIPPED = 0.25
"""Of so many: a share that was still closer than fewer steps on three of four models."""
MOST_LINES = 6
"""Branches that a printed summary lists."""


@dataclass(frozen=True)
class BranchSummary:
    """Steps computed and skipped in one branch, as indices."""

    name: str
    computed: tuple[int, ...]
    skipped: tuple[int, ...]


@dataclass
class RunSummary:
    """What a run did, or did so far. Seconds are wall time; a step's time is that of all its calls together.

    Args:
        policy, boundary, run, strategy: what was asked for, and what decided.
        forced: (step, branch) computed although the policy would have skipped them.
        cache_bytes: the most that was held between steps.
    """

    policy: str
    boundary: str
    run: Trajectory
    strategy: Strategy
    forced: tuple[tuple[int, str], ...] = ()
    cache_bytes: int = 0
    _branches: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)  # computed, skipped
    spans: list[tuple[bool, int, Any, Any]] = field(default_factory=list)  # computed, step, begin and end of a call
    changed: set[int] = field(default_factory=set)
    finite: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    beyond: int = 0

    def call(self, step: int, branch: str, computed: bool, forced: bool) -> None:
        """A call is computed or skipped."""
        if step >= self.run.num_steps:
            self.beyond += 1
            return
        self._branches.setdefault(branch, ([], []))[0 if computed else 1].append(step)
        self.forced += ((step, branch),) * forced

    def hold(self, tensors: list[torch.Tensor]) -> None:
        """These are held between steps; a tensor held under two names counts once."""
        storages = [t.untyped_storage() for t in tensors]
        self.cache_bytes = max(self.cache_bytes, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))

    @property
    def num_steps(self) -> int:
        """Of the run."""
        return self.run.num_steps

    @property
    def plan(self) -> Plan | None:
        """What was followed, if the decisions were known beforehand."""
        return self.strategy.plan

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the run deviated from the request."""
        return self.strategy.notes

    @property
    def branches(self) -> tuple[BranchSummary, ...]:
        """In the order in which they were first seen."""
        return tuple(BranchSummary(name, tuple(c), tuple(s)) for name, (c, s) in self._branches.items())

    @property
    def computed(self) -> tuple[int, ...]:
        """Steps at which at least one branch was computed."""
        return tuple(sorted({k for b in self.branches for k in b.computed}))

    @property
    def skipped(self) -> tuple[int, ...]:
        """Steps at which no branch was computed."""
        return tuple(sorted({k for b in self.branches for k in b.skipped} - set(self.computed)))

    @property
    def ideal_speedup(self) -> float:
        """Steps over computed steps."""
        return (len(self.computed) + len(self.skipped)) / max(1, len(self.computed))

    @property
    def loop_seconds(self) -> float:
        """From the first call of the transformer to the end of the last one, samplers included."""
        return elapsed(self.spans[0][2], self.spans[-1][3]) if self.spans else 0.0

    @property
    def seconds_per_computed_step(self) -> float | None:
        """A mean; steps of both kinds and the first, which warms caches up, do not count."""
        return self._seconds(True)

    @property
    def seconds_per_skipped_step(self) -> float | None:
        """Likewise."""
        return self._seconds(False)

    def _seconds(self, kind: bool) -> float | None:
        times: dict[int, float] = {}
        other = {step for computed, step, _, _ in self.spans if computed != kind}
        for computed, step, begin, end in self.spans:
            if computed == kind and step and step not in other:
                times[step] = times.get(step, 0.0) + elapsed(begin, end)
        return sum(times.values()) / len(times) if times else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know of the run; on CUDA this waits for pending work."""
        return (*self.run.remarks, *self._observed(), *self.strategy.warnings())

    def _observed(self) -> Iterator[str]:
        steps, skips = self.run.num_steps, self.strategy.skips
        infinite = [step for step, finite in self.finite if not bool(finite)]
        if not self.spans:
            yield "no call of the transformer was seen: nothing has run yet, or it was replaced since"
        elif infinite:
            yield f"the model's output was not finite at step {infinite[0]}; it was passed through"
        elif skips and not self.skipped:
            yield "no step was skipped: the settings never allowed it"
        if steps <= FEW_STEPS and len(self.skipped) > FEW_SKIPPED * steps:
            fewest = steps - int(FEW_SKIPPED * steps)
            yield f"only {steps} steps, which differ much: compute {fewest} or more, or run the sampler with fewer"
        if self.changed:
            where = ", ".join(map(str, sorted(self.changed)))
            yield f"the latent or the batch changed its shape at step {where}; the method restarted there"
        if self.forced:
            yield f"{len(self.forced)} calls were computed because there was nothing to predict them from"
        if self.beyond:
            yield f"{self.beyond} calls came after the last of {steps} steps; they were computed"

    def __str__(self) -> str:
        done, steps = len(self.computed), len(self.computed) + len(self.skipped)
        lines = [
            f"{self.policy}, boundary {self.boundary}: computed {done} of {steps} steps, "
            f"skipped {steps - done}; ideal speed-up {self.ideal_speedup:.2f}x",
            timeline(steps, self.computed),
        ]
        for b in self.branches[:MOST_LINES]:
            lines.append(f"  {b.name}: computed {len(b.computed)}, skipped {len(b.skipped)}")
        lines.append(f"  loop {self.loop_seconds:.2f} s; cache {self.cache_bytes / 2**20:.2f} MiB at most")
        computed, skipped = self.seconds_per_computed_step, self.seconds_per_skipped_step
        if computed and skipped is not None:
            share = 100 * skipped / computed
            lines.append(f"  a computed step took {1000 * computed:.1f} ms, a skipped one {share:.1f} % of it")
        lines += [f"  note: {note}" for note in self.notes] + [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)


def timestamp(x: torch.Tensor) -> Any:
    """A point in time: on CUDA an event (no synchronisation until the summary reads it), else seconds."""
    if x.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(x.device))
        return event
    return time.perf_counter()


def elapsed(begin: Any, end: Any) -> float:
    """Seconds between two `timestamp`s."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
