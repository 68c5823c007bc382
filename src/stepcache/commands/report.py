"""`stepcache report`: a benchmark's results as one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepcache.bench.report.charts import write
from stepcache.bench.report.contents import read
from stepcache.bench.report.page import WIDTH, load_clips, page
from stepcache.bench.results import Folder
from stepcache.commands.flags import Flags
from stepcache.files import check_writable, write_atomically
from stepcache.fleet.places import is_remote, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache report`."""
    parser.description = __doc__
    flags = Flags(parser)
    flags.add("folder", metavar="DIR", help="the --out of stepcache bench: a folder, or an address")
    flags.add("--out", metavar="FILE", help="the page (default: DIR/report.html)")
    flags.add("--width", type=int, default=WIDTH, help=f"largest width of its clips, pixels ({WIDTH})")
    flags.add("--clips", type=int, metavar="N", help="show clips of the first N prompts only (default: all)")
    flags.add("--no-figures", action="store_true", default=False, help="write no figures/*.svg and *.png")


def run(args: argparse.Namespace) -> int:
    """Read the folder, write page and figures."""
    if args.width < 16:
        raise ValueError(f"--width is {args.width}; expected 16 pixels or more.")
    if args.clips is not None and args.clips < 1:
        raise ValueError(f"--clips is {args.clips}; expected 1 prompt or more.")
    folder = Folder(place(args.folder))
    if is_remote(folder.root) and not args.out:
        raise ValueError(f"{args.folder} is read over the network; give --out FILE for the page.")
    out = Path(args.out) if args.out else folder.root / "report.html"
    drawings = out.parent / "figures"
    results = read(folder)
    check_writable(out)
    if not args.no_figures:
        check_writable(drawings, folder=True)
    clips, missing = load_clips(folder, results, args.width, args.clips)
    text = page(results, clips)
    write_atomically(out, text)
    print(f"wrote {out} ({len(text.encode()) / 2**20:.1f} MiB, {len(clips)} clips)")
    if missing:
        print(f"{len(missing)} clip(s) are missing or unreadable and omitted, for example {missing[0]}")
    if not args.no_figures:
        for path in write(results, drawings):
            print(f"wrote {path}")
    return 0
