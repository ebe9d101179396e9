"Laws of the metrics: a slow reference agrees, padding is nothing, the three rates obey, baselines know what they know"
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import near, tol
import torch.nn.functional as F
from torch import nn

from featsd.base import costs
from featsd.data import answers
from featsd import metrics as M
from featsd import nulls as N
from featsd.data import scores as S
from featsd.adapters import create_adapter, save_checkpoint
from featsd.base.core import FeatsdError, read_json
from featsd.base import figures
from featsd.data.answers import read_answers
from featsd.data.chunk import PairStates
from featsd.data.store import StoreWriter, open_states
from featsd.base.costs import SDConfig, TimingConfig
from featsd.metrics import (
    Scores, accepts, compute_all_metrics_parallel, compute_per_position_stats, consecutive, curves)
from featsd.measured import measure_to_folder
from featsd.data.head import Head, RMSNorm

SHARED = Path(os.environ.get("FEATSD_SHARED_DATA", Path(__file__).parents[2]/"shared"/"data"))
REFERENCE, LOG = SHARED/"reference_results", SHARED/"tokens"/"test_tokens_1q.json"
D, V = 24, 30


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_head(seed=0, dim=D):
    lm = nn.Linear(dim, V, bias=False)
    with torch.no_grad(): lm.weight.copy_(2 * torch.randn(V, dim, generator=torch.Generator().manual_seed(seed)))
    return Head(RMSNorm(torch.ones(dim), 1e-6), lm)


def ragged(seed, n=40, T=17, pad=0.):
    "Pairs whose similarity falls along the answer, with anything in the padding"
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(n, T, D, generator=g)
    start, growth = torch.rand(n, 1, 1, generator=g) * .3, torch.linspace(0, 1.2, T)[None, :, None]
    noise = start + growth * torch.rand(n, 1, 1, generator=g)
    aligned = target + noise * torch.randn(n, T, D, generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=g)
    aligned[~mask], target[~mask] = pad, pad
    return aligned, target, mask


# ---- against the slow reference

def lower_median(x): return sorted(x)[(len(x) - 1) // 2]


def std(x): return math.sqrt(sum((v - sum(x) / len(x)) ** 2 for v in x) / (len(x) - 1))


def run(row, ok):
    n = 0
    for x in row:
        if not ok(x): break
        n += 1
    return n


def mean(x): return sum(x) / len(x)


def by_place(rows, longest, value): # the mean of value over the rows that reach a position
    return [mean([value(r[i]) for r in rows if len(r) > i]) for i in range(min(20, longest))]


def slow_ranks(aligned, target, mask, head):
    ranks = []
    for A, B, K in zip(aligned, target, mask, strict=True):
        row = []
        for a, t, m in zip(A, B, K, strict=True):
            if not m: continue
            y, z = int(head.logits(t).argmax()), head.logits(a).tolist()
            row.append(sum(1 for k, v in enumerate(z) if v > z[y] or (v == z[y] and k < y)))
        ranks.append(row)
    return ranks


def slow(aligned, target, mask, head):
    "Every metric by loops over answers and positions, in float64"
    def cosine(a, t): return float(F.cosine_similarity(a.double(), t.double(), dim=0))
    cos = [[cosine(a, t) for a, t, m in zip(A, B, K, strict=True) if m]
           for A, B, K in zip(aligned, target, mask, strict=True)]
    ranks = slow_ranks(aligned, target, mask, head)
    flat, lens = [c for r in cos for c in r], [len(r) for r in cos]
    out = {"batch_size": len(cos), "total_valid_positions": len(flat), "max_seq_len": max(lens),
           "cos_sim_mean": mean(flat), "cos_sim_std": std(flat), "cos_sim_min": min(flat), "cos_sim_max": max(flat),
           "cos_sim_median": lower_median(flat), "num_hidden_tokens_mean": mean(lens),
           "num_hidden_tokens_std": std(lens)}

    def spread(name, x, suffix=""):
        return {f"{name}_{k}{suffix}": f(x)
                for k, f in (("mean", mean), ("std", std), ("max", max), ("min", min), ("median", lower_median))}
    for t in (.80, .85, .90, .95):
        k, runs = round(t * 100), [run(r, lambda c, t=t: c > t) for r in cos]
        out |= {f"accept_{k}": mean([c > t for c in flat])} | spread("consecutive", runs, f"_{k}")
    runs = [run(r, lambda c: c > .90) for r in cos]
    block = mean([min(r, 5) for r in runs])
    out |= {"sd_accept_rate_prefill_gamma": sum(runs) / sum(lens), "sd_accept_rate_decode_gamma5": block / 5,
            "sd_consecutive_gamma5": block}
    out["position_accept_90"] = by_place(cos, max(lens), lambda c: c > .90)
    out["position_mean_sim"] = by_place(cos, max(lens), lambda c: c)
    flat_rank, token_runs = [x for r in ranks for x in r], [run(r, lambda x: x == 0) for r in ranks]
    for k in (1, 5, 10): out[f"token_top{k}_match"] = mean([x < k for x in flat_rank])
    out |= spread("token_consecutive", token_runs)
    out |= {"token_sd_prefill_consecutive_mean": mean([min(r, 7) for r in token_runs]),
            "token_sd_decode_accept_rate": mean([min(r, 5) for r in token_runs]) / 5}
    out["position_token_accept"] = by_place(ranks, max(lens), lambda x: x == 0)
    for t in (.80, .85, .90, .92, .95, .98):
        hit = [x == 0 for c, x in zip(flat, flat_rank, strict=True) if c > t]
        k = f"cosim_{round(t * 100)}"
        out |= {f"{k}_count": len(hit), f"{k}_token_match": mean(hit) if hit else None}
    hits = [float(x == 0) for x in flat_rank]
    together = sum((c - mean(flat)) * (h - mean(hits)) for c, h in zip(flat, hits, strict=True))
    out["cosim_token_pearson_r"] = together / (len(flat) - 1) / std(flat) / std(hits)
    return out


def deviation(a, b):
    if a is None or b is None: return 0. if a is b else math.inf
    if isinstance(a, list): return max(map(deviation, a, b), default=0.) if len(a) == len(b) else math.inf
    return abs(a - b)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_reference(seed):
    head, (aligned, target, mask) = make_head(seed), ragged(seed, pad=(0., float("nan"), 1e30)[seed % 3])
    fast, ref = compute_all_metrics_parallel((aligned, target, mask), head=head), slow(aligned, target, mask, head)
    worst = {k: deviation(fast[k], v) for k, v in ref.items()}
    assert max(worst.values()) <= tol(D), worst # a cosine is a sum of D products, its size is 1


@pytest.mark.parametrize("mutant", [">=", "population std", "upper median", "padding counted"])
def test_the_reference_kills_mutants(mutant, monkeypatch):
    "The comparison above would notice the mistakes that are easy to make"
    aligned, target, mask = ragged(3)
    if mutant == ">=":
        a, t, m = torch.eye(2)[None, :1], torch.tensor([[[3., 4.]]]), torch.ones(1, 1, dtype=torch.bool)
        sd = SDConfig(thresholds=(float(np.float32(.6)),), screen=.6)
        m = compute_all_metrics_parallel(a, t, m, sd_config=sd)
        assert m["accept_60"] == 0.                                    # cos is .6 exactly, in float32
        return
    ref = slow(aligned, target, mask, make_head(3))
    if mutant == "population std":
        wrong = {"cos_sim_std": ref["cos_sim_std"] * math.sqrt(1 - 1 / ref["total_valid_positions"])}
    elif mutant == "upper median":
        even = (aligned[:2, :1], target[:2, :1], torch.ones(2, 1, dtype=torch.bool))
        m = compute_all_metrics_parallel(even)
        assert m["cos_sim_median"] == m["cos_sim_min"] < m["cos_sim_max"]
        return
    else:
        padded = compute_all_metrics_parallel((aligned, target, torch.ones_like(mask)))
        wrong = {"cos_sim_mean": padded["cos_sim_mean"]}
    m = compute_all_metrics_parallel((aligned, target, mask))
    assert all(abs(m[k] - v) > tol(D) for k, v in wrong.items())


def test_padding_and_batching_do_not_matter():
    head, (aligned, target, mask) = make_head(), ragged(1, n=70)
    whole = compute_all_metrics_parallel((aligned, target, mask), head=head)
    wide = [F.pad(x, (0, 0, 0, 9), value=float("inf")) for x in (aligned, target)]
    assert compute_all_metrics_parallel((*wide, F.pad(mask, (0, 9))), head=head) == whole
    small = S.score_batches(S.in_memory(aligned, target, mask, batch_pairs=7), {"x": S.take}, head)["x"]
    in_place = M.metrics_of(S.score_batches(S.in_memory(aligned, target, mask), {"x": S.as_it_is})["x"])
    assert deviation(in_place["cos_sim_mean"], whole["cos_sim_mean"]) <= tol(D)
    got = M.metrics_of(small)
    assert all(deviation(got[k], v) <= tol(D) for k, v in whole.items() if isinstance(v, (int, float)))


def test_bf16_states_are_computed_in_float32():
    aligned, target, mask = ragged(2)
    a, t = aligned.bfloat16(), target.bfloat16()
    both = (a, t, mask), (a.float(), t.float(), mask)
    near(*(compute_all_metrics_parallel(x)["cos_sim_mean"] for x in both), D, size=1)


# ---- laws

@pytest.mark.parametrize("seed", range(20))
def test_laws_of_the_three_rates(seed):
    rng = np.random.default_rng(seed)
    lens = rng.integers(1, 12, 50)
    s = Scores(np.concatenate([[0], lens.cumsum()]), rng.uniform(-1, 1, lens.sum()).astype(np.float32))
    s.cos[rng.random(len(s.cos)) < .05] = np.nan
    for t in (-.99, -.5, 0., .5, .9, 1.):
        a = accepts(s, t)
        c, run = curves(s, a), consecutive(s, a)
        p = np.array(c["prefix"])
        assert (np.diff(p) <= 0).all() and p.sum() == pytest.approx(run.mean())
        for i in range(len(p)):
            known = [m for m in c["marginal"][:i + 1] if m is not None]
            assert not known or p[i] <= min(known) + 1e-12
        slow_runs = [next((i for i, ok in enumerate(r) if not ok), len(r)) for r in np.split(a, s.offsets[1:-1])]
        assert run.tolist() == slow_runs
        assert all(0 <= v <= 1 for k in ("marginal", "conditional", "prefix") for v in c[k] if v is not None)


def test_the_laws_are_asserted_in_code(monkeypatch):
    s = Scores(np.array([0, 3, 6]), np.full(6, .99, np.float32))
    monkeypatch.setattr(M, "consecutive", lambda s, a: np.array([3, 3]))
    with pytest.raises(AssertionError, match="marginal"): curves(s, np.zeros(6, bool))


def test_strict_threshold_on_the_study_row():
    s = Scores(np.array([0, 7]), np.array([.95, .92, .91, .85, .93, .90, .82], np.float32))
    a = accepts(s, .90)
    assert a.sum() == 4 and consecutive(s, a).tolist() == [3]


def test_cycles_equal_the_replay_of_answers():
    "The vectorised walk against the replay that works on logged tokens"
    from featsd.data.answers import replay_cycles
    rng = np.random.default_rng(4)
    answers = [rng.integers(0, 9, rng.integers(1, 20)) for _ in range(60)]
    hits = [rng.random(len(a)) < .7 for a in answers]
    s = Scores(np.concatenate([[0], np.cumsum([len(a) for a in answers])]), np.ones(sum(map(len, answers)), np.float32))

    def drafter(a, h):
        def propose(context, g):
            here = slice(len(context), len(context) + g)
            return [int(x) if ok else 99 for x, ok in zip(a[here], h[here], strict=True)]
        return propose
    for g in (1, 3, 8):
        r = replay_cycles([drafter(a, h) for a, h in zip(answers, hits, strict=True)], answers, g)
        assert M.cycle_prefix(s, np.concatenate(hits), g) == pytest.approx(r.prefix.tolist())


def test_modes_by_hand():
    s = Scores(np.array([0, 4, 6]), np.array([.95, .5, .95, .95, .95, .95], np.float32))
    m = M.accept_modes(s, .9, [3], .1)[3]
    assert m["consecutive"]["n_mean"] == pytest.approx(1.5) and m["relaxed"]["n_mean"] == pytest.approx(2.)
    near(m["weighted"]["n_mean"], (.95 + .5 + .95 + .95 + .95) / 2, 5)
    assert m["consecutive"]["decodable"] and not m["relaxed"]["decodable"] and not m["weighted"]["decodable"]
    assert m["consecutive"]["speedup_seed"] == pytest.approx(2.5 / 1.1)


# ---- the study's numbers come back

needs_reference = pytest.mark.skipif(not REFERENCE.exists(),
                                     reason="the study's published results are not here; set FEATSD_SHARED_DATA")


@needs_reference
@pytest.mark.parametrize("level,prefill,decode,e2e", [(1, 1.4806, 5.0849, .9094), (4, 1.5806, 5.3876, .9533)])
def test_reference_speedups(level, prefill, decode, e2e):
    ref = read_json(REFERENCE/f"L{level}_acceptance_metrics.json")
    got = costs.study_speedups(ref["consecutive_mean_90"], ref["sd_consecutive_gamma5"], TimingConfig(), SDConfig())
    keys = "speedup_prefill", "speedup_decode_gamma5", "speedup_e2e"
    assert [round(got[k], 4) for k in keys] == [prefill, decode, e2e]
    for k, v in got.items(): assert v == pytest.approx(ref[k], rel=1e-9), k


@needs_reference
def test_every_key_of_the_reference_is_there():
    aligned, target, mask = ragged(0)
    m = compute_all_metrics_parallel((aligned, target, mask), head=make_head())
    for f in sorted(REFERENCE.glob("L*_acceptance_metrics.json")): assert set(read_json(f)) - {"timestamp"} <= set(m)
    stats = compute_per_position_stats((aligned, target, mask))
    assert set(read_json(REFERENCE/"L1_position_stats.json")[0]) == set(stats[0])
    assert compute_per_position_stats(aligned, target, mask) == stats


@pytest.mark.skipif(not LOG.exists(), reason="the study's logged answers are not here; set FEATSD_SHARED_DATA")
def test_real_answers():
    "Real EventGPT and Video-LLaVA answers: what words alone reach"
    log = read_answers(LOG)
    fit, test = log.split(.5)
    flags = N.word_nulls_flags(fit, test)
    def in_a_row(f): return answers.first_match_length(f, np.ones(len(f), bool))
    run = {k: np.mean([in_a_row(f) for f in v]) for k, v in flags.items()}
    raw = [in_a_row(f) for f in N.word_nulls_flags(None, log)["raw draft tokens"]]
    assert np.mean(raw) == pytest.approx(.0073, abs=5e-5)
    assert run["template"] == pytest.approx(8.69, abs=.005)
    assert np.concatenate(flags["n-gram table"]).mean() == pytest.approx(.68, abs=.01)


# ---- NaN, bad input

def test_not_finite_is_counted_excluded_reported():
    aligned, target, mask = ragged(5)
    mask[3, :4] = True
    aligned[3, 2], target[4, 0] = float("nan"), float("inf")
    n4, n7 = int(mask[4].sum()), int(mask[7].sum())
    aligned[7] = float("nan")
    ids = torch.zeros(mask.shape, dtype=torch.long)
    m = compute_all_metrics_parallel(aligned, target, mask, head=make_head(), ids=ids)
    dropped = 1 + (n4 == 1)
    assert (m["nan_positions"], m["nan_pairs"]) == (2 + n7, dropped) and m["batch_size"] == 40 - dropped
    assert m["total_valid_positions"] == int(mask.sum()) - 2 - n7 and math.isfinite(m["cos_sim_mean"])
    assert f"not finite: {2 + n7} positions" in M.print_metrics_report(m, out=None)


# ---- the forms in which it may be called

@pytest.mark.parametrize("seed", range(3))
def test_three_tensors_are_the_tuple(seed):
    "As the founding study's users call it; and every other form of the same data"
    three, head, sd = ragged(seed, pad=(0., float("nan"), 1e30)[seed]), make_head(seed), SDConfig(3, (.5, .7), .7)
    whole = compute_all_metrics_parallel(three, head=head, sd_config=sd)
    assert compute_all_metrics_parallel(*three, head=head, sd_config=sd) == whole
    assert compute_all_metrics_parallel(*three, None, sd, head) == whole
    assert compute_all_metrics_parallel(three, TimingConfig(), sd, head=head) == whole     # data, timing, sd_config
    assert compute_all_metrics_parallel(list(three), head=head, sd_config=sd) == whole
    assert compute_all_metrics_parallel(S.in_memory(*three), head=head, sd_config=sd) == whole
    scores = S.score_batches(S.in_memory(*three), {"x": S.as_it_is}, head)["x"]
    assert compute_all_metrics_parallel(scores, sd_config=sd) == whole


def spoiled(**change): # the three tensors by name, some of them changed
    three = dict(zip(("aligned", "target", "mask"), ragged(0), strict=True))
    return {k: change[k](v) if k in change else v for k, v in three.items()}


@pytest.mark.parametrize("change,words", [
    (dict(aligned=lambda a: a[:, :-1]), "pad them alike"), (dict(mask=lambda m: m[:-1]), "pad them alike"),
    (dict(aligned=lambda a: a[0]), "pad them alike"), (dict(aligned=lambda a: a[..., :-1]), "target's width"),
    (dict(mask=lambda m: m & (torch.arange(len(m)) != 5)[:, None]), "pair 5"),
    (dict.fromkeys(("aligned", "target", "mask"), lambda x: x[:0]), "no pairs"),
    (dict(aligned=lambda a: a * float("nan")), "none of")])
def test_bad_tensors_say_so_in_one_line(change, words):
    three = spoiled(**change)
    for call in (lambda: compute_all_metrics_parallel(tuple(three.values())),
                 lambda: compute_all_metrics_parallel(*three.values()), lambda: compute_all_metrics_parallel(**three)):
        with pytest.raises(FeatsdError, match=words) as e: call()
        assert "\n" not in str(e.value)


A, T_, K = ragged(0)


@pytest.mark.parametrize("args,found", [
    ((A, T_), "target = a tensor [40, 17, 24], mask = None"),
    ((A,), "found aligned = a tensor [40, 17, 24], target = None"),
    ((A, None, K), "target = None"), ((A, T_, "mask"), "mask = 'mask'"), (("run/test",), "found 'run/test'"),
    ((Path("run/test"),), "open_states(path)"), ((None,), "found None"), ((3,), "found 3"),
    (({"aligned": A},), "found a dict"), (((A, T_),), "target = a tensor"), (((A, T_, None),), "mask = None"),
    (([],), "no pairs"), (([3, 4],), "found 3"), (("run/test", T_, K), "aligned = 'run/test'"),
    ((A.numpy(), T_.numpy(), K.numpy()), "aligned = a ndarray"),
    ((Scores(np.array([0]), np.zeros(0)), T_, K), "aligned = a Scores")])
def test_a_wrong_call_says_what_it_wants(args, found):
    with pytest.raises(FeatsdError) as e: compute_all_metrics_parallel(*args)
    line = str(e.value)
    assert found in line and "\n" not in line and len(line) < 400
    assert "no pairs" in line or "expected three tensors (aligned [N, T, D], target [N, T, D], mask [N, T])" in line


@pytest.mark.parametrize("settings,words", [
    (dict(timing={"target_token_ms": 25}), "timing = a dict; expected a TimingConfig"),
    (dict(sd_config=.9), "sd_config = 0.9; expected a SDConfig"), (dict(adapter="L1.pt"), "load_any_adapter")])
def test_wrong_settings_say_what_they_want(settings, words):
    with pytest.raises(FeatsdError, match=words): compute_all_metrics_parallel(A, T_, K, **settings)


# ---- the registry

@pytest.fixture
def own_metric():
    "A metric from outside: one row"
    before = dict(M.METRICS)
    late = lambda s: s.match() & (s.pos >= 3)
    M.METRICS["late"] = M.Metric("late_hits", late, "late", "share", needs="rank", column=True)
    yield "late"
    M.METRICS.clear()
    M.METRICS.update(before)


def test_a_metric_is_one_row(own_metric, stores, tmp_path):
    "It is in the result, in the report, in the table of baselines and in the JSON; nothing else changes"
    three, head = ragged(1), make_head()
    got = compute_all_metrics_parallel(*three, head=head)
    s = S.score_batches(S.in_memory(*three), {"x": S.as_it_is}, head)["x"]
    assert got["late_hits"] == pytest.approx((s.match() & (s.pos >= 3)).sum() / len(s.pos))
    assert f"late      {got['late_hits']:.2%}" in M.print_metrics_report(got, out=None).replace("   ", " ", 1)
    assert "late_hits" not in compute_all_metrics_parallel(*three)                         # no head, no ranks
    m = N.measure(None, open_states(stores[1]), n_boot=20)
    table, own = str(N.null_table(m.rows)).splitlines(), m.row("no adapter", "draft_forced").values["late"]
    assert "late" in table[0] and f"{own.value:.3f} [{own.low:.3f}" in table[2]
    assert own.value == pytest.approx(m.metrics["draft_forced"]["late_hits"]) and own.low <= own.value <= own.high
    assert m.row("raw draft tokens").values["late"] is not None                            # words have ranks
    N.save_measurement(m, tmp_path)
    saved = read_json(tmp_path/"acceptance_metrics.json")
    assert saved["late_hits"] == m.metrics["draft_forced"]["late_hits"] and "late" in saved["nulls"][0]["values"]
    M.METRICS.pop("late")
    assert {k: v for k, v in got.items() if k != "late_hits"} == compute_all_metrics_parallel(*three, head=head)


def test_columns_of_the_null_table():
    assert list(N.null_columns()) == ["cos", "accept_90", "consecutive_90", "token_top1", "token_consecutive"]


# ---- settings

@pytest.mark.parametrize("make", [
    lambda: SDConfig(thresholds=(1.01,)), lambda: SDConfig(thresholds=(-1.,)), lambda: SDConfig(thresholds=()),
    lambda: SDConfig(screen=float("nan")), lambda: SDConfig(gamma_decode=0), lambda: TimingConfig(draft_token_ms=0),
    lambda: TimingConfig(target_prefill_ms=-3), lambda: TimingConfig(adapter_ms=float("inf")),
    lambda: TimingConfig(verify={2: 0.})])
def test_bad_settings(make):
    with pytest.raises(FeatsdError, match="SDConfig|TimingConfig"): make()


def test_ids_that_do_not_fit():
    a, t, m = ragged(0)
    ids = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(FeatsdError, match="one token per state"):
        compute_all_metrics_parallel(a, t, m, head=make_head(), ids=ids)


# ---- over a store

def make_store(path, clips, seed, wrong=True, D_draft=D):
    "Target states that mean plus word; the draft's are a rotation of them, or of another clip's"
    head, g = make_head(), torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9)))[0][:, :D_draft]
    mu = torch.randn(D, generator=torch.Generator().manual_seed(8))

    def pair(k):
        n, free = 4 + k % 5, 3 + k % 4
        t = F.layer_norm(torch.randn(n, D, generator=g), (D,)) + .5 * mu
        ids = head.logits(t).argmax(-1).numpy()
        draft = t @ R
        states = dict(target=t, draft_forced=draft, draft_free=torch.randn(free, D_draft, generator=g))
        if wrong: states["draft_wrong"] = torch.randn(n, D_draft, generator=g)
        sure = np.ones(n, np.float32), np.ones(free, np.float32)
        about = f"s{seed}clip{k // 3:02d}", k % 3, f"q{k % 3}?"
        return PairStates(*about, ids, ids[:1].repeat(free), "t", "d", *sure, states)
    streams = ["target", "draft_forced", "draft_free", *(["draft_wrong"] if wrong else [])]
    manifest = dict(dtype="fp32", target_dim=D, draft_dim=D_draft, head_hash=head.hash, streams=streams)
    with StoreWriter(path, manifest, head, chunk_size=30) as w:
        for a, b in w.missing(3 * clips): w.write_chunk(a, [pair(k) for k in range(a, b)])
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("metrics")
    return make_store(root/"train", 30, 1), make_store(root/"test", 12, 2)


def test_measure_over_a_store(stores):
    train, test = map(open_states, stores)
    m = N.measure(None, test, train, n_boot=50)
    got = {(r.stream, r.name): r for r in m.rows}
    assert got["draft_forced", "ridge regression"].values["token_top1"].value > .95     # the map is linear
    assert got["draft_forced", "no adapter"].values["cos"].value < .3
    assert got["draft_free", "ridge regression"].values["token_top1"].value < .5
    assert got["draft_forced", "global mean"].values["cos"].value > .2                  # they share a mean …
    assert m.metrics["draft_forced"]["total_valid_positions"] == sum(p.n_target for p in test.pairs)
    assert m.metrics["draft_free"]["total_valid_positions"] == sum(min(p.n_target, p.n_draft) for p in test.pairs)
    names = {r.name for r in m.rows}
    assert {"global mean", "per-position mean", "per-question-and-position mean", "shuffled pairs"} <= names
    assert {"ridge regression", "wrong-clip sensor", "raw draft tokens", "template", "n-gram table"} <= names
    assert "lookup in the draft's answer" in names
    text = str(N.null_table(m.rows))
    assert len(text.splitlines()) == len(m.rows) + 2 and "wrong-clip" in text
    for r in m.rows:
        for v in r.values.values(): assert v is None or v.low - 1e-9 <= v.value <= v.high + 1e-9


def test_the_streaming_pass_equals_the_one_in_memory(stores):
    test = open_states(stores[1])
    b = next(test.batches("draft_forced", batch_pairs=len(test)))
    memory = compute_all_metrics_parallel((b.h_draft, b.h_target, b.mask), head=test.head(), ids=b.ids)
    streamed = compute_all_metrics_parallel(test)
    assert all(deviation(streamed[k], v) <= tol(D) for k, v in memory.items() if isinstance(v, (int, float)))


@pytest.mark.parametrize("level", [1, 4])
def test_an_adapter_runs_in_the_pass(stores, level):
    test, adapter = open_states(stores[1]), create_adapter(level, D).eval()
    b = next(test.batches("draft_forced", batch_pairs=len(test)))
    with torch.no_grad(): out = adapter(b.h_draft, b.mask)
    one = compute_all_metrics_parallel(test, adapter=adapter)
    two = compute_all_metrics_parallel(out, b.h_target, b.mask, head=test.head(), ids=b.ids)
    near(one["cos_sim_mean"], two["cos_sim_mean"], 10 * D, size=1)
    assert one["token_top1_match"] == two["token_top1_match"]


def test_regression_is_the_closed_form(stores):
    "Against a direct least-squares solution on all rows at once"
    train = open_states(stores[0])
    b = next(train.batches("draft_forced", batch_pairs=len(train)))
    x, y = b.h_draft[b.mask].double(), b.h_target[b.mask].double()
    direct = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    s = N.fit_stats(train, ridge=1e-9)
    ours = x @ s.weight.double() + (s.mean - s.draft_mean @ s.weight).double() # the sums are double, what is kept is float32
    near(ours, x @ direct[:-1] + direct[-1], D * len(x))
    near(s.mean, y.mean(0), len(x))
    pos = b.mask.nonzero()[:, 1]
    near(s.by_position[2], y[pos == 2].mean(0), int((pos == 2).sum()))


def test_shuffled_never_takes_the_same_clip(stores):
    test = open_states(stores[1])
    number = {p.clip_id: i for i, p in enumerate({p.clip_id: p for p in test.pairs}.values())}

    def stamp(b):
        stamps = [float(number[test.pairs[i].clip_id]) for i in b.index]
        return torch.cat([torch.full((int(m.sum()), D), v) for v, m in zip(stamps, b.mask, strict=True)])
    f = N.Shuffled(stamp, test)
    for b in test.batches("draft_forced", batch_pairs=8):
        own, other = stamp(b)[:, 0], f(b)[:, 0]
        assert (other[~other.isnan()] != own[~other.isnan()]).all()


def test_the_study_file_with_a_poisoned_row(tmp_path):
    "The study's layout holds no ids and no head; a row that is not finite is counted, excluded, and said"
    g = torch.Generator().manual_seed(0)
    e, v, lens = torch.randn(6, 9, D, generator=g), torch.randn(6, 9, D, generator=g), torch.tensor([9, 4, 5, 9, 3, 7])
    e[1, 2] = float("nan")
    said = {"question": "q", "egpt_text": "", "vl_text": ""}
    meta = [{"sample_idx": k // 2, "question_idx": k % 2, "seq_len": int(n)} | said for k, n in enumerate(lens)]
    torch.save({"egpt_hidden": e, "vl_hidden": v, "seq_lens": lens, "metadata": meta, "config": {}}, tmp_path/"s.pt")
    test = open_states(tmp_path/"s.pt")
    m = N.measure(None, test, streams=tuple(s for s in test.manifest["streams"] if s != "target"), n_boot=20)
    got = next(iter(m.metrics.values()))
    assert got["nan_positions"] == 1 and got["total_valid_positions"] == int(lens.sum()) - 1
    assert "not finite: 1 positions" in m.report() and "token_top1_match" not in got
    assert any("no target head" in n for n in m.notes) and any("no token ids" in n for n in m.notes)


def test_shared_clips_and_wrong_heads_are_refused(stores, tmp_path):
    train, test = map(open_states, stores)
    with pytest.raises(FeatsdError, match="split by clip"): N.measure(None, test, test)
    with pytest.raises(FeatsdError, match="none of the streams"): N.measure(None, test, streams=("draft_x",))
    with pytest.raises(FeatsdError, match="no pairs"): N.measure(None, test.subset([]))
    with pytest.raises(ValueError, match="width"): N.measure(create_adapter(1, D, target_dim=D + 8), test)
    other = create_adapter(1, D, head_hash="0" * 64)
    with pytest.raises(ValueError, match="0000000000000000"): N.measure(other, test)


def test_to_a_folder_as_a_user_runs_it(stores, tmp_path):
    torch.manual_seed(0)
    adapter = create_adapter(1, D, bottleneck_dim=8)
    save_checkpoint(adapter, tmp_path/"best_model.pt")
    measure_to_folder(tmp_path/"best_model.pt", stores[1], tmp_path/"out", stores[0], n_boot=30)
    files = {p.name for p in (tmp_path/"out").iterdir()}
    pictures = {"metrics_summary", "position_accept", "cos_histogram", "centred_histogram", "frontier"}
    written = {"acceptance_metrics.json", "position_stats.json", "metrics.html", "report.txt"}
    assert written | {f"{p}.png" for p in pictures} <= files
    text = (tmp_path/"out"/"acceptance_metrics.json").read_text()
    m = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert set(m["streams"]) == {"draft_forced", "draft_free"} and m["nulls"]
    assert m["cos_sim_mean"] == m["streams"]["draft_forced"]["cos_sim_mean"]
    page = (tmp_path/"out"/"metrics.html").read_text()
    assert page.count("plotly.js v") == 1 and "<script src=" not in page
    assert page.count("<figure data-figure>") == 3 == page.count("Look at") + page.count("Watch three things")
    report = (tmp_path/"out"/"report.txt").read_text()
    assert all(f"\n{k}. " in report for k in range(1, 9)) and "ridge regression" in report
    assert all((tmp_path/"out"/f).read_bytes()[:4] == b"\x89PNG" for f in files if f.endswith(".png"))


def test_without_training_data_it_says_what_is_missing(stores):
    m = N.measure(None, open_states(stores[1]), n_boot=20)
    assert any("No training data" in n for n in m.notes)
    assert m.row("template") is None and m.row("raw draft tokens") is not None


# ---- figures and sliders

def test_no_figure_function_computes():
    "They import nothing that could: no numpy, no torch, no statistics"
    source = Path(figures.__file__).read_text()
    assert "numpy" not in source and "torch" not in source and "statistics" not in source


def test_baselines_are_grey_and_hover_says_n():
    lens = np.full(10, 2)
    s = Scores(np.concatenate([[0], lens.cumsum()]), np.tile([.95, .5], 10).astype(np.float32), clips=list(range(10)))
    series = [M.by_position("a", s, s.cos > .9), M.by_position("null", s, s.cos > .4, null=True)]
    line, null = M.chart_positions(series).plotly().data[1:]
    assert line.line.color == figures.PALETTE[0] and null.line.color in figures.GREYS and null.line.dash != "solid"
    assert "n = 10" in line.hovertext[0] and "1 … 1" in line.hovertext[0] and list(line.y) == [1, 0]
