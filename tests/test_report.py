"The page that a reader opens: offline, and inert whatever an answer contains"
import re

import numpy as np

from featsd.data.figures import write_html
from featsd.nulls import word_row
from featsd.report import short_table, write_report

HOSTILE = "</pre><script>document.title='taken'</script><img src=https://example.com/x onerror=alert(1)>"


def test_hostile_text_is_inert(tmp_path):
    write_html(tmp_path/"page.html", HOSTILE, [HOSTILE])
    page = (tmp_path/"page.html").read_text()
    body = page[page.index("<body>"):]
    assert "<script>document" not in page and "<img" not in body and "&lt;script&gt;" in body


def test_report_asks_no_network(tmp_path):
    row = word_row("n-gram table", [np.ones(5, bool)], ["a"], 20)
    result = {"verdict": HOSTILE, "decoding": "-", "intervals": "-", "levels": "-", "stages": "-", "calibration": "-", "table": short_table([row])}
    write_report(tmp_path, result, {}, "-")
    page = (tmp_path/"report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert "<script>document" not in page and (tmp_path/"report.md").exists() and (tmp_path/"demo.json").exists()
