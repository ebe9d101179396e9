"Laws of the comparison: interleaved, seeded; the costs predict times that follow them; what is broken wins nothing"
import json
import time
from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch
from torch import nn

from featsd import decode as engine
from featsd import compare as C
from featsd import fit as makers
from featsd import race
from featsd.adapters import create_adapter
from featsd.base.core import FeatsdError
from featsd.data.answers import Answers
from featsd.decode import AdversarialDraft, Decoded, Draft, Drafter, NullDraft, OracleDraft
from featsd.extract import extract
from featsd.models.backbone import load_pair
from featsd.race import Procedure, Watch, asked_of, curves_of_runs, other_clips, quiet_clock

V, EOS = 12, 0


class Chain:
    "A target whose next token depends on the last one only; its state is a one-hot vector"
    eos_ids, dtype, name, model_hash, tokenizer_hash = (EOS,), torch.float32, "chain", "hash", "words"

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.table = torch.randn(V, V, generator=g)
        self.table[:, EOS] = -9 # answers end at the limit
        self.decoder, self.calls = nn.Linear(3, 3), 0
        lm_head = nn.Linear(V, V, bias=False)
        self.head = NS(vocab_size=V, hidden_size=V, lm_head=lm_head, logits=lambda h: h @ self.table)

    def prompt(self, question): return [], [1, 2]
    def encode(self, clip, question): return (clip.id, question)
    def hot(self, ids): return nn.functional.one_hot(ids, V).float()
    def prefill(self, prefixes):
        first = torch.tensor([sum(map(ord, "".join(prefixes[0]))) % (V - 1) + 1])
        return NS(h=self.hot(first), lengths=torch.tensor([1]))
    def step(self, state, ids):
        state.lengths = state.lengths + ids.shape[1]
        return self.hot(ids)
    def rollback(self, state, lengths): state.lengths = torch.as_tensor(lengths)


def world(n=4): return NS(target=Chain(), draft=Chain(1), name="toy"), [NS(id=f"clip{i}") for i in range(n)]


class Clock:
    "Time passes by being read; asleep it passes without work"
    now = asleep = 0.
    def perf_counter(self): self.now += 1e-4; return self.now
    def thread_time(self): self.now += 1e-4; return self.now - self.asleep
    def sleep(self, s): self.now, self.asleep = self.now + s, self.asleep + s


class Guess(Drafter):
    "Right with a fixed chance, by a seeded coin"
    name, compared = "guess", False
    def __init__(self, target, p): self.target, self.p, self.rng = target, p, np.random.default_rng(0)
    def propose(self, gamma):
        out, last = [], self.ids[-1:] or [1]
        for _ in range(gamma):
            right = int(self.target.table[last[-1]].argmax())
            out.append(right if self.rng.random() < self.p else (right + 1) % V)
            last = out
        return Draft(out)


def run(drafters, n=4, gammas=(1, 3), questions=("a ?", "b ?"), wrong_clip=(), **how):
    pair, clips = world(n)
    made = {k: d(pair.target) for k, d in drafters.items()}
    return C.compare(pair, clips, made, list(questions), Procedure(gammas, 20, n_boot=50, **how), wrong_clip)


def test_oracle_fills_every_block_and_adversary_none():
    c = run({"oracle": OracleDraft, "adversary": AdversarialDraft, "nothing": lambda t: NullDraft()})
    for r in c.rows:
        assert not r.broken and r.prompts == 8
        assert r.tau == {"oracle": 20 / np.ceil(20 / (r.gamma + 1)), "adversary": 1, "nothing": 1}[r.name]
    assert [r.kind for r in c.rows] == ["limit"] * 4 + ["null"] * 2


def test_arms_are_interleaved_seeded_and_warm_up_is_not_counted(monkeypatch):
    seen, real = [], engine.run_arm
    def noted(target, arm, prompt, *a):
        seen.append((prompt.target, arm.name, arm.gamma))
        return real(target, arm, prompt, *a)
    monkeypatch.setattr(race, "run_arm", noted)
    def order(seed):
        seen.clear()
        c = run({"x": lambda t: Guess(t, .5), "y": lambda t: NullDraft()}, seed=seed)
        assert all(len(r.ms) == 8 for r in c.rows)
        return list(seen)
    a, b, other = order(0), order(0), order(1)
    assert a == b != other and len(a) == 4 * 8 + 4 # one round of four arms warms up
    blocks = [tuple(x[1:] for x in a[4 + 4 * i:8 + 4 * i]) for i in range(8)]
    assert all(len(set(x)) == 4 for x in blocks) and len(set(blocks)) > 1 # each prompt sees every arm, in its own order


def test_what_is_not_the_targets_is_broken_and_wins_nothing(monkeypatch):
    real = engine.speculative_decode
    def cheat(target, d, prompt, gamma, *a, **k):
        out = real(target, d, prompt, gamma, *a, **k)
        if d.name == "guess":
            out.cycle_ms = [1e-6] * len(out.cycle_ms)
            if prompt.question == "b ?": out.ids[3] = (out.ids[3] + 1) % V
        return out
    monkeypatch.setattr(engine, "speculative_decode", cheat)
    c = run({"fast": lambda t: Guess(t, .9), "slow": lambda t: NullDraft()})
    fast = [r for r in c.rows if r.name == "fast"]
    assert all(r.broken and r.identical == 4 and r.measured.value > 10 for r in fast)
    assert c.best("null").name == "slow"
    assert "BROKEN 4/8" in str(c.table()) and str(c.table()).count("identical") == 2
    assert any("BROKEN" in x and "fast" in x for x in c.verdict())
    assert not any("Recommended: fast" in x for x in c.verdict())
    assert "BROKEN" in c.chart().panels[0].series[0].name


class Rounds(Chain):
    "Two first choices are equal up to rounding, and a wide pass rounds otherwise: a mark in its states lowers one"
    def __init__(self, gap):
        super().__init__()
        self.table = torch.cat([self.table, torch.zeros(1, V)])
        self.table[:V, 1] = self.table[:V].max(1).values + 1
        self.table[:V, 2] = self.table[:V, 1] - gap
        self.table[V, 1] = -1e-4
    def hot(self, ids): return nn.functional.one_hot(ids, V + 1).float()
    def step(self, state, ids):
        h = super().step(state, ids)
        h[..., V] = float(ids.shape[1] > 1)
        return h


@pytest.mark.parametrize("gap", [0., 1e-5])
def test_what_differs_by_rounding_is_counted_apart(gap):
    pair, clips = world()
    pair.target = Rounds(gap)
    made = {"x": Guess(pair.target, .9), "nothing": NullDraft()}
    c = C.compare(pair, clips, made, ["a ?", "b ?"], Procedure((3,), 20, n_boot=50))
    x, nothing = c.rows
    assert x.identical < 8 and x.identical + x.rounded == 8 and not x.broken
    assert (nothing.identical, nothing.rounded) == (8, 0) and f"{x.rounded} rounded" in str(c.table())
    assert any(v.startswith(f"Rounding: on {x.rounded} of 16 runs") for v in c.verdict())


def test_few_clips_decide_nothing(monkeypatch):
    synthetic(monkeypatch)
    c = run({"good": lambda t: Guess(t, .9), "bad": lambda t: Guess(t, .2)}, n=7)
    for r in c.rows: r.kind = "sensor" if r.name == "good" else "null"
    assert c.over_null.ratio.low > 1
    assert any("From 7 clips that decides nothing: compare on 8 or more." in v for v in c.verdict())


def synthetic(monkeypatch, c=.1, v=.05, o=.02, step=2.):
    "Decoding whose times follow γc + v + o exactly"
    real, plain = engine.speculative_decode, race.plain_decode
    def timed(target, d, *a, **k):
        out = real(target, d, *a, **k)
        out.draft_ms = [step * c * n for n in out.drafted]
        out.verify_ms = [step * (1 + v * n) for n in out.drafted]
        out.cycle_ms = [x + y + step * o for x, y in zip(out.draft_ms, out.verify_ms, strict=True)]
        return out
    def even(*a, **k):
        out = plain(*a, **k)
        out.cycle_ms = [step] * len(out.cycle_ms)
        return out
    monkeypatch.setattr(engine, "speculative_decode", timed)
    monkeypatch.setattr(race, "plain_decode", even)


@pytest.mark.parametrize("p", [.3, .8, 1.])
def test_the_model_of_cost_predicts_times_that_follow_it(monkeypatch, p):
    synthetic(monkeypatch)
    for r in run({"x": lambda t: Guess(t, p)}, n=12, gammas=(1, 2, 5)).rows:
        assert r.c == pytest.approx(.1) and r.o == pytest.approx(.02) and r.v == pytest.approx(1 + .05 * r.drafted)
        assert r.measured.value == pytest.approx(r.tau / (r.drafted * r.c + r.v + r.o)) and .97 < r.ratio < 1.03
        assert r.bound >= r.exact and r.measured.low <= r.measured.value <= r.measured.high
        assert r.alpha == pytest.approx(p, abs=.12)


def test_free_drafting_would_show(monkeypatch):
    "The estimate charges what drafting costs: ten times the price is ten times c"
    synthetic(monkeypatch, c=1.)
    dear = run({"x": lambda t: Guess(t, .8)}, gammas=(3,)).rows[0]
    assert dear.measured.value < 1 and dear.exact < 1 and dear.bound == 1 and dear.seed > 2


def test_words_that_win_are_said_to_win(monkeypatch):
    synthetic(monkeypatch)
    c = run({"good": lambda t: Guess(t, .9), "bad": lambda t: Guess(t, .2)}, n=8)
    for r in c.rows: r.kind = "sensor" if r.name == "bad" else "null"
    text = "\n".join(c.verdict())
    assert "Words alone do as well" in text and "On 2 of 2 questions words alone win" in text
    assert "words win" in str(c.question_table()) and c.over_null.ratio.high < 1
    assert "Recommended: good, γ 3" in text and c.over_runner_up.b.startswith("bad")
    for r in c.rows: r.kind = "sensor" if r.name == "good" else "null"
    text = "\n".join(c.verdict())
    assert "Faster than words alone." in text and "pays is not known" in text and "sensor pays." not in text
    for r in c.rows: r.measured = r.measured._replace(low=.9) # the best of two that are slower than plain decoding
    text = "\n".join(c.verdict())
    assert "Faster than words, but not than plain decoding." in text
    assert "sensor pays." not in text and c.over_null.ratio.low > 1


@pytest.mark.parametrize("event, own, says", [
    (.95, .5, "The second sensor pays."), (.5, .95, "The second sensor does not pay: the target's own states"),
    (.8, .8, "Whether the second sensor pays is open: against a draft head on the target's own states, the best drafter "
             "with it (and so with a second model) is not decided; as a further input of that head it is not decided.")])
def test_the_second_sensor_must_beat_the_targets_own_states(monkeypatch, event, own, says):
    synthetic(monkeypatch)
    made = {"words": lambda t: Guess(t, .2), "own": lambda t: Guess(t, own), "own+event": lambda t: Guess(t, event)}
    c = run(made, n=8)
    for r in c.rows: r.kind = {"words": "null", "own": "own", "own+event": "sensor"}[r.name]
    text, claims = c.verdict(), c.claims()
    assert any(v.startswith(says) for v in text) and any(v.startswith("Best drafter over plain decoding: ") for v in text)
    for start in ("The second sensor over words alone: own+event", "The second sensor over the own-state head: own+event",
                  "The own-state head with the second sensor over the same without: own+event"):
        assert any(v.startswith(start) for v in text)
    assert c.over_own.ratio == claims["over_own"]["ratio"] == claims["event_over_own"]["ratio"]
    assert claims["wrong_event_over_own"] is None and json.loads(json.dumps(c.summary()))["claims"]["over_own"]["a"]
    c.rows = [r for r in c.rows if r.name != "own"]
    assert "pays is not known" in "\n".join(c.verdict())


@pytest.mark.parametrize("target, draft, second", [
    ("frames", "events", "second sensor"), ("frames", None, "second sensor"), (None, None, "second sensor"),
    ("frames", "frames", "draft"), ("frames", "none", "draft"), ("none", "none", "draft")])
def test_a_pair_that_sees_one_thing_is_not_said_to_have_two_sensors(monkeypatch, target, draft, second):
    assert race.second_of(NS(target=NS(sensor=target), draft=NS(sensor=draft))) == second
    synthetic(monkeypatch)
    c = run({"words": lambda t: Guess(t, .2), "own": lambda t: Guess(t, .5), "own+event": lambda t: Guess(t, .95)}, n=8)
    for r in c.rows: r.kind = {"words": "null", "own": "own", "own+event": "sensor"}[r.name]
    c.about["second"] = second
    said = "\n".join([*c.verdict(), c.answer(), str(C.decisions(c.claims(), c.second)), c.page().markdown()])
    assert f"The {second} pays." in said and f"the {second} against words alone" in said
    assert ("second sensor" in said) == (second == "second sensor")


def test_it_must_win_whole_answers_too(monkeypatch):
    synthetic(monkeypatch)
    c = run({"own": lambda t: Guess(t, .5), "own+event": lambda t: Guess(t, .95)}, n=8)
    for r in c.rows: r.kind = {"own": "own", "own+event": "sensor"}[r.name]
    for own, says in ((3., "The second sensor pays."), (1., "The second sensor pays for decoding, but not for whole")):
        for r in c.rows: r.whole_ms = [own if r.kind == "own" else 2.] * len(r.ms)
        assert c.pays.startswith(says) and c.claims()["over_own"]["whole"].value == own / 2
    for r in c.rows: r.whole_ms = []
    assert c.pays == "The second sensor pays." and c.claims()["over_own"]["whole"] is None


@pytest.mark.parametrize("calls, ms", [(1, 27.), (0, 20.)])
@pytest.mark.parametrize("kind", ["sensor", "control", "null", "own"])
def test_a_whole_answer_pays_for_what_runs(kind, calls, ms):
    ran = NS(done=NS(decode_ms=10., prefill_ms=5., draft_prefill_ms=2., ids=[1]), calls=calls)
    timed = NS(see_ms=(3., 7.), plain_ms=[20.] * 2, start_ms=[5.] * 2, clips=["a", "b"], asked=[NS(answer=[1])] * 2)
    got = race.speedups_by_clock(NS(kind=kind), [ran] * 2, timed, Procedure(n_boot=20))
    assert got["whole_ms"] == [ms] * 2 and got["whole"].value == pytest.approx(28 / ms) and got["measured"].value == 2


def rows(*ms, name="r"): return [NS(label=f"{name}{i}", ms=list(m)) for i, m in enumerate(ms)]


def test_advantage_is_paired_and_groups_clips():
    rng = np.random.default_rng(0)
    base, clips = rng.lognormal(3, 1, 90), [f"c{i // 3}" for i in range(90)]
    a = C.advantage(rows(base / 1.1), rows(base), clips) # prompts differ wildly, their ratio not at all
    assert a.ratio.low == pytest.approx(1.1) == a.ratio.high and a.sure == 1 and a.ratio.groups == 30
    same = C.advantage(rows(base), rows(base), clips)
    assert not same.excludes_one and same.ratio.value == 1
    other = C.advantage(rows(base), rows(rng.permutation(base)), clips)
    assert not other.excludes_one
    choice = C.advantage(rows(base, base / 2), rows(base, base / 1.5), clips)
    assert (choice.a, choice.b) == ("r1", "r1") and choice.ratio.value == pytest.approx(2 / 1.5)
    half = C.advantage(rows(np.r_[base[:45] / 2, base[45:] * 2]), rows(base), clips, where=np.arange(90) < 45)
    assert half.ratio.value == pytest.approx(2) and half.ratio.groups == 15


def test_curves_obey_the_laws_on_random_cycles():
    rng = np.random.default_rng(2)
    for _ in range(40):
        answer, blocks, accepted, drafted, at = rng.integers(0, 3, 30).tolist(), [], [], [], 0
        while at < 30:
            block = rng.integers(0, 3, rng.integers(0, 5)).tolist()[:30 - at - 1]
            n = next((i for i, t in enumerate(block) if t != answer[at + i]), len(block))
            blocks.append(block), accepted.append(n), drafted.append(len(block))
            at += n + 1
        c = curves_of_runs([engine.ArmRun(NS(accepted=accepted, drafted=drafted), blocks, 0)], [answer], 4)
        assert sum(c.prefix) == pytest.approx(np.mean(accepted)) # E[consecutive] = Σ prefix
        assert 0 <= c.alpha <= 1 and c.prefix[0] <= (c.marginal[0] or 0) + 1e-12


def test_a_first_block_longer_than_gamma_is_counted_whole():
    done = NS(accepted=[5, 1], drafted=[6, 2])
    c = curves_of_runs([engine.ArmRun(done, [[1, 2, 3, 4, 5, 0], [7, 0]], 0)], [[1, 2, 3, 4, 5, 6, 7, 8]], 2)
    assert c.prefix == [1, .5, .5, .5, .5, 0] and sum(c.prefix) == np.mean(done.accepted) and c.alpha == .75 # 6 of 8


def test_threads_and_collector_are_put_back():
    before = torch.get_num_threads()
    with quiet_clock(1): assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before and __import__("gc").isenabled()


def test_a_suspended_run_is_done_again_whatever_arm_it_is(monkeypatch):
    "A pause inside one plain run must not become a speedup"
    clock, real, calls = Clock(), race.plain_decode, []
    for name in ("perf_counter", "thread_time"): monkeypatch.setattr(time, name, getattr(clock, name))
    def paused(*a, **k):
        calls.append(0)
        start = clock.now
        if len(calls) == 4: clock.sleep(.6) # after the untimed answer, the warm-up and one timed run
        out = real(*a, **k)
        out.cycle_ms[0] += 1e3 * (clock.now - start)
        return out
    monkeypatch.setattr(race, "plain_decode", paused)
    c = run({"x": lambda t: NullDraft()}, plain_runs=2)
    assert (c.about["interrupted"], c.about["still_interrupted"]) == (1, 0) and max(c.plain_ms) < 500
    assert any("1 interrupted runs were done again" in x for x in c.verdict())
    watch = Watch(again=1)
    watch(lambda: clock.sleep(.3))
    assert (watch.interrupted, watch.given_up) == (2, 1) # what never runs undisturbed is said
    assert Watch(on_cpu=False)(lambda: clock.sleep(.3)) is None


def test_wrong_clip_is_a_control():
    c = run({"x": lambda t: Guess(t, .5)}, wrong_clip=("x",), gammas=(2,))
    assert [(r.name, r.kind) for r in c.rows] == [("x", "null"), ("x, wrong clip", "control")]
    assert c.best("null").name == "x"
    pair, clips = world(1)
    with pytest.raises(FeatsdError, match="at least two sequences, found 1 of one"):
        C.compare(pair, clips, {"x": NullDraft()}, ["a ?"], Procedure((2,)), wrong_clip=("x",))
    drive = [NS(id=str(i), sequence=s) for i, s in enumerate("aabbba")] # neighbours of one drive share frames
    assert [c.id for c in other_clips(drive)] == list("225552")
    with pytest.raises(FeatsdError, match="3 of one; compare on more clips"): asked_of(pair, drive[2:5], ["a ?"], True)
    with pytest.raises(FeatsdError, match="none of the drafters raw, ngram uses.*add aligned"):
        C.run_comparison(drafters=["raw", "ngram"], wrong_clip=True)


def test_every_sensor_drafter_has_a_control(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path/"home"))
    create_adapter(1, hidden_dim=128).save_checkpoint(tmp_path/"a.pt")
    c = C.run_comparison(
        drafters=["fused", "standard"], held_out=C.HeldOut(clips=2, questions=1), wrong_clip=True, out=tmp_path,
        fitting=C.Fitting([tmp_path/"a.pt"], word_clips=2, val_clips=0), progress=False, say=str,
        how=Procedure((2,), max_new_tokens=8, plain_runs=1, transformers=False))
    assert [r.name for r in c.rows if r.kind == "control"] == ["fused, wrong clip", "standard, wrong clip"]


def test_a_drafter_from_outside_stands_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path/"home"))
    class Toy(Drafter):
        "Says the last word again"
        name = "toy"
        def propose(self, gamma): return Draft(self.ids[-1:] * gamma)
    said = []
    how = Procedure((2,), max_new_tokens=8, plain_runs=1, transformers=False)
    try: c = C.run_comparison(drafters=["toy", "lookup+toy", "standard"], held_out=C.HeldOut(clips=1, questions=1), how=how,
                              progress=False, out=tmp_path, say=said.append)
    finally: Toy.compared = False # other tests name no drafters
    assert [(r.name, r.kind, r.broken) for r in c.rows] == [
        ("toy", "null", False), ("lookup+toy", "null", False), ("standard", "sensor", False)]
    assert "toy" in said[-1] and any(s.name == "toy" for s in c.chart().panels[0].series)


def test_saved_whole(tmp_path):
    c = run({"x": lambda t: Guess(t, .7)})
    c.save(tmp_path)
    d = json.loads((tmp_path/"compare.json").read_text())
    assert len(d["rows"]) == 2 and len(d["prompts"]) == 8 and d["rows"][0]["curves"]["prefix"]
    assert d["about"]["seed"] == 0 and d["about"]["versions"]["torch"]
    cycles = [json.loads(x) for x in (tmp_path/"cycles.jsonl").read_text().splitlines()]
    ms = cycles[0]["cycle_ms"] # each is rounded to four digits
    assert len(cycles) == 16 and sum(ms) == pytest.approx(d["rows"][0]["ms"][0], abs=5e-5 * (len(ms) + 1))


@pytest.mark.parametrize("kw,what", [
    (dict(gammas=(0,)), "gamma 0"), (dict(gammas=()), "0 γ"), (dict(questions=[]), "0 questions"),
    (dict(drafters={}), "0 drafters"), (dict(plain_runs=0), "0 plain runs")])
def test_bad_settings(kw, what):
    pair, clips = world(2)
    how = Procedure(kw.get("gammas", (1,)), plain_runs=kw.get("plain_runs", 3))
    with pytest.raises(FeatsdError, match=what):
        C.compare(pair, clips, kw.get("drafters", {"x": NullDraft()}), kw.get("questions", ["a ?"]), how)


def test_a_target_that_changes_its_mind_is_refused(monkeypatch):
    calls = iter(range(10**6))
    def fickle(*a, **k): return Decoded([next(calls)], [False], [0], [0], 1., 0., [0.], [1.], [1.], "plain")
    monkeypatch.setattr(race, "plain_decode", fickle)
    with pytest.raises(FeatsdError, match="two answers"): run({"x": lambda t: NullDraft()})


def test_material_is_checked():
    a = Answers(["c"], ["q"], [np.array([1])], [np.array([1, 2])], [""], [""])
    tables, templates = makers.word_experts(a, ["q"])
    assert tables["q"].next([]) == 1 and templates["q"].tolist() == [1, 2]
    with pytest.raises(FeatsdError, match="who"): makers.word_experts(a, ["who ?"])
    with pytest.raises(FeatsdError, match="featsd_train"): makers.build_drafters(["gated"], None)
    with pytest.raises(FeatsdError, match="'seer'"):
        makers.build_drafters(["seer"], NS(draft=None, target=None, shared_vocab=1))
    for kw, what in ((dict(how=Procedure((0,))), "gamma 0"), (dict(held_out=C.HeldOut(clips=0)), "clips 0"),
                     (dict(how=Procedure(threads=0)), "threads 0"), (dict(drafters=["seer"]), "'seer'"),
                     (dict(drafters=["aligned"]), "--adapter")):
        with pytest.raises(FeatsdError, match=what): C.run_comparison(say=lambda s: None, **kw)


def test_an_adapter_of_other_layers_is_said_to_be_unfitted(monkeypatch):
    monkeypatch.setattr(makers, "shortened", lambda pair, layers: pair) # the built-in draft has one layer
    pair, a = load_pair("pocket"), Answers(["c"], ["q"], [np.array([1])], [np.array([1, 2])], [""], [""])
    adapters, tables = {"L1 of 2 layers": (create_adapter(1, hidden_dim=128), 2)}, makers.word_experts(a, ["q"])[0]
    _, lines = makers.build_drafters(["fused", "gated"], pair, adapters, tables, val=object())
    said = "L1 of 2 layers: fusion weighs both experts alike and the gate is .8"
    assert [x.startswith(said) for x in lines] == [True]


def test_a_table_says_whose_words_it_holds(tmp_path, caplog):
    a = Answers(["c"], ["q"], [np.array([1])], [np.array([1, 2])], [""], [""], "t",
                models={"target": "aaaa fp32 mine"}, data="roads train")
    target = NS(name="yours", model_hash="bbbb", quant="fp32", tokenizer_hash="t")
    makers.NGramTable(a).save(tmp_path/"table.safetensors")
    makers.fit_words(tmp_path/"table.safetensors", ["q"], target, asked="roads test")
    said, = [r.getMessage() for r in caplog.records]
    assert "another target, yours (bbbb)" in said and "table.safetensors was made with, mine (aaaa)" in said
    makers.write_answers(tmp_path/"log.jsonl", a)
    target.model_hash = "aaaa"
    for name in ("table.safetensors", "log.jsonl"):
        caplog.clear()
        makers.fit_words(tmp_path/name, ["q"], target, asked="roads train")
        assert f"{name}: words about roads train, and roads train is asked" in caplog.text


def test_words_of_another_tokenizer_and_clips_in_two_roles(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path/"home"))
    a = Answers(["c"], ["q"], [np.array([1])], [np.array([1, 2])], [""], [""], "theirs")
    makers.write_answers(tmp_path/"w.jsonl", a)
    with pytest.raises(FeatsdError, match="tokenizer theirs, chain has words"):
        makers.read_words(tmp_path/"w.jsonl", Chain())
    store = extract(tmp_path, split="test", quant="fp32", max_samples=1, max_questions=1, progress=False)
    with pytest.raises(FeatsdError, match="answers of tokenizer .*, chain has words"):
        makers.read_words(store, Chain()) # a store says whose ids it holds
    create_adapter(1, hidden_dim=128).save_checkpoint(tmp_path/"a.pt")
    held_out, made_of = C.HeldOut(clips=1, questions=1), C.Fitting([tmp_path/"a.pt"], word_clips=2, val=store)
    said = "test-000000: it is among the validation clips.*--val a store of others"
    with pytest.raises(FeatsdError, match=said): # nothing is fitted on what is compared
        C.run_comparison(drafters=["fused"], held_out=held_out, fitting=made_of, out=tmp_path, progress=False)


def test_on_the_built_in_pair(tmp_path):
    said = []
    c = C.run_comparison(drafters=["lookup", "standard"], held_out=C.HeldOut(clips=1, questions=1), out=tmp_path,
                         how=Procedure((2,), plain_runs=1), progress=False, say=said.append)
    assert "no adapter given: train one" in said[0]
    assert [r.name for r in c.rows] == ["lookup", "standard"] and not any(r.broken for r in c.rows)
    assert c.transformers["identical"] == 1 and 0 < c.rows[1].params < .5 and c.rows[0].params == 0
    assert (tmp_path/"compare.json").is_file() and "draft" in c.about
