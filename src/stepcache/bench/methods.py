"""Methods as text, for `stepcache bench --policies`: NAME[:VALUE][,KEY=VALUE...], separated by spaces.

    lemica:25   easycache:0.05   magcache:0.12,K=4   plan:plan.json   steps:25   easycache:@25

`@25` instead of a threshold asks for the one whose runs compute 25 steps on average.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from stepcache.bench import peers
from stepcache.core.plan import Plan
from stepcache.core.strategy import Policy
from stepcache.core.trajectory import BOUNDARIES
from stepcache.hosts.diffusers import Run, accelerate
from stepcache.methods import EasyCache, Fixed, Hindsight, LeMiCa, MagCache, Off, Ratios, TaylorSeer, TeaCache, Uniform

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
    """

    name: str
    enter: Enter
    steps: int | None = None
    policy: Policy | None = None


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

    `value` is what stands after the colon, of type `convert`; `options` are the keys with their types; `make` gets the
    value and the given options by their names. `search`: smallest and largest threshold worth trying, where the number
    of computed steps falls with it.
    """

    value: str
    convert: Callable[[str], Any]
    make: Callable[..., Policy | Enter]
    options: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    search: tuple[float, float] | None = None


def _truth(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("expected 0 or 1")
    return text == "1"


def _boundary(text: str) -> str:
    if text not in BOUNDARIES:
        raise ValueError(f"expected one of {', '.join(BOUNDARIES)}")
    return text


def _magcache(thresh: float, **options: Any) -> Policy:
    names = {"K": "magcache_K", "R": "retention_ratio", "table": "model"}
    return MagCache(thresh, **{names.get(k, k): v for k, v in options.items()})


def _lemica(budget: int, **options: Any) -> Policy:
    return LeMiCa(budget, **{{"table": "model"}.get(k, k): v for k, v in options.items()})


def _teacache(thresh: float, **options: Any) -> Policy:
    names = {"table": "model", "ret_steps": "use_ret_steps"}
    return TeaCache(thresh, **{names.get(k, k): v for k, v in options.items()})


_OURS: dict[str, Callable[[str], Any]] = {"boundary": _boundary}


KINDS: dict[str, Kind] = {
    "uncached": Kind("", str, lambda value: Off()),
    "lemica": Kind("budget", int, _lemica, {**_OURS, "predict": str, "table": str, "resample": _truth}),
    "hindsight": Kind("budget", int, Hindsight, {**_OURS, "schedule": str}),
    "uniform": Kind("budget", int, Uniform, _OURS),
    "plan": Kind("file", str, lambda file, resample=False: Fixed(Plan.load(file), resample), {"resample": _truth}),
    "easycache": Kind("threshold", float, EasyCache, {**_OURS, "ret_steps": int}, (1e-3, 10.0)),
    "magcache": Kind(
        "threshold",
        float,
        _magcache,
        {**_OURS, "K": int, "R": float, "table": str, "ratios": Ratios.load, "interp": str},
        (1e-4, 10.0),
    ),
    "teacache": Kind("threshold", float, _teacache, {**_OURS, "ret_steps": _truth, "table": str}, (1e-3, 10.0)),
    "taylorseer": Kind("interval", int, TaylorSeer, {**_OURS, "order": int, "first_enhance": int}),
    "fbcache": Kind("threshold", float, peers.first_block_cache, search=(1e-3, 2.0)),
    "seacache": Kind("threshold", float, peers.sea_cache, {"order": int, "most": int}, (1e-3, 5.0)),
    "diffusers-magcache": Kind(
        "threshold", float, peers.mag_cache, {"K": int, "R": float, "ratios": Ratios.load}, (1e-4, 10.0)
    ),
    "diffusers-taylorseer": Kind("interval", int, peers.taylorseer_cache, {"order": int}),
    "cachedit": Kind(
        "threshold",
        float,
        peers.dbcache,
        {"F": int, "B": int, "W": int, "MC": int, "taylor": int},
        (1e-3, 2.0),
    ),
    "cachedit-mask": Kind("policy", str, peers.dbcache_mask, {"F": int, "taylor": int}),
}


def help_text() -> str:
    """The methods and their options, one a line."""
    lines = ["steps:N                      the same sampler with N steps"]
    for name, kind in KINDS.items():
        head = f"{name}:{kind.value.upper()}" if kind.value else name
        keys = "".join(f",{key}=" for key in kind.options)
        lines.append(f"{head:<28} {keys.removeprefix(',')}{'   or @N' if kind.search else ''}".rstrip())
    return "\n".join(f"  {line}" for line in lines)


def parse(text: str) -> list[Contender | Search]:
    """All methods of a list.

    Raises:
        ValueError: an unknown method or option, a value of the wrong type, the same method twice, none at all.
        FileNotFoundError: a plan or ratios file that is not there.
    """
    parts = text.split()
    if not parts:
        raise ValueError("--policies is empty; name at least one method, such as lemica:25.")
    if twice := sorted({p for p in parts if parts.count(p) > 1}):
        raise ValueError(f"--policies names {twice[0]} more than once.")
    return [parse_one(part) for part in parts]


def parse_one(text: str) -> Contender | Search:
    """One method."""
    head, *pairs = text.split(",")
    name, _, value = head.partition(":")
    if name == "steps":
        return _fewer_steps(text, value, pairs)
    if name not in KINDS:
        raise ValueError(f"{text!r} is no method known here; expected one of steps, {', '.join(KINDS)}.")
    kind = KINDS[name]
    options = dict(_option(text, kind, pair) for pair in pairs)
    if value.startswith("@"):
        if kind.search is None:
            searched = ", ".join(n for n, k in KINDS.items() if k.search)
            raise ValueError(f"{text!r}: {name} has no threshold to search for; these have: {searched}.")
        target = _converted(text, "@N", value[1:], float)
        return Search(text, lambda thresh: _contender(text, kind, thresh, options), target, *kind.search)
    if bool(kind.value) != bool(value):
        expected = f"{name}:{kind.value.upper()}" if kind.value else name
        raise ValueError(f"{text!r}: expected {expected}, for example with a value as in the documentation.")
    return _contender(text, kind, _converted(text, kind.value, value, kind.convert), options)


def _fewer_steps(text: str, value: str, pairs: list[str]) -> Contender:
    steps = _converted(text, "N", value, int)
    if steps < 1 or pairs:
        raise ValueError(f"{text!r}: expected steps:N with N of 1 or more, and nothing else.")
    return Contender(text, lambda pipe, _: accelerate(pipe, Off()), steps)


def _contender(text: str, kind: Kind, value: Any, options: dict[str, Any]) -> Contender:
    try:
        made = kind.make(value, **options)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    if hasattr(made, "begin"):
        policy: Policy = made  # type: ignore[assignment]
        return Contender(text, lambda pipe, _: accelerate(pipe, policy), policy=policy)
    return Contender(text, made)


def _option(text: str, kind: Kind, pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or key not in kind.options:
        known = ", ".join(f"{k}=" for k in kind.options) or "none"
        raise ValueError(f"{text!r}: {pair!r} is no option of it; expected {known}.")
    return key, _converted(text, key, value, kind.options[key])


def _converted(text: str, what: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(value)
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) or convert not in (int, float, _truth, _boundary):
            raise type(error)(f"{text!r}: {error}") from error
        kinds: dict[Any, str] = {int: "a whole number", float: "a number", _truth: "0 or 1"}
        expected = kinds.get(convert, "one of " + ", ".join(BOUNDARIES))
        raise ValueError(f"{text!r}: {what} is {value!r}; expected {expected}.") from None
