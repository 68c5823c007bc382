"""`stepcache presets`: everything that was published and is built in, with its source."""

from __future__ import annotations

import argparse
import difflib
import json
from dataclasses import asdict, dataclass

from stepcache.policies import LeMiCa, MagCache, TeaCache
from stepcache.published import lemica, magcache, teacache


@dataclass(frozen=True)
class Preset:
    """Published figures for one model and one method.

    `budgets` are computed steps of `steps`: LeMiCa's published ones, what MagCache's recommended setting gives, none
    where the count depends on the run.
    """

    model: str
    method: str
    steps: int
    budgets: tuple[int, ...]
    source: str


def all_presets() -> tuple[Preset, ...]:
    """All of them, by model."""
    found = [
        Preset(model, "lemica", steps, tuple(sorted(table, reverse=True)), lemica.SOURCE)
        for model, (steps, table) in lemica.SCHEDULES.items()
    ]
    for model, branches in magcache.RATIOS.items():
        # none where no setting was recommended, or where it depends on when the second transformer takes over
        known = model in magcache.RECOMMENDED and not model.endswith("A14B")
        budgets = (MagCache(model=model).plan().budget,) if known else ()
        found.append(Preset(model, "magcache", len(branches[0]), budgets, magcache.SOURCES[model]))
    found += [Preset(model, "teacache", 50, (), teacache.SOURCE) for model in teacache.COEFFICIENTS]
    return tuple(sorted(found, key=lambda p: (p.model, p.method)))


def preset(name: str, budget: int | None = None) -> LeMiCa | MagCache | TeaCache:
    """The policy of a preset, by "method:model" ("lemica:qwen-image"); `budget` chooses among LeMiCa's schedules.

    Raises:
        ValueError: no such preset (the nearest names are given), or a budget that is not published.
    """
    names = {f"{p.method}:{p.model}": p for p in all_presets()}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names)[:3]
        raise ValueError(f"there is no preset {name!r}; the nearest are {', '.join(near)} (see: stepcache presets).")
    chosen = names[name]
    if budget is not None and chosen.method != "lemica":
        raise ValueError(f"{name} takes no budget; its steps follow from its thresholds.")
    if chosen.method == "magcache":
        return MagCache(model=chosen.model)
    if chosen.method == "teacache":
        return TeaCache(model=chosen.model)
    policy = LeMiCa(chosen.budgets[0] if budget is None else budget, chosen.model)
    policy.plan()
    return policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache presets`."""
    parser.description = __doc__
    parser.set_defaults(run=run)
    parser.add_argument("filter", nargs="?", default="", help="only models and methods that contain this, e.g. wan2.1")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    chosen = [p for p in all_presets() if args.filter.lower() in f"{p.method}:{p.model}".lower()]
    if not chosen:
        models = sorted({p.model for p in all_presets()})
        near = difflib.get_close_matches(args.filter, models, n=3, cutoff=0.3) or models[:3]
        raise ValueError(f"no preset contains {args.filter!r}; the nearest models are {', '.join(near)}.")
    if args.json:
        print(json.dumps([asdict(p) for p in chosen], indent=1))
        return 0
    width = max(len(p.model) for p in chosen)
    print(f"{'model':{width}}  {'method':8}  {'steps':>5}  {'computed':14}  source")
    for p in chosen:
        budgets = " ".join(map(str, p.budgets)) or "by the run"
        print(f"{p.model:{width}}  {p.method:8}  {p.steps:>5}  {budgets:14}  {p.source}")
    return 0
