"The report page in a browser: figures drawn, nothing asked of a network, hostile answers inert, readable on a phone"
import pytest

from featsd.metrics import TimingConfig
from featsd.report import write_report
from featsd.timeline import timeline_data

HOSTILE = "</pre><script>window.taken = 1</script><img src=https://example.com/x onerror='window.taken = 2'> " + "a-word-without-end" * 30
CURVE = [.9, .7, .4]
PICTURES = {
    "positions": ("positions", {"title": f"By position {HOSTILE[:60]}", "curves": [{"name": HOSTILE[:60], "y": CURVE, "lo": [.8, .6, .3], "hi": [.95, .8, .5], "n": [9, 9, 9]}, {"name": "per-position mean", "y": [.5, .3, .1], "null": True}]}),
    "frontier": ("frontier", {"curves": [{"name": "L1 KL, draft_forced", "accept": [.2, .5], "consecutive": [1., 3.], "tau": [.9, .8], "n": [4, 4]}]}),
    "nulls": ("nulls", {"title": "Tokens in a row", "y": "tokens", "rows": [{"name": n, "value": v, "lo": v - .5, "hi": v + .5, "n": 9, "null": v < 3} for n, v in (("L1", 3.), ("per-question-and-position mean", 1.))]}),
    "timeline": ("timeline", timeline_data(TimingConfig(), 2.5)),
    "speedup": ("speedup", {"title": "Speedup by γ", "curves": [{"name": n, "gamma": [1, 2, 3], "y": CURVE} for n in ("aligned, measured", "aligned, exact (estimate)")]})}


@pytest.fixture
def report(tmp_path):
    table = "\n".join(f"{n:30} " + " ".join(f"{v:12.3f}" for v in CURVE * 3) for n in ("adapter", "mean"))
    write_report(tmp_path, dict.fromkeys(("decoding", "intervals", "levels", "calibration", "stages", "table"), table) | {"verdict": f"Best drafter: aligned.\n{HOSTILE}"}, PICTURES, table)
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
    assert page.evaluate("[...document.querySelectorAll('.js-plotly-plot')].every(p => p.querySelectorAll('.trace, .slice, .point').length > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width # a table may scroll inside its own box
    assert page.evaluate("[...document.querySelectorAll('.figure, pre')].every(p => p.getBoundingClientRect().right <= innerWidth)")
    page.close()
