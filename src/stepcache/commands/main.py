"""The `stepcache` command: generate, calibrate, plan, show, bench, report, demo, presets, compare."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stepcache import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:  # has its own parser, shared with tools/video_metrics.py
        from stepcache.commands import compare

        return compare.main(arguments[1:], prog="stepcache compare")
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except (ValueError, OSError, ImportError) as error:
        sentence = " ".join(str(error).split())
        print(f"stepcache {args.command}: error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stepcache {args.command}: interrupted; nothing half-written was left.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their flags."""
    from stepcache.commands import bench as benchmark
    from stepcache.commands import calibrate, demo, generate, presets, report, show
    from stepcache.commands import plan as planning

    parser = argparse.ArgumentParser(
        prog="stepcache", description="Diffusion transformers 2-4x faster without training."
    )
    parser.add_argument("--version", action="version", version=f"stepcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    generate.add_arguments(commands.add_parser("generate", help="make a clip, uncached or with any policy"))
    calibrate.add_arguments(
        commands.add_parser("calibrate", help="uncached runs, from which plans for any budget are made")
    )
    planning.add_arguments(commands.add_parser("plan", help="the best plan for a budget, from a calibration"))
    show.add_arguments(commands.add_parser("show", help="look at a plan or a calibration, as text or picture"))
    benchmark.add_arguments(commands.add_parser("bench", help="every method on every prompt, side by side"))
    report.add_arguments(commands.add_parser("report", help="a benchmark's results as one page"))
    demo.add_arguments(commands.add_parser("demo", help="the embedded model: uncached and three methods side by side"))
    presets.add_arguments(commands.add_parser("presets", help="list the published figures that are built in"))
    commands.add_parser("compare", help="PSNR, SSIM and LPIPS of two clips or two folders of clips", add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
