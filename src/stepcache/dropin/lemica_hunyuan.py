r"""LeMiCa for HunyuanVideo-1.5: copy this file into a clone of Tencent-Hunyuan/HunyuanVideo-1.5, run it as generate.py.

    torchrun --nproc_per_node=4 lemica_generate.py --resolution 480p --model_path ./ckpts --prompt "..." \
        --enable_cache true --cache_type lemica --lemica_step 25

Without --cache_type lemica it is upstream's generate.py, with upstream's own caches.
"""

from __future__ import annotations

import argparse

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, say, without_effect
from stepcache.dropin.hunyuanvideo15 import OTHERS, launch
from stepcache.hosts.hunyuanvideo15 import MODEL
from stepcache.methods.lemica import LeMiCa


def flags() -> argparse.ArgumentParser:
    """LeMiCa's own flags."""
    parser = argparse.ArgumentParser(prog="lemica_generate.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("LeMiCa (with --enable_cache true --cache_type lemica)")
    group.add_argument("--lemica_step", type=int, help="computed steps: 25 (default), 20, 15 or 10 of 50")
    group.add_argument(
        "--lemica_resample",
        action="store_true",
        help="allow other budgets and step counts than the published, resampled",
    )
    add_boundary(group, "blocks")
    return parser


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """The policy, checked before anything is loaded; `None`: upstream's process. ValueError, FileNotFoundError."""
    if args.enable_cache and args.cache_type not in ("lemica", *OTHERS):
        raise ValueError(f"--cache_type {args.cache_type} is unknown; expected lemica or {', '.join(OTHERS)}.")
    if not (args.enable_cache and args.cache_type == "lemica"):
        names = ("lemica_step", "lemica_resample", "boundary")
        without_effect(own, names, "without --enable_cache true --cache_type lemica")
        return None, ""
    if args.cfg_distilled or args.sparse_attn:
        say("the schedules were published for the model that is not distilled; nothing is known about this one.")
    budget = 25 if own.lemica_step is None else own.lemica_step
    policy = LeMiCa(budget, MODEL, own.lemica_resample, own.boundary or "blocks")
    for note in policy.notes(num_steps=args.num_inference_steps):
        say(note)
    args.lemica_step, args.boundary = budget, policy.boundary  # into upstream's record of the generation
    return policy, f"lemica{budget}_{policy.boundary}"


def main() -> None:
    """Parse, choose, run upstream."""
    launch(flags(), choose, {"resample=True": "--lemica_resample"})


if __name__ == "__main__":
    main()
