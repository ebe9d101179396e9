"The page that a reader opens: offline, and inert whatever an answer contains"
import json
import re

import numpy as np
import pytest

from featsd.base.core import FeatsdError
from featsd.base.page import Page, Section
from featsd.nulls import word_row
from featsd.report import draw_figures, kept_rows, short_table, write_report

HOSTILE = "</pre><script>document.title='taken'</script><img src=https://example.com/x onerror=alert(1)>"


def test_hostile_text_is_inert(tmp_path):
    Page(HOSTILE, HOSTILE, [HOSTILE]).save(tmp_path/"page.html")
    page = (tmp_path/"page.html").read_text()
    body = page[page.index("<body>"):]
    assert "<script>document" not in page and "<img" not in body.split("<script>")[0] and "&lt;script&gt;" in body


def test_report_asks_no_network(tmp_path):
    table = short_table(kept_rows([word_row(HOSTILE, [np.ones(5, bool)], ["a"], 20)]))
    write_report(tmp_path, Page(HOSTILE, HOSTILE, [table], [Section(HOSTILE, [HOSTILE])]), {"verdict": HOSTILE})
    page, text = ((tmp_path/f"report.{kind}").read_text() for kind in ("html", "md"))
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert "<script>document" not in page + text and "<img" not in text and (tmp_path/"demo.json").exists()
    assert "default-src 'none'" in page and page.count("<script>") == 2 # the library and the page's own


PICTURE = {"kind": "chart", "data": {"title": "t", "panels": [{"title": "", "series": []}]}}

SERIES = [{"name": 1, "x": 2, "y": 3}]


@pytest.mark.parametrize("text, says", [
    ("[]", "expected an object of pictures, found list"), ('{"../../a": {}}', "picture '../../a'"),
    ("{", "expected JSON"), ('{"a": {"kind": "pie", "data": {}}}', "picture a"), ('{"a": []}', "picture a"),
    ('{"a": {"kind": "chart"}}', "picture a"),
    (json.dumps({"a": PICTURE | {"data": {"title": "t", "panels": [{"title": "", "series": SERIES}]}}}), "picture a"),
    (json.dumps({"a": PICTURE | {"data": {"title": "t", "panels": []}}}), "picture a")])
def test_a_broken_file_of_pictures_is_one_line(tmp_path, text, says):
    (tmp_path/"pictures.json").write_text(text)
    with pytest.raises(FeatsdError, match=re.escape(says)) as e: draw_figures(tmp_path)
    assert "featsd_demo" in str(e.value) or "make the file again" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["pictures.json"]
