"""Methods as text: NAME[:VALUE][,KEY=VALUE...].

    hindsight:25   hindsight:0.5   lemica:25   easycache:0.05   magcache:0.12,K=4   plan:plan.json

A budget is a number of computed steps, or a share of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from stepcache.core.follow_weights import as_policy
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy
from stepcache.core.trajectory import BOUNDARIES
from stepcache.hindsight.method import Hindsight
from stepcache.methods import (
    EasyCache,
    LeMiCa,
    MagCache,
    MagCacheCalibration,
    Off,
    Ratios,
    Spectrum,
    TaylorSeer,
    TeaCache,
    Uniform,
)
from stepcache.planning.plan_file import PlanFile

CALIBRATION = "magcache-calibration"
"""Computes every step and measures MagCache's ratios: of use to `stepcache generate` only."""
FEWER_STEPS = "steps"
"""The same sampler with fewer steps: of use to `stepcache bench` only."""
SEARCHED, LIKE_STEPS = ("easycache", "magcache", "teacache"), (10.0, 1000.0)
"""Methods of ours that have a threshold, and between which numbers it looks like a budget."""
RENAMED = {"checked": "hindsight", "none": "uncached"}
"""Names of earlier versions."""


GONE = {
    "predict": "lemica reuses outputs, as published; for a forecast and its correction take hindsight:BUDGET",
    "schedule": "hindsight spreads its steps by noise level; for others plan them (stepcache plan) and take plan:FILE",
}
"""Options of earlier versions, and what there is instead."""


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
    make: Callable[..., Any]
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
        if key not in options_of(self.name):
            raise ValueError(f"{flag} has no effect on {self.text}; leave it out.")
        if key in dict(self.options):
            raise ValueError(f"{self.text} says {key}= already; leave {flag} out.")
        return replace(self, options=(*self.options, (key, value)))


def number(text: str) -> float:
    """A finite one; ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


def budget(text: str) -> float:
    """A whole number of steps, or a share of them."""
    return int(text) if text.lstrip("-").isdecimal() else number(text)


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
    number: "a number",
    budget: "a number of steps, or a share of them such as 0.5",
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
    "hindsight": Kind("budget", budget, Hindsight, schedule="by noise level"),
    "lemica": Kind(
        "budget",
        int,
        _renaming(LeMiCa, table="model"),
        {**_OURS, "table": str, "resample": _truth},
        schedule="published list",
    ),
    "plan": Kind("file", str, PlanFile.load, {"resample": _truth}, schedule="planned"),
    "uniform": Kind("budget", budget, Uniform, {**_OURS, "interval": int}, optional=True, schedule="even"),
    "easycache": Kind("threshold", number, EasyCache, {**_OURS, "ret_steps": int}, (1e-3, 10.0), optional=True),
    "magcache": Kind(
        "threshold",
        number,
        _renaming(MagCache, K="magcache_K", R="retention_ratio", table="model"),
        {**_OURS, "K": int, "R": number, "table": str, "ratios": Ratios.load, "interp": str},
        (1e-4, 10.0),
        optional=True,
    ),
    CALIBRATION: Kind("file", str, lambda file: MagCacheCalibration()),
    "teacache": Kind(
        "threshold",
        number,
        _renaming(TeaCache, table="model", ret_steps="use_ret_steps"),
        {**_OURS, "ret_steps": _truth, "table": str},
        (1e-3, 10.0),
        optional=True,
    ),
    "taylorseer": Kind(
        "interval",
        int,
        TaylorSeer,
        {**_OURS, "order": int, "first_enhance": int, "budget": budget},
        optional=True,
        schedule="even",
    ),
    "spectrum": Kind("budget", budget, Spectrum, {**_OURS, "blend": number}, schedule="even"),
}


def named(policy: Policy | Plan | str) -> Policy:
    """A policy given as itself, as a plan, or by name: "hindsight:25", "lemica:17", "hindsight:0.5".

    Raises:
        ValueError: an unknown method or option, a value that is missing or of the wrong type, something that only a
            benchmark can run.
        FileNotFoundError: a plan or ratios file that is not there.
    """
    return policy_of(read(policy)) if isinstance(policy, str) else as_policy(policy)


def policy_of(method: Method) -> Policy:
    """The policy of a method that a single run can take; raises what `named` does."""
    if method.name == FEWER_STEPS:
        raise ValueError(
            f"{method.text!r} is for stepcache bench; here say --steps {method.value}, or in Python "
            f"num_inference_steps={method.value}."
        )
    if method.value.startswith("@"):
        raise ValueError(f"{method.text!r} asks for a search, which stepcache bench does; here give the threshold.")
    made = made_of(method)
    if not hasattr(made, "begin"):
        raise ValueError(f"{method.text!r} is another project's cache; run it beside ours with stepcache bench.")
    policy: Policy = made
    return policy


def made_of(method: Method, value: tuple[Any, ...] | None = None) -> Any:
    """What a method's kind makes of it; `value`: instead of the one that is written."""
    kind, text = KINDS[method.name], method.text
    options = {key: converted(text, key, value, kind.options[key]) for key, value in method.options}
    if value is None:
        value = (converted(text, kind.value, method.value, kind.convert),) if method.value else ()
    if method.name in SEARCHED and value and LIKE_STEPS[0] < value[0] < LIKE_STEPS[1]:
        steps = f"{value[0]:g}"
        raise ValueError(
            f"{text!r}: {steps} looks like a number of steps, and {method.name} takes a threshold; bench and demo find "
            f"the one that computes {steps} steps: {method.name}:@{steps}."
        )
    try:
        return kind.make(*value, **options)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def read(text: str) -> Method:
    """Take a method apart; ValueError for an unknown name or option, or a value that is missing or too many."""
    head, *pairs = text.split(",")
    name, _, value = head.partition(":")
    if now := RENAMED.get(name.lower()):
        raise ValueError(f"{text!r}: {name} is now called {now}; write {text.replace(name, now, 1)}.")
    if name not in (FEWER_STEPS, *KINDS):
        near = difflib.get_close_matches(name, KINDS, n=1)
        meant = f"did you mean {near[0]}? Expected" if near else "expected"
        raise ValueError(f"{text!r} is no method known here; {meant} one of {FEWER_STEPS}, {', '.join(KINDS)}.")
    options = tuple(_option(text, name, pair) for pair in pairs)
    if twice := [key for key, _ in options if [k for k, _ in options].count(key) > 1]:
        raise ValueError(f"{text!r} says {twice[0]}= more than once.")
    if name != FEWER_STEPS and _misses_value(KINDS[name], value):
        expected = f"{name}:{KINDS[name].value.upper()}" if KINDS[name].value else name
        raise ValueError(f"{text!r}: expected {expected}.")
    return Method(text, name, value, options)


def _misses_value(kind: Kind, value: str) -> bool:
    return bool(kind.value) != bool(value) and not (kind.optional and not value)


def options_of(name: str) -> dict[str, Callable[[str], Any]]:
    """Keys and types of a method's options."""
    return {} if name == FEWER_STEPS else KINDS[name].options


def _option(text: str, name: str, pair: str) -> tuple[str, str]:
    key, equals, value = pair.partition("=")
    if key in GONE and key not in options_of(name):
        raise ValueError(f"{text!r}: {key}= is gone: {GONE[key]}.")
    if not equals or key not in options_of(name):
        known = ", ".join(f"{k}=" for k in options_of(name)) or "none"
        raise ValueError(f"{text!r}: {pair!r} is no option of it; expected {known}.")
    return key, value


def converted(text: str, what: str, value: str, convert: Callable[[str], Any]) -> Any:
    """A value in its type; ValueError or FileNotFoundError with the method as written and what was expected."""
    try:
        return convert(value)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{text!r}: {error}") from error
    except ValueError as error:
        if convert not in EXPECTED:
            raise ValueError(f"{text!r}: {error}") from error
        raise ValueError(f"{text!r}: {what} is {value!r}; expected {EXPECTED[convert]}.") from None
