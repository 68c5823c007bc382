"""Methods of a benchmark as text, several of them separated by spaces; how one is written: see `stepcache.named`.

    lemica:25   easycache:0.05   plan:plan.json   steps:25   easycache:@25   cachedit:0.1

`@25` instead of a threshold stands for the one whose runs compute 25 steps on average, to be searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from stepcache.bench import peers
from stepcache.core.strategy import Policy
from stepcache.hosts.diffusers import Run, accelerate
from stepcache.methods import Off, Ratios
from stepcache.named import CALIBRATION, FEWER_STEPS, KINDS, Kind, Method, converted, made_of, number, policy_of, read
from stepcache.planning.plan_file import PlanFile

Enter = Callable[[Any, int], AbstractContextManager[Run | None]]
"""(pipeline, steps) -> a context in which the pipeline runs under the method; it yields our run, or None."""


@dataclass(frozen=True)
class Contender:
    """A method that takes part in a benchmark.

    Args:
        name: as written.
        enter: puts it into a pipeline.
        steps: steps of the sampler, where the method is to take fewer of them; None: the benchmark's.
        policy: what decides, if it is one of ours.
        schedule: where its schedule comes from, in words, if that is to be said: "even", "hindsight, planned".
    """

    name: str
    enter: Enter
    steps: int | None = None
    policy: Policy | None = None
    schedule: str = ""


@dataclass(frozen=True)
class Search:
    """A method whose threshold is still to be found: the one with `target` computed steps on average."""

    name: str
    make: Callable[[float], Contender]
    target: float
    low: float
    high: float

    def easiest(self, steps: int) -> Contender:
        """The one that skips least; ValueError if a run has fewer steps than are asked for."""
        if self.target > steps:
            raise ValueError(f"{self.name}: a run has {steps} steps; ask for fewer.")
        return self.make(self.low)

    def trials(self, count: Callable[[Contender], float], most: int) -> Iterator[tuple[float, float]]:
        """Bisect the threshold's logarithm, `most` times: (distance of the count from the target, threshold)."""
        low, high = math.log(self.low), math.log(self.high)
        for _ in range(most):
            middle = (low + high) / 2
            found = count(self.make(math.exp(middle)))
            yield abs(found - self.target), math.exp(middle)
            low, high = (middle, high) if found > self.target else (low, middle)


PEERS: dict[str, Kind] = {
    "fbcache": Kind("threshold", number, peers.first_block_cache, search=(1e-3, 2.0)),
    "seacache": Kind("threshold", number, peers.sea_cache, {"order": int, "most": int}, (1e-3, 5.0)),
    "diffusers-magcache": Kind(
        "threshold", number, peers.mag_cache, {"K": int, "R": number, "ratios": Ratios.load}, (1e-4, 10.0)
    ),
    "diffusers-taylorseer": Kind("interval", int, peers.taylorseer_cache, {"order": int}),
    "cachedit": Kind(
        "threshold",
        number,
        peers.dbcache,
        {"F": int, "B": int, "W": int, "MC": int, "taylor": int, "forecast": str},
        (1e-3, 2.0),
    ),
    "sampler": Kind("name", str, peers.other_sampler, schedule="uncached"),
    "cachedit-mask": Kind("policy", str, peers.dbcache_mask, {"F": int, "taylor": int, "forecast": str}),
}
"""Other projects' caches: of use to `stepcache bench` only."""
KINDS.update(PEERS)


def help_text(bench: bool = True) -> str:
    """The methods and their options, one a line; without `bench` those of `stepcache generate`."""
    lines = ["steps:N                      the same sampler with N steps"] if bench else []
    for name, kind in KINDS.items():
        if name in ((CALIBRATION,) if bench else PEERS):
            continue
        value = f"[:{kind.value.upper()}]" if kind.optional else f":{kind.value.upper()}"
        keys = "".join(f",{key}=" for key in kind.options).removeprefix(",")
        searched = "   or @N" if kind.search and bench else ""
        lines.append(f"{name + value if kind.value else name:<28} {keys}{searched}".rstrip())
    return "\n".join(f"  {line}" for line in lines)


def parse(text: str) -> list[Contender | Search]:
    """All methods of a benchmark's list.

    Raises:
        ValueError: an unknown method or option, a value of the wrong type, the same method twice, none at all.
        FileNotFoundError: a plan or ratios file that is not there.
        ImportError: a peer that is not installed.
    """
    return [make(method) for method in read_list(text)]


def parse_one(text: str) -> Contender | Search:
    """One method of a benchmark; raises what `parse` does."""
    (found,) = parse(text)
    return found


def single(method: Method) -> tuple[Policy, str]:
    """The policy of a single run, and where its schedule comes from (`Contender.schedule`); raises as `policy_of`."""
    policy = policy_of(method)
    return policy, _schedule(method, policy)


def read_list(text: str) -> list[Method]:
    """Take the methods of a `--policies` apart; ValueError for one that is unknown or stands there twice, or none."""
    parts = text.split()
    if not parts:
        raise ValueError("--policies is empty; name at least one method, such as lemica:25.")
    if twice := sorted({p for p in parts if parts.count(p) > 1}):
        raise ValueError(f"--policies names {twice[0]} more than once.")
    methods = [read(part) for part in parts]
    for method in methods:
        if method.name == CALIBRATION:
            raise ValueError(f"{method.text!r} is for stepcache generate; here its ratios would be lost.")
    return methods


def make(method: Method) -> Contender | Search:
    """The method itself; raises what `parse` does."""
    text = method.text
    if method.name == FEWER_STEPS:
        return _fewer_steps(method)
    kind = KINDS[method.name]
    if not method.value.startswith("@"):
        return _contender(method, None)
    if kind.search is None:
        searched = ", ".join(n for n, k in KINDS.items() if k.search)
        raise ValueError(f"{text!r}: {method.name} has no threshold to search for; these have: {searched}.")
    target = converted(text, "@N", method.value[1:], number)
    if target < 1:
        raise ValueError(f"{text!r}: @N is {target:g}; expected a number of computed steps, 1 or more.")
    return Search(text, lambda thresh: _contender(method, (thresh,)), target, *kind.search)


def _fewer_steps(method: Method) -> Contender:
    steps = converted(method.text, "N", method.value, int)
    if steps < 1:
        raise ValueError(f"{method.text!r}: expected steps:N with N of 1 or more.")
    return Contender(method.text, lambda pipe, _: accelerate(pipe, Off()), steps)


def _contender(method: Method, value: tuple[Any, ...] | None) -> Contender:
    made = made_of(method, value)
    if not hasattr(made, "begin"):
        return Contender(method.text, made)
    policy: Policy = made
    return Contender(method.text, lambda pipe, _: accelerate(pipe, policy), None, policy, _schedule(method, policy))


def _schedule(method: Method, policy: Policy) -> str:
    schedule = KINDS[method.name].schedule
    return f"{policy.method}, {schedule}" if isinstance(policy, PlanFile) else schedule
