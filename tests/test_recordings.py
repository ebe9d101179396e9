"Event files, data sets and logs as people have them: bad parts are counted, options are heard, nobody is mistaken"
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import run
from tiny_checkpoints import write_eventgpt, write_videollava

from featsd.base.core import FeatsdError, say_once
from featsd.compare import Fitting, HeldOut, run_comparison
from featsd.data.acceptance import acceptance_of, is_acceptance, read_acceptance
from featsd.data.answers import read_answers
from featsd.data.build import build_dataset
from featsd.data.clips import LISTING, open_clips, shown_to
from featsd.data.events import read_events
from featsd.data.store import open_states
from featsd.extract import extract
from featsd.models.backbone import load_backbone, load_pair
from featsd.race import Procedure

h5py = pytest.importorskip("h5py")


@pytest.fixture(autouse=True)
def heard_anew(): say_once.cache_clear()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")/"50% of what?a=1&b, c"
    write_eventgpt(root/"eg"), write_videollava(root/"vl")
    return root


def events(seed, n=400):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 90_000, n))
    return {"x": rng.integers(0, 33, n).astype(np.uint16), "y": rng.integers(0, 24, n).astype(np.uint16),
            "t": t.astype(np.int64), "p": rng.integers(0, 2, n).astype(np.uint8)}


def dataset(root, clips, frames=20, split="train"):
    rows = []
    for name, columns in clips.items():
        (root/"event_npy"/name).parent.mkdir(parents=True, exist_ok=True)
        np.save(root/"event_npy"/f"{name}.npy", np.array(columns, dtype=object), allow_pickle=True)
        (root/"video"/name).mkdir(parents=True)
        for i in range(frames):
            Image.fromarray(np.full((26, 35, 3), 12 * i, np.uint8)).save(root/"video"/name/f"{i:06d}.png")
        rows.append({"id": name, "split": split, "event_data": f"{name}.npy", "video_data": name})
    (root/LISTING).write_text(json.dumps(rows))
    return root


ASKED = ["--quant", "fp32", "--max_questions", "1", "--max_new_tokens", "3", "--chunked", "--chunk_size", "2"]


def extracted(models, data, out, options="", **more):
    pair = f"draft={models/'eg'}{more.get('draft', '')},target={models/'vl'}{options}"
    code, _, err = run("featsd_extract", "--dataset_dir", data, "--output_dir", out, "--pair", pair, *ASKED)
    return code, err, out/"chunked_train_1s_fp32"


# ---- options
def test_an_option_is_read_by_its_type_and_a_path_may_hold_anything(models):
    eg = f"{models/'eg'}"
    for text, is_ in (("no", False), ("off", False), ("yes", True)):
        b = load_backbone(f"{eg}?adaptor_twice={text}")
        assert (b.name == "eg (adaptor_twice=True)") == is_
    for bad, said in (("adaptor_twice=maybe", "expected yes or no"), ("frames=1.5", "expected a whole number"),
                      ("polarity_order=first", "one of last, blue_last"), ("frames", "name=value"),
                      ("frames=1&frames=5", "each once"), ("colour=1", "it takes device, frames")):
        with pytest.raises(FeatsdError, match=said): load_backbone(f"{eg}?{bad}")
    pair = load_pair(f"draft={eg}?frames=1,target={models/'vl'}?all_ids=no")
    assert pair.draft.frames == 1 and pair.draft.name == "eg (frames=1)" and pair.target.name == "vl"
    assert load_pair(f"target={models/'vl'},draft={eg}").draft.frames == 5


def test_options_about_frames_reach_the_reader(models, tmp_path):
    data = dataset(tmp_path/"ds", {"s0/000000": events(1)})
    for option in ("", "?frames=16", "?frame_rule=arange"):
        m = load_backbone(f"{models/'vl'}{option}")
        clip = shown_to(open_clips(data, "train"), m)[0]
        whole = SimpleNamespace(id="c", meta={}, frames=np.stack([np.full((26, 35, 3), 12 * i, np.uint8)
                                                                  for i in range(20)]))
        assert torch.equal(m.see(clip), m.see(whole)) and len(clip.frames) == m.frames
    with pytest.raises(FeatsdError, match="read with 8 of 20 frames"): m.see(open_clips(data, "train")[0])


# ---- events
def test_one_bad_clip_ends_nothing_and_stays_counted(models, tmp_path, caplog):
    clips = {f"s{i}/{j:06d}": events(10 * i + j) for i in range(2) for j in range(2)}
    clips["s0/000001"]["x"][7] = 65534 # a negative that wrapped
    clips["s1/000000"]["x"] = clips["s1/000000"]["x"] * 1900 # no stray: the whole stream is of no sensor
    clips["s1/000000"]["y"] = clips["s1/000000"]["y"] * 2000
    data = dataset(tmp_path/"ds", clips)
    for _ in range(2): # the second time changes nothing
        code, err, store = extracted(models, data, tmp_path/"out")
        assert code == 0, err
        s = open_states(store)
        assert s.clips == ["s0/000000", "s0/000001", "s1/000001"]
        kept = {f.name: f.stat().st_mtime_ns for f in (store/"chunks").iterdir()}
    assert "1 events outside the sensor left out" in caplog.text
    skipped = [x for f in store.glob("chunks/*.json") for x in json.loads(f.read_text())["skipped"]]
    assert [x["clip_id"] for x in skipped] == ["s1/000000"] and "pixels" in skipped[0]["reason"]
    assert kept == {f.name: f.stat().st_mtime_ns for f in (store/"chunks").iterdir()}
    np.save(data/"event_npy/s0/000000.npy", np.array(events(99), dtype=object), allow_pickle=True)
    extracted(models, data, tmp_path/"out")
    assert "s0/000000: its files have changed" in caplog.text
    extracted(models, data, tmp_path/"fresh")
    for f in (store/"chunks").glob("*"):
        assert f.read_bytes() == (tmp_path/"fresh/chunked_train_1s_fp32/chunks"/f.name).read_bytes()


@pytest.mark.parametrize("index", ["right", "of twice as many", "negative", "short"])
def test_an_index_is_a_hint(tmp_path, index, caplog):
    rng = np.random.default_rng(1)
    full = np.sort(rng.integers(0, 100_000, 4000))
    t = full[::2]
    at = np.searchsorted(full if index == "of twice as many" else t, np.arange(100) * 1000).astype(np.int64)
    if index == "negative": at -= 50
    if index == "short": at = at[:30]
    with h5py.File(tmp_path/"e.h5", "w") as f:
        for k, v in {"x": t % 7, "y": t % 5, "p": t % 2, "t": t}.items(): f[f"events/{k}"] = v
        f["ms_to_idx"] = at
    for a, b in ((0, 5000), (20_000, 60_000), (90_000, 200_000)):
        e = read_events(tmp_path/"e.h5", window_us=(a, b))
        assert (e.t == t[(t >= a) & (t < b)]).all()
    assert ("does not fit" in caplog.text) == (index in ("of twice as many", "negative", "short")) or index == "short"


# ---- whose states
def test_states_of_another_draft_are_refused_everywhere(models, tmp_path):
    from featsd.nulls import measure
    from featsd.train import open_data, train_adapter
    train = dataset(tmp_path/"ds", {f"s{i}/{j:06d}": events(10 * i + j) for i in range(2) for j in range(2)})
    test = dataset(tmp_path/"dt", {f"t{i}/000000": events(50 + i) for i in range(2)})
    mine = extracted(models, train, tmp_path/"a")[2]
    other = extracted(models, test, tmp_path/"b", draft="?frames=1")[2]
    same = extracted(models, test, tmp_path/"c")[2]
    run_ = train_adapter(mine, adapter_level=1, num_epochs=1, output_dir=tmp_path/"run", progress=False)
    with pytest.raises(FeatsdError, match=r"another draft, eg \(frames=1\).*than.*was made with, eg "):
        measure(run_["best_model"], open_states(other), n_boot=5)
    with pytest.raises(FeatsdError, match="another draft"): open_data(mine, other, 0, 0)
    m = measure(run_["best_model"], open_states(same), open_states(mine), n_boot=5)
    assert not [n for n in m.notes if "draft it was made" in n or "overlap" in n]


def test_one_recording_is_split_by_time(models, tmp_path, caplog):
    clips = {}
    for k in range(8): # cut with overlap: each clip shares half its time with the next
        clips[f"s/{k:06d}"] = {**(e := events(k)), "t": e["t"] + 45_000 * k}
    store = extracted(models, dataset(tmp_path/"ds", clips, 3), tmp_path/"o")[2]
    s = open_states(store)
    for seed in range(4):
        train, val = s.split(.25, seed)
        spans = [{p.clip_id: p.span for p in x.pairs}.values() for x in (train, val)]
        assert len(val.clips) == 2 and len(train) and all(a[1] < b[0] or b[1] < a[0] for a in spans[0]
                                                          for b in spans[1])
    assert "reach into their time are left out" in caplog.text
    for f in (store/"chunks").glob("*.json"): # an older store says nothing of times
        d = json.loads(f.read_text())
        for p in d["pairs"]: del p["span"], p["files"]
        f.write_text(json.dumps(d))
    train, val = open_states(store).split(.25, 0)
    assert len(val.clips) == 2 and 4 <= len(train.clips) <= 5 and "is not known" in caplog.text


# ---- records
ROW = {"clip_id": "a", "question": "q", "draft_ids": [1, 2], "target_ids": [3], "draft_text": "x", "target_text": "y"}


def test_a_record_counts_once_and_a_contradiction_is_refused(tmp_path, caplog):
    log = tmp_path/"log.jsonl"
    log.write_text("\n".join(map(json.dumps, [ROW, ROW | {"clip_id": "b"}, ROW])))
    a = read_answers(log)
    assert len(a) == 2 and "line 3: the record of line 1 again" in a.skipped[0] and "counted once" in caplog.text
    log.write_text("\n".join(map(json.dumps, [ROW, ROW | {"target_ids": [4]}])))
    with pytest.raises(FeatsdError, match="line 2: clip 'a'.*another answer than in line 1"): read_answers(log)
    assert len(read_answers(log, skip_bad=True)) == 1
    log.write_text("\n".join(json.dumps(ROW | {"clip_id": c, "models": {"target": f"{c} fp32 m"}}) for c in "ab"))
    with pytest.raises(FeatsdError, match="2 pairs of models"): read_answers(log)


def test_an_engines_log_says_which_draft_it_wanted(tmp_path):
    log = tmp_path/"engine.jsonl"
    good, bad = acceptance_of([4, 3, 4, 0], [4] * 4, 4), acceptance_of([0, 0, 1, 0], [4] * 4, 4)
    log.write_text("\n".join(json.dumps({"model": m, "metrics": {"speculative_decoding": r}})
                             for m, r in (("eagle", good), ("ngram", bad))))
    assert is_acceptance(log)
    code, out, err = run("featsd_replay", "--answers", log, "--timing", "published", "--out", tmp_path/"r")
    assert code == 0 and "wanted: " in out and "eagle" in out, err
    assert json.loads((tmp_path/"r/acceptance.json").read_text())["rows"]


@pytest.mark.parametrize("who", [{"request_id": "r"}, {"id": "cmpl-r"}, {"clip_id": "c", "question": "q"}])
def test_a_request_counts_once_and_a_contradiction_is_refused(tmp_path, who, caplog):
    log, r = tmp_path/"engine.jsonl", acceptance_of([4, 3, 4, 0], [4] * 4, 4)
    write = lambda *rows: log.write_text("\n".join(map(json.dumps, rows)))
    write(who | r, {k: v + "2" for k, v in who.items()} | r, who | r, {"drafter": "another"} | who | r, r, r)
    assert [len(x) for x in read_acceptance(log).values()] == [4, 1] # two that nobody can tell apart count as two
    assert "1 requests come twice, each is counted once; the first: line 3" in caplog.text
    write(who | r, who | acceptance_of([0], [4], 4))
    with pytest.raises(FeatsdError, match="line 2: request .* other numbers than in line 1"): read_acceptance(log)


def test_an_output_that_cannot_be_written_is_said_first(tmp_path):
    (tmp_path/"taken").write_text("a file where a folder would be made")
    at = tmp_path/"taken"/"out"
    for name, *args in (("featsd_extract", "--output_dir", at), ("featsd_compare", "--out", at),
                        ("featsd_timeline", "--output_dir", at), ("featsd_demo", "--out", at),
                        ("featsd_pocket_train", "--output_dir", at), ("featsd_bench", "--json", at/"b.json"),
                        ("featsd_decode", "--certificate", at/"c.json"),
                        ("featsd_extract", "--checkpoint_name", "../x", "--output_dir", tmp_path/"fine")):
        code, out, err = run(name, *args)
        assert code == 2 and len(err.strip().splitlines()) == 1 and not out, (name, err)
    assert not (tmp_path/"fine").exists()


# ---- EvQA
OWN = ("Where does it go?",), ("What blinks?",), ("Where does it go?", "Who is there?") # of each sequence
PAIR = "draft={0}/eg?max_duration_us=none,target={0}/vl?frames=2"


@pytest.fixture(scope="module")
def evqa(tmp_path_factory):
    root, rows = tmp_path_factory.mktemp("evqa"), []
    for k, both in enumerate((True, False, True)):
        file = root/"h5_files/set"/f"part/seq{k}.h5"
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(k)
        t = np.sort(rng.integers(10**9, 10**9 + 10**6, 3000)).astype(np.uint64)
        t[0] = 10**9
        with h5py.File(file, "w") as f:
            for name, v in {"xs": rng.integers(0, 40, 3000), "ys": rng.integers(0, 30, 3000), "ts": t,
                            "ps": rng.integers(0, 2, 3000)}.items(): f[f"events/{name}"] = v
            for i in range(20 * both):
                d = f.create_dataset(f"images/image{i:09d}", data=np.full((30, 40), 10 * i, np.uint8))
                d.attrs["timestamp"], d.attrs["event_idx"] = 10**9 + 50_000 * i, 0
        rows += [{"dataset_name": "set", "file_path": f"part/seq{k}.h5", "question": q,
                  "choices": ["left", "right", "up", "down"], "answer": "A"} for q in OWN[k]]
    (root/"questions").mkdir()
    (root/"questions/q.json").write_text(json.dumps({"questions": rows}))
    return root


def built(evqa, out, split="train", **more):
    return build_dataset([evqa], out, duration="400ms", mp4=False, progress=False, split=split, **more)


def test_evqa_becomes_a_data_set(evqa, tmp_path):
    said = built(evqa, tmp_path)
    assert said.sequences == 2 and ("set_part_seq1", "no images: one sensor only") in said.skipped
    data = open_clips(tmp_path)
    assert len(data) == said.clips == 6
    clip = data[1]
    assert clip.events.t[0] >= 10**9 + 200_000 and clip.meta["total_frames"] == 8
    assert clip.frames[0, 0, 0, 0] == 40 and clip.sequence == "set_part_seq0"
    assert [c.meta["questions"] for c in data] == [[*OWN[0]]] * 3 + [[*OWN[2]]] * 3
    again = built(evqa, tmp_path, choices=True) # the clips are the same
    choices = " (A) left (B) right (C) up (D) down Answer with the letter."
    assert again.made == 0 and open_clips(tmp_path)[0].meta["questions"] == [OWN[0][0] + choices]
    built(evqa, tmp_path/"all", questions=["Who?"])
    assert open_clips(tmp_path/"all").questions == ["Who?"] and "questions" not in open_clips(tmp_path/"all")[0].meta
    rows = json.loads((tmp_path/LISTING).read_text())
    (tmp_path/LISTING).write_text(json.dumps([*rows, rows[0] | {"questions": ["Another?"]}]))
    with pytest.raises(FeatsdError, match="entry 6: .* other questions"): open_clips(tmp_path)


def test_images_of_evqa_that_come_unevenly_are_cut_by_time(evqa, tmp_path):
    file = evqa/"h5_files/set/part/seq0.h5"
    late = [50_000 * i + 300_000 * (i >= 4) for i in range(20)]
    shutil.copytree(evqa, tmp_path/"evqa")
    with h5py.File(tmp_path/"evqa"/file.relative_to(evqa), "a") as f:
        for i, t in enumerate(late): f[f"images/image{i:09d}"].attrs["timestamp"] = 10**9 + t
    built(tmp_path/"evqa", tmp_path/"ds")
    for i, clip in enumerate(c for c in open_clips(tmp_path/"ds") if c.sequence == "set_part_seq0"):
        screen = [max(k for k, at in enumerate(late) if at <= t + 200_000 * i) for t in range(0, 400_000, 50_000)]
        assert (clip.frames[:, 0, 0, 0] // 10).tolist() == screen


def test_every_clip_is_asked_its_own_questions(evqa, models, tmp_path):
    built(evqa, tmp_path/"ds")
    pair = load_pair(PAIR.format(models))
    made = dict(dataset_dir=tmp_path/"ds", pair=pair, duration="400ms", quant="fp32", max_new_tokens=3, progress=False)
    whole = open_states(extract(tmp_path/"whole", **made))
    want = [(f"set_part_seq{k}/{i:06d}", q) for k in (0, 2) for i in range(3) for q in OWN[k]]
    assert [(p.clip_id, p.question) for p in whole.pairs] == want
    assert whole.manifest["questions"] == [*OWN[2]] and whole.manifest["questions_a_clip"] == 2
    few, store = dict(made, chunk_size=3, batch_clips=2), tmp_path/"parts"
    extract(store, max_samples=4, **few) # chunks end inside a clip, and grow
    parts = open_states(extract(store, **few))
    assert [(p.clip_id, p.question_idx, p.question) for p in parts.pairs] == \
        [(p.clip_id, p.question_idx, p.question) for p in whole.pairs]
    assert all((parts.target_ids(i) == whole.target_ids(i)).all() for i in range(len(want)))
    with pytest.raises(FeatsdError, match="this store was made with"): extract(store, max_questions=1, **few)
    rows = json.loads((tmp_path/"ds"/LISTING).read_text())
    rows[0]["questions"] = ["Another?"]
    (tmp_path/"ds"/LISTING).write_text(json.dumps(rows))
    with pytest.raises(FeatsdError, match="dataset = "): extract(store, **few) # another question is another data set


def test_a_comparison_asks_each_clip_its_own_questions(evqa, models, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path/"home"))
    built(evqa, tmp_path/"ds")
    rows = json.loads((tmp_path/"ds"/LISTING).read_text())
    for r in rows: r["split"] = "test" if "seq2" in r["id"] else "train"
    (tmp_path/"ds"/LISTING).write_text(json.dumps(rows))
    held, how = HeldOut(str(tmp_path/"ds"), clips=2), Procedure((2,), 3, plain_runs=1, transformers=False)
    c = run_comparison(PAIR.format(models), ["ngram", "template"], held, Fitting(), how, tmp_path/"out",
                       progress=False, say=lambda *_: None)
    assert c.questions == [*OWN[2]] * 2 and not any(r.broken for r in c.rows)
    (words,) = (tmp_path/"home/words").glob("*.jsonl")
    assert read_answers(words).questions == [*OWN[0]] * 3
