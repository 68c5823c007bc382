"""The list of published figures, and the way from a name to a policy."""

import json

import pytest

from stepcache import LeMiCa, MagCache, TeaCache, all_presets, preset
from stepcache.commands.main import main
from stepcache.methods import lemica_schedules as lemica
from stepcache.methods import magcache_ratios as magcache
from stepcache.methods import teacache_coefficients as teacache

LEMICA = "wan2.1-t2v-1.3B wan2.1-t2v-14B wan2.1-i2v-14B hunyuanvideo-1.5 qwen-image qwen-image-2512 z-image-turbo \
flux.1-dev flux.2-dev flux.2-klein-base-9B ernie-image"
MAGCACHE = "wan2.1-t2v-14B wan2.1-t2v-1.3B wan2.1-i2v-14B-480p wan2.1-i2v-14B-720p wan2.1-vace-1.3B wan2.2-t2v-A14B \
wan2.2-i2v-A14B wan2.2-ti2v-5B-t2v wan2.2-ti2v-5B-i2v hunyuanvideo-720p hunyuanvideo-544p hunyuanvideo-1.5-i2v-480p \
flux.1-dev flux.1-kontext qwen-image qwen-image-edit omnigen2-t2i open-sora-1.2"
TEACACHE = "wan2.1-t2v-1.3B wan2.1-t2v-14B wan2.1-i2v-14B-480p wan2.1-i2v-14B-720p"


def test_what_was_published_is_there_but_for_what_the_docs_leave_out():
    """Names written out here, not read from the tables."""
    listed = {(p.method, p.model) for p in all_presets()}
    for method, names in (("lemica", LEMICA), ("magcache", MAGCACHE), ("teacache", TEACACHE)):
        assert {m for kind, m in listed if kind == method} == set(names.split())


def test_every_published_table_is_listed_with_its_source():
    listed = {(p.method, p.model) for p in all_presets()}
    assert {("lemica", m) for m in lemica.SCHEDULES} <= listed
    assert {("magcache", m) for m in magcache.RATIOS} <= listed
    assert {("teacache", m) for m in teacache.COEFFICIENTS} <= listed
    assert all(p.source for p in all_presets())
    assert {"qwen-image", "flux.1-dev", "wan2.2-t2v-A14B", "hunyuanvideo-1.5"} <= {m for _, m in listed}


@pytest.mark.parametrize("p", all_presets(), ids=lambda p: f"{p.method}:{p.model}")
def test_every_preset_is_reachable_by_name(p):
    policy = preset(f"{p.method}:{p.model}")
    assert policy.model == p.model
    if p.method == "lemica":
        assert [LeMiCa(b, p.model).plan().budget for b in p.budgets] == list(p.budgets)
    elif p.method == "magcache" and p.budgets:
        assert policy.plan().budget == p.budgets[0]


def test_names_budgets_and_mistakes():
    assert preset("lemica:qwen-image", 17) == LeMiCa(17, "qwen-image")
    assert isinstance(preset("magcache:flux.1-dev"), MagCache)
    assert isinstance(preset("teacache:wan2.1-t2v-14B"), TeaCache)
    with pytest.raises(ValueError, match=r"no preset 'lemica:quen-image'; the nearest are lemica:qwen-image"):
        preset("lemica:quen-image")
    with pytest.raises(ValueError, match="10, 17, 25 of 50"):
        preset("lemica:qwen-image", 18)
    with pytest.raises(ValueError, match="takes no budget"):
        preset("magcache:flux.1-dev", 10)


def test_the_command(capsys):
    assert main(["presets", "qwen"]) == 0
    out = capsys.readouterr().out
    assert "qwen-image-2512" in out
    assert "25 17 10" in out
    assert "wan2.1" not in out
    assert main(["presets", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(all_presets())
    assert main(["presets", "wan9"]) == 2
    assert "nearest models are wan2." in capsys.readouterr().err


def test_magcache_on_wan22_keeps_the_whole_first_expert_of_i2v():
    plan = MagCache(model="wan2.2-i2v-A14B").plan(num_steps=40, handover=15)
    assert set(range(15)) <= set(plan.computed)
    assert plan.budget < 40
    t2v = MagCache(model="wan2.2-t2v-A14B").plan(num_steps=40, handover=26)
    assert {26, *range(10), 39} <= set(t2v.computed)
    assert not set(range(11, 26)) <= set(t2v.computed)
