"Laws of replay: what is counted a decoder would accept; automaton, trees and gain against brute force; bad logs"
import json
import os
from pathlib import Path

import numpy as np
import pytest

from featsd import replay as R
from featsd.base.core import FeatsdError
from featsd.data.answers import Answers, read_answers, write_answers
from featsd.models.words import template_ids
from featsd.models.words import NGramTable

DATA = Path(os.environ.get("FEATSD_SHARED_DATA") or Path(__file__).parents[2]/"shared"/"data")
REAL = DATA/"tokens"/"test_tokens_1q.json"


def log(n=24, seed=0, vocab=6, questions=1):
    rng = np.random.default_rng(seed)
    ids = lambda: [rng.integers(0, vocab, rng.integers(2, 14)) for _ in range(n)]
    clips, asked = zip(*((f"c{i // questions}", f"q{i % questions}") for i in range(n)), strict=True)
    return Answers(list(clips), list(asked), ids(), ids(), ["d"] * n, ["t"] * n)


def brute_next(training, context):
    "Most frequent follower of the longest seen tail; the begin mark belongs to the text"
    texts, tail = [[-1, *a] for a in training], [-1, *context]
    while True:
        after = [t[i + len(tail)] for t in texts for i in range(len(t) - len(tail)) if t[i:i + len(tail)] == tail]
        if after: return min(set(after), key=lambda t: (-after.count(t), t))
        tail = tail[1:]


@pytest.mark.parametrize("seed", range(4))
def test_suffix_automaton_against_brute_force(seed):
    a = log(30, seed, vocab=4)
    training = [x.tolist() for x in a.target_ids[:18]]
    auto = R.SuffixAutomaton(training)
    for x in a.target_ids[18:]:
        for i in range(len(x)): assert auto.next_token(x[:i].tolist()) == brute_next(training, x[:i].tolist())
    assert auto.propose([9, 9], 3)[0] == brute_next(training, [9, 9]) # ids never seen: the empty tail is left


@pytest.mark.parametrize("nodes", [1, 3, 9])
def test_tree_is_the_likeliest_set_and_closed(nodes):
    a = log(30, 3, vocab=4)
    tree = R.TreeDraft(NGramTable(a[:20], 3, strength=2.))
    law = lambda c: {t: p for p, t in tree.law(c)}
    paths = [p for n in (1, 2, 3, 4, 5) for p in np.ndindex(*[4] * n) if all(p[k] in law(p[:k]) for k in range(n))]
    every = {p: np.prod([law(p[:k])[p[k]] for k in range(len(p))]) for p in paths}
    got = tree.grow([], nodes)
    assert len(got) == nodes and all(p[:k] in got for p in got for k in range(1, len(p)))
    best = sorted(every.values(), reverse=True)[:nodes]
    assert sorted((every.get(p, -1) for p in got), reverse=True) == pytest.approx(best)


def test_more_nodes_accept_more_and_one_token_per_cycle_is_the_floor():
    a = log(40, 1)
    tree = R.TreeDraft(NGramTable(a[:20], 4))
    taus = []
    for m in (1, 2, 4, 8, 16):
        tokens, cycles, accepted = R.replay_trees(tree, a[20:], m)
        assert tokens.sum() <= accepted.sum() + cycles.sum() < tokens.sum() + len(tokens) + 1
        taus.append(tokens.sum() / cycles.sum())
    assert taus == sorted(taus) and taus[0] >= 1


def test_an_echo_fills_every_block_and_noise_none():
    a = log(30)
    echo = Answers(a.clip_ids, a.questions, a.target_ids, a.target_ids, a.draft_texts, a.target_texts)
    row = R.replay(echo, gammas=(3,), nodes=(), n_boot=20).row("raw draft tokens")
    tested = a.target_ids[15:]
    full = sum(map(len, tested)) / sum(-(-len(x) // 4) for x in tested)
    assert row.match_0 == 1 and row.tau[3].value == pytest.approx(full)
    noise = [x + 100 for x in a.target_ids]
    other = Answers(a.clip_ids, a.questions, noise, a.target_ids, a.draft_texts, a.target_texts)
    assert R.replay(other, gammas=(3,), nodes=(), n_boot=20).row("raw draft tokens").tau[3].value == 1


def test_fitting_never_sees_the_tested_half():
    a = log(30)
    said = a.target_ids[:15] + [x[:1] + 50 for x in a.target_ids[15:]]
    changed = Answers(a.clip_ids, a.questions, a.draft_ids, said, a.draft_texts, a.target_texts)
    first, second = R.replay(a, n_boot=20, nodes=()), R.replay(changed, n_boot=20, nodes=())
    assert first.about["fit"] == 15 and second.row("template").tau[3].value == 1 # ids that were never fitted
    assert template_ids(a[:15]).tolist() == template_ids(changed[:15]).tolist()


def test_cascade_follows_the_template_only_while_the_answer_does():
    template, table = [1, 2, 3], NGramTable([[1, 9, 8, 7], [1, 9, 8, 7]])
    propose = R.cascade(template, table)
    assert propose([], 2) == [1, 2] and propose([1], 2) == [2, 3] and propose([1, 9], 2) == [8, 7]


def test_gain_needs_the_right_clip():
    rng = np.random.default_rng(0)
    things = rng.integers(10, 16, 120)
    target, draft = [np.array([1, t, 2]) for t in things], [np.array([30, t]) for t in things]
    a = Answers([f"c{i}" for i in range(120)], ["q"] * 120, draft, target, [""] * 120, [""] * 120)
    right = R.word_gain(*a.split(.5), n=100)
    a.draft_ids = [draft[i] for i in rng.permutation(120)]
    wrong = R.word_gain(*a.split(.5), n=100)
    assert right.gain.low > .3 and right.weight > 2
    assert right.gain_other < right.gain.value and wrong.gain.value < .1


def test_speedups_are_estimates_and_pay_for_the_draft():
    done = R.replay(log(30), timing=R.PUBLISHED, n_boot=20)
    raw, table = done.row("raw draft tokens"), done.row("n-gram, order 7")
    assert all(raw.speedup[g] < 1 and table.speedup[g] <= table.tau[g].value for g in (3, 5, 8))
    assert "estimates" in done.report() and R.replay(log(30), n_boot=20).row("template").speedup == {}


def test_files_round_trip_and_the_command(tmp_path):
    a = log(24, questions=2)
    write_answers(tmp_path/"log.jsonl", a)
    done = R.run_replay(tmp_path/"log.jsonl", out=tmp_path/"out", n_boot=20, say=lambda s: None)
    saved = json.loads((tmp_path/"out"/"replay.json").read_text())
    assert len(saved["rows"]) == len(done.rows) and done.row("n-gram by question")
    assert (tmp_path/"out"/"replay.png").stat().st_size > 1000


def record(**kw): # a line of a log, wrong where it is told
    texts = {"clip_id": "c", "question": "q", "draft_text": "", "target_text": ""}
    return json.dumps(texts | {"draft_ids": [1], "target_ids": [1]} | kw)


@pytest.mark.parametrize("line,what", [('{"clip_id": "c"}', "question"), (record(draft_ids=[1.5]), "draft_ids"),
                                       (record(target_ids=[]), "target_ids")])
def test_bad_records_are_named_or_counted(tmp_path, line, what):
    write_answers(tmp_path/"log.jsonl", log(20))
    with open(tmp_path/"log.jsonl", "a") as f: f.write(line + "\n")
    with pytest.raises(FeatsdError, match=f"line 21.*{what}"):
        R.run_replay(tmp_path/"log.jsonl", say=lambda s: None)
    said = []
    R.run_replay(tmp_path/"log.jsonl", skip_bad=True, n_boot=20, say=said.append)
    assert "1 records skipped" in said[0]


@pytest.mark.parametrize("kw,what", [
    ({"fit_fraction": 0}, "fit_fraction"), ({"gammas": (0,)}, "gamma 0"), ({"nodes": (-1,)}, "gamma -1"),
    ({"fit_fraction": .001}, "0 answers to fit")])
def test_bad_settings(kw, what):
    with pytest.raises(FeatsdError, match=what): R.replay(log(), **kw)


def test_times_from_a_wrong_file(tmp_path):
    (tmp_path/"t.json").write_text('{"sd_per_sample": {}}')
    with pytest.raises(FeatsdError, match="wall-clock"): R.stage_times(tmp_path/"t.json")
    (tmp_path/"u.json").write_text('{"speed": 3}')
    with pytest.raises(FeatsdError, match="speed"): R.stage_times(tmp_path/"u.json")
    assert R.stage_times("published") is R.PUBLISHED and R.stage_times(None) is None


def test_real_log():
    if not REAL.is_file():
        pytest.skip("the real log is not at hand: FEATSD_SHARED_DATA names the folder of tokens/test_tokens_1q.json")
    done = R.replay(read_answers(REAL), orders=(), nodes=(8,), n_boot=50)
    assert done.about["raw_consecutive_all"] == pytest.approx(.0073, abs=5e-5)
    assert done.row("template").consecutive == pytest.approx(8.69, abs=5e-3)
    for g, t in {3: 2.34, 5: 2.60, 8: 2.86}.items():
        assert done.row("n-gram, order 7").tau[g].value == pytest.approx(t, abs=.02)
    assert done.row("tree, order 7").tau[8].value == pytest.approx(3.0, abs=.1)


def test_the_studys_other_layouts(tmp_path):
    "Logs by window length nest each model's answer and name no question; the ten-question log says 'question'"
    def said(k): return {"output_tokens": [k, 5, 6, 7], "output_text": "t"}
    nested = [{"sample_idx": i, "eventgpt": said(9), "videollava": said(i % 2)} for i in range(8)]
    asked = [{"sample_idx": i // 2, "question": f"q{i % 2} ?", "egpt_tokens": [1], "vl_tokens": [2, 3], "egpt_text": "",
              "vl_text": "", "adapter_tokens": [4]} for i in range(6)]
    for name, records in (("nested", nested), ("asked", asked)):
        (tmp_path/f"{name}.json").write_text(json.dumps({"results": records}))
    a, b = (R.read_log(tmp_path/f"{n}.json") for n in ("nested", "asked"))
    assert a.target_ids[1].tolist() == [1, 5, 6, 7] and a.draft_ids[0][0] == 9 and set(a.questions) == {""}
    assert len(b.clips) == 3 and set(b.questions) == {"q0 ?", "q1 ?"} and b.target_ids[0].tolist() == [2, 3]
    del nested[3]["videollava"]["output_tokens"]
    (tmp_path/"torn.json").write_text(json.dumps({"results": nested}))
    with pytest.raises(FeatsdError, match=r"results\[3\]: key 'vl_tokens' is missing"): R.read_log(tmp_path/"torn.json")
    table = R.windows_table({4: a, 2: a}, gamma=3, block=1, n=20)
    assert [r[0] for r in table.rows] == [2, 4] and R.windows_chart(table, 3).panels[0].series[0].null


@pytest.mark.skipif(not (DATA/"tokens"/"durations").is_dir(), reason="the logs by window length are not at hand: set "
                    "FEATSD_SHARED_DATA to the folder of tokens/durations")
def test_the_seven_window_lengths_and_the_ten_questions():
    logs = {k: R.read_log(DATA/"tokens"/"durations"/f"tokens_{k}s_1q.json") for k in (2, 4, 5, 8, 10, 16, 20)}
    assert sum(map(len, logs.values())) == 1264
    row = R.windows_table({2: logs[2]}, n=20).rows[0]
    assert [round(x.value, 2) for x in row[2:]] == [1.02, 1.26, 2.43, 8.59]
    ten = R.read_log(DATA/"tokens"/"tokens_10clips_10q.json")
    assert (len(ten), len(ten.clips), len(set(ten.questions))) == (100, 10, 10)
