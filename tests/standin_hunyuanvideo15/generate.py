"""Stand-in for upstream's generate.py: side effects on import, a parser inside main, a strict one."""

import argparse
import copy
import os

from hyvideo import HunyuanVideo_1_5_Pipeline, InferState, write_record

WORLD = int(os.environ["WORLD_SIZE"])  # upstream starts its process group here


def flag(value):
    return str(value).lower() in ("true", "1")


def generate_video(args):
    state = InferState(args.enable_cache, args.cache_type)
    pipe = HunyuanVideo_1_5_Pipeline.create_pipeline(
        pretrained_model_name_or_path=args.model_path, create_sr_pipeline=args.sr
    )
    offload = {"enable_offloading": args.offloading, "enable_group_offloading": args.group_offloading}
    pipe.apply_infer_optimization(infer_state=state, overlap_group_offloading=True, **offload)
    if args.sr:
        plain = copy.deepcopy(state)
        plain.enable_cache = False
        pipe.sr_pipeline.apply_infer_optimization(infer_state=plain, **offload)
    out = pipe(num_inference_steps=args.num_inference_steps, seed=args.seed)
    path = args.output_path or "outputs/output.mp4"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_record(pipe, out, path)
    print("saved", path)


def main():
    parser = argparse.ArgumentParser(description="Generate video using HunyuanVideo-1.5")
    for name in ("prompt", "resolution", "model_path"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("sr", "offloading", "group_offloading", "enable_cache", "cfg_distilled"):
        parser.add_argument(f"--{name}", type=flag, default=False)
    for name in ("enable_step_distill", "sparse_attn"):
        parser.add_argument(f"--{name}", type=flag, default=False)
    parser.add_argument("--cache_type", default="deepcache")
    parser.add_argument("--num_inference_steps", type=int, default=None)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("--image_path", default=None)
    parser.add_argument("--output_path", default=None)
    generate_video(parser.parse_args())


if __name__ == "__main__":
    main()
