"Laws of calibration and gain: slow references agree, known answers come back, intervals go by clip, bad input says so"
import itertools
import json
import math
from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch
from closeness import near
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featsd import calibration as C
from featsd.base.core import FeatsdError
from featsd.base.stats import clip_bootstrap
from featsd.data.answers import Answers
from featsd.models.words import NGramTable
from featsd.metrics import Scores
from featsd.data.head import Head, RMSNorm
from featsd.data.answers import answers_of
from featsd.nulls import measure

V, T = 8, 9


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class World:
    "A store over scenes whose laws are known; states are log-laws and the head hands them through"
    def __init__(self, name, clips, seed, questions=1, broken=False):
        g = torch.Generator().manual_seed(seed)
        self.law = torch.rand(4, T, V, generator=torch.Generator().manual_seed(9)) ** 4 + 1e-4
        self.law /= self.law.sum(-1, keepdim=True)
        scene = torch.randint(4, (clips,), generator=g).repeat_interleave(questions)
        self.ids = torch.stack([torch.multinomial(self.law[s], 1, generator=g)[:, 0] for s in scene])
        right = self.law[scene].log()
        self.streams = {"draft_forced": right, "draft_free": torch.zeros_like(right),
                        "draft_wrong": self.law[(scene + 1) % 4].log()}
        self.right, self.path, self.mask = right, name, torch.ones(self.ids.shape, dtype=torch.bool)
        if broken: self.mask[:, 3] = False
        self.manifest = {"target_dim": V, "draft_dim": V, "streams": ["target", *self.streams]}
        said = dict(draft_text="", target_text="")
        self.pairs = [NS(index=i, clip_id=f"{name}{i // questions}", question=f"q{i % questions}", **said)
                      for i in range(len(scene))]
        self._head = Head(RMSNorm(torch.ones(V), 1e-6), nn.Linear(V, V, bias=False))
        with torch.no_grad(): self._head.lm_head.weight.copy_(torch.eye(V))
    def __len__(self): return len(self.pairs)
    @property
    def clips(self): return list(dict.fromkeys(p.clip_id for p in self.pairs))
    def head(self): return self._head
    def length(self, i, stream): return T
    def target_ids(self, i): return self.ids[i].numpy()
    draft_ids = target_ids
    def batches(self, stream="draft_forced", batch_pairs=64, **kw):
        for i in range(0, len(self), batch_pairs):
            s = slice(i, i + batch_pairs)
            yield NS(h_draft=self.streams[stream][s], h_target=self.right[s], mask=self.mask[s], ids=self.ids[s],
                     index=list(range(len(self)))[s])


@pytest.fixture(scope="module")
def world(): return World("train", 300, 0), World("val", 80, 1), World("test", 90, 2)


@pytest.fixture(scope="module")
def known(world): return C.gains(None, world[2], world[1], answers_of(world[0]), world[2].head(), n_boot=100)


# ---- AUROC

def slow_auroc(score, hit):
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(score[hit], score[~hit])]
    return np.mean(pairs) if pairs else math.nan


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=25))
def test_auroc_is_the_share_of_ordered_pairs(rows):
    score, hit = np.array([r[0] / 4 for r in rows]), np.array([r[1] for r in rows])
    assert C.auroc(score, hit) == pytest.approx(slow_auroc(score, hit), nan_ok=True)
    assert C.auroc(-score, hit) == pytest.approx(1 - C.auroc(score, hit), nan_ok=True)


def test_auroc_weights_repeat_positions():
    rng = np.random.default_rng(0)
    score, hit, w = rng.integers(0, 6, 40) / 6, rng.random(40) < .5, rng.integers(0, 4, 40)
    assert C.auroc(score, hit, w) == pytest.approx(slow_auroc(np.repeat(score, w), np.repeat(hit, w)))


def test_auroc_agrees_with_sklearn():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(1)
    score, hit = rng.random(500).round(2), rng.random(500) < .4
    near(C.auroc(score, hit), roc_auc_score(hit, score), 500, torch.float64)


# ---- buckets, ECE, intervals

def test_a_bucket_is_open_below_and_closed_above():
    x = np.array([.90, np.nextafter(np.float32(.90), np.float32(1)), .95, -1., 1.], np.float32)
    b = C.reliability(x, [1, 0, 1, 0, 1], list("abcde"), n_boot=20).buckets
    found = [(round(k["low"], 2), round(k["high"], 2), k["n"]) for k in b]
    assert found == [(-1, 0, 1), (.85, .9, 1), (.9, .95, 2), (.95, 1, 1)]
    assert [k["match"].value for k in b] == [0, 1, .5, 1]


def test_ece_and_match_against_a_slow_reference():
    rng = np.random.default_rng(2)
    x, hit = rng.uniform(-1, 1, 700).astype(np.float32), rng.random(700) < .5
    r = C.reliability(x, hit, np.arange(700) // 10, n_boot=20)
    ece = 0
    for low, high in zip(C.BUCKETS[:-1], C.BUCKETS[1:]):
        at = (x > low) & (x <= high)
        if at.any(): ece += at.sum() / 700 * abs(hit[at].mean() - x[at].astype(float).mean())
    assert r.ece.value == pytest.approx(ece) and r.match.value == hit.mean() and sum(b["n"] for b in r.buckets) == 700


def test_intervals_go_by_clip():
    rng = np.random.default_rng(3)
    clip = np.repeat(np.arange(40), 50)
    hit, x = np.repeat(rng.random(40) < .6, 50), np.full(2000, .92)
    wide, narrow = (C.reliability(x, hit, c, n_boot=100) for c in (clip, np.arange(2000)))
    width = lambda v: v.high - v.low
    for k in ("match", "ece"): assert width(getattr(wide, k)) > 4 * width(getattr(narrow, k))
    assert width(wide.buckets[0]["match"]) > 4 * width(narrow.buckets[0]["match"]) and wide.match.groups == 40


def test_resampling_is_that_of_clip_bootstrap():
    rng = np.random.default_rng(4)
    x, clips = rng.random(300), [f"c{i // 10:03d}" for i in range(300)]
    mean = C.resampled(lambda w: (w * x).sum() / w.sum(), x.mean(), clips, 200)
    assert mean[:3] == pytest.approx(clip_bootstrap(x, clips, 200)[:3])


def test_all_matches_of_few_clips_are_no_certainty():
    v = C.share_by_clip(np.ones(500, bool), [i % 5 for i in range(500)])
    assert v.value == v.high == 1 and v.low == pytest.approx(.025 ** .2)
    v = C.share_by_clip(np.zeros(4, bool), list("abcd"))
    assert v.low == 0 and v.high == pytest.approx(1 - .025 ** .25)
    assert C.share_by_clip(np.zeros(0, bool), []) is None


# ---- the conjecture

def test_conjecture_counts_by_bucket_and_above():
    cos = np.array([.96, .95, .91, .86, .82, np.nan], np.float32)
    s = Scores(np.array([0, 3, 6]), cos, centred=np.zeros(6, np.float32),
               rank=np.array([0, 1, 0, 0, 3, -1]), clips=["a", "b"])
    rows = C.conjecture(s, n_boot=20)
    found = [(r["tau"], r["claimed"], r["bucket_n"], r["above_n"]) for r in rows]
    assert found == [(.95, .999, 1, 1), (.9, .98, 2, 3), (.85, .9, 1, 4), (.8, .8, 1, 5)]
    assert [r["bucket"].value for r in rows] == [1, .5, 1, 0]
    assert [r["above"].value for r in rows] == pytest.approx([1, 2 / 3, .75, .6])
    assert all(r["above"] is None for r in C.conjecture(s, "centred", n_boot=20))
    assert s.cos[0] == np.float32(.96)                                   # the scores are left as they were


# ---- gain

def test_truth_gives_the_table_less_the_entropy(world, known):
    g, test = known["forced"], world[2]
    real = -test.right.gather(2, test.ids[..., None]).mean().item() / math.log(2)   # CE of the truth on these draws
    near(g.aligned.value, real, V * test.ids.numel())
    assert g.weights == pytest.approx((0, 1), abs=.08)
    assert g.gain.value == pytest.approx(g.words.value - real, abs=.02) and g.gain.low > 0
    entropy = -(test.right.exp() * test.right).sum(-1).mean().item() / math.log(2)
    assert g.gain.low < g.words.value - entropy < g.gain.high


def test_a_uniform_draft_gains_nothing(known):
    g = known["free"]
    assert g.weights[1] == 0 and g.weights[0] == g.sharpen and g.net[:3] == (0, 0, 0)
    assert g.gain.value == pytest.approx(0, abs=.02) and "adds nothing" in str(C.gain_table({"free": g}))


def test_the_wrong_clip_costs_bits(known):
    assert known["wrong clip"].weights == known["forced"].weights and known["wrong clip"].gain.high < 0
    assert abs(known["wrong clip, refitted"].net.value) < .05 < known["forced"].net.low


def test_bits_of_words_are_the_tables_own(world, known):
    train, val, test = world
    table = C.word_tables(answers_of(train), answers_of(val), V)
    assert known["forced"].words.value == pytest.approx(table.bits([test.target_ids(i) for i in range(len(test))], V))
    assert table.strength == NGramTable(answers_of(train)).fit_strength(answers_of(val), V) # the null at its strongest


def test_a_poor_table_is_not_a_gain_of_the_sensor(world):
    "A table far too sure of itself: sharpening (here: blunting) it earns bits without a sensor, not in `net`"
    train, val, test = world
    few = [train.target_ids(i) for i in range(25)]
    if hasattr(Answers, "select"): few = answers_of(train).select(range(25))
    poor = NGramTable(few, strength=.02)
    g = C.gains(None, test, val, poor, test.head(), n_boot=50)["free"]
    assert g.gain.low > .05 and g.net[:3] == (0, 0, 0)


def test_fit_weights_is_the_minimum():
    g = torch.Generator().manual_seed(5)
    words, draft = (torch.randn(400, V, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    ids = torch.multinomial((.7 * words + 1.3 * draft).softmax(-1), 1, generator=g)[:, 0]
    w = C.fit_weights(ids, words, draft)
    cost = lambda w: nn.functional.nll_loss(C.product(w, words, draft), ids).item()
    assert all(cost(w) <= cost((w[0] + da, w[1] + db)) * (1 + 1e-9) for da in (-.02, 0, .02) for db in (-.02, 0, .02))
    assert w == pytest.approx((.7, 1.3), abs=.25)


def test_laws_are_the_tables_and_a_masked_state_stays_context(world):
    states, table = World("x", 6, 3, broken=True), NGramTable(answers_of(world[0]))
    for x in C.expert_laws(states, table, None, states.head(), max_pairs=None):
        text, at = states.target_ids(int(x.index[0])), [t for t in range(T) if t != 3]
        for k, t in enumerate(at):
            assert x.ids[k] == text[t] and x.choice[k] == table.next(text[:t])
            near(x.share[k], table.sure(text[:t]), V)
            near(x.words[k].exp(), table.smoothed(text[:t], V), V)
        near(x.aligned, states.right[int(x.index[0])][at], V)


def test_questions_have_tables_of_their_own_where_that_pays():
    "Opposite answers to two questions: one table cannot know which; an unknown question is left out"
    rows = [(f"c{i}", f"q{k}", [k, 1 - k, k]) for i in range(30) for k in (0, 1)]
    clip, question, ids = map(list, zip(*rows))
    a = Answers(clip, question, ids, ids, [""] * 60, [""] * 60)
    tables = C.word_tables(a, a, V)
    assert set(tables) == {"q0", "q1"} and tables["q1"].next([]) == 1
    assert len(list(C.expert_laws(World("y", 5, 4, questions=3), tables, None, World("y", 1, 4).head()))) == 10
    states = World("y", 5, 4, questions=2)
    states.pairs = [NS(**{**vars(p), "question": "other"}) for p in states.pairs]
    with pytest.raises(FeatsdError, match="no answer to fit on"): C.fit_fusion(states, tables, None, states.head())


def test_joined_laws_is_bounded(world):
    parts = list(C.expert_laws(world[1], NGramTable(answers_of(world[0])), None, world[1].head()))
    assert len(C.joined_laws(parts, max_bytes=16 * V * T * 5).ids) == 5 * T and len(C.joined_laws(parts).ids) == 80 * T


# ---- whole

@pytest.fixture(scope="module")
def whole(world):
    train, val, test = world
    m = measure(None, test, train, name="toy", n_boot=20)
    return C.calibrate(m, None, test, val, answers_of(train), n_boot=40), m


def test_report_figures_and_files(whole, tmp_path):
    c, m = whole
    text = c.report()
    for part in ("99.9%", "98.0%", "90.0%", "80.0%", "centred bucket", "confidence, forced", "cos, wrong-clip sensor",
                 "Cross-modal gain", "wrong clip, refitted", "fused law, forced"):
        assert part in text, part
    names = c.save(tmp_path)
    files = {"calibration.json", "calibration.txt", "reliability_cos.png", "reliability_centred.png",
             "reliability_confidence.png", "cross_modal_gain.png"}
    assert files == set(names) == {p.name for p in tmp_path.iterdir()}
    saved = json.loads((tmp_path/"calibration.json").read_text())
    assert saved["gains"]["forced"]["gain"]["value"] == c.gains["forced"].gain.value
    assert saved["claims"]["draft_forced"]["cos"][0]["claimed"] == .999
    series = c.figures()["reliability_cos"].panels[0].series
    assert sum(series[0].n) == int(m.scores["draft_forced", "toy"].valid.sum()) and any(x.null for x in series)


def test_the_truth_is_calibrated_and_a_measurement_alone_suffices(whole):
    c, m = whole
    alone = C.calibrate(m, n_boot=20)
    assert not alone.gains and "not known" in alone.report() and "cross_modal_gain" not in alone.figures()
    sure = alone.curves["draft_forced"]["confidence"]
    assert sure.ece.value < .08 and sure.auroc.value > .6
    assert c.gains["forced"].sure["fused law"].match.value > c.gains["forced"].sure["n-gram table"].match.value


# ---- bad input

def test_bad_input_says_so(world, whole):
    train, val, test = world
    words, head = answers_of(train), test.head()
    for states, said, word in (((test, test), words, "in validation and test data"),
                               ((test, val), answers_of(val), "in training words and validation"),
                               ((val, test), answers_of(val), "in training words and test")):
        with pytest.raises(FeatsdError, match=word): C.gains(None, *states, said, head)
    with pytest.raises(FeatsdError, match="leave the others out"): C.auroc([.1, math.nan], [True, False])
    with pytest.raises(FeatsdError, match="1 scores, 1 hits, 0 clips"): C.reliability([.1], [True], [])
    one = Scores(np.array([0, 1]), np.ones(1, np.float32))
    blind = NS(name="toy", metrics={"draft_forced": {}}, scores={("draft_forced", "toy"): one})
    with pytest.raises(FeatsdError, match="target's head"): C.calibrate(blind)
    few = World("few", 20, 7)
    few.manifest = few.manifest | {"streams": ["target", "draft_forced"]}
    notes = []
    assert list(C.gains(None, few, val, words, head, 20, notes=notes)) == ["forced"]
    assert "the test store has no stream draft_free" in notes[0]
