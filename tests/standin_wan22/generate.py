"""A small stand-in for Wan2.2's generate.py: the same names and call shapes, our own code, toy models.

Counts real block executions of every transformer and writes them, with the final latent, beside the output file.
"""

import argparse
import json
import os
from pathlib import Path

import torch.distributed as dist
import wan

EXAMPLE_PROMPT = {task: {"prompt": "two cats / boxing"} for task in wan.CONFIGS}


def _parse_args():
    parser = argparse.ArgumentParser(description="stand-in for Wan2.2")
    parser.add_argument("--task", default="t2v-A14B", choices=[*wan.CONFIGS, "x2v-7B"])
    parser.add_argument("--size", default="1280*720", choices=["832*480", "1280*720", "1280*704"])
    for name in ("ckpt_dir", "prompt", "save_file", "image"):
        parser.add_argument(f"--{name}")
    for name, kind in (("sample_steps", int), ("sample_shift", float), ("sample_guide_scale", float)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--sample_solver", default="unipc", choices=["unipc", "dpm++"])
    parser.add_argument("--frame_num", type=int, default=81)
    parser.add_argument("--base_seed", type=int, default=0)
    parser.add_argument("--ulysses_size", type=int, default=1)
    parser.add_argument("--num_clip", type=int, default=2)
    args = parser.parse_args()
    assert args.ckpt_dir is not None, "Please specify the checkpoint directory."
    for name, value in wan.CONFIGS.get(args.task, wan.CONFIGS["t2v-A14B"]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def generate(args):
    ranks, rank = int(os.getenv("WORLD_SIZE", "1")), int(os.getenv("RANK", "0"))
    if ranks > 1:
        dist.init_process_group("gloo")
    kinds = {"t2v": wan.WanT2V, "i2v": wan.WanI2V, "ti2": wan.WanTI2V, "s2v": wan.WanS2V, "ani": wan.WanAnimate}
    pipe = kinds[args.task[:3]](use_sp=args.ulysses_size > 1)
    settings = {"shift": args.sample_shift, "sampling_steps": args.sample_steps, "guide_scale": args.sample_guide_scale}
    video = pipe.generate("a cat", seed=args.base_seed, **settings)
    if args.save_file is None:
        args.save_file = "upstream_default.mp4"
    print("save_file:", args.save_file)
    counts = {name: m.blocks[0].executions for name, m in vars(pipe).items() if isinstance(m, wan.Model)}
    record = {"executions": counts, "video": video.flatten().tolist(), "switch": pipe.switch}
    Path(f"{args.save_file}.rank{rank}.json").write_text(json.dumps(record))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    generate(_parse_args())
