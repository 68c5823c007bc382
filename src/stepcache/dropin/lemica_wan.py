r"""LeMiCa for Wan2.1: copy this file into a clone of Wan-Video/Wan2.1 and add --lemica_budget to the usual command.

    python inference_wan.py --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --prompt "..." \
        --lemica_budget 25

Without --lemica_budget, --plan or --lemica_calibration it is upstream's generate.py, step for step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, add_predict, add_resample, fail, leads, planned, say
from stepcache.dropin.wan21 import KIN, launch
from stepcache.methods.lemica import LeMiCa
from stepcache.methods.lemica_schedules import SCHEDULES
from stepcache.planning.calibration import Calibration, Recorder

RECORDER = Recorder(channels=0)
"""What --lemica_calibration fills."""


def choose(own: argparse.Namespace, args: argparse.Namespace) -> tuple[Policy | None, str]:
    """What was asked for, checked against the run before anything is loaded."""
    asked = [n for n in ("lemica_budget", "plan", "lemica_calibration") if getattr(own, n) is not None]
    if len(asked) > 1:
        raise ValueError(f"--{' and --'.join(asked)} exclude each other; give one of them.")
    if not asked:
        return None, ""
    if own.lemica_calibration:
        return RECORDER, "calibration"
    if own.plan:
        run = (f"wan2.1-{args.task}", args.sample_steps, own.lemica_resample)
        fixed = planned(own.plan, *run, args.sample_shift, args.sample_guide_scale)
        return fixed, f"plan{fixed.decided.budget}"
    name = f"wan2.1-{args.task}"
    table = name if name in SCHEDULES else KIN[args.task]
    policy = LeMiCa(own.lemica_budget, table, own.lemica_resample, own.boundary, own.lemica_predict)
    plan = policy.plan(num_steps=args.sample_steps)
    if table != name:
        say(f"LeMiCa published nothing for {args.task}; its schedule for {table} is used.")
    for note in plan.notes:
        say(note)
    return replace(policy, model=table), f"lemica{own.lemica_budget}"


def flags() -> argparse.ArgumentParser:
    """LeMiCa's own flags."""
    parser = argparse.ArgumentParser(prog="inference_wan.py", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("LeMiCa")
    group.add_argument("--lemica_budget", type=int, help="computed steps: 25, 20, 17 or 14; omitted: original process")
    add_predict(group)
    group.add_argument(
        "--lemica_calibration",
        metavar="FILE",
        help="compute every step and add what `stepcache plan` needs to FILE; a few prompts (and seeds) are enough",
    )
    add_resample(group)
    add_boundary(group)
    return parser


def main() -> None:
    """Parse, choose, run upstream; after a calibration run, add it to the file."""
    own, _ = flags().parse_known_args()
    args = launch(flags(), choose, RECORDER.see_sampler if own.lemica_calibration else None)
    if own.lemica_calibration and leads():
        try:
            found = RECORDER.finish(args.prompt, args.base_seed)
            path = Path(own.lemica_calibration)
            calibration = Calibration.load(path).merged(found) if path.exists() else found
            calibration.save(path)
        except (ValueError, OSError) as error:
            fail(str(error))
        print(f"{path} holds {len(calibration.runs)} run(s); plan with:")
        print(f"  stepcache plan --calibration {path} --budget 20 --out plan.json")


if __name__ == "__main__":
    main()
