"Sound files of every kind, mutated by a seeded hand: a reader gives a result or one of our errors in one line, never anything else"
import copy
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import featsd.commands as commands
from featsd.adapters import create_adapter, load_any_adapter, load_pretrained, save_checkpoint, save_pretrained
from featsd.base.core import read_json
from featsd.data.answers import Answers, read_answers, write_answers
from featsd.data.clips import LISTING, open_clips, read_questions
from featsd.data.frames import read_video
from featsd.data.events import read_events
from featsd.models.words import NGramTable
from featsd.data.store import StoreWriter, open_states, verify_store
from featsd.data.study import pack_study
from featsd.base.processes import Heartbeat, read_heartbeat
from featsd.data.head import Head
from featsd.models.backbone import load_pair
from featsd.replay import replay
from featsd.base.costs import plan
from featsd.timeline import curves_of, read_timing, timing_report
from featsd.runs import find_run, read_result
from featsd.train import HiddenAdapterTrainer, new_adapter, train_adapter
from test_hostile import refused
from test_train import make_head, make_store

JUNK = (None, True, -1, 0, 1, 2**31, 2**63, 2**70, -2**40, .5, -0., float("nan"), float("inf"), 1e308, 5e-324, "", "x", "../../etc/passwd", "\0", "\ud800", "\x1b[2J\n", "9" * 40, "nan", [], {}, [[]], [None],
        {"a": {"b": []}}, [0] * 300, ["x"] * 3, "L9", "bf16", "a" * 5000)
BITS = (b"9" * 30, b"-1", b"null", b"[", b'"', b"\\ud800", b"1e999", b"NaN", b"{}", b"\0" * 8, b"\xff" * 8, b"PK\x03\x04", b"cos\nsystem\n", b"..", b"\n")


def mutated(data, rng, head=4000):
    "A few bytes flipped, cut, doubled, moved or replaced; half of the time where formats keep their headers"
    b = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not b: break
        at, how = rng.randrange(min(len(b), head) if rng.random() < .5 else len(b)), rng.randrange(7)
        if how == 0: b[at] ^= 1 << rng.randrange(8)
        elif how == 1: b[at] = rng.randrange(256)
        elif how == 2: del b[at:at + rng.choice((1, 4, 100))]
        elif how == 3 and rng.random() < .5: del b[at:]
        elif how == 4: b[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif how == 5: k = rng.randrange(len(b)); b[at:at + 16] = b[k:k + 16]
        else: bit = rng.choice(BITS); b[at:at + rng.choice((0, len(bit)))] = bit
    return bytes(b)


def swapped(data, rng):
    "JSON with values replaced by junk, keys dropped, or entries doubled: what a mutated byte seldom makes"
    obj = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places, stack = [], [obj]
        while stack:
            x = stack.pop()
            for k, v in x.items() if isinstance(x, dict) else enumerate(x):
                places.append((x, k))
                if isinstance(v, (dict, list)): stack.append(v)
        if not places: break
        x, k = rng.choice(places)
        how = rng.random()
        if how < .1: del x[k]
        elif how < .2 and isinstance(x, dict): x[rng.choice(("x", "", "__class__", "target", "a\nb"))] = copy.deepcopy(rng.choice(JUNK))
        elif how < .3 and isinstance(x, list): x.append(copy.deepcopy(x[k]))
        else: x[k] = copy.deepcopy(rng.choice(JUNK))
    return json.dumps(obj).encode()


def mutate(data, rng, kind):
    if kind in ("json", "jsonl") and rng.random() < .6:
        if kind == "json": return swapped(data, rng)
        lines = data.splitlines()
        k = rng.randrange(len(lines))
        return b"\n".join(lines[:k] + [swapped(lines[k], rng)] + lines[k + 1:])
    return mutated(data, rng)


# ---- sound files, and how each is used

def all_of(states):
    for s in states.manifest["streams"][1:]: list(states.batches(s, 4))
    for k in range(len(states)): states.target_ids(k), states.draft_margins(k)
    states.head(), states.clips, repr(states)
    if len(states.clips) > 1: states.split(.3)


def append(store):
    "The writer too reads what is there"
    m = {k: v for k, v in json.loads((store.parent/"store.manifest").read_text()).items() if k not in ("schema", "chunk_size", "tie", "min_agreement")}
    with StoreWriter(store, m, make_head(), chunk_size=25) as w: w.missing(12)


def log():
    ids = [np.array([1 + k % 2, 2, 3, 4 + k % 3]) for k in range(12)]
    return Answers([f"c{k // 2}" for k in range(12)], [f"q{k % 2}" for k in range(12)], ids, ids, ["a"] * 12, ["b"] * 12, "hash")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "kind of file -> (folder that is copied, name of the file in it, kind of its text, reader of the folder)"
    g = tmp_path_factory.mktemp("sound")
    torch.set_num_threads(1)
    (g/"s").mkdir()
    store = make_store(g/"s"/"store", pairs=12)
    shutil.copy(store/"manifest.json", g/"s"/"store.manifest")
    r = train_adapter(store, num_epochs=2, output_dir=g/"runs", progress=False, val_split=.3)
    run = Path(r["folder"])
    train, val = open_states(store).split(.3)
    def trainer(): return HiddenAdapterTrainer(new_adapter(1, train.manifest, None, 0), train, val, head=train.head())
    t = trainer()
    t.fit() if t.settings.num_epochs < 3 else [t.history.setdefault(k, []).append(v) for k, v in (t.train_epoch(1) | t.validate()).items()]
    t.save_state(run/"state.pt")
    config = read_json(run/"config.json")
    o = g/"other"
    o.mkdir()
    pack_study(open_states(store), o/"study.pt", {"split": "train"}, min_tokens=1)
    save_checkpoint(create_adapter(1, 16), o/"adapter.pt", metrics={"val_loss": .5})
    save_pretrained(create_adapter(4, 16, num_heads=4), o/"pretrained")
    make_head().save(o/"head.safetensors")
    NGramTable(log().target_ids, order=3).save(o/"table.safetensors")
    write_answers(o/"log.jsonl", log())
    (o/"study.json").write_text(json.dumps({"eventgpt_success": 3, "results": [dict(sample_idx=k, query="q", egpt_tokens=[1, 2, 3], vl_tokens=[1, 2, 4], egpt_text="a", vl_text="b") for k in range(3)]}))
    (o/"timing.json").write_text(json.dumps(dict(draft_prefill_ms=130., draft_token_ms=25., target_prefill_ms=310., target_token_ms=25., adapter_ms=1.5, verify={"1": 1., "4": 1.3, "8": 1.6}, measured=True,
                                                 spread={"draft_token_ms": [24., 26.]}, source="here")))
    (o/"metrics.json").write_text(json.dumps({"streams": {"draft_forced": {"cycle_prefix": {"3": [.8, .5, .2], "5": [.8, .5, .2, .1, .1]}}, "draft_free": {"curves_token": {"prefix": [.5, .2]}}}}))
    (o/"questions.json").write_text(json.dumps([dict(question=f"what is {k}?", count=k) for k in range(4)]))
    (o/LISTING).write_text(json.dumps([dict(id=f"c{k}", split="train", event_data=f"s/{k}.npy", video_data=f"s/{k}", mp4_data=f"s/{k}.mp4") for k in range(4)]))
    (o/"dataset.json").write_text(json.dumps({"schema": "featsd dataset 1", "settings": {"duration": "1s"}, "sequences": {}}))
    heart = Heartbeat(o/"h", 9)
    heart.beat()
    pair = g/"pair"
    shutil.copytree(Path(commands.__file__).parent/"models"/"pocket_weights"/"draft", pair)
    cols = {k: np.arange(40, dtype="i8") % 2 if k in "xyp" else np.arange(40, dtype="i8") for k in "xytp"}
    np.save(o/"e.npy", cols, allow_pickle=True)
    np.savez_compressed(o/"e.npz", **cols)
    (o/"e.txt").write_text("".join(f"{k} {k} {9 * k} {k % 2}\n" for k in range(40)))
    s, p = g/"s", lambda d: load_pair(draft=d, target=d)
    kinds = {
        **{f"store {n}": (s, f"store/{n}", "json" if n.endswith("json") else "", lambda d: all_of(open_states(d/"store"))) for n in ("manifest.json", "chunks/chunk_000000.json", "chunks/chunk_000000.safetensors", "head.safetensors")},
        "store index.json": (s, "store/index.json", "json", lambda d: append(d/"store")), "store manifest.json, written to": (s, "store/manifest.json", "json", lambda d: append(d/"store")),
        "store sidecar, verified": (s, "store/chunks/chunk_000000.json", "json", lambda d: verify_store(d/"store")),
        "study file": (o, "study.pt", "", lambda d: all_of(open_states(d/"study.pt"))), "adapter": (o, "adapter.pt", "", lambda d: load_any_adapter(d/"adapter.pt")[0](torch.zeros(1, 2, 16))),
        **{f"pretrained {n}": (o, f"pretrained/{n}", "json" if n.endswith("json") else "", lambda d: load_pretrained(d/"pretrained")(torch.zeros(1, 2, 16))) for n in ("config.json", "model.safetensors")},
        "training state": (run, "state.pt", "", lambda d: trainer().load_state(d/"state.pt")),
        "run config": (run, "config.json", "json", lambda d: (find_run(d, None, 1, config), read_result(d))), "run history": (run, "history.json", "json", read_result),
        "head": (o, "head.safetensors", "", lambda d: Head.load(d/"head.safetensors").logits(torch.zeros(1, 16))), "table": (o, "table.safetensors", "", lambda d: NGramTable.load(d/"table.safetensors").propose([1, 2], 3)),
        "log": (o, "log.jsonl", "jsonl", lambda d: replay(read_answers(d/"log.jsonl"), gammas=[3], nodes=[4], order=3, n_boot=20).table()),
        "log, bad skipped": (o, "log.jsonl", "jsonl", lambda d: replay(read_answers(d/"log.jsonl", skip_bad=True), gammas=[3], nodes=[4], order=3, n_boot=20).table()),
        "study log": (o, "study.json", "json", lambda d: read_answers(d/"study.json")),
        "timing": (o, "timing.json", "json", lambda d: (lambda t: (timing_report(t), plan(t, {3: [.8, .5, .2]}).line()))(read_timing(d/"timing.json"))),
        "metrics": (o, "metrics.json", "json", lambda d: plan(read_timing(o/"timing.json"), *(lambda by, first: (by, 50, first))(*curves_of(read_json(d/"metrics.json"))))),
        "questions": (o, "questions.json", "json", lambda d: read_questions(d/"questions.json")), "listing": (o, LISTING, "json", lambda d: [c for c in open_clips(d, "train", duration="1s").clip_ids]),
        "dataset.json": (o, "dataset.json", "json", lambda d: open_clips(d, "train", duration="1s")), "heartbeat": (o, "h.heartbeat.json", "json", lambda d: read_heartbeat(d/"h.heartbeat.json")),
        **{f"pair {n}": (pair, n, "json" if n.endswith("json") else "", p) for n in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")},
        **{f"events {n}": (o, n, "", lambda d, n=n: read_events(d/n, sort=True)) for n in ("e.npy", "e.npz", "e.txt")},
    }
    try: import h5py
    except ImportError: pass
    else:
        with h5py.File(o/"e.h5", "w") as f:
            for k, v in cols.items(): f.create_dataset(f"events/{k}", data=v, compression="gzip")
            f["t_offset"], f["ms_to_idx"] = 5, np.arange(3)
        kinds["events e.h5"] = (o, "e.h5", "", lambda d: read_events(d/"e.h5"))
    try: import av
    except ImportError: pass
    else:
        with av.open(str(o/"v.mp4"), "w") as c:
            stream = c.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            for k in range(6): c.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * k, np.uint8), format="rgb24")))
            c.mux(stream.encode())
        kinds["video"] = (o, "v.mp4", "", lambda d: read_video(d/"v.mp4", 4))
    for name, (folder, _, _, read) in kinds.items(): # all of them are sound, and what they import is no reader's memory
        try: read(folder)
        except Exception as e: raise AssertionError(name) from e
    return kinds


def fuzz(sound, tmp, per_kind, seed): # FFmpeg maps up to 2 GiB for a table that a file declares, but fills only what is there
    got, began = {}, time.monotonic()
    for name, (folder, file, kind, read) in sound.items():
        work = tmp/name.replace("/", "_").replace(" ", "_")
        shutil.copytree(folder, work)
        data, rng = (folder/file).read_bytes(), random.Random(f"{seed} {name}")
        got[name] = dict(mutations=0, refused=0)
        heavy = name.startswith("pair")
        for k in range(per_kind // 3 if heavy else per_kind):
            evil = mutate(data, rng, kind)
            (work/file).write_bytes(evil)
            if file.endswith("chunk_000000.safetensors"): # the sidecar agrees, so that the file itself is tried
                side = work/"store/chunks/chunk_000000.json"
                side.write_text(json.dumps(json.loads((folder/"store/chunks/chunk_000000.json").read_text()) | dict(bytes=len(evil))))
            try: got[name]["refused"] += refused(lambda: read(work), 4 * 2**30 if name == "video" else 2**30) is not None  # noqa: B023
            except BaseException as e: raise AssertionError(f"{name}, seed {seed}, mutation {k}: {type(e).__name__}: {str(e)[:500]}") from e
            got[name]["mutations"] += 1
        shutil.rmtree(work)
    total, refusals = (sum(g[k] for g in got.values()) for k in ("mutations", "refused"))
    print(f"\n{total} mutations, {refusals} refused, the others read, {time.monotonic() - began:.0f} s:", *(f"{k}: {g['mutations']}/{g['refused']}" for k, g in got.items()), sep="\n  ")
    return total, refusals


def test_fuzzed_files(sound, tmp_path):
    total, refusals = fuzz(sound, tmp_path, 80, 0)
    assert total >= 2000 and refusals > total / 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_more_fuzzed_files(sound, tmp_path, seed): assert fuzz(sound, tmp_path, 400, seed)[0] >= 10_000
