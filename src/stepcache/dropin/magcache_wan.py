r"""MagCache for Wan2.1: copy this file into a clone of Wan-Video/Wan2.1 and add --use_magcache to the usual command.

    python magcache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." \
        --use_magcache --magcache_thresh 0.12 --magcache_K 2 --retention_ratio 0.2

Without --use_magcache (or --magcache_calibration) it is upstream's generate.py, step for step.
"""

from __future__ import annotations

import argparse
import os

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, fail, say
from stepcache.dropin.wan21 import KIN, launch
from stepcache.methods.magcache import MagCache, MagCacheCalibration, Ratios
from stepcache.methods.magcache_ratios import RATIOS

CALIBRATION = MagCacheCalibration()


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """Calibration wins over use, as in the original script."""
    if own.magcache_calibration:
        if args.ulysses_size * args.ring_size > 1:
            raise ValueError(
                "with sequence parallelism a rank sees only its own tokens; calibrate with --ulysses_size 1."
            )
        return CALIBRATION, "magcache_calibration"
    if not own.use_magcache:
        return None, ""
    name = table = f"wan2.1-{args.task}"
    if args.task in ("i2v-14B", "flf2v-14B"):  # published for two sizes
        table = f"wan2.1-i2v-14B-{'480p' if args.size in ('832*480', '480*832') else '720p'}"
    elif table not in RATIOS:
        table = KIN[args.task]
    ratios = Ratios.load(own.magcache_ratios) if own.magcache_ratios else None
    settings = (own.magcache_thresh, own.magcache_K, own.retention_ratio, None if ratios else table)
    policy = MagCache(*settings, ratios, own.magcache_interp, own.boundary)
    if ratios and ratios.model != name:
        raise ValueError(f"{own.magcache_ratios!r} was calibrated on {ratios.model}, and the task is {name}.")
    plan = policy.plan(num_steps=args.sample_steps)
    if ratios is None and not table.startswith(name):
        say(f"MagCache published no ratios for {args.task}; those of {table} are used.")
    for note in plan.notes:
        say(note)
    return policy, f"magcache{own.magcache_thresh:g}K{own.magcache_K}"


def flags() -> argparse.ArgumentParser:
    """MagCache's own flags, with the original script's defaults."""
    parser = argparse.ArgumentParser(prog="magcache_generate.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("MagCache")
    group.add_argument("--use_magcache", action="store_true", help="reuse steps; omitted: original process")
    group.add_argument("--magcache_thresh", type=float, default=0.12, help="accumulated drift that ends reuse (0.12)")
    group.add_argument("--magcache_K", type=int, default=2, help="most consecutive reused steps (2)")
    group.add_argument("--retention_ratio", type=float, default=0.2, help="share computed at the start (0.2)")
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
    add_boundary(group)
    return parser


def main() -> None:
    """Parse, choose, run upstream; after a calibration, save what was measured."""
    own, _ = flags().parse_known_args()
    launch(flags(), choose)
    if own.magcache_calibration and int(os.getenv("RANK", "0")) == 0:
        try:
            ratios = CALIBRATION.ratios()
            path = own.magcache_ratios or f"magcache_ratios_{ratios.model}_{ratios.num_steps}.json"
            ratios.save(path)
        except (ValueError, OSError) as error:
            fail(str(error))
        print(f"ratios written to {path}; use them with: --use_magcache --magcache_ratios {path}")


if __name__ == "__main__":
    main()
