"""What it costs that ranks agree: the vote of one step, between processes on this machine.

python bench/ranks.py --out bench/ranks.json            a minute
torchrun --nproc_per_node=2 bench/ranks.py --out ...    the same under a launcher, with CUDA where there is one
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stepcache import EasyCache, StepCache, Trajectory
from stepcache.files import write_atomically
from stepcache.fleet.ranks import together

STEPS, ROUNDS = 50, 40


def loop(group: dist.ProcessGroup | None, device: str) -> float:
    """Milliseconds a step of an EasyCache that costs nothing else."""
    x = torch.randn(1, 16, 2, 8, 8, device=device)
    times = []
    for _ in range(ROUNDS):
        cache = StepCache(EasyCache(1e-9, 5), group=group)
        cache.begin(Trajectory(STEPS))
        began = time.perf_counter()
        for _ in range(STEPS):
            call = cache.enter("cond", x)
            cache.keep(call, x, x)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / STEPS * 1000)
    return sorted(times)[ROUNDS // 2]


def measure(rank: int, world: int, port: int, out: Path) -> None:
    """On every rank; the first one writes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    report(out)


def report(out: Path) -> None:
    """Measure with and without the vote."""
    torch.set_num_threads(1)
    with together(60) as mine:
        device = mine.device or "cpu"
        alone, voting = loop(None, device), loop(mine.group, device)
        if mine.rank:
            return
        row = {
            "ranks": mine.world,
            "backend": dist.get_backend(mine.group),
            "ms_a_step_alone": round(alone, 4),
            "ms_a_step_with_vote": round(voting, 4),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
        }
    print(json.dumps(row))
    write_atomically(out, json.dumps(row, indent=1) + "\n")


def main() -> None:
    """Under a launcher, or two processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        report(args.out)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, args=(2, port, args.out), nprocs=2)


if __name__ == "__main__":
    main()
