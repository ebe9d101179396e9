"The report page in a browser: figures drawn, nothing asked of a network, hostile answers inert, readable on a phone"
import pytest

from featsd.base.costs import TimingConfig
from featsd.base.figures import Chart, Panel, Series
from featsd.base.page import Figure, Folded, Page, Section, Sliding
from featsd.base.tables import Table
from featsd.report import write_report
from featsd.timeline import chart_timeline

HOSTILE = ("</pre><script>window.taken = 1</script><img src=https://example.com/x onerror='window.taken = 2'> "
           + "a-word-without-end" * 30)
CURVE, AT, SOME = [.9, .7, .4], [0, 1, 2], HOSTILE[:60]


def one(title, *series, x="", y=""): return Chart(title, [Panel("", list(series), x, y)])


def bars(k): return one(f"setting {k}", Series(SOME, ["own", SOME], [k, 2. * k], kind="hbar"), Series("b", ["c"], [1.], kind="hbar", null=True))


PICTURES = {
    "positions": one(f"By position {SOME}", Series(SOME, AT, CURVE, [.8, .6, .3], [.95, .8, .5], [9, 9, 9]),
                     Series("per-position mean", AT, [.5, .3, .1], null=True), x="position", y="accepted"),
    "frontier": one("Frontier", Series("L1 KL, draft_forced", [.2, .5], [1., 3.], n=[4, 4], labels=["0.90", ""])),
    "nulls": one("In a row", Series("adapter", ["L1"], [3.], [2.5], [3.5], [9], kind="hbar"),
                 Series("baseline", [f"per-question-and-position mean {i}" for i in range(20)], [1.] * 20, kind="hbar", null=True)),
    "speedup": one("Speedup by γ", *(Series(n, AT, CURVE) for n in ("aligned, measured", "aligned, exact (estimate)"))),
    "timeline": chart_timeline(TimingConfig(), 2.5),
    "sliding": Sliding("γ", {str(k): bars(k) for k in (1, 2, 3)}, "2")}


@pytest.fixture
def report(tmp_path):
    table = Table("Rows", [SOME, "share"], [["b", .5], ["a", .25], [SOME, 10.]], under={1: "a remark"})
    parts = [HOSTILE, table, Folded("more", [HOSTILE])]
    page = Page("Does it pay?", f"Best drafter: aligned. {HOSTILE}", [Figure(PICTURES["nulls"], SOME), table], [
        Section("Why", [Figure(p, HOSTILE, k) for k, p in PICTURES.items()]), Section(HOSTILE, parts)])
    write_report(tmp_path, page, {})
    return tmp_path/"report.html"


@pytest.mark.parametrize("width, scheme", [(400, "light"), (1400, "dark")])
def test_the_report_opens_offline_and_inert(chromium, report, shots, width, scheme):
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, errors = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(report.as_uri())
    page.wait_for_function("() => [...document.querySelectorAll('.drawn')].every(n => n.querySelector('.main-svg'))")
    page.screenshot(path=shots/f"report_{width}.png", full_page=True)
    assert [u for u in asked if not u.startswith(("data:", "blob:"))] == [report.as_uri()] and errors == []
    assert page.evaluate("window.taken") is None and page.locator("img").count() == 0
    assert "<script>window.taken" in page.locator(".answer").inner_text() # shown as text
    assert page.evaluate("""() => [...document.querySelectorAll('.js-plotly-plot')].every(
        p => p.querySelectorAll('.trace, .slice, .point').length > 0)""")
    assert page.evaluate("document.documentElement.scrollWidth") <= width # a table may scroll inside its own box
    assert page.evaluate("""() => [...document.querySelectorAll('figure, .table, pre')].every(
        p => p.getBoundingClientRect().right <= innerWidth)""")
    # every bar keeps its label, legends are whole, and figures have the page's colours
    assert page.locator("figure").first.locator(".ytick").count() == 21 and page.locator(".scrollbar").count() == 0
    ink = page.locator("figure").first.locator(".xtick text").first.evaluate("n => getComputedStyle(n).fill")
    assert ink == {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 237, 243)"}[scheme]
    # a slider moves by key, and its sentence with it
    place = page.locator("figure", has=page.locator("[role=slider]")).last
    heights = lambda: place.locator(".drawn").evaluate("n => n.data.slice(0, 1).map(t => [...t.x])[0]")
    before = heights()
    place.locator("[role=slider]").press("ArrowRight")
    page.wait_for_function("() => [...document.querySelectorAll('.said')].some(n => n.textContent === 'setting 3')")
    assert (before, heights()) == ([2, 4], [3, 6])
    # a table sorts by key, a remark stays below its row
    head, rows = page.locator(".table").last.locator("th button"), page.locator(".table").last.locator("tbody tr")
    head.last.press("Enter")
    assert [t[:1] for t in rows.all_inner_texts()] == ["a", "a", "b", "<"]
    assert page.locator(".table").last.locator("th").last.get_attribute("aria-sort") == "ascending"
    head.last.press("Enter")
    assert [t[:1] for t in rows.all_inner_texts()] == ["<", "b", "a", "a"]
    page.close()
