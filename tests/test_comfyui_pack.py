"""The node pack's files: what the registry and the page read."""

import json
import tomllib
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


def test_the_registry_s_table():
    found = tomllib.loads((PACK / "pyproject.toml").read_text())
    ours = tomllib.loads((PACK.parent / "pyproject.toml").read_text())
    import stepcache

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
