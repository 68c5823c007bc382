"""Labels of methods in tables and figures: as written, and where their schedule comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stepcache.bench.methods import KINDS

FEWER = "fewer steps"
"""What a run of the sampler alone, in fewer steps, is called: a plan, or a cache, would be another thing."""


@dataclass(frozen=True)
class Label:
    """A method for the eye.

    Args:
        row: in a table: "uniform:25, even".
        curve: in a figure, without its budget or threshold, shared by all points of a curve: "uniform, even".
    """

    row: str
    curve: str


def label(method: str, schedule: str | None = None) -> Label:
    """The label of a method.

    Args:
        method: as written, such as "lemica:25" or "plan:plans/a.json"; of files only the name is shown.
        schedule: where its schedule comes from (`Contender.schedule`); None: what its name alone tells.
    """
    shown = re.sub(r"[^:=,]*/", "", method)
    head, *options = shown.split(",")
    name = head.partition(":")[0]
    if schedule is None:
        schedule = FEWER if name == "steps" else KINDS[name].schedule if name in KINDS else ""
    said = [schedule] if schedule else []
    curve = said if name == "plan" and said else [name, *said, *options]
    return Label(", ".join([shown, *said]), ", ".join(curve))


def labels(methods: Iterable[str], schedules: Mapping[str, str]) -> dict[str, Label]:
    """Method -> label, with the schedules that a benchmark's description holds."""
    return {method: label(method, schedules.get(method)) for method in methods}
