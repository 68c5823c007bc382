r"""Hindsight for HunyuanVideo-1.5: copy this file into a clone of it (Tencent-Hunyuan), run it as generate.py.

    torchrun --nproc_per_node=4 hindsight_generate.py --resolution 480p --model_path ./ckpts --prompt "..." --budget 25

Without --budget, --plan or --calibration it is upstream's generate.py, with upstream's own caches.
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.core.trajectory import Trajectory
from stepcache.dropin.hindsight import add_flags, chosen, finish
from stepcache.dropin.hunyuanvideo15 import launch
from stepcache.hosts.hunyuanvideo15 import MODEL

STEPS = 50
"""Upstream's own count, where none is asked for."""
RECORDING: dict[str, object] = {}
"""The file and what is recorded into it, when a calibration runs."""


def flags() -> argparse.ArgumentParser:
    """Hindsight's own flags."""
    parser = argparse.ArgumentParser(prog="hindsight_generate.py", add_help=False, allow_abbrev=False)
    add_flags(parser.add_argument_group("Hindsight"))
    return parser


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """The policy, checked before anything is loaded; `None`: upstream's process. ValueError, FileNotFoundError."""
    policy, tag = chosen(own, Trajectory(args.num_inference_steps or STEPS, MODEL), channels=1)
    if policy is not None and args.enable_cache:
        raise ValueError("--enable_cache is for upstream's own caches; leave it out, or --budget and --plan.")
    if own.calibration is not None:
        if args.seed is None:
            raise ValueError("--calibration needs --seed, under which the run is filed.")
        RECORDING[own.calibration] = policy
    return policy, tag


def main() -> None:
    """Parse, choose, run upstream; after a calibration run, add it to the file."""
    args = launch(flags(), choose, {"resample=True": "--resample", "the budget is": "--budget is"})
    for path, record in RECORDING.items():
        finish(record, path, args.prompt, args.seed)


if __name__ == "__main__":
    main()
