"The founding study from recordings to a verdict, typed as a user types it, on tiny checkpoints of its two models"
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from patience import HANG, until
from safetensors.torch import load_file, save_file
from test_commands import run
from tiny_checkpoints import (
    SMALL, VISION, random_events, small_tokenizer, write_eventgpt, write_tensors, write_videollava)

from featsd.data.clips import LISTING, open_clips
from featsd.data.build import write_video
from featsd.data.events import read_events
from featsd.data.store import open_states

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
SHARED = Path(os.environ.get("FEATSD_SHARED_DATA") or Path(__file__).parents[2]/"shared"/"data")/"events"
REAL = {"train": ("interlaken_00_d_000089.npy", "sample1.npy"), "test": ("interlaken_00_d_000099.npy",)} # 50 ms each
RECORDED = all((SHARED/f).is_file() for names in REAL.values() for f in names) # else films, with simulated events
LENGTH = "20ms"


def film(n, phase=0, h=48, w=64): # [n, h, w, 3]
    "A chequered wall that moves by"
    y, x = np.mgrid[:h, :w]
    rows = [((x + 3 * i + phase) // 8 + y // 8) % 2 * 160 + 40 for i in range(n)]
    return np.stack([np.stack([v, np.roll(v, 5, 0), 255 - v], -1) for v in rows]).astype(np.uint8)


def sequence(folder, events):
    "Recorded events in DSEC's layout, beside frames of a made-up film"
    import h5py
    (folder/"images").mkdir(parents=True)
    start = int(events.t[0])
    with h5py.File(folder/"events.h5", "w") as f:
        for k, v in (("x", events.x.astype(np.uint16)), ("y", events.y.astype(np.uint16)),
                     ("t", (events.t - start).astype(np.uint32)), ("p", events.p.astype(np.uint8))):
            f.create_dataset(f"events/{k}", data=v)
        f["ms_to_idx"], f["t_offset"] = np.searchsorted(events.t - start,
                                                        np.arange(events.duration_us // 1000 + 1) * 1000), start
    times = range(start, start + events.duration_us, 2000)
    for i, frame in enumerate(film(len(times))): Image.fromarray(frame).save(folder/"images"/f"{i:06d}.png")
    (folder/"timestamps.txt").write_text("".join(f"{t}\n" for t in times))
    return folder


def typed(name, *args):
    "A command in this process; what it printed"
    code, out, err = run(name, *args)
    assert code == 0, err
    return out


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "As in the commands that are started: how many share a sum is part of its rounding, and bytes are compared"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study(one_thread, tmp_path_factory):
    "Checkpoints, and a data set of three splits: real events where they are at hand, and a film"
    root = tmp_path_factory.mktemp("study")
    write_eventgpt(root/"egpt", shards=3)
    write_videollava(root/"vllava", "hub")
    for split, names in (*REAL.items(), ("val", ("film",))):
        sources = []
        for i, name in enumerate(names):
            if name.endswith(".npy") and RECORDED:
                pytest.importorskip("h5py")
                sources.append(sequence(root/"recordings"/Path(name).stem, read_events(SHARED/name)))
            else:
                sources.append(root/f"{split}_{i}.mp4")
                write_video(sources[-1], film(25, 7 * i + len(split)), [2000 * k for k in range(25)])
        typed("featsd_dataset", *sources, "--output_dir", root/"data", "--duration", LENGTH, "--split", split)
    return root


def pair(root): return f"draft={root/'egpt'}?max_duration_us=none,target={root/'vllava'}?frames=4"
def asked(root): return ["--dataset_dir", root/"data", "--pair", pair(root)]
def extraction(root, out, split="train", quant="4bit"):
    return [*asked(root), "--output_dir", out, "--split", split, "--duration", LENGTH, "--quant", quant,
            "--chunked", "--chunk_size", 10, "--max_new_tokens", 16]
def chunks(store): return {f.name: f.read_bytes() for f in sorted((store/"chunks").iterdir())}
def best(folder, level): return next(folder.glob(f"L{level}_*/best_model.pt"))


def test_the_data_set_is_the_studys(study):
    listing = json.loads((study/"data"/LISTING).read_text())
    assert {e["split"] for e in listing} == {"train", "test", "val"}
    assert len({e["id"] for e in listing}) == len(listing) >= 10
    assert {e["simulated"] for e in listing if e["split"] != "val"} == {not RECORDED}
    assert all(e["simulated"] for e in listing if e["split"] == "val")
    assert len({c.sequence for c in open_clips(study/"data", "train")}) == 2
    assert len(set(open_clips(study/"data", "train", 2, spread=True).sequences)) == 2
    assert len(set(open_clips(study/"data", "train", 2).sequences)) == 1
    assert len(open_clips(study/"data", "test").questions) == 10
    if RECORDED: # the events of the first 20 ms, as they were recorded
        clip, whole = open_clips(study/"data", "test")[0], read_events(SHARED/REAL["test"][0])
        assert len(clip.events) > 20_000 and clip.events.x.tolist() == whole.x[:len(clip.events)].tolist()
        assert clip.events.t[0] == whole.t[0]


def test_the_whole_chain(study):
    script = Path(sys.executable).parent/"featsd_extract"
    store, name = study/"states"/f"chunked_train_{LENGTH}_4bit", ["featsd_extract", *extraction(study, study/"states")]
    p = subprocess.Popen([script, *map(str, name[1:])], env={**os.environ, "OMP_NUM_THREADS": "1"},
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until(lambda: list(store.glob("chunks/*.json")) or p.poll() is not None)
    p.send_signal(signal.SIGKILL)
    _, err = p.communicate(timeout=HANG)
    assert p.returncode == -signal.SIGKILL, err
    begun = len(list(store.glob("chunks/*.json")))
    typed(*name) # the same command goes on …
    whole = Path(typed("featsd_extract", *extraction(study, study/"again")).strip())
    assert 0 < begun < len(list(store.glob("chunks/*.json"))) and chunks(store) == chunks(whole) # … to the same bytes
    test = Path(typed("featsd_extract", *extraction(study, study/"states", "test")).strip())
    assert "0 wrong" in typed("featsd_verify", store)
    manifest = json.loads((store/"manifest.json").read_text())
    assert manifest["quant"] == "4bit"
    assert (manifest["draft"]["dtype"], manifest["target"]["dtype"]) == ("bfloat16", "float16")
    assert manifest["shared_vocab"] == SMALL
    assert open_states(store).manifest["target_dim"] == 64
    assert len(open_states(store)) == 10 * len(open_clips(study/"data"))

    out = typed("featsd_train", "--train_data", store, "--adapter_level", "all", "--num_epochs", 3, "--val_split", .5,
                "--output_dir", study/"runs", "--no-progress")
    assert [line[:2] for line in out.splitlines() if line[:1] == "L"] == ["L1", "L2", "L3", "L4"]
    out = typed("featsd_measure", "--checkpoint", best(study/"runs", 2), "--test_data", test, "--train_data", store,
                "--output_dir", study/"measured")
    assert "n-gram table" in out and json.loads((study/"measured/acceptance_metrics.json").read_text())
    out = typed("featsd_timeline", *asked(study), "--quant", "4bit", "--clips", 1, "--questions", 1, "--runs", 1,
                "--metrics", study/"measured/acceptance_metrics.json",
                "--checkpoint", best(study/"runs", 2), "--output_dir", study/"timeline")
    assert "plan (measured times)" in out
    assert json.loads((study/"timeline/timing.json").read_text())["source"].startswith("Stages, measured: pair, 1 clips")

    arms = "raw,aligned,ngram,null,oracle"
    out = typed("featsd_compare", *asked(study), "--quant", "4bit", "--duration", LENGTH,
                "--adapter", ",".join(str(best(study/"runs", n)) for n in (1, 2, 3, 4)), "--drafters", arms,
                "--clips", 3, "--questions", 2, "--gammas", "1,3", "--max_new_tokens", 16, "--plain_runs", 1,
                "--batch_clips", 1, "--no-dynamic", "--out", study/"compared")
    result = json.loads((study/"compared/compare.json").read_text())
    assert {r["name"] for r in result["rows"]} == {"raw", "ngram", "null", "oracle",
                                                   *(f"aligned L{n}" for n in (1, 2, 3, 4))}
    assert len(result["rows"]) == 16
    for r in result["rows"]: # every arm says the target's words; in half precision two logits may tie
        assert r["prompts"] == 6 and r["identical"] + r["rounded"] == 6 and not r["broken"], r
    assert sum(r["rounded"] for r in result["rows"]) < len(result["rows"])
    assert any(v.startswith("Recommended: ") and ("% of the resamplings" in v or "plain decoding" in v)
               for v in result["verdict"])
    assert result["verdict"][-1] in out
    assert result["over_null"]["ratio"]["groups"] == 3 # how sure: by clip

    typed("featsd_decode", *asked(study), "--quant", "fp32", "--drafter", "standard", "--max_new_tokens", 16,
          "--certificate", study/"certificate.json", "--prompts", 3)
    assert json.loads((study/"certificate.json").read_text())["verdict"] == "identical"


def test_an_early_exit_of_the_draft(study, tmp_path):
    store = Path(typed("featsd_extract", *extraction(study, tmp_path, quant="fp32"), "--max_questions", 2,
                       "--draft_layers", 1).strip())
    manifest = json.loads((store/"manifest.json").read_text())
    assert manifest["draft_layers"] == 1 and manifest["draft"]["name"].endswith("-1of2")
    code, _, err = run("featsd_extract", *extraction(study, tmp_path, quant="fp32"), "--max_questions", 2)
    assert code == 2 and "draft" in err and err.count("\n") == 1 # not into the same store
    assert "differs" not in typed("featsd_verify", store,
                                  "--pair", pair(study)) # it is of this pair, cut as the store says
    for level in (1, 4):
        typed("featsd_train", "--train_data", store, "--adapter_level", level, "--num_epochs", 2, "--val_split", .5,
              "--output_dir", tmp_path/"runs", "--no-progress")
        assert torch.load(best(tmp_path/"runs", level), weights_only=True)["config"]["draft_layers"] == 1
    full = Path(typed("featsd_extract", *extraction(study, tmp_path/"full", quant="fp32"), "--max_questions", 2,
                      "--max_samples", 1).strip())
    code, _, err = run("featsd_measure", "--checkpoint", best(tmp_path/"runs", 1), "--test_data", full)
    assert code == 2 and "after all layers of the draft, the adapter was trained after the first 1 layers" in err

    def compared(adapters, *more):
        typed("featsd_compare", *asked(study), "--quant", "fp32", "--duration", LENGTH, "--adapter", adapters,
              "--drafters", "ngram,aligned", "--clips", 2, "--questions", 1, "--gammas", 2,
              "--max_new_tokens", 12, "--plain_runs", 1, "--no-transformers", "--no-dynamic", "--val_clips", 0,
              "--out", tmp_path/"compared", *more)
        rows = json.loads((tmp_path/"compared/compare.json").read_text())["rows"]
        assert all(r["identical"] == r["prompts"] == 2 for r in rows)
        return {r["name"]: r for r in rows if r["name"] != "ngram"}
    l1, l4 = best(tmp_path/"runs", 1), best(tmp_path/"runs", 4)
    swept = compared(f"{l1},{l4}", "--draft_layers", "1,2")
    assert list(swept) == [f"aligned {n} of {k} layers" for n in ("L1", "L4") for k in (1, 2)]
    assert all(swept[f"aligned {n} of 1 layers"]["params"] < swept[f"aligned {n} of 2 layers"]["params"]
               for n in ("L1", "L4")) # a shorter draft reads less
    assert list(compared(f"{l1},{l4}")) == ["aligned L1 of 1 layers", "aligned L4 of 1 layers"] # as they were trained
    assert list(compared(f"{l1}@2,{l4}")) == ["aligned L1 of 2 layers", "aligned L4 of 1 layers"]


def test_logits_as_large_as_a_trained_models(study, tmp_path):
    "Half precision rounds large logits so coarsely that steps and one wide pass disagree near ties; the store knows"
    for name in ("egpt", "vllava"):
        shutil.copytree(study/name, tmp_path/name)
        for file in (tmp_path/name).glob("*.safetensors"):
            tensors = {k: v * 20 if k.endswith("lm_head.weight") else v for k, v in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
    for quant, tie in (("4bit", .5), ("bf16", .5), ("fp16", .0625)):
        store = Path(typed("featsd_extract", *extraction(study, tmp_path, quant=quant), "--pair", pair(tmp_path),
                           "--max_questions", 2).strip())
        manifest = json.loads((store/"manifest.json").read_text())
        assert (manifest["tie"], manifest["min_agreement"]) == (tie, .99)


# ---- what is wrong is said in one line, by the command, with status 2 ----

class Evil:
    def __init__(self, at): self.at = at
    def __reduce__(self): return os.mkdir, (str(self.at/"ran"),)


def edit_config(folder, **fields):
    file = folder/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))

def events_of(data): return data/"event_npy"/open_clips(data, "test").clip_ids[0]


def save_columns(data, n):
    columns = np.array({k: np.zeros(n, np.int64) for k in "xytp"}, dtype=object)
    np.save(str(events_of(data)) + ".npy", columns, allow_pickle=True)


def bigger_tower(at):
    from transformers import CLIPVisionConfig, CLIPVisionModel
    CLIPVisionModel(CLIPVisionConfig(**{**VISION, "hidden_size": 128,
                                        "num_attention_heads": 2})).save_pretrained(at/"egpt/tower")
    edit_config(at/"egpt", mm_visual_tower=str(at/"egpt/tower"))


def frameless(at):
    shutil.rmtree(at/"data/video"/open_clips(at/"data", "test").clip_ids[0])
    (at/"data/video"/open_clips(at/"data", "test").clip_ids[0]).mkdir()


def broken_film(at):
    shutil.rmtree(at/"data/video"/open_clips(at/"data", "test").clip_ids[0])
    (at/"data/mp4"/(open_clips(at/"data", "test").clip_ids[0] + ".mp4")).write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 90)


BAD = { # name: what is done to a copy of the study, options, what the line says
    "wrong kind": (lambda at: edit_config(at/"egpt", model_type="llama"), [],
                   ("egpt: no chat template", "give ?template=")),
    "shard gone": (lambda at: (at/"egpt/model-00002-of-00003.safetensors").unlink(), [],
                   ("model-00002-of-00003.safetensors", "fetch")),
    "tower of another size": (bigger_tower, [],
                              ("egpt: projector.0.weight has shape (64, 64), expected (64, 128)",
                               "the vision tower is of another size; give")),
    "no tokenizer": (lambda at: (at/"vllava/tokenizer.json").unlink(), [], ("vllava: no tokenizer, expected", "fetch")),
    "tokenizer of another size": (lambda at: small_tokenizer(size=SMALL - 1).save_pretrained(at/"egpt"), [],
                                  ("egpt: tokenizer of 319 pieces", "the model has 320")),
    "half a head": (lambda at: write_tensors(at/"vllava", {"lm_head.weight": torch.zeros(2, 2)}, shards=2), [],
                    ("vllava", "not a Video-LLaVA checkpoint")),
    "stream over the limit": (lambda at: None, ["--pair", "draft={at}/egpt?max_duration_us=10000,target={at}/vllava"],
                              ("clip interlaken_00_d_000099/000000" if RECORDED else "clip test_0/000000",
                               "expected below 10000 µs", "PATH?max_duration_us=none")),
    "unknown option": (lambda at: None, ["--pair", "draft={at}/egpt?colour=1,target={at}/vllava"],
                       ("egpt: option 'colour'", "takes device, frames")),
    "empty stream": (lambda at: save_columns(at/"data", 0), ["--strict"],
                     ("000000.npy: no events; expected at least one", "leave out --strict")),
    "fewer events than parts": (lambda at: save_columns(at/"data", 4), ["--strict"],
                                ("000000.npy", "4 events, expected at least 5")),
    "malicious pickle": (lambda at: np.save(str(events_of(at/"data")) + ".npy", np.array(Evil(at), dtype=object),
                                            allow_pickle=True), ["--strict"],
                         ("000000.npy", "names posix.mkdir; expected plain arrays, nothing was run")),
    "undecodable video": (broken_film, ["--strict"], ("000000.mp4", "not a video that can be decoded")),
    "zero frames": (frameless, ["--strict"], ("/000000: 0 frames; expected .png or .jpg",)),
    "every clip broken": (lambda at: events_of(at/"data").with_suffix(".npy").unlink(), [],
                          ("not one of 1 clips could be read", "000000.npy", "no such")),
    "questions of another form": (lambda at: (at/"data/questions.txt").write_text("how many\n"), [],
                                  ("questions.txt: line 1: expected count<TAB>question",)),
    "clips of another length": (lambda at: None, ["--duration", "1s"], ("built with clips of 20ms, expected 1s",)),
    "no such layer": (lambda at: None, ["--draft_layers", "3"], ("early exit after layer 3, expected 1 to 2",)),
    "no such precision": (lambda at: None, ["--quant", "2bit"], ("quant '2bit': expected one of fp32",)),
    "no such split": (lambda at: None, ["--split", "dev"], ("no clip in split 'dev'; found test",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(study, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    spoil, options, said = BAD[name]
    for folder in ("egpt", "vllava", "data"): shutil.copytree(study/folder, tmp_path/folder)
    spoil(tmp_path)
    args = ["--dataset_dir", tmp_path/"data", "--pair", f"draft={tmp_path}/egpt,target={tmp_path}/vllava",
            "--quant", "fp32", "--split", "test", "--duration", LENGTH, "--chunked",
            "--max_samples", 1, "--max_questions", 1, "--max_new_tokens", 4, "--output_dir", tmp_path/"out"]
    for flag, value in zip(options[::2], [*options[1::2], None]): # later options replace earlier ones
        if flag in args: args[args.index(flag) + 1] = value.format(at=tmp_path)
        else: args += [flag] if value is None else [flag, value.format(at=tmp_path)]
    code, out, err = run("featsd_extract", *args)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "pair/s" not in line
             and "?pair" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("featsd_extract: "), (code, err)
    assert all(s in lines[0] for s in said), (code, err)
    assert not list(tmp_path.glob("out/*/chunks/*")) and not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path/"ran").exists() and out == ""


def test_a_broken_clip_is_counted_and_listed_everywhere(study, tmp_path):
    shutil.copytree(study/"data", tmp_path/"data")
    save_columns(tmp_path/"data", 4)
    clips = open_clips(tmp_path/"data", "test")
    more = ["--dataset_dir", tmp_path/"data", "--pair", pair(study), "--quant", "fp32", "--split", "test",
            "--duration", LENGTH, "--max_new_tokens", 6]
    store = Path(typed("featsd_extract", *more, "--chunked", "--max_questions", 1,
                       "--output_dir", tmp_path/"out").strip())
    index = json.loads((store/"index.json").read_text())
    assert (index["pairs"], index["skipped"]) == (len(clips) - 1, 1)
    out = typed("featsd_compare", *more, "--drafters", "raw", "--clips", 2, "--questions", 1, "--gammas", 2,
                "--plain_runs", 1, "--no-transformers", "--out", tmp_path/"compared")
    assert f"1 clips skipped: {clips.clip_ids[0]}: event_npy/{clips.clip_ids[0]}.npy: 4 events" in out


def test_what_featsd_dataset_refuses(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"bad.mp4").write_bytes(b"no film")
    write_video(tmp_path/"good.mp4", film(25), [2000 * k for k in range(25)])
    for args, said in ((["bad.mp4"], "bad.mp4: not a video"), (["none.mp4"], "none.mp4: no such file"),
                       (["good.mp4", "--questions", "none.txt"], "none.txt: no such question file"),
                       (["good.mp4", "--duration", "1s"], "ends at 0.050 s, expected 1 s")):
        code, _, err = run("featsd_dataset", *(["--duration", LENGTH] if "--duration" not in args else []), *args,
                           "--output_dir", tmp_path/"made")
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "clip/s" not in line]
        assert code == 2 and len(lines) == 1 and said in lines[0], err
        assert not list(tmp_path.glob(f"made/{LISTING}"))


def test_hdf5_without_its_plugin(tmp_path):
    h5py, hdf5plugin = (pytest.importorskip(m) for m in ("h5py", "hdf5plugin"))
    folder = sequence(tmp_path/"seq", random_events(n=2000, duration_us=50_000))
    with h5py.File(folder/"events.h5", "a") as f: # as DSEC is packed
        t = f["events/t"][()]
        del f["events/t"]
        f.create_dataset("events/t", data=t, **dict(hdf5plugin.Blosc(cname="zstd")))
    script = tmp_path/"featsd_dataset"
    script.write_text("import sys\nsys.modules['hdf5plugin'] = None\n"
                      "from featsd.commands import featsd_dataset\nfeatsd_dataset()\n")
    got = subprocess.run([sys.executable, script, str(folder), "--output_dir", str(tmp_path/"made"),
                          "--duration", LENGTH], capture_output=True, text=True, timeout=HANG)
    assert got.returncode == 2 and got.stderr.count("\n") == 1 and "events.h5" in got.stderr, got
    assert "pip install hdf5plugin" in got.stderr, got
    assert not (tmp_path/"made").exists()
