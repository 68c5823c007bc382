"""Lists of prompts, from text files and VBench's JSON (arXiv 2311.17982), and of seeds."""

from __future__ import annotations

import json
import os

from stepcache.files import read_text

LONGEST_NAME = 255
"""Bytes a file name may have on the usual file systems."""


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Prompts from a text file, one a line, or from a VBench JSON (`VBench_full_info.json`), in the file's order.

    In text files empty lines and lines that begin with # are left out. A VBench file is a list of objects with
    `prompt_en`; it names some prompts under several dimensions, and each is taken once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty, a line stands there twice, or the JSON is of another kind.
    """
    text, name = read_text(path, "prompts"), os.fspath(path)
    if text.lstrip().startswith("["):
        return _of_vbench(text, name)
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts file {name!r} is empty; expected one prompt a line.")
    if twice := sorted({p for p in prompts if prompts.count(p) > 1}):
        raise ValueError(f"prompts file {name!r} has {twice[0]!r} more than once; keep each prompt once.")
    return prompts


def _of_vbench(text: str, name: str) -> list[str]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts file {name!r} begins as JSON but is none ({error}).") from error
    found = [entry.get("prompt_en") for entry in entries if isinstance(entry, dict)]
    prompts = [prompt for prompt in found if isinstance(prompt, str) and prompt.strip()]
    if not prompts or len(prompts) < len(entries):
        raise ValueError(f'prompts file {name!r}: expected a list of objects with "prompt_en", as VBench has it.')
    return list(dict.fromkeys(prompts))


def read_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"; ValueError for anything else, for a seed twice, or for one that torch cannot take."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; expected whole numbers separated by commas, such as 0,1,2.") from None
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds is {text!r}; each seed once.")
    for seed in seeds:
        check_seed(seed, "--seeds")
    return seeds


def check_seed(seed: int, flag: str = "--seed") -> None:
    """ValueError for a seed that torch's generators cannot take."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{flag} names {seed}; expected 64 bits: -2**63 to 2**64 - 1.")


def clip_name(prompt: str, seed: int) -> str:
    """The file name under which VBench looks for a prompt's clip: PROMPT-SEED.mp4.

    Raises:
        ValueError: the prompt cannot be a file name: too long, or with a slash in it.
    """
    name = f"{prompt}-{seed}.mp4"
    if "/" in prompt or "\0" in prompt or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{prompt[:60]!r}... cannot be a file name, so VBench could not find its clip; leave --vbench out."
        )
    return name
