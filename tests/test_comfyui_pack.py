"""The node pack's files: what the registry and the page read."""

import asyncio
import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import samplers
from test_comfyui import Patcher, run

import stepcache
from stepcache import EasyCache, Hindsight, LeMiCa, Off, Uniform
from stepcache.planning.calibration import Calibration
from stepcache.planning.costs import plan_hindsight

PACK = Path(__file__).resolve().parent.parent / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


def test_the_registry_s_table():
    found = tomllib.loads((PACK / "pyproject.toml").read_text())
    ours = tomllib.loads((PACK.parent / "pyproject.toml").read_text())
    assert found["project"]["version"] == stepcache.__version__
    assert found["project"]["name"] == ours["project"]["name"]
    assert "comfyui" not in found["project"]["name"].lower()
    assert {"PublisherId", "DisplayName"} <= set(found["tool"]["comfy"])
    assert (PACK / "LICENSE").read_text() == (PACK.parent / "LICENSE").read_text()


def test_every_node_has_a_help_page():
    source = (PACK / "nodes.py").read_text()
    names = [line.split('"')[1] for line in source.splitlines() if "node_id=" in line]
    assert names == ["StepCache", "StepCachePlan", "StepCacheCalibrate"]
    for name in names:
        assert (PACK / "web" / "docs" / f"{name}.md").read_text().startswith("# StepCache")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_are_whole(path):
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    ours = [node for node in nodes.values() if node["type"] == "StepCache"]
    assert len(ours) == (2 if path.stem.startswith("Wan2.2") else 1)
    for node in ours:
        assert node["widgets_values"] == ["hindsight", 0.5, True, 0.05, "wan2.1-t2v-1.3B"]
    for _, source, out, target, place, _ in graph["links"]:
        assert nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][place]["link"] is not None
    assert path.with_suffix(".jpg").stat().st_size > 20_000


def test_there_are_five():
    assert [path.stem for path in WORKFLOWS] == [
        "FLUX.1 dev",
        "HunyuanVideo-1.5 T2V",
        "Qwen-Image",
        "Wan2.1 T2V",
        "Wan2.2 T2V",
    ]


class Put(dict):
    """An input or output as it was declared."""

    def __init__(self, name="", **settings):
        super().__init__(name=name, **settings)


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """nodes.py beside stand-ins for the two modules of ComfyUI that it imports."""
    kind = SimpleNamespace(Input=Put, Output=Put)
    io = SimpleNamespace(
        ComfyNode=object,
        Schema=lambda **settings: SimpleNamespace(**settings),
        NodeOutput=lambda *outputs: outputs,
        **dict.fromkeys(("Model", "Combo", "Float", "Boolean", "Int", "String"), kind),
    )
    latest = ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object
    paths = ModuleType("folder_paths")
    paths.get_input_directory = paths.get_output_directory = lambda: str(tmp_path)
    for name, module in (("comfy_api", ModuleType("comfy_api")), ("comfy_api.latest", latest), ("folder_paths", paths)):
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("stepcache_nodes", PACK / "nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_input_has_a_tooltip_and_the_rare_ones_are_folded(nodes):
    folded = {}
    for node in asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list()):
        schema = node.define_schema()
        assert all(put["tooltip"] for put in (*schema.inputs, *schema.outputs)), schema.node_id
        folded[schema.node_id] = [
            put["name"] for put in schema.inputs if getattr(put, "extra_dict", {}).get("advanced")
        ]
    assert folded == {"StepCache": ["threshold", "table"], "StepCachePlan": [], "StepCacheCalibrate": []}


@pytest.mark.parametrize(
    ("budget", "evaluations", "expected"),
    [(0.5, 20, 10), (1, 20, 20), (0.01, 20, 2), (7, 20, 7), (0.28, 50, 14), (20, 20, 20)],
)
def test_budgets_are_shares_or_numbers(nodes, budget, evaluations, expected):
    assert nodes.computed(budget, evaluations) == expected


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, 2.5, float("nan")])
def test_other_budgets_are_refused_before_any_run(nodes, budget):
    with pytest.raises(ValueError, match="expected a share"):
        nodes.StepCache.execute(Patcher(), "hindsight", budget, True)


def test_policies_of_the_node(nodes):
    made = [
        nodes.policies(m, 0.5, 0.05, "wan2.1-t2v-1.3B")(50) for m in ("hindsight", "uniform", "lemica", "easycache")
    ]
    assert made == [Hindsight(0.5), Uniform(25), LeMiCa(25, "wan2.1-t2v-1.3B"), EasyCache(0.05)]
    assert nodes.policies("hindsight", 1.0, 0.05, "")(20) == Off()
    with pytest.raises(ValueError, match="30 evaluations, but this sampler makes 20"):
        nodes.policies("hindsight", 30, 0.05, "")(20)


def test_nodes_patch_the_model_or_leave_it(nodes, tmp_path):
    model = Patcher()
    assert nodes.StepCache.execute(model, "hindsight", 0.5, False) == (model,)
    (found,) = nodes.StepCache.execute(model, "hindsight", 0.5, True)
    assert run(found)[1] == 10
    with pytest.raises(FileNotFoundError, match="does not exist"):
        nodes.StepCachePlan.execute(model, "nothing.json")
    for seed in (0, 1):
        (watched,) = nodes.StepCacheCalibrate.execute(model, f"prompt {seed}", seed, "calibration.json")
        assert run(watched, seed=seed, batch=1)[1] == 20
    calibration = Calibration.load(tmp_path / "calibration.json")
    assert [r.prompt for r in calibration.runs] == ["prompt 0", "prompt 1"]
    plan_hindsight(calibration, 8).save(tmp_path / "plan.json")
    (found,) = nodes.StepCachePlan.execute(model, "plan.json")
    assert run(found)[1] == 8
    with pytest.raises(ValueError, match="scheduler"):
        run(found, samplers.two_step)
