"""The command `stepcache compare`: how close are generated clips to the originals?

    stepcache compare --original_video full.mkv --generated_video lemica.mkv
    stepcache compare --original_video runs/full --generated_video runs/lemica --protocol teacache --json metrics.json

Two clips, or two folders of clips of the same names. A folder of PNG frames is one clip.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from stepcache.files import replacing
from stepcache.measure.compare import _compare, find_pairs, notes, table, to_json
from stepcache.measure.lpips import find_lpips
from stepcache.measure.metrics import PROTOCOLS


def build_parser(prog: str = "stepcache compare") -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="PSNR, SSIM and LPIPS of generated clips against the originals.",
        epilog="A clip is a video file, an .npy of frames [T, H, W, 3], or a folder of PNG frames. Measure on lossless "
        "clips (.mkv with FFV1, .npy, PNG): the codec's error in an mp4 is measured too.",
    )
    clips = "a clip, or a folder of clips"
    parser.add_argument("--original_video", required=True, type=Path, metavar="A", help=f"{clips}: the reference")
    parser.add_argument(
        "--generated_video", required=True, type=Path, metavar="B", help=f"{clips} with the same names: what is judged"
    )
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="reference", help="whose rules (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number, frame by frame, as JSON")
    parser.add_argument("--device", default="auto", metavar="DEV", help="cpu, cuda, cuda:1, ... (CUDA if there is one)")
    parser.add_argument(
        "--lpips_backbone",
        type=Path,
        metavar="FILE",
        help="AlexNet's weights: torchvision's .pth, or .safetensors (default: torch.hub's checkpoint folder)",
    )
    parser.add_argument("--no_lpips", action="store_true", help="leave LPIPS out")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "stepcache compare") -> int:
    """Run the command; returns the exit code: 0, or 2 with one sentence on stderr for what the user can mend."""
    args = build_parser(prog).parse_args(argv)
    try:
        if args.json is not None and args.json.is_dir():
            raise ValueError(f"--json {args.json} is a folder; expected a file.")
        device = _device(args.device)
        pairs = find_pairs(args.original_video, args.generated_video)
        lpips, source = (None, "--no_lpips") if args.no_lpips else find_lpips(args.lpips_backbone)
        results = _compare(pairs, args.protocol, lpips, device)
        print("\n".join(table(pairs, results) + notes(results, device, lpips, source)))
        if args.json is not None:
            with replacing(args.json) as temporary:
                report = to_json(pairs, results, str(device), lpips, source)
                temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _device(name: str) -> torch.device:
    """The device of that name, tried; never a silent fall back to another."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as each backend has it
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); try --device cpu.") from error


if __name__ == "__main__":
    sys.exit(main())
