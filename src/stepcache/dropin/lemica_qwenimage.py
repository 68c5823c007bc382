r"""LeMiCa for Qwen-Image: one file, beside which nothing of this project is needed (diffusers >= 0.36 is).

    python inference_qwenimage.py --model Qwen/Qwen-Image --prompt "..." --size 1664*928 --cache medium --output out.png

Without --cache every step is computed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from stepcache.core.strategy import Policy
from stepcache.dropin.common import add_boundary, add_predict, fail, planned
from stepcache.hosts.diffusers import accelerate
from stepcache.methods.fixed import Off
from stepcache.methods.lemica import LeMiCa

BUDGETS = {"slow": 25, "medium": 17, "fast": 10}
TABLES = {"Qwen/Qwen-Image": "qwen-image", "Qwen/Qwen-Image-2512": "qwen-image-2512"}
"""Hub id -> whose schedules; a folder could hold either, so it must be said (--table)."""
SIZES = "1328*1328, 1664*928, 928*1664, 1472*1104, 1104*1472, 1584*1056 and 1056*1584"


def parser() -> argparse.ArgumentParser:
    """All flags."""
    flags = argparse.ArgumentParser(
        prog="inference_qwenimage.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add(
        "--model",
        default="Qwen/Qwen-Image",
        metavar="DIR_OR_ID",
        help="Qwen/Qwen-Image, Qwen/Qwen-Image-2512 or a folder",
    )
    add("--prompt", required=True)
    add("--negative_prompt", default=" ", help="guidance needs one; a blank is the authors' default")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50, help="steps of the denoising loop (50, what the schedules are for)")
    add("--true_cfg_scale", type=float, default=4.0, help="guidance (4); 1 switches it off")
    add("--size", default="1664*928", metavar="W*H", help=f"the authors' sizes are {SIZES}")
    add("--output", default="output.png", metavar="FILE")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--offload", action="store_true", help="keep idle models in main memory (accelerate's model offload)")
    group = flags.add_argument_group("LeMiCa")
    group.add_argument(
        "--cache", help="slow (25 computed steps), medium (17), fast (10) or their number; omitted: none"
    )
    group.add_argument("--table", choices=sorted(set(TABLES.values())), help="whose schedules; needed for a folder")
    add_predict(group)
    group.add_argument("--resample", action="store_true", help="allow other budgets and step counts, resampled")
    add_boundary(group)
    return flags


def choose(args: argparse.Namespace) -> Policy | None:
    """The policy, checked before anything is loaded; `None`: every step computed. ValueError."""
    if args.plan:
        if args.cache is not None:
            raise ValueError("--cache and --plan exclude each other; give one of them.")
        return planned(args.plan, None, args.steps, args.resample)
    if args.cache is None:
        return None
    if args.cache not in BUDGETS and not args.cache.isdecimal():
        raise ValueError(f"--cache is {args.cache!r}; expected {', '.join(BUDGETS)} or a number of computed steps.")
    table = args.table or TABLES.get(args.model)
    if table is None:
        raise ValueError(
            f"--model {args.model!r} may be any of {', '.join(TABLES)}, whose schedules differ; add --table "
            f"{' or '.join(TABLES.values())}."
        )
    budget = BUDGETS.get(args.cache) or int(args.cache)
    policy = LeMiCa(budget, table, args.resample, args.boundary, args.lemica_predict)
    for note in policy.plan(num_steps=args.steps).notes:
        print(f"note: {note}", file=sys.stderr)
    return policy


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
    with accelerate(pipe, policy or Off()) as run:
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
    return run.summary()


def main() -> None:
    """Check, load, generate."""
    args = parser().parse_args()
    try:
        if args.steps < 1:
            raise ValueError(f"--steps is {args.steps}; expected 1 or more.")
        size_of(args.size)
        policy = choose(args)
        folder = Path(args.output).resolve().parent
        if Path(args.output).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--output is {args.output!r}; expected a name ending in .png, .jpg or .webp.")
        folder.mkdir(parents=True, exist_ok=True)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipe = load(args.model, device, args.offload)
        print(generate(pipe, args, policy))
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
