"Laws of training: every position once, same seed same run, killed and resumed the same run, bad input leaves nothing"
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import near, tol
from patience import HANG, until
import torch.nn.functional as F
from torch import nn

import featsd.train as T
from featsd.adapters import LEVELS, create_adapter, load_any_adapter
from featsd.base.core import FeatsdError, read_json
from featsd.data.feed import Feed, rows_in_memory
from featsd.data.chunk import PairStates
from featsd.data.store import StoreWriter, open_states
from featsd.data.head import Head, RMSNorm
from featsd.train import (
    HiddenAdapterTrainer, comparison_table, evaluate, parse_loss, token_hits, train_adapter, train_levels)

D, V = 16, 30
CHAIN = 10 * D + V * D # operations behind a number: ten products of width D in an adapter, then V logits
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_head(seed=0, dim=D):
    g = torch.Generator().manual_seed(seed)
    lm = nn.Linear(dim, V, bias=False)
    with torch.no_grad(): lm.weight.copy_(2 * torch.randn(V, dim, generator=g))
    return Head(RMSNorm(torch.ones(dim), 1e-6), lm)


def make_store(path, pairs=60, seed=0, draft_dim=D, target_dim=D, keep_head=True, chunk_size=25):
    "Ten clips; the draft's state is a rotation of the target's"
    g, head = torch.Generator().manual_seed(seed), make_head(seed, target_dim)
    R = torch.linalg.qr(torch.randn(max(draft_dim, target_dim), max(draft_dim, target_dim),
                                    generator=g))[0][:target_dim, :draft_dim]

    def pair(k):
        n, free = 3 + k % 5, 2 + k % 4
        t = F.layer_norm(torch.randn(n, target_dim, generator=g), (target_dim,))
        ids = head.logits(t).argmax(-1).numpy()
        return PairStates(f"clip{k // 6:02d}", k % 6, "q?", ids, ids[:1].repeat(free), "t", "d", np.ones(n, np.float32),
                          np.ones(free, np.float32),
                          dict(target=t, draft_forced=t @ R, draft_free=torch.randn(free, draft_dim, generator=g)))
    made = dict(dtype="fp32", target_dim=target_dim, draft_dim=draft_dim, head_hash=head.hash)
    with StoreWriter(path, made, head if keep_head else None, chunk_size=chunk_size) as w:
        for a, b in w.missing(pairs): w.write_chunk(a, [pair(k) for k in range(a, b)])
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("train")/"store")


@pytest.fixture
def quick(tmp_path): return dict(num_epochs=3, output_dir=tmp_path/"runs", progress=False, val_split=.2)


def rows_of(feed, seed):
    "All (draft, target, id) rows that one epoch delivers, as a sorted list, and in the order they came"
    out = []
    for h, mask, t, ids in feed.epoch(seed):
        h = h if mask is None else h[mask]
        assert len(h) == len(t) == len(ids)
        out += [tuple(x) for x in torch.cat([h, t, ids[:, None].float()], -1).round(decimals=4).tolist()]
    return sorted(out), out


# ---- data

@pytest.mark.parametrize("stream", ["draft_forced", "draft_free"])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["memory", "disk"])
def test_an_epoch_is_every_position_once(store, stream, sequences, cache_bytes):
    states = open_states(store)
    feed = Feed(states, stream, 7, sequences, cache_bytes=cache_bytes)
    assert (feed.rows is not None) == (cache_bytes > 0)
    want = []
    for b in states.batches(stream, 5):
        want += [tuple(x) for x in torch.cat([b.h_draft, b.h_target, b.ids[..., None].float()],
                                             -1)[b.mask].round(decimals=4).tolist()]
    assert len(want) == feed.positions
    plain, one, two = rows_of(feed, None), rows_of(feed, 1), rows_of(feed, 2)
    assert plain[0] == one[0] == two[0] == sorted(want)
    assert one[1] != two[1] and one[1] == rows_of(feed, 1)[1]


def test_sequences_keep_their_order_and_their_padding_is_masked(store):
    states = open_states(store)
    pairs = {tuple(b.h_draft[0, 0].tolist()): b.h_draft[0] for b in states.batches("draft_forced", 1)}
    seen = 0
    for h, mask, _, _ in Feed(states, "draft_forced", 8, True).epoch(3):
        assert mask[:, 0].all() and mask.shape == h.shape[:2]
        for x, m in zip(h, mask, strict=True):
            assert torch.equal(x[m], pairs[tuple(x[0].tolist())])
            seen += 1
    assert seen == len(states)


def test_a_batch_holds_about_batch_pairs_pairs(store):
    states = open_states(store)
    sizes = [len(h) for h, *_ in Feed(states, "draft_forced", 15).epoch(0)]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 1
    sizes = [len(h) for h, *_ in Feed(states, "draft_forced", 16, True).epoch(0)]
    assert sorted(sizes) == [12, 16, 16, 16]


def same_measure(a, b):
    "Losses and cosines up to the rounding of their sums, shares to the bit: they are counts"
    for k in a:
        if k in ("val_loss", "val_cos_sim"): near(a[k], b[k], CHAIN, size=max(abs(b[k]), 1), what=k)
        else: same(a[k], b[k], k)


def same(x, y, what): assert x == y, what


@pytest.mark.parametrize("level", [1, 4])
def test_memory_and_disk_measure_the_same(store, level):
    states, head = open_states(store), open_states(store).head()
    adapter = T.new_adapter(level, states.manifest, head, 0, **({"num_heads": 4} if level == 4 else {}))
    a, b = (evaluate(adapter, Feed(states, "draft_forced", 8, level == 4, cache_bytes=n), parse_loss("mse_cos+kl"),
                     head) for n in (2**30, 0))
    assert a.keys() == b.keys()
    same_measure(a, b)


def test_training_from_disk_learns_too(store, quick):
    r = train_adapter(store, cache_bytes=0, **quick)
    assert read_json(Path(r["folder"])/"config.json")["training"]["batches_from"] == "disk"
    assert r["history"]["train_loss"][-1] < r["history"]["train_loss"][0]


# ---- what is measured

class Replay(nn.Module):
    "An adapter whose output is given"
    def __init__(self, out): super().__init__(); self.out = out
    def forward(self, h): return self.out


class OneBatch:
    def __init__(self, *batch): self.batch = batch
    def epoch(self): yield self.batch


def test_evaluate_on_numbers_done_by_hand():
    cos = torch.tensor([1., .96, .95, .9, .86, .5])
    target = F.one_hot(torch.zeros(6, dtype=torch.int64), 2).float()
    out = torch.stack([cos, (1 - cos**2).sqrt()], -1)
    got = evaluate(Replay(out), OneBatch(out, None, target, None), parse_loss("cos"))
    near(got["val_cos_sim"], cos.mean(), len(cos))
    near(got["val_loss"], 1 - cos.mean(), len(cos), size=1)
    assert (got["val_accept_80"], got["val_accept_85"]) == (5 / 6, 5 / 6) and "val_token_top1" not in got
    exact = F.one_hot(torch.arange(4) % 2, 2).float() * 2
    got = evaluate(Replay(exact), OneBatch(exact, None, exact, None), parse_loss("mse_cos"))
    assert (got["val_loss"], got["val_cos_sim"], got["val_accept_95"]) == (0, 1, 1)


def test_acceptance_is_strict():
    a, t = torch.tensor([[4., 3.]]), torch.tensor([[1., 0.]])
    assert F.cosine_similarity(a, t).item() == torch.tensor(.8).item()
    assert evaluate(Replay(a), OneBatch(a, None, t, None), parse_loss("cos"))["val_accept_80"] == 0


def test_token_hits_does_not_depend_on_the_blocks():
    head, h, t = make_head(), torch.randn(57, D), torch.randn(57, D)
    ids = head.logits(h).argmax(-1)
    ids[::3] = (ids[::3] + 1) % V
    whole, fours, ones = (token_hits(head, h, t, ids, **k) for k in ({}, dict(max_logits=4 * V), dict(max_logits=1)))
    assert whole == fours == ones == 38
    assert token_hits(head, t, t) == 57


def test_top1_is_of_the_adapters_state(store):
    "A draft that already speaks the target's language scores 1; one whose states are another pair's does not"
    states, head = open_states(store), open_states(store).head()
    rows = rows_in_memory(states, "draft_forced")
    class Itself(nn.Module):
        def forward(self, h): return h
    own = evaluate(Itself(), OneBatch(rows.h_target, None, rows.h_target, rows.ids), parse_loss("kl"), head)
    other = evaluate(Itself(), OneBatch(rows.h_target.roll(1, 0), None, rows.h_target, rows.ids), parse_loss("kl"),
                     head)
    assert own["val_token_top1"] == 1 and abs(own["val_loss"]) <= tol(V) and other["val_token_top1"] < .5


# ---- the run

@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", ["mse_cos", "kl+.5*mse_cos"])
def test_every_level_learns(store, quick, level, loss):
    r = train_adapter(store, adapter_level=level, loss=loss, **quick | dict(num_epochs=8))
    h = r["history"]
    assert h["train_loss"][-1] < h["train_loss"][0] and r["val_loss"] == min(h["val_loss"]) < h["val_loss"][0]
    assert all(len(v) == r["epochs"] for v in h.values())


@pytest.mark.parametrize("loss", ["ce", "kl", "tv", "nla", "mse", "cos"])
def test_every_objective_goes_down(store, quick, loss):
    r = train_adapter(store, loss=loss, **quick | dict(num_epochs=6))
    assert r["history"]["train_loss"][-1] < r["history"]["train_loss"][0]


def test_the_folder(store, quick):
    r = train_adapter(store, adapter_level="L2", **quick)
    folder = Path(r["folder"])
    assert sorted(p.name for p in folder.iterdir()) == ["best_model.pt", "config.json", "final_model.pt",
                                                        "history.json", "training_curves.png"]
    assert folder.name.startswith("L2_") and (folder/"training_curves.png").read_bytes()[:4] == b"\x89PNG"
    h, c = read_json(folder/"history.json"), read_json(folder/"config.json")
    assert set(h) >= {"train_loss", "train_cos_sim", "val_loss", "val_cos_sim", "val_accept_80", "val_accept_85",
                      "val_accept_90", "val_accept_95"}
    assert set(c) >= {"task", "adapter", "data", "training", "timestamp", "best_val_loss", "provenance"}
    assert c["data"]["store"]["head_hash"] == c["adapter"]["head_hash"] == open_states(store).head().hash
    assert c["data"]["clips_in_both"] == 0 and c["data"]["train_clips"] + c["data"]["val_clips"] == 10
    assert c["training"]["seed"] == 0
    assert c["provenance"]["versions"]["torch"] and json.dumps(r)


def test_best_model_is_the_best_epochs(store, quick):
    "Its stored metrics are those of the lowest validation loss, and measuring it again gives the same numbers"
    # nothing to learn but noise
    r = train_adapter(store, stream="draft_free", learning_rate=.03, early_stopping=0, **quick | dict(num_epochs=40))
    h, states = r["history"], open_states(store)
    best = min(range(40), key=h["val_loss"].__getitem__)
    assert r["best_epoch"] == best + 1 < 40 == r["epochs"]
    adapter, ckpt = load_any_adapter(r["best_model"])
    assert ckpt["epoch"] == best + 1 and ckpt["metrics"]["val_loss"] == h["val_loss"][best]
    got = evaluate(adapter, Feed(states.split(.2, 0)[1], "draft_free", 64), parse_loss("mse_cos"), states.head())
    same_measure(got, {k: h[k][best] for k in got})
    assert load_any_adapter(r["final_model"])[1]["epoch"] == 40


def test_early_stopping(store, quick):
    r = train_adapter(store, stream="draft_free", learning_rate=.03, early_stopping=2, **quick | dict(num_epochs=60))
    assert r["epochs"] == r["best_epoch"] + 2 < 60


def test_the_gradient_is_clipped(store):
    train, val = open_states(store).split(.2)
    def moved(clip):
        t = HiddenAdapterTrainer(T.new_adapter(1, train.manifest, None, 0), train, val, head=train.head(),
                                 batch_size=100, num_epochs=1, grad_clip=clip)
        t.train_epoch(1)
        return sum(float(p.grad.square().sum()) for p in t.adapter.parameters()) ** .5
    assert moved(.01) <= .01 * (1 + tol(2000)) < moved(0)


def test_a_target_of_another_width(tmp_path, quick):
    r = train_adapter(make_store(tmp_path/"s", draft_dim=12, target_dim=20), **quick)
    adapter, _ = load_any_adapter(r["best_model"])
    assert (adapter.hidden_dim, adapter.target_dim) == (12, 20)


def test_causal_is_the_default_and_recorded(store, quick):
    a, b = (train_adapter(store, adapter_level=4, causal=c, **quick | dict(num_epochs=1)) for c in (True, False))
    assert [load_any_adapter(r["best_model"])[0].config["causal"] for r in (a, b)] == [True, False]


def test_small_and_large_widths_have_their_own_settings():
    large = [LEVELS[n].defaults(4096) for n in (1, 2, 3, 4)]
    assert [(d["batch_size"], d["learning_rate"]) for d in large] == [(64, 1e-3), (64, 1e-3), (32, 5e-4), (16, 1e-4)]
    assert set(LEVELS[4].defaults(4096)) == {"batch_size", "learning_rate"}
    assert LEVELS[4].defaults(36)["num_heads"] == 4


def test_all_levels_and_their_table(store, quick):
    results = train_levels(store, levels="all", bottleneck_dim=8, num_heads=4, **quick)
    assert [r["level"] for r in results] == [1, 2, 3, 4]
    assert [load_any_adapter(r["best_model"])[0].config.get("bottleneck_dim") for r in results] == [8, 8, 8, None]
    splits = {read_json(Path(r["folder"])/"config.json")["data"]["val_fingerprint"] for r in results}
    assert len(splits) == 1
    table = str(comparison_table(results))
    for r in results:
        for said in (f"{r['params']:,}", f"{r['val_cos_sim']:.3f}", f"{r['val_token_top1']:.3f}"): assert said in table


def test_data_without_head_trains_by_states(tmp_path, quick):
    path = make_store(tmp_path/"s", keep_head=False)
    r = train_adapter(path, **quick)
    assert "val_token_top1" not in r and "–" in str(comparison_table([r]))
    assert load_any_adapter(r["best_model"])[0].config["head_hash"] == make_head().hash


# ---- the same seed

@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["memory", "disk"])
def test_same_seed_same_history(store, quick, level, cache_bytes):
    run = lambda seed: train_adapter(store, adapter_level=level, seed=seed, cache_bytes=cache_bytes, **quick)
    a = run(0)
    torch.randn(100) # somebody else's randomness
    b, c = run(0), run(1)
    assert a["history"] == b["history"] != c["history"] and a["folder"] != b["folder"]
    pa, pb = (Path(r["folder"], "training_curves.png").read_bytes() for r in (a, b))
    assert pa == pb
    pa, pb = (load_any_adapter(x["final_model"])[0].state_dict() for x in (a, b))
    assert all(torch.equal(pa[k], pb[k]) for k in pa)


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("loss", ["mse_cos", "kl"])
def test_options_of_speed_change_the_arithmetic_and_not_the_result(store, quick, level, loss):
    plain, bf16 = (train_adapter(store, adapter_level=level, loss=loss, **quick, **k) for k in ({}, {"autocast": True}))
    assert plain["history"]["train_loss"] != bf16["history"]["train_loss"]
    # two steps an epoch
    near(bf16["history"]["val_loss"], plain["history"]["val_loss"], plain["epochs"] * 2, torch.bfloat16)
    weights = torch.load(bf16["best_model"], weights_only=True)["model_state_dict"]
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    said = read_json(Path(bf16["folder"])/"config.json")["training"]
    assert said["autocast"] is True and "autocast" not in read_json(Path(plain["folder"])/"config.json")["training"]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                    reason="no C++ compiler: torch.compile has nothing to compile with")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT",
                    reason="without vector instructions (CPU capability DEFAULT) inductor's code does not compile")
def test_a_compiled_step_learns_the_same(store, quick):
    compiled, again = (train_adapter(store, loss="kl", **quick, compiled=True) for _ in range(2))
    assert again["history"] == compiled["history"]
    train, val = open_states(store).split(.2)
    # without dropout, which draws in another order; of one step from the same weights, since rounding grows over steps
    def gradients(**kw):
        adapter = create_adapter(1, D, bottleneck_dim=8, dropout=0., head_hash=train.head().hash)
        with torch.no_grad():
            for k, p in enumerate(adapter.parameters()):
                p.copy_(.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
        t = HiddenAdapterTrainer(adapter, train, val, loss="kl", batch_size=100, num_epochs=1, **kw)
        return t.train_epoch(1)["train_loss"], [p.grad for p in adapter.parameters()]
    (a, ga), (b, gb) = gradients(), gradients(compiled=True)
    near(b, a, CHAIN)
    for x, y in zip(gb, ga, strict=True): near(x, y, CHAIN)


def test_without_a_compiler_compiled_says_so(store, quick, monkeypatch):
    def none(f, **k): raise RuntimeError("No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", none)
    with pytest.raises(FeatsdError, match="compiled: expected a compiler for cpu.*No working C.*leave it out"):
        train_adapter(store, **quick, compiled=True)
    assert not list(quick["output_dir"].glob("*"))


def test_training_leaves_the_global_randomness_alone(store, quick):
    torch.manual_seed(3)
    want = torch.randn(3)
    torch.manual_seed(3)
    train_adapter(store, **quick)
    assert torch.equal(torch.randn(3), want)


def test_each_epoch_and_each_seed_has_its_own_order(store):
    train, val = open_states(store).split(.2)
    def orders(seed):
        t, seen = HiddenAdapterTrainer(T.new_adapter(1, train.manifest, None, 0), train, val, head=train.head(),
                                       seed=seed), []
        real = t.train.epoch
        t.train.epoch = lambda s: (seen.append(s), real(s))[1]
        for e in (1, 2): t.train_epoch(e)
        return seen
    assert len({*orders(0), *orders(10)}) == 4


# ---- resume

class Killed(BaseException): pass


def interrupt(monkeypatch, at, name):
    "Die in epoch `at` just before (or after) a file is written"
    real = T.Run.__call__
    def dies(self, trainer):
        if trainer.epoch == at and name == "before": raise Killed
        if trainer.epoch == at and name == "between":
            monkeypatch.setattr(trainer, "save_state", lambda p: (_ for _ in ()).throw(Killed()))
        real(self, trainer)
        if trainer.epoch == at: raise Killed
    monkeypatch.setattr(T.Run, "__call__", dies)


@pytest.mark.parametrize("level", [1, 4, "own"]) # own: by Muon
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_resumed_equals_uninterrupted(store, tmp_path, quick, monkeypatch, level, where):
    kw = dict(adapter_level=level, loss="kl", **quick | dict(num_epochs=5))
    whole = train_adapter(store, **kw | dict(output_dir=tmp_path/"whole"))
    with monkeypatch.context() as m:
        interrupt(m, 3, where)
        with pytest.raises(Killed): train_adapter(store, **kw)
    calls = []
    real = HiddenAdapterTrainer.train_epoch
    counted = lambda self, e, *a: (calls.append(e), real(self, e, *a))[1]
    monkeypatch.setattr(HiddenAdapterTrainer, "train_epoch", counted)
    r = train_adapter(store, resume=True, **kw)
    assert calls == ([4, 5] if where == "after" else [3, 4, 5])
    assert r["history"] == whole["history"] and len(list((tmp_path/"runs").iterdir())) == 1
    for name in ("best_model", "final_model"):
        a, b = (load_any_adapter(x[name])[0].state_dict() for x in (r, whole))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not Path(r["folder"], "last.pt").exists()


CHILD = """
import sys, torch
torch.set_num_threads(1)
from featsd.train import train_adapter
train_adapter(sys.argv[1], num_epochs=60, early_stopping=0, output_dir=sys.argv[2], progress=False, val_split=.2)
"""


def test_sigkill_then_resume(store, tmp_path):
    kw = dict(num_epochs=60, early_stopping=0, progress=False, val_split=.2)
    p = subprocess.Popen([sys.executable, "-c", CHILD, str(store), str(tmp_path/"runs")], env=ENV)
    try:
        until(lambda: list(tmp_path.glob("runs/L1_*/last.pt")) or p.poll() is not None)
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL and not list(tmp_path.glob("runs/L1_*/final_model.pt"))
    r = train_adapter(store, resume=True, output_dir=tmp_path/"runs", **kw)
    whole = train_adapter(store, output_dir=tmp_path/"whole", **kw)
    assert r["history"] == whole["history"] and r["epochs"] == 60


def test_a_finished_run_is_read_back(store, quick, monkeypatch):
    a = train_adapter(store, **quick)
    monkeypatch.setattr(HiddenAdapterTrainer, "fit", lambda *_: pytest.fail("trained again"))
    assert train_adapter(store, resume=True, **quick) == a == train_adapter(store, resume=a["folder"], **quick)


def test_other_settings_or_data_are_another_run(store, tmp_path, quick):
    a = train_adapter(store, **quick)
    b = train_adapter(store, resume=True, learning_rate=.02, **quick)
    assert b["folder"] != a["folder"]
    with pytest.raises(FeatsdError, match="training.learning_rate = .*now 0.05"):
        train_adapter(store, resume=a["folder"], learning_rate=.05, **quick)
    moved = shutil.copytree(store, tmp_path/"moved")
    assert train_adapter(moved, resume=True, **quick)["folder"] == a["folder"], "the same data at another place"
    other = make_store(tmp_path/"other", seed=1)
    with pytest.raises(FeatsdError, match="head_hash"): train_adapter(other, resume=a["folder"], **quick)


def test_an_interrupted_run_says_how_to_go_on(store, quick, monkeypatch, caplog):
    real = T.Run.__call__
    def ctrl_c(self, trainer):
        real(self, trainer)
        if trainer.epoch == 2: raise KeyboardInterrupt
    monkeypatch.setattr(T.Run, "__call__", ctrl_c)
    with pytest.raises(KeyboardInterrupt): train_adapter(store, **quick)
    assert "interrupted after epoch 2; the same command with --resume goes on" in caplog.text


class Evil:
    def __reduce__(self): return os.system, ("touch HACKED",)


@pytest.mark.parametrize("spoil", ["evil", "junk", "empty", "nothing", "shapes", "surplus", "history", "cut", "muon"])
def test_a_spoiled_last_pt_is_refused(store, tmp_path, quick, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    quick = quick | dict(optimizer="Muon" if spoil == "muon" else "AdamW")
    with monkeypatch.context() as m:
        interrupt(m, 2, "after")
        with pytest.raises(Killed): train_adapter(store, **quick)
    last, = tmp_path.glob("runs/*/last.pt")
    d = torch.load(last, weights_only=True)
    if spoil == "evil": last.write_bytes(pickle.dumps(Evil()))
    elif spoil == "junk": last.write_bytes(b"x" * 999)
    elif spoil == "empty": last.write_bytes(b"")
    elif spoil == "cut": last.write_bytes(last.read_bytes()[:-200])
    else:
        if spoil == "nothing": del d["optimizer_state_dict"]
        if spoil == "shapes": d["optimizer_state_dict"]["state"][1]["exp_avg"] = torch.zeros(3)
        if spoil == "surplus":
            d["optimizer_state_dict"]["state"][1]["more"] = torch.zeros(1).expand(2**40) # four bytes on disk
        if spoil == "muon": d["optimizer_state_dict"]["Muon"]["state"][0]["momentum"] = torch.zeros(3)
        if spoil == "history": d["metrics"]["history"]["val_loss"] = [float("nan")] * 2
        torch.save(d, last)
    with pytest.raises(ValueError, match="last.pt") as e: train_adapter(store, resume=True, **quick)
    assert "\n" not in str(e.value) and not (tmp_path/"HACKED").exists()


# ---- bad input

@pytest.mark.parametrize("kw, says", [
    (dict(adapter_level=9), "adapter level 9: expected 1, 2, 3, 4"), (dict(adapter_level="L0"), "expected 1, 2, 3, 4"),
    (dict(adapter_level="all"), "train_levels"),
    (dict(loss="l1"), "expected one of mse_cos"),
    (dict(stream="draft_wrong"), "stream 'draft_wrong', expected one of draft_forced, draft_free"),
    (dict(stream="target"), "stream 'target'"), (dict(val_split=0), "held-out clips"),
    (dict(val_split=1.5), "val_split"), (dict(num_epochs=0), "num_epochs"),
    (dict(batch_size=0), "batch_size"), (dict(batch_size=2.5), "batch_size"), (dict(learning_rate=0), "learning_rate"),
    (dict(learning_rate=math.nan), "learning_rate"),
    (dict(optimizer="SGD"), "optimizer 'SGD': expected one of AdamW, Muon"),
    (dict(early_stopping=-1), "early_stopping"), (dict(seed=-1), "seed"), (dict(bottleneck_dim=0), "bottleneck_dim"),
    (dict(num_heads=3), "num_heads"),
    (dict(adapter_level=4, num_heads=3), "num_heads"), (dict(residual="none"), "residual"),
    (dict(device="cuda:99"), "device 'cuda:99'"),
    (dict(device="abacus"), "device 'abacus'"),
    (dict(resume="absent"), "absent/config.json"),
])
def test_bad_settings_leave_nothing(store, tmp_path, kw, says):
    with pytest.raises((ValueError, OSError)) as e:
        train_adapter(store, output_dir=tmp_path/"out", progress=False, **kw)
    assert says in str(e.value) and "\n" not in str(e.value), str(e.value)
    assert not (tmp_path/"out").exists()


def test_bad_data_leaves_nothing(store, tmp_path):
    out = tmp_path/"out"
    def refused(says, *args, **kw):
        with pytest.raises((ValueError, OSError)) as e: train_adapter(*args, output_dir=out, progress=False, **kw)
        assert says in str(e.value) and "\n" not in str(e.value), str(e.value)
        assert not out.exists()
    states, headless = open_states(store), make_store(tmp_path/"headless", keep_head=False)
    refused("absent", tmp_path/"absent")
    refused("head_hash", store, make_store(tmp_path/"other", seed=1))
    refused("draft_dim 12, expected 16", store, make_store(tmp_path/"narrow", draft_dim=12))
    refused("expected training pairs", states.subset([]), states)
    refused("expected validation pairs", states, states.subset([]))
    refused("two clips", make_store(tmp_path/"one", pairs=6))
    refused("clip clip00 is in training and validation data (10 such clips)", store, make_store(tmp_path/"same"))
    refused("needs the target's head", headless, loss="ce")
    shutil.copytree(store, tmp_path/"swapped")
    make_head(7).save(tmp_path/"swapped"/"head.safetensors")
    refused("head", tmp_path/"swapped")
    (tmp_path/"evil.pt").write_bytes(pickle.dumps(Evil()))
    refused("evil.pt", tmp_path/"evil.pt")
    assert not Path("HACKED").exists()


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["memory", "disk"])
def test_nan_in_the_data(tmp_path, cache_bytes):
    h = torch.randn(40, 6, 8)
    d = dict(egpt_hidden=h, vl_hidden=h.clone(), seq_lens=torch.full((40,), 6),
             metadata=[dict(sample_idx=k // 4, question_idx=k % 4) for k in range(40)], config={})
    d["vl_hidden"][21, 2, 5] = float("inf")
    torch.save(d, tmp_path/"s.pt")
    with pytest.raises(FeatsdError, match="expected finite states, found 1 positions"):
        train_adapter(tmp_path/"s.pt", output_dir=tmp_path/"out", progress=False, cache_bytes=cache_bytes,
                      num_heads=None)
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("step", [1, 3, 16, 17, 40])
def test_a_loss_that_is_no_number_names_epoch_and_step(store, step):
    train, val = open_states(store).split(.2)
    t = HiddenAdapterTrainer(T.new_adapter(1, train.manifest, None, 0), train, val, head=train.head(), batch_size=1)
    real = t.train.epoch
    def poisoned(seed):
        for k, (h, m, y, ids) in enumerate(real(seed), 1): yield h, m, y * float("nan") if k == step else y, ids
    t.train.epoch = poisoned
    with pytest.raises(FeatsdError, match=f"^epoch 2, step {step}: expected a finite loss, found nan"): t.train_epoch(2)


def test_adapter_states_and_head_must_fit(store, tmp_path):
    train, val = open_states(store).split(.2)
    for adapter, says in ((create_adapter(1, 12), "width 16, expected 12"),
                          (create_adapter(1, D, 20), "width 16, expected 20"),
                          (create_adapter(1, D, head_hash="ab" * 32), "expected abab")):
        with pytest.raises(FeatsdError, match=says): HiddenAdapterTrainer(adapter, train, val)
    with pytest.raises(ValueError, match="head"):
        HiddenAdapterTrainer(create_adapter(1, D), train, val, head=make_head(9))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(store, tmp_path):
    (tmp_path/"ro").mkdir(mode=0o500)
    with pytest.raises(FeatsdError, match="can be written"):
        train_adapter(store, output_dir=tmp_path/"ro"/"x", progress=False)


def test_an_output_dir_that_is_a_file(store, tmp_path):
    (tmp_path/"f").write_text("")
    with pytest.raises(FeatsdError, match="expected a folder"):
        train_adapter(store, output_dir=tmp_path/"f", progress=False)


# ---- as a user runs it

def featsd_train(folder, *args):
    "Through a script file, as pip installs it"
    script = folder/"featsd_train"
    script.write_text("from featsd.commands import featsd_train\nfeatsd_train()\n")
    return subprocess.run([sys.executable, script, *map(str, args)], env=ENV, capture_output=True, text=True,
                          timeout=HANG)


def has_command():
    try: from featsd.commands import featsd_train  # noqa: F401
    except ImportError: return False
    return True


@pytest.mark.skipif(not has_command(), reason="featsd_train is not exported")
def test_command(store, tmp_path):
    out = featsd_train(tmp_path, "--train_data", store, "--adapter_level", "all", "--num_epochs", 2, "--output_dir",
                       tmp_path/"runs", "--no-progress")
    assert out.returncode == 0, out.stderr
    assert [line[:2] for line in out.stdout.splitlines()[2:6]] == ["L1", "L2", "L3", "L4"]
    assert "token top-1" in out.stdout
    assert sorted(p.name[:2] for p in (tmp_path/"runs").iterdir()) == ["L1", "L2", "L3", "L4"]
    for args, says in ((["--train_data", tmp_path/"absent"], "absent"), ([], "--train_data"),
                       (["--train_data", store, "--adapter_level", "7"], "adapter level '7'")):
        bad = featsd_train(tmp_path, *args, "--output_dir", tmp_path/"bad")
        assert bad.returncode == 2 and says in bad.stderr and bad.stderr.count("\n") == 1
        assert not (tmp_path/"bad").exists()


def test_a_step_in_blocks_is_the_step_of_the_whole_batch(monkeypatch):
    "Rows taken block by block on a CPU give the same loss, cosine and weights"
    import featsd.train as T
    def trained(block_bytes):
        monkeypatch.setattr(T.in_blocks, "__defaults__", (block_bytes,))
        h, t = (torch.randn(70, 16, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
        torch.manual_seed(0)
        trainer = T.HiddenAdapterTrainer.__new__(T.HiddenAdapterTrainer)
        adapter = T.create_adapter(1, 16, bottleneck_dim=8, dropout=0.)
        feed = type("F", (), {"epoch": lambda self, seed: iter([(h, None, t, None)] * 3)})()
        def align(*batch): passes.append(len(batch[1])); return T.align(*batch)
        vars(trainer).update(adapter=adapter, train=feed, terms=T.parse_loss("mse_cos"), head=None, loss_head=None,
                             device="cpu", team=T.Team(), autocast=False, align=align,
                             settings=T.TrainSettings(learning_rate=1e-2, num_epochs=5),
                             objective=T.objective, optimizer=torch.optim.SGD(adapter.parameters(), lr=1e-2))
        before = [p.detach().clone() for p in adapter.parameters()]
        return trainer.train_epoch(1), [p.detach() - q for p, q in zip(adapter.parameters(), before, strict=True)]
    passes = []
    (a, w), (b, v) = trained(2**22), trained(16 * 64)
    assert passes == 3 * [70] + 3 * [16, 16, 16, 16, 6]
    for k in a: near(b[k], a[k], CHAIN, size=1, what=k)
    for x, y in zip(v, w, strict=True): near(x, y, CHAIN * 70)
