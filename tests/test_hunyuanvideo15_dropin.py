"""The built HunyuanVideo-1.5 drop-in as a copied file: against the stand-in, and the real repository when given."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import near
from forkserver import run_script, torchrun

from stepcache import Plan, PlanFile
from stepcache.commands.main import main
from stepcache.methods.lemica_schedules import SCHEDULES
from stepcache.planning.calibration import Calibration

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    ROOT / "LeMiCa4HunyuanVideo-1.5/lemica_generate.py",
    ROOT / "Hindsight4HunyuanVideo-1.5/hindsight_generate.py",
)
SCRIPT = SCRIPTS[0]
NEEDED = ("--prompt", "a cat", "--resolution", "480p", "--model_path", "ckpt")
CACHED = ("--enable_cache", "true", "--cache_type", "lemica")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("HunyuanVideo-1.5")
    shutil.copytree(Path(__file__).with_name("standin_hunyuanvideo15"), folder, dirs_exist_ok=True)
    for script in SCRIPTS:
        shutil.copy(script, folder)
    (folder / "ckpt").mkdir()
    return folder


def run(clone, *flags, script="lemica_generate.py", ranks=1, check=True, needed=NEEDED, cwd=None, real=False):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    if script == "generate.py":
        env |= {"WORLD_SIZE": "1"}
    done = run_script([script, *needed, *flags], cwd or clone, env, ranks, real=real)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def record(clone, *flags, name="out.mp4", rank=0, **kwargs):
    run(clone, *flags, "--output_path", name, **kwargs)
    return json.loads((clone / f"{name}.rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def baseline(clone):
    return record(clone, script="generate.py", name="base.mp4")


def test_without_the_cache_it_is_the_original_process(clone, baseline):
    assert record(clone) == near(baseline, 1e-6)


@pytest.mark.parametrize("boundary", ["output", "blocks"])
@pytest.mark.parametrize("budget", [25, 20, 15, 10])
def test_it_computes_the_published_number_of_steps(clone, baseline, budget, boundary):
    done = record(clone, *CACHED, "--lemica_step", budget, "--boundary", boundary)
    assert done["executions"] == [budget] * 4
    assert done["video"] != baseline["video"]
    assert done["left"] == ["_compiled_call_impl"]  # recorded during the run, see below for what is left after it


def test_the_summary_shows_the_published_steps(clone):
    out = run(clone, *CACHED, real=True).stdout
    marks = next(line for line in out.splitlines() if set(line) <= {"█", "·"} and len(line) == 50)
    assert tuple(i for i, m in enumerate(marks) if m == "█") == SCHEDULES["hunyuanvideo-1.5"][1][25]
    assert "computed 25 of 50 steps" in out


def test_hindsight_on_its_own_steps_and_on_a_plan(clone, baseline, tmp_path):
    said = run(clone, "--budget", 10, script="hindsight_generate.py", real=True).stdout
    assert "hindsight (budget 10), boundary output: computed 10 of 50 steps" in said
    assert "warning" not in said
    assert "saved ./outputs/output_480p_t2v_hindsight10_" in said
    PlanFile(Plan(50, (0, 3, 9, 20, 35, 49)), "hindsight").save(tmp_path / "p.json")
    done = record(clone, "--plan", tmp_path / "p.json", script="hindsight_generate.py")
    assert done["executions"] == [6] * 4
    assert done["video"] != baseline["video"]
    all_steps = record(clone, "--budget", 50, script="hindsight_generate.py")
    assert all_steps["video"] == near(baseline["video"], 1e-6)


def test_calibrate_with_upstream_s_batched_guidance_and_follow_the_plan(clone, tmp_path, capsys):
    path, plan = tmp_path / "c.json", tmp_path / "p.json"
    done = record(clone, "--calibration", path, "--seed", 1, script="hindsight_generate.py")
    assert done["executions"] == [50] * 4
    (found,) = Calibration.load(path).runs
    assert found.mismatch < 1e-3
    assert main(["plan", "--calibration", str(path), "--budget", "12", "--out", str(plan)]) == 0
    capsys.readouterr()
    assert record(clone, "--plan", plan, script="hindsight_generate.py")["executions"] == [12] * 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--budget", 1), "--budget is 1; expected 2 or more"),
        (("--budget", 51), "does not fit 50 steps"),
        (("--plan", "none.json"), "does not exist"),
        (("--budget", 10, "--plan", "none.json"), "exclude each other"),
        (("--budget", 10, "--enable_cache", "true"), "--enable_cache is for upstream's own caches"),
        (("--resample",), "--resample has no effect without --plan"),
        (("--budget", 10, "--enable_step_distill", "true"), "no steps to spare"),
    ],
)
def test_hindsight_mistakes(clone, flags, sentence):
    done = run(clone, *flags, script="hindsight_generate.py", check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_super_resolution_stays_uncached_and_untouched(clone):
    plain = record(clone, "--sr", "true", script="generate.py", name="sr_base.mp4")
    done = record(clone, *CACHED, "--lemica_step", 10, "--sr", "true")
    assert done["sr_executions"] == [8] * 4
    assert done["sr_video"] == near(plain["sr_video"], 1e-6)
    assert done["executions"] == [10] * 4


def test_group_offloading_comes_after_the_cache(clone):
    done = record(clone, *CACHED, "--offloading", "true", "--group_offloading", "true")
    assert done["log"] == ["offload True group False", "offload True group True"]
    assert done["executions"] == [25] * 4


def test_upstreams_own_caches_still_work(clone):
    done = record(clone, "--enable_cache", "true", "--cache_type", "teacache")
    assert done["log"][0] == "own teacache"


def test_two_ranks_compute_the_same_steps(clone):
    record(clone, *CACHED, "--lemica_step", 15, ranks=2, name="two.mp4")
    both = [json.loads((clone / f"two.mp4.rank{r}.json").read_text()) for r in range(2)]
    assert both[0]["executions"] == both[1]["executions"] == [15] * 4


def test_the_default_file_name_carries_the_budget(clone):
    out = run(clone, *CACHED, "--lemica_step", 20).stdout
    assert "saved ./outputs/output_480p_t2v_lemica20_blocks_" in out


def test_resampling_on_request(clone):
    refused = run(clone, *CACHED, "--num_inference_steps", 30, check=False)
    assert refused.returncode == 2
    assert "25 of 30 steps" in refused.stderr
    done = run(clone, *CACHED, "--num_inference_steps", 30, "--lemica_resample", "--lemica_step", 12)
    assert "resampled from" in done.stderr
    assert "computed 12 of 30 steps" in done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((*CACHED, "--lemica_step", 24), "10, 15, 20, 25 of 50 steps"),
        (("--enable_cache", "true", "--cache_type", "lemika"), "--cache_type lemika is unknown"),
        (("--lemica_step", 25), "--lemica_step has no effect without --enable_cache true --cache_type lemica"),
        ((*CACHED, "--enable_step_distill", "true"), "no steps to spare"),
        ((*CACHED, "--model_path", "nowhere"), "--model_path 'nowhere' is not a folder"),
        ((*CACHED, "--no_such_flag", 1), "unrecognized arguments"),
    ],
)
def test_bad_input_gets_a_sentence_and_exit_code_2(clone, flags, sentence):
    done = run(clone, *flags, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_in_the_wrong_place_it_says_where_to_copy_it(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    done = run(tmp_path, check=False)
    assert done.returncode == 2
    assert "copy lemica_generate.py into the root of a clone of Tencent-Hunyuan/HunyuanVideo-1.5" in done.stderr


def test_help_shows_both_sets_of_flags(clone):
    done = run(clone, "--help", needed=())
    assert "--lemica_step" in done.stdout
    assert "--num_inference_steps" in done.stdout


def test_nothing_is_left_after_an_error_or_a_run(clone):
    """In one process: a run that breaks in the middle, then a good one."""
    code = (
        "import sys, json; sys.argv=['lemica_generate.py','--prompt','a','--resolution','480p','--model_path','ckpt',"
        "'--enable_cache','true','--cache_type','lemica','--output_path','x.mp4']\n"
        "import lemica_generate as d, hyvideo\n"
        "P=hyvideo.HunyuanVideo_1_5_Pipeline; before=dict(vars(P)); made=[]\n"
        "init=P.__init__\n"
        "def spy(self): init(self); made.append(self)\n"
        "P.__init__=spy\n"
        "F=hyvideo.Transformer.forward; n=[0]\n"
        "def breaks(self, *a, **k):\n"
        "    n[0]+=1\n"
        "    if n[0]==7: raise KeyError('broken')\n"
        "    return F(self, *a, **k)\n"
        "hyvideo.Transformer.forward=breaks; keep=list(sys.argv)\n"
        "try: d.main(); raise SystemExit('did not break')\n"
        "except KeyError: pass\n"
        "hyvideo.Transformer.forward=F; sys.argv=keep\n"
        "d.main(); import generate; g=generate.generate_video\n"
        "P.__init__=init\n"
        "assert dict(vars(P))==before, 'class left patched'\n"
        "assert all('_compiled_call_impl' not in vars(p.transformer) for p in made)\n"
        "assert g.__name__=='generate_video'\n"
        "print('clean')\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    done = run_script(["-c", code], clone, env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("clean")


# ------------------------------------------------------------------ the real repository

REAL = {name: os.environ.get(name) for name in ("HY15_ROOT", "HY15_RUNNER", "HY15_CKPT")}
real = pytest.mark.skipif(
    not all(REAL.values()),
    reason="set HY15_ROOT (a clone of HunyuanVideo-1.5), HY15_RUNNER (a command that runs a script in it and writes "
    "HARNESS_OUT) and HY15_CKPT (a checkpoint folder) to test against the real code",
)


def real_run(tmp_path, name, script, *flags, runner=None):
    shutil.copy(SCRIPT, REAL["HY15_ROOT"])
    out = tmp_path / f"{name}.json"
    command = [*(runner or shlex.split(REAL["HY15_RUNNER"])), script, "--dtype", "fp32", "--resolution", "480p"]
    command += ["--model_path", REAL["HY15_CKPT"], "--prompt", "a cat", "--seed", "1", "--sr", "false"]
    command += ["--offloading", "false", "--group_offloading", "false", "--video_length", "13"]
    command += ["--output_path", str(tmp_path / f"{name}.mp4"), *map(str, flags)]
    env = os.environ | {"HARNESS_OUT": str(out), "HY_ROOT": REAL["HY15_ROOT"], "HY_TARGET_DTYPE": "fp32"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()), out


@real
@pytest.mark.slow
def test_real_budgets(tmp_path):
    """The timesteps at which blocks really ran are the published ones."""
    timesteps = [c["t"] for c in real_run(tmp_path, "all", "generate.py")[0]["calls"]]
    for budget in (25, 20, 15, 10):
        for boundary in ("output", "blocks"):
            flags = (*CACHED, "--lemica_step", budget, "--boundary", boundary)
            done, _ = real_run(tmp_path, f"b{budget}{boundary}", "lemica_generate.py", *flags)
            ran = [c["t"] for c in done["calls"] if c["blocks"]]
            assert ran == [timesteps[k] for k in SCHEDULES["hunyuanvideo-1.5"][1][budget]]
            assert done["summary"]["block_execs"] == 4 * budget


@real
@pytest.mark.slow
def test_real_two_ranks(tmp_path):
    """Upstream's sequence parallelism over two processes."""
    runner = shlex.split(REAL["HY15_RUNNER"])
    launcher = [*torchrun(runner[0], 2), *runner[1:]]
    done, _ = real_run(tmp_path, "two", "lemica_generate.py", *CACHED, "--lemica_step", 15, runner=launcher)
    assert done["summary"]["stack_full"] == 15


@real
@pytest.mark.slow
def test_real_without_the_cache_is_bit_identical(tmp_path):
    import numpy as np

    plain, at = real_run(tmp_path, "plain", "generate.py")
    ours, at2 = real_run(tmp_path, "ours", "lemica_generate.py")
    assert plain["summary"]["stack_full"] == ours["summary"]["stack_full"] == 50
    for name in ("latents", "video"):
        a, b = (np.load(p.parent / d["arrays"][name]) for p, d in ((at, plain), (at2, ours)))
        assert np.array_equal(a, b)
