r"""MagCache for Wan2.1 and Wan2.2: copy this file into a clone of either and add --use_magcache to the usual command.

    python magcache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." \
        --use_magcache --magcache_thresh 0.12 --magcache_K 2 --retention_ratio 0.2

Without --use_magcache (or --magcache_calibration) it is upstream's generate.py, step for step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Boundary
from stepcache.dropin.common import add_boundary, fail, leads, say, without_effect
from stepcache.dropin.wan21 import KIN, launch, model_name
from stepcache.files import check_writable
from stepcache.methods.magcache import MagCache, MagCacheCalibration, Ratios
from stepcache.methods.magcache_ratios import RATIOS

CALIBRATION = MagCacheCalibration()
SETTINGS = ("magcache_thresh", "magcache_K", "retention_ratio", "magcache_interp", "boundary")
DEFAULTS = (0.12, 2, 0.2)
"""Threshold, K and retention ratio of the original script."""


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """What was asked for, checked against the run before anything is loaded."""
    name = model_name(args)
    if own.magcache_calibration:
        without_effect(own, ("use_magcache", *SETTINGS), "with --magcache_calibration, which computes every step")
        if args.ulysses_size * getattr(args, "ring_size", 1) > 1:
            raise ValueError(
                "with sequence parallelism a rank sees only its own tokens; calibrate with --ulysses_size 1."
            )
        own.magcache_ratios = own.magcache_ratios or f"magcache_ratios_{name}_{args.sample_steps}.json"
        check_writable(Path(own.magcache_ratios))
        return CALIBRATION, "magcache_calibration"
    if not own.use_magcache:
        without_effect(own, ("magcache_ratios", *SETTINGS), "without --use_magcache")
        return None, ""
    policy = _policy(own, args, name)
    for note in policy.notes(num_steps=args.sample_steps):
        say(note)
    thresh, max_skips, _ = policy.settings(policy.model)
    return policy, f"magcache{thresh:g}K{max_skips}_{policy.boundary}"


def _policy(own: argparse.Namespace, args: argparse.Namespace, name: str) -> MagCache:
    given = [getattr(own, setting) for setting in SETTINGS[:3]]
    if name.startswith("wan2.1"):  # of Wan2.2's models every one has settings of its own
        given = [d if g is None else g for d, g in zip(DEFAULTS, given, strict=True)]
    thresh, max_skips, retention = given
    boundary: Boundary = own.boundary or "blocks"
    if own.magcache_ratios:
        ratios = Ratios.load(own.magcache_ratios)
        if ratios.model != name:
            raise ValueError(f"{own.magcache_ratios!r} was calibrated on {ratios.model}, and the task is {name}.")
        return MagCache(thresh, max_skips, retention, ratios=ratios, interp=own.magcache_interp, boundary=boundary)
    table = name
    if args.task in ("i2v-14B", "flf2v-14B"):  # published for two sizes
        table = f"wan2.1-i2v-14B-{'480p' if args.size in ('832*480', '480*832') else '720p'}"
    elif table not in RATIOS and args.task not in KIN:
        raise ValueError(f"MagCache published no ratios for {args.task}; measure them with --magcache_calibration.")
    elif table not in RATIOS:
        table = KIN[args.task]
    if not table.startswith(name):
        say(f"MagCache published no ratios for {args.task}; those of {table} are used.")
    return MagCache(thresh, max_skips, retention, model=table, interp=own.magcache_interp, boundary=boundary)


def flags() -> argparse.ArgumentParser:
    """MagCache's own flags, with the original script's defaults."""
    parser = argparse.ArgumentParser(prog="magcache_generate.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("MagCache")
    group.add_argument("--use_magcache", action="store_true", help="reuse steps; omitted: original process")
    group.add_argument("--magcache_thresh", type=float, help="accumulated drift that ends reuse (0.12)")
    group.add_argument("--magcache_K", type=int, help="most consecutive skipped steps (2)")
    group.add_argument("--retention_ratio", type=float, help="share computed at the start (0.2)")
    group.add_argument(
        "--magcache_calibration",
        action="store_true",
        help="compute every step and write the ratios to --magcache_ratios",
    )
    group.add_argument("--magcache_ratios", metavar="FILE", help="ratios file to use, or to write when calibrating")
    group.add_argument(
        "--magcache_interp", choices=("product", "nearest"),
        help="ratios of another step count: keep their running product (default for published ones), or take the "
        "nearest step's as the original script does",
    )  # fmt: skip
    add_boundary(group, "blocks")
    return parser


def main() -> None:
    """Parse, choose, run upstream; after a calibration, save what was measured."""
    own = argparse.Namespace()

    def chosen(given: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
        nonlocal own
        own = given
        return choose(given, args)

    launch(flags(), chosen, {"interp=...": "--magcache_interp product or nearest", "model=...": "another --task"})
    if getattr(own, "magcache_calibration", False) and leads():
        try:
            CALIBRATION.ratios().save(own.magcache_ratios)
        except (ValueError, OSError) as error:
            fail(str(error))
        path = own.magcache_ratios
        print(f"ratios written to {path}; use them with: --use_magcache --magcache_ratios {path}")


if __name__ == "__main__":
    main()
