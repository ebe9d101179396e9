"Laws of the metrics: a slow reference agrees, padding does not matter, the three rates obey, baselines know what they know, bad input says so"
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsd import metrics as M
from featsd import nulls as N
from featsd.adapters import create_adapter, save_checkpoint
from featsd.core import FeatsdError, read_json
from featsd.data import figures
from featsd.data.answers import read_answers
from featsd.data.store import PairStates, StoreWriter, open_states
from featsd.metrics import Scores, SDConfig, TimingConfig, accepts, compute_all_metrics_parallel, compute_per_position_stats, consecutive, curves
from featsd.models.backbone import Head, RMSNorm

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
    noise = torch.rand(n, 1, 1, generator=g) * .3 + torch.linspace(0, 1.2, T)[None, :, None] * torch.rand(n, 1, 1, generator=g)
    aligned = target + noise * torch.randn(n, T, D, generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=g)
    aligned[~mask], target[~mask] = pad, pad
    return aligned, target, mask


# ---- against the slow reference

def lower_median(x): return sorted(x)[(len(x) - 1) // 2]


def std(x): return math.sqrt(sum((v - sum(x) / len(x)) ** 2 for v in x) / (len(x) - 1))


def slow(aligned, target, mask, head):
    "Every metric by loops over answers and positions, in float64"
    cos = [[float(F.cosine_similarity(a.double(), t.double(), dim=0)) for a, t, m in zip(A, B, K, strict=True) if m] for A, B, K in zip(aligned, target, mask, strict=True)]
    ranks = []
    for A, B, K in zip(aligned, target, mask, strict=True):
        row = []
        for a, t, m in zip(A, B, K, strict=True):
            if not m: continue
            y, z = int(head.logits(t).argmax()), head.logits(a).tolist()
            row.append(sum(1 for k, v in enumerate(z) if v > z[y] or (v == z[y] and k < y)))
        ranks.append(row)
    flat, lens = [c for r in cos for c in r], [len(r) for r in cos]
    out = {"batch_size": len(cos), "total_valid_positions": len(flat), "max_seq_len": max(lens), "cos_sim_mean": sum(flat) / len(flat), "cos_sim_std": std(flat),
           "cos_sim_min": min(flat), "cos_sim_max": max(flat), "cos_sim_median": lower_median(flat), "num_hidden_tokens_mean": sum(lens) / len(lens), "num_hidden_tokens_std": std(lens)}

    def run(row, ok):
        n = 0
        for x in row:
            if not ok(x): break
            n += 1
        return n
    for t in (.80, .85, .90, .95):
        k, runs = round(t * 100), [run(r, lambda c, t=t: c > t) for r in cos]
        out[f"accept_{k}"] = sum(c > t for c in flat) / len(flat)
        out |= {f"consecutive_mean_{k}": sum(runs) / len(runs), f"consecutive_std_{k}": std(runs), f"consecutive_max_{k}": max(runs), f"consecutive_min_{k}": min(runs), f"consecutive_median_{k}": lower_median(runs)}
    runs = [run(r, lambda c: c > .90) for r in cos]
    out |= {"sd_accept_rate_prefill_gamma": sum(runs) / sum(lens), "sd_accept_rate_decode_gamma5": sum(min(r, 5) for r in runs) / len(runs) / 5, "sd_consecutive_gamma5": sum(min(r, 5) for r in runs) / len(runs)}
    out["position_accept_90"] = [sum(r[i] > .90 for r in cos if len(r) > i) / sum(len(r) > i for r in cos) for i in range(min(20, max(lens)))]
    out["position_mean_sim"] = [sum(r[i] for r in cos if len(r) > i) / sum(len(r) > i for r in cos) for i in range(min(20, max(lens)))]
    flat_rank, token_runs = [x for r in ranks for x in r], [run(r, lambda x: x == 0) for r in ranks]
    for k in (1, 5, 10): out[f"token_top{k}_match"] = sum(x < k for x in flat_rank) / len(flat_rank)
    out |= {"token_consecutive_mean": sum(token_runs) / len(token_runs), "token_consecutive_std": std(token_runs), "token_consecutive_median": lower_median(token_runs),
            "token_consecutive_max": max(token_runs), "token_consecutive_min": min(token_runs), "token_sd_prefill_consecutive_mean": sum(min(r, 7) for r in token_runs) / len(token_runs),
            "token_sd_decode_accept_rate": sum(min(r, 5) for r in token_runs) / len(token_runs) / 5}
    out["position_token_accept"] = [sum(r[i] == 0 for r in ranks if len(r) > i) / sum(len(r) > i for r in ranks) for i in range(min(20, max(lens)))]
    for t in (.80, .85, .90, .92, .95, .98):
        hit = [x == 0 for c, x in zip(flat, flat_rank, strict=True) if c > t]
        out |= {f"cosim_{round(t * 100)}_count": len(hit), f"cosim_{round(t * 100)}_token_match": sum(hit) / len(hit) if hit else None}
    hits = [float(x == 0) for x in flat_rank]
    mc, mh = sum(flat) / len(flat), sum(hits) / len(hits)
    out["cosim_token_pearson_r"] = sum((c - mc) * (h - mh) for c, h in zip(flat, hits, strict=True)) / (len(flat) - 1) / std(flat) / std(hits)
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
    assert max(worst.values()) < 1e-6, max(worst.items(), key=lambda kv: kv[1])


@pytest.mark.parametrize("mutant", [">=", "population std", "upper median", "padding counted"])
def test_the_reference_kills_mutants(mutant, monkeypatch):
    "The comparison above would notice the mistakes that are easy to make"
    aligned, target, mask = ragged(3)
    if mutant == ">=":
        a, t, m = torch.eye(2)[None, :1], torch.tensor([[[3., 4.]]]), torch.ones(1, 1, dtype=torch.bool)
        sd = SDConfig(thresholds=(float(np.float32(.6)),), screen=.6)
        assert compute_all_metrics_parallel((a, t, m), sd_config=sd)["accept_60"] == 0.        # cos is .6 exactly, in float32
        return
    ref = slow(aligned, target, mask, make_head(3))
    if mutant == "population std": wrong = {"cos_sim_std": ref["cos_sim_std"] * math.sqrt(1 - 1 / ref["total_valid_positions"])}
    elif mutant == "upper median":
        even = (aligned[:2, :1], target[:2, :1], torch.ones(2, 1, dtype=torch.bool))
        m = compute_all_metrics_parallel(even)
        assert m["cos_sim_median"] == m["cos_sim_min"] < m["cos_sim_max"]
        return
    else: wrong = {"cos_sim_mean": compute_all_metrics_parallel((aligned, target, torch.ones_like(mask)))["cos_sim_mean"]}
    m = compute_all_metrics_parallel((aligned, target, mask))
    assert all(abs(m[k] - v) > 1e-5 for k, v in wrong.items())


def test_padding_and_batching_do_not_matter():
    head, (aligned, target, mask) = make_head(), ragged(1, n=70)
    whole = compute_all_metrics_parallel((aligned, target, mask), head=head)
    wide = [F.pad(x, (0, 0, 0, 9), value=float("inf")) for x in (aligned, target)]
    assert compute_all_metrics_parallel((*wide, F.pad(mask, (0, 9))), head=head) == whole
    small = M.score_batches(M.in_memory(aligned, target, mask, batch_pairs=7), {"x": M.take}, head)["x"]
    assert deviation(M.metrics_of(M.score_batches(M.in_memory(aligned, target, mask), {"x": M.as_it_is})["x"])["cos_sim_mean"], whole["cos_sim_mean"]) < 1e-6
    got = M.metrics_of(small)
    assert all(deviation(got[k], v) < 1e-6 for k, v in whole.items() if isinstance(v, (int, float)))


def test_bf16_states_are_computed_in_float32():
    aligned, target, mask = ragged(2)
    a, t = aligned.bfloat16(), target.bfloat16()
    assert compute_all_metrics_parallel((a, t, mask))["cos_sim_mean"] == pytest.approx(compute_all_metrics_parallel((a.float(), t.float(), mask))["cos_sim_mean"], abs=1e-6)


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
        assert all(p[i] <= min(m for m in c["marginal"][:i + 1] if m is not None) + 1e-12 for i in range(len(p)) if any(m is not None for m in c["marginal"][:i + 1]))
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
    from featsd.data.answers import replay
    rng = np.random.default_rng(4)
    answers = [rng.integers(0, 9, rng.integers(1, 20)) for _ in range(60)]
    hits = [rng.random(len(a)) < .7 for a in answers]
    s = Scores(np.concatenate([[0], np.cumsum([len(a) for a in answers])]), np.ones(sum(map(len, answers)), np.float32))

    def drafter(a, h): return lambda context, g: [int(x) if ok else 99 for x, ok in zip(a[len(context):len(context) + g], h[len(context):len(context) + g], strict=True)]
    for g in (1, 3, 8):
        r = replay([drafter(a, h) for a, h in zip(answers, hits, strict=True)], answers, g)
        assert M.cycle_prefix(s, np.concatenate(hits), g) == pytest.approx(r.prefix.tolist())


def test_modes_by_hand():
    s = Scores(np.array([0, 4, 6]), np.array([.95, .5, .95, .95, .95, .95], np.float32))
    m = M.accept_modes(s, .9, [3], .1)[3]
    assert m["consecutive"]["n_mean"] == pytest.approx(1.5) and m["relaxed"]["n_mean"] == pytest.approx(2.)
    assert m["weighted"]["n_mean"] == pytest.approx((.95 + .5 + .95 + .95 + .95) / 2, abs=1e-6)
    assert m["consecutive"]["decodable"] and not m["relaxed"]["decodable"] and not m["weighted"]["decodable"]
    assert m["consecutive"]["speedup_seed"] == pytest.approx(2.5 / 1.1)


# ---- the study's numbers come back

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="the study's published results are not here; set FEATSD_SHARED_DATA")


@needs_reference
@pytest.mark.parametrize("level,prefill,decode,e2e", [(1, 1.4806, 5.0849, .9094), (4, 1.5806, 5.3876, .9533)])
def test_reference_speedups(level, prefill, decode, e2e):
    ref = read_json(REFERENCE/f"L{level}_acceptance_metrics.json")
    got = M.seed_speedups(ref["consecutive_mean_90"], ref["sd_consecutive_gamma5"], TimingConfig(), SDConfig())
    assert [round(got[k], 4) for k in ("speedup_prefill", "speedup_decode_gamma5", "speedup_e2e")] == [prefill, decode, e2e]
    for k, v in got.items(): assert v == pytest.approx(ref[k], abs=1e-9), k


@needs_reference
def test_every_key_of_the_reference_is_there():
    aligned, target, mask = ragged(0)
    m = compute_all_metrics_parallel((aligned, target, mask), head=make_head())
    for f in sorted(REFERENCE.glob("L*_acceptance_metrics.json")): assert set(read_json(f)) - {"timestamp"} <= set(m)
    assert set(read_json(REFERENCE/"L1_position_stats.json")[0]) == set(compute_per_position_stats((aligned, target, mask))[0])


@pytest.mark.skipif(not LOG.exists(), reason="the study's logged answers are not here; set FEATSD_SHARED_DATA")
def test_real_answers():
    "Real EventGPT and Video-LLaVA answers: what words alone reach"
    log = read_answers(LOG)
    fit, test = log.split(.5)
    flags = N.word_nulls_flags(fit, test)
    run = {k: np.mean([N.first_match_length(f, np.ones(len(f), bool)) for f in v]) for k, v in flags.items()}
    raw = [N.first_match_length(f, np.ones(len(f), bool)) for f in N.word_nulls_flags(None, log)["raw draft tokens"]]
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
    m = compute_all_metrics_parallel((aligned, target, mask), head=make_head(), ids=torch.zeros(mask.shape, dtype=torch.long))
    dropped = 1 + (n4 == 1)
    assert (m["nan_positions"], m["nan_pairs"]) == (2 + n7, dropped) and m["batch_size"] == 40 - dropped
    assert m["total_valid_positions"] == int(mask.sum()) - 2 - n7 and math.isfinite(m["cos_sim_mean"])
    assert f"not finite: {2 + n7} positions" in M.print_metrics_report(m, out=None)


@pytest.mark.parametrize("change,words", [
    (lambda a, t, m: (a[:, :-1], t, m), "pad them alike"), (lambda a, t, m: (a, t, m[:-1]), "pad them alike"), (lambda a, t, m: (a[..., :-1], t, m), "target's width"),
    (lambda a, t, m: (a, t, m & (torch.arange(len(m)) != 5)[:, None]), "pair 5"), (lambda a, t, m: (a[:0], t[:0], m[:0]), "no pairs"),
    (lambda a, t, m: (a * float("nan"), t, m), "none of")])
def test_bad_tensors_say_so_in_one_line(change, words):
    with pytest.raises(FeatsdError, match=words) as e: compute_all_metrics_parallel(change(*ragged(0)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("make", [lambda: SDConfig(thresholds=(1.01,)), lambda: SDConfig(thresholds=(-1.,)), lambda: SDConfig(thresholds=()), lambda: SDConfig(screen=float("nan")), lambda: SDConfig(gamma_decode=0),
                                  lambda: TimingConfig(draft_token_ms=0), lambda: TimingConfig(target_prefill_ms=-3), lambda: TimingConfig(adapter_ms=float("inf")), lambda: TimingConfig(verify={2: 0.})])
def test_bad_settings(make):
    with pytest.raises(FeatsdError, match="SDConfig|TimingConfig"): make()


def test_ids_that_do_not_fit():
    a, t, m = ragged(0)
    with pytest.raises(FeatsdError, match="one token per state"): compute_all_metrics_parallel((a, t, m), head=make_head(), ids=torch.zeros(2, 2, dtype=torch.long))


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
        return PairStates(f"s{seed}clip{k // 3:02d}", k % 3, f"q{k % 3}?", ids, ids[:1].repeat(free), "t", "d", np.ones(n, np.float32), np.ones(free, np.float32), states)
    manifest = dict(dtype="fp32", target_dim=D, draft_dim=D_draft, head_hash=head.hash, streams=["target", "draft_forced", "draft_free", *(["draft_wrong"] if wrong else [])])
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
    assert {"global mean", "per-position mean", "per-question-and-position mean", "shuffled pairs", "ridge regression", "wrong-clip sensor", "raw draft tokens", "template", "n-gram table", "lookup in the draft's answer"} <= names
    text = N.null_table(m.rows)
    assert len(text.splitlines()) == len(m.rows) + 2 and "wrong-clip" in text
    for r in m.rows:
        for v in r.values.values(): assert v is None or v.low - 1e-9 <= v.value <= v.high + 1e-9


def test_the_streaming_pass_equals_the_one_in_memory(stores):
    test = open_states(stores[1])
    b = next(test.batches("draft_forced", batch_pairs=len(test)))
    memory = compute_all_metrics_parallel((b.h_draft, b.h_target, b.mask), head=test.head(), ids=b.ids)
    streamed = compute_all_metrics_parallel(test)
    assert all(deviation(streamed[k], v) < 1e-6 for k, v in memory.items() if isinstance(v, (int, float)))


@pytest.mark.parametrize("level", [1, 4])
def test_an_adapter_runs_in_the_pass(stores, level):
    test, adapter = open_states(stores[1]), create_adapter(level, D).eval()
    b = next(test.batches("draft_forced", batch_pairs=len(test)))
    with torch.no_grad(): out = adapter(b.h_draft, b.mask)
    one, two = compute_all_metrics_parallel(test, adapter=adapter), compute_all_metrics_parallel((out, b.h_target, b.mask), head=test.head(), ids=b.ids)
    assert one["cos_sim_mean"] == pytest.approx(two["cos_sim_mean"], abs=1e-5) and one["token_top1_match"] == pytest.approx(two["token_top1_match"], abs=.02)


def test_regression_is_the_closed_form(stores):
    "Against a direct least-squares solution on all rows at once"
    train = open_states(stores[0])
    b = next(train.batches("draft_forced", batch_pairs=len(train)))
    x, y = b.h_draft[b.mask].double(), b.h_target[b.mask].double()
    direct = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    s = N.fit_stats(train, ridge=1e-9)
    assert (x @ s.weight.double() + (s.mean - s.draft_mean @ s.weight).double() - (x @ direct[:-1] + direct[-1])).abs().max() < 1e-3
    assert (s.mean.double() - y.mean(0)).abs().max() < 1e-5
    pos = b.mask.nonzero()[:, 1]
    assert (s.by_position[2].double() - y[pos == 2].mean(0)).abs().max() < 1e-5


def test_shuffled_never_takes_the_same_clip(stores):
    test = open_states(stores[1])
    number = {p.clip_id: i for i, p in enumerate({p.clip_id: p for p in test.pairs}.values())}

    def stamp(b): return torch.cat([torch.full((int(m.sum()), D), float(number[test.pairs[i].clip_id])) for i, m in zip(b.index, b.mask, strict=True)])
    f = N.Shuffled(stamp, test)
    for b in test.batches("draft_forced", batch_pairs=8):
        own, other = stamp(b)[:, 0], f(b)[:, 0]
        assert (other[~other.isnan()] != own[~other.isnan()]).all()


def test_the_study_file_with_a_poisoned_row(tmp_path):
    "The study's layout holds no ids and no head; a row that is not finite is counted, excluded, and said"
    g = torch.Generator().manual_seed(0)
    e, v, lens = torch.randn(6, 9, D, generator=g), torch.randn(6, 9, D, generator=g), torch.tensor([9, 4, 5, 9, 3, 7])
    e[1, 2] = float("nan")
    meta = [{"sample_idx": k // 2, "question_idx": k % 2, "question": "q", "seq_len": int(n), "egpt_text": "", "vl_text": ""} for k, n in enumerate(lens)]
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
    N.measure_to_folder(tmp_path/"best_model.pt", stores[1], tmp_path/"out", stores[0], n_boot=30)
    files = {p.name for p in (tmp_path/"out").iterdir()}
    assert {"acceptance_metrics.json", "position_stats.json", "metrics_summary.png", "position_accept.png", "cos_histogram.png", "centred_histogram.png", "frontier.png", "metrics.html", "report.txt"} <= files
    m = json.loads((tmp_path/"out"/"acceptance_metrics.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert set(m["streams"]) == {"draft_forced", "draft_free"} and m["nulls"] and m["cos_sim_mean"] == m["streams"]["draft_forced"]["cos_sim_mean"]
    page = (tmp_path/"out"/"metrics.html").read_text()
    assert page.count("plotly.js v") == 1 and "<script src=" not in page and page.count("Plotly.newPlot(") == len([f for f in files if f.endswith(".png")])
    report = (tmp_path/"out"/"report.txt").read_text()
    assert all(f"\n{k}. " in report for k in range(1, 9)) and "ridge regression" in report
    assert all((tmp_path/"out"/f).read_bytes()[:4] == b"\x89PNG" for f in files if f.endswith(".png"))


def test_without_training_data_it_says_what_is_missing(stores):
    m = N.measure(None, open_states(stores[1]), n_boot=20)
    assert any("No training data" in n for n in m.notes) and m.row("template") is None and m.row("raw draft tokens") is not None


# ---- figures and sliders

def test_no_figure_function_computes():
    "They import nothing that could: no numpy, no torch, no statistics"
    source = Path(figures.__file__).read_text()
    assert "numpy" not in source and "torch" not in source and "statistics" not in source


def test_baselines_are_grey_and_hover_says_n():
    data = {"curves": [{"name": "a", "y": [.5, .4], "lo": [.4, .3], "hi": [.6, .5], "n": [10, 9]}, {"name": "null", "y": [.1, .1], "n": [10, 9], "null": True}]}
    fig = figures.figure("positions", data)
    line, null = fig.data[1], fig.data[2]
    assert line.line.color == figures.PALETTE[0] and null.line.color in figures.GREYS and null.line.dash != "solid"
    assert "n = 10" in line.hovertext[0] and "0.4 … 0.6" in line.hovertext[0]
