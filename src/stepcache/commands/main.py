"""The `stepcache` command: generate, calibrate, plan, show, bench, report, demo, presets, compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stepcache import __version__
from stepcache.commands import bench, calibrate, compare, demo, generate, plan, presets, report, show
from stepcache.commands.flags import Parser

COMMANDS = {
    "generate": (generate, "make a clip, uncached or with any policy"),
    "calibrate": (calibrate, "uncached runs, from which plans for any budget are made"),
    "plan": (plan, "the best plan for a budget, from a calibration"),
    "show": (show, "look at a plan or a calibration, as text or picture"),
    "bench": (bench, "every method on every prompt, side by side"),
    "report": (report, "a benchmark's results as one page"),
    "demo": (demo, "the embedded model: uncached and four methods side by side"),
    "presets": (presets, "list the published figures that are built in"),
    "compare": (compare, "PSNR, SSIM and LPIPS of two clips or two folders of clips"),
}

IN_METHODS = {"resample=True": "resample=1", "model=...": "table=MODEL", "interp=...": "interp=product or nearest"}
"""What messages of the library call a setting -> how methods are given it here (`bench.methods`)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    given = build_parser().parse_args(argv)
    try:
        return int(given.run(given.flags.completed(given)) or 0)
    except (ValueError, OSError, ImportError) as error:
        sentence = " ".join(str(error).split())
        for setting, option in IN_METHODS.items():
            sentence = sentence.replace(setting, option)
        print(f"stepcache {given.command}: error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stepcache {given.command}: interrupted; nothing half-written was left.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their flags."""
    parser = Parser(prog="stepcache", description="Diffusion transformers 2-4x faster without training.")
    parser.add_argument("--version", action="version", version=f"stepcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (command, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
