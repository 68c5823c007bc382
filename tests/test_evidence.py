"""`stepcache evidence` on a real, untrained pipeline: what is decided, run, resumed, refused, merged."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepcache.bench.evidence import session, setup
from stepcache.bench.evidence.rows import Row, as_table, load_document, merged, rows_of
from stepcache.bench.evidence.setup import Cost, budgets_of, computed_of, decided, published
from stepcache.bench.runs import Runner
from stepcache.commands import evidence
from stepcache.commands.main import main

STEPS = 8
PROMPTS = ["a red circle", "a blue square", "a green star", "a cyan ring", "a white cross", "a pink dot"]


@pytest.fixture
def small(monkeypatch):
    """Two prompts, two for planning, one trial, no search."""
    monkeypatch.setattr(setup, "MOST_PROMPTS", 2)
    monkeypatch.setattr(setup, "TRIALS", (1,))
    monkeypatch.setattr(setup, "PEERS_SHARE", 0.0)


def collect(model, folder, *flags):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = ["--model", model, "--prompts", str(folder / "prompts.txt"), "--steps", str(STEPS)]
    return main(["evidence", *asked, "--out", str(folder / "out"), *map(str, flags)])


@pytest.fixture
def counted(monkeypatch):
    """Runs of the pipeline, warm-up apart: (method, prompt)."""
    runs, real = [], Runner._run

    def run(self, contender, pair):
        runs.append((contender.name, pair[1]))
        return real(self, contender, pair)

    monkeypatch.setattr(Runner, "_run", run)
    return runs


@pytest.mark.slow
def test_from_an_empty_folder_to_the_page_and_nothing_twice(model, tmp_path, capsys, small, counted, monkeypatch):
    """Interrupted in the middle of the first prompt, and resumed."""
    real, seen = Runner.item, []

    def item(self, contender, pair):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(contender.name)
        return real(self, contender, pair)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "item", item)
        assert collect(model, tmp_path, "--hours", 1) == 130
    out = tmp_path / "out"
    assert (out / "plan-4.json").is_file()
    before = (out / "plan-4.json").read_text()
    assert collect(model, tmp_path, "--hours", 1) == 0
    assert (out / "plan-4.json").read_text() == before
    methods = ["uncached", "hindsight:4", "uniform:4", "spectrum:4", "steps:4", "taylorseer,budget=4"]
    methods += ["sampler:euler", "plan:plan-4.json"]
    assert sorted(counted) == sorted((method, prompt) for method in methods for prompt in PROMPTS[:2])
    said = capsys.readouterr().out
    assert "control: with all steps computed, reuse and Hindsight are bit-identical to the uncached run" in said
    assert "an uncached run takes about" in said
    found = load_document(out)
    assert (found["state"], found["control"]) == ("complete", "identical")
    rows = {row["method"]: Row(**row) for row in found["rows"]}
    assert set(rows) == set(methods)
    assert {rows[m].prompts for m in methods} == {2}
    assert all(rows[m].computed == 4 for m in methods if m[-1] == "4" or "4." in m)
    assert rows["uncached"].psnr is None
    assert rows["hindsight:4"].psnr > 0
    assert rows["hindsight:4"].seconds >= rows["hindsight:4"].loop_seconds > 0
    assert len(found["prompts"]) == 2
    assert PROMPTS[0] not in json.dumps(found)
    assert "<html" in (out / "report.html").read_text()
    assert "plan:plan-4.json, hindsight, planned" in (out / "evidence.txt").read_text()
    counted.clear()
    assert collect(model, tmp_path) == 0
    assert counted == []
    assert collect(model, tmp_path, "--guidance", 4) == 2
    assert "holds evidence of request" in capsys.readouterr().err
    assert main(["evidence", "--merge", str(out), str(out / "evidence.json"), "--out", str(tmp_path / "t.md")]) == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2] == lines[3]
    assert str(tmp_path) not in (out / "evidence.json").read_text()
    assert "4 of 8" in lines[2]


@pytest.mark.parametrize("broken", ["uncached", "uniform:8", "hindsight:8"])
def test_a_control_row_that_is_not_identical_stops_it(model, tmp_path, capsys, small, monkeypatch, broken):
    real, calls = setup.run_once, []

    def run_once(pipe, request, contender):
        result = real(pipe, request, contender)
        calls.append(contender.name)
        wrong = contender.name == broken and (broken != "uncached" or calls.count("uncached") == 2)
        latents = (*result.latents[:-1], result.latents[-1] + 1e-6)  # nothing that 8 bits show
        return replace(result, latents=latents) if wrong else result

    monkeypatch.setattr(setup, "run_once", run_once)
    assert collect(model, tmp_path) == 1
    said = capsys.readouterr().out
    where = {"uncached": "two uncached runs differ", "uniform:8": "the model's call", "hindsight:8": "sampler's"}
    assert "the control row is not identical" in said
    assert where[broken] in said
    assert not (tmp_path / "out" / "items").exists()
    assert not (tmp_path / "out" / "evidence.json").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--hours", "0"), "--hours is 0; expected more than 0"),
        (("--hours", "0.00001"), "--hours 1e-05 are too few: loading the model, a control, and one prompt"),
        (("--steps", "5"), "a run of 5 steps is too short"),
        (("--merge", "nowhere"), "has no effect here"),
        (("--device", "cuda"), "--device cuda cannot be used here"),
    ],
)
def test_bad_input(model, tmp_path, capsys, flags, says):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert collect(model, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert says in error
    assert not (tmp_path / "out" / "items").exists()


def test_too_little_memory_is_said_with_what_fits(model, tmp_path, capsys, monkeypatch, small):
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "free_bytes", lambda device: 1000)
        assert collect(model, tmp_path) == 2
    assert "GiB in float32 and cpu has 0.0 GiB free; use --offload" in capsys.readouterr().err

    def warm_up(self):
        raise torch.OutOfMemoryError("no room")

    def sample(pipe, request):
        if request.width > 200:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Runner, "warm_up", warm_up)
    monkeypatch.setattr(session, "sample_latent", sample)
    assert collect(model, tmp_path, "--width", 512, "--height", 512) == 2
    assert "512 x 512 needs more memory than cpu has; --width 160 --height 160 fits" in capsys.readouterr().err


def test_not_a_pipeline_not_evidence_and_nothing_to_do(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    for arguments, says in (
        (["--model", str(tmp_path)], "has no model_index.json"),
        ([], "give --model, or --merge"),
        (["--merge", str(tmp_path / "nowhere")], "does not exist"),
        (["--merge", str(tmp_path / "a.json")], "a.json is no evidence, or damaged"),
    ):
        assert main(["evidence", *arguments]) == 2
        assert says in capsys.readouterr().err


@given(
    st.integers(8, 100),
    st.floats(0.01, 1e4),
    st.floats(0.0, 1e3),
    st.floats(1.0, 1e7),
    st.integers(1, 40),
    st.booleans(),
)
def test_what_is_decided_fits_the_hours(steps, loop, around, seconds, count, calibrated):
    """Or is refused; more hours never mean less."""
    cost, prompts = Cost(loop, around, steps), ([f"p{i}" for i in range(count)], ["a", "b"] if calibrated else [])

    def choose(seconds):
        hours = None if seconds is None else seconds / 3600
        return decided(steps, ["sampler:euler"], ["fbcache:@10"], prompts, cost, hours)

    try:
        found = choose(seconds)
    except ValueError:
        least = choose(None)
        bare = [m for m in least.methods if not m.startswith(("plan:", "fbcache"))]
        assert seconds < cost.control() + cost.prompt(bare) + 1e-3
        return
    assert cost.searching(found.methods) <= setup.PEERS_SHARE * seconds + 1e-6
    assert not found.trials or cost.planning(found) <= setup.PLANNING_SHARE * seconds + 1e-6
    more = choose(2 * seconds)
    assert set(found.methods) <= set(more.methods)
    assert found.trials <= more.trials
    assert (found.trials > 0) <= calibrated
    assert len(found.prompts) == min(count, setup.MOST_PROMPTS)


def test_budgets_and_what_methods_compute():
    assert budgets_of(50) == (25, 20, 17, 12)
    assert budgets_of(8) == (4,)
    names = ("hindsight:20", "fbcache:@10", "plan:plan-17.json", "taylorseer,budget=12", "steps:90", "sampler:euler")
    assert [computed_of(m, 50) for m in names] == [20, 10, 17, 12, 50, 50]
    assert published("wan2.1-t2v-1.3B", (25, 20, 17, 12), 50) == ["lemica:25", "lemica:20", "lemica:17", "magcache"]
    assert published("wan2.1-t2v-1.3B", (25,), 40) == []
    assert published(None, (25,), 50) == []


def test_rows_of_identical_clips_of_one_prompt_and_of_failures(tmp_path):
    """An identical clip is not in the mean and does not hide it; one prompt has no spread; who failed is not best."""
    from stepcache.bench.results import Folder, Item

    folder, setting = (
        Folder(tmp_path),
        setup.Setup((4,), ("hindsight:4", "uniform:4", "spectrum:4", "fbcache:@4"), 0, ("a", "b", "c"), ()),
    )
    folder.write({"request": {"steps": 8}, "unsearched": {"fbcache:@4": "no such block"}})
    psnr = {
        "uncached": (None,) * 3,
        "hindsight:4": (41.0, None, 39.0),
        "uniform:4": (30.0, 31.0, 32.0),
        "spectrum:4": (50.0,),
    }
    for method, values in psnr.items():
        for i in range(3):
            error = "" if i < len(values) else "broken"
            known = {"computed": 8.0 if method == "uncached" else 4.0, "loop_seconds": 1.0, "reference_seconds": 1.0}
            item = Item(
                method, i, "a", 0, **known, seconds=1.0, psnr=None if error else values[i], ssim=1.0, error=error
            )
            item.save(folder.item(method, i, 0))
    rows = {r.method: r for r in rows_of(folder, setting)}
    ours = rows["hindsight:4"]
    assert (ours.psnr, ours.identical, ours.psnr_worst, ours.failed) == (40.0, 1, 39.0, 0)
    assert ours.psnr_std == pytest.approx(2**0.5)
    assert (rows["spectrum:4"].psnr, rows["spectrum:4"].psnr_std, rows["spectrum:4"].failed) == (50.0, None, 2)
    assert "fbcache:@4" not in rows
    text = as_table(list(rows.values()))
    assert "40.00    1.4   39.0" in text
    assert "(1 identical, not in the mean)" in text
    found = {"model": "m", "machine": "x", "dtype": "float32", "versions": {"stepcache": "0"}, "request": {"steps": 8}}
    line = merged([{**found, "setup": {"budgets": [4]}, "rows": [asdict(r) for r in rows.values()]}]).splitlines()[2]
    assert "| 40.0 ± 1.4, worst 39.0 | – | 31.0 ± 1.0, worst 30.0 (uniform) |" in line


def test_merging_takes_equal_budgets_only():
    rows = [
        Row("hindsight:7", "", 2, 0, 7, 1, psnr=20.0, psnr_worst=19.0),
        Row("uniform:8", "", 2, 0, 8, 1, psnr=27.0, psnr_worst=26.0),
    ]
    found = {"model": "m", "machine": "x", "dtype": "float32", "versions": {"stepcache": "0"}, "request": {"steps": 20}}
    line = merged([{**found, "setup": {"budgets": [7]}, "rows": [asdict(r) for r in rows]}]).splitlines()[2]
    assert line.endswith("| 7 of 20 | 20.0, worst 19.0 | – | – | – | 2 |")


@pytest.mark.slow
def test_a_cache_that_fails_in_its_search_and_lost_latents_do_not_end_it(model, tmp_path, monkeypatch, small, capsys):
    monkeypatch.setattr(setup, "PEERS_SHARE", 1.0)
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None)
    real = Runner.searched

    def searched(self, method):
        raise ValueError("FirstBlockCache does not know this block")

    monkeypatch.setattr(Runner, "searched", searched)
    assert collect(model, tmp_path) == 0
    found = load_document(tmp_path / "out")
    assert found["failed_searches"] == ["fbcache:@4"]
    assert "fbcache:@4" not in {row["method"] for row in found["rows"]}
    monkeypatch.setattr(Runner, "searched", real)
    (tmp_path / "out" / "plan-4.json").unlink()
    (tmp_path / "out" / "uncached.safetensors").write_bytes(b"half")
    assert collect(model, tmp_path) == 0
    assert (tmp_path / "out" / "plan-4.json").is_file()
    capsys.readouterr()
    (tmp_path / "out" / "setup.json").write_text("{")
    assert collect(model, tmp_path) == 2
    assert "setup.json is damaged or of another version" in capsys.readouterr().err


def test_a_method_that_failed_everywhere_keeps_its_row():
    text = as_table([Row("uncached", "uncached", 2, 0, 8, 1), Row("fbcache:@4", "fbcache:@4", 2, 2)])
    assert "fbcache:@4  failed on all 2 prompts" in text


def test_merge_of_nothing_is_an_empty_table():
    assert len(merged([]).splitlines()) == 2


def test_documentation_has_the_merged_table_s_head():
    page = (Path(__file__).resolve().parents[1] / "docs" / "evidence.md").read_text()
    assert merged([]) in page
