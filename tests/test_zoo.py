"""The zoo: every model loads with stock diffusers and its card is there; the benchmark runs, resumes and refuses."""

import json
import sys
from collections import defaultdict

import numpy as np
import pages
import pytest
import quality
import subjects
import torch
import zoo
from subjects import FOLDERS, Peer, Series, Setting, Subject

import stepcache
from stepcache import Hindsight, Uniform
from stepcache.bench import peers

KINDS = {
    "tiny-wan": ("WanPipeline", "UniPCMultistepScheduler"),
    "emoji": ("QwenImagePipeline", "FlowMatchEulerDiscreteScheduler"),
    "landscapes": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "patterns": ("CogVideoXPipeline", "CogVideoXDDIMScheduler"),
}
SMALL = Setting(8)


@pytest.fixture(scope="module", params=FOLDERS)
def subject(request):
    return Subject(request.param)


def test_every_model_is_a_stock_pipeline_of_its_kind(subject):
    pipe, folder = subject.pipe, FOLDERS[subject.name]
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == KINDS[subject.name]
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if subject.name != "tiny-wan":
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 12 * 2**20
        card = (folder / "README.md").read_text()
        figures = json.loads((folder / "training.json").read_text())
        assert all(f"{run['steps']:,}" in card for run in figures["stages"].values())
    kinds = [set(texts) for texts in subject.prompts.values()]
    assert sum(map(len, kinds)) == len(set.union(*kinds)), "no prompt is of two kinds"


def test_prompts_and_guidance_matter(subject):
    texts = subject.prompts["evaluation"][:2]
    clips = subject.sample(texts, [1, 1], Setting(12))
    assert clips.ndim == 5
    assert clips.shape[-1] == 3
    assert np.abs(clips[0] - clips[1]).mean() > 0.02, "one seed, two prompts"
    other = subject.sample(texts, [1, 1], Setting(12, 1.5))
    assert np.abs(clips - other).mean() > 0.003


def test_methods_are_compared_with_the_model_s_own_run(subject):
    series = Series(subject, SMALL, "evaluation", 2)
    assert all(row["psnr"] > 60 for row in series.score(Uniform(8)))
    some = series.score(Hindsight(5))
    assert [row["computed"] for row in some] == [5, 5]
    alone = series.score(Hindsight(5), alone=True)
    assert [row["psnr"] for row in alone] == pytest.approx([row["psnr"] for row in some], abs=0.2)
    whole = series.on_grid(tuple(range(8)))
    assert all(row["psnr"] > 60 for row in whole), "the sampler on all of its own levels"
    assert [row["computed"] for row in series.on_grid(4)] == [4, 4]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The benchmark of one model, two prompts, eight steps."""
    monkeypatch.setattr(zoo, "OWN", (SMALL,))
    monkeypatch.setattr(zoo, "FEW_STEPS", {})
    monkeypatch.setattr(zoo, "BUDGETS", {8: (5,)})
    monkeypatch.setattr(zoo, "CALIBRATION_RUNS", 2)
    monkeypatch.setattr(zoo, "TRIALS", 2)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["zoo.py", "--out", str(tmp_path / "zoo.json"), "--prompts", "2", *flags])
        zoo.main()
        return json.loads((tmp_path / "zoo.json").read_text())

    return run


def test_the_benchmark_runs_every_method_and_resumes(small, monkeypatch, tmp_path):
    first = small("--model", "landscapes")
    (cell,) = first["cells"].values()
    assert set(cell) == set(zoo.METHODS)
    ran = {name for name, rows in cell.items() if rows}
    assert ran >= {
        "fewer steps",
        "uniform reuse",
        "VDE",
        "DMD",
        "hindsight",
        "hindsight, planned",
        "hindsight, replayed",
    }
    expected = first["cells"]["landscapes; 8 steps; 5"].pop("hindsight")
    (tmp_path / "zoo.json").write_text(json.dumps(first))
    calls = []
    real = Series.score
    monkeypatch.setattr(Series, "score", lambda *a, **k: calls.append(a[1]) or real(*a, **k))
    assert small("--model", "landscapes")["cells"]["landscapes; 8 steps; 5"]["hindsight"] == expected
    assert calls == [Hindsight(5)]


def test_the_pages_say_what_was_measured(tmp_path):
    """Two cells written by hand: one that is won, one that is lost."""
    row = lambda *values, n=5: [{"computed": n, "psnr": v} for v in values]  # noqa: E731
    methods = {
        "uniform reuse": row(30.0, 34.0),
        "fewer steps": row(31.0, 35.0),
        "our steps: extrapolation": row(36.0, 38.0),
        "hindsight": row(33.0, 39.0),
        "hindsight, planned": row(35.0, 40.0),
        "hindsight, planned on 4 prompts": row(34.0, 39.0),
    }
    lost = {**methods, "hindsight": row(28.0, 36.0), "fewer steps": []}
    other = {"uniform reuse": row(30.0, 34.0), "VDE": row(20.0, 21.0)}
    results = {
        "cells": {"emoji; 50 steps; 5": methods, "emoji; 28 steps; 5": lost, "patterns; 50 steps; 5": other},
        "about": defaultdict(str),
    }
    won, behind = pages.differences(results)
    assert (won["rival"], won["mean"], won["worst"]) == ("fewer steps", 3.0, 3.0)
    assert (won["planned"], won["planned worst"], won["gain"], won["four"]) == (0.5, -1.0, 1.5, -1.0)
    assert (behind["rival"], behind["mean"], behind["worst"]) == ("uniform reuse", 0.0, -2.0)
    text = pages.page(results)
    assert "Not run: VDE on emoji; fewer steps on patterns; hindsight" in text
    assert "| by how much, averaged over cells | +1.5 dB |" in text
    assert "| its worst prompt at most 0.5 dB below uniform reuse's | 1 of 2 cells |" in text
    assert "| **hindsight** | 36.0 / 33.0 / 33.0 |" in text
    assert text.count("\n| fewer steps |") == 1, "a table leaves out what has no row in it"
    pages.draw(results, tmp_path / "figures" / "zoo.svg")
    assert (tmp_path / "figures" / "zoo.svg").stat().st_size > 1000


def test_a_peer_s_computed_steps_are_counted(monkeypatch):
    pytest.importorskip("cache_dit", reason="cache-dit is not installed (pip install 'stepcache[peers]')")
    for name in ("landscapes", "tiny-wan"):  # one call a step, and two
        series = Series(Subject(name), SMALL, "evaluation", 2)
        rows = series.score(Peer(peers.dbcache_on((0, 2, 5, 7), "dmd")))
        assert [row["computed"] for row in rows] == [4, 4]
        assert all(row["psnr"] < 60 for row in rows)
        assert all(row["psnr"] > 60 for row in series.score(Uniform(8))), "nothing of it stays"


def test_an_absent_package_is_said_and_its_rows_stay_open(small, monkeypatch, capsys):
    with monkeypatch.context() as m:
        m.setattr(peers.importlib.util, "find_spec", lambda name: None)
        found = small("--model", "landscapes", "--only", "cache-dit, DMD;uniform reuse")
    assert "cache-dit, DMD was not run: cachedit needs cache-dit: pip install" in capsys.readouterr().out
    assert set(found["cells"]["landscapes; 8 steps; 5"]) == {"uniform reuse"}


def test_few_steps_have_methods_and_a_table_of_their_own(small, monkeypatch):
    monkeypatch.setattr(zoo, "OWN", ())
    monkeypatch.setattr(zoo, "FEW_STEPS", {8: (5,)})
    (cell,) = small("--model", "landscapes")["cells"].items()
    assert set(cell[1]) == set(zoo.ON_FEW)
    text = pages.few_steps({"cells": dict([cell])})
    assert text.splitlines()[2].startswith("| landscapes | 8 | 5 | ")
    assert not list(pages.differences({"cells": dict([cell])})), "no cells of the verdict"


def test_what_clips_show_is_judged(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "BUDGETS", (30,))
    monkeypatch.setattr(quality, "SHOWN", ("uniform reuse",))
    path = tmp_path / "quality.json"
    monkeypatch.setattr(sys, "argv", ["quality.py", "--out", str(path), "--prompts", "4"])
    quality.main()
    found = json.loads(path.read_text())
    whole, reused = found["rows"]["uncached"]["50"], found["rows"]["uniform reuse"]["30"]
    assert (whole["psnr"], whole["computed"], reused["computed"]) == (100, 50, 30)
    assert whole["colour"] >= 0.75
    assert 20 < reused["psnr"] < 60
    assert "| uniform reuse | " in pages.judged(found)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--out", str(path), "--prompts", "5"])
    with pytest.raises(SystemExit, match="has 4 prompts"):
        quality.main()


def test_what_cannot_be_run_is_said(small, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"landscapes has \d+ evaluation prompts; 99 were asked for"):
        small("--model", "landscapes", "--only", "uniform reuse", "--prompts", "99")
    with pytest.raises(SystemExit, match="no method nothing"):
        small("--only", "nothing")
    monkeypatch.setitem(subjects.FOLDERS, "emoji", tmp_path / "gone")
    with pytest.raises(SystemExit, match=r"train_zoo.py emoji --work"):
        small("--model", "emoji", "--only", "uniform reuse")


def test_an_interrupted_benchmark_keeps_what_it_has(small, monkeypatch, tmp_path):
    def stopped(bench, budget):
        raise KeyboardInterrupt

    monkeypatch.setitem(zoo.METHODS, "fewer steps", stopped)
    with pytest.raises(SystemExit, match="the same command resumes"):
        small("--model", "landscapes", "--only", "uniform reuse;fewer steps")
    (cell,) = json.loads((tmp_path / "zoo.json").read_text())["cells"].values()
    assert list(cell) == ["uniform reuse"]


def test_a_setting_leaves_the_pipeline_as_it_was(subject):
    before = subject.pipe.scheduler
    weights = {name: p.clone() for name, p in subject.pipe.transformer.named_parameters()}
    with subject.as_set(Setting(8, dtype="bfloat16")):
        assert subject.pipe.transformer.dtype == torch.bfloat16
        subject.sample(subject.prompts["evaluation"][:1], [0], Setting(2))
    assert all(torch.equal(p, weights[name]) for name, p in subject.pipe.transformer.named_parameters())
    assert subject.pipe.scheduler is before
    with stepcache.accelerate(subject.pipe, Hindsight(4)) as run:
        subject.sample(subject.prompts["evaluation"][:1], [0], SMALL)
    assert len(run.summary().computed) == 4
    assert [w for w in run.summary().warnings if "only 8 steps" not in w] == []
