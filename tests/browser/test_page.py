"The report page in a browser: figures drawn, nothing asked of a network, hostile answers inert, readable on a phone"
import pytest

from featsd.base.costs import TimingConfig
from featsd.base.figures import Chart, Panel, Series
from featsd.report import write_report
from featsd.timeline import chart_timeline

HOSTILE = ("</pre><script>window.taken = 1</script><img src=https://example.com/x onerror='window.taken = 2'> "
           + "a-word-without-end" * 30)
CURVE, AT, SOME = [.9, .7, .4], [0, 1, 2], HOSTILE[:60]


def one(title, *series, x="", y=""): return Chart(title, [Panel("", list(series), x, y)])


PICTURES = {
    "positions": one(f"By position {SOME}", Series(SOME, AT, CURVE, [.8, .6, .3], [.95, .8, .5], [9, 9, 9]),
                     Series("per-position mean", AT, [.5, .3, .1], null=True), x="position", y="accepted"),
    "frontier": one("Frontier", Series("L1 KL, draft_forced", [.2, .5], [1., 3.], n=[4, 4], labels=["0.90", ""])),
    "nulls": one("In a row", Series("adapter", ["L1"], [3.], [2.5], [3.5], [9], kind="hbar"),
                 Series("baseline", ["per-question-and-position mean"], [1.], [.5], [1.5], kind="hbar", null=True)),
    "speedup": one("Speedup by γ", *(Series(n, AT, CURVE) for n in ("aligned, measured", "aligned, exact (estimate)"))),
    "timeline": chart_timeline(TimingConfig(), 2.5)}


@pytest.fixture
def report(tmp_path):
    table = "\n".join(f"{n:30} " + " ".join(f"{v:12.3f}" for v in CURVE * 3) for n in ("adapter", "mean"))
    result = dict.fromkeys(("decoding", "intervals", "levels", "calibration", "stages", "table"), table)
    write_report(tmp_path, result | {"verdict": f"Best drafter: aligned.\n{HOSTILE}"}, PICTURES, table)
    return tmp_path/"report.html"


@pytest.mark.parametrize("width", [400, 1280])
def test_the_report_opens_offline_and_inert(chromium, report, shots, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    asked, errors = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(report.as_uri())
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {len(PICTURES)}")
    page.screenshot(path=shots/f"report_{width}.png", full_page=True)
    assert [u for u in asked if not u.startswith(("data:", "blob:"))] == [report.as_uri()] and errors == []
    assert page.evaluate("window.taken") is None and page.locator("img").count() == 0
    assert "<script>window.taken" in page.locator("pre").first.inner_text() # shown as text
    assert page.evaluate("""() => [...document.querySelectorAll('.js-plotly-plot')].every(
        p => p.querySelectorAll('.trace, .slice, .point').length > 0)""")
    assert page.evaluate("document.documentElement.scrollWidth") <= width # a table may scroll inside its own box
    assert page.evaluate("""() => [...document.querySelectorAll('.figure, pre')].every(
        p => p.getBoundingClientRect().right <= innerWidth)""")
    page.close()
