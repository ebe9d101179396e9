"Choosing while decoding: Hedge keeps its bound, a replay charges what decoding would, fixed wins where it should"
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decode import EXACT, TableTarget, distance, engine_law, own_law

from featsd import commands
from featsd.adapters import create_adapter
from featsd.auto import (
    Choice, Hedge, Track, along, cycle_cost, gain_of, hedge_rate, replay_auto, track_of, tracks_of_opinions,
    tracks_of_words, verify_of)
from featsd.base.core import FeatsdError
from featsd.data.answers import read_answers, replay_cycles
from featsd.data.clips import open_clips
from featsd.decode import Drafter, EveryChoice, encode_prompt, plain_decode, speculative_decode
from featsd.drafters import Kit, make_drafter
from featsd.fit import (
    AutoDraft, Calibrated, Costs, Opinions, fit_auto, fit_gate, hit_curve, predict, predict_auto)
from featsd.models.words import NGramTable

DATA = Path(os.environ.get("FEATSD_SHARED_DATA") or Path(__file__).parents[2]/"shared"/"data")


def losses(kind, n, t, h, rng, span):
    if kind == "noise": return span * rng.random(n)
    if kind == "trusted": return span * (np.arange(n) == h.weights().argmax())
    if kind == "spread": return span * (h.weights() >= np.median(h.weights())) # half of all, the more trusted
    return span * (np.arange(n) != (t // 50) % n) # the best one changes


@pytest.mark.parametrize("kind", ["noise", "trusted", "spread", "changing"])
@pytest.mark.parametrize("n, T, span", [(2, 200, 1.), (9, 1000, 7.), (60, 400, .3)])
def test_the_regret_of_hedge_is_bounded_whatever_comes(kind, n, T, span):
    law = span * (T * np.log(n) / 2) ** .5
    for rate in (hedge_rate(n, T, span), None):
        rng, h = np.random.default_rng(0), Hedge(n, rate)
        paid = sum(h.update(losses(kind, n, t, h, rng, span)) for t in range(T))
        regret = paid - h.total.min()
        # de Rooij et al. 2014, theorem 8, for the rate that adapts itself
        assert regret <= (law if rate else span * (T * np.log(n)) ** .5 + span * (16 / 3 * np.log(n) + 2)) + 1e-9
    assert h.weights().sum() == pytest.approx(1) and (h.weights() >= 0).all()


def test_a_learner_that_trusts_the_leader_alone_breaks_the_bound():
    n, T = 2, 400
    total, paid = np.zeros(n), 0.
    for _ in range(T): # the mutant: no mixing
        x = (np.arange(n) == total.argmin()).astype(float)
        paid, total = paid + x[total.argmin()], total + x
    assert paid - total.min() > (T * np.log(n) / 2) ** .5


def test_one_choice_and_bad_input():
    h = Hedge(1)
    assert h.update([3.]) == 3 and h.weights().tolist() == [1]
    with pytest.raises(FeatsdError, match="0 choices"): Hedge(0)
    t = {"A": track_of([1, 1])}
    with pytest.raises(FeatsdError, match="no answer"): replay_auto([], [], [])
    with pytest.raises(FeatsdError, match="1 answers, 2 clips"): replay_auto([t], ["a", "b"], ["q"])
    with pytest.raises(FeatsdError, match="gamma 0"): replay_auto([t], ["a"], ["q"], gammas=(0,))
    with pytest.raises(FeatsdError, match="answer 1"): replay_auto([t, {}], ["a", "b"], ["q", "q"])


def opinions(n, seed):
    rng = np.random.default_rng(seed)
    return Opinions(rng.random(n) < .6, rng.random(n), rng.random(n) < .8, rng.random(n))


@pytest.mark.parametrize("gate, name", [(0., "table"), (.5, "gate 0.5"), (.95, "gate 0.95"), (1.01, "fused")])
@pytest.mark.parametrize("stop", [0., .4])
def test_fixed_choices_cost_what_the_gates_predictor_says(gate, name, stop):
    ops, costs = [opinions(n, s) for s, n in enumerate((1, 2, 30, 41))], Costs(.2, .05, .1, .01, .03)
    name = name + ", stops at 0.4" * (stop > 0)
    for g in (1, 3, 8):
        verify = verify_of(costs, most=8)
        spent = sum(along(tracks_of_opinions(a, costs)[name], g, costs, verify)[0].sum() for a in ops)
        assert sum(len(a.share) for a in ops) / spent == pytest.approx(predict(ops, g, gate, costs, stop)[0])


def test_tracks_of_words_cost_what_replayed_cycles_count():
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 4, rng.integers(1, 30)) for _ in range(30)]
    fit, test, free = answers[:15], answers[15:], Costs(0, 0, 0, 0, 0)
    tracks = tracks_of_words(fit, test, orders=(3,))
    for g in (1, 3, 6):
        spent = [along(t["n-gram, order 3"], g, free, verify_of(free))[0].sum() for t in tracks]
        assert spent == pytest.approx(replay_cycles(NGramTable(fit, 3).propose, test, g).cycles)


def test_what_is_known_is_never_ahead_of_what_was_verified():
    t = track_of(np.random.default_rng(0).random(40) < .7)
    each, begins = along(t, 4, Costs(), verify_of(Costs()))
    assert (begins <= np.arange(41)).all() and (np.diff(begins) >= 0).all() and begins[-1] == 40 and (each > 0).all()
    bold, costs = Track(np.array([5] * 9), np.array([2] * 9), np.zeros(9)), Costs(o=0., v=.5)
    said, spent, _ = cycle_cost(bold, 0, 6, costs, verify_of(costs), 0)
    assert (said, spent) == (3, 2.)


def made(rates, n=60, tokens=40):
    rng, asked = np.random.default_rng(0), [list(rates)[i % len(rates)] for i in range(n)]
    tracks = [{d: track_of(rng.random(tokens) < p, price=.05) for d, p in rates[q].items()} for q in asked]
    return tracks, [f"c{i}" for i in range(n)], asked


def test_where_the_best_choice_changes_by_question_choosing_pays_and_where_it_does_not_fixed_is_as_good():
    r = replay_auto(*made({"a": {"A": .95, "B": .2}, "b": {"A": .2, "B": .95}}), gammas=(1, 4), today=Choice("A", 4))
    gain = r.gains()["learner by question"]
    assert gain.low > 1.3 and "choose while decoding: learner by question" in r.verdict()
    assert [row[1] for row in r.by_question().rows] == ["A, γ 4", "B, γ 4"]
    assert any(row[0].startswith("fitted beforehand: A, γ 4") for row in r.table().rows)
    s = replay_auto(*made({"a": {"A": .9, "B": .3}, "b": {"A": .9, "B": .3}}), gammas=(1, 4))
    assert s.gains()["learner"].low < 1 and s.verdict().startswith("Fixed is as good: A, γ 4")
    assert s.gains()["learner"].value > .95 # it loses little
    regret = r.learned["learner"].sum() - r.times.sum(0).min()
    assert len(r.chart().panels[0].series) == 2 and r.paths["learner"][-1] == pytest.approx(regret)


def test_plain_decoding_is_a_choice_where_nothing_pays():
    r = replay_auto(*made({"a": {"A": .1}}), gammas=(2,))
    assert str(r.choices[r.best()]) == "plain decoding"
    assert r.tokens.sum() / r.learned["learner"].sum() == pytest.approx(1, abs=.05)


def test_the_gain_is_over_the_best_fixed_choice_of_each_resampling():
    fixed = np.array([[1., 3.], [3., 1.]] * 10)
    g = gain_of(np.ones(20), fixed, [str(i) for i in range(20)])
    assert g.value == 2 and 1.2 < g.low < 2.01 and g.high <= 2.01 and g.groups == 20


def test_the_same_seed_gives_the_same_replay():
    data = made({"a": {"A": .7, "B": .6}}, n=10)
    a, b = (replay_auto(*data, gammas=(1, 3)).learned["learner"] for _ in range(2))
    assert (a == b).all()


@pytest.mark.skipif(not (DATA/"tokens"/"tokens_10clips_10q.json").is_file(), reason="the study's logs are not at hand")
def test_on_the_real_log_of_ten_questions():
    fit, test = read_answers(DATA/"tokens"/"tokens_10clips_10q.json").split(.5)
    r = replay_auto(tracks_of_words(fit, test), test.clip_ids, test.questions, gammas=(2, 5))
    assert len(r.by_question().rows) == 10 and all(t.sum() > 0 for t in r.ways().values())
    assert r.gains()["learner"].groups == len(set(test.clip_ids))


# ---- the drafter -----------------------------------------------------------------------------------------------------

EVEN = [([0., 1.], [0., 1.])] * 3 # confidence taken at its word


def known(worth=2., gamma=8, **costs): return Calibrated(*EVEN, Costs(**costs), worth, gamma)


def test_calibration_recovers_a_known_curve_and_never_falls():
    rng = np.random.default_rng(0)
    x = rng.random(40_000)
    at, p = hit_curve(x, rng.random(40_000) < x ** 2)
    assert (np.diff(p) >= 0).all() and np.abs(np.interp([.2, .5, .8], at, p) - [.04, .25, .64]).max() < .06


def test_a_choice_pays_for_what_it_asks_and_ends_where_nothing_pays():
    k = known(c=.3, v=.1, words=0., read=0.)
    assert k.source(.9, 1., 0) == "words" and k.source(.04, 1., 0) is None and k.source(.9, .05, 0) is None
    sharp = replace(k, asked=([0., 1.], [.9, .9]))
    assert sharp.source(.2, 1., 0) == "fused" and sharp.source(.85, 1., 0) == "words"
    assert replace(sharp, costs=Costs(c=2.)).source(.2, 1., 0) == "words" # dearer than what it brings
    with pytest.raises(FeatsdError, match="no answer to calibrate on"): fit_auto([])


def sharp_opinions(n, seed): # the table knows where it is sure; the model is right wherever it is asked
    rng = np.random.default_rng(seed)
    share = np.where(rng.random(n) < .6, .95, .3)
    return Opinions(rng.random(n) < share, share, rng.random(n) < .95, np.full(n, .95))


def test_a_choice_at_every_token_is_as_good_as_the_best_gate_where_a_gate_is_all_there_is_to_know():
    val, test = ([sharp_opinions(40, s + at) for s in range(40)] for at in (0, 100))
    gate, k = fit_gate(val), fit_auto(val)
    fixed = predict(test, gate["gamma"], gate["gate"], None, gate["min_confidence"])[0]
    auto = 40 * 40 / predict_auto(test, k)[0].sum()
    assert auto > .97 * fixed and {k.source(.95, 1., 0), k.source(.3, 1., 0)} == {"words", "fused"}


class ToyAuto(AutoDraft):
    "`auto` over laws of three tokens: its table and its model are tables of laws"
    def __init__(self, model, k):
        self.model, self.calibration, self.min_confidence = model, k, 0.
        self.head = type("H", (), {"vocab_size": 3})
        self.reader = type("R", (), {"read": [], "first": torch.zeros(1), "at": staticmethod(lambda text: text)})
        self.words = type("W", (), {"look": staticmethod(self.look)})
    def look(self, text): # sure after some texts, unsure after others
        p = TableTarget(9).logits(text).softmax(-1)
        return int(p.argmax()), float(p.max())
    def start(self, prompt, sampling=None): Drafter.start(self, prompt, sampling)
    def logits(self, h, text): return self.model.logits(text)[None]


@pytest.mark.parametrize("worth", [.6, 1., 4.])
def test_sampling_keeps_the_targets_law_exactly(worth):
    target, k = TableTarget(5), replace(known(worth, c=.05, v=.1, words=0., read=0.), asked=([0., 1.], [.6, .6]))
    law = engine_law(target, ToyAuto(TableTarget(6), k), EveryChoice(), gamma=3)
    assert distance(law, own_law(target, EveryChoice(), 3)) <= EXACT


def test_without_calibration_it_is_refused_in_one_line(pair, capsys, tmp_path):
    adapter = create_adapter(1, pair.draft.head.hidden_size, pair.target.head.hidden_size)
    table = NGramTable([[1, 2, 3]], 3, pair.target.tokenizer_hash)
    with pytest.raises(FeatsdError, match="'auto' needs calibration data .--val"):
        make_drafter("auto", Kit(pair, adapter, table))
    adapter.save_checkpoint(tmp_path/"a.pt")
    table.save(tmp_path/"t.safetensors")
    with pytest.raises(SystemExit) as e:
        commands.featsd_decode(drafter="auto", adapter=str(tmp_path/"a.pt"), words=str(tmp_path/"t.safetensors"))
    said = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(said) == 1 and "--val" in said[0]


def test_both_of_its_drafters_are_asked_and_the_ids_are_the_targets(pair):
    torch.manual_seed(0)
    clip = open_clips("pocket", "test", 1)[0]
    prompt = encode_prompt(pair, clip, "what is this scene about ?")
    plain = plain_decode(pair.target, prompt).ids
    adapter = create_adapter(1, 128, 128, head_hash=pair.target.head.hash)
    table = NGramTable([plain[:12]], 3, pair.target.tokenizer_hash) # right at first, lost later
    k = replace(known(1., c=.1, v=.05), asked=([0., 1.], [.7, .7]))
    drafter = make_drafter("auto", Kit(pair, adapter, table, calibration=k))
    for gamma in (1, 3, 8):
        done = speculative_decode(pair.target, drafter, prompt, gamma)
        assert done.ids == plain
    assert 0 < drafter.calls and 0 < sum(done.accepted) < sum(done.drafted)
