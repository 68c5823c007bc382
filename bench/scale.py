"""How long a fleet would take: 1,000 workers and 50,000 items simulated, with the very queue that directs a real one.

    python bench/scale.py --out bench/scale.json                    a minute; no Ray, no model
    python bench/scale.py --times results --out bench/scale.json    with the times of another benchmark's items

A worker's time for an item is drawn from those measured for its method; nodes of eight workers, some slow; workers die
(exponentially), their item is lost and begun again, another worker is there after a while and loads the model. The
ideal is all work divided by the speed of all workers, nothing lost and nobody ever waiting.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stepcache.bench.results import REFERENCE, Folder
from stepcache.files import write_atomically
from stepcache.fleet.jobs import Job, Jobs
from stepcache.fleet.shards import part

TIMES = Path(__file__).parent / "scale_times.json"
Times = dict[str, list[float]]
"""Method -> seconds of its items over those of the mean uncached run."""


@dataclass(frozen=True)
class Fleet:
    """What is simulated; seconds.

    Args:
        workers, per_node: so many, eight on a node.
        uncached: mean seconds of an uncached run.
        loss: share of the workers lost in an hour.
        away: until another worker is there.
        load: of the model.
        slow, speed: share of the nodes that are slow, and how fast those are.
        driver: the driver's own time an item, one after the other.
    """

    workers: int = 1000
    per_node: int = 8
    uncached: float = 600.0
    loss: float = 0.01
    away: float = 300.0
    load: float = 120.0
    slow: float = 0.05
    speed: float = 0.5
    driver: float = 0.002

    def speeds(self, rng: random.Random) -> list[float]:
        """Of every worker."""
        nodes = [self.speed if rng.random() < self.slow else 1.0 for _ in range(-(-self.workers // self.per_node))]
        return [nodes[w // self.per_node] for w in range(self.workers)]


def measured(folder: Path, methods: Sequence[str]) -> Times:
    """Times of a benchmark's items, of some of its methods."""
    items = [i for i in Folder(folder).items() if not i.error and i.method in (REFERENCE, *methods)]
    mean = float(np.mean([i.loop_seconds for i in items if i.method == REFERENCE]))
    times: Times = {}
    for item in items:
        times.setdefault(item.method, []).append(round(item.loop_seconds / mean, 4))
    return times


def jobs(count: int, methods: Sequence[str]) -> list[list[Job]]:
    """Pairs of a reference and every method, `count` items in all."""
    pairs = []
    for i in range(count // (len(methods) + 1)):
        pair = (i, "", 0)
        pairs.append([Job("reference", pair), *(Job("item", pair, m) for m in methods)])
    return pairs


def simulate(fleet: Fleet, pairs: list[list[Job]], times: Times, speeds: list[float], seed: int) -> dict[str, Any]:
    """Let the fleet do all jobs; when the last ends, and what was lost."""
    rng = random.Random(seed)
    queue = Jobs([job for pair in pairs for job in pair], retries=1000)
    total = len(pairs) * len(pairs[0])
    rate = fleet.loss / 3600
    events: list[tuple[float, int, str, int]] = []  # when, order, what, worker
    order = itertools.count()
    doing: dict[int, Job] = {}
    began: dict[int, float] = {}
    idle: set[int] = set()
    free_at, lost, wasted, now = 0.0, 0, 0.0, 0.0

    def later(when: float, what: str, worker: int) -> None:
        heapq.heappush(events, (when, next(order), what, worker))

    def offer(worker: int) -> bool:
        """Give a worker its next item; False if there is none now."""
        nonlocal free_at
        job = queue.take(worker)
        if job is None:
            idle.add(worker)
            return False
        idle.discard(worker)
        free_at = max(free_at, now) + fleet.driver  # the driver hands out one after the other
        name = REFERENCE if job.task == "reference" else job.method
        seconds = rng.choice(times[name]) * fleet.uncached / speeds[worker]
        dies = rng.expovariate(rate) if rate else float("inf")
        doing[worker], began[worker] = job, free_at
        later(free_at + min(seconds, dies), "lost" if dies < seconds else "ended", worker)
        return True

    for worker, speed in enumerate(speeds):
        later(fleet.load / speed, "came", worker)
    with tqdm(total=total, unit="item", leave=False, dynamic_ncols=True) as bar:
        while queue:
            now, _, what, worker = heapq.heappop(events)
            if what == "lost":
                lost += 1
                wasted += now - began[worker]
                queue.forget(worker)
                queue.again(doing.pop(worker))
                later(now + fleet.away + fleet.load, "came", worker)
            else:
                if what == "ended":
                    queue.settled(doing.pop(worker))
                    bar.update()
                offer(worker)
            for other in sorted(idle):  # a reference that is there, or an item that is back, is work for others
                if not offer(other):
                    break
    return {"hours": round(now / 3600, 3), "lost_workers": lost, "lost_hours": round(wasted / 3600, 2)}


def shards(fleet: Fleet, pairs: list[list[Job]], times: Times, speeds: list[float], seed: int) -> float:
    """Hours of a Slurm array (`--shard i/n`): every worker does its own pairs, nothing lost."""
    rng = random.Random(seed)
    slowest = 0.0
    for worker, speed in enumerate(speeds):
        own = part(pairs, (worker, len(speeds)))
        names = [REFERENCE if j.task == "reference" else j.method for pair in own for j in pair]
        slowest = max(slowest, (fleet.load + fleet.uncached * sum(rng.choice(times[n]) for n in names)) / speed)
    return round(slowest / 3600, 3)


def main() -> None:
    """Simulate, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--times", type=Path, help="a benchmark's folder, whose times are saved beside this file first")
    parser.add_argument("--methods", default="", help="of that benchmark, separated by spaces")
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.times:
        write_atomically(TIMES, json.dumps(measured(args.times, args.methods.split()), indent=1) + "\n")
    times: Times = json.loads(TIMES.read_text())
    methods = [name for name in times if name != REFERENCE]
    pairs = jobs(args.items, methods)
    rows = []
    for name, fleet in {
        "as asked: 1 % lost an hour, 5 % of the nodes at half speed": Fleet(args.workers),
        "no slow nodes": Fleet(args.workers, slow=0.0),
        "nothing lost": Fleet(args.workers, loss=0.0),
        "nothing lost, none slow": Fleet(args.workers, loss=0.0, slow=0.0),
        "10 % lost an hour": Fleet(args.workers, loss=0.1),
        "driver of 10 ms": Fleet(args.workers, driver=0.01),
    }.items():
        speeds = fleet.speeds(random.Random(args.seed))
        work = len(pairs) * fleet.uncached * sum(float(np.mean(ratios)) for ratios in times.values())
        ideal = work / sum(speeds) / 3600
        began = time.perf_counter()
        found = simulate(fleet, pairs, times, speeds, args.seed)
        row = {"fleet": name, "ideal_hours": round(ideal, 3), **found, "over_ideal": round(found["hours"] / ideal, 4)}
        row["shards_hours"] = shards(fleet, pairs, times, speeds, args.seed)
        row["simulated_in"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        print(json.dumps(row))
    about = {
        "workers": args.workers,
        "items": len(pairs) * (len(methods) + 1),
        "methods": len(methods),
        "seed": args.seed,
    }
    write_atomically(args.out, json.dumps({"about": {**about, **vars(Fleet())}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
