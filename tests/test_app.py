"""`stepcache app`: the page in a real browser (Debian's Chromium), and what it does with wrong input."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stepcache.bench.pairs import Maker, Stopped, chosen, request_from, takes_budget
from stepcache.bench.report.clips import page_of
from stepcache.commands.main import main
from stepcache.named import named

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "a red circle </script> {{ 7*7 }} ${7*7} <b>&amp;"


def pair(maker, model, method, request=None, tell=lambda *_: None):
    request = request or request_from(model, "a red circle", steps=4, height=32, width=32, num_frames=5)
    return maker.pair(model, request, method, named(method), tell)


def test_what_is_there_is_not_computed_again(model):
    maker, told = Maker(), []
    plain, cached = pair(maker, model, "uniform:2", tell=lambda what, done, of: told.append((what, done)))
    assert told[0] == ("loading the model", 0)
    assert told[-5:] == [("uniform:2", k) for k in range(5)]
    assert (plain.computed, cached.computed, cached.ideal_speedup) == (4, 2, 2.0)
    assert not np.array_equal(plain.frames, cached.frames)
    told.clear()
    again, other = pair(maker, model, "uniform:3", tell=lambda what, done, of: told.append((what, done)))
    assert again is plain
    assert other.computed == 3
    assert {what for what, _ in told} == {"uniform:3"}


def test_a_run_that_is_stopped_leaves_nothing_behind(model):
    maker = Maker()

    def stop(what, done, of):
        if (what, done) == ("uniform:2", 2):
            raise Stopped

    with pytest.raises(Stopped):
        pair(maker, model, "uniform:2", tell=stop)
    assert pair(maker, model, "uniform:2")[1].computed == 2


@pytest.mark.parametrize("name", ["emoji", "landscapes", "patterns"])
def test_other_pipelines_pictures_too(name):
    folder, told = str(ROOT / "assets" / "zoo" / name), []
    request = request_from(folder, "a red circle", steps=4)
    tell = lambda what, done, of: told.append((what, done, of))  # noqa: E731
    plain, cached = pair(Maker(), folder, "uniform:2", request, tell)
    assert (plain.computed, cached.computed) == (4, 2)
    assert len(plain.frames) == (9 if name == "patterns" else 1)
    assert told[-1] == ("uniform:2", 4, 4)
    assert "PSNR" in page_of(plain, cached, "uniform:2", request, 8.0)


def test_one_frame_and_equal_clips(model):
    request = request_from(model, "a red circle", steps=2, height=32, width=32, num_frames=1)
    page = page_of(*pair(Maker(), model, "uncached", request), "uncached", request, 8.0)
    assert "The same clip: computed 2 of 2 steps" in page
    assert "mean of" not in page


def test_fields_left_empty_are_the_model_s(model):
    request = request_from(model, " a cat ", steps=8, seed=" 3", guidance="2.5", height="", width="", num_frames="5")
    assert (request.prompt, request.steps, request.seed, request.guidance) == ("a cat", 8, 3, 2.5)
    assert (request.num_frames, request.height) == (5, request_from(model, "a cat").height)
    for name, text, says in (("seed", "one", "a whole number"), ("guidance", "nan", "a number")):
        with pytest.raises(ValueError, match=f"{name} is '{text}'; expected {says}, or nothing for the model's"):
            request_from(model, "a cat", **{name: text})


def test_the_budget_is_the_method_s_where_it_has_one():
    for written, text in (
        ("hindsight", "hindsight:20"),
        (" lemica,table=x", "lemica:20,table=x"),
        ("hindsight:0.5", "hindsight:0.5"),
        ("easycache:0.1", "easycache:0.1"),
    ):
        assert chosen(written, 20).text == text
    with pytest.raises(ValueError, match="is for stepcache generate"):
        chosen("magcache-calibration:ratios.json", 20)
    assert [takes_budget(name) for name in ("uniform", "uniform:3", "easycache", "nonsense")] == [True, *[False] * 3]


def test_mistakes(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, says in (
            (("--port", port), f"--port {port} cannot be used"),
            (("--port", 70000), "--port is 70000; expected 1 to 65535"),
            (("--host", "nowhere.invalid"), "--host nowhere.invalid cannot be used"),
            (("--model", tmp_path / "none"), "does not exist"),
            (("--model", tmp_path), "not a diffusers pipeline"),
            (("--device", "mars"), "--device mars cannot be used here"),
        ):
            assert main(["app", *map(str, flags)]) == 2
            assert says in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'stepcache[app]'" in capsys.readouterr().err


@pytest.fixture
def served():
    """The command as a process on a free port: (process, address)."""
    pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'stepcache[app]')")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stepcache", "app", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    yield process, process.stdout.readline().split()[0]
    process.kill()
    process.wait()


def wait(browser, selector, says="", seconds=60):
    """The first element that is there and has this text."""
    for _ in range(seconds * 20):
        found = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].find((e) => e.textContent.includes(arguments[1]))",
            selector,
            says,
        )
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {selector} with {says!r}: {browser.execute_script('return document.body.innerText')}")


def fill(browser, selector, text):
    """Type into a field as a user does: what was there goes."""
    field = wait(browser, selector)
    field.send_keys("\ue009a")  # control and a
    field.send_keys(str(text) or "\ue003", "\ue004")  # delete; tab leaves the field


@pytest.mark.slow
def test_both_clips_on_the_page(browser, served):
    process, address = served
    browser.get(address)
    wait(browser, "#make")
    fill(browser, "#prompt textarea", HOSTILE)
    fill(browser, "#steps input[type=number]", 10)
    browser.find_element("id", "make").click()
    wait(browser, ".toast-body", "a budget of 25 does not fit 10 steps")
    fill(browser, "#budget input[type=number]", 8)
    browser.find_element("id", "make").click()
    browser.switch_to.frame(wait(browser, "iframe[title=clips]"))
    wait(browser, "body[data-loaded]")
    assert HOSTILE in browser.find_element("id", "text").text
    assert "computed 8 of 10 steps, skipped 2; ideal speed-up 1.25x" in browser.find_element("id", "summary").text
    figures = browser.find_element("id", "figures").text
    assert figures.startswith("PSNR ")
    assert "(mean of 17 frames): computed 8 of 10 steps, loop" in figures
    pixels = "(id) => [...document.getElementById(id).getContext('2d').getImageData(0, 0, 64, 64).data]"
    a, b = np.array(browser.execute_script(f"return ['a', 'b'].map({pixels})"))  # they play, so both at once
    assert a.std() > 1
    assert 0 < np.abs(a - b).mean() < 64
    moved = browser.execute_script("return document.body.dataset.frame")
    wait(browser, f"body:not([data-frame='{moved}'])")
    browser.find_element("css selector", "[data-mode=difference]").click()
    caption = browser.find_element("id", "both-name").text
    assert caption.startswith("difference of uncached and hindsight:8")
    assert caption.endswith(", 8 times")
    fetched = "return performance.getEntriesByType('resource').map((e) => e.name)"
    assert all(url.startswith(("blob:", "data:")) for url in browser.execute_script(fetched))
    browser.switch_to.default_content()
    assert all(url.startswith((address, "blob:", "data:")) for url in browser.execute_script(fetched))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    fill(browser, "#prompt textarea", "")
    browser.find_element("id", "make").click()
    wait(browser, ".toast-body", "The prompt is empty; say what to generate.")
    fill(browser, "#prompt textarea", "a blue star")
    browser.execute_script("arguments[0].click()", wait(browser, "button", "seed, guidance, size"))
    fill(browser, "#num_frames textarea, #num_frames input", 1)
    browser.find_element("id", "make").click()
    browser.switch_to.frame(wait(browser, "iframe[srcdoc*='a blue star']"))
    wait(browser, "#figures", "computed 8 of 10 steps")
    assert "mean of" not in browser.find_element("id", "figures").text
    wait(browser, "body[data-loaded]")
    browser.switch_to.default_content()
    fill(browser, "#steps input[type=number]", 100)
    browser.find_element("id", "make").click()
    wait(browser, "#clips", "/100 steps")
    browser.find_element("id", "stop").click()
    wait(browser, ".toast-body", "Stopped.")
    browser.find_element("id", "make").click()
    wait(browser, "#clips", "/100 steps")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert "Traceback" not in process.stderr.read()
