"""`stepcache compare`: how close are generated clips to the originals? PSNR, SSIM and LPIPS.

    stepcache compare full.mkv lemica.mkv
    stepcache compare runs/full runs/lemica --protocol teacache --json metrics.json

A clip is a video file, an .npy of frames [T, H, W, 3], or a folder of PNG frames. Give two clips, or two folders of
clips with the same names. Use lossless clips (.mkv with FFV1, .npy, PNG): in an .mp4 the codec's error counts too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stepcache.commands.flags import Flags
from stepcache.files import check_writable, write_atomically
from stepcache.measure.compare import compare, find_pairs, notes, table, to_json
from stepcache.measure.device import find_device
from stepcache.measure.lpips import SIZE, find_lpips
from stepcache.measure.metrics import PROTOCOLS

LPIPS, FETCHED = "LPIPS (no --no-lpips)", "LPIPS without --lpips-backbone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache compare`."""
    parser.description = __doc__
    clips = "a clip, or a folder of clips"
    flags = Flags(parser, _modes)
    flags.add("clips", nargs="*", type=Path, metavar="A B", help=f"{clips}: the reference, and the one to evaluate")
    flags.add("--original-video", type=Path, metavar="A", help="the same by name: the reference")
    flags.add("--generated-video", type=Path, metavar="B", help="the clip to evaluate; in a folder, the same names")
    flags.add("--protocol", choices=list(PROTOCOLS), default="reference", help="how frames are averaged (reference)")
    flags.add("--json", type=Path, metavar="FILE", help="write all values, per frame, as JSON")
    flags.add("--device", metavar="DEV", help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)")
    flags.add(
        "--lpips-backbone",
        type=Path,
        metavar="FILE",
        needs=LPIPS,
        help="AlexNet's weights: torchvision's .pth, or .safetensors (default: torch.hub's checkpoint folder)",
    )
    flags.add("--no-lpips", action="store_true", default=False, help="omit LPIPS")
    flags.add(
        "--offline",
        action="store_true",
        default=False,
        needs=FETCHED,
        help=f"download nothing: if AlexNet's weights ({SIZE}) are missing, omit LPIPS",
    )


def _modes(args: argparse.Namespace) -> tuple[str, ...]:
    if args.no_lpips:
        return ()
    return (LPIPS,) if args.lpips_backbone else (LPIPS, FETCHED)


def two_of(args: argparse.Namespace) -> tuple[Path, Path]:
    """What is compared; ValueError if it is not two clips or folders, given one way."""
    named, clips = [args.original_video, args.generated_video], list(args.clips or [])
    if clips and any(named):
        raise ValueError("the clips are given twice; write `stepcache compare A B`.")
    given = clips or [clip for clip in named if clip is not None]
    if len(given) != 2:
        raise ValueError(f"{len(given)} given; compare takes two clips or folders: `stepcache compare A B`.")
    return given[0], given[1]


def run(args: argparse.Namespace) -> int:
    """Find the pairs, compare, print the table."""
    if args.json is not None:
        check_writable(args.json)
    device = find_device(args.device)
    pairs = find_pairs(*two_of(args))
    lpips, source = (None, "--no-lpips") if args.no_lpips else find_lpips(args.lpips_backbone, fetch=not args.offline)
    results = compare(pairs, args.protocol, lpips, device)
    print("\n".join(table(pairs, results) + notes(results, device, lpips, source)))
    if args.json is not None:
        found = to_json(pairs, results, str(device), lpips, source)
        write_atomically(args.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 0
