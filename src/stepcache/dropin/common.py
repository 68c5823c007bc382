"""What all drop-ins share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from stepcache.files import check_writable

RENAMED = {
    "--lemica_predict": "LeMiCa reuses, as published; what predicted is a script of its own, hindsight_generate.py",
    "--lemica_calibration": "it is --calibration of hindsight_generate.py now",
}
"""Flags of earlier versions, and what became of them."""


def add_boundary(group: argparse._ArgumentGroup, default: str) -> None:
    """Where reuse is applied. The flag's own default is `None`, so that it shows whether it was given."""
    what = f"reuse the residual of the block stack, or the transformer's output (default {default}, as published)"
    group.add_argument("--boundary", choices=("blocks", "output"), help=what)


def without_effect(own: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """ValueError if one of these flags was given."""
    for name in names:
        value = getattr(own, name, None)
        if value is not None and value is not False:
            raise ValueError(f"--{name} has no effect {why}.")


def parsed(flags: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and all others for upstream; flags of earlier versions end here with a sentence."""
    for word in sys.argv[1:]:
        if (name := word.split("=")[0]) in RENAMED:
            fail(f"{name} is gone: {RENAMED[name]}.")
    return flags.parse_known_args()


def checked_file(name: str) -> str:
    """The name of a file to write, found writable before the work (OSError).

    A name such as 10:53.mp4 would be taken for the address of a protocol by video writers: a leading ./ prevents that.
    """
    check_writable(Path(name))
    return f"./{name}" if ":" in name and not os.path.dirname(name) else name


def fail(message: str, words: dict[str, str] | None = None) -> NoReturn:
    """One clear sentence, exit code 2; `words`: what it calls a setting -> the flag of this script."""
    for setting, flag in (words or {}).items():
        message = message.replace(setting, flag)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def leads() -> bool:
    """Whether this process is the first rank, the one that speaks."""
    return int(os.getenv("RANK", "0")) == 0


def say(message: str) -> None:
    """Tell the user, once, on the first rank."""
    if leads():
        print(f"note: {message}", file=sys.stderr)
