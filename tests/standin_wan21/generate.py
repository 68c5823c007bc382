"""A small stand-in for Wan2.1's generate.py: the same names and call shapes, our own code, a toy model.

Counts real block executions and writes them, with the final latent, beside the output file.
"""

import argparse
import json
import os
from pathlib import Path

import torch.distributed as dist
import wan

EXAMPLE_PROMPT = {task: {"prompt": "two cats / boxing"} for task in wan.TASKS}


def _parse_args():
    parser = argparse.ArgumentParser(description="stand-in for Wan2.1")
    parser.add_argument("--task", default="t2v-14B", choices=wan.TASKS)
    parser.add_argument("--size", default="1280*720", choices=["832*480", "480*832", "1280*720"])
    parser.add_argument("--ckpt_dir")
    parser.add_argument("--prompt")
    parser.add_argument("--save_file")
    parser.add_argument("--sample_steps", type=int)
    parser.add_argument("--sample_shift", type=float)
    parser.add_argument("--sample_guide_scale", type=float, default=5.0)
    parser.add_argument("--base_seed", type=int, default=0)
    parser.add_argument("--ulysses_size", type=int, default=1)
    parser.add_argument("--ring_size", type=int, default=1)
    parser.add_argument("--fail_at", type=int, default=-1, help="stand-in only: raise at this step")
    args = parser.parse_args()
    assert args.ckpt_dir is not None, "Please specify the checkpoint directory."
    if args.sample_steps is None:
        args.sample_steps = 40 if "i2v" in args.task else 50
    if args.sample_shift is None:
        args.sample_shift = 3.0 if "i2v" in args.task else 5.0
    return args


def generate(args):
    ranks, rank = int(os.getenv("WORLD_SIZE", "1")), int(os.getenv("RANK", "0"))
    if ranks > 1:
        dist.init_process_group("gloo")
    kind = {"t2v": wan.WanT2V, "t2i": wan.WanT2V, "i2v": wan.WanI2V, "flf": wan.WanFLF2V, "vac": wan.WanVace}
    pipe = kind[args.task[:3]](use_usp=args.ulysses_size > 1, fail_at=args.fail_at)
    settings = {"shift": args.sample_shift, "sampling_steps": args.sample_steps, "guide_scale": args.sample_guide_scale}
    video = pipe.generate(args.prompt or EXAMPLE_PROMPT[args.task]["prompt"], seed=args.base_seed, **settings)
    if args.save_file is None:
        args.save_file = "upstream_default.mp4"
    print("save_file:", args.save_file)
    record = {"executions": pipe.model.executions(), "video": video.flatten().tolist(), "rank": rank}
    Path(f"{args.save_file}.rank{rank}.json").write_text(json.dumps(record))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    generate(_parse_args())
