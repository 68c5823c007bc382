"""docs/results.md and its figure, from bench/zoo.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, float]]
"""Computed steps and PSNR, one a prompt; empty where a method has no such run."""
OURS, ON_OURS = "hindsight", "our steps: "
FEW = ("20 steps", "8 steps")
FEW_STEPS = """| steps | recommended | exceptions and limits |
|---|---|---|
| 28 | hindsight, with a third of them or more | at 10 on tiny-wan LeMiCa's closed form is 0.7 dB closer |
| 20 | hindsight with half of them or more | with 7 no method is reliable; at 14 on tiny-wan reuse is 0.8 dB closer |
| 8 | hindsight with 6, or all | on tiny-wan nothing helps; with 5 or 4 no method is reliable: use fewer steps |

PSNR to the uncached run of the same number of steps, mean / worst prompt, dB:
"""
SHOWN = (
    "uniform reuse",
    "LeMiCa, closed form",
    "MagCache",
    "fewer steps",
    "extrapolation, order 1",
    "Spectrum, w = 0.5",
)


def values(rows: Rows) -> np.ndarray:
    """PSNR of the prompts, worst first."""
    return np.sort([row["psnr"] for row in rows])


def cell(rows: Rows, budget: int) -> str:
    """Mean / worst quarter / worst, and the count where it is another."""
    if not rows:
        return "-"
    found = values(rows)
    count = np.mean([row["computed"] for row in rows])
    other = f" (n = {count:.1f})" if abs(count - budget) > 0.05 else ""
    return f"{found.mean():.1f} / {found[: max(1, len(found) // 4)].mean():.1f} / {found[0]:.1f}{other}"


def by_model(results: dict[str, Any]) -> dict[str, dict[tuple[str, int], dict[str, Rows]]]:
    """Model -> (setting, budget) -> method -> rows."""
    found: dict[str, dict[tuple[str, int], dict[str, Rows]]] = {}
    for key, methods in results["cells"].items():
        model, setting, budget = key.split("; ")
        found.setdefault(model, {})[setting, int(budget)] = methods
    return found


def best(methods: dict[str, Rows], own_steps: bool, score: Callable[[np.ndarray], float]) -> tuple[float, str]:
    """Score and name of the best other method; those on our steps are compared with the planned method only."""
    others = [n for n, rows in methods.items() if rows and not n.startswith(OURS)]
    others = [n for n in others if own_steps or not n.startswith(ON_OURS)]
    return max((score(values(methods[name])), name) for name in others)


def mean(found: np.ndarray) -> float:
    """Of the prompts."""
    return float(found.mean())


def worst(found: np.ndarray) -> float:
    """Of the prompts."""
    return float(found[0])


def differences(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per cell: ours against the best other method, and the worst prompts."""
    for model, cells in by_model(results).items():
        for (setting, budget), methods in cells.items():
            if not methods.get(OURS) or setting in FEW:
                continue
            ours, (rival, name) = values(methods[OURS]), best(methods, False, mean)
            row = {"model": model, "setting": setting, "budget": budget, "rival": name}
            row["mean"] = ours.mean() - rival
            row["worst"] = ours[0] - values(methods["uniform reuse"])[0]
            if planned := methods.get("hindsight, planned"):
                found = values(planned)
                row["planned"] = found.mean() - best(methods, True, mean)[0]
                row["planned worst"] = found[0] - best(methods, True, worst)[0]
                row["gain"] = found.mean() - ours.mean()
                if four := methods.get("hindsight, planned on 4 prompts"):
                    row["four"] = values(four).mean() - found.mean()
            yield row


def verdict(results: dict[str, Any]) -> str:
    """The summary table."""
    rows = list(differences(results))
    planned = [row for row in rows if "planned" in row]

    def share(rows: list[dict[str, Any]], name: str, least: float) -> str:
        return f"{sum(row[name] >= least for row in rows)} of {len(rows)} cells"

    def average(rows: list[dict[str, Any]], name: str) -> str:
        found = [row[name] for row in rows if name in row]
        return f"{np.mean(found):+.1f} dB" if found else "-"

    lines = [
        ("hindsight above the best other method, mean of the prompts", share(rows, "mean", 0)),
        ("by how much, averaged over cells", average(rows, "mean")),
        ("in its worst cell", f"{min(row['mean'] for row in rows):+.1f} dB"),
        ("its worst prompt at most 0.5 dB below uniform reuse's", share(rows, "worst", -0.5)),
        ("planned above the best other method, those on our own steps included", share(planned, "planned", 0)),
        ("by how much", average(planned, "planned")),
        ("its worst prompt at most 1 dB below the best other method's", share(planned, "planned worst", -1.0)),
        ("gain of planning over hindsight without a calibration", average(planned, "gain")),
        ("planned on 4 prompts, against 8", average(planned, "four")),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in lines)


def table(cells: dict[tuple[str, int], dict[str, Rows]], setting: str) -> str:
    """One setting of one model."""
    budgets = [budget for name, budget in cells if name == setting]
    names = list(dict.fromkeys(name for b in budgets for name in cells[setting, b]))
    lines = ["| " + setting + " | " + " | ".join(f"B = {b}" for b in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for name in names:
        if not any(cells[setting, b].get(name) for b in budgets):
            continue
        shown = [cell(cells[setting, b].get(name, []), b) for b in budgets]
        label = f"**{name}**" if name.startswith(OURS) else name
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def few_steps(results: dict[str, Any]) -> str:
    """Runs of 28, 20 and 8 steps, a row per cell: mean and worst prompt."""
    names = ("fewer steps", "uniform reuse", "extrapolation, order 1", "ZEUS", OURS)
    lines = ["| model | steps | B | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for model, cells in by_model(results).items():
        for setting in ("28 steps", *FEW):
            for budget in (b for name, b in cells if name == setting):
                found = [cells[setting, budget].get(name) for name in names]
                shown = [f"{mean(values(rows)):.1f} / {worst(values(rows)):.1f}" if rows else "-" for rows in found]
                lines.append(f"| {model} | {setting.removesuffix(' steps')} | {budget} | {' | '.join(shown)} |")
    return "\n".join(lines)


def judged(quality: dict[str, Any]) -> str:
    """Colour and direction of the embedded model's clips, a row per method."""
    whole = quality["rows"]["uncached"]["50"]
    budgets = sorted({b for name, row in quality["rows"].items() if name != "uncached" for b in row}, key=int)[::-1]
    lines = ["| 50 steps | " + " | ".join(f"B = {b}" for b in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    share = lambda found: f"{100 * found['colour']:.0f} / {100 * found['direction']:.0f}" if found else "-"  # noqa: E731
    for name, row in quality["rows"].items():
        if name != "uncached":
            lines.append(f"| {name} | " + " | ".join(share(row.get(b)) for b in budgets) + " |")
    head = (
        f"Percentage of {quality['prompts']} clips of held-out scenes of tiny-wan (`python bench/quality.py`)\n"
        "that show the requested colour / move in the requested direction. Uncached: "
        f"{share(whole)}. One clip is {100 / quality['prompts']:.0f} %."
    )
    return head + "\n\n" + "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Mean PSNR over computed steps of 50, one panel a model."""
    from matplotlib.figure import Figure

    models = by_model(results)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, (model, cells) in zip(panels, models.items(), strict=True):
        budgets = sorted(b for name, b in cells if name == "50 steps")
        for number, name in enumerate((*SHOWN, "hindsight", "hindsight, planned")):
            points = [(b, mean(values(rows))) for b in budgets if (rows := cells["50 steps", b].get(name))]
            ours = name.startswith(OURS)
            style = {"linewidth": 2.2 if ours else 1.1, "linestyle": "-" if ours else "--"}
            if points:
                panel.plot(*zip(*points, strict=True), marker="os^Dv<>P"[number], markersize=4, label=name, **style)
        panel.set(title=model, xlabel="computed steps of 50")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="PSNR to the uncached run, dB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def not_run(results: dict[str, Any]) -> str:
    """A sentence on methods that some or all models lack."""
    models = by_model(results)
    rows = {model: {name for methods in cells.values() for name in methods} for model, cells in models.items()}
    known = set().union(*rows.values())
    lacking = {name: [model for model in rows if name not in rows[model]] for name in sorted(known)}
    found = [f"{name} on {', '.join(where)}" for name, where in lacking.items() if where]
    return f"Not run: {'; '.join(found)}. " if found else ""


def page(results: dict[str, Any], quality: dict[str, Any] | None = None) -> str:
    """docs/results.md; `quality`: what bench/quality.py measured."""
    about = results["about"]
    parts = [
        f"""# Results

Every method at equal numbers of computed steps, on four small trained models of different kinds. These models have no
other use. They show which ideas hold on several models, not how Wan2.1 will look.

| model | of | kind | guidance | sampler |
|---|---|---|---|---|
| [tiny-wan](../assets/tiny-wan/README.md) | video | Wan | 5, two calls per step | UniPC |
| [emoji](../assets/zoo/emoji/README.md) | images | Qwen-Image | 4, rescaled to the norm | Euler |
| [landscapes](../assets/zoo/landscapes/README.md) | images | FLUX | 3.5, distilled: one call per step | Euler |
| [patterns](../assets/zoo/patterns/README.md) | video | CogVideoX, v-prediction | 6, one batched call | DDIM |

To reproduce: `python bench/zoo.py`, then `python bench/zoo.py --pages`. {about["prompts"]} evaluation prompts per
model, on which nothing was chosen; PSNR in dB of decoded pictures to the model's own uncached run of the same seed:
mean / worst quarter / worst prompt. Calibration and tuning use eight other prompts. Hindsight's rule and its
constants (`MEMORY`, `CLEAN`, `NOISY`) were chosen on twelve development prompts of these same models
([research.md](research.md)), so the table is no evidence about models beyond these four. "Planned": the best of 16
schedules on the eight prompts. Other methods run on even steps, unless their own schedule is named; "our steps" are
hindsight's own schedule. "B": the budget, the number of computed steps; "n": the mean number computed, where it
differs. cache-dit runs its first block at skipped steps too. SeaCache (diffusers 0.42) skips
nothing on three of these transformers and is left out. `-`: the method has no such run.
{not_run(results)}TeaCache has no published polynomial for any of these models. Made on
{about["date"]}, {about["machine"]}, torch {about["torch"]}, stepcache {about["stepcache"]}.

![Mean PSNR over computed steps](figures/zoo.svg)

{verdict(results)}
"""
    ]
    if quality:
        parts.append(f"## Quality apart from closeness\n\n{judged(quality)}\n")
    parts.append(f"## Few steps\n\n{FEW_STEPS}\n{few_steps(results)}\n")
    for model, cells in by_model(results).items():
        settings = [name for name in dict.fromkeys(setting for setting, _ in cells) if name not in FEW]
        parts.append(f"## {model}\n\n" + "\n\n".join(table(cells, setting) for setting in settings) + "\n")
    return "\n".join(parts)
