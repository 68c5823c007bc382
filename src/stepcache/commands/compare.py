"""`stepcache compare`: how close are generated clips to the originals? PSNR, SSIM and LPIPS.

    stepcache compare --original_video full.mkv --generated_video lemica.mkv
    stepcache compare --original_video runs/full --generated_video runs/lemica --protocol teacache --json metrics.json

A clip is a video file, an .npy of frames [T, H, W, 3], or a folder of PNG frames; two clips, or two folders of clips of
the same names. Measure on lossless clips (.mkv with FFV1, .npy, PNG): the codec's error in an .mp4 is measured too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stepcache.commands.flags import Flags
from stepcache.files import check_writable, write_atomically
from stepcache.measure.compare import compare, find_pairs, notes, table, to_json
from stepcache.measure.device import find_device
from stepcache.measure.lpips import find_lpips
from stepcache.measure.metrics import PROTOCOLS

LPIPS = "LPIPS (no --no_lpips)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache compare`."""
    parser.description = __doc__
    clips = "a clip, or a folder of clips"
    flags = Flags(parser, lambda args: () if args.no_lpips else (LPIPS,))
    flags.add("--original_video", required=True, type=Path, metavar="A", help=f"{clips}: the reference")
    flags.add(
        "--generated_video", required=True, type=Path, metavar="B", help=f"{clips} with the same names: what is judged"
    )
    flags.add("--protocol", choices=list(PROTOCOLS), default="reference", help="whose rules (reference)")
    flags.add("--json", type=Path, metavar="FILE", help="write every number, frame by frame, as JSON")
    flags.add("--device", metavar="DEV", help="cpu, cuda, cuda:1, ... (default: CUDA if there is one)")
    flags.add(
        "--lpips_backbone",
        type=Path,
        metavar="FILE",
        needs=LPIPS,
        help="AlexNet's weights: torchvision's .pth, or .safetensors (default: torch.hub's checkpoint folder)",
    )
    flags.add("--no_lpips", action="store_true", default=False, help="leave LPIPS out")


def run(args: argparse.Namespace) -> int:
    """Find the pairs, compare, print the table."""
    if args.json is not None:
        check_writable(args.json)
    device = find_device(args.device)
    pairs = find_pairs(args.original_video, args.generated_video)
    lpips, source = (None, "--no_lpips") if args.no_lpips else find_lpips(args.lpips_backbone)
    results = compare(pairs, args.protocol, lpips, device)
    print("\n".join(table(pairs, results) + notes(results, device, lpips, source)))
    if args.json is not None:
        found = to_json(pairs, results, str(device), lpips, source)
        write_atomically(args.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return 0
