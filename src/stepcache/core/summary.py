"""What a run did: computed and skipped steps, times, memory, warnings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from stepcache.core.plan import Plan, timeline

FEW_STEPS = 10
"""Below this many steps neighbouring evaluations differ so much that skipping rarely pays (see docs/methods.md)."""
MOST_LINES = 6
"""Branches that a printed summary lists one by one."""


@dataclass(frozen=True)
class BranchSummary:
    """Steps computed and skipped in one branch, as indices."""

    name: str
    computed: tuple[int, ...]
    skipped: tuple[int, ...]


@dataclass(frozen=True)
class RunSummary:
    """What a run did. Seconds are wall time; a step's time is that of all its calls together.

    `loop_seconds` runs from the first call of the transformer to the end of the last one, samplers included.
    `forced` are (step, branch) computed although the policy would have skipped them. `cache_bytes` is the peak.
    `plan` is what was followed, if the decisions were known beforehand.
    """

    policy: str
    boundary: str
    num_steps: int
    branches: tuple[BranchSummary, ...]
    forced: tuple[tuple[int, str], ...]
    loop_seconds: float
    seconds_per_computed_step: float | None
    seconds_per_skipped_step: float | None
    cache_bytes: int
    warnings: tuple[str, ...]
    plan: Plan | None = None
    notes: tuple[str, ...] = ()

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

    def __str__(self) -> str:
        done, steps = len(self.computed), len(self.computed) + len(self.skipped)
        lines = [
            f"{self.policy}, boundary {self.boundary}: computed {done} of {steps} steps, "
            f"skipped {len(self.skipped)}; ideal speed-up {self.ideal_speedup:.2f}x",
            timeline(steps, self.computed),
            *(f"  {b.name}: computed {len(b.computed)}, skipped {len(b.skipped)}" for b in self.branches[:MOST_LINES]),
        ]
        if more := len(self.branches) - MOST_LINES:
            lines += [f"  and {more} more branches"] if more > 0 else []
        lines.append(f"  loop {self.loop_seconds:.2f} s; cache {self.cache_bytes / 2**20:.2f} MiB at most")
        if self.seconds_per_computed_step and self.seconds_per_skipped_step is not None:
            share = 100 * self.seconds_per_skipped_step / self.seconds_per_computed_step
            milliseconds = 1000 * self.seconds_per_computed_step
            lines.append(f"  a computed step took {milliseconds:.1f} ms, a skipped one {share:.1f} % of it")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])


@dataclass
class Log:
    """What happens in a run, as it happens."""

    branches: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    spans: list[tuple[bool, int, Any, Any]] = field(default_factory=list)
    forced: list[tuple[int, str]] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    finite: list[tuple[int, Any]] = field(default_factory=list)
    beyond: int = 0
    peak_bytes: int = 0

    def call(self, step: int, branch: str, computed: bool) -> None:
        """A call was computed or skipped."""
        self.branches.setdefault(branch, ([], []))[0 if computed else 1].append(step)

    def see(self, step: int, output: torch.Tensor) -> None:
        """Remember whether an output is finite, without waiting for the device."""
        self.finite.append((step, output.isfinite().all()))

    def settle(self) -> None:
        """Read what is known by now and keep the first step that was not finite; one synchronisation for all."""
        waiting = [(step, flag) for step, flag in self.finite if isinstance(flag, torch.Tensor)]
        if waiting:
            read = torch.stack([flag.to(waiting[0][1].device) for _, flag in waiting]).tolist()
            done = [(step, flag) for step, flag in self.finite if not isinstance(flag, torch.Tensor)]
            done += [(step, False) for (step, _), fine in zip(waiting, read, strict=True) if not fine]
            self.finite = done[:1]

    def hold(self, tensors: list[torch.Tensor]) -> None:
        """Note the memory of what is held between steps; a tensor held under two names weighs once."""
        storages = [t.untyped_storage() for t in tensors]
        distinct = {s.data_ptr(): s.nbytes() for s in storages}
        self.peak_bytes = max(self.peak_bytes, sum(distinct.values()))

    def warnings(self, num_steps: int, expects_skips: bool) -> list[str]:
        """What a reader should know of the run."""
        self.settle()
        found = []
        if not self.spans:
            found.append("no call of the transformer was seen: nothing has run yet, or it was replaced meanwhile")
        elif self.finite:
            found.append(f"the model's output was not finite at step {self.finite[0][0]}; it was passed through")
        elif expects_skips and not any(skipped for _, skipped in self.branches.values()):
            found.append("no step was skipped: the settings never allowed it")
        if 0 < num_steps < FEW_STEPS and expects_skips:
            found.append(f"only {num_steps} steps: neighbouring steps differ too much for skipping to make sense")
        if self.changed:
            steps = ", ".join(map(str, sorted(set(self.changed))))
            found.append(f"the latent or the batch changed its shape at step {steps}; the method started anew there")
        if self.forced:
            found.append(f"{len(self.forced)} calls were computed because there was nothing to predict them from")
        if self.beyond:
            found.append(
                f"{self.beyond} calls came after the last of {num_steps} steps (another loop, or more rows than "
                "timesteps); they were computed"
            )
        return found

    def times(self) -> tuple[float, float | None, float | None]:
        """Seconds of the loop, of a computed step and of a skipped step (means)."""
        loop = elapsed(self.spans[0][2], self.spans[-1][3]) if self.spans else 0.0
        per_step: dict[bool, dict[int, float]] = {True: {}, False: {}}
        for computed, step, start, stop in self.spans[1:]:  # the first call warms caches and allocators up
            per_step[computed][step] = per_step[computed].get(step, 0.0) + elapsed(start, stop)
        mixed = set(per_step[True]) & set(per_step[False])

        def mean(kind: bool) -> float | None:
            times = [s for k, s in per_step[kind].items() if k not in mixed and k > 0]
            return sum(times) / len(times) if times else None

        return loop, mean(True), mean(False)


def timestamp(x: torch.Tensor) -> Any:
    """A point in time: on CUDA an event (no synchronisation until the summary reads it), else seconds."""
    if x.is_cuda:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(x.device))
        return event
    return time.perf_counter()


def elapsed(start: Any, stop: Any) -> float:
    """Seconds between two `timestamp`s."""
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000
