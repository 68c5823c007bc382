"""The self-test: its checks are the suite's, on the CPU and on a card; what must fail fails; the command."""

import json
import math

import pytest
import torch

from stepcache.bench import checks
from stepcache.bench.checks import CHECKS, METHODS, NEEDS_CARD
from stepcache.bench.methods import PEERS
from stepcache.bench.selftest import run_check
from stepcache.commands.main import main
from stepcache.core.cache import StepCache
from stepcache.core.summary import RunSummary
from stepcache.hindsight.corrector import Corrector
from stepcache.hosts.patching import LastingPatches
from stepcache.named import CALIBRATION, KINDS, read

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers with this numpy


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_check_passes(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    outcome = run_check(name, torch.device(device))
    if outcome.result == "skipped" and device == "cpu":
        pytest.skip(outcome.sentence)
    assert outcome.result == "passed", outcome.sentence


def test_what_the_cpu_cannot_show_is_known():
    outcomes = [run_check(name, CPU) for name in ("compile-reduce-overhead", "offload-models", "no-waiting")]
    assert [found.result for found in outcomes] == ["skipped"] * 3
    assert {found.sentence for found in outcomes} == {NEEDS_CARD}


def test_no_method_is_forgotten():
    of_files = {"plan", CALIBRATION}  # a plan, and the calibration, are among the check's policies as objects
    assert {read(text).name for text in METHODS} == set(KINDS) - set(PEERS) - of_files


LEAKED = []


def perturb(original):
    return lambda self, output=None, sampler=None: original(self, output, sampler) * (1 + 1e-6)


def compute_and_say_so_not(original):
    def call(self, step, branch, computed, forced):
        original(self, step, branch, computed and step != 3, forced)

    return call


def leak(original):
    def keep(self, call, x, output):
        LEAKED.append(output.clone())
        original(self, call, x, output)

    return keep


def mix_the_batch(original):
    return lambda self, missed: original(self, missed).mean(0, keepdim=True) * missed.new_ones(1, 1, 1, 1, 1)


def misremember_in_a_compiled_run(original):
    before = checks._graphs()
    return lambda self, call, x: original(self, call, x) * (1.5 if checks._graphs() > before else 1)


def misremember_in_float16(original):
    return lambda self, call, x: original(self, call, x) * (1.2 if x.dtype == torch.float16 else 1)


def round_what_is_held_elsewhere(original):
    return lambda self, x: original(self, x) if self._device is None else original(self, x).bfloat16().float()


def take_every_other_step_for_another_branch(original):
    return lambda self, branch, x, **given: original(self, f"{branch} {self._step % 2}", x, **given)


def count_the_steps_of_all_together(original):
    count = [0]

    def next_step(self, latent, owner):
        count[0] = 0 if self._step < 0 else count[0] + 1
        self._step = count[0] - 1
        original(self, latent, owner)

    return next_step


BREAK = [
    ("control", StepCache, "step_over", perturb, "the latents differ by up to"),
    ("control", LastingPatches, "restore", lambda original: lambda self: None, "was not put back"),
    ("methods", RunSummary, "call", compute_and_say_so_not, "evaluations seen, and the summary says"),
    ("corrector", Corrector, "_correction", lambda original: lambda *given: None, "with the correction"),
    ("bfloat16", Corrector, "_forecast", lambda original: lambda *given: original(*given) * math.nan, "not finite"),
    ("float16", StepCache, "predict", misremember_in_float16, "in float32"),
    ("batch", Corrector, "_trusted", mix_the_batch, "apart, uncached"),
    ("compile", StepCache, "predict", misremember_in_a_compiled_run, "from what it gives uncompiled"),
    ("memory", StepCache, "keep", leak, "bytes more are allocated after 20 runs"),
    ("guidance-off", StepCache, "enter", take_every_other_step_for_another_branch, "branches; expected 1"),
    ("cache-on-cpu", Corrector, "_held", round_what_is_held_elsewhere, "cached tensors on the CPU: the latents differ"),
    ("side-by-side", StepCache, "_next_step", count_the_steps_of_all_together, "beside another"),
]


@pytest.mark.parametrize(("name", "owner", "method", "broken", "says"), BREAK, ids=[f"{b[0]}-{b[2]}" for b in BREAK])
def test_a_check_fails_when_what_it_shows_is_broken(name, owner, method, broken, says, monkeypatch):
    monkeypatch.setattr(owner, method, broken(getattr(owner, method)))
    outcome = run_check(name, CPU)
    LEAKED.clear()
    assert outcome.result == "failed", outcome.sentence
    assert says in outcome.sentence, outcome


def test_waiting_is_found_and_where(monkeypatch):
    """The card's part is played: what waits raises while CUDA's debug mode is "error"."""
    modes, keep = ["default"], StepCache.keep

    def waiting(self, call, x, output):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        keep(self, call, x, output)

    monkeypatch.setattr(checks, "_require_card", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert run_check("no-waiting", CPU).result == "passed"
    assert modes.count("error") == 11 * (1 + len(checks.PLANNED))
    monkeypatch.setattr(StepCache, "keep", waiting)
    outcome = run_check("no-waiting", CPU)
    assert outcome.result == "failed"
    assert "hindsight (budget 6) waits for the device: " in outcome.sentence
    assert "test_selftest.py:" in outcome.sentence
    assert modes[-1] == "default"


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_tells_what_passed_and_writes_it(tmp_path, capsys):
    file = tmp_path / "found.json"
    only = "no-waiting,guidance-off"
    assert main(["selftest", "--device", "cpu", "--only", only, "--json", str(file)]) == 0
    versions, first, second, last = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in versions
    assert first.split()[:2] == ["guidance-off", "ok"]
    assert second.split()[:2] == ["no-waiting", "skipped"]
    assert last == "1 passed, 0 failed, 1 skipped (needs a CUDA device)"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["torch"], found["device"]) == (torch.__version__, "cpu")
    assert [(check["name"], check["result"]) for check in found["checks"]] == [
        ("guidance-off", "passed"),
        ("no-waiting", "skipped"),
    ]


def test_whatever_a_check_raises_is_a_failure_and_the_next_one_runs(capsys, monkeypatch):
    def broken(self, *given):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(StepCache, "begin", broken)
    assert main(["selftest", "--device", "cpu", "--only", "guidance-off,batch"]) == 1
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert "FAILED" in first
    assert "ZeroDivisionError: by zero (test_selftest.py:" in first
    assert "FAILED" in second
    assert last == "0 passed, 2 failed, 0 skipped"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
        (("--only", "control,memry"), "'memry' is no check; expected some of control, methods"),
        (("--only", ""), "'' is no check"),
        (("--json", "."), "is a folder"),
    ],
)
def test_bad_input(flags, says, capsys):
    assert main(["selftest", *flags]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert not told.out
