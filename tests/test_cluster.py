"""Jobs on a real Ray cluster of two nodes on this machine: workers killed, a node removed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import near
from surroundings import RAY
from test_bench import PROMPTS, STEPS, bench

from stepcache.bench.results import REFERENCE, Folder, Item
from stepcache.commands.main import main
from stepcache.fleet import cluster
from stepcache.fleet.cluster import Fleet, Resources
from stepcache.fleet.jobs import Alone, Job, Jobs, Outcome
from stepcache.planning.calibration import Calibration

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'stepcache[cluster]')")
pytestmark = pytest.mark.slow
METHODS = ("one", "two", "three")
TIMES = ("seconds", "loop_seconds", "reference_seconds", "seconds_per_computed_step", "seconds_per_reused_step")


@pytest.fixture(scope="module")
def nodes():
    """Two nodes with two CPUs each; workers import this file by value."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield made
    ray.shutdown()
    made.shutdown()


def pretended(folder, seconds=0.05):
    """A stand-in worker: items without a model, a line in a log for every job begun and ended."""
    items = Folder(folder)

    def note(kind, job):
        with (folder / "log").open("a") as log:
            log.write(json.dumps([kind, os.getpid(), socket.gethostname(), job.task, job.pair[0], job.method]) + "\n")

    def work(job):
        method = REFERENCE if job.task == "reference" else job.method
        path = items.item(method, job.pair[0], job.pair[2])
        if path.exists():
            return Outcome()
        note("begun", job)
        time.sleep(seconds)
        value = float(np.random.default_rng([job.pair[0], len(method)]).normal(30, 5))
        Item(method, *job.pair, computed=4.0, psnr=value, ssim=0.9).save(path)
        note("ended", job)
        return Outcome()

    return work, {"versions": {}, "machine": "none"}


def everything(pairs):
    found = []
    for i in range(pairs):
        pair = (i, f"prompt {i}", 0)
        found += [Job("reference", pair), *(Job("item", pair, m) for m in METHODS)]
    return found


def log(folder, kind):
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [tuple(rest) for k, *rest in map(json.loads, lines) if k == kind]


def kill_one(begun):
    """Kill the worker that began something last, or the last that is still there."""
    for pid, *_ in reversed(begun):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return pid
    raise AssertionError("no worker is left")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in (folder / "items").rglob("*.json")}


def test_workers_and_a_node_are_lost(nodes, tmp_path):
    """A worker killed every 20 items, a node removed once: every item exactly once, the files of one process."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
    wanted = everything(40)
    Alone(pretended(alone, 0)[0]).run(Jobs(wanted), lambda job, outcome: None)
    spare = nodes.add_node(num_cpus=2)
    settled, killed = [], []

    def settle(job, outcome):
        assert not outcome.error
        settled.append(job)
        if len(settled) % 20 == 0:
            killed.append(kill_one(log(together, "begun")))
        if len(settled) == 70:
            threading.Thread(target=nodes.remove_node, args=(spare,)).start()

    with Fleet(lambda: pretended(together), Resources(workers=4, retries=20), together) as fleet:
        fleet.run(Jobs(wanted, retries=20), settle)
    assert Counter(settled) == Counter(wanted)
    assert len(killed) == 8
    assert contents(together) == contents(alone)
    ended = Counter(e[2:] for e in log(together, "ended"))
    assert set(ended.values()) == {1}
    assert len(ended) == len(wanted)
    assert not list(together.glob(".stepcache*"))


def test_a_poisonous_item_is_given_up(nodes, tmp_path):
    """It kills every worker that touches it; the others are done."""

    def make():
        work, about = pretended(tmp_path, 0)

        def dangerous(job):
            if job.method == "two" and job.pair[0] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(job)

        return dangerous, about

    told = {}
    with Fleet(make, Resources(workers=2, retries=2), tmp_path) as fleet:
        fleet.run(Jobs(everything(3), retries=2), lambda job, outcome: told.update({job: outcome.error}))
    failed = {job: error for job, error in told.items() if error}
    assert [(j.pair[0], j.method) for j in failed] == [(1, "two")]
    assert "its worker was lost" in next(iter(failed.values()))
    assert "tried 3 times" in next(iter(failed.values()))
    assert len(told) == 12


def test_errors_that_may_pass_are_tried_again(nodes, tmp_path):
    def make():
        def work(job):
            tries = tmp_path / f"{job.pair[0]}-{job.method}-{time.time_ns()}"
            tries.write_text("")
            count = len(list(tmp_path.glob(f"{job.pair[0]}-{job.method}-*")))
            if job.method == "one" and count < 2:
                return Outcome("RuntimeError: out of memory", again=True)
            if job.method == "two":
                return Outcome("ValueError: never", again=False)
            if job.method == "three" and count < 2:
                raise OSError(28, "No space left on device")
            return Outcome()

        return work, {"versions": {}}

    told = {}
    with Fleet(make, Resources(workers=1, retries=2), tmp_path) as fleet:
        fleet.run(Jobs(everything(1), retries=2), lambda job, outcome: told.update({job.method: outcome.error}))
    assert told == {"": "", "one": "", "two": "ValueError: never", "three": ""}
    assert len(list(tmp_path.glob("0-two-*"))) == 1


def test_workers_that_cannot_load(nodes, tmp_path):
    """One clear error, not one an item."""

    def make():
        raise FileNotFoundError("model folder '/models/x' does not exist")

    with pytest.raises(ValueError, match="cannot be used: FileNotFoundError: model folder '/models/x' does not exist"):
        Fleet(make, Resources(workers=2), tmp_path).__enter__()

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ValueError, match=r"its worker was lost: .*\(3 could not load, none could\)"):
        Fleet(killed, Resources(workers=2), tmp_path).__enter__()
    assert not list(tmp_path.glob(".*"))


class Unreadable:
    """Something older code on a worker has not got."""

    def __reduce__(self):
        return getattr, (cluster, "not_there")


def test_workers_whose_code_does_not_know_the_job(nodes, tmp_path):
    """What is sent cannot be read there: an error, not a wait without end."""
    thing = Unreadable()
    with pytest.raises(ValueError, match="not_there"):
        Fleet(lambda: thing, Resources(workers=1), tmp_path).__enter__()


@pytest.mark.parametrize("kind", ["outcome", "raised"])
def test_a_sick_worker_is_replaced(nodes, tmp_path, kind):
    """One worker of three fails whatever it touches, at once: all items are done, by the others."""
    (tmp_path / "first").mkdir()

    def make():
        sick = not (tmp_path / "first" / "sick").exists()
        (tmp_path / "first" / "sick").write_text("")
        work, about = pretended(tmp_path)

        def failing(job):
            if kind == "raised":
                raise OSError(5, "Input/output error")
            return Outcome("RuntimeError: an illegal memory access", again=True)

        return (failing if sick else work), about

    told = {}
    with Fleet(make, Resources(workers=3, retries=3), tmp_path) as fleet:
        fleet.run(Jobs(everything(10), retries=3), lambda job, outcome: told.update({job: outcome.error}))
    assert set(told) == set(everything(10))
    assert not [error for error in told.values() if error]


def test_a_worker_whose_first_load_fails_is_replaced(nodes, tmp_path):
    """Somebody can work, another could not once: a warning, another try, and the work is done."""

    def make():
        mark = tmp_path / "failed"
        if (tmp_path / "good").exists() and not mark.exists():
            mark.write_text("")
            raise RuntimeError("out of memory")
        (tmp_path / "good").write_text("")
        return pretended(tmp_path)

    told = []
    fleet = Fleet(make, Resources(workers=2), tmp_path)
    with pytest.warns(UserWarning, match="out of memory; another is tried"), fleet:  # noqa: PT031
        while fleet.loaded < 2:
            fleet.run(Jobs([Job("run", (0, "", 0))]), lambda job, outcome: None)
        fleet.run(Jobs(everything(4)), lambda job, outcome: told.append(outcome.error))
    assert told == [""] * 16


def test_a_cluster_by_its_address(nodes, model, tmp_path):
    """A process of its own, from another folder, relative paths: as users type it."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    command = [sys.executable, "-m", "stepcache", "bench", "--model", model, "--prompts", "prompts.txt"]
    flags = [
        "--policies",
        "uniform:4",
        "--steps",
        str(STEPS),
        "--out",
        "results",
        "--ray",
        nodes.address,
        "--workers",
        "1",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | RAY
    done = subprocess.run(
        [*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert len(Folder(tmp_path / "results").items()) == 4


def test_something_else_listens_there(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "REACH", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        began = time.monotonic()
        assert bench(model, tmp_path, "uniform:4", "--ray", address) == 2
    assert time.monotonic() - began < 30
    assert "did not answer as a Ray cluster" in capsys.readouterr().err


def test_workers_that_do_not_reach_the_folder(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda self, text: 0)  # here only: as if it were another machine's disc
    with pytest.raises(ValueError, match="choose an --out that all machines share"):
        Fleet(lambda: pretended(tmp_path), Resources(workers=1), tmp_path).__enter__()


def test_another_version_on_the_workers(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "identity", lambda: "0.0.9 (abcdef)")  # here only
    with pytest.raises(ValueError, match=r"here is 0\.0\.9 \(abcdef\); install the same everywhere"):
        Fleet(lambda: pretended(tmp_path), Resources(workers=1), tmp_path).__enter__()


def test_no_room_for_a_worker(nodes, tmp_path):
    with pytest.raises(TimeoutError, match="each asks for 64 CPU and 0 GPU, the cluster has"):
        Fleet(lambda: pretended(tmp_path), Resources(workers=1, cpus=64, patience=3), tmp_path).__enter__()


def test_a_bench_on_ray_is_the_bench_of_one_process(nodes, model, tmp_path, capsys):
    policies = "uniform:4 steps:4 easycache:@7,ret_steps=3"
    assert bench(model, tmp_path, policies, out="alone") == 0
    assert bench(model, tmp_path, policies, "--ray", "--workers", 2, out="together") == 0
    capsys.readouterr()
    alone, together = ({(i.method, i.index): i for i in Folder(tmp_path / n).items()} for n in ("alone", "together"))
    assert alone.keys() == together.keys()
    for key, item in alone.items():
        mine, theirs = asdict(item), asdict(together[key])
        for name in TIMES:
            mine.pop(name), theirs.pop(name)
        assert mine == near(theirs)
        clips = [(tmp_path / n / item.clip).stat().st_size for n in ("alone", "together")]
        assert min(clips) > 0
    described = [Folder(tmp_path / n).read() for n in ("alone", "together")]
    assert described[0]["searched"] == near(described[1]["searched"])
    assert described[1]["ceiling"]["psnr"] is None
    assert not (tmp_path / "together" / "references").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "together" / "items").rglob("*.json")}
    Folder(tmp_path / "together").item("uniform:4", 1, 0).unlink()
    assert bench(model, tmp_path, policies, "--ray", "--workers", 1, "--resume", out="together") == 0
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "together" / "items").rglob("*.json")}
    assert [p.name for p in before if before[p] != after[p]] == ["0001-0.json"]


def test_a_calibration_on_ray_is_the_one_of_one_process(nodes, model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    flags = [
        "calibrate",
        "--model",
        model,
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--steps",
        "16",
        "--seeds",
        "0,1",
    ]

    def same():
        alone, together = (asdict(Calibration.load(tmp_path / f"{n}.json")) for n in ("alone", "together"))
        assert alone == near(together)

    assert main([*flags, "--out", str(tmp_path / "alone.json")]) == 0
    assert main([*flags, "--out", str(tmp_path / "together.json"), "--ray", "--workers", "2"]) == 0
    same()
    # stopped before the first run came back, which is also made accelerated: that is made up for
    whole = Calibration.load(tmp_path / "together.json")
    replace(whole, runs=whole.runs[1:3]).save(tmp_path / "together.json")
    assert main([*flags, "--out", str(tmp_path / "together.json"), "--ray", "--workers", "1"]) == 0
    same()
    assert "4 run(s) of 16 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ray", "127.0.0.1:1"), "no connection"),
        (("--ray", "nonsense"), "expected host:port"),
        (("--ray", "--workers", 0), "expected at least 1"),
        (("--ray", "--gpus-per-worker", 1.5), "a whole number, or a share below 1"),
        (("--ray", "--cpus-per-worker", 0), "one must be above 0"),
        (("--ray", "--max-retries", -1), "expected 0 or more"),
    ],
)
def test_mistakes(model, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(cluster, "REACH", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert bench(model, tmp_path, "uniform:4", *flags) == 2
    assert message in capsys.readouterr().err


def test_without_ray(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert bench(model, tmp_path, "uniform:4", "--ray") == 2
    assert "pip install 'stepcache[cluster]'" in capsys.readouterr().err
