"""The built Wan2.1 drop-ins, end to end, as copied files: against the stand-in, and the real repository when given."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import near
from forkserver import run_script, torchrun

from stepcache.commands.main import main
from stepcache.planning.calibration import Calibration

ROOT = Path(__file__).resolve().parent.parent
STANDIN = Path(__file__).with_name("standin_wan21")
SCRIPTS = {
    "lemica": "LeMiCa4Wan2.1/inference_wan.py",
    "easycache": "EasyCache4Wan2.1/easycache_generate.py",
    "magcache": "MagCache4Wan2.1/magcache_generate.py",
    "hindsight": "Hindsight4Wan2.1/hindsight_generate.py",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Wan2.1")
    shutil.copytree(STANDIN, folder, dirs_exist_ok=True)
    for script in SCRIPTS.values():
        shutil.copy(ROOT / script, folder)
    (folder / "ckpt").mkdir()
    return folder


def run(clone, method, *flags, ranks=1, check=True, real=False):
    """One of the scripts as a process; real: with imports of its own, which is slow and done once for each script."""
    script = Path(SCRIPTS[method]).name if method in SCRIPTS else method
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = run_script([script, "--ckpt_dir", "ckpt", *flags], clone, env, ranks, real=real)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def record(clone, name, rank=0):
    return json.loads((clone / f"{name}.rank{rank}.json").read_text())


def executions(clone, method, *flags, name="out.mp4", **kwargs):
    run(clone, method, *flags, "--save_file", name, **kwargs)
    return record(clone, name)


@pytest.fixture(scope="module")
def baseline(clone):
    return executions(clone, "generate.py", "--task", "t2v-1.3B", "--size", "832*480", name="base.mp4")


T2V = ("--task", "t2v-1.3B", "--size", "832*480")


@pytest.mark.parametrize("method", ["lemica", "magcache"])
def test_without_its_flag_a_script_is_the_original_process(clone, baseline, method):
    assert executions(clone, method, *T2V) == near(baseline, 1e-6)


@pytest.mark.parametrize("boundary", ["output", "blocks"])
@pytest.mark.parametrize("budget", [25, 14])
def test_lemica_computes_the_published_number_of_steps(clone, baseline, budget, boundary):
    done = executions(clone, "lemica", *T2V, "--lemica_budget", budget, "--boundary", boundary)
    assert done["executions"] == [2 * budget] * 4
    assert done["video"] != baseline["video"]


def test_the_default_is_reuse_at_the_blocks_as_published(clone):
    given = executions(clone, "lemica", *T2V, "--lemica_budget", 17, "--boundary", "blocks")
    assert executions(clone, "lemica", *T2V, "--lemica_budget", 17) == near(given, 1e-6)
    assert executions(clone, "lemica", *T2V, "--lemica_budget", 17, "--boundary", "output") != given


def test_hindsight_computes_even_steps_and_corrects(clone, baseline):
    reused = executions(clone, "lemica", *T2V, "--lemica_budget", 17, "--boundary", "output")
    out = run(clone, "hindsight", *T2V, "--budget", 17, "--save_file", "h.mp4", real=True).stdout
    done = record(clone, "h.mp4")
    assert done["executions"] == reused["executions"] == [34] * 4
    assert "hindsight (budget 17), boundary output: computed 17 of 50 steps" in out
    assert "warning" not in out
    assert math.dist(done["video"], baseline["video"]) < math.dist(reused["video"], baseline["video"])


def test_hindsight_on_all_steps_is_the_original(clone, baseline):
    assert executions(clone, "hindsight", *T2V, "--budget", 50) == near(baseline, 1e-6)
    assert executions(clone, "hindsight", *T2V) == near(baseline, 1e-6)


def test_calibrate_with_upstream_plan_and_follow_the_plan(clone, baseline, capsys):
    """Runs of the real loop teach the planner; its plan is followed by the same script."""
    for seed in (0, 1):
        flags = ("--calibration", "c.json", "--prompt", "two cats", "--base_seed", seed, "--save_file", "c.mp4")
        done = run(clone, "hindsight", *T2V, *flags)
        assert record(clone, "c.mp4")["executions"] == [100] * 4
    assert "c.json holds 2 run(s)" in done.stdout
    calibration = Calibration.load(clone / "c.json")
    assert calibration.scheduler == "FlowUniPCMultistepScheduler"
    assert calibration.branches == ("cond", "uncond")
    assert max(r.mismatch for r in calibration.runs) < 1e-5
    assert main(["plan", "--calibration", str(clone / "c.json"), "--budget", "12", "--out", str(clone / "p.json")]) == 0
    capsys.readouterr()
    followed = executions(clone, "hindsight", *T2V, "--plan", "p.json")
    assert followed["executions"] == [24] * 4
    assert followed["video"] != baseline["video"]
    for flags, message in (
        (("--plan", "p.json", "--budget", 25), "exclude each other"),
        (("--plan", "p.json", "--sample_steps", 40), "50 steps (the run: 40)"),
        (("--plan", "p.json", "--sample_guide_scale", 9), "(the run: 9)"),
        (("--plan", "p.json", "--sample_shift", 3), "shift 5.0 (the run: 3"),
        (("--plan", "none.json"), "does not exist"),
        (("--calibration", "c.json", "--sample_steps", 40), "num_steps 50, and the run has 40"),
        (("--calibration", "c.json", "--sample_guide_scale", 9), "guidance 5.0, and the run has 9"),
    ):
        refused = run(clone, "hindsight", *T2V, *flags, check=False)
        assert refused.returncode == 2
        assert message in refused.stderr
    resampled = run(clone, "hindsight", *T2V, "--plan", "p.json", "--sample_steps", 40, "--resample")
    assert "resampled from 50 to 40 steps" in resampled.stdout


def test_image_to_video_takes_its_own_table(clone):
    flags = ("--task", "i2v-14B", "--size", "832*480")
    assert executions(clone, "lemica", *flags, "--lemica_budget", 17)["executions"] == [34] * 4


def test_vace_skips_its_own_blocks_too(clone):
    done = executions(clone, "lemica", "--task", "vace-1.3B", "--lemica_budget", 20, "--boundary", "blocks")
    assert done["executions"] == [40] * 6


def test_tasks_without_a_table_borrow_aloud_and_resample_on_request(clone):
    done = run(clone, "lemica", "--task", "t2i-14B", "--lemica_budget", 25, "--save_file", "t2i.png")
    assert "published nothing for t2i-14B; its schedule for wan2.1-t2v-14B is used" in done.stderr
    refused = run(clone, "lemica", "--task", "flf2v-14B", "--lemica_budget", 25, check=False)
    assert refused.returncode == 2
    assert "of 40 steps" in refused.stderr
    done = run(
        clone, "lemica", "--task", "flf2v-14B", "--lemica_budget", 25, "--lemica_resample", "--save_file", "f.mp4"
    )
    assert "resampled from 25 of 40 to 25 of 50 steps" in done.stderr
    assert record(clone, "f.mp4")["executions"] == [50] * 4


def test_easycache_and_its_ret_steps(clone):
    assert executions(clone, "easycache", *T2V, "--thresh", 1e9, "--ret_steps", 4)["executions"] == [2 * 5] * 4
    assert executions(clone, "easycache", *T2V, "--thresh", 0)["executions"] == [100] * 4


def test_magcache_counts(clone):
    flags = (*T2V, "--use_magcache", "--magcache_thresh", 0.12, "--retention_ratio", 0.2)
    assert executions(clone, "magcache", *flags, "--magcache_K", 2)["executions"] == [50] * 4
    assert executions(clone, "magcache", *flags, "--magcache_K", 4)["executions"] == [42] * 4
    i2v = ("--task", "i2v-14B", "--size", "1280*720", "--use_magcache")
    done = executions(clone, "magcache", *i2v, "--magcache_thresh", 0.24, "--magcache_K", 6)
    assert done["executions"] == [2 * 15] * 4  # the original's 14 and the last step


def test_magcache_calibrates_and_takes_the_file_back(clone, baseline):
    done = run(clone, "magcache", *T2V, "--magcache_calibration", "--magcache_ratios", "r.json", "--save_file", "c.mp4")
    assert "ratios written to r.json" in done.stdout
    assert record(clone, "c.mp4") == near(baseline, 1e-6)
    ratios = json.loads((clone / "r.json").read_text())
    assert (ratios["num_steps"], ratios["model"]) == (50, "wan2.1-t2v-1.3B")
    run(clone, "magcache", *T2V, "--use_magcache", "--magcache_ratios", "r.json", "--save_file", "r.mp4")
    wrong = run(
        clone, "magcache", *T2V, "--sample_steps", 30, "--use_magcache", "--magcache_ratios", "r.json", check=False
    )
    assert wrong.returncode == 2
    assert "calibrated for 50 steps and the run has 30" in wrong.stderr


def test_the_setting_is_in_the_default_file_name(clone):
    assert "two_cats___boxing_lemica25_blocks_" in run(clone, "lemica", *T2V, "--lemica_budget", 25).stdout
    assert "_easycache0.05_output_" in run(clone, "easycache", *T2V, real=True).stdout
    assert "_magcache0.12K2_blocks_" in run(clone, "magcache", *T2V, "--use_magcache", real=True).stdout


def test_a_name_with_a_colon_is_a_file(clone):
    run(clone, "lemica", *T2V, "--lemica_budget", 25, "--save_file", "10:53.mp4")
    assert record(clone, "10:53.mp4")["executions"] == [50] * 4


def test_summary_is_printed(clone):
    out = run(clone, "lemica", *T2V, "--lemica_budget", 25, "--save_file", "s.mp4").stdout
    assert "computed 25 of 50 steps" in out


def test_help_shows_both_sets_of_flags(clone):
    out = run(clone, "lemica", "--help").stdout
    assert "--lemica_budget" in out
    assert "--sample_guide_scale" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--lemica_budget", "24"), "14, 17, 20, 25 of 50 steps"),
        (("--lemica_budget", "25", "--sample_steps", "40"), "25 of 40 steps"),
        (("--lemica_budget", "many"), "invalid int value"),
        (("--lemica_budget", "25", "--ckpt_dir", "nowhere"), "'nowhere' is not a folder"),
        (("--lemica_budget", "25", "--colour", "red"), "unrecognized arguments: --colour red"),
        (("--lemica_budget", "24"), "or ask for resampling (--lemica_resample)"),
        (("--boundary", "output"), "--boundary has no effect without --lemica_budget"),
        (("--lemica_resample",), "--lemica_resample has no effect without --lemica_budget"),
        (("--lemica_budget", "25", "--lemica_predict", "checked"), "hindsight_generate.py"),
        (("--lemica_calibration", "c.json"), "--calibration of hindsight_generate.py"),
        (("--lemica_budget", "25", "--save_file", "ckpt"), "is a folder"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(clone, flags, says):
    done = run(clone, "lemica", *T2V, *flags, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_magcache_mistakes(clone):
    missing = run(clone, "magcache", *T2V, "--use_magcache", "--magcache_ratios", "none.json", check=False)
    assert (missing.returncode, "does not exist" in missing.stderr) == (2, True)
    negative = run(clone, "magcache", *T2V, "--use_magcache", "--magcache_K", "-1", check=False)
    assert (negative.returncode, "expected 0 or more" in negative.stderr) == (2, True)
    for flags, says in (
        (("--magcache_K", 4), "--magcache_K has no effect without --use_magcache"),
        (("--magcache_K", 0), "--magcache_K has no effect without --use_magcache"),
        (("--boundary", "output"), "--boundary has no effect without --use_magcache"),
        (("--magcache_calibration", "--magcache_thresh", 0.1), "--magcache_thresh has no effect with --magcache_cal"),
    ):
        done = run(clone, "magcache", *T2V, *flags, check=False)
        assert (done.returncode, says in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--budget", 1), "--budget is 1; expected 2 or more"),
        (("--budget", 51), "does not fit 50 steps"),
        (("--resample",), "--resample has no effect without --plan"),
        (("--boundary", "blocks"), "unrecognized arguments: --boundary"),
    ],
)
def test_hindsight_mistakes(clone, flags, says):
    done = run(clone, "hindsight", *T2V, *flags, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", SCRIPTS)
def test_in_the_wrong_folder_it_says_what_to_copy_where(tmp_path, method):
    shutil.copy(ROOT / SCRIPTS[method], tmp_path)
    done = run(tmp_path, method, *T2V, check=False)
    assert done.returncode == 2
    assert "into the root of a clone of Wan-Video/Wan2.1" in done.stderr


def test_an_error_in_upstream_passes_through(clone):
    done = run(clone, "lemica", *T2V, "--lemica_budget", 25, "--fail_at", 7, check=False)
    assert done.returncode == 1
    assert "stand-in failure" in done.stderr


def test_nothing_stays_patched_after_an_error(monkeypatch):
    sys.path.insert(0, str(STANDIN))
    try:
        import wan

        from stepcache import Plan
        from stepcache.core.follow_weights import Planned
        from stepcache.hosts.wan21 import installed

        original = wan.WanT2V
        two = Planned(Plan(50, (0, 49)))
        with pytest.raises(RuntimeError, match="stand-in failure"), installed(wan, two) as runs:
            pipe = wan.WanT2V(use_usp=True, fail_at=5)
            forward = vars(pipe.model)["forward"]
            pipe.generate("x", seed=1)
        assert wan.WanT2V is original
        assert vars(pipe.model)["forward"] is forward
        assert "generate" not in vars(pipe)
        assert not any("forward" in vars(b) for b in pipe.model.blocks)
        assert runs[0].computed == (0,)
        clean = original(fail_at=-1).generate("x", seed=1)
        with installed(wan, Planned(Plan(50, tuple(range(50))))):
            assert wan.WanT2V(use_usp=True).generate("x", seed=1).equal(clean)
    finally:
        sys.path.remove(str(STANDIN))
        for name in [n for n in sys.modules if n.split(".")[0] in ("wan", "generate")]:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("lemica", ("--lemica_budget", 25)),
        ("easycache", ("--thresh", 0.05, "--ret_steps", 4)),
        ("magcache", ("--use_magcache",)),
        ("hindsight", ("--budget", 20)),
    ],
)
def test_two_ranks_compute_the_same_steps_and_the_same_video(clone, method, flags):
    single = executions(clone, method, *T2V, *flags, name="one.mp4")
    run(clone, method, *T2V, *flags, "--save_file", "two.mp4", "--ulysses_size", 2, ranks=2, real=method == "lemica")
    for rank in (0, 1):
        double = record(clone, "two.mp4", rank)
        assert double["executions"] == single["executions"]
        assert double["video"] == near(single["video"], 1e-5)


needs_upstream = pytest.mark.skipif(
    not os.environ.get("WAN21_ROOT"),
    reason="WAN21_ROOT is not set: the drop-ins were not run against a real Wan2.1 checkout",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the real checkout with the drop-ins in it, and how to run a script there.

    WAN21_ROOT is a clone of Wan-Video/Wan2.1. WAN21_RUNNER (default: this Python) is a command that runs a script of
    it; it finds the copy's place in WAN_ROOT. WAN21_CKPT, if set, is a T2V-1.3B checkpoint to generate with.
    """
    root = tmp_path_factory.mktemp("upstream") / "Wan2.1"
    shutil.copytree(os.environ["WAN21_ROOT"], root, ignore=shutil.ignore_patterns(".git", "*.pth", "*.safetensors"))
    for script in SCRIPTS.values():
        shutil.copy(ROOT / script, root)
    runner = shlex.split(os.environ.get("WAN21_RUNNER", sys.executable))

    def run_script(method, *flags, ranks=1):
        start = runner if ranks == 1 else [*torchrun(runner[0], ranks), *(runner[1:])]
        command = [*start, Path(SCRIPTS.get(method, method)).name, *map(str, flags)]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"WAN_ROOT": str(root)}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return root, run_script


@needs_upstream
@pytest.mark.parametrize("method", SCRIPTS)
def test_the_real_repository_accepts_the_script(checkout, method):
    root, run_script = checkout
    assert "--sample_guide_scale" in run_script(method, "--help")
    source = (root / "generate.py").read_text()
    for name in (
        "wan.WanT2V(",
        "wan.WanI2V(",
        "wan.WanFLF2V(",
        "wan.WanVace(",
        "def _parse_args",
        "def generate(args)",
    ):
        assert name in source


@needs_upstream
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags", "says"),
    [
        ("lemica", ("--lemica_budget", 25), "computed 25 of 50 steps"),
        ("hindsight", ("--budget", 14), "computed 14 of 50 steps"),
        ("easycache", ("--thresh", 1e9, "--ret_steps", 4), "computed 5 of 50 steps"),
        ("magcache", ("--use_magcache",), "computed 25 of 50 steps"),
    ],
)
def test_the_real_repository_generates(checkout, tmp_path, method, flags, says):
    ckpt = os.environ.get("WAN21_CKPT")
    if not ckpt:
        pytest.skip("WAN21_CKPT is not set: nothing was generated with the real Wan2.1 code")
    out = tmp_path / "clip.mp4"
    text = checkout[1](method, *T2V, "--ckpt_dir", ckpt, "--prompt", "a cat", "--save_file", out, *flags)
    assert says in text
    assert out.stat().st_size > 0


@needs_upstream
@pytest.mark.slow
def test_the_real_repository_is_calibrated_and_planned(checkout, tmp_path):
    ckpt = os.environ.get("WAN21_CKPT")
    if not ckpt:
        pytest.skip("WAN21_CKPT is not set: nothing was generated with the real Wan2.1 code")
    flags = (*T2V, "--ckpt_dir", ckpt, "--prompt", "a cat", "--save_file", tmp_path / "clip.mp4")
    path, plan = tmp_path / "c.json", tmp_path / "p.json"
    assert "holds 1 run(s)" in checkout[1]("hindsight", *flags, "--calibration", path)
    assert max(r.mismatch for r in Calibration.load(path).runs) < 1e-3
    assert main(["plan", "--calibration", str(path), "--budget", "15", "--out", str(plan)]) == 0
    assert "computed 15 of 50 steps" in checkout[1]("hindsight", *flags, "--plan", plan)


@needs_upstream
@pytest.mark.slow
@pytest.mark.parametrize("sharding", [(), ("--dit_fsdp", "--t5_fsdp")], ids=["usp", "usp+fsdp"])
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("lemica", ("--lemica_budget", 25)),
        ("easycache", ("--thresh", 0.05)),
        ("magcache", ("--use_magcache",)),
        ("hindsight", ("--budget", 25)),
    ],
    ids=SCRIPTS,
)
def test_the_real_repository_on_two_ranks(checkout, tmp_path, method, flags, sharding):
    """Sequence parallelism, also with FSDP: as many computed steps as on one rank.

    FSDP computes in bf16: what EasyCache measures then differs a little, and its count may by a step or two.
    """
    ckpt = os.environ.get("WAN21_CKPT")
    if not ckpt:
        pytest.skip("WAN21_CKPT is not set: nothing was generated with the real Wan2.1 code")
    inputs = (*T2V, "--ckpt_dir", ckpt, "--prompt", "a cat", *flags)
    said = []
    for ranks, more in ((1, ()), (2, ("--ulysses_size", 2, *sharding))):
        text = checkout[1](method, *inputs, "--save_file", tmp_path / f"{ranks}.mp4", *more, ranks=ranks)
        said.append(int(re.search(r"computed (\d+) of 50 steps", text)[1]))
        assert (tmp_path / f"{ranks}.mp4").stat().st_size > 0
    assert abs(said[0] - said[1]) <= (2 if method == "easycache" and sharding else 0)
