"Laws of the store: what goes in comes out, no crash or hostile file spoils it, silent mistakes are refused"
import copy
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import HANG
from torch import nn

from featsd.base.core import FeatsdError, say_once
from featsd.base.processes import Claims, Launch
from featsd.data.chunk import chunk_file, expected_bytes, head_agreement, pack_chunk, write_tensors
from featsd.data.chunk import PairStates, StoreError
from featsd.data.store import (
    StoreLock, StoreWriter, check_states, open_states, rebuild_index, verify_store)
from featsd.data.study import load_pt, pack_study
from featsd.data.head import Head, RMSNorm

TOTAL, SIZE = 23, 4
SETTINGS = dict(target_model="t", draft_model="d", generation=dict(max_new_tokens=12))
ALL = ("target", "draft_forced", "draft_free", "draft_wrong")


def make_head(vocab=50, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    lm = nn.Linear(dim, vocab, bias=False)
    with torch.no_grad(): lm.weight.copy_(torch.randn(vocab, dim, generator=g))
    return Head(RMSNorm(1 + torch.rand(dim, generator=g), 1e-6), lm)


HEAD, DRAFT = make_head(seed=1), make_head(dim=12, seed=2)


def pair(k, streams=ALL[:3], sequence=""):
    "Pair k: its answers are what the heads say of its states, with gaps that bf16 cannot close"
    g = torch.Generator().manual_seed(k)
    n = {"target": 5 + k % 6, "draft": 3 + k % 5}
    def sure(rows, head): # draws until the top logit leads clearly
        h = torch.randn(rows * 8, head.hidden_size, generator=g)
        top = head.logits(h).topk(2).values
        return h[(top[:, 0] - top[:, 1]).argsort(descending=True)[:rows]]
    s = {}
    for name in streams:
        if name == "target": s[name] = sure(n["target"], HEAD)
        elif name == "draft_free": s[name] = sure(n["draft"], DRAFT)
        else: s[name] = torch.randn(n["target"], 12, generator=g)
    ids = HEAD.logits(s["target"]).argmax(-1).numpy(), DRAFT.logits(s["draft_free"]).argmax(-1).numpy()
    return PairStates(f"clip{k // 5}", k % 5, f"which {k % 5}?", *ids, f"target {k}", f"draft ü {k}",
                      np.ones(n["target"]), np.ones(n["draft"]), s, sequence)


def writer(path, **kw):
    kw = dict(manifest=SETTINGS, head=HEAD, chunk_size=SIZE, draft_head=DRAFT) | kw
    return StoreWriter(path, **kw)


def fill(path, total=TOTAL, full=False, **kw):
    with writer(path, **kw) as w:
        todo = w.missing(total, full)
        for start, stop in todo: w.write_chunk(start, [pair(k, w.manifest["streams"]) for k in range(start, stop)])
    return todo


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file() and
            p.name != ".lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")/"store"
    fill(path)
    return path


@pytest.fixture
def store(whole, tmp_path):
    shutil.copytree(whole, tmp_path/"store")
    return tmp_path/"store"


# ---- what goes in comes out

@pytest.mark.parametrize("dtype,cast", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16),
                                        ("fp8", None)])
def test_round_trip(tmp_path, dtype, cast):
    fill(tmp_path, manifest=SETTINGS | dict(dtype=dtype, streams=list(ALL)))
    states = open_states(tmp_path)
    assert len(states) == TOTAL and states.manifest["head_hash"] == HEAD.hash
    assert states.manifest["state_point"] == "post_final_norm"
    for stream in ALL[1:]:
        seen = []
        for b in states.batches(stream, batch_pairs=5):
            for r, i in enumerate(b.index):
                p, n = pair(i, ALL), int(b.mask[r].sum())
                assert n == (len(p.target_ids) if stream != "draft_free" else min(len(p.target_ids), len(p.draft_ids)))
                assert b.mask[r, :n].all() and (b.ids[r, :n].numpy() == p.target_ids[:n]).all()
                assert (b.ids[r, n:] == -1).all()
                for got, h in ((b.h_draft, p.streams[stream]), (b.h_target, p.streams["target"])):
                    if cast: assert torch.equal(got[r, :n], h[:n].to(cast).float())
                    else: assert (got[r, :n] - h[:n]).norm() < .05 * h[:n].norm()
                    assert not got[r, n:].any()
            seen += b.index
        assert seen == list(range(TOTAL))
    p, i = pair(7, ALL), states.pairs[7]
    assert (i.clip_id, i.question_idx, i.question, i.target_text,
            i.draft_text) == (p.clip_id, p.question_idx, p.question, p.target_text, p.draft_text)
    assert (states.draft_ids(7) == p.draft_ids).all() and states.target_ids(7).dtype == np.int64
    assert (states.target_margins(7) == 1).all()
    head = states.head()
    assert head.hash == HEAD.hash and torch.equal(head.logits(p.streams["target"]), HEAD.logits(p.streams["target"]))
    assert check_states(states, head)


def test_shuffle_is_seeded_complete_and_batches_are_full(whole):
    states = open_states(whole)
    def order(seed): return [b.index for b in states.batches("draft_free", 5, seed, block_bytes=600, window=3)]
    a, b, c = order(1), order(1), order(2)
    assert a == b != c and sorted(sum(a, [])) == sorted(sum(c, [])) == list(range(TOTAL))
    assert [len(x) for x in a] == [5, 5, 5, 5, 3]


def test_blocks_alive_are_bounded(whole):
    states, alive, most = open_states(whole), weakref.WeakSet(), []
    opened = states.source.open
    class Rows:
        def __init__(self, f): self.f = f
        def __call__(self, *a): return self.f(*a)
    def track(k):
        rows = Rows(opened(k))
        alive.add(rows)
        most.append(len(alive))
        return rows
    states.source.open = track
    for _ in states.batches("draft_forced", 2, 0, block_bytes=1, window=3): pass # one pair a block
    assert 3 <= max(most) <= 3 + 1 # a window, and the pair that waits for a full batch
    gc.collect()
    assert not alive


def test_subset_and_ids(whole):
    states = open_states(whole)
    part = states.subset([9, 2, 17])
    assert [p.index for p in part.pairs] == [9, 2, 17] and (part.target_ids(2) == pair(17).target_ids).all()
    b = next(part.batches())
    assert b.index == [0, 1, 2] and torch.equal(b.ids[1][b.mask[1]], torch.from_numpy(pair(2).target_ids))
    with pytest.raises(StoreError, match="0..22"): states.subset([23])


def test_split_by_clip_and_by_sequence(whole, tmp_path):
    states = open_states(whole)
    for seed in range(6):
        train, val = states.split(.3, seed)
        assert not set(train.clips) & set(val.clips) and len(train) + len(val) == TOTAL and len(val) and len(train)
    assert states.split(.3, 4)[1].clips == states.split(.3, 4)[1].clips
    assert len({tuple(states.split(.3, s)[1].clips) for s in range(6)}) > 1
    assert len(states.split(0)[1]) == 0
    with pytest.raises(StoreError, match="val_split"): states.split(1.)
    with pytest.raises(StoreError, match="two clips"): states.subset([0, 1]).split()
    with writer(tmp_path) as w: # clips 0..3 were cut from two recordings
        for start, stop in w.missing(20):
            w.write_chunk(start, [pair(k, sequence=f"seq{k // 10}") for k in range(start, stop)])
    for seed in range(4):
        train, val = open_states(tmp_path).split(.1, seed)
        assert {p.sequence for p in train.pairs}.isdisjoint({p.sequence for p in val.pairs}) and len(val) == 10


def test_expected_bytes(tmp_path):
    for i, (D, T, dtype, streams) in enumerate(((512, 40, "bf16", ALL[:3]), (1024, 25, "fp32", ALL),
                                                (1024, 50, "fp8", ALL[:3]))):
        text, h = "a word or " * 23, torch.randn(T, D)
        pairs = [PairStates(f"clip{k}", 0, "What is seen in this clip?", np.arange(T), np.arange(T), text[:int(4.6*T)],
                            text[:int(4.6*T)], np.ones(T), np.ones(T),
                            dict.fromkeys(streams, h)) for k in range(30)]
        with StoreWriter(tmp_path/str(i), dict(target_dim=D, draft_dim=D, dtype=dtype, streams=list(streams)),
                         chunk_size=20) as w:
            for a, b in w.missing(30): w.write_chunk(a, pairs[a:b])
        size = sum(len(b) for k, b in files(tmp_path/str(i)).items())
        assert abs(expected_bytes(30, T, D, dtype, streams, chunk_size=20) / size - 1) < .01


# ---- the bytes depend on the pairs and nothing else

def test_bytes_do_not_depend_on_order_time_or_command(whole, tmp_path):
    with writer(tmp_path, manifest=SETTINGS | dict(argv=["again"], created="later")) as w:
        todo = w.missing(TOTAL)
        for start, stop in reversed(todo): w.write_chunk(start, [copy.deepcopy(pair(k)) for k in range(start, stop)])
    a, b = files(whole), files(tmp_path)
    assert a.keys() == b.keys() and all(a[k] == b[k] for k in a if k != "manifest.json")


def test_a_longer_plan_extends_the_last_chunk(whole, tmp_path):
    fill(tmp_path, total=10)
    assert fill(tmp_path) == [(8, 12), (12, 16), (16, 20), (20, 23)]
    assert files(tmp_path) == files(whole)
    assert fill(tmp_path, total=10) == [] and files(tmp_path) == files(whole) # a shorter plan destroys nothing


def test_settings_decide_and_the_rest_does_not(store):
    fill(store, manifest=SETTINGS | dict(argv=["x"], versions={"torch": "0"}))
    for change, old, new in ((dict(generation=dict(max_new_tokens=50)), "generation.max_new_tokens = 12",
                              "generation.max_new_tokens = 50"),
                             (dict(dtype="fp32"), "dtype = 'bf16'", "dtype = 'fp32'"),
                             (dict(questions=["a"]), "questions = None", "['a']")):
        with pytest.raises(StoreError) as e: writer(store, manifest=SETTINGS | change)
        assert old in str(e.value) and new in str(e.value) and "manifest.json" in str(e.value)
        assert "\n" not in str(e.value)
    with pytest.raises(StoreError, match="chunk_size"): writer(store, chunk_size=5)
    with pytest.raises(StoreError, match="head_hash"): writer(store, head=make_head(seed=9))
    with pytest.raises(StoreError, match="streams"):
        writer(store.parent/"new", manifest=SETTINGS | dict(streams=["target", "up"]))
    with writer(store.parent/"b", manifest=SETTINGS | dict(dtype="fp32")): pass
    # nothing was written under the first settings, so nothing is lost
    with writer(store.parent/"b", manifest=SETTINGS): pass


# ---- killed at any instant

KILL = r'''
import json, os, random, signal, sys
sys.path.insert(0, "tests")
import test_store as t
from safetensors import safe_open
from featsd.data import chunk
path, seed = sys.argv[1], int(sys.argv[2])
rng, kills, resumes = random.Random(seed), 0, 0

def die(): os.kill(os.getpid(), signal.SIGKILL)

def child(at):
    "Write the store; die before, after or in the middle of operation number `at`"
    left = [at]
    def counted(fn):
        def run(*a, **kw):
            left[0] -= 1
            if left[0] == 0 and rng.random() < .5: die()
            out = fn(*a, **kw)
            if left[0] == 0: die()
            return out
        return run
    for name in ("fsync", "replace", "unlink"): setattr(os, name, counted(getattr(os, name)))
    whole = chunk.write_tensors
    def torn(f, tensors):
        left[0] -= 1
        if left[0] == 0:
            whole(f, tensors); f.flush(); os.truncate(f.fileno(), rng.randrange(f.tell())); die()
        return whole(f, tensors)
    chunk.write_tensors = torn
    t.fill(path)

while True:
    rng.seed(seed * 1000 + resumes)
    at = rng.randrange(1, 16)
    pid = os.fork()
    if pid == 0:
        try: child(at)
        except BaseException as e: print(repr(e)); os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    resumes += 1
    # whole under its name, or not there
    for f in (*t.Path(path).glob("chunks/*.safetensors"), *t.Path(path).glob("head.safetensors")):
        with safe_open(f, "pt"): pass
    for f in t.Path(path).rglob("*.json"): json.loads(f.read_text())
    if os.WIFSIGNALED(status): kills += 1
    else:
        if os.WEXITSTATUS(status): sys.exit(3)
        break
print(kills)
'''


def test_sigkill_then_resume_gives_the_same_bytes(whole, tmp_path):
    kills = 0
    script = tmp_path/"kill.py"
    script.write_text(KILL)
    loop = "import runpy, sys, shutil\n" # one interpreter for all rounds: the import costs more than the round
    loop += ("for s in range(8):\n sys.argv = ['kill', f'{sys.argv[1].rsplit(\"/\", 1)[0]}/r{s}', "
             "str(s)]\n runpy.run_path(%r)\n" % str(script))
    r = subprocess.run([sys.executable, "-c", loop, f"{tmp_path}/x"], capture_output=True, text=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=HANG)
    assert r.returncode == 0, r.stdout + r.stderr
    kills = sum(map(int, r.stdout.split()))
    assert kills >= 10
    for s in range(8): assert files(tmp_path/f"r{s}") == files(whole)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no sidecar", "no tensors", "sidecar garbage", "stale index",
                                  "left over"])
def test_damage_is_healed_by_resuming(whole, store, harm):
    f, side = chunk_file(store, 8), chunk_file(store, 8, "json")
    if harm == "truncated": os.truncate(f, 700)
    if harm == "flipped": f.write_bytes(bytes([b ^ (i == 900) for i, b in enumerate(f.read_bytes())]))
    if harm == "no sidecar": side.unlink()
    if harm == "no tensors": f.unlink()
    if harm == "sidecar garbage": side.write_text('{"start": 8')
    if harm == "stale index": (store/"index.json").write_text('{"chunks": [{"start": 99}]}')
    if harm == "left over":
        (store/"chunks/chunk_000008.safetensors.77.tmp").write_bytes(b"half")
        (store/"manifest.json.77.tmp").write_bytes(b"half")
    bad = [name for name, verdict in verify_store(store) if verdict != "ok"]
    assert bad == {"stale index": [], "left over": ["chunks/chunk_000008.safetensors.77.tmp", "manifest.json.77.tmp"],
                   "no sidecar": ["chunks/chunk_000008.safetensors"] * 2}.get(harm, ["chunks/chunk_000008.safetensors"])
    if harm in ("truncated", "no tensors", "sidecar garbage"):
        with pytest.raises(StoreError, match="featsd_verify"): open_states(store)
    if harm == "no sidecar": assert len(open_states(store)) == TOTAL - SIZE
    again = shutil.copytree(store, store.parent/"repaired")
    assert fill(store, full=harm == "flipped") == ([] if harm in ("stale index", "left over") else [(8, 12)])
    assert files(store) == files(whole)
    verify_store(again, repair=True) # the other way: drop what is wrong, then a plain resume
    assert ({v for f, v in verify_store(again)} <= {"ok"} |
            {v for f, v in verify_store(again) if v.startswith("missing: pairs 8 to 11")})
    fill(again)
    assert files(again) == files(whole)


def test_repair_drops_nothing_that_it_cannot_judge(whole, store, monkeypatch):
    "A disk that errs says nothing about the bytes, and chunks that are all wrong are right under another manifest"
    from featsd.data import chunk
    def erring(real, start):
        def read(file, *a, **kw):
            if Path(file).stem == chunk_file(store, start).stem: raise OSError(5, "Input/output error")
            return real(file, *a, **kw)
        return read
    with monkeypatch.context() as m:
        m.setattr(chunk, "sha256_file", erring(chunk.sha256_file, 4))
        m.setattr(chunk, "read_json", erring(chunk.read_json, 8))
        os.truncate(chunk_file(store, 12), 700)
        said = [v for f, v in verify_store(store, repair=True) if v != "ok"]
        assert [v[:18] for v in said] == ["cannot be read now"] * 2 + ["dropped: " + str(store)[:9]], said
        with writer(store) as w, pytest.raises(OSError, match="chunk_000008.json"): w.missing(TOTAL)
    fill(store)
    assert files(store) == files(whole)
    edit(store, target_dim=17)
    assert all("check manifest.json" in v for f, v in verify_store(store, repair=True) if f.startswith("chunks/"))
    edit(store, target_dim=16)
    assert {k: v for k, v in files(store).items() if k.startswith("chunks")} == {k: v for k, v in files(whole).items()
                                                                                 if k.startswith("chunks")}


def test_verify_sees_the_hole_behind_a_short_chunk_and_says_what_was_skipped(tmp_path):
    with writer(tmp_path) as w:
        w.write_chunk(0, [pair(0), pair(1)], stop=2) # of a shorter plan, never extended
        w.write_chunk(4, [pair(k) for k in range(4, 7)], [("clip9", "cut short")])
    said = [x for x in verify_store(tmp_path) if x[1] != "ok"]
    assert said == [("chunks/chunk_000000.safetensors", "missing: pairs 2 to 3, resume the extraction"),
                    ("chunks", "ok: 1 pairs of 1 clips are not there, the clips could not be read")]
    with writer(tmp_path) as w: assert w.missing(8) == [(0, 4)]


def test_file_size_limit_leaves_a_valid_store(tmp_path):
    code = ("import sys, resource; sys.path.insert(0, 'tests'); import test_store as t\n"
            "t.fill(sys.argv[1], 8); resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
            "try: t.fill(sys.argv[1])\nexcept t.StoreError as e: print(e)")
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path/"s")], capture_output=True, text=True, timeout=HANG)
    assert r.returncode == 0, r.stderr
    assert "chunk_000008.safetensors: could not be written (File too large)" in r.stdout and r.stdout.count("\n") == 1
    assert not list((tmp_path/"s").rglob("*.tmp")) and len(open_states(tmp_path/"s")) == 8
    assert fill(tmp_path/"s")[0] == (8, 12)


def test_new_tensors_never_count_under_an_old_sidecar(store, monkeypatch):
    "Same sizes, other numbers, and a crash between the two files"
    real = os.replace
    def crash(src, dest):
        if str(dest).endswith("8.json"): raise RuntimeError("power cut")
        real(src, dest)
    other = [pair(k) for k in range(8, 12)]
    for p in other: p.streams["draft_forced"] = p.streams["draft_forced"] * 2
    with writer(store) as w:
        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(RuntimeError): w.write_chunk(8, other)
        assert w.missing(TOTAL) == [(8, 12)]


@pytest.mark.parametrize("nth", [0, 1]) # of the tensors, of the sidecar
def test_a_full_disk_keeps_the_chunk_that_was_to_be_extended(tmp_path, monkeypatch, nth):
    fill(tmp_path, 6)
    before, real, calls = files(tmp_path), os.fsync, iter(range(99))
    def full(fd):
        if next(calls) == nth: raise OSError(28, "No space left on device")
        real(fd)
    with writer(tmp_path) as w, monkeypatch.context() as m:
        assert w.missing(8) == [(4, 8)]
        m.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"): w.write_chunk(4, [pair(k) for k in range(4, 8)])
    assert files(tmp_path) == before and len(open_states(tmp_path)) == 6


# ---- one writer

HOLD = ("import sys; sys.path.insert(0, 'tests'); import test_store as t; w = t.writer(sys.argv[1], group=sys.argv[2] "
        "or None); print('held', flush=True); sys.stdin.read()")


def hold(path, group=""):
    p = subprocess.Popen([sys.executable, "-c", HOLD, str(path), group], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
    assert p.stdout.readline() == "held\n"
    return p


def test_a_second_writer_is_refused_and_a_killed_one_lets_go(store):
    p = hold(store)
    try:
        with pytest.raises(StoreError, match=f"process {p.pid}"): writer(store)
        with pytest.raises(StoreError, match=f"process {p.pid}"): verify_store(store, repair=True)
        assert len(open_states(store)) == TOTAL # reading is free
    finally: p.kill(); p.wait()
    assert fill(store) == []


def test_processes_of_one_launch_share_the_store(tmp_path):
    p = hold(tmp_path, "launch-1")
    try:
        (tmp_path/"chunks/chunk_000000.safetensors.1.tmp").touch() # the other process is writing
        assert fill(tmp_path, group="launch-1")[0] == (0, 4)
        assert (tmp_path/"chunks/chunk_000000.safetensors.1.tmp").exists()
        with pytest.raises(StoreError, match="no other writer"): writer(tmp_path)
        with pytest.raises(StoreError, match="no other writer"): StoreLock(tmp_path, "launch-2", wait_s=.2)
    finally: p.kill(); p.wait()
    assert fill(tmp_path) == [] and not list(tmp_path.rglob("*.tmp"))


# ---- silent mistakes are refused

def prenorm(h): return h * torch.linspace(.2, 3, h.shape[-1]) + 1

@pytest.mark.parametrize("stream", ["target", "draft_free"])
@pytest.mark.parametrize("mutate,says", [(lambda h: h.roll(1, 0), "off by one"),
                                         (lambda h: h.roll(-1, 0), "off by one"), (prenorm, "before the final norm"),
                                         (lambda h: h.index_fill(0, torch.tensor([1]), float("nan")), "finite"),
                                         (lambda h: h.index_fill(0, torch.tensor([1]), float("inf")), "finite"),
                                         (lambda h: h[1:], "one row a token"), (lambda h: h[:, 1:], "shape")])
def test_mutants_die(store, stream, mutate, says):
    pairs = [pair(k) for k in range(8, 12)]
    for p in pairs: p.streams[stream] = mutate(p.streams[stream])
    before = files(store)
    with writer(store) as w, pytest.raises(StoreError, match=says) as e: w.write_chunk(8, pairs, stop=12)
    assert "\n" not in str(e.value) and files(store) == before


def test_one_wrong_row_in_a_thousand_is_the_limit():
    m = dict(dtype="fp32", streams=list(ALL[:3]), target_dim=16, draft_dim=12, vocab_size=50, tie=1e-3,
             min_agreement=.999)
    pairs = [pair(k) for k in range(300)]
    rows = sum(len(p.target_ids) for p in pairs)
    assert 2000 < rows < 3000
    for wrong, passes in ((2, True), (3, False)):
        for p in pairs[:wrong]:
            p.target_ids = np.concatenate([(p.target_ids[:1] + 1) % 50,
                                           pair(int(p.target_text.split()[1])).target_ids[1:]])
        if passes: assert pack_chunk(pairs, m, HEAD, DRAFT)[1]["target"]["agree"] == rows - wrong
        else:
            with pytest.raises(StoreError, match=f"99.8.% of {rows}"): pack_chunk(pairs, m, HEAD, DRAFT)


def test_rounding_is_counted_not_refused():
    "Two tokens whose logits differ by less than bf16 keeps: right as extracted, undecided as stored"
    head = make_head(2, 2)
    with torch.no_grad(): head.lm_head.weight.copy_(torch.eye(2))
    h = torch.tensor([[1.001, 1.]]).repeat(4, 1) + torch.tensor([[0., 0], [0, .5], [.5, 0], [0, .0025]])
    ids = h.argmax(-1)
    assert head_agreement(h, ids, head) == dict(rows=4, exact=4, agree=4)
    assert head_agreement(h, 1 - ids, head, tie=1.6e-3) == dict(rows=4, exact=0, agree=2) # within the tie: rows 0 and 3
    m = dict(dtype="bf16", streams=["target"], target_dim=2, draft_dim=2, vocab_size=2, tie=0., min_agreement=.999)
    p = PairStates("c", 0, "q", ids.numpy(), np.zeros(0, np.int64), "", "", np.ones(4), np.zeros(0), {"target": h})
    assert pack_chunk([p], m, head)[1]["target"] == dict(rows=4, exact=4, agree=4, stored_exact=3)


def test_fp16_overflow_is_refused(tmp_path):
    p = pair(0)
    p.streams["draft_forced"] = p.streams["draft_forced"] * 1e6
    with writer(tmp_path, manifest=SETTINGS | dict(dtype="fp16")) as w, pytest.raises(StoreError,
                                                                                      match="once stored as fp16"):
        w.write_chunk(0, [p])


def test_skipped_clips_and_empty_chunks(tmp_path):
    with writer(tmp_path) as w:
        assert w.missing(8) == [(0, 4), (4, 8)]
        w.write_chunk(0, [], skipped=[("clip0", "no events")])
        w.write_chunk(4, [pair(5)], skipped=[("clip1", "unreadable")])
        assert w.missing(8) == []
    states = open_states(tmp_path)
    assert len(states) == 1 and states.pairs[0].target_text == "target 5"
    assert json.loads((tmp_path/"index.json").read_text())["skipped"] == 2
    assert json.loads(chunk_file(tmp_path, 0, "json").read_text())["skipped"] == [{"clip_id": "clip0",
                                                                                   "reason": "no events"}]


# ---- reading what may be broken or hostile

def rewrite(path, start, change):
    "Change a chunk's tensors and make its sidecar agree: what a bad disk or a bad writer could leave"
    from safetensors.torch import load_file
    f, side = chunk_file(path, start), chunk_file(path, start, "json")
    t = {k: v.clone() for k, v in load_file(f).items()}
    change(t)
    with open(f, "wb") as o: size, sha = write_tensors(o, t)
    side.write_text(json.dumps(json.loads(side.read_text()) | dict(bytes=size, sha256=sha)))


def test_nan_rows_are_masked_and_counted(store):
    def harm(t): t["draft_forced"][3, 2] = float("nan"); t["target"][0] = float("inf"); t["target"][4, 0] = float("nan")
    rewrite(store, 0, harm)
    states = open_states(store)
    for _ in range(2): # counted once, however often they are read
        batches = list(states.batches("draft_forced"))
        assert states.nan_rows == 3
    b = batches[0]
    assert torch.isfinite(b.h_draft).all() and torch.isfinite(b.h_target).all() and not b.mask[0, [0, 3, 4]].any()
    assert b.mask[0, [1, 2]].all()
    assert sum(int(b.mask.sum()) for b in batches) == sum(p.n_target for p in states.pairs) - 3
    assert [f for f, v in verify_store(store) if "finite" in v] == ["chunks/chunk_000000.safetensors"]


def test_large_finite_rows_are_not_mistaken_for_nan(tmp_path):
    p = pair(0)
    p.streams["draft_forced"] = torch.full_like(p.streams["draft_forced"], 3e38)
    with writer(tmp_path, manifest=SETTINGS | dict(dtype="fp32")) as w: w.write_chunk(0, [p])
    states = open_states(tmp_path)
    assert next(states.batches()).mask.sum() == len(p.target_ids) and states.nan_rows == 0


@pytest.mark.parametrize("harm,says", [
    (lambda s: (s/"manifest.json").write_text("[]"), "JSON object"),
    (lambda s: (s/"manifest.json").write_text("{"), "expected JSON"),
    (lambda s: edit(s, target_dim=17), r"expected target BF16 \[\d+, 17\], found BF16 \[\d+, 16\]"),
    (lambda s: edit(s, schema=9), "schema 1"),
    (lambda s: edit(s, dtype="fp32"), "F32"), (lambda s: edit(s, dtype=["bf16"]), "dtype"),
    (lambda s: edit(s, streams=["target", "draft_wrong"]), "draft_wrong"),
    (lambda s: edit(s, chunk_size=-1), "chunk_size"), (lambda s: edit(s, vocab_size="many"), "vocab_size"),
    (lambda s: [p.unlink() for p in (s/"chunks").iterdir()], "expected stored pairs"),
    (lambda s: rewrite(s, 0, lambda t: t.pop("draft_ids")), "draft_ids"),
    (lambda s: rewrite(s, 0, lambda t: t.update(target_offsets=t["target_offsets"].flip(0).contiguous())),
     "offsets disagree"),
    (lambda s: relink(chunk_file(s, 4)), "link that leaves"),
    (lambda s: relink(chunk_file(s, 4, "json")), "link that leaves")])
def test_one_line_errors(store, harm, says):
    harm(store)
    with pytest.raises(StoreError, match=says) as e: open_states(store)
    assert "\n" not in str(e.value) and str(store) in str(e.value) and issubclass(StoreError, FeatsdError)


def edit(path, **kw): (path/"manifest.json").write_text(json.dumps(json.loads((path/"manifest.json").read_text()) | kw))
def relink(f): outside = f.parents[2]/f.name; shutil.move(f, outside); f.symlink_to(outside)


def test_missing_folders_heads_and_ids(store, tmp_path):
    for p in (tmp_path/"nothing", tmp_path/"empty"):
        (tmp_path/"empty").mkdir(exist_ok=True)
        with pytest.raises(StoreError, match=p.name): open_states(p)
    states = open_states(store)
    with pytest.raises(StoreError) as e: check_states(states, make_head(seed=5))
    assert HEAD.hash in str(e.value) and make_head(seed=5).hash in str(e.value)
    with pytest.raises(StoreError, match="width 8"): check_states(states, make_head(dim=8))
    with pytest.raises(StoreError, match="draft_wrong"): next(states.batches("draft_wrong"))
    rewrite(store, 0, lambda t: t["target_ids"].fill_(50))
    with pytest.raises(StoreError, match="0..49, found 0..50"): open_states(store).target_ids(0)
    make_head(seed=5).save(store/"head.safetensors")
    with pytest.raises(StoreError, match=HEAD.hash): open_states(store).head()
    with pytest.raises(StoreError, match="found none"):
        (store/"manifest.json").unlink()
        writer(store)


def test_names_are_never_read_from_a_file(store):
    side = chunk_file(store, 4, "json")
    d = json.loads(side.read_text())
    for bad in (d | dict(start=0), d | dict(stop=2), d | dict(bytes="9"), d | dict(pairs=d["pairs"] * 9),
                d | dict(pairs=[d["pairs"][0] | dict(n_target=-1)]),
                d | dict(pairs=[d["pairs"][0] | dict(n_target=True)]),
                d | dict(pairs=[d["pairs"][0] | dict(clip_id=["../x"])]), d | dict(skipped=None),
                d | dict(skipped=["clip1"]), d | dict(skipped=[{"clip_id": 1}])):
        side.write_text(json.dumps(bad))
        with pytest.raises(StoreError): open_states(store)
    side.write_text(json.dumps(d | dict(file="../../etc/passwd"))) # not a field of ours: nobody looks
    assert len(open_states(store)) == TOTAL


def test_fuzz_only_our_errors(whole, tmp_path):
    rng, refused = random.Random(0), 0
    victims = [p.relative_to(whole) for p in (whole/"manifest.json", chunk_file(whole, 4, "json"),
                                              chunk_file(whole, 4))]
    store = tmp_path/"s"
    shutil.copytree(whole, store)
    for k in range(300):
        v = victims[k % 3]
        good = (whole/v).read_bytes()
        b = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(min(len(b), 900 if v.suffix == ".safetensors" else len(b)))
            how = rng.randrange(4)
            if how == 0: b[at] ^= 1 << rng.randrange(8)
            elif how == 1: del b[at:at + rng.randrange(1, 9)]
            elif how == 2: b[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
            else: b[at:at + 1] = rng.choice([b"9" * 30, b"-1", b"null", b"[", b'"', b"\\ud800", b"1e999", b"NaN"])
        (store/v).write_bytes(b)
        if v.suffix == ".safetensors": # let the sidecar agree, so that the header itself is tried
            side = chunk_file(store, 4, "json")
            side.write_text(json.dumps(json.loads(chunk_file(whole, 4, "json").read_text()) | dict(bytes=len(b))))
        try:
            states = open_states(store)
            for _ in states.batches("draft_free"): pass
            states.target_ids(5), states.split(.2)
        except StoreError as e:
            refused += 1
            assert "\n" not in str(e)
        for f in victims: shutil.copy(whole/f, store/f)
    assert refused > 150


# ---- the founding study's files

class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.system, (f"touch {self.path}",))


def test_malicious_pt_is_refused_and_nothing_runs(tmp_path):
    ran = tmp_path/"ran"
    import builtins
    import pickle
    class Eval:
        def __reduce__(self): return (builtins.eval, (f"open({str(ran)!r}, 'w')",))
    corpus = {"top": Touch(ran), "in config": dict(config=Touch(ran)), "in list": dict(metadata=[Touch(ran)]),
              "eval": dict(seq_lens=Eval()),
              "object array": dict(egpt_hidden=np.array([Touch(ran)], dtype=object))}
    for name, obj in corpus.items():
        f = tmp_path/f"{name}.pt"
        torch.save(obj, f)
        with pytest.raises(StoreError, match="restricted reader") as e: open_states(f)
        assert "\n" not in str(e.value) and str(f) in str(e.value)
    (tmp_path/"plain.pt").write_bytes(pickle.dumps(Touch(ran)))
    (tmp_path/"text.pt").write_text("hello")
    for f in ("plain.pt", "text.pt"):
        with pytest.raises(StoreError, match="a zip"): open_states(tmp_path/f)
    root = tmp_path/"folder"
    (root/"chunks").mkdir(parents=True)
    torch.save(Touch(ran), root/"chunks/chunk_000000.pt")
    with pytest.raises(StoreError): open_states(root)
    assert not ran.exists()


def test_truncated_pt(whole, tmp_path):
    pack_study(open_states(whole), tmp_path/"x.pt")
    good = (tmp_path/"x.pt").read_bytes()
    rng = random.Random(1)
    for n in [0, 1, 100, len(good) // 2, len(good) - 1]:
        (tmp_path/"x.pt").write_bytes(good[:n])
        with pytest.raises(StoreError): open_states(tmp_path/"x.pt")
    for _ in range(60):
        b = bytearray(good)
        for _ in range(4): b[rng.randrange(3000)] = rng.randrange(256)
        (tmp_path/"x.pt").write_bytes(b)
        try: list(open_states(tmp_path/"x.pt").batches("draft_free"))
        except StoreError as e: assert "\n" not in str(e)


def test_store_to_study_and_back(whole, tmp_path):
    states = open_states(whole)
    n = pack_study(states, tmp_path/"hidden.pt", dict(split="train", quant="4bit"))
    keep = [i for i in range(TOTAL) if min(len(pair(i).target_ids), len(pair(i).draft_ids)) >= 5]
    assert n == len(keep) < TOTAL and [p.name for p in tmp_path.iterdir()] == ["hidden.pt"]
    d = torch.load(tmp_path/"hidden.pt", weights_only=True)
    assert set(d) == {"egpt_hidden", "vl_hidden", "seq_lens", "metadata", "config", "target_ids", "draft_ids",
                      "target_margins", "draft_margins"}
    assert d["egpt_hidden"].dtype == torch.float32
    assert d["config"]["split"] == "train" and d["config"]["num_samples"] == n and d["config"]["hidden_dim"] == 12
    for k, i in enumerate(keep):
        p, m = pair(i), int(d["seq_lens"][k])
        assert m == min(len(p.target_ids), len(p.draft_ids)) == d["metadata"][k]["seq_len"]
        assert torch.equal(d["egpt_hidden"][k, :m], p.streams["draft_free"][:m].bfloat16().float())
        assert not d["egpt_hidden"][k, m:].any()
        assert torch.equal(d["vl_hidden"][k, :m], p.streams["target"][:m].bfloat16().float())
        assert d["metadata"][k]["vl_text"] == p.target_text and d["metadata"][k]["egpt_text"] == p.draft_text
    back = open_states(tmp_path/"hidden.pt")
    assert back.head() is None and (back.target_ids(0) == pair(keep[0]).target_ids[:back.pairs[0].n_target]).all()
    assert not check_states(back, HEAD)
    for a, b in zip(states.subset(keep).batches("draft_free", 4, 7), back.batches("draft_free", 4, 7), strict=True):
        if a.index == b.index:
            assert torch.equal(a.h_draft, b.h_draft) and torch.equal(a.h_target, b.h_target)
            assert torch.equal(a.ids, b.ids)
    assert back.clips == states.subset(keep).clips
    a, b = next(states.subset(keep).batches("draft_free")), next(back.batches("draft_free"))
    assert torch.equal(a.h_draft, b.h_draft) and torch.equal(a.h_target, b.h_target) and torch.equal(a.mask, b.mask)
    assert verify_store(tmp_path/"hidden.pt") == [("hidden.pt", "ok")]


def test_study_clip_names_and_index(tmp_path):
    def part(first):
        return dict(egpt_hidden=torch.ones(2, 6, 4), vl_hidden=torch.ones(2, 6, 4), seq_lens=torch.tensor([6, 5]),
                    metadata=[dict(sample_idx=first, question_idx=q, question="q", egpt_text="a", vl_text="b",
                                   seq_len=6) for q in range(2)])
    (tmp_path/"chunks").mkdir()
    for k in (0, 2): torch.save(part(k), tmp_path/f"chunks/chunk_{k:06d}.pt")
    assert open_states(tmp_path).clips == ["sample_0", "sample_2"] # without an index, by name
    for path in ("../x.pt", "/etc/passwd", "chunks/../../x.pt", "chunks/chunk_000009.pt", "a\0b", 3):
        (tmp_path/"index.json").write_text(json.dumps(dict(chunks=[dict(path=path)])))
        with pytest.raises(StoreError) as e: open_states(tmp_path)
        assert "index.json" in str(e.value)
    (tmp_path/"index.json").write_text(json.dumps(dict(chunks=[dict(path="chunks/chunk_000002.pt")],
                                                       config=dict(quant="4bit"))))
    states = open_states(tmp_path)
    assert states.clips == ["sample_2"] and states.manifest["config"] == dict(quant="4bit") and len(states) == 2


def test_writing_beside_the_studys_chunks_is_refused(tmp_path):
    (tmp_path/"chunks").mkdir()
    torch.save({}, tmp_path/"chunks/chunk_000000.pt")
    with pytest.raises(StoreError, match="another output folder"): writer(tmp_path)


def test_load_pt_reads_what_torch_saves(tmp_path):
    torch.save({"a": torch.arange(3), "b": [1, "x", None]}, tmp_path/"a.pt")
    assert load_pt(tmp_path/"a.pt")["b"] == [1, "x", None]


def test_index_is_a_summary_of_the_sidecars(store):
    before = (store/"index.json").read_bytes()
    (store/"index.json").unlink()
    assert rebuild_index(store)["pairs"] == TOTAL and (store/"index.json").read_bytes() == before


# Memory that is used again, rows that are looked at once

def test_a_batch_that_is_kept_never_changes(tmp_path):
    from featsd.state_goals import made_up
    states = made_up(tmp_path/"s", 40, 48, chunk_size=7)
    for flat in (False, True):
        for seed in (None, 1):
            kept = [(b, b.h_draft.clone(), b.h_target.clone())
                    for b in states.batches("draft_free", 3, seed, flat=flat)]
            assert all(torch.equal(b.h_draft, d) and torch.equal(b.h_target, t) for b, d, t in kept)
    places = {b.h_target.data_ptr() for b in states.batches("draft_free", 3)}
    assert len(places) < 14 # and one that is not kept gives its memory back


def test_flat_batches_are_the_unmasked_rows(tmp_path):
    from featsd.state_goals import made_up
    states = made_up(tmp_path/"s", 40, 48, chunk_size=7)
    for padded, flat in zip(*(states.batches("draft_free", 6, 5, flat=f) for f in (False, True)), strict=True):
        assert padded.index == flat.index and torch.equal(padded.mask, flat.mask) and torch.equal(padded.ids, flat.ids)
        assert torch.equal(padded.h_draft[padded.mask], flat.h_draft)
        assert torch.equal(padded.h_target[padded.mask], flat.h_target)


@pytest.mark.parametrize("dtype", ("bf16", "fp16", "fp32", "fp8"))
def test_rows_are_read_again_after_their_memory_was_given_back(tmp_path, dtype):
    from safetensors.torch import load_file

    from featsd.data.chunk import decode_rows
    from featsd.data.chunk import fill as copy
    fill(tmp_path/"s", manifest=SETTINGS | dict(dtype=dtype))
    states = open_states(tmp_path/"s")
    rows, file = states.source.open(1), chunk_file(states.path, SIZE)
    want = load_file(file)
    for s in states.manifest["streams"]:
        x = decode_rows(want[s], want.get(s + "_scale"))
        for _ in range(2):
            assert torch.equal(rows(s, 0, len(x)), x) and torch.equal(rows(s, 1, len(x) - 1), x[1:-1])
            rows.release(s, 0, len(x))
        to = torch.empty(len(x), x.shape[1])
        assert copy(to, s, [(rows, 0, len(x))], block_bytes=64) and torch.equal(to, x.float())
    assert rows("target", 3, 3).shape == (0, 16)
    os.truncate(file, os.path.getsize(file) // 2) # under an open file
    with pytest.raises(StoreError, match="chunk_000004.safetensors: expected .* bytes, found .*cut while it is read"):
        rows("target", 0, 1)


def test_one_very_long_answer_does_not_swell_every_row_of_its_batch(tmp_path, monkeypatch):
    from featsd.data import store as S
    def long(k, n):
        rows = {s: torch.zeros(n, 8) for s in ("target", "draft_forced", "draft_free")}
        return PairStates(f"c{k}", 0, "?", np.zeros(n, np.int64), np.zeros(n, np.int64), "", "", np.ones(n),
                          np.ones(n), rows)
    with StoreWriter(tmp_path/"s",
                     dict(target_model="t", draft_model="d", streams=["target", "draft_forced", "draft_free"],
                          target_dim=8, draft_dim=8), chunk_size=20) as w:
        w.missing(20)
        w.write_chunk(0, [long(k, 3000 if k == 11 else 3) for k in range(20)])
    states = open_states(tmp_path/"s")
    monkeypatch.setattr(S, "PADDED", 2**21) # 20 × 3,000 × 16 floats are 3.8 MB, of 0.2 MB of states
    for seed in (None, 0, 1):
        got = list(states.batches("draft_forced", 20, seed))
        assert sum(int(b.mask.sum()) for b in got) == 3057
        assert sorted(i for b in got for i in b.index) == list(range(20))
        assert max(b.h_target.nbytes + b.h_draft.nbytes for b in got) <= 2**21
    from featsd.data.feed import Feed
    monkeypatch.setattr("featsd.data.feed.LONGEST", 2999)
    with pytest.raises(FeatsdError, match="pair 11 has 3,000 positions, expected at most 2,999.*train L1 to L3"):
        Feed(states, "draft_forced", 20, sequences=True)
    monkeypatch.setattr("featsd.data.feed.LONGEST", 3000)
    for cache in (0, 2**30):
        whole = list(Feed(states, "draft_forced", 20, sequences=True, cache_bytes=cache).epoch(0))
        assert sum(len(t) for _, _, t, _ in whole) == 3057 and max(h.nbytes for h, *_ in whole) <= 2**21


@pytest.mark.parametrize("flat", (False, True))
def test_rows_that_are_not_finite_are_left_out_in_every_pass(tmp_path, flat, monkeypatch):
    from featsd.state_goals import made_up
    from featsd.data import chunk
    monkeypatch.setattr(chunk, "not_finite", lambda *a: 0) # a writer that does not look
    monkeypatch.setattr(chunk, "encode_rows",
                        lambda h, dtype: {"": h.clone().index_fill_(0, torch.tensor([3]), float("inf"))})
    states = made_up(tmp_path/"s", 12, 16, chunk_size=6)
    total = sum(p.n_target for p in states.pairs)
    for seed in (None, 0, None):
        got = list(states.batches("draft_forced", 4, seed, flat=flat))
        assert states.nan_rows == 2 and sum(int(b.mask.sum()) for b in got) == total - 2
        for b in got: assert b.h_target.isfinite().all() and b.h_draft.isfinite().all()
        if flat: assert sum(len(b.h_draft) for b in got) == total - 2


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def none(*_): raise OSError(9, "Bad file descriptor")
    monkeypatch.setattr("fcntl.flock", none)
    monkeypatch.setattr("fcntl.lockf", none)
    for group in (None, "launch-1"):
        say_once.cache_clear()
        lock = StoreLock(tmp_path, group)
        lock.share()
        lock.close()
        assert "no file locks here (Bad file descriptor); start one writer at a time" in caplog.text
    claims = Claims(tmp_path, Launch(0, 2, 0, 2, "g"), [(0, 4)], lambda *_: False)
    with pytest.raises(FeatsdError, match="no file locks here .* start one process"): next(iter(claims))
    claims.close()
