"""A benchmark in parts without a scheduler of our own: `--shard i/n` on every machine, `--merge` afterwards.

stepcache bench ... --shard 0/4 --out part0        on four machines, or a Slurm array: --shard auto
stepcache bench --merge part0 part1 part2 part3 --out results
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from stepcache.bench.results import Folder, Item
from stepcache.fleet.places import copy, files_below, is_there

T = TypeVar("T")


VARIABLES = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("RANK", "WORLD_SIZE"))
"""Where a launcher says which part this is, and of how many."""


KEY = ("model", "request", "prompts", "seeds", "fps")
"""What the parts of one benchmark have in common."""


ALIKE = ("searched", "dtype", "versions", "machine", "measures_lpips")
"""What they had better have in common."""


def shard_from(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(i, n) from "i/n", or from the launcher's variables for "auto"; "auto/n": i is the launcher's, n is fixed.

    Slurm counts array tasks from wherever the array begins; for "auto" its smallest index is taken off. With "auto/32"
    the index is the array's own, so that single parts of an array of 0 to 31 can be run again.

    Raises:
        ValueError: not of that form, or no variable is set.
    """
    name, _, fixed = text.partition("/")
    if name == "auto":
        if fixed and not fixed.isdigit():
            raise ValueError(f"--shard is {text!r}; expected i/n, auto, or auto/n.")
        for number, total in VARIABLES:
            if fixed and number in environment:
                return _checked(int(environment[number]), int(fixed), text)
            if number in environment and total in environment:
                first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0)) if number.startswith("SLURM") else 0
                return _checked(int(environment[number]) - first, int(environment[total]), text)
        names = " or ".join(" and ".join(pair) for pair in VARIABLES)
        raise ValueError(f"--shard auto needs {names} in the environment; give --shard i/n instead.")
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard is {text!r}; expected i/n, such as 0/4, auto, or auto/n.") from None
    return _checked(index, count, text)


def _checked(index: int, count: int, text: str) -> tuple[int, int]:
    if not 0 <= index < count:
        raise ValueError(f"--shard {text} is part {index} of {count}; expected 0 to {count - 1}.")
    return index, count


def part(everything: Sequence[T], shard: tuple[int, int]) -> list[T]:
    """Every n-th, from the i-th on: neighbours, which take about as long, come to different parts."""
    index, count = shard
    return list(everything[index::count])


def merge_folders(sources: Sequence[Path], out: Path) -> int:
    """Copy the items and clips of several folders of one benchmark into one; returns how many items have no result.

    An item that failed does not take the place of one that did not. Folders whose machines, versions or searched
    thresholds differ are merged with a warning.

    Raises:
        ValueError: they are of different benchmarks, or `out` holds another one (what differs is named).
        FileNotFoundError: one of them is no benchmark's folder.
    """
    folders, target = [Folder(path) for path in sources], Folder(out)
    descriptions = [folder.read() for folder in folders]
    first = descriptions[0]
    present = [(target, target.read())] if is_there(target.description) else []
    for folder, description in (*zip(folders, descriptions, strict=True), *present):
        if differing := [name for name in KEY if description[name] != first[name]]:
            raise ValueError(
                f"{folder.root} and {folders[0].root} are different benchmarks: {', '.join(differing)} differ."
            )
        if unlike := [name for name in ALIKE if description.get(name) != first.get(name)]:
            warnings.warn(
                f"{folder.root} and {folders[0].root} were made with other {', '.join(unlike)}.", stacklevel=2
            )
    out.mkdir(parents=True, exist_ok=True)
    searched, schedules = (
        {name: value for d in reversed(descriptions) for name, value in d.get(key, {}).items()}
        for key in ("searched", "schedules")
    )
    target.write({**first, "searched": searched, "schedules": schedules, "shard": [0, 1]})
    for folder in folders:
        _copy(folder, target)
    items, pairs = target.items(), len(first["prompts"]) * len(first["seeds"])
    return len({item.method for item in items}) * pairs - sum(not item.error for item in items)


def _copy(folder: Folder, target: Folder) -> None:
    for path in files_below(folder.root / "items", "*/*.json"):
        destination = target.root / folder.below(path)
        if str(destination) == str(path):
            continue
        item = Item.load(path)
        if item.error and destination.exists() and not Item.load(destination).error:
            continue
        if item.clip:
            with suppress(FileNotFoundError):  # a clip may be gone: the report says so
                copy(folder.root / item.clip, target.root / item.clip)
        copy(path, destination)
