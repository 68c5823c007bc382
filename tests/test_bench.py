"""`stepcache bench` on a real, untrained pipeline: methods as text, items, resuming, failures, the meter."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import near
from hypothesis import given
from hypothesis import strategies as st

from stepcache import Plan, PlanFile
from stepcache.bench import methods as specs
from stepcache.bench.labels import Label, label, labels
from stepcache.bench.meter import Meter, run_once
from stepcache.bench.methods import Contender, Search, parse, parse_one, policy_of, read
from stepcache.bench.results import Folder, Item, as_text, row, slug, table
from stepcache.bench.suite import Suite, duration
from stepcache.commands.main import main
from stepcache.fleet.places import alone, place
from stepcache.fleet.shards import part, shard_from
from stepcache.hindsight.method import Hindsight
from stepcache.measure.generation import Request
from stepcache.measure.pipelines import load_pipeline
from stepcache.methods import EasyCache, LeMiCa, MagCache

STEPS = 8
ZOO = Path(__file__).resolve().parents[1] / "assets" / "zoo"
PROMPTS = 'a red circle\na <b>"blue"</b> square & a 🐈\n'


def bench(model, folder, policies, *flags, out="results"):
    (folder / "prompts.txt").write_text(PROMPTS)
    arguments = ["bench", "--model", model, "--prompts", str(folder / "prompts.txt"), "--policies", policies]
    return main([*arguments, "--steps", str(STEPS), "--out", str(folder / out), *map(str, flags)])


def suite_of(model, folder, policies):
    request = Request("", steps=STEPS)
    return Suite(model, folder, request, PROMPTS.split("\n")[:2], [0], parse(policies))


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """A small finished benchmark: ours, fewer steps, a stranger's cache, and a threshold that was searched."""
    folder = tmp_path_factory.mktemp("bench")
    policies = "uniform:4 uniform:4,boundary=blocks steps:4 fbcache:0.5 easycache:@7,ret_steps=3"
    assert bench(model, folder, policies) == 0
    return folder


# ------------------------------------------------------------------------------------------------------- methods


def test_methods_as_text():
    lemica, hindsight, easycache, magcache, fewer = parse(
        "lemica:25,table=qwen-image hindsight:20 easycache magcache:0.12,K=4 steps:25"
    )
    assert lemica.policy == LeMiCa(25, "qwen-image")
    assert hindsight.policy == Hindsight(20)
    assert easycache.policy == EasyCache()
    assert magcache.policy == MagCache(0.12, 4)
    assert (fewer.steps, fewer.policy) == (25, None)
    search = parse_one("easycache:@25,ret_steps=5")
    assert isinstance(search, Search)
    assert search.target == 25
    assert search.make(0.1).policy == EasyCache(0.1, 5)
    assert all(isinstance(c, Contender) for c in parse("uncached fbcache:0.1 cachedit:0.08,F=2 cachedit-mask:fast"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("lemica:25 lemica:25", "more than once"),
        ("teapot:3", "is no method known here"),
        ("lemica", "expected lemica:BUDGET"),
        ("lemica:x", "budget is 'x'; expected a whole number"),
        ("lemica:25,K=3", "'K=3' is no option of it; expected boundary=, table="),
        ("lemica:25,boundary=heads", "expected one of output, blocks"),
        ("lemica:25,predict=checked", "predict= is gone: lemica reuses outputs, as published"),
        ("hindsight:25,schedule=published", "schedule= is gone"),
        ("checked:25", "checked is now called hindsight; write hindsight:25"),
        ("hindsight", "expected hindsight:BUDGET"),
        ("uniform", "takes a budget or an interval"),
        ("magcache:0.1,K=2,K=3", "says K= more than once"),
        ("magcache-calibration:r.json", "is for stepcache generate"),
        ("easycache:inf", "expected a number"),
        ("fbcache:nan", "expected a number"),
        ("easycache:@0", "1 or more"),
        ("lemica:@25", "has no threshold to search for"),
        ("easycache:@many", "expected a number"),
        ("easycache:-1", "'easycache:-1'"),
        ("steps:0", "expected steps:N"),
        ("steps:4,K=2", "is no option of it; expected none"),
        ("uncached:3", "expected uncached"),
        ("diffusers-magcache:0.1", "needs ratios=FILE"),
        ("cachedit-mask:brisk", "expected slow, medium"),
        ("cachedit:0.1,forecast=cubic", "expected taylorseer, dmd, foca"),
        ("cachedit:0.1,forecast=dmd,taylor=2", "it has no effect on dmd"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("|", r"\|")):
        parse(text)


def test_a_peer_that_is_not_installed_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ImportError, match=r"cachedit needs cache-dit: pip install 'stepcache\[peers\]'"):
        parse("uncached cachedit:0.1")


def test_a_flag_of_a_command_is_an_option_of_the_method():
    method = read("lemica:25").with_option("table", "qwen-image", "--table")
    assert policy_of(method) == LeMiCa(25, "qwen-image")
    with pytest.raises(ValueError, match=r"--table has no effect on easycache:0\.05"):
        read("easycache:0.05").with_option("table", "qwen-image", "--table")


@pytest.mark.parametrize("name", specs.KINDS)
def test_every_method_is_in_the_help(name):
    assert any(f"\n  {name}" in f"\n{specs.help_text(bench)}" for bench in (True, False))


def test_labels_say_where_a_schedule_comes_from(tmp_path):
    """Equal spacing, a paper or a calibration; keys stay as written."""
    assert label("hindsight:25") == Label("hindsight:25, by noise level", "hindsight, by noise level")
    assert label("lemica:25,table=x").row == "lemica:25,table=x, published list"
    assert label("lemica:25,table=x").curve == label("lemica:20,table=x").curve == "lemica, published list, table=x"
    assert label("easycache:0.05,ret_steps=5") == Label("easycache:0.05,ret_steps=5", "easycache, ret_steps=5")
    assert label("steps:25").curve == "steps, fewer steps"
    PlanFile(Plan(8, (0, 3, 7)), "hindsight").save(tmp_path / "a.json")
    (planned,) = parse(f"plan:{tmp_path}/a.json")
    assert planned.name == f"plan:{tmp_path}/a.json"
    assert label(planned.name, planned.schedule) == Label("plan:a.json, hindsight, planned", "hindsight, planned")
    assert labels([planned.name], {})[planned.name].row == "plan:a.json, planned"  # of folders made before


def test_missing_plan():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        parse("plan:nowhere.json")


# --------------------------------------------------------------------------------------------------------- meter


def test_the_meter_sees_blocks_and_leaves_no_trace(model):
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    request = Request("a red circle", steps=6, height=64, width=64, num_frames=5)
    uncached = run_once(pipe, request, parse_one("uncached"))
    blocks = len(pipe.transformer.blocks)
    assert uncached.executed == (2 * blocks,) * 6  # two branches
    assert len(uncached.latents) == 6
    half = run_once(pipe, request, parse_one("uniform:3"))
    assert [n // (2 * blocks) for n in half.executed] == [int(k in half.summary.computed) for k in range(6)]
    more = {
        n: [run_once(pipe, request, parse_one(n)).loop_seconds for _ in range(2)] for n in ("uncached", "uniform:3")
    }
    # the quickest of three: others use the machine too
    assert 0 < min(half.loop_seconds, *more["uniform:3"]) < min(uncached.loop_seconds, *more["uncached"])
    first = run_once(pipe, request, parse_one("fbcache:1000"))
    assert first.executed == (2 * blocks, *[2] * 5)  # the first block always runs
    assert all("forward" not in vars(block) for block in pipe.transformer.blocks)
    assert (run_once(pipe, request, parse_one("uncached")).frames == uncached.frames).all()


def test_the_meter_sees_pipelines_without_a_callback_through_their_sampler(model, monkeypatch):
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    request = Request("a red circle", steps=6, guidance=5.0, height=64, width=64, num_frames=5)
    for method in ("uncached", "hindsight:4"):
        told = run_once(pipe, request, parse_one(method))
        with monkeypatch.context() as patch:
            patch.setattr("stepcache.bench.meter.shows_latents", lambda pipe: False)
            seen = run_once(pipe, request, parse_one(method))
        assert seen.executed == told.executed
        assert all(torch.equal(a, b) for a, b in zip(seen.latents, told.latents, strict=True))
        assert "step" not in vars(pipe.scheduler)


def test_the_meter_counts_below_every_peer(model):
    pytest.importorskip("cache_dit", reason="cache-dit is not installed (pip install 'stepcache[peers]')")
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    request = Request("a red circle", steps=6, height=64, width=64, num_frames=5)
    whole = sum(run_once(pipe, request, parse_one("uncached")).executed)
    cachedit = ("cachedit:100,W=2", "cachedit:100,W=2,taylor=1", "cachedit:100,W=2,forecast=dmd")
    for method in (*cachedit, "diffusers-taylorseer:3", "seacache:100"):
        assert 0 < sum(run_once(pipe, request, parse_one(method)).executed) < whole, method
    assert sum(run_once(pipe, request, parse_one("uncached")).executed) == whole


def test_a_peer_leaves_the_transformer_as_it_found_it():
    """cache-dit 1.5 leaves hooks on FLUX's, and the next peer then fails."""
    pytest.importorskip("cache_dit", reason="cache-dit is not installed (pip install 'stepcache[peers]')")
    pipe = load_pipeline(str(ZOO / "landscapes"))
    pipe.set_progress_bar_config(disable=True)
    request = Request("hills", steps=6, guidance=3.5, height=64, width=64, max_sequence_length=6)
    before = run_once(pipe, request, parse_one("fbcache:0.6")).executed
    run_once(pipe, request, parse_one("cachedit:0.04,W=2"))
    assert run_once(pipe, request, parse_one("fbcache:0.6")).executed == before


def test_a_transformer_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of blocks"):
        Meter(SimpleNamespace(components={"transformer": torch.nn.Linear(2, 2)}))


def test_two_runs_do_not_write_into_one_folder(model, tmp_path, capsys):
    with alone(tmp_path / "results"):
        assert bench(model, tmp_path, "uniform:4") == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    with alone(tmp_path / "calibration.json", folder=False):
        asked = ["--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--steps", str(STEPS)]
        assert main(["calibrate", *asked, "--out", str(tmp_path / "calibration.json")]) == 2
    assert "another run is writing to" in capsys.readouterr().err
    with alone(tmp_path / "results"), alone(tmp_path / "others"):
        pass
    assert not (tmp_path / "others").exists()
    with alone(tmp_path / "new" / f"{'x' * 248}.json", folder=False):  # as long as a name can be
        pass
    assert not (tmp_path / "new").exists()


def test_what_it_will_cost_is_said_before(model, tmp_path):
    suite = suite_of(model, tmp_path, "uniform:4 easycache:@7,ret_steps=3")
    said = suite.cost(2.0, pairs=2)
    assert said == (
        "6 runs to do (2 prompts and seeds, uncached and with 2 methods), and before them 20 to search thresholds "
        "(easycache:@7,ret_steps=3); an uncached run takes about 2.0 s, all of them at most 52 s"
    )
    assert suite.cost(90.0, 2, there=2, searched=["easycache:@7,ret_steps=3"]).startswith("4 runs to do (2 prompts")
    assert [duration(s) for s in (0.04, 12.3, 200, 7500)] == ["0.0 s", "12 s", "3 min", "2 h 5 min"]


def test_a_speed_up_above_the_ideal_is_noise():
    item = Item("uniform:4", 0, "a", 0, computed=4.0, loop_seconds=1.0, reference_seconds=2.5, ssim=1.0)
    found = row("uniform:4", [item, replace(item, reference_seconds=1.5), replace(item, reference_seconds=2.6)], 8)
    assert (found.noise, found.speedup, found.speedup_low, found.speedup_high) == (True, 2.5, 1.5, 2.6)
    text = as_text([found], {})
    assert "2.50x*" in text
    assert text.endswith("* above the ideal: noise of timing; over the items uniform:4, even 1.50x to 2.60x")
    assert "*" not in as_text([row("uniform:4", [replace(item, reference_seconds=1.9)], 8)], {})


# --------------------------------------------------------------------------------------------------------- items


def test_table(results):
    folder = Folder(results / "results")
    rows = {r.method: r for r in table(folder)}
    assert rows["uncached"].computed == STEPS
    assert rows["uncached"].psnr is None
    assert rows["uniform:4"].computed == rows["uniform:4,boundary=blocks"].computed == rows["steps:4"].computed == 4
    assert rows["uniform:4"].ideal == 2
    assert 0 < rows["uniform:4"].psnr < 100
    assert rows["uniform:4"].psnr_worst <= rows["uniform:4"].psnr
    assert all(r.items == 2 and r.failed == 0 for r in rows.values())
    assert abs(rows["easycache:@7,ret_steps=3"].computed - 7) <= 1
    assert folder.read()["searched"].keys() == {"easycache:@7,ret_steps=3"}
    assert folder.read()["ceiling"]["psnr"] is None
    text = (results / "results" / "table.txt").read_text()
    assert "uniform:4,boundary=blocks, even" in text
    assert folder.read()["schedules"] == {"uniform:4": "even", "uniform:4,boundary=blocks": "even"}
    assert "bit-identical" in text
    assert json.loads((results / "results" / "table.json").read_text())[0]["method"] == "uncached"


def test_items_say_what_happened(results):
    folder = Folder(results / "results")
    item = Item.load(folder.item("uniform:4", 1, 0))
    assert item.prompt == PROMPTS.splitlines()[1]
    assert [k for k, share in enumerate(item.per_step) if share] == list(item.branches["cond"])
    assert len(item.step_errors) == STEPS
    assert item.step_errors[0] == 0
    assert item.step_errors[-1] > 0
    assert (folder.root / item.clip).stat().st_size > 0
    assert Item.load(folder.item("steps:4", 0, 0)).step_errors == ()
    assert not list(folder.root.rglob(".*"))


def test_it_goes_on_and_takes_more_methods(model, results, capsys):
    folder = Folder(results / "results")
    before = folder.item("uniform:4", 0, 0).stat().st_mtime_ns
    assert bench(model, results, "uniform:4") == 2
    assert "use --resume" in capsys.readouterr().err
    gone = folder.item("uniform:4", 1, 0)
    gone.unlink()
    assert bench(model, results, "uniform:4 uniform:6", "--resume") == 0
    assert gone.exists()
    assert folder.item("uniform:4", 0, 0).stat().st_mtime_ns == before
    assert "uniform:6" in capsys.readouterr().out
    assert bench(model, results, "uniform:4", "--resume", "--guidance", 4) == 2
    assert "it differs in request" in capsys.readouterr().err


def test_a_method_that_fails_is_recorded(model, tmp_path, monkeypatch, capsys):
    made, broken = specs.KINDS["uniform"], [True]

    def sometimes(budget):
        policy = made.make(budget)

        class Failing:
            boundary, begun = "output", 0

            def begin(self, run):
                Failing.begun += run.timesteps is not None  # not a check before the runs
                if broken and Failing.begun > 1:
                    raise RuntimeError("out of luck")
                return policy.begin(run)

        return Failing()

    monkeypatch.setitem(specs.KINDS, "uniform", specs.Kind("budget", int, sometimes))
    assert bench(model, tmp_path, "uniform:4 steps:4") == 1
    out = capsys.readouterr().out
    assert "(1 failed)" in out
    assert "1 item(s) failed" in out
    folder = Folder(tmp_path / "results")
    assert "out of luck" in Item.load(folder.item("uniform:4", 1, 0)).error
    assert not Item.load(folder.item("steps:4", 1, 0)).error
    broken.clear()
    assert bench(model, tmp_path, "uniform:4 steps:4", "--resume") == 0
    assert not Item.load(folder.item("uniform:4", 1, 0)).error


def test_interrupted(model, tmp_path, monkeypatch, capsys):
    from stepcache.bench import runs as runner

    original, calls = runner.run_once, []

    def run_once(pipe, request, contender):
        calls.append(contender.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(pipe, request, contender)

    monkeypatch.setattr(runner, "run_once", run_once)
    assert bench(model, tmp_path, "uniform:4 steps:4") == 130
    done = len(Folder(tmp_path / "results").items())
    assert 0 < done < 6
    assert not list(tmp_path.rglob(".*tmp"))
    monkeypatch.undo()
    assert bench(model, tmp_path, "uniform:4 steps:4", "--resume") == 0
    assert len(Folder(tmp_path / "results").items()) == 6
    capsys.readouterr()


def test_disc_full(model, tmp_path, monkeypatch, capsys):
    from stepcache.bench import runs as runner

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "write_clip", full)
    assert bench(model, tmp_path, "uniform:4") == 2
    assert "No space left" in capsys.readouterr().err
    assert Folder(tmp_path / "results").items() == []


@pytest.mark.parametrize(
    ("policies", "flags", "message"),
    [
        ("uniform:9", (), "uniform:9: a budget of 9 does not fit 8 steps"),
        ("easycache:@9", (), "easycache:@9: a run has 8 steps"),
        ("lemica:25", (), "lemica:25"),
        ("uniform:4", ("--seeds", 2**64), "expected 64 bits"),
        ("uniform:4", ("--guidance", "nan"), "--guidance is nan"),
        ("uniform:4", ("--fps", 0), "--fps is 0"),
        ("uniform:4", ("--device", "tpu"), "--device tpu cannot be used here"),
        ("uniform:4", ("--negative_prompt", "blur", "--guidance", 1), "has no effect at guidance 1"),
        ("uniform:4", ("--workers", 2), "--workers has no effect here; it needs --ray"),
        ("uniform:4", ("--max-retries", 3), "--max-retries has no effect here; it needs --ray"),
        ("uniform:4", ("--ray", "--shard", "0/2"), "--shard has no effect here"),
        ("uniform:4", ("--seeds", "1,1"), "each seed once"),
        ("uniform:4", ("--shard", "3/2"), "expected 0 to 1"),
        ("uniform:4", ("--width", 50), "multiple of 16"),
    ],
)
def test_mistakes_are_told_before_anything_runs(model, tmp_path, capsys, policies, flags, message):
    assert bench(model, tmp_path, policies, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results" / "items").exists()


def test_shards_merge_into_the_whole(model, tmp_path, capsys):
    for i in range(2):
        assert bench(model, tmp_path, "uniform:4", "--shard", f"{i}/2", out=f"part{i}") == 0
    parts = [str(tmp_path / f"part{i}") for i in range(2)]
    assert [len(Folder(tmp_path / f"part{i}").items()) for i in range(2)] == [2, 2]
    out = str(tmp_path / "results")
    assert main(["bench", "--merge", parts[0], "--out", out]) == 1
    assert "2 item(s) are missing" in capsys.readouterr().out
    assert main(["bench", "--merge", *parts, "--out", out]) == 0
    assert "all items are present" in capsys.readouterr().out
    assert bench(model, tmp_path, "uniform:4", out="whole") == 0
    whole, merged = ({(i.method, i.index): i for i in Folder(tmp_path / n).items()} for n in ("whole", "results"))
    assert whole.keys() == merged.keys()
    for key, item in whole.items():
        assert item.per_step == merged[key].per_step
        assert (item.psnr, item.step_errors) == near((merged[key].psnr, merged[key].step_errors))
        assert (tmp_path / "results" / item.clip).exists()
    for flags, says in (
        (("--steps", "8"), "--steps has no effect here; it needs runs (no --merge)"),
        (("--ray",), "--ray has no effect here"),
        (("--out", str(tmp_path / "prompts.txt")), "is a file, not a folder"),
    ):
        assert main(["bench", "--merge", parts[0], "--out", out, *flags]) == 2
        assert says in capsys.readouterr().err
    assert bench(model, tmp_path, "uniform:4", "--guidance", 4, out="other") == 0
    assert main(["bench", "--merge", parts[0], str(tmp_path / "other"), "--out", out]) == 2
    assert "request differ" in capsys.readouterr().err


def test_merging_keeps_what_is_good(model, tmp_path, capsys):
    """Failed items count as missing and replace nothing; an --out of another benchmark is refused."""
    for name in ("a", "b"):
        assert bench(model, tmp_path, "uniform:4", out=name) == 0
    failed = Folder(tmp_path / "b").item("uniform:4", 1, 0)
    replace(Item.load(failed), error="lost", psnr=None).save(failed)
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    assert main(["bench", "--merge", b, "--out", out]) == 1
    assert "1 item(s) are missing" in capsys.readouterr().out
    assert main(["bench", "--merge", a, b, "--out", out]) == 0
    assert not Item.load(Folder(tmp_path / "out").item("uniform:4", 1, 0)).error
    assert bench(model, tmp_path, "uniform:4", "--guidance", 4, out="other") == 0
    before = (tmp_path / "other" / "bench.json").read_bytes()
    assert main(["bench", "--merge", a, "--out", str(tmp_path / "other")]) == 2
    assert "request differ" in capsys.readouterr().err
    assert (tmp_path / "other" / "bench.json").read_bytes() == before


def test_more_shards_than_work(model, tmp_path, capsys):
    assert bench(model, tmp_path, "uniform:4", "--shard", "5/9") == 0
    assert "has none of the 2" in capsys.readouterr().out
    assert bench(model, tmp_path, "uniform:4", "--shard", "1/2") == 0
    assert bench(model, tmp_path, "uniform:4", "--shard", "0/2", "--resume") == 2
    assert "differs in shard" in capsys.readouterr().err


def test_a_reference_that_fails(model, tmp_path, monkeypatch, capsys):
    """Its pair fails with it, the others go on; an uncached item that is there is not spoilt."""
    from stepcache.bench import runs as runner

    assert bench(model, tmp_path, "uniform:4") == 0
    folder, original = Folder(tmp_path / "results"), runner.run_once
    folder.item("uniform:4", 0, 0).unlink()
    (tmp_path / "results" / "references").mkdir()
    (tmp_path / "results" / "references" / ".0007-0.npz.abc.tmp").write_text("left by a worker that was killed")

    def failing(pipe, request, contender):
        if contender.name == "uncached" and request.seed == 0 and request.steps == STEPS:
            raise RuntimeError("out of memory")
        return original(pipe, request, contender)

    monkeypatch.setattr(runner, "run_once", failing)
    assert bench(model, tmp_path, "uniform:4", "--resume") == 1
    assert not Item.load(folder.item("uncached", 0, 0)).error
    assert "the uncached run failed: RuntimeError: out of memory" in Item.load(folder.item("uniform:4", 0, 0)).error
    assert not (tmp_path / "results" / "references").exists()
    monkeypatch.undo()
    assert bench(model, tmp_path, "uniform:4", "--resume") == 0
    assert not Item.load(folder.item("uniform:4", 0, 0)).error
    capsys.readouterr()


def test_which_shard():
    assert shard_from("1/4") == (1, 4)
    assert shard_from("auto", {"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)
    slurm = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}
    assert shard_from("auto", {**slurm, "RANK": "0", "WORLD_SIZE": "1"}) == (2, 4)
    assert shard_from("auto/32", {**slurm, "SLURM_ARRAY_TASK_MIN": "3"}) == (5, 32)  # parts run again keep their place
    with pytest.raises(ValueError, match="auto/n"):
        shard_from("auto/x", {})
    for text in ("4/4", "-1/4", "1", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="--shard"):
            shard_from(text, {})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID and"):
        shard_from("auto", {})


@given(st.integers(0, 40), st.integers(1, 7))
def test_shards_are_a_partition(count, shards):
    parts = [part(range(count), (i, shards)) for i in range(shards)]
    assert sorted(k for p in parts for k in p) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_vbench_names(model, tmp_path, capsys):
    (tmp_path / "prompts.json").write_text('[{"prompt_en": "a cat"}, {"prompt_en": "a cat"}]')
    arguments = ["bench", "--model", model, "--prompts", str(tmp_path / "prompts.json"), "--policies", "uniform:4"]
    out = tmp_path / "results"
    assert main([*arguments, "--steps", "8", "--seeds", "0,1", "--vbench", "--out", str(out)]) == 0
    names = {p.name for p in (out / "clips" / "uniform_4").iterdir()}
    assert names == {"a cat-0.mp4", "a cat-1.mp4"}
    capsys.readouterr()


def test_damaged_item(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="remove it and resume"):
        Item.load(path)


def test_rows_of_identical_and_failed_items():
    same = Item("m", 0, "p", 0, computed=4.0, loop_seconds=1.0, reference_seconds=2.0, ssim=1.0, identical=True)
    other = Item("m", 1, "q", 0, computed=4.0, loop_seconds=1.0, reference_seconds=2.0, ssim=0.5, psnr=20.0)
    both = row("m", [same, other], 8)
    assert (both.psnr, both.psnr_worst, both.ssim_worst, both.speedup) == (20.0, 20.0, 0.5, 2.0)
    assert row("m", [same], 8).psnr is None
    assert row("m", [Item("m", 0, "p", 0, error="x")], 8).failed == 1
    assert slug("a/b:c,d") == "a_b_c_d"


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_results_at_any_address(model, tmp_path, capsys, kind):
    """An object store's interface: everything is written, resumed, merged and reported as in a folder."""
    pytest.importorskip("upath", reason="universal_pathlib is not installed (pip install 'stepcache[cluster]')")
    out = "memory://bench/one" if kind == "memory" else f"file://{tmp_path}/far"
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    arguments = ["bench", "--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--steps", str(STEPS)]
    assert main([*arguments, "--policies", "uniform:4", "--out", out]) == 0
    there = Folder(place(out))
    gone = there.item("uniform:4", 1, 0)
    gone.unlink()
    assert main([*arguments, "--policies", "uniform:4", "--out", out]) == 2
    assert main([*arguments, "--policies", "uniform:4", "--out", out, "--resume"]) == 0
    assert gone.exists()
    assert main(["bench", "--merge", out, "--out", str(tmp_path / "near")]) == 0
    assert "all items are present" in capsys.readouterr().out
    near = Folder(tmp_path / "near")
    assert near.items() == there.items()
    assert all((near.root / item.clip).stat().st_size > 0 for item in near.items())
    assert main(["report", out, "--out", str(tmp_path / "report.html")]) == 0
    assert "4 clips" in capsys.readouterr().out
    if kind == "memory":
        assert main(["report", out]) == 2
        assert "give --out FILE" in capsys.readouterr().err


def test_unknown_addresses(tmp_path, model, capsys):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    arguments = ["bench", "--model", model, "--prompts", str(tmp_path / "prompts.txt"), "--policies", "uniform:4"]
    assert main([*arguments, "--out", "gopher://hole/x"]) == 2
    assert "gopher" in capsys.readouterr().err
