"What words alone predict: laws, slow references, the real log, and logs and tables that are not what they should be"
import json
import os
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from closeness import DOUBLE, near
from safetensors.numpy import load, save

from featsd.base.core import FeatsdError
from featsd.base.stats import clip_bootstrap
from featsd.data.answers import (
    Answers, KEYS, STUDY_KEYS, agreement, first_match_length, read_answers, replay_cycles, tau, top1, write_answers)
from featsd.models.words import prompt_lookup, propose_constant, template_ids
from featsd.replay import word_nulls
from featsd.data.answers import id_lists
from featsd.models.words import NGramTable, _digest

REAL = (Path(os.environ.get("FEATSD_SHARED_DATA") or
             Path(__file__).parents[2] / "shared" / "data") / "tokens" / "test_tokens_1q.json")


def random_answers(n, rng, vocab=6, longest=14):
    "Answers with some structure: a token often repeats the one three before it"
    out = []
    for _ in range(n):
        a = rng.integers(0, vocab, rng.integers(1, longest + 1))
        for i in range(3, len(a)):
            if rng.random() < .6: a[i] = a[i - 3]
        out.append(a)
    return out


def as_log(target, rng, per_clip=2):
    draft = [rng.permutation(a) for a in target]
    n = len(target)
    return Answers([f"c{i // per_clip}" for i in range(n)], ["q"] * n, draft, target, ["d"] * n, ["t"] * n)


class SlowNGram:
    "The table as a dictionary of tuples: what a reader would write first"
    def __init__(self, answers, order):
        self.order, self.table = order, defaultdict(Counter)
        for answer in answers:
            text = [-1, *map(int, answer)]
            for i in range(1, len(text)):
                for k in range(min(order, i) + 1): self.table[tuple(text[i - k:i])][text[i]] += 1

    def tails(self, context):
        text = [-1, *map(int, context)]
        return [text[len(text) - k:] for k in range(min(self.order, len(text)) + 1)
                if tuple(text[len(text) - k:]) in self.table]

    def law(self, context):
        tail = self.tails(context)[-1]
        counts = sorted(self.table[tuple(tail)].items(), key=lambda tc: (-tc[1], tc[0]))
        total = sum(c for _, c in counts)
        return [t for t, _ in counts], [c / total for _, c in counts], len(tail)

    def next(self, context): return self.law(context)[0][0]

    def smoothed(self, context, vocab, strength=1.):
        p = np.full(vocab, 1 / vocab)
        for tail in self.tails(context):
            counts = self.table[tuple(tail)]
            total, kinds = sum(counts.values()), strength * len(counts)
            p = np.array([(counts[v] + kinds * p[v]) / (total + kinds) for v in range(vocab)])
        return p


def slow_tau(next_token, answers, gamma):
    tokens = cycles = 0
    for answer in map(list, answers):
        i = 0
        while i < len(answer):
            text, n = answer[:i], 0
            while n < gamma and i + n < len(answer) and next_token(text) == answer[i + n]:
                text = [*text, answer[i + n]]
                n += 1
            emitted = min(n + 1, len(answer) - i)
            i, tokens, cycles = i + emitted, tokens + emitted, cycles + 1
    return tokens / cycles


# ---- the table against the slow one

@pytest.mark.parametrize("seed,order", [(0, 1), (1, 2), (2, 4), (3, 7), (4, 20)])
def test_table_is_the_slow_table(seed, order):
    rng = np.random.default_rng(seed)
    fit, test = random_answers(25, rng), random_answers(12, rng, vocab=8) # ids 6 and 7 were never seen
    fast, slow = NGramTable(fit, order, strength=2.5), SlowNGram(fit, order)
    for answer in test:
        for i in range(len(answer) + 1):
            ids, probs, used = fast.law(answer[:i])
            slow_ids, slow_probs, slow_used = slow.law(answer[:i])
            assert (ids.tolist(), used) == (slow_ids, slow_used)
            near(probs, slow_probs, 9, DOUBLE)
            assert fast.next(answer[:i]) == slow_ids[0] and fast.share(answer[:i]) == pytest.approx(slow_probs[0])
            near(fast.smoothed(answer[:i], 9), slow.smoothed(answer[:i], 9, 2.5), 9 * order, DOUBLE)
    for gamma in (1, 2, 5): assert tau(fast.propose, test, gamma) == slow_tau(slow.next, test, gamma)
    assert top1(fast.next, test) == np.concatenate(fast.top1_flags(test)).mean()
    for answer, flags, probs in zip(test, fast.top1_flags(test), fast.token_probs(test, 9), strict=True):
        assert flags.tolist() == [slow.next(answer[:i]) == answer[i] for i in range(len(answer))]
        near(probs, [slow.smoothed(answer[:i], 9, 2.5)[answer[i]] for i in range(len(answer))], 9 * order, DOUBLE)


def test_smoothed_is_a_law_everywhere():
    rng = np.random.default_rng(5)
    table = NGramTable(random_answers(20, rng), 4)
    for answer in random_answers(10, rng, vocab=9):
        p = table.smoothed(answer, 12)
        assert p.min() > 0 and near(p.sum(), 1., 12 * 4, DOUBLE)
    with pytest.raises(FeatsdError, match="vocabulary of 3"): table.smoothed([], 3)
    with pytest.raises(FeatsdError, match="vocabulary of 7"): table.token_probs([[1, 8]], 7)


def test_strength_is_fitted_on_held_out_answers():
    "Every training answer forty times over makes the textbook table too sure; more smoothing costs fewer bits"
    rng = np.random.default_rng(6)
    table = NGramTable(random_answers(10, rng) * 40, 5)
    held_out = random_answers(20, rng)
    bits = table.bits(held_out, 10)
    assert table.fit_strength(held_out, 10) > 1 and table.bits(held_out, 10) < bits
    with pytest.raises(FeatsdError, match="strength"): NGramTable([[1]], strength=0)


def test_ties_go_to_the_smallest_id_and_order_of_answers_is_nothing():
    assert NGramTable([[9, 4], [9, 3], [9, 5]]).next([9]) == 3
    fit = random_answers(30, np.random.default_rng(7))
    a, b = NGramTable(fit), NGramTable(fit[::-1])
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("keys", "starts", "ids", "counts"))


def test_contexts_with_strange_ids():
    "A key of the tree is parent·M + token + 1: ids beyond M must not run into the next parent's children"
    rng = np.random.default_rng(8)
    fit = random_answers(40, rng, vocab=4)
    table, slow = NGramTable(fit, 5), SlowNGram(fit, 5)
    for a in rng.integers(0, 60, (300, 6)):
        assert table.law(a)[2] == slow.law(a)[2]
        flags = table.top1_flags([a])[0]
        assert flags.tolist() == [slow.next(a[:i]) == a[i] for i in range(6)]
    assert table.next(np.array([2**31 - 3])) == table.next([2**31 - 3])


# ---- laws of agreement and of cycles

@pytest.mark.parametrize("seed", range(5))
def test_laws(seed):
    rng = np.random.default_rng(seed)
    fit, test = random_answers(30, rng), random_answers(20, rng)
    table, template = NGramTable(fit), template_ids(fit)
    for propose in (table.propose, partial(propose_constant, ids=template), lambda c, g: rng.integers(0, 6, g).tolist(),
                    lambda c, g: []):
        for gamma in (1, 3, 8):
            r = replay_cycles(propose, test, gamma)
            assert 1 <= r.tau <= gamma + 1
            assert r.accepted.sum() == r.cycles.sum() and (r.tokens == [len(a) for a in test]).all()
            assert (np.diff(r.prefix) <= 0).all()
            # cycles whose last token was an accepted one
            ends = (r.accepted * (np.arange(gamma + 1) + 1)).sum() - r.tokens.sum()
            assert 0 <= ends <= len(test)
    other = [rng.permutation(a) for a in test]
    g = agreement(other, test)
    slow = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))
            for a, b in zip(other, test, strict=True)]
    assert g.lengths.tolist() == slow and g.consecutive == pytest.approx(g.prefix.sum())
    assert (np.diff(g.prefix) <= 0).all() and (g.prefix <= np.minimum.accumulate(g.marginal) + 1e-12).all()
    assert g.match_0 == g.prefix[0] == np.mean([a[0] == b[0] for a, b in zip(other, test, strict=True)])
    assert np.nanprod(g.conditional[:3]) == pytest.approx(g.prefix[2])


def test_oracle_and_null():
    answers = [list(range(12)), list(range(5, 29))]
    oracles = [partial(propose_constant, ids=a) for a in answers]
    for gamma in (1, 2, 3, 5, 11): assert tau(oracles, answers, gamma) == gamma + 1 # 12 and 24 are multiples
    assert tau(oracles, answers, 99) == 18
    assert tau(lambda c, g: [], answers, 5) == 1
    # a proposal beyond γ is cut
    assert tau([lambda c, g, a=a: propose_constant(c, 50, a) for a in answers], answers, 3) == 4


def test_first_match_and_template():
    assert [first_match_length(*ab) for ab in (([1, 2], [1, 3]), ([1], [1, 2]), ([], []), ([2], [1]))] == [1, 1, 0, 0]
    assert template_ids([[1, 2, 3], [1, 5], [4, 5]]).tolist() == [1, 5, 3]
    assert template_ids([]).tolist() == []


def test_prompt_lookup_copies_what_is_there():
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt, context = rng.integers(0, 4,
                                       rng.integers(0, 9)).tolist(), rng.integers(0, 4, rng.integers(0, 9)).tolist()
        text, out = prompt + context, prompt_lookup(context, prompt, 3)
        best = max((n for n in (1, 2, 3) if n < len(text) and
                    any(text[i:i + n] == text[-n:] for i in range(len(text) - n))), default=0)
        if not best: assert out == []
        else:
            at = max(i for i in range(len(text) - best) if text[i:i + best] == text[-best:])
            assert out == text[at + best:at + best + 3] and 1 <= len(out) <= 3


def test_ids_of_any_kind():
    torch = pytest.importorskip("torch")
    for answers in ([[1, 2], [3]], [np.array([1, 2], dtype=np.int32), np.array([3])],
                    [torch.tensor([1, 2]), torch.tensor([3])]):
        assert [a.tolist() for a in id_lists(answers)] == [[1, 2], [3]]
    for bad in ([[1.5]], [[-1]], [[[1]]], [[True]], [["a"]], [[2**40]]):
        with pytest.raises(FeatsdError, match="answer 0"): id_lists(bad)


# ---- intervals

def test_bootstrap_resamples_clips():
    rng = np.random.default_rng(0)
    clips = np.repeat(np.arange(40), 10)
    values = rng.normal(size=40)[clips] # ten questions of a clip share their value
    by_clip, by_record = clip_bootstrap(values, clips), clip_bootstrap(values, np.arange(400))
    assert by_clip.groups == 40 and (by_clip.high - by_clip.low) > 2 * (by_record.high - by_record.low)
    assert by_clip.low < by_clip.value < by_clip.high and by_clip.value == pytest.approx(values.mean())
    assert clip_bootstrap(values, clips) == by_clip != clip_bootstrap(values, clips, seed=1)
    assert clip_bootstrap(values, clips, block=7).groups == 6
    expected = 2 * 1.96 * values[::10].std() / np.sqrt(40)
    assert (by_clip.high - by_clip.low) == pytest.approx(expected, rel=.15)


def test_bootstrap_of_a_ratio_and_of_blocks():
    tokens, cycles = np.array([10, 10, 30, 30]), np.array([10, 5, 10, 6])
    assert clip_bootstrap(tokens, list("abcd"), weights=cycles).value == pytest.approx(80 / 31)
    # the same clips above and below
    assert clip_bootstrap(2 * cycles, list("abcd"), weights=cycles)[:3] == pytest.approx((2, 2, 2))
    assert clip_bootstrap(tokens, list("aaaa"), weights=cycles)[:3] == pytest.approx((80 / 31,) * 3)
    assert clip_bootstrap([0, 1, 0, 1], list("abab"), block=2)[:3] == (.5, .5, .5)
    for bad in (([1, 2], ["a"]), ([], [])):
        with pytest.raises(FeatsdError, match="bootstrap"): clip_bootstrap(*bad)
    with pytest.raises(FeatsdError, match="block 0"): clip_bootstrap([1], ["a"], block=0)


# ---- nulls

def test_word_nulls_are_the_single_functions():
    rng = np.random.default_rng(3)
    fit, test = as_log(random_answers(80, rng), rng).split(.5)
    assert not set(fit.clips) & set(test.clips)
    nulls, table, template = word_nulls(fit, test, (2, 4), n=20), NGramTable(fit), template_ids(fit)
    assert nulls["ngram"]["top1"].value == pytest.approx(top1(table.next, test))
    assert nulls["ngram"]["tau"][4].value == tau(table.propose, test, 4)
    assert nulls["template"]["consecutive"].value == agreement(template, test).consecutive
    assert nulls["template"]["top1"].value == top1(lambda c: propose_constant(c, 1, [*template, *[-1] * 99])[0], test)
    assert nulls["raw"]["consecutive"].value == agreement(test.draft_ids, test).consecutive
    assert nulls["raw"]["tau"][2].value == tau([partial(propose_constant, ids=d) for d in test.draft_ids], test, 2)


# ---- the real log

@pytest.fixture(scope="module")
def real():
    if not REAL.is_file():
        pytest.skip("the real log is not at hand: set FEATSD_SHARED_DATA to the folder that holds "
                    "tokens/test_tokens_1q.json")
    return read_answers(REAL)


def test_real_raw_words_and_template(real):
    assert len(real) == len(real.clips) == 1100
    raw, (fit, test) = agreement(real.draft_ids, real), real.split(.5)
    assert raw.consecutive == raw.match_0 == pytest.approx(.0073, abs=5e-5)
    assert (len(fit), len(test)) == (550, 550)
    assert agreement(template_ids(fit), test).consecutive == pytest.approx(8.69, abs=.005)


def test_real_ngram(real):
    fit, test = real.split(.5)
    table = NGramTable(fit, 7)
    assert np.concatenate(table.top1_flags(test)).mean() == pytest.approx(.68, abs=.01)
    for gamma, goal in ((3, 2.34), (5, 2.60), (8, 2.86)):
        assert tau(table.propose, test, gamma) == pytest.approx(goal, abs=.02)


def test_real_texts_that_wrap_nothing(real, tmp_path):
    write_answers(tmp_path/"log.jsonl", real)
    again = read_answers(tmp_path/"log.jsonl")
    assert again.draft_texts == real.draft_texts and again.clip_ids == real.clip_ids
    assert again.questions == real.questions
    assert all(np.array_equal(a, b) for a, b in zip(again.target_ids, real.target_ids, strict=True))


# ---- logs: round trip, and bad ones

GOOD = {"clip_id": "a", "question": "what?", "draft_ids": [1, 2], "target_ids": [3], "draft_text": "x",
        "target_text": "ü\n\"y\""}
STUDY = {"sample_idx": 7, "query": "what?", "egpt_tokens": [1, 2], "vl_tokens": [3], "egpt_text": "x", "vl_text": "y"}


def write_lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["log.jsonl", "log.json", "log"])
def test_round_trip(tmp_path, name):
    log = read_answers(write_lines(tmp_path/name, GOOD, "", GOOD | {"clip_id": 8, "tokenizer_hash": "", "extra": [1]}))
    assert log.clip_ids == ["a", "8"] and log.target_texts[0] == GOOD["target_text"] and log.skipped == []
    log.tokenizer_hash = "abc"
    log.sequences, log.spans, log.data = ["s", "s"], [(5, 9), (7, 11)], "set train"
    write_answers(tmp_path/"again.jsonl", log)
    again = read_answers(tmp_path/"again.jsonl")
    assert again.recorded == {"a": ("s", (5, 9)), "8": ("s", (7, 11))} and again.data == "set train"
    assert again.tokenizer_hash == "abc" and again.target_texts == log.target_texts
    assert again.draft_ids[1].tolist() == [1, 2]
    assert NGramTable(again).tokenizer_hash == "abc"
    assert {p.name for p in tmp_path.iterdir()} == {name, "again.jsonl"}


@pytest.mark.parametrize("indent", [None, 1])
def test_study_layout(tmp_path, indent):
    p = tmp_path/"log.json"
    p.write_text(json.dumps({"eventgpt_success": 1, "videollava_success": 1, "results": [STUDY]}, indent=indent))
    log = read_answers(p)
    assert (log.clip_ids, log.draft_ids[0].tolist(), log.target_ids[0].tolist(),
            log.draft_texts) == (["7"], [1, 2], [3], ["x"])
    p.write_text(json.dumps({"eventgpt_success": 1, "videollava_success": 2, "results": [STUDY]}, indent=indent))
    with pytest.raises(FeatsdError, match="unequal counts.*mend"): read_answers(p)
    assert len(read_answers(p, skip_bad=True).skipped) == 1


BAD = [("target_ids", None, "missing"), ("clip_id", None, "missing"), ("target_text", None, "missing"),
       ("draft_text", None, "missing"),
       ("target_ids", [], "empty answer"), ("target_ids", [1] * 70000, "at most"), ("draft_ids", [1, -2], "'-2' at 1"),
       ("draft_ids", [1.0], "integers"), ("draft_ids", ["1"], "integers"), ("draft_ids", [True], "integers"),
       ("draft_ids", [2**31], "integers"), ("draft_ids", "12", "list"), ("draft_ids", {"0": 1}, "list"),
       ("question", 3, "text"), ("clip_id", [1], "non-empty"), ("clip_id", "", "non-empty")]


@pytest.mark.parametrize("key,value,message", BAD)
@pytest.mark.parametrize("study", [False, True])
def test_bad_records_name_record_and_key(tmp_path, key, value, message, study):
    if study:
        key = dict(zip(KEYS, STUDY_KEYS, strict=True))[key]
    good = STUDY if study else GOOD
    bad = {k: v for k, v in (good | {key: value}).items() if v is not None}
    p = tmp_path/"log.json"
    other = good | {"sample_idx" if study else "clip_id": 9}
    if study: p.write_text(json.dumps({"results": [good, bad, other]}))
    else: write_lines(p, good, bad, other)
    with pytest.raises(FeatsdError) as e: read_answers(p)
    line = str(e.value)
    assert str(p) in line and f"'{key}'" in line and message in line and ("results[1]" if study else "line 2") in line
    assert "\n" not in line
    log = read_answers(p, skip_bad=True)
    assert len(log) == 2 and len(log.skipped) == 1 and key in log.skipped[0]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"[1, 2]\n", b"null", b"\xff\xfe{", b'{"results": 3}',
                                     b'{"results": []}',
                                     b'{"results": [3]}', b"[" * 100000, b'{"clip_id": ' + b"9" * 5000 + b"}",
                                     b"\x80\x04K\x01."])
@pytest.mark.parametrize("name", ["log.json", "log.jsonl"])
def test_files_that_are_no_logs(tmp_path, content, name):
    p = tmp_path/name
    p.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(FeatsdError, match="log.json"): read_answers(p, skip_bad=skip)


def test_sizes_are_bounded_and_files_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"): read_answers(tmp_path/"nothing.jsonl")
    with pytest.raises(FileNotFoundError): read_answers(tmp_path)
    p = write_lines(tmp_path/"log.jsonl", GOOD)
    with pytest.raises(FeatsdError, match="at most 10"): read_answers(p, max_bytes=10)
    with pytest.raises(FeatsdError, match="at most 1 token"): read_answers(p, max_tokens=1)
    write_lines(p, GOOD, {**GOOD, "tokenizer_hash": "a"})
    with pytest.raises(FeatsdError, match="2 tokenizers"): read_answers(p)


# ---- tables on disk

def test_table_file(tmp_path):
    rng = np.random.default_rng(0)
    table, p = NGramTable(random_answers(30, rng), 5, tokenizer_hash="abc", strength=4), tmp_path/"table.safetensors"
    table.save(p)
    first = p.read_bytes()
    table.save(p)
    assert p.read_bytes() == first and [q.name for q in tmp_path.iterdir()] == [p.name]
    again = NGramTable.load(p, tokenizer_hash="abc")
    assert (again.order, again.strength, again.tokenizer_hash) == (5, 4, "abc")
    for a in random_answers(20, rng, vocab=8):
        assert again.propose(a, 6) == table.propose(a, 6) and (again.smoothed(a, 9) == table.smoothed(a, 9)).all()
    with pytest.raises(FeatsdError, match="tokenizer abc, expected xyz"): NGramTable.load(p, tokenizer_hash="xyz")
    assert again.made_from == {}
    with pytest.raises(FeatsdError, match="at most 10"): NGramTable.load(p, max_bytes=10)
    with pytest.raises(FileNotFoundError): NGramTable.load(tmp_path/"none")


def test_damaged_tables_are_refused(tmp_path):
    rng = np.random.default_rng(1)
    table, p = NGramTable(random_answers(6, rng), 3), tmp_path/"table.safetensors"
    table.save(p)
    good = p.read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)): bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        if rng.random() < .3: bad = bad[:rng.integers(len(bad))]
        p.write_bytes(bad)
        try: again = NGramTable.load(p)
        except FeatsdError as e: assert str(p) in str(e)
        else: # a flip in the tokenizer's hash or the strength may leave a lawful table; the arrays are the same
            assert np.array_equal(again.counts, table.counts) and np.array_equal(again.keys, table.keys)
    for junk in (b"", b"\0" * 8, b"\xff" * 64, save({"a": np.zeros(3)})):
        p.write_bytes(junk)
        with pytest.raises(FeatsdError, match="table.safetensors"): NGramTable.load(p)


def test_forged_tables_are_refused(tmp_path):
    "Arrays with a fitting digest that no fit could have made"
    table, p = NGramTable([[1, 2, 3], [1, 3, 3]], 3), tmp_path/"table.safetensors"
    table.save(p)
    good = load(p.read_bytes())
    about = {"kind": "ngram", "version": 1, "order": 3, "strength": 1., "M": table.M, "tokenizer_hash": ""}

    def forge(about=about, **change):
        t = {**good, **change}
        p.write_bytes(save(t, metadata={"featsd": json.dumps({**about, "sha256": _digest(t)})}))
        return NGramTable.load(p)
    assert forge().next([1]) == table.next([1])
    keys, starts, ids, counts = (good[k] for k in ("keys", "starts", "ids", "counts"))
    bad = [{"keys": k} for k in (keys[::-1].copy(), keys + 10**9, -keys, keys[:0], keys[None])]
    bad += [{"starts": k} for k in (starts * 2, starts[:-1])]
    bad += [{"ids": k} for k in (ids + 3, ids - 9, ids * 0)] + [{"extra": ids}]
    bad += [{"counts": k} for k in (counts * 0, counts[::-1].copy(), counts.astype(np.int32))]
    bad += [{"about": about | change} for change in (
        {"order": 2}, {"order": 0}, {"order": True}, {"M": 2}, {"M": 2**40}, {"M": -1}, {"kind": "x"}, {"version": 2},
        {"strength": 0.}, {"strength": float("nan")}, {"strength": "1"}, {"tokenizer_hash": 3})]
    for change in bad:
        with pytest.raises(FeatsdError, match="table.safetensors"): forge(**change)
