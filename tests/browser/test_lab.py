"The explorers in JupyterLab, moved by keyboard: what the page shows is what Python computes, in both themes"
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest

import featsd.threshold as X
from featsd import timeline
from featsd.base.costs import costs_of
from featsd.base.core import study_file
from featsd.base.costs import SDConfig
from featsd.timeline import stage_rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

DATA = """
import numpy as np
from types import SimpleNamespace
from featsd.base.costs import TimingConfig
from featsd.metrics import Scores
rng = np.random.default_rng(0)
lens = rng.integers(4, 14, 60)
offsets = np.concatenate([[0], np.cumsum(lens)])
cos = (1 - rng.random(offsets[-1]) ** 2 / 2).astype(np.float32)
questions = ["what moves ?" if i % 2 else "what is big ?" for i in range(60)]
of = lambda cos, seed: Scores(offsets, cos, rank=np.random.default_rng(seed).integers(0, 2, len(cos)).astype(np.int32), clips=[f"clip{i // 6}" for i in range(60)])
m = SimpleNamespace(name="L1", metrics={"draft_forced": 0, "draft_free": 0}, questions=questions,
                    scores={("draft_forced", "L1"): of(cos, 1), ("draft_free", "L1"): of(cos[::-1].copy(), 2), ("draft_forced", "per-position mean"): of(cos * .8, 3), ("draft_wrong", "wrong-clip sensor"): of(cos * .9, 4)})
curve = [.85 ** i for i in range(1, 17)]
timing = TimingConfig(4., .2, 12., 1., .02, verify={2: 1.2, 9: 1.8}, measured=True)
accepted = {1: .8, 3: 1.9, 5: 2.7}
"""
here = {}
exec(DATA, here)


MINUTES = 600 # seconds after which a page counts as hung


def comes(holds):
    "Wait until `holds()` is true, or raises no longer"
    stop = time.monotonic() + MINUTES
    while True:
        try:
            if holds() is not False: return
            why = None
        except AssertionError as e: why = e
        if time.monotonic() > stop: raise why or AssertionError("it never came")
        time.sleep(.05)


def notebook(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)


@dataclass
class Page:
    "One notebook in one browser tab"
    page: object
    errors: list
    ms: dict = field(default_factory=dict) # what → key press to change

    def idle(self, seconds=MINUTES):
        self.page.wait_for_function("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=1000 * seconds)

    def run_all(self, seconds=MINUTES):
        "All cells, until the last has run or one has failed"
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
        self.page.wait_for_function("""() => { const code = jupyterapp.shell.currentWidget.content.model.toJSON().cells.filter(c => c.cell_type === 'code' && `${c.source}`.trim())
                                               return code.every(c => c.execution_count) || code.some(c => c.outputs.some(o => o.output_type === 'error')) }""", timeout=1000 * seconds)
        self.idle(seconds)
        assert self.failed() == []

    def failed(self):
        return self.page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap((c, i) => (c.outputs || []).filter(o => o.output_type === 'error').map(o => `${i}: ${o.ename} ${o.evalue}`))")

    def cell(self, i): return self.page.locator(".jp-Notebook .jp-Cell").nth(i)

    def show(self, i):
        self.page.evaluate("i => { const c = jupyterapp.shell.currentWidget.content; c.activeCellIndex = i; return c.scrollToItem(i) }", i)
        self.page.wait_for_function("i => { const o = document.querySelectorAll('.jp-Notebook .jp-Cell')[i].querySelector('.jp-OutputArea-output'); o && o.scrollIntoView(); return o }", arg=i, timeout=1000 * MINUTES)

    def drawn(self, i): # figures of a cell
        self.page.wait_for_function("i => { const f = [...document.querySelectorAll('.jp-Notebook .jp-Cell')[i].querySelectorAll('.js-plotly-plot')]; return f.length && f.every(x => x.querySelector('.xtick') && x.calcdata) }", arg=i, timeout=1000 * MINUTES)

    def trace(self, i, k): # numbers the page holds, x and y
        return self.page.evaluate("([i, k]) => { const t = document.querySelectorAll('.jp-Notebook .jp-Cell')[i].querySelector('.js-plotly-plot')._fullData[k]; return [Array.from(t.x), Array.from(t.y)] }", [i, k])

    def sentence(self, i): return self.cell(i).locator(".widget-html-content").last.inner_text().strip()

    def press(self, i, key, what=None):
        "A key, and until the sentence of cell i (and its figure) follow"
        self.page.evaluate("""i => {
            const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[i], t = window.timed = {}
            addEventListener('keydown', () => t.key = performance.now(), {once: true, capture: true})
            const seen = new MutationObserver(() => { t.text ??= performance.now(); seen.disconnect() })
            cell.querySelectorAll('.widget-html-content').forEach(n => seen.observe(n, {childList: true, characterData: true, subtree: true}))
            const figure = cell.querySelector('.js-plotly-plot')
            if (figure) figure.once('plotly_afterplot', () => t.figure = performance.now())
        }""", i)
        self.page.keyboard.press(key)
        self.page.wait_for_function("() => timed.text", timeout=1000 * MINUTES)
        self.idle()
        if what: self.ms.setdefault(what, []).append(self.page.evaluate("() => timed.text - timed.key"))
        if what and self.page.evaluate("() => timed.figure"): self.ms.setdefault(f"{what}, figure", []).append(self.page.evaluate("() => timed.figure - timed.key"))

    def tab(self):
        "To the next control; a readout that can be typed into lies between"
        was = self.page.evaluate("() => (window.left = document.activeElement).className")
        for _ in range(3):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("() => document.activeElement !== left && document.activeElement.matches('.noUi-handle, select')"): return
        raise AssertionError(f"Tab leads from {was} to {self.page.evaluate('document.activeElement.outerHTML.slice(0, 200)')}")

    def contrast(self, i): # [(class or text, ratio)] of every text in the cell's output, against what is behind it
        return self.page.evaluate("""i => {
            const rgba = c => { const v = c.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v }
            const over = (a, b) => [0, 1, 2].map(k => a[k] * a[3] + b[k] * (1 - a[3]))
            const lum = c => c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, k) => s + v * [.2126, .7152, .0722][k], 0)
            const behind = n => { const all = []; for (; n; n = n.parentElement) { const c = rgba(getComputedStyle(n).backgroundColor); all.push(c); if (c[3] === 1) break }
                                  return all.reverse().reduce((b, c) => over(c, b), [255, 255, 255]) }
            const own = n => [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim())
            const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[i].querySelector('.jp-OutputArea-output')
            return [...cell.querySelectorAll('*')].filter(n => own(n) && n.checkVisibility() && !n.closest('style, script, option, .slice, .bars, .modebar')).map(n => {
                const s = getComputedStyle(n), svg = n.closest('svg'), b = behind(n), ink = rgba(svg ? s.fill : s.color)
                let o = 1; for (let p = n; p && p !== cell; p = p.parentElement) o *= getComputedStyle(p).opacity
                const f = over([ink[0], ink[1], ink[2], ink[3] * o], b), [x, y] = [lum(f), lum(b)].sort((p, q) => q - p)
                return [n.textContent.trim().slice(0, 30), (x + .05) / (y + .05)]
            })
        }""", i)


@pytest.fixture
def open_lab(lab, chromium):
    "Opens a notebook of the served folder; at the end its console must have stayed silent"
    url, token, root = lab
    tabs = []
    def go(name, height=1250):
        page = chromium.new_page(viewport={"width": 1500, "height": height})
        p = Page(page, [])
        page.on("pageerror", lambda e: p.errors.append(str(e)))
        page.goto(f"{url}/lab/tree/{name}?token={token}&reset")
        page.wait_for_function("""() => { const w = window.jupyterapp && jupyterapp.shell.currentWidget, k = w?.sessionContext?.session?.kernel
                                          return k && k.connectionStatus === 'connected' && k.status === 'idle' }""", timeout=1000 * MINUTES)
        page.evaluate("() => { jupyterapp.commands.execute('application:toggle-left-area') }")
        tabs.append(p)
        return p
    yield go
    for p in tabs:
        p.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        p.page.close()
    for p in tabs: assert p.errors == []


def theme(p, name):
    p.page.evaluate("t => jupyterapp.commands.execute('apputils:change-theme', {theme: t})", name)
    p.page.wait_for_function("t => document.body.dataset.jpThemeName === t", arg=name, timeout=1000 * MINUTES)


def legible(p, i): return [(text, round(ratio, 2)) for text, ratio in p.contrast(i) if ratio < 4.5]


def shows_legibly(p, i):
    def no_text_is_faint(): assert legible(p, i) == []
    comes(no_text_is_faint) # colours fade over to a new theme


def test_sliders_answer_the_keyboard(lab, open_lab, shots):
    root = lab[2]
    rooms = "from featsd.threshold import threshold_explorer\nfrom featsd.timeline import presets_of, speedup_explorer, stage_timeline\n"
    notebook(root/"keys.ipynb", DATA, rooms + "box, parts = threshold_explorer(m, 'keys')\nbox", "box, cost = speedup_explorer(presets_of(curve, timing, {3: 1.9}, (.7, .9)), 'keys')\nbox",
             "box, stages = stage_timeline(timing, accepted, 'keys')\nbox")
    p = open_lab("keys.ipynb")
    p.run_all()
    for i in (1, 2, 3): p.drawn(i)
    comes(lambda: p.page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].map(f => f.querySelector('.main-svg').clientWidth / f.closest('.jp-OutputArea-output').clientWidth > .9)") == [True] * 3) # as wide as the page

    # the threshold: six arrows to the left, then Tab to γ, then the list of modes
    last = int(here["lens"].max()) - 1
    p.show(1)
    def check(least_cos, gamma, mode="consecutive", stream="draft_forced"):
        v = X.threshold_view(X.pad_scores(here["m"].scores[stream, "L1"], here["questions"]), least_cos, gamma, 0, last, None, mode)
        comes(lambda: p.sentence(1) == v["sentence"] and p.trace(1, 1)[0] == v["x"] and p.trace(1, 6)[1] == [pytest.approx(v["match_here"])])
        assert p.trace(1, 1) == [v["x"], pytest.approx(v["position"])]
        assert p.trace(1, 4) == [[pytest.approx(v["here"][0])], [pytest.approx(v["here"][1])]] and p.trace(1, 6)[1] == [pytest.approx(v["match_here"])]
        return v
    first = check(.9, 5)
    p.cell(1).locator(".noUi-handle").first.focus()
    for _ in range(6): p.press(1, "ArrowLeft", "threshold")
    assert check(.84, 5)["position"] != first["position"]
    p.tab()
    for _ in range(3): p.press(1, "ArrowRight", "threshold")
    check(.84, 8)
    p.page.screenshot(path=shots/"threshold_light.png")
    p.cell(1).locator("select").last.focus()
    p.press(1, "ArrowDown", "threshold")
    check(.84, 8, "relaxed")
    assert "no decoder can have" in p.sentence(1)
    p.cell(1).locator("select").first.focus()
    p.press(1, "ArrowDown", "threshold")
    check(.84, 8, "relaxed", "draft_free")
    assert p.page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex") == 1 # the keys moved controls, not cells

    # the cell runs again: what was set stays
    p.show(1)
    p.page.evaluate("() => jupyterapp.commands.execute('notebook:run-cell')")
    p.idle()
    p.drawn(1)
    check(.84, 8, "relaxed", "draft_free")

    # the costs: γ, then c
    p.show(2)
    def costs(gamma, c):
        o = round(costs_of(here["timing"])[1], 3)
        v = timeline.speedup_view(here["curve"], here["timing"], gamma, c, o, 50, False, {3: 1.9})
        comes(lambda: p.sentence(2) == v["sentence"] and p.trace(2, 9) == [[pytest.approx(v["point"][0])], [pytest.approx(c)]])
        assert p.trace(2, 2)[1] == pytest.approx(v["lines"]["exact"]) and p.trace(2, 9) == [[pytest.approx(v["point"][0])], [pytest.approx(c)]]
        return v
    c = round(costs_of(here["timing"])[0], 3)
    before = costs(5, c)
    p.cell(2).locator(".noUi-handle").first.focus()
    for _ in range(2): p.press(2, "ArrowLeft", "speedup")
    assert "measured 1.90x" in costs(3, c)["sentence"]
    p.cell(2).locator(".noUi-handle").nth(2).focus()
    for _ in range(5): p.press(2, "ArrowRight", "speedup")
    assert costs(3, round(c + .05, 3))["limit"] == before["limit"]
    p.page.screenshot(path=shots/"speedup_light.png")

    # the stages: γ and length
    p.show(3)
    p.cell(3).locator(".noUi-handle").first.focus()
    p.press(3, "ArrowRight", "stages")
    comes(lambda: "γ = 3, 1.90 accepted" in p.sentence(3))
    rows = stage_rows(here["timing"], 1.9, SDConfig(gamma_decode=3, n_out=50))
    comes(lambda: p.trace(3, 0)[0] == pytest.approx([r.ms for r in rows if r.stage == rows[0].stage]))
    comes(lambda: p.trace(3, 3)[0] == pytest.approx([r.ms for r in rows if r.stage == "drafting"]))
    p.page.screenshot(path=shots/"stages_light.png")

    # both themes
    for i in (1, 2, 3): shows_legibly(p, i)
    theme(p, "JupyterLab Dark")
    for i, name in ((1, "threshold"), (2, "speedup"), (3, "stages")):
        p.show(i)
        shows_legibly(p, i)
        p.page.screenshot(path=shots/f"{name}_dark.png")
    theme(p, "JupyterLab Light")
    for what, ms in p.ms.items(): print(f"{what}: {statistics.median(ms):.0f} ms from key to page, {max(ms):.0f} ms at most, n = {len(ms)}")


CHART = """
from featsd.base.figures import *
chart = Chart("Two curves", [Panel("", [Series("a", [0, 1, 2], [1., .9, .7], [.9, .8, .6], [1., .95, .8], [9, 8, 7]), Series("b", [0, 1, 2], [.5, .4, .3], null=True)], "position", "share")])
"""


def test_a_chart_and_a_table_show_themselves(lab, open_lab, shots):
    "What runs here is plotly's figure at once; what was run elsewhere is a picture that wakes under the pointer; a widget brings both"
    made, root = {}, lab[2]
    exec(CHART, made)
    chart = made["chart"]
    notebook(root/"charts.ipynb", CHART, "chart", "chart", "from featsd.base.tables import Table\nTable('t', ['name', 'n'], [['<b>a</b>', 3]])",
             "import ipywidgets as W\nShown(at_home(W.IntSlider(3), live_figure(chart.plotly())), chart)")
    nb = nbformat.read(root/"charts.ipynb", 4)
    nb.cells[1].outputs = [nbformat.v4.new_output("display_data", data=chart._repr_mimebundle_())] # as it is committed: no kernel, no trust
    nb.cells[4].outputs = [nbformat.v4.new_output("display_data", data=made["Shown"](made["live_figure"](chart.plotly()), chart)._repr_mimebundle_())]
    nbformat.write(nb, root/"charts.ipynb")
    p = open_lab("charts.ipynb")
    seen = lambda i: p.page.evaluate("""i => { const c = document.querySelectorAll('.jp-Notebook .jp-Cell')[i]
        return [c.querySelectorAll('.js-plotly-plot').length, [...c.querySelectorAll('.jp-OutputArea img')].filter(n => n.checkVisibility()).length] }""", i)
    p.page.wait_for_function("() => document.querySelectorAll('.jp-OutputArea img').length === 2")
    assert seen(1) == [0, 1] and seen(4) == [0, 1] # pictures, the widget's too
    p.show(1)
    p.cell(1).locator("img").hover(force=True)
    p.drawn(1)
    assert seen(1) == [1, 0] and p.trace(1, 1) == [[0, 1, 2], [1., .9, .7]]
    p.run_all()
    for i in (2, 4): p.drawn(i)
    assert seen(2) == [1, 0] and seen(4) == [1, 0] and p.cell(4).locator(".noUi-handle").count() == 1
    assert p.trace(2, 1) == [[0, 1, 2], [1., .9, .7]] and p.trace(4, 2)[1] == [.5, .4, .3]
    p.show(2)
    def hovered(): # the page may still be scrolling: point again until the figure answers
        x, y = p.page.evaluate("""() => { const f = document.querySelectorAll('.jp-Notebook .jp-Cell')[2].querySelector('.js-plotly-plot'), r = f.getBoundingClientRect(), l = f._fullLayout
            return [r.x + l._size.l + l.xaxis.d2p(2), r.y + l._size.t + l.yaxis.d2p(.7)] }""")
        for dx in (1, 0): p.page.mouse.move(x + dx, y)
        assert p.cell(2).locator(".hovertext tspan").all_text_contents() == ["a", "2: 0.7", "95 % interval 0.6 … 0.8", "n = 7"]
    comes(hovered)
    p.page.screenshot(path=shots/"chart.png")
    assert p.cell(3).locator("td").all_inner_texts() == ["<b>a</b>", "3"]
    assert p.page.evaluate("[...document.querySelectorAll('.jp-RenderedHTMLCommon td')].map(t => getComputedStyle(t).textAlign)") == ["left", "right"]


BOXES = {"nbs/lab/sliders.ipynb": 4, "nbs/lab/tour.ipynb": 4, "nbs/03_metrics.ipynb": 0, "nbs/03c_threshold.ipynb": 1, "nbs/04_timeline.ipynb": 2} # controls
LIVE = "application/vnd.plotly.v1+json"
MADE = "live => jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap((c, i) => (c.outputs || []).some(o => o.data && o.data[live]) ? [i] : [])" # cells with a chart
VISIBLE = "all => all.filter(n => n.checkVisibility()).map(n => n.complete ? n.naturalWidth : 0)" # widths of pictures


@pytest.mark.parametrize("path", [*BOXES, *sorted({f"nbs/lab/{p.name}" for p in (ROOT/"nbs"/"lab").glob("*.ipynb")} - {*BOXES})])
def test_notebooks_in_the_lab(lab, open_lab, shots, path):
    root = lab[2]
    for name in (path, "settings.ini", *(f"figures/{p.name}" for p in (ROOT/"figures").glob("*.json"))):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, root/name)
    cells = nbformat.read(ROOT/path, 4).cells
    boxes = [i for i, c in enumerate(cells) if c.cell_type == "code" and c.source.splitlines()[-1:] == ["box"]]
    charts = [i for i, c in enumerate(cells) if any(LIVE in o.get("data", {}) for o in c.get("outputs", []))]
    assert charts or "lab" in path
    assert len(boxes) == BOXES.get(path, 0)
    p = open_lab(path)
    start = time.monotonic()
    p.run_all()
    print(f"{path}: {time.monotonic() - start:.0f} s in the lab")
    made = p.page.evaluate(MADE, LIVE)
    if made != charts: # the study's published data are not at hand
        assert study_file() is None and set(made) < set(charts)
        print(f"{path}: the charts of cells {sorted(set(charts) - set(made))} need FEATSD_SHARED_DATA and were not looked at")
        charts = made
    pictures = p.page.locator(".jp-Notebook .jp-OutputArea img")
    comes(lambda: all(w > 100 for w in pictures.evaluate_all(VISIBLE)))
    p.page.screenshot(path=shots/f"{Path(path).stem}.png")
    for i in charts: # plotly's figure, not a picture of it
        p.show(i)
        p.drawn(i)
        assert p.cell(i).locator(".js-plotly-plot").count() == 1
        assert p.cell(i).locator(".jp-OutputArea img").evaluate_all(VISIBLE) == []
        p.page.screenshot(path=shots/f"{Path(path).stem}_cell{i}.png")
    for k, i in enumerate(boxes):
        p.show(i)
        figure = p.cell(i).locator(".js-plotly-plot").count()
        if figure:
            p.drawn(i)
            empty = lambda i=i: p.page.evaluate("""i => [...document.querySelectorAll('.jp-Notebook .jp-Cell')[i].querySelectorAll('.js-plotly-plot')].flatMap(f =>
                f._fullData.filter(t => t.visible === true && t.type !== 'pie' && !(t.x?.length && t.y?.length)).map(t => t.name))""", i)
            comes(lambda empty=empty: set(empty()) <= {"measured"}) # whatever was set before the box was shown
        before = p.sentence(i)
        p.cell(i).locator(".noUi-handle").first.focus()
        now, most = (float(p.cell(i).locator(".noUi-handle").first.get_attribute(f"aria-value{w}")) for w in ("now", "max"))
        left = now >= most or "0.9" in p.cell(i).locator(".widget-readout").first.inner_text()
        p.press(i, "ArrowLeft" if left else "ArrowRight", f"{Path(path).stem}, box {k + 1}")
        if figure: p.drawn(i)
        comes(lambda i=i, before=before: p.sentence(i) != before)
        shows_legibly(p, i)
        p.page.screenshot(path=shots/f"{Path(path).stem}_{k + 1}.png")
    if "sliders" in path: # a token tells what the drafter thought, also without a pointer
        i = boxes[2]
        p.cell(i).locator("select").last.focus()
        for _ in range(3): p.page.keyboard.press("Tab")
        assert "cos(aligned, target)" in p.page.evaluate("() => getComputedStyle(document.activeElement, '::after').content")
        theme(p, "JupyterLab Dark")
        p.show(i)
        p.page.screenshot(path=shots/"answer_dark.png")
        for k in boxes: shows_legibly(p, k)
        theme(p, "JupyterLab Light")
    assert p.failed() == []
    for what, ms in p.ms.items(): print(f"{what}: {statistics.median(ms):.0f} ms from key to page")
