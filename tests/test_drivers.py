"""`stepcache bench --ray` whose driver is stopped or killed, and goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from surroundings import RAY
from test_bench import STEPS

pytest.importorskip("ray", reason="Ray is not installed (pip install 'stepcache[cluster]')")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def standing():
    """The address of a cluster that is there before and after its drivers."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield made.address
    made.shutdown()


def started(model, folder, *flags, address=None):
    """`stepcache bench` as users start it: on a cluster of its own, or on the one this machine is on."""
    (folder / "prompts.txt").write_text("a red circle\na blue square\na green triangle\na white ring\n")
    command = [sys.executable, "-m", "stepcache", "bench", "--model", model, "--prompts", str(folder / "prompts.txt")]
    command += ["--policies", "uniform:4 steps:4 uniform:6", "--steps", str(STEPS), "--out", str(folder / "results")]
    cluster = ["--ray"] if address is None else ["--ray", "auto"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | RAY
    environment |= {"RAY_ADDRESS": address} if address else {}
    return subprocess.Popen(
        [*command, *cluster, "--cpus-per-worker", "0.5", *flags],
        start_new_session=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(folder, count, process):
    deadline = time.monotonic() + 600
    while len(list((folder / "results" / "items").rglob("*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_driver_is_stopped_and_goes_on(standing, model, tmp_path, how):
    """Ctrl-C leaves a merged table; after either, no finished item is computed again."""
    process = started(model, tmp_path, "--workers", "2")
    wait_for(tmp_path, 5, process)
    os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
    said = process.communicate(timeout=600)[0]
    if how == signal.SIGINT:
        assert process.returncode == 130, said
        assert "interrupted; everything finished is in" in said
        assert "uncached" in (tmp_path / "results" / "table.txt").read_text()
    time.sleep(1)
    left = set((tmp_path / "results").rglob("*.tmp"))  # by workers that were killed as they wrote
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "items").rglob("*.json")}
    assert 5 <= len(before) < 16
    again = started(model, tmp_path, "--workers", "1", "--resume", address=standing)
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 0, said
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "results" / "items").rglob("*.json")}
    assert len(after) == 16
    assert all(after[p] == t for p, t in before.items())
    assert set((tmp_path / "results").rglob("*.tmp")) <= left
    assert not (tmp_path / "results" / "references").exists()
