"""The device of a name, tried before anything is loaded."""

from __future__ import annotations

import platform

import torch


def find_device(name: str | None = None, flag: str = "--device") -> torch.device:
    """The device of that name; None: CUDA if there is any, else the CPU. Never a silent fall back to another.

    Args:
        name: as torch writes it: cpu, cuda, cuda:1, ...
        flag: what messages call the setting.

    Raises:
        ValueError: there is no such device here, or torch was built without it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # as each backend has it
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{flag} {name} cannot be used here ({reason}); try {flag} cpu.") from error
    if device.type == "meta":
        raise ValueError(f"{flag} {name} cannot be used here (it holds no numbers); try {flag} cpu.")
    return device


def machine_name(device: torch.device) -> str:
    """The card's name, or the processor's kind and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
