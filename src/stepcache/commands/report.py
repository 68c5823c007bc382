"""`stepcache report`: a benchmark's results as one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepcache.bench.report import WIDTH, figures, load_clips, page, read
from stepcache.bench.results import Folder
from stepcache.files import check_writable, write_atomically
from stepcache.fleet.places import is_remote, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache report`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="DIR", help="the --out of stepcache bench: a folder, or an address")
    parser.add_argument("--out", metavar="FILE", help="the page (default: DIR/report.html)")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"largest width of the clips in it, pixels ({WIDTH})")
    parser.add_argument("--clips", type=int, metavar="N", help="take clips of the first N prompts only (default: all)")
    parser.add_argument("--no-figures", action="store_true", help="no figures/*.svg and *.png beside the page")


def run(args: argparse.Namespace) -> int:
    """Read the folder, write page and figures."""
    if args.width < 16:
        raise ValueError(f"--width is {args.width}; expected 16 pixels or more.")
    folder = Folder(place(args.folder))
    if is_remote(folder.root) and not args.out:
        raise ValueError(f"{args.folder} is read over the network; give --out FILE for the page.")
    out = Path(args.out) if args.out else folder.root / "report.html"
    results = read(folder)
    check_writable(out)
    clips, missing = load_clips(folder, results, args.width, args.clips)
    text = page(results, clips)
    write_atomically(out, text)
    print(f"wrote {out} ({len(text.encode()) / 2**20:.1f} MiB, {len(clips)} clips)")
    if missing:
        print(f"{len(missing)} clip(s) are gone or broken and left out, for example {missing[0]}")
    if not args.no_figures:
        for path in figures.write(results.rows, out.parent / "figures"):
            print(f"wrote {path}")
    return 0
