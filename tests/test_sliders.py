"What the explorers show is what a slow count says, whatever is set; what was set survives; nothing from a model runs"
import html
import json
from pathlib import Path
from types import SimpleNamespace as NS

import numpy as np
import pytest

import featsd.threshold as X
from featsd import timeline
from featsd.base.core import FeatsdError
from featsd.base.costs import TimingConfig, speedup_exact, verify_cost
from featsd.metrics import Scores

QUESTIONS = ["a ?", "b ?", "c ?"]


def scores_of(seed=0, N=90, rank=True, holes=0.):
    rng = np.random.default_rng(seed)
    lens = rng.integers(1, 14, N)
    offsets = np.concatenate([[0], np.cumsum(lens)])
    cos = rng.random(offsets[-1]).astype(np.float32)
    cos[rng.random(len(cos)) < holes] = np.nan
    rank = np.where(np.isnan(cos), -1, rng.integers(0, 2, len(cos))).astype(np.int32) if rank else None
    return Scores(offsets, cos, rank=rank, clips=[f"clip{rng.integers(12)}" for _ in range(N)])


def slow_view(s, questions, least_cos, gamma, first, last, question, mode):
    "The same by loops over answers and positions"
    kept = right = all_ = 0
    runs, block, by_pos = [], [], {}
    for i in range(len(s)):
        cos = s.cos[s.offsets[i]:s.offsets[i + 1]][first:last + 1]
        rank = s.rank[s.offsets[i]:s.offsets[i + 1]][first:last + 1]
        if (question is not None and questions[i] != question) or not len(cos): continue
        run, unbroken, n = 0, True, 0.
        for k, (c, r) in enumerate(zip(cos, rank)):
            if np.isnan(c): unbroken = False; continue
            ok = c > np.float32(least_cos)
            by_pos.setdefault(first + k, []).append(ok)
            all_, kept, right = all_ + 1, kept + ok, right + (ok and r == 0)
            unbroken = unbroken and ok
            run += unbroken
            if k < gamma: n += {"consecutive": unbroken, "relaxed": ok, "weighted": float(c)}[mode]
        runs.append(run)
        block.append(n)
    return {"here": (kept / all_, np.mean(runs)), "match": right / kept if kept else None, "count": np.mean(block),
            "position": {k: np.mean(v) for k, v in by_pos.items()}}


@pytest.mark.parametrize("mode", ["consecutive", "relaxed", "weighted"])
@pytest.mark.parametrize("holes", [0., .1])
def test_the_view_is_the_slow_count(mode, holes):
    s = scores_of(holes=holes)
    questions = [QUESTIONS[i % 3] for i in range(len(s))]
    x, rng = X.pad_scores(s, questions), np.random.default_rng(1)
    for _ in range(25):
        first = int(rng.integers(0, 8))
        setting = (X.THRESHOLD_STEPS[rng.integers(50)], int(rng.integers(1, 9)), first, int(rng.integers(first, 13)),
                   [None, *QUESTIONS][rng.integers(4)], mode)
        got, want = X.threshold_view(x, *setting), slow_view(s, questions, *setting)
        assert got["here"] == pytest.approx(want["here"]) and got["count"] == pytest.approx(want["count"])
        assert got["match_here"] == (None if want["match"] is None else pytest.approx(want["match"]))
        assert {k: v for k, v in zip(got["x"], got["position"]) if v is not None} == pytest.approx(want["position"])
        k = X.THRESHOLD_STEPS.index(setting[0])
        assert (got["frontier"][0][k], got["frontier"][1][k]) == pytest.approx(want["here"])


def test_intervals_cover_over_clips():
    "A ratio whose truth is known, clips that differ: 95 % of the intervals hold it, those over positions would not"
    rng, hit, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        p = np.repeat(rng.beta(2, 2, 40), 25)
        a = (rng.random(1000) < p).astype(float)
        value, low, high = X.by_clip_ratio(a, np.ones(1000), np.arange(0, 1000, 25))
        hit += low <= .5 <= high
        naive += abs(value - .5) <= 1.96 * np.sqrt(value * (1 - value) / 1000)
    assert 270 <= hit <= 299 and naive < 200


def test_sliders_show_the_view_and_keep_what_was_set():
    s, null = scores_of(), scores_of(3)
    both = {("draft_forced", "L1"): s, ("draft_free", "L1"): scores_of(2),
            ("draft_forced", "per-position mean"): null, ("draft_free", "other"): null}
    m = NS(name="L1", metrics={"draft_forced": 0, "draft_free": 0}, scores=both,
           questions=[QUESTIONS[i % 3] for i in range(len(s))])
    parts = X.threshold_explorer(m, "t")[1]
    for stream, least_cos, question in (("draft_forced", .7, None), ("draft_free", .6, "b ?")):
        parts["stream"].value, parts["least_cos"].value, parts["question"].value = stream, least_cos, question
        padded, last = X.pad_scores(m.scores[stream, "L1"], m.questions), parts["range"].value[1]
        want = X.threshold_view(padded, least_cos, 5, 0, last, question)
        assert parts["note"].value == html.escape(want["sentence"], quote=False)
        assert list(parts["figure"].data[1].y) == want["position"] and list(parts["figure"].data[5].y) == want["match"]
        assert parts["figure"].data[7].visible is (stream == "draft_forced")
    again = X.threshold_explorer(m, "t")[1]
    assert (again["stream"].value, again["least_cos"].value, again["question"].value) == ("draft_free", .6, "b ?")
    other = X.threshold_explorer({"x": s}, "t")[1] # other data: what no longer fits starts afresh
    assert other["stream"].value == "states" and other["least_cos"].value == .6


def test_an_explorer_brings_the_picture_of_its_setting():
    box, parts = X.threshold_explorer({"x": scores_of(), "y": scores_of(3)}, "still")
    stills = []
    for least_cos in (.6, .7):
        parts["least_cos"].value = least_cos
        shown = box._repr_mimebundle_()
        assert shown["text/plain"].startswith(f"Threshold {least_cos:.2f}") and "image/png" in shown
        stills.append(shown["image/png"])
    assert stills[0] != stills[1]
    t = TimingConfig(10, 2, 60, 20, .2, verify={2: 1.05, 9: 1.4})
    for other in (timeline.speedup_explorer(timeline.presets_of([.9, .8, .6], t), "still")[0],
                  timeline.stage_timeline(t, {3: 2.}, "still")[0]):
        assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(other._repr_mimebundle_())


def test_speedup_sliders():
    t, curve = TimingConfig(10, 2, 60, 20, .2, verify={2: 1.05, 9: 1.4}), [.9, .8, .6] + [0.] * 13
    parts = timeline.speedup_explorer(timeline.presets_of(curve, t, {3: 2.}), "s")[1]
    parts["gamma"].value, parts["c"].value, parts["o"].value = 3, .3, .05
    assert parts["figure"].data[2].y[2] == pytest.approx(speedup_exact(curve, 3, .3, verify_cost(t, 4), .05))
    assert "measured 2.00x" in parts["note"].value and parts["figure"].data[5].x[0] == 3
    free = timeline.speedup_view(curve, t, 3, two_devices=True)
    assert free["k_free"] > 0 and free["bound_e2e"] >= timeline.speedup_view(curve, t, 3)["bound_e2e"]
    hopeless = timeline.speedup_view([0.] * 16, t)
    assert hopeless["limit"] < 0 and "not even free drafting" in hopeless["sentence"]


def test_a_range_that_no_answer_reaches_says_so():
    s = scores_of()
    with pytest.raises(FeatsdError, match="no answer reaches position 40"):
        X.threshold_view(X.pad_scores(s), first=40, last=44)


def test_no_notebook_keeps_the_state_of_its_widgets():
    "Megabytes of plotly's own code, written by whoever executes a notebook; the picture beside a widget is enough"
    for path in (Path(__file__).parents[1]/"nbs").rglob("*.ipynb"):
        assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"], path
