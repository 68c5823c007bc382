"""What the driver of a fleet costs: a stand-in pipeline on a local Ray cluster of two nodes, eight workers.

    python bench/fleet.py --out bench/fleet.json         utilisation over 500 items of one second, memory over 10,000

The stand-in sleeps instead of denoising, and writes items as a benchmark does. No model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from stepcache.bench.results import REFERENCE, Folder, Item
from stepcache.files import write_atomically
from stepcache.fleet.cluster import Fleet, Resources
from stepcache.fleet.jobs import Job, Jobs, Outcome

METHODS = 7


def stand_in(root: Path, seconds: float) -> tuple[Any, dict[str, Any]]:
    """A worker that sleeps, writes the item, and says when it worked."""
    folder = Folder(root)

    def work(job: Job) -> Outcome:
        began = time.time()
        time.sleep(seconds)
        method = REFERENCE if job.task == "reference" else job.method
        Item(method, *job.pair, computed=25.0, psnr=30.0).save(folder.item(method, job.pair[0], job.pair[2]))  # type: ignore[misc]
        return Outcome(value=(os.getpid(), began, time.time()))

    return work, {"versions": {}}


def jobs(count: int) -> list[Job]:
    """So many items, a reference and seven methods a prompt."""
    found: list[Job] = []
    for i in range(-(-count // (METHODS + 1))):
        pair = (i, f"prompt {i}", 0)
        found += [Job("reference", pair), *(Job("item", pair, f"method{m}") for m in range(METHODS))]
    return found[:count]


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(fleet: Fleet, count: int) -> dict[str, Any]:
    """Do `count` items; who worked when, and what the driver took."""
    spans: list[tuple[int, float, float]] = []
    memory: list[tuple[int, float]] = []

    def settle(job: Job, outcome: Outcome) -> None:
        spans.append(outcome.value)
        if len(spans) % max(count // 10, 1) == 0:
            memory.append((len(spans), round(resident(), 1)))

    began, cpu = time.time(), time.process_time()
    fleet.run(Jobs(jobs(count)), settle)
    ended, cpu = time.time(), time.process_time() - cpu
    by_worker: dict[int, list[tuple[float, float]]] = {}
    for pid, a, b in spans:
        by_worker.setdefault(pid, []).append((a, b))
    gaps = [
        c - b for rows in by_worker.values() for (_, b), (c, _) in zip(sorted(rows), sorted(rows)[1:], strict=False)
    ]
    busy = sum(b - a for _, a, b in spans)
    return {
        "items": len(spans),
        "workers": len(by_worker),
        "seconds": round(ended - began, 2),
        "utilisation": round(busy / ((ended - began) * len(by_worker)), 4),
        "driver_cpu_ms_per_item": round(cpu / len(spans) * 1000, 2),
        "gap_ms": {
            "median": round(float(np.median(gaps)) * 1000, 1),
            "p99": round(float(np.quantile(gaps, 0.99)) * 1000, 1),
        },
        "driver_mib": memory,
    }


def main() -> None:
    """Measure both, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--many", type=int, default=10_000)
    args = parser.parse_args()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    nodes.add_node(num_cpus=4)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ray": ray.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    results: dict[str, Any] = {"about": about}
    for name, count, seconds in (("one second", args.items, 1.0), ("many", args.many, 0.0)):
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            with Fleet(lambda root=root, seconds=seconds: stand_in(root, seconds), Resources(workers=8), root) as fleet:
                while fleet.loaded < 8:
                    fleet.run(Jobs([Job("run", (0, "", 0))]), lambda job, outcome: None)
                results[name] = run(fleet, count)
        print(name, json.dumps(results[name]))
    ray.shutdown()
    nodes.shutdown()
    write_atomically(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
