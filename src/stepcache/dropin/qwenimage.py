"""What the Qwen-Image drop-ins share: flags, checks, loading and making one image."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stepcache.core.strategy import Policy
from stepcache.dropin.common import checked_file, fail, parsed
from stepcache.hosts.qwenimage import accelerated
from stepcache.methods.off import Off

Choose = Callable[[argparse.Namespace], tuple[Policy | None, str]]
SIZES = "1328*1328, 1664*928, 928*1664, 1472*1104, 1104*1472, 1584*1056 and 1056*1584"


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """The flags that say what image is made."""
    flags = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("--model", default="Qwen/Qwen-Image", metavar="DIR_OR_ID", help="or Qwen/Qwen-Image-2512, or a folder")
    add("--prompt", required=True)
    add("--negative_prompt", default=" ", help="guidance needs one; a blank is the authors' default")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50, help="steps of the denoising loop (50, what the schedules are for)")
    add("--true_cfg_scale", type=float, default=4.0, help="guidance (4); 1 switches it off")
    add("--size", default="1664*928", metavar="W*H", help=f"the authors' sizes are {SIZES}")
    add("--output", metavar="FILE", help="default: output.png, with the method in its name where there is one")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--offload", action="store_true", help="keep idle models in main memory (accelerate's model offload)")
    return flags


def size_of(text: str) -> tuple[int, int]:
    """Width and height of "W*H"; ValueError unless both are multiples of 16."""
    parts = text.lower().replace("x", "*").split("*")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 and int(p) % 16 == 0 for p in parts):
        raise ValueError(f"--size is {text!r}; expected W*H in multiples of 16, for example 1664*928.")
    return int(parts[0]), int(parts[1])


def load(model: str, device: str, offload: bool) -> Any:
    """The pipeline on its device; FileNotFoundError, ValueError, ImportError."""
    try:
        from diffusers import QwenImagePipeline
    except ImportError as error:
        raise ImportError("this needs diffusers 0.36 or newer: pip install -U diffusers transformers.") from error
    if not Path(model).expanduser().is_dir() and model.count("/") != 1:
        raise FileNotFoundError(f"--model {model!r} is neither a folder nor a hub id such as Qwen/Qwen-Image.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r} cannot be used here: {error}") from error
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with warnings.catch_warnings():  # newer diffusers say `dtype`, older ones know only `torch_dtype`
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe = QwenImagePipeline.from_pretrained(str(Path(model).expanduser()), torch_dtype=dtype)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def generate(pipe: Any, args: argparse.Namespace, policy: Policy | None) -> Any:
    """Make and save the image; returns what the run did."""
    width, height = size_of(args.size)
    with accelerated(pipe, policy or Off(), None, args.true_cfg_scale) as cache:
        image = pipe(
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=args.steps,
            true_cfg_scale=args.true_cfg_scale,
            generator=torch.Generator("cpu").manual_seed(args.seed),
        ).images[0]
    image.save(args.output)
    return cache.summary()


def launch(flags: argparse.ArgumentParser, choose: Choose, words: dict[str, str]) -> argparse.Namespace:
    """Check, load, generate; returns the flags.

    `choose`: flags -> policy and a tag for the default file name; no policy: every step is computed.
    `words`: what a message of the policy calls a setting -> the flag of this script.
    """
    args, rest = parsed(flags)
    if rest:
        flags.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.steps < 1:
            raise ValueError(f"--steps is {args.steps}; expected 1 or more.")
        if not math.isfinite(args.true_cfg_scale):
            raise ValueError(f"--true_cfg_scale is {args.true_cfg_scale}; expected a finite number.")
        if not 0 <= args.seed < 2**64:
            raise ValueError(f"--seed is {args.seed}; expected 0 to 2**64 - 1.")
        size_of(args.size)
        policy, tag = choose(args)
        args.output = args.output or (f"output_{tag}.png" if tag else "output.png")
        if Path(args.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output is {args.output!r}; expected a name ending in .png, .jpg or .webp.")
        args.output = checked_file(args.output)
        pipe = load(args.model, args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.offload)
        print(generate(pipe, args, policy))
    except (ValueError, OSError, ImportError) as error:
        fail(str(error), words)
    print(f"wrote {args.output}")
    return args
