"""Methods as text: NAME[:VALUE][,KEY=VALUE...], several of them separated by spaces.

    lemica:25   easycache:0.05   magcache:0.12,K=4   plan:plan.json   steps:25   easycache:@25

`@25` instead of a threshold asks a benchmark for the one whose runs compute 25 steps on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from stepcache.bench import peers
from stepcache.core.strategy import Policy
from stepcache.core.trajectory import BOUNDARIES
from stepcache.hindsight.method import Hindsight
from stepcache.hosts.diffusers import Run, accelerate
from stepcache.methods import (
    EasyCache,
    LeMiCa,
    MagCache,
    MagCacheCalibration,
    Off,
    Ratios,
    TaylorSeer,
    TeaCache,
    Uniform,
)
from stepcache.planning.plan_file import PlanFile

Enter = Callable[[Any, int], AbstractContextManager[Run | None]]
"""(pipeline, steps) -> a context in which the pipeline runs under the method; it yields our run, or None."""


CALIBRATION = "magcache-calibration"
"""Computes every step and measures MagCache's ratios: of use to `stepcache generate` only."""


FEWER_STEPS = "steps"


RENAMED = {"checked": "hindsight", "none": "uncached"}
"""Names of earlier versions."""


GONE = {
    "predict": "lemica reuses outputs, as published; for a forecast and its correction take hindsight:BUDGET",
    "schedule": "hindsight spreads its steps by noise level; for others plan them (stepcache plan) and take plan:FILE",
}
"""Options of earlier versions, and what there is instead."""


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


@dataclass(frozen=True)
class Kind:
    """What may stand behind a name.

    Args:
        value: what stands after the colon, in a word; empty if nothing does.
        convert: its type.
        make: gets the value, if there is one, and the given options by their names.
        options: the keys with their types.
        search: smallest and largest threshold worth trying, where the number of computed steps falls with it.
        optional: whether the value may be left out, for the method's own default.
        schedule: where the schedule comes from, in words, where tables are to say it.
    """

    value: str
    convert: Callable[[str], Any]
    make: Callable[..., Policy | Enter]
    options: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    search: tuple[float, float] | None = None
    optional: bool = False
    schedule: str = ""


@dataclass(frozen=True)
class Method:
    """A method as written, taken apart but not made yet.

    Args:
        text: as written.
        name: one of `KINDS`, or "steps".
        value: what stands after the colon; empty if there is none.
        options: pairs (key, value).
    """

    text: str
    name: str
    value: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def with_option(self, key: str, value: str, flag: str) -> Method:
        """The same with one more option, which a flag of a command stands for.

        Raises:
            ValueError: the method has no such option, so that the flag would have no effect; or has it already.
        """
        if key not in _options(self.name):
            raise ValueError(f"{flag} has no effect on {self.text}; leave it out.")
        if key in dict(self.options):
            raise ValueError(f"{self.text} says {key}= already; leave {flag} out.")
        return replace(self, options=(*self.options, (key, value)))


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _truth(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("expected 0 or 1")
    return text == "1"


def _boundary(text: str) -> str:
    if text not in BOUNDARIES:
        raise ValueError(f"expected one of {', '.join(BOUNDARIES)}")
    return text


EXPECTED: dict[Callable[[str], Any], str] = {
    int: "a whole number",
    _number: "a number",
    _truth: "0 or 1",
    _boundary: f"one of {', '.join(BOUNDARIES)}",
}
"""What messages call the types; others say themselves what is wrong."""


def _renaming(make: Callable[..., Policy], **names: str) -> Callable[..., Policy]:
    """`make` with options under the short names they have here."""
    return lambda *value, **options: make(*value, **{names.get(key, key): v for key, v in options.items()})


_OURS: dict[str, Callable[[str], Any]] = {"boundary": _boundary}


KINDS: dict[str, Kind] = {
    "uncached": Kind("", str, Off),
    "hindsight": Kind("budget", int, Hindsight),
    "lemica": Kind(
        "budget",
        int,
        _renaming(LeMiCa, table="model"),
        {**_OURS, "table": str, "resample": _truth},
        schedule="published list",
    ),
    "plan": Kind("file", str, PlanFile.load, {"resample": _truth}, schedule="planned"),
    "uniform": Kind("budget", int, Uniform, {**_OURS, "interval": int}, optional=True, schedule="even"),
    "easycache": Kind("threshold", _number, EasyCache, {**_OURS, "ret_steps": int}, (1e-3, 10.0), optional=True),
    "magcache": Kind(
        "threshold",
        _number,
        _renaming(MagCache, K="magcache_K", R="retention_ratio", table="model"),
        {**_OURS, "K": int, "R": _number, "table": str, "ratios": Ratios.load, "interp": str},
        (1e-4, 10.0),
        optional=True,
    ),
    CALIBRATION: Kind("file", str, lambda file: MagCacheCalibration()),
    "teacache": Kind(
        "threshold",
        _number,
        _renaming(TeaCache, table="model", ret_steps="use_ret_steps"),
        {**_OURS, "ret_steps": _truth, "table": str},
        (1e-3, 10.0),
        optional=True,
    ),
    "taylorseer": Kind(
        "interval", int, TaylorSeer, {**_OURS, "order": int, "first_enhance": int}, optional=True, schedule="even"
    ),
    "fbcache": Kind("threshold", _number, peers.first_block_cache, search=(1e-3, 2.0)),
    "seacache": Kind("threshold", _number, peers.sea_cache, {"order": int, "most": int}, (1e-3, 5.0)),
    "diffusers-magcache": Kind(
        "threshold", _number, peers.mag_cache, {"K": int, "R": _number, "ratios": Ratios.load}, (1e-4, 10.0)
    ),
    "diffusers-taylorseer": Kind("interval", int, peers.taylorseer_cache, {"order": int}),
    "cachedit": Kind(
        "threshold",
        _number,
        peers.dbcache,
        {"F": int, "B": int, "W": int, "MC": int, "taylor": int, "forecast": str},
        (1e-3, 2.0),
    ),
    "cachedit-mask": Kind("policy", str, peers.dbcache_mask, {"F": int, "taylor": int, "forecast": str}),
}


PEERS = ("fbcache", "seacache", "diffusers-magcache", "diffusers-taylorseer", "cachedit", "cachedit-mask")
"""Other projects' caches: of use to `stepcache bench` only."""


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


def policy_of(method: Method) -> Policy:
    """The policy of a method that a single run can take.

    Raises:
        ValueError: something that only a benchmark can run, or what `parse` raises.
    """
    return single(method)[0]


def single(method: Method) -> tuple[Policy, str]:
    """The policy, and where its schedule comes from (`Contender.schedule`); raises what `policy_of` does."""
    if method.name == FEWER_STEPS:
        raise ValueError(f"{method.text!r} is for stepcache bench; here say --steps {method.value}.")
    if method.name in PEERS:
        raise ValueError(f"{method.text!r} is another project's cache; run it beside ours with stepcache bench.")
    made = make(method)
    if isinstance(made, Search) or made.policy is None:
        raise ValueError(f"{method.text!r} asks for a search, which stepcache bench does; here give the threshold.")
    return made.policy, made.schedule


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


def read(text: str) -> Method:
    """Take a method apart; ValueError for an unknown name or option, or a value that is missing or too many."""
    head, *pairs = text.split(",")
    name, _, value = head.partition(":")
    if now := RENAMED.get(name.lower()):
        raise ValueError(f"{text!r}: {name} is now called {now}; write {text.replace(name, now, 1)}.")
    if name not in (FEWER_STEPS, *KINDS):
        raise ValueError(f"{text!r} is no method known here; expected one of {FEWER_STEPS}, {', '.join(KINDS)}.")
    options = tuple(_option(text, name, pair) for pair in pairs)
    if twice := [key for key, _ in options if [k for k, _ in options].count(key) > 1]:
        raise ValueError(f"{text!r} says {twice[0]}= more than once.")
    if name != FEWER_STEPS and _misses_value(KINDS[name], value):
        expected = f"{name}:{KINDS[name].value.upper()}" if KINDS[name].value else name
        raise ValueError(f"{text!r}: expected {expected}.")
    return Method(text, name, value, options)


def _misses_value(kind: Kind, value: str) -> bool:
    return bool(kind.value) != bool(value) and not (kind.optional and not value)


def _options(name: str) -> dict[str, Callable[[str], Any]]:
    return {} if name == FEWER_STEPS else KINDS[name].options


def _option(text: str, name: str, pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if key in GONE and key not in _options(name):
        raise ValueError(f"{text!r}: {key}= is gone: {GONE[key]}.")
    if not equals or key not in _options(name):
        known = ", ".join(f"{k}=" for k in _options(name)) or "none"
        raise ValueError(f"{text!r}: {pair!r} is no option of it; expected {known}.")
    return key, value


def make(method: Method) -> Contender | Search:
    """The method itself; raises what `parse` does."""
    text = method.text
    if method.name == FEWER_STEPS:
        return _fewer_steps(method)
    kind = KINDS[method.name]
    options = {key: _converted(text, key, value, kind.options[key]) for key, value in method.options}
    if not method.value.startswith("@"):
        value = (_converted(text, kind.value, method.value, kind.convert),) if method.value else ()
        return _contender(method, value, options)
    if kind.search is None:
        searched = ", ".join(n for n, k in KINDS.items() if k.search)
        raise ValueError(f"{text!r}: {method.name} has no threshold to search for; these have: {searched}.")
    target = _converted(text, "@N", method.value[1:], _number)
    if target < 1:
        raise ValueError(f"{text!r}: @N is {target:g}; expected a number of computed steps, 1 or more.")
    return Search(text, lambda thresh: _contender(method, (thresh,), options), target, *kind.search)


def _fewer_steps(method: Method) -> Contender:
    steps = _converted(method.text, "N", method.value, int)
    if steps < 1:
        raise ValueError(f"{method.text!r}: expected steps:N with N of 1 or more.")
    return Contender(method.text, lambda pipe, _: accelerate(pipe, Off()), steps)


def _contender(method: Method, value: tuple[Any, ...], options: dict[str, Any]) -> Contender:
    kind = KINDS[method.name]
    try:
        made = kind.make(*value, **options)
    except ValueError as error:
        raise ValueError(f"{method.text!r}: {error}") from error
    if not hasattr(made, "begin"):
        return Contender(method.text, made)
    policy: Policy = made  # type: ignore[assignment]
    schedule = f"{policy.method}, {kind.schedule}" if isinstance(policy, PlanFile) else kind.schedule
    return Contender(method.text, lambda pipe, _: accelerate(pipe, policy), policy=policy, schedule=schedule)


def _converted(text: str, what: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(value)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{text!r}: {error}") from error
    except ValueError as error:
        if convert not in EXPECTED:
            raise ValueError(f"{text!r}: {error}") from error
        raise ValueError(f"{text!r}: {what} is {value!r}; expected {EXPECTED[convert]}.") from None
