"""`stepcache evidence`: measure all methods on your own model and machine.

    stepcache evidence --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --hours 8
    stepcache evidence --merge evidence-* --out evidence.md

Steps, size and guidance are the model's defaults. First a control: a run with all steps computed must be bit-identical
to the uncached one. Then, at half, two fifths, a third and a quarter of the steps: Hindsight, with schedules tried on
other prompts and without; uniform reuse, Spectrum, extrapolation, published schedules of the model, installed caches of
other projects, and fewer steps. An uncached run with another sampler shows what "close" means. `evidence.json`
can be submitted (docs/evidence.md): prompts are in it by their hash. The same command resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path

import torch

from stepcache.bench.evidence.rows import load_document, merged
from stepcache.bench.evidence.session import Session
from stepcache.bench.evidence.setup import CALIBRATION_PROMPTS, budgets_of
from stepcache.commands.flags import EMBEDDED, Flags, add_device_flags, add_request_flags, request_from
from stepcache.files import check_writable, read_text, write_atomically
from stepcache.fleet.places import alone
from stepcache.measure.device import find_device
from stepcache.measure.lpips import SIZE
from stepcache.measure.pipelines import weights_bytes
from stepcache.measure.prompts import read_prompts
from stepcache.measure.video import check_video

RUN, MERGE = "runs (no --merge)", "--merge"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache evidence`."""
    parser.description = __doc__
    flags = Flags(parser, lambda args: {MERGE} if args.merge else {RUN})
    add = functools.partial(flags.add, needs=RUN)
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a diffusers pipeline")
    add("--hours", type=float, metavar="H", help="stop after this many hours (default: 16 prompts, no limit)")
    flags.add("--out", metavar="PATH", help="folder (default: evidence-MODEL); with --merge a file for the table")
    add(
        "--prompts",
        metavar="FILE",
        help="one per line; the last four are for planning (default: the model's, else ours)",
    )
    add("--offload", action="store_true", default=False, help="keep idle parts of the model in CPU memory")
    add("--lpips", action="store_true", default=False, help=f"download AlexNet's weights ({SIZE}) if they are missing")
    add_request_flags(flags, needs=RUN)
    add_device_flags(flags, needs=RUN)
    flags.add("--merge", nargs="+", metavar="DIR", help="make one table of several folders or evidence.json files")


def run(args: argparse.Namespace) -> int:
    """Merge submitted folders; or check, load, and run what is missing."""
    if args.merge:
        table = merged([load_document(Path(path)) for path in args.merge])
        print(table)
        if args.out:
            check_writable(args.out)
            write_atomically(args.out, table + "\n")
        return 0
    if not args.model:
        raise ValueError("give --model, or --merge with submitted folders.")
    if args.hours is not None and not args.hours > 0:
        raise ValueError(f"--hours is {args.hours:g}; expected more than 0.")
    request = request_from(args)
    budgets_of(request.steps)
    prompts = prompts_for(args)
    name = Path(args.model).expanduser().resolve().name
    folder = Path(args.out or f"evidence-{name}")
    check_video()
    check_writable(folder, folder=True)
    check_memory(args)
    with alone(folder):
        where = (args.device, args.dtype, args.offload)
        session = Session(str(Path(args.model)), folder, request, prompts, where, args.hours, args.lpips)
        return session.run()


def prompts_for(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """For evaluation, and for planning; the latter empty where there are too few.

    Raises:
        ValueError, FileNotFoundError: the file cannot be used.
    """
    own = Path(args.model) / "prompts.json"
    if args.prompts is None and own.is_file():
        return _own_prompts(own)
    found = read_prompts(args.prompts or EMBEDDED.parent / "prompts" / "forty.txt")
    few = len(found) <= CALIBRATION_PROMPTS
    return (found, []) if few else (found[:-CALIBRATION_PROMPTS], found[-CALIBRATION_PROMPTS:])


def _own_prompts(path: Path) -> tuple[list[str], list[str]]:
    try:
        known = json.loads(read_text(path, "prompts"))
        found = tuple([str(prompt) for prompt in known[kind]] for kind in ("evaluation", "calibration"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); give --prompts FILE.") from error
    if not found[0]:
        raise ValueError(f"{path} has no prompts for evaluation; give --prompts FILE.")
    return found[0], found[1]


def check_memory(args: argparse.Namespace) -> None:
    """ValueError if a folder's weights alone are more than the free memory of the device."""
    device = find_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    needed, free = weights_bytes(args.model, dtype), free_bytes(device)
    if needed is not None and free is not None and not args.offload and needed > free:
        raise ValueError(
            f"the weights are {needed / GIB:.1f} GiB in {dtype} and {device} has {free / GIB:.1f} GiB free; use "
            "--offload, --dtype bfloat16, or a smaller model."
        )


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, what the system only keeps of files included; None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", told.read_text()) if told.is_file() else None
    return None if found is None else 1024 * int(found[1])
