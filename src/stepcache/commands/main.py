"""The `stepcache` command: generate, calibrate, plan, show, bench, report, demo, app, presets, compare, selftest."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from stepcache import __version__

COMMANDS = {
    "generate": "make a clip, uncached or with any policy",
    "calibrate": "record uncached runs, from which plans for any budget are made",
    "plan": "make a plan for a budget, from a calibration",
    "show": "show a plan or a calibration, as text or picture",
    "bench": "run every method on every prompt, side by side",
    "report": "show a benchmark's results as one page",
    "demo": "the embedded model: uncached and five methods side by side",
    "app": "a page in the browser: one clip, uncached and with a method, in lock-step",
    "evidence": "measure all methods on your model and machine, as a report to publish",
    "presets": "list the published schedules and tables that are built in",
    "compare": "PSNR, SSIM and LPIPS of two clips or two folders of clips",
    "selftest": "check that everything works on this machine: tiny models, under two minutes",
}
"""Modules of this package. Only the requested one is imported, so that help and version need not wait for torch."""

IN_METHODS = {
    "resample=True": "--resample of generate, resample=1 of a method",
    "model=...": "table=MODEL",
    "interp=...": "interp=product or nearest",
    "Run with guidance": "Run with --guidance",
}
"""What messages of the library call a setting -> how commands and methods are given it here (`bench.methods`)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if word in COMMANDS), None)
    try:
        given = build_parser(chosen).parse_args(argv)  # imports the command, which takes seconds
        return int(given.run(given.flags.completed(given)) or 0)
    except (ValueError, OSError, ImportError) as error:
        print(f"stepcache {chosen}: error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stepcache {chosen or ''}".rstrip() + ": interrupted; no partial files were left.", file=sys.stderr)
        return 130


def sentence(error: Exception) -> str:
    """An error's message on one line, with settings as they are written here."""
    found = " ".join(str(error).split())
    for setting, option in IN_METHODS.items():
        found = found.replace(setting, option)
    return found


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, that takes flags in full only, with hyphens or underscores."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also `--num_frames` for `--num-frames`."""
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            name, equals, value = str(word).partition("=")
            if name.startswith("--") and name.replace("_", "-") in self._option_string_actions:
                words[i] = name.replace("_", "-") + equals + value
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """All subcommands, and the flags of the one that is chosen."""
    parser = Parser(prog="stepcache", description="Diffusion transformers, faster without training.")
    parser.add_argument("--version", action="version", version=f"stepcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(
            name, help=text, usage=f"stepcache {name} [flags]", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            command = importlib.import_module(f"stepcache.commands.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
