"""Everything that was published and is built in, as data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from stepcache.methods import LeMiCa, MagCache, TeaCache
from stepcache.methods import lemica_schedules as lemica
from stepcache.methods import magcache_ratios as magcache
from stepcache.methods import teacache_coefficients as teacache


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
