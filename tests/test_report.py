"""`stepcache report`: the page in a real browser (Debian's Chromium), and what it does with odd input."""

import json
import re
import shutil
import time
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from stepcache.bench.labels import Label, label
from stepcache.bench.report import charts
from stepcache.bench.report.page import embedded
from stepcache.bench.results import Folder, Item
from stepcache.commands.main import main
from stepcache.measure import drawing
from stepcache.measure.video import write_clip

STEPS, FRAMES = 8, 9
HOSTILE = [
    "a plain prompt",
    '</script><script>document.title="taken"</script><img src=x onerror="document.title=1"> & '
    "'quotes' \"double\" {{ 7*7 }}",
    "🐈 " + "a long prompt " * 150,
]
METHODS = ("uncached", "uniform:4", "lemica:4,table=<b>&x", "steps:4")


def grey(level):
    return np.full((32, 48, 3), level, np.uint8)


def level_of(frame, method):
    """Every frame has a grey level of its own, every method another offset."""
    return 20 + 22 * frame + 5 * METHODS.index(method)


def folder_with(root, prompts, methods=METHODS, clip=None):
    folder = Folder(root)
    request = {"steps": STEPS, "guidance": 5.0, "width": 48, "height": 32, "num_frames": FRAMES, "negative_prompt": ""}
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.write(
        {
            "model": "somewhere/<i>model</i>",
            "request": request,
            "prompts": prompts,
            "seeds": [0],
            "searched": {},
            "schedules": {"plan:p.json": "hindsight, planned"},
            "fps": 8.0,
            "structure": "Wan",
            "sampler": "UniPC",
            "machine": "a machine",
            "dtype": "float32",
            "versions": {"stepcache": "0"},
            "date": "2026-01-01",
            "lpips": "no weights",
            "ceiling": {"psnr": None, "ssim": 1.0, "loop_ratio": 1.0},
        }
    )
    for number, method in enumerate(methods):
        for index, prompt in enumerate(prompts):
            path = folder.clip(method, index, prompt, 0, False)
            if clip is None:
                write_clip(path, np.stack([grey(level_of(k, method)) for k in range(FRAMES)]), 8.0)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(clip, path)
            same = method == "uncached"
            computed = STEPS if same else 4
            Item(
                method,
                index,
                prompt,
                0,
                computed=computed,
                per_step=(1.0, 0.0) * 4 if not same else (1.0,) * STEPS,
                loop_seconds=0.5 * computed / STEPS + 0.01 * number,
                reference_seconds=0.5,
                psnr=None if same else 30.0 + number + index,
                ssim=0.9,
                identical=same,
                psnr_per_frame=(30.0,) * FRAMES,
                step_errors=tuple(0.01 * k * (number + 1) for k in range(STEPS)),
                clip=str(path.relative_to(root)),
            ).save(folder.item(method, index, 0))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report") / "results"
    folder_with(root, HOSTILE)
    assert main(["report", str(root)]) == 0
    return root / "report.html"


def opened(browser, path):
    browser.get(path.as_uri())
    wait(browser, "return document.body.dataset.loaded")
    return browser


def wait(browser, script, value=None, seconds=20):
    for _ in range(seconds * 20):
        found = browser.execute_script(script)
        if found == value if value is not None else found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{script} never came true")


def shows(browser, canvas, x=0.5, *, value, seconds=10):
    """A canvas comes to have that grey; it is drawn a little after its clip is loaded."""
    for _ in range(seconds * 20):
        if abs(pixel(browser, canvas, x) - value) <= 3:
            return
        time.sleep(0.05)
    raise AssertionError(f"{canvas} shows {pixel(browser, canvas, x)}, expected {value}")


def pixel(browser, canvas, x=0.5):
    """Mean grey of a canvas where it is `x` of its width from the left."""
    return browser.execute_script(
        "const c = document.getElementById(arguments[0]);"
        "return c.getContext('2d').getImageData(Math.floor(arguments[1] * c.width), 8, 1, 1).data[0]",
        canvas,
        x,
    )


def press(browser, keys):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script("document.activeElement.blur()")
    ActionChains(browser).send_keys(keys).perform()


def frame_of(level, method):
    return round((level - 20 - 5 * METHODS.index(method)) / 22)


def test_the_players_run_in_lock_step(browser, page):
    opened(browser, page)
    for k in range(FRAMES):
        shows(browser, "a", value=level_of(k, "uncached"))
        shows(browser, "b", value=level_of(k, "steps:4"))
        press(browser, "\ue014")  # arrow right
    assert browser.execute_script("return document.body.dataset.frame") == "0"  # it came round
    press(browser, "\ue012")
    assert browser.execute_script("return document.body.dataset.frame") == str(FRAMES - 1)
    press(browser, " ")
    seen = set()
    for _ in range(25):
        both = "const v = (id) => document.getElementById(id).getContext('2d').getImageData(24, 8, 1, 1).data[0];"
        a, b = browser.execute_script(both + "return [v('a'), v('b')]")
        assert frame_of(a, "uncached") == frame_of(b, "steps:4")
        seen.add(frame_of(a, "uncached"))
        time.sleep(0.05)
    assert len(seen) > 4
    press(browser, " ")
    assert browser.execute_script("return document.getElementById('play').textContent") == "play"


def test_views(browser, page):
    opened(browser, page)
    press(browser, "2")
    shows(browser, "both", 0.1, value=level_of(0, "uncached"))
    shows(browser, "both", 0.9, value=level_of(0, "steps:4"))
    press(browser, "]" * 10)
    shows(browser, "both", 0.9, value=level_of(0, "uncached"))
    press(browser, "3")
    shows(browser, "both", value=15)
    assert "brightness(8)" in browser.execute_script("return document.getElementById('both').style.filter")
    browser.find_element("css selector", "[data-mode=side]").click()
    assert browser.find_element("id", "a").is_displayed()
    assert not browser.find_element("id", "both").is_displayed()


def test_prompts_are_data(browser, page):
    opened(browser, page)
    title = browser.title
    for text in (*HOSTILE[1:], HOSTILE[0]):
        press(browser, "n")
        wait(browser, f"return document.getElementById('text').textContent.includes({json.dumps(text[:40])})", True)
    assert browser.title == title
    assert "Wan" in title
    shown = browser.find_element("css selector", "#table tbody").text
    assert "lemica:4,table=<b>&x" in shown
    assert "49" not in browser.execute_script("return document.getElementById('prompt').textContent")


def test_choosing_and_sorting(browser, page):
    opened(browser, page)
    browser.execute_script(
        "const s = document.getElementById('right'); s.value = 'uniform:4'; s.dispatchEvent(new Event('change'))"
    )
    wait(browser, "return document.body.dataset.loaded", "0 uncached uniform:4")
    shows(browser, "b", value=level_of(0, "uniform:4"))
    assert "4 steps: 31.00 dB" in browser.find_element("id", "b-name").text
    heads = browser.find_elements("css selector", "#table thead button")
    next(h for h in heads if h.text == "PSNR mean").click()
    rows = browser.find_elements("css selector", "#table tbody th")
    assert next(r.text for r in rows) == "steps:4, fewer steps"


def test_nothing_complains_and_nothing_is_loaded_from_elsewhere(browser, page):
    opened(browser, page)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    urls = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert all(url.startswith(("blob:", "data:")) for url in urls)


def test_a_clip_that_is_gone(browser, tmp_path, capsys):
    folder = folder_with(tmp_path / "r", HOSTILE[:1], METHODS[:2])
    folder.clip("uniform:4", 0, HOSTILE[0], 0, False).unlink()
    assert main(["report", str(folder.root), "--no-figures"]) == 0
    assert "1 clip(s) are missing or unreadable" in capsys.readouterr().out
    opened(browser, folder.root / "report.html")
    assert "no clip of uniform:4" in browser.find_element("id", "status").text


@pytest.mark.slow
def test_forty_methods_open_quickly(browser, tmp_path):
    moving = np.random.default_rng(0).integers(0, 255, (24, 12, 20, 3)).astype(np.uint8)
    clip = tmp_path / "clip.mp4"
    write_clip(clip, moving.repeat(16, 1).repeat(16, 2), 16.0)
    methods = ("uncached", *(f"method{k}:4" for k in range(20)), *(f"uniform:{b}" for b in range(20)))
    folder = folder_with(tmp_path / "r", [f"prompt {i}" for i in range(8)], methods, clip)
    assert main(["report", str(folder.root), "--no-figures"]) == 0
    page = folder.root / "report.html"
    assert page.stat().st_size < 60 * 2**20

    def seconds():
        began = time.perf_counter()
        browser.get(page.as_uri())
        wait(browser, "return document.readyState", "complete")
        return time.perf_counter() - began

    # of three tries, since others use the machine too
    assert any(seconds() < 3 for _ in range(3))


CHARTS = ("psnr", "ssim", "speedup", "errors", "steps", "prompts")


def test_figures(page):
    names = {p.name for p in (page.parent / "figures").iterdir()}
    assert names == {f"{n}.{e}" for n in CHARTS for e in ("svg", "png")}
    assert all(p.stat().st_size > 5000 for p in (page.parent / "figures").iterdir())
    svg = (page.parent / "figures" / "psnr.svg").read_text()
    assert drawing.SERIES[0] in svg  # files have colours of their own, pages those of their theme
    assert "var(--" not in svg


def test_nothing_to_compare(tmp_path):
    """The uncached run alone, and a method that is identical to it, have no charts of what was not measured."""
    folder = folder_with(tmp_path / "r", HOSTILE[:1], METHODS[:1])
    assert main(["report", str(folder.root), "--no-figures"]) == 0
    assert set(charts_of(folder.root / "report.html")) == {"steps"}
    replace(folder.items()[0], method="uniform:8").save(folder.item("uniform:8", 0, 0))
    assert main(["report", str(folder.root), "--no-figures"]) == 0
    assert set(charts_of(folder.root / "report.html")) == {"ssim", "speedup", "errors", "steps"}


def charts_of(page, kind="chart"):
    """Name -> the chart's element, parsed."""
    found = re.findall(rf'(<svg id="(\w+)" class="{kind}".*?</svg>)', page.read_text(), re.DOTALL)
    spaces = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return {name: ElementTree.fromstring(text.replace("<svg", spaces, 1)) for text, name in found}


def test_charts_have_text_and_the_colours_of_the_page(page):
    charts = charts_of(page)
    assert tuple(charts) == CHARTS
    for name, chart in charts.items():
        text = ElementTree.tostring(chart, "unicode")
        assert len(text) < 60_000
        assert "var(--ink)" in text
        assert "var(--grey)" in text
        assert not re.search(r"#[0-9a-f]{6}\b", text), name  # no colour that a dark page would not change
    ids = [element.get("id") for chart in charts.values() for element in chart.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_every_chart_says_which_method_is_which(page):
    """By a legend, or by the method's name on its row; and the marks say their numbers when pointed at."""
    for name, chart in charts_of(page).items():
        texts = {"".join(e.itertext()) for e in chart.iter() if e.tag.endswith("}text")}
        titles = " ".join(e.text for e in chart.iter() if e.tag.endswith("}title"))
        curves = name in ("psnr", "ssim", "speedup")
        expected = ["uniform, even", "lemica, published list, table=<b>&x", "steps, fewer steps"]
        if not curves:
            expected = ["uniform:4, even", "lemica:4,table=<b>&x, published list", "steps:4, fewer steps"]
        assert set(expected) <= texts, name
        assert "lemica:4,table=<b>&x, published list" in titles


def test_methods_and_their_settings_look_different():
    methods = ["uniform:4", "uniform:6", "hindsight:4", "plan:a.json"]
    named = charts.Named({m: label(m) for m in methods})
    one, other = named.look("uniform:4"), named.look("uniform:6")
    assert (one["color"], one["marker"]) == (other["color"], other["marker"])
    assert one["linestyle"] != other["linestyle"]
    assert len({named.look(m)["color"] for m in methods}) == 3
    assert named.look("uncached")["color"] == drawing.GREY
    many = charts.Named({f"m{i},{k}": Label(f"m{i},{k}", f"m{i}") for i in range(60) for k in range(6)})
    looks = {m: many.look(m) for m in many.labels}
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks.values()}) == 360
    assert len({(look["color"], look["linestyle"]) for m, look in looks.items() if m.endswith(",0")}) == 60


MANY = ("uncached", *(f"method{k}:4" for k in range(22)), "hindsight:4", "plan:p.json", "steps:4")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A page of 25 methods; the items of one are faster than can be."""
    root = tmp_path_factory.mktemp("many") / "results"
    clip = root.parent / "clip.mp4"
    write_clip(clip, np.stack([grey(20)] * FRAMES), 8.0)
    folder = folder_with(root, HOSTILE[:2], MANY, clip)
    for index, seconds in enumerate((0.2, 0.24)):
        path = folder.item("steps:4", index, 0)
        replace(Item.load(path), loop_seconds=seconds).save(path)
    assert main(["report", str(root), "--no-figures"]) == 0
    return root / "report.html"


@pytest.fixture
def screen(browser):
    """(width) -> a screen so wide, until the test ends."""

    def screen(width):
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield screen
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def cells_of(browser):
    """Method -> column -> text."""
    heads, *rows = browser.execute_script(
        "return [...document.querySelectorAll('#table tr')].map((r) => [...r.cells].map((c) => c.innerText.trim()))"
    )
    assert len(set(heads)) == len(heads)
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def test_the_table_names_its_columns_and_methods_apart(browser, many):
    opened(browser, many)
    rows = cells_of(browser)
    assert {"hindsight:4, by noise level", "plan:p.json, hindsight, planned", "steps:4, fewer steps"} <= set(rows)
    row = rows["hindsight:4, by noise level"]
    assert (row["PSNR mean"], row["PSNR worst"], row["items"]) == ("53.50", "53.00", "2")
    assert row["SSIM mean"] == row["SSIM worst"] == "0.9000"
    assert "LPIPS mean" not in row  # nobody measured it


def test_a_speedup_above_the_ideal_is_noise(browser, many):
    opened(browser, many)
    rows = cells_of(browser)
    assert rows["steps:4, fewer steps"]["speed-up"].split() == ["2.29×", "noise:", "2.08–2.50×"]
    assert rows["steps:4, fewer steps"]["ideal"] == "2.00×"
    assert [name for name, row in rows.items() if "noise" in row["speed-up"]] == ["steps:4, fewer steps"]


def test_a_phone_scrolls_the_table_and_is_told_so(browser, many, screen):
    hint = "return getComputedStyle(document.querySelector('.hint')).display !== 'none'"
    faded = "return getComputedStyle(document.querySelector('.scroll')).maskImage !== 'none'"
    screen(390)
    opened(browser, many)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    wait(browser, hint)
    assert browser.execute_script(faded)
    first = "return document.querySelector('#table tbody th').getBoundingClientRect().left"
    left = browser.execute_script(first)
    browser.execute_script("const s = document.querySelector('.scroll'); s.scrollLeft = s.scrollWidth")
    wait(browser, hint, False)
    assert not browser.execute_script(faded)
    assert browser.execute_script(first) == left  # the method stays in sight
    screen(1280)
    opened(browser, many)
    assert browser.execute_script("const s = document.querySelector('.scroll'); return s.scrollWidth <= s.clientWidth")
    assert not browser.execute_script(hint)


def test_text_in_charts_is_large_enough_for_a_phone(browser, many, screen):
    for width in (360, 390, 1280):
        screen(width)
        opened(browser, many)
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('svg.chart')].flatMap((s) => {"
            "const k = s.getBoundingClientRect().width / s.viewBox.baseVal.width;"
            "return [...s.querySelectorAll('text')].map((t) => parseFloat(getComputedStyle(t).fontSize) * k)})"
        )
        assert len(sizes) > 100
        assert min(sizes) >= 10


CONTRASTS = """
const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [r, g, b] = rgb(colour).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (e) => {
  const colour = getComputedStyle(e).backgroundColor;
  return (rgb(colour)[3] ?? 1) === 1 ? colour : ground(e.parentElement);
};
const contrast = (one, other) => {
  const [a, b] = [light(one), light(other)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
};
const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility();
const texts = [...document.body.querySelectorAll("*:not(script, style, option, title)")].filter(own);
const lines = [...document.querySelectorAll(".key g > path[style*=stroke]")];
return {
  texts: texts.map((e) => [
    contrast(getComputedStyle(e)[e.ownerSVGElement ? "fill" : "color"], ground(e)), e.textContent.slice(0, 40),
  ]),
  lines: lines.map((e) => [contrast(getComputedStyle(e).stroke, ground(e)), e.getAttribute("style")]),
  drawn: texts.filter((e) => e.ownerSVGElement).length,
  ground: light(ground(document.querySelector("section"))),
};
"""


@pytest.mark.parametrize("preferred", ["light", "dark"])
def test_texts_and_lines_stand_out_in_both_themes(browser, many, screen, preferred):
    """WCAG AA: 4.5 for text, 3 for lines; as the system prefers, and as the button says."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": preferred}]}
    )
    opened(browser, many)
    for theme in (preferred, "dark" if preferred == "light" else "light", preferred):
        found = browser.execute_script(CONTRASTS)
        assert (found["ground"] < 0.5) == (theme == "dark")
        assert found["drawn"] > 200
        assert len(found["texts"]) > found["drawn"] + 200
        assert len(found["lines"]) >= len(MANY) - 1
        assert min(found["texts"])[0] >= 4.5, min(found["texts"])
        assert min(found["lines"])[0] >= 3, min(found["lines"])
        browser.find_element("id", "theme").click()


def grouped(chart, name):
    """Matplotlib's groups of that name in a chart."""
    return [e for e in chart.iter() if re.search(rf"-{name}_\d+$", e.get("id", ""))]


def lines_of(element):
    """(stroke with dashes, mark, its fill) of every line with a mark."""
    found = []
    for line in grouped(element, "line2d"):
        strokes = [e.get("style") for e in line if e.tag.endswith("}path")]
        uses = [e for e in line.iter() if e.tag.endswith("}use")]
        if strokes and uses:
            mark = uses[0].get("{http://www.w3.org/1999/xlink}href").partition("-")[2]
            found.append((strokes[0], mark, uses[0].get("style")))
    return found


def test_table_and_legends_show_the_same_lines(many):
    keys = charts_of(many, "key")
    lines = [line for key in keys.values() for line in lines_of(key)]
    assert len(lines) == len(set(lines)) == len(MANY) - 1
    for name, chart in charts_of(many).items():
        (legend,) = grouped(chart, "legend")
        assert any(e.tag.endswith("}text") for e in legend.iter())
        if name in ("psnr", "ssim", "errors"):
            assert lines_of(legend) == lines, name


def ticks(chart):
    """Text -> x of the ticks along the bottom."""
    found = {}
    for tick in grouped(chart, "xtick"):
        mark = next(e for e in tick.iter() if e.tag.endswith("}use"))
        found["".join(tick.itertext()).strip()] = float(mark.get("x"))
    return found


def test_charts_over_the_same_steps_have_the_same_axis(many):
    charts = charts_of(many)
    edges = {tuple(re.findall(r"[ML] ([\d.]+)", grouped(c, "patch")[1][0].get("d"))) for c in charts.values()}
    assert len(edges) == 1
    assert ticks(charts["psnr"]) == ticks(charts["ssim"]) == ticks(charts["speedup"])
    assert ticks(charts["errors"]) == ticks(charts["steps"])
    assert len(ticks(charts["psnr"])) > 1
    assert len(ticks(charts["steps"])) > 1


def test_names_are_never_formulas_or_markup(tmp_path):
    methods = ("uncached", "plan:$x_2$.json", "plan:a_{b}.json", "steps:4")
    folder = folder_with(tmp_path / "r", HOSTILE[:1], methods[:1])
    for number, method in enumerate(methods[1:]):
        item = folder.items()[0]
        same = {"identical": False, "psnr": 30.0 + number, "computed": 4.0, "clip": ""}
        replace(item, method=method, **same).save(folder.item(method, 0, 0))
    assert main(["report", str(folder.root)]) == 0
    texts = {"".join(e.itertext()) for e in charts_of(folder.root / "report.html")["prompts"].iter()}
    assert {"plan:$x_2$.json, planned", "plan:a_{b}.json, planned"} <= texts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--width", "8"), "--width is 8"),
        (("--clips", "0"), "--clips is 0"),
        (("--out", "bench.json/page.html"), "is a file, not a folder"),
    ],
)
def test_mistakes(page, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(page.parent)
    before = page.read_bytes()
    assert main(["report", str(page.parent), *flags]) == 2
    assert message in capsys.readouterr().err
    assert page.read_bytes() == before


def test_small_previews(tmp_path):
    from stepcache.measure.video import open_clip, write_preview

    frames = np.random.default_rng(0).integers(0, 255, (5, 90, 160, 3), dtype=np.uint8)
    write_clip(tmp_path / "large.mkv", frames, 8.0)
    write_preview(tmp_path / "small.mp4", open_clip(tmp_path / "large.mkv"), 64)
    small = open_clip(tmp_path / "small.mp4")
    assert (small.width, small.height, len(list(small))) == (64, 36, 5)
    write_preview(tmp_path / "same.mp4", small, 64)
    assert (tmp_path / "same.mp4").read_bytes() == (tmp_path / "small.mp4").read_bytes()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: (root.mkdir(), (root / "bench.json").write_text("{}")), "not a stepcache.bench file"),
        (lambda root: folder_with(root, [], ()), "holds no items yet"),
    ],
)
def test_bad_folders(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "r")
    assert main(["report", str(tmp_path / "r")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r" / "report.html").exists()


def test_data_in_a_script_stays_data():
    assert embedded({"a": "</script>&"}) == '{"a": "\\u003c/script\\u003e\\u0026"}'
