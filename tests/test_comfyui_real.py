"""The node pack in the real ComfyUI, headless, over its HTTP interface, with the embedded model.

Set COMFYUI to a checkout and COMFYUI_PYTHON to the Python that runs it (torch, ComfyUI's requirements, safetensors).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CHECKOUT, PYTHON = os.environ.get("COMFYUI"), os.environ.get("COMFYUI_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHECKOUT and PYTHON), reason="COMFYUI and COMFYUI_PYTHON do not name a ComfyUI"),
]
SETTINGS = {"method": "hindsight", "budget": 0.5, "enabled": True, "threshold": 0.05, "table": "wan2.1-t2v-1.3B"}


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """A server with our nodes and the testbed's; a function that runs a graph and returns the latent or the error."""
    sys.path.insert(0, str(HERE / "comfyui"))
    from client import Comfy, graph
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("comfyui")
    bed, base = folder / "bed", folder / "base"
    export = [sys.executable, HERE / "comfyui" / "export_tiny_wan.py"]
    subprocess.run([*export, "--model", HERE.parent / "assets" / "tiny-wan", "--out", bed], check=True)
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / "stepcache").symlink_to(HERE.parent / "comfyui")
    (base / "custom_nodes" / "testbed").symlink_to(HERE / "comfyui" / "testbed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--cpu --listen 127.0.0.1 --port {port} --disable-api-nodes --preview-method none --dont-print-server"
    command = [PYTHON, HERE / "comfyui" / "run_comfy.py", *flags.split(), "--base-directory", base]
    command += ["--database-url", f"sqlite:///{folder}/comfyui.db"]
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    numbers = iter(range(1000))
    try:
        client = Comfy(f"http://127.0.0.1:{port}")
        client.wait_until_up()

        def run(patch=None, change=None, **settings):
            out = folder / f"{next(numbers)}.safetensors"
            given = graph(bed=str(bed), out=str(out), patch=patch, **{"steps": 20, **settings})
            if change is not None:
                change(given)
            try:
                client.run(given)
            except RuntimeError as error:
                return str(error)
            return load_file(out)["latents"]

        run.log, run.base = folder / "log", base
        yield run
    finally:
        server.terminate()
        server.wait(30)


def off(found, truth):
    """Relative error of a latent."""
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_half_the_evaluations_and_none_skipped(comfy, sampler):
    truth = comfy(sampler=sampler)
    errors = [
        off(comfy(("StepCache", {**SETTINGS, "method": m}), sampler=sampler), truth) for m in ("hindsight", "uniform")
    ]
    assert errors[0] < errors[1] < 0.3
    count = 39 if sampler == "heun" else 20
    assert f"{count // 2} of {count} evaluations computed" in comfy.log.read_text() or sampler == "heun"
    for same in ({"budget": 1.0}, {"enabled": False}):
        assert torch.equal(comfy(("StepCache", {**SETTINGS, **same}), sampler=sampler), truth)


def test_split_branches_are_one_evaluation(comfy):
    patch = ("StepCache", SETTINGS)
    torch.testing.assert_close(comfy(patch), comfy(patch, batching="split"), rtol=1e-4, atol=1e-4)


def test_a_calibration_a_plan_and_where_it_fits(comfy):
    from stepcache.planning.calibration import Calibration
    from stepcache.planning.costs import plan_hindsight

    truth = comfy()
    for seed in (7, 8):
        watched = comfy(("StepCacheCalibrate", {"prompt": "a", "seed": seed, "file": "cal.json"}), seed=seed)
        assert seed != 7 or torch.equal(watched, truth)
    plan = plan_hindsight(Calibration.load(comfy.base / "output" / "cal.json"), 9)
    plan.save(comfy.base / "input" / "plan.json")
    patch = ("StepCachePlan", {"plan": "plan.json"})
    assert off(comfy(patch), truth) < 0.2
    assert "made for 20 steps (the run: 39), scheduler euler (the run: heun)" in comfy(patch, sampler="heun")
    assert "made for 20 steps (the run: 30)" in comfy(patch, steps=30)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (("StepCache", {**SETTINGS, "budget": 0.0}), "StepCache: ValueError: the budget is 0"),
        (("StepCache", {**SETTINGS, "budget": 30}), "KSampler: ValueError: the budget is 30 evaluations"),
        (("StepCache", {**SETTINGS, "method": "lemica"}), "LeMiCa has no published schedule"),
        (("StepCachePlan", {"plan": "none.json"}), "does not exist"),
    ],
)
def test_errors_are_the_node_s_own(comfy, patch, message):
    assert message in comfy(patch)


@pytest.mark.parametrize("before", [True, False])
def test_the_native_caches_are_refused(comfy, before):
    native = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}

    def change(graph):
        first, last = ("lazy", "patch") if before else ("patch", "lazy")
        graph["lazy"] = {"class_type": "LazyCache", "inputs": {"model": ["model", 0], **native}}
        graph[last]["inputs"]["model"], graph["sample"]["inputs"]["model"] = [first, 0], [last, 0]
        graph[first]["inputs"]["model"] = ["model", 0]

    assert "carries the native EasyCache or LazyCache" in comfy(("StepCache", SETTINGS), change)


@pytest.fixture(scope="module")
def kinds():
    """What `comfyui/kinds.py` measured, by kind."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([PYTHON, HERE / "comfyui" / "kinds.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    return {row["kind"]: row for row in rows}


@pytest.mark.parametrize(
    "kind", ["t2v", "i2v", "sound", "control", "lora", "compiled", "areas", "experts", "fp8", "bf16"]
)
def test_kinds_of_models_and_patches(kinds, kind):
    row = kinds[kind]
    assert row["none"] == 0
    assert 0 < row["half"] < 0.3
    if kind != "experts":
        assert row["model"][0] == 2 * row["model"][1]
        assert row["again"]


def test_a_lora_may_come_before_the_node_or_after(kinds):
    assert kinds["lora"]["changed"]
    assert kinds["lora"]["before as after"]


def test_a_compiled_model_has_no_new_graph_after_its_second_step(kinds):
    assert len(set(kinds["compiled"]["graphs"][1:])) == 1
