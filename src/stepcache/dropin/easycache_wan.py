"""EasyCache for Wan2.1 and Wan2.2: copy this file into a clone of either and run it in place of generate.py.

python easycache_generate.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." --thresh 0.05
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary
from stepcache.dropin.wan21 import launch
from stepcache.methods.easycache import EasyCache


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """EasyCache needs no table: any task, any step count."""
    policy = EasyCache(own.thresh, own.ret_steps, own.boundary or "output")
    return policy, f"easycache{own.thresh:g}_{policy.boundary}"


def flags() -> argparse.ArgumentParser:
    """EasyCache's own flags."""
    parser = argparse.ArgumentParser(prog="easycache_generate.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("EasyCache")
    group.add_argument(
        "--thresh", type=float, default=0.05, help="accumulated change that ends reuse; larger is faster (default 0.05)"
    )
    group.add_argument("--ret_steps", type=int, default=10, help="steps computed at the start (default 10)")
    add_boundary(group, "output")
    return parser


def main() -> None:
    """Parse, choose, run upstream."""
    launch(flags(), choose, {"thresh is": "--thresh is", "ret_steps is": "--ret_steps is"})


if __name__ == "__main__":
    main()
