"The study's files and stores, one into the other and back: nothing changes, what is lost is said, a kill costs nothing"
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import HANG
from test_commands import run
from test_store import DRAFT, HEAD, TOTAL, fill, pair

from featsd.base.core import read_json, write_json
from featsd.data.chunk import StoreError
from featsd.data.store import StoreWriter, check_states, open_states, verify_store
from featsd.data.study import load_pt, pack_study
from featsd.files import convert

META = ("sample_idx", "question_idx", "question", "egpt_text", "vl_text", "seq_len")


def part(n=4, S=8, dims=(6, 6), first=0, kind=torch.float32, **more):
    "One file of the study: zero-padded states, lengths 5..S, two questions a clip"
    g = torch.Generator().manual_seed(first)
    lens = torch.tensor([5 + (k + first) % (S - 4) for k in range(n)])
    on = (torch.arange(S) < lens[:, None])[..., None]
    meta = [dict(zip(META, ((first + k) // 2, k % 2, f"question {k % 2}?", f"a car {k} ü", f"a road {k}",
                            int(lens[k])))) for k in range(n)]
    e, v = ((torch.randn(n, S, D, generator=g) * on).to(kind) for D in dims)
    return dict(egpt_hidden=e, vl_hidden=v, seq_lens=lens, metadata=meta) | more


def study(tmp, form):
    "The study's data in one of its forms"
    config = dict(split="train", duration="1s", quant="4bit", date="20260131", max_questions=10, hidden_dim=6,
                  dataset_dir="/somewhere", questions_file=None)
    if form.startswith("file"):
        path = tmp/"hidden_states_train_1s_4bit_20260131_top10q.pt"
        torch.save(part(9, kind=torch.float16 if form == "file fp16" else torch.float32,
                        dims=(6, 10) if form == "file two widths" else (6, 6), config=config), path)
        return path
    root = tmp/("chunked_train_1s_4bit_1f" if form == "folder 1f" else "chunked_train_1s_4bit")
    (root/"chunks").mkdir(parents=True)
    starts = (0, 1000, 2000) # a chunk holds fewer pairs than its range, where short ones were dropped
    for k, start in enumerate(starts):
        torch.save(part(4 - k, S=8 + k, first=10 * k, chunk_id=k, n_samples=4 - k), root/f"chunks/chunk_{start:06d}.pt")
    if form != "folder without index":
        write_json(root/"index.json", dict(total_samples=9, chunk_size=1000, created="2026-01-31T12:00:00",
                                           config=config | dict(frames=1 if form == "folder 1f" else 5),
                                           chunks=[dict(path=f"chunks/chunk_{s:06d}.pt", start_idx=s, n_samples=4 - k)
                                                   for k, s in enumerate(starts)]))
    return root


def same_pt(a, b):
    a, b = load_pt(a), load_pt(b)
    assert list(a) == list(b)
    for k in a:
        if isinstance(a[k], torch.Tensor): assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k
        else: assert a[k] == b[k] and json.dumps(a[k]) == json.dumps(b[k]), k


def same_study(a, b):
    if a.is_file(): return same_pt(a, b)
    names = lambda p: sorted(f.relative_to(p).as_posix() for f in p.rglob("*.pt"))
    assert names(a) == names(b) != []
    for f in names(a): same_pt(a/f, b/f)
    assert (a/"index.json").exists() == (b/"index.json").exists()
    assert (not (a/"index.json").exists() or read_json(a/"index.json") == read_json(b/"index.json"))


FORMS = ["file", "file fp16", "file two widths", "folder", "folder 1f", "folder without index"]


@pytest.mark.parametrize("form", FORMS)
def test_study_to_store_and_back(tmp_path, form):
    path = study(tmp_path, form)
    said = convert(path, tmp_path/"store", chunk_size=3, progress=False)
    assert "every state as it was" in said[0] and "token ids, margins, the stream draft_forced, the head" in said[1]
    assert len(said) == 2
    states, old = open_states(tmp_path/"store"), open_states(path)
    assert states.pairs == old.pairs and states.manifest["dtype"] == ("fp16" if form == "file fp16" else "fp32")
    for a, b in zip(states.batches("draft_free", 4), old.batches("draft_free", 4), strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.h_draft, b.h_draft) and torch.equal(a.h_target, b.h_target)
    assert states.target_ids(0) is states.draft_margins(0) is states.head() is None
    assert not check_states(states, type("H", (), dict(hidden_size=states.manifest["target_dim"], hash="x")))
    assert all(v == "ok" for _, v in verify_store(tmp_path/"store"))
    back = tmp_path/("back.pt" if path.is_file() else "back")
    said = convert(tmp_path/"store", back, progress=False)
    assert "every state as it was" in said[0] and not any("dropped" in s for s in said)
    same_study(path, back)


def test_the_other_form_holds_the_same_pairs(tmp_path):
    convert(study(tmp_path, "folder"), tmp_path/"store", progress=False)
    convert(tmp_path/"store", tmp_path/"one.pt", progress=False)
    one, three = load_pt(tmp_path/"one.pt"), open_states(tmp_path/"store")
    assert one["egpt_hidden"].shape == (9, int(max(one["seq_lens"])), 6) and one["config"]["frames"] == 5
    assert [list(m) for m in one["metadata"]] == [list(META)] * 9
    assert open_states(tmp_path/"one.pt").pairs == three.pairs
    said = convert(tmp_path/"store", tmp_path/"five", min_tokens=6, chunk_size=2, progress=False)
    five = open_states(tmp_path/"five")
    assert 0 < len(five) < 9 and said[-1] == f"dropped: {9 - len(five)} pairs of fewer than 6 tokens"


def states_of(states, stream="draft_free"):
    return {(p.clip_id, p.question_idx): (b.h_draft[r][b.mask[r]], b.h_target[r][b.mask[r]])
            for b in states.batches(stream, 3)
            for r, i in enumerate(b.index) for p in [states.pairs[i]]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("dest", ["back.pt", "back"])
def test_store_to_study_and_back(tmp_path, dtype, dest):
    fill(tmp_path/"store", manifest=dict(target_model="t", quant="4bit", dtype=dtype))
    said = convert(tmp_path/"store", tmp_path/dest, chunk_size=5, progress=False)
    a, study_states = open_states(tmp_path/"store"), open_states(tmp_path/dest)
    rows = [sum(len(x) - min(len(p.target_ids), len(p.draft_ids))
                for p, x in ((p, getattr(p, f"{side}_ids")) for p in map(pair, range(TOTAL))))
            for side in ("target", "draft")]
    assert said[-3:] == ["dropped: the stream draft_forced",
                         *(f"dropped: {n} rows of the {s} after the end of the shorter answer"
                           for n, s in zip(rows, ("target", "draft")))]
    assert ("as it is decoded" if dtype == "fp8" else "every state as it was") in said[0] and "target_ids" in said[1]
    assert "head.safetensors" in said[2]
    d = load_pt(tmp_path/dest if dest == "back.pt" else tmp_path/"back/chunks/chunk_000005.pt")
    assert {"egpt_hidden", "vl_hidden", "seq_lens", "metadata"} <= set(d) and d["egpt_hidden"].dtype == torch.float32
    assert set(META) < set(d["metadata"][0])
    assert len(study_states) == TOTAL
    said = convert(tmp_path/dest, tmp_path/"again", None if dtype == "fp8" else dtype, progress=False)
    b = open_states(tmp_path/"again")
    assert "every state as it was" in said[0] and "draft_forced" in said[1] and "head" not in said[1]
    assert b.head().hash == HEAD.hash and b.manifest["target_model"] == "t" and b.manifest["quant"] == "4bit"
    assert b.manifest["draft_head_hash"] == DRAFT.hash
    x, y = states_of(a), states_of(b)
    assert x.keys() == y.keys() and all(torch.equal(u, v) for k in x for u, v in zip(x[k], y[k]))
    for i in range(TOTAL):
        p, q, n = a.pairs[i], b.pairs[i], a.length(i, "draft_free")
        assert (p.clip_id, p.question_idx, p.question, p.target_text, p.draft_text,
                p.sequence) == (q.clip_id, q.question_idx, q.question, q.target_text, q.draft_text, q.sequence)
        assert q.n_target == q.n_draft == n
        for what in ("target_ids", "draft_ids", "target_margins", "draft_margins"):
            assert np.array_equal(getattr(a, what)(i)[:n], getattr(b, what)(i))
        # the file itself can be trained on with ids
        assert np.array_equal(study_states.target_ids(i)[:n], a.target_ids(i)[:n])
    assert all(v == "ok" for _, v in verify_store(tmp_path/"again"))
    convert(tmp_path/"again", tmp_path/f"2{dest}", progress=False)
    same_study(tmp_path/dest, tmp_path/f"2{dest}")


def test_rounding_is_said(tmp_path):
    path = study(tmp_path, "file")
    rows = 2 * int(load_pt(path)["seq_lens"].sum())
    assert convert(path, tmp_path/"s", "bf16",
                   progress=False)[0].endswith(f"LOSSY: {rows} rows written now were rounded")
    convert(tmp_path/"s", tmp_path/"even.pt", progress=False)
    a, b = load_pt(path), load_pt(tmp_path/"even.pt")
    assert torch.equal(a["egpt_hidden"].bfloat16().float(), b["egpt_hidden"])
    # what bf16 can hold is not rounded
    assert "every state as it was" in convert(tmp_path/"even.pt", tmp_path/"t", "bf16", progress=False)[0]


def test_what_json_cannot_hold_is_dropped_and_said(tmp_path):
    d = part(config=dict(a=1, shape=(3, 4)), mask=torch.ones(2))
    for m in d["metadata"]: m |= dict(score=.1 + .2, box=torch.zeros(1), note=["x", None])
    d["metadata"][2] = {"extra": 1} | d["metadata"][2]
    torch.save(d, tmp_path/"x.pt")
    said = convert(tmp_path/"x.pt", tmp_path/"s", progress=False)
    assert said[2:] == ["dropped, JSON cannot hold it: file['config']", "dropped, JSON cannot hold it: file['mask']",
                        "dropped, JSON cannot hold it: metadata['box']"]
    convert(tmp_path/"s", tmp_path/"y.pt", progress=False)
    want = [{k: v for k, v in m.items() if k != "box"} for m in d["metadata"]]
    assert load_pt(tmp_path/"y.pt")["metadata"] == want
    assert [list(m) for m in load_pt(tmp_path/"y.pt")["metadata"]] == [list(m) for m in want]


def test_names_of_the_studys_files_are_not_copied(tmp_path):
    "Odd names, the same number twice, absolute paths: the pairs come back, under names that are counted"
    root = tmp_path/"odd"
    for k, name in enumerate(("a/chunk_000000.pt", "b/chunk_000000.pt", "c.pt")):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(part(3, first=10 * k), root/name)
    write_json(root/"index.json", dict(chunks=[dict(path="a/chunk_000000.pt", x=1), dict(path="b/chunk_000000.pt"),
                                               dict(path=str(root/"c.pt"))], config=dict(a=1)))
    convert(root, tmp_path/"s", progress=False)
    convert(tmp_path/"s", tmp_path/"back", progress=False)
    assert [(c["path"], c.get("x"))
            for c in read_json(tmp_path/"back/index.json")["chunks"]] == [("chunks/chunk_000000.pt", 1),
                                                                          ("chunks/chunk_000003.pt", None),
                                                                          ("chunks/chunk_000006.pt", None)]
    shutil.rmtree(root)
    assert open_states(tmp_path/"back").pairs == open_states(tmp_path/"s").pairs
    assert len(open_states(tmp_path/"back")) == 9


def test_float64_is_rounded_and_said(tmp_path):
    d = part(kind=torch.float64, config={})
    d["vl_hidden"][0, 0] += 1e-12
    torch.save(d, tmp_path/"x.pt")
    assert convert(tmp_path/"x.pt", tmp_path/"s",
                   progress=False)[0].endswith("float64 stored as fp32: LOSSY: 1 rows written now were rounded")


# ---- killed at any instant

KILL = r'''
import os, random, signal, sys
from featsd import files
src, dest, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
def child(at):
    left = [at]
    def counted(fn):
        def run(*a, **kw):
            left[0] -= 1
            if left[0] == 0 and seed % 2: os.kill(os.getpid(), signal.SIGKILL)
            out = fn(*a, **kw)
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return out
        return run
    for name in ("fsync", "replace", "unlink", "posix_fallocate"): setattr(os, name, counted(getattr(os, name)))
    files.convert(src, dest, chunk_size=3, progress=False)
rng, kills = random.Random(seed), 0
while True:
    at = rng.randrange(1, 40)
    pid = os.fork()
    if pid == 0:
        try: child(at)
        except BaseException as e: print(repr(e)); os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): kills += 1
    else: sys.exit(3) if os.WEXITSTATUS(status) else print(kills); break
'''


@pytest.mark.parametrize("way", ["to store", "to folder", "to file"])
def test_killed_then_continued(tmp_path, way):
    if way == "to store": src = study(tmp_path, "folder")
    else: fill(src := tmp_path/"store", total=6, manifest=dict(dtype="bf16"))
    name = "d.pt" if way == "to file" else "d"
    (tmp_path/"whole").mkdir()
    convert(src, tmp_path/"whole"/name, chunk_size=3, progress=False)
    for seed in (0, 1) if way == "to store" else (1,): # even: after the operation, odd: before it
        (tmp_path/str(seed)).mkdir()
        dest = tmp_path/str(seed)/name
        r = subprocess.run([sys.executable, "-c", KILL, str(src), str(dest), str(seed)], capture_output=True, text=True,
                           timeout=HANG, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert r.returncode == 0, r.stdout + r.stderr
        assert way == "to file" or int(r.stdout) > 0
        a, b = ({f.relative_to(p).as_posix(): f for f in p.rglob("*") if f.is_file() and f.name != ".lock"}
                for p in (tmp_path/"whole", tmp_path/str(seed)))
        assert a.keys() == b.keys()
        for k in a:
            if k.endswith(".pt"): same_pt(a[k], b[k])
            elif way == "to store" or k.endswith("safetensors"):
                assert a[k].read_bytes() == b[k].read_bytes() or k.endswith("manifest.json"), k
        assert not [p for p in (tmp_path/str(seed)).rglob("*") if p.name.endswith(".tmp")]


def test_memory_stays_small(tmp_path):
    "Far less than the states, both ways"
    n, S, D = 160, 32, 1024
    torch.save(part(n, S, (D, D)), tmp_path/"x.pt")
    size, peak, on = 2 * n * S * D * 4, [0], [True]
    anon = lambda: next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                        if line.startswith("RssAnon"))
    def watch():
        while on[0]: peak[0] = max(peak[0], anon())
    convert(tmp_path/"x.pt", tmp_path/"warm", progress=False, chunk_size=8)
    before, t = anon(), threading.Thread(target=watch)
    t.start()
    try:
        convert(tmp_path/"x.pt", tmp_path/"s", progress=False, chunk_size=8)
        convert(tmp_path/"s", tmp_path/"y.pt", progress=False)
    finally: on[0] = False; t.join()
    same_pt(tmp_path/"x.pt", tmp_path/"y.pt")
    assert peak[0] - before < size / 2, (peak[0] - before, size)


# ---- bad input

def test_what_is_there_is_not_touched(tmp_path):
    path, other = study(tmp_path, "file"), tmp_path/"other"
    other.mkdir()
    (other/"mine.txt").write_text("x")
    with pytest.raises(StoreError, match="mine.txt"): convert(path, other, progress=False)
    with pytest.raises(StoreError, match="a file's name"): convert(path, tmp_path/"x.pt", progress=False)
    convert(path, tmp_path/"store", progress=False)
    torch.save(part(5), tmp_path/"second.pt")
    with pytest.raises(StoreError, match="store was made with"):
        convert(tmp_path/"second.pt", tmp_path/"store", progress=False)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="expected no such file"):
        convert(tmp_path/"store", tmp_path/"second.pt", progress=False)
    convert(tmp_path/"store", path, progress=False) # it is there already, state by state
    with pytest.raises(StoreError, match="mine.txt"): convert(tmp_path/"store", other, progress=False)
    convert(tmp_path/"store", tmp_path/"back", progress=False)
    with pytest.raises(StoreError, match="other settings"):
        convert(tmp_path/"store", tmp_path/"back", min_tokens=6, progress=False)
    convert(tmp_path/"store", tmp_path/"back", progress=False) # the same again is no error
    assert path.read_bytes() == before and sorted(p.name for p in other.iterdir()) == ["mine.txt"]


def test_study_json_is_trusted_by_its_hash_and_its_form(tmp_path):
    convert(study(tmp_path, "folder"), tmp_path/"s", progress=False)
    about = read_json(tmp_path/"s/study.json")
    about["files"][0]["width"] = 10**9
    write_json(tmp_path/"s/study.json", about)
    with pytest.raises(StoreError, match="sha256"): convert(tmp_path/"s", tmp_path/"x", progress=False)
    assert ("study.json", "ok") not in verify_store(tmp_path/"s")
    good = about | dict(files=[about["files"][0] | dict(width=8), *about["files"][1:]])
    for change in (about, good | dict(keys=[["a"]]), good | dict(pairs={"0": {"": 3}}),
                   good | dict(dtypes=["float32", "save"]), good | dict(files=[{}]), good | dict(index=3),
                   good | dict(files=[f | dict(extra=dict(vl_hidden=1)) for f in good["files"]]),
                   good | dict(files=[f | dict(start=0) for f in good["files"]]), []):
        write_json(tmp_path/"s/study.json", change)
        m = read_json(tmp_path/"s/manifest.json")
        write_json(tmp_path/"s/manifest.json",
                   m | dict(study=hashlib.sha256((tmp_path/"s/study.json").read_bytes()).hexdigest()))
        with pytest.raises(StoreError, match="found something else"):
            convert(tmp_path/"s", tmp_path/"x", progress=False)
    shutil.rmtree(tmp_path/"s")
    convert(tmp_path/"chunked_train_1s_4bit", tmp_path/"s", chunk_size=3, progress=False)
    for f in (tmp_path/"s/chunks").glob("chunk_000003.*"): f.unlink()
    with pytest.raises(StoreError, match="expected 9 pairs, found 6"):
        convert(tmp_path/"s", tmp_path/"x", progress=False)
    fill(tmp_path/"own")
    for f in (tmp_path/"own/chunks").glob("chunk_000008.*"): f.unlink()
    with pytest.raises(StoreError, match="none for pairs 8 to 11"):
        convert(tmp_path/"own", tmp_path/"x", progress=False)
    assert not (tmp_path/"x").exists()
    d = part()
    d["egpt_hidden"][1, 2, 3] = float("inf")
    torch.save(d, tmp_path/"inf.pt")
    assert "1 rows of draft_free" in verify_store(tmp_path/"inf.pt")[0][1]


def test_command(tmp_path):
    path = study(tmp_path, "folder")
    code, out, err = run("featsd_convert", path, tmp_path/"store")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path/"store") and "9 pairs" in out, err
    assert run("featsd_verify", tmp_path/"store")[0] == 0
    code, out, _ = run("featsd_convert", tmp_path/"store", tmp_path/"back")
    assert code == 0 and "every state as it was" in out
    same_study(path, tmp_path/"back")


def bad(tmp):
    path = study(tmp, "file")
    pairs = [pair(k) for k in range(4)]
    for p in pairs: del p.streams["draft_free"]
    with StoreWriter(tmp/"store", dict(streams=["target", "draft_forced"], draft_dim=12), HEAD) as w:
        w.write_chunk(0, pairs)
    (tmp/"empty").mkdir()
    torch.save([1], tmp/"list.pt")
    with open(tmp/"cut.pt", "wb") as f: f.write(path.read_bytes()[:300])
    d = part()
    d["vl_hidden"][0, 1, 2] = float("nan")
    torch.save(d, tmp/"nan.pt")
    d = part()
    for m in d["metadata"]: del m["question_idx"]
    torch.save(d, tmp/"twice.pt")
    return [([tmp/"nowhere", tmp/"d"], "nowhere"), ([tmp/"empty", tmp/"d"], "neither"),
            ([tmp/"list.pt", tmp/"d"], "expected the keys"), ([tmp/"cut.pt", tmp/"d"], "cut.pt"),
            ([tmp/"nan.pt", tmp/"d"], "not finite"), ([tmp/"twice.pt", tmp/"d"], "comes twice"),
            ([path, tmp/"d", "--dtype", "int3"], "int3"), ([path, path], "a file's name"),
            ([path, tmp/"d", "--chunk_size", "0"], "at least 1"),
            ([path, tmp/"d", "--min_tokens", "5"], "keeps every pair"), ([tmp/"store", tmp/"d.pt"], "draft_free"),
            ([tmp/"store", tmp/"d.pt", "--dtype", "bf16"], "float32"), ([tmp/"store", tmp/"cut.pt"], "draft_free")]


@pytest.mark.parametrize("case", range(13))
def test_bad_input_is_one_line_and_status_2(tmp_path, case):
    args, said = bad(tmp_path)[case]
    code, _, err = run("featsd_convert", *args)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("d*/chunks/*"))


def test_packed_by_extraction_holds_ids(tmp_path):
    fill(tmp_path/"s")
    pack_study(open_states(tmp_path/"s"), tmp_path/"x.pt")
    states = open_states(tmp_path/"x.pt")
    assert states.target_ids(0) is not None and states.target_ids(0).dtype == np.int64
    d = load_pt(tmp_path/"x.pt")
    d["target_ids"] = d["target_ids"].float()
    torch.save(d, tmp_path/"y.pt")
    with pytest.raises(StoreError, match="target_ids"): open_states(tmp_path/"y.pt")


def test_texts_and_ids_as_parquet(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    from featsd.data.store import open_states
    from featsd.files import convert
    from featsd.extract import extract
    store = extract(tmp_path, max_samples=2, max_questions=2, quant="fp32", split="test", max_new_tokens=6,
                    progress=False)
    assert "4 pairs" in convert(store, tmp_path/"m.parquet")[0]
    states, rows = open_states(store), pq.read_table(tmp_path/"m.parquet").to_pylist()
    assert [r["target_ids"] for r in rows] == [states.target_ids(i).tolist() for i in range(4)]
    assert [(r["clip_id"], r["question"], r["target_text"]) for r in rows] == [(p.clip_id, p.question, p.target_text)
                                                                               for p in states.pairs]
