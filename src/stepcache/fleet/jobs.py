"""The job queue: the order of a benchmark's runs, the same for one process and a fleet.

Every method on a prompt and seed is compared with the uncached run of that pair, which therefore comes first. The
order keeps a worker with the pair whose uncached run it holds, starts new pairs before it helps with others',
and distributes the rest over all workers at the end. Nothing here depends on processes or machines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Pair = tuple[int, str, int]
"""Number of the prompt, prompt, seed."""


Task = Literal["reference", "item", "ceiling", "search", "run"]


@dataclass(frozen=True)
class Job:
    """One thing a worker does.

    Args:
        task: "reference" makes a pair's uncached run, "item" runs a method and compares it with that, "ceiling" repeats
            the uncached run and compares it with itself, "search" finds a method's threshold, "run" records one run
            of a calibration.
        pair: whose.
        method: the method's name.
        threshold: the one that was found for it.
        first: of a calibration's runs, the one that is also made accelerated.
    """

    task: Task
    pair: Pair | None = None
    method: str = ""
    threshold: float | None = None
    first: bool = False

    @property
    def follows(self) -> bool:
        """Whether it needs the pair's reference."""
        return self.task in ("item", "ceiling")


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Args:
        error: why there is no result.
        again: whether another try may help.
        other_seconds: of them what was not generation.
        value: what the job found, if that is not in a file.
    """

    error: str = ""
    again: bool = False
    other_seconds: float = 0.0
    value: Any = None


Settle = Callable[[Job, Outcome], None]
"""Told of every job once: when it is done, or when nobody will try it again."""


@dataclass
class _Group:
    """The jobs of one pair that wait for its reference."""

    reference: Literal["missing", "making", "there"]
    waiting: deque[Job] = field(default_factory=deque)


class Jobs:
    """The jobs that remain.

    Args:
        jobs: in the preferred order.
        there: pairs whose reference exists already. For other pairs whose jobs need it, it is made.
        retries: how often a lost job is started again.
    """

    def __init__(self, jobs: Iterable[Job], there: Collection[Pair] = (), retries: int = 0) -> None:
        self.retries = retries
        self.unsettled = 0
        self._free: deque[Job] = deque()
        self._groups: dict[Pair, _Group] = {}
        self._fresh: deque[Pair] = deque()
        self._open: dict[Pair, None] = {}  # pairs with a reference and jobs that nobody has taken
        self._at_hand: dict[Hashable, Pair] = {}
        self._lost: dict[Job, int] = {}
        for job in jobs:
            self._add(job, there)

    def __bool__(self) -> bool:
        return self.unsettled > 0

    def _add(self, job: Job, there: Collection[Pair]) -> None:
        if job.task in ("search", "run") or job.pair is None:
            self.unsettled += 1
            self._free.append(job)
            return
        if job.pair not in self._groups:
            self._groups[job.pair] = _Group("there" if job.pair in there else "missing")
            if job.pair not in there:
                self.unsettled += 1  # its reference, whether or not that is asked for
                self._fresh.append(job.pair)
        if job.follows:
            self.unsettled += 1
            self._groups[job.pair].waiting.append(job)
            if self._groups[job.pair].reference == "there":
                self._open[job.pair] = None

    def take(self, worker: Hashable) -> Job | None:
        """The best next job for a worker; None if there is none now (others may leave some)."""
        if self._free:
            return self._free.popleft()
        mine = self._at_hand.get(worker)
        if mine is not None and mine in self._open:
            return self._pop(mine)
        if self._fresh:
            pair = self._fresh.popleft()
            self._groups[pair].reference = "making"
            self._at_hand[worker] = pair
            return Job("reference", pair)
        if not self._open:
            return None
        pair = max(self._open, key=lambda p: len(self._groups[p].waiting))
        self._at_hand[worker] = pair
        return self._pop(pair)

    def _pop(self, pair: Pair) -> Job:
        group = self._groups[pair]
        job = group.waiting.popleft()
        if not group.waiting:
            del self._open[pair]
        return job

    def settled(self, job: Job, *, failed: bool = False) -> list[Job]:
        """A job is done, or has failed for good; returns the jobs that fall with it (those of a failed reference)."""
        self.unsettled -= 1
        self._lost.pop(job, None)
        if job.task != "reference" or job.pair is None:
            return []
        group = self._groups[job.pair]
        group.reference = "there"
        if not failed:
            if group.waiting:
                self._open[job.pair] = None
            return []
        fallen = list(group.waiting)
        group.waiting.clear()
        self.unsettled -= len(fallen)
        return fallen

    def again(self, job: Job) -> bool:
        """Put a job back whose worker was lost; False if it was tried often enough."""
        self._lost[job] = tries = self._lost.get(job, 0) + 1
        if tries > self.retries:
            return False
        if job.pair is None or job.task in ("search", "run"):
            self._free.append(job)
        elif job.task == "reference":
            self._groups[job.pair].reference = "missing"
            self._fresh.appendleft(job.pair)
        else:
            self._groups[job.pair].waiting.append(job)  # last: whoever failed at it takes another first
            self._open[job.pair] = None
        return True

    def forget(self, worker: Hashable) -> None:
        """A worker is gone."""
        self._at_hand.pop(worker, None)


class Alone:
    """One process that does all jobs, one after the other; what goes wrong in a way nobody expected ends it."""

    def __init__(self, work: Callable[[Job], Outcome]) -> None:
        self.work = work
        self.running = 0

    def run(self, jobs: Jobs, settle: Settle) -> None:
        """Do them all."""
        self.running = 1
        while (job := jobs.take(self)) is not None:
            settle_with(jobs, job, self.work(job), settle)
        self.running = 0


def settle_with(jobs: Jobs, job: Job, outcome: Outcome, settle: Settle) -> None:
    """Settle a job, and those that fall with it."""
    fallen = jobs.settled(job, failed=bool(outcome.error))
    settle(job, outcome)
    for other in fallen:
        settle(other, Outcome(f"the uncached run failed: {outcome.error}"))
