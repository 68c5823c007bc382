"""A benchmark in parts without a scheduler of our own: `--shard i/n` on every machine, `--merge` afterwards.

stepcache bench ... --shard 0/4 --out part0        on four machines, or a Slurm array: --shard auto
stepcache bench --merge part0 part1 part2 part3 --out results
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from stepcache.places import below, copy, files_below
from stepcache.results import Folder

T = TypeVar("T")
VARIABLES = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("RANK", "WORLD_SIZE"))
"""Where a launcher says which part this is, and of how many."""
KEY = ("model", "request", "prompts", "seeds", "fps")
"""What the parts of one benchmark have in common."""


def shard_from(text: str, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(i, n) from "i/n", or from the launcher's variables for "auto".

    Slurm counts array tasks from wherever the array begins; its smallest index is taken off.

    Raises:
        ValueError: not of that form, or no variable is set.
    """
    if text == "auto":
        for number, total in VARIABLES:
            if number in environment and total in environment:
                first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0)) if number.startswith("SLURM") else 0
                return _checked(int(environment[number]) - first, int(environment[total]), text)
        names = " or ".join(" and ".join(pair) for pair in VARIABLES)
        raise ValueError(f"--shard auto needs {names} in the environment; give --shard i/n instead.")
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--shard is {text!r}; expected i/n, such as 0/4, or auto.") from None
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
    """Copy the items and clips of several folders of one benchmark into one; returns how many items are missing.

    Raises:
        ValueError: they are of different benchmarks (what differs is named).
        FileNotFoundError: one of them is no benchmark's folder.
    """
    folders, target = [Folder(path) for path in sources], Folder(out)
    descriptions = [folder.read() for folder in folders]
    for folder, description in zip(folders, descriptions, strict=True):
        if differing := [name for name in KEY if description[name] != descriptions[0][name]]:
            raise ValueError(
                f"{folder.root} and {folders[0].root} are different benchmarks: {', '.join(differing)} differ."
            )
    out.mkdir(parents=True, exist_ok=True)
    searched = {name: value for d in reversed(descriptions) for name, value in d["searched"].items()}
    target.write({**descriptions[0], "searched": searched})
    for folder in folders:
        for path in (*files_below(folder.root / "items", "*/*"), *files_below(folder.root / "clips", "*/*")):
            destination = out / below(path, folder.root)
            if str(destination) != str(path):
                copy(path, destination)
    items = target.items()
    pairs = len(descriptions[0]["prompts"]) * len(descriptions[0]["seeds"])
    return len({i.method for i in items}) * pairs - len(items)
