"Extraction as a user runs it: commands, signals, resume, bad input"
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import HANG, until

from featsd.base.core import FeatsdError
from featsd.data.store import open_states
from featsd.extract import foretold_seconds
from featsd.models.backbone import load_pair

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FLAGS = "--quant fp32 --split test --chunked --chunk_size 10 --max_questions 5".split()


def start(*args, **kwargs):
    command = Path(sys.executable).parent/"featsd_extract"
    return subprocess.Popen([command, *map(str, args)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **kwargs)


def run(*args):
    p = start(*args)
    out, err = p.communicate(timeout=HANG)
    return p.returncode, out, err


def chunks(store): return {f.name: f.read_bytes() for f in sorted((store/"chunks").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = run("--output_dir", folder, "--max_samples", 8, *FLAGS)
    assert code == 0, err
    return folder/"chunked_test_1s_fp32"


def test_store_holds_what_was_asked(whole):
    states = open_states(whole)
    assert len(states) == 40 and states.manifest["streams"] == ["target", "draft_forced", "draft_free"]
    head = states.head()
    for batch in states.batches("draft_forced", 8):
        said = head.logits(batch.h_target).argmax(-1)
        assert (said == batch.ids)[batch.mask].float().mean() >= .999 # bf16 rounding may flip a near tie


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_then_resumed_gives_the_same_bytes(whole, tmp_path, number, code):
    args = ["--output_dir", tmp_path, "--max_samples", 8, *FLAGS]
    p, store = start(*args), tmp_path/"chunked_test_1s_fp32"
    until(lambda: list(store.glob("chunks/*.json")) or p.poll() is not None)
    p.send_signal(number)
    _, err = p.communicate(timeout=HANG)
    if p.returncode == 0: pytest.skip("the run ended before the signal came")
    assert p.returncode == code
    if number != signal.SIGKILL: assert "run the same command again" in err and "Traceback" not in err
    assert len(chunks(store)) < len(chunks(whole))
    code, _, err = run(*args)
    assert code == 0, err
    assert chunks(store) == chunks(whole)


def test_a_skipped_clip_is_tried_again(tmp_path, monkeypatch, caplog):
    import featsd.extract as E
    pair, real, broken = load_pair("pocket"), E.read_clip, set()
    monkeypatch.setattr(E, "read_clip", lambda clips, i: (None, "cut short") if i in broken else real(clips, i))
    def go(name="a", n=5, **kw): # what it said
        caplog.clear()
        E.extract(tmp_path/name, pair=pair, split="test", quant="fp32", max_samples=n, max_questions=2,
                  max_new_tokens=4, chunk_size=4, progress=False, **kw)
        return caplog.text
    def kept(name="a"):
        return {f.name: (f.read_bytes(), f.stat().st_mtime_ns)
                for f in (tmp_path/name/"chunked_test_1s_fp32/chunks").iterdir()}
    broken = {2}
    says = ("1 clips could not be read and were skipped; test-000002: cut short; once they are mended, "
            "run the same command again")
    assert says in go()
    before = kept()
    assert says in go() and kept() == before # nothing was read by this run, yet it says so
    with pytest.raises(FeatsdError, match="test-000002 cannot be read .cut short."): go(strict=True)
    assert kept() == before
    broken = set()
    assert says in go(n=3) and kept() == before # a smaller plan would cost the chunk its end
    assert "skipped" not in go() and len(open_states(tmp_path/"a/chunked_test_1s_fp32")) == 10
    assert {k for k, v in kept().items() if before[k] != v} == {"chunk_000004.json", "chunk_000004.safetensors"}
    go("fresh")
    assert {k: v[0] for k, v in kept().items()} == {k: v[0] for k, v in kept("fresh").items()}


def test_the_wrong_clip_is_another_for_each_and_read_once():
    from types import SimpleNamespace as O
    from featsd.extract import other_clip
    class Clips:
        def __init__(self, sequences, known=True):
            self.all, self.clip_ids, self.read = sequences, [f"c{i}" for i in range(len(sequences))], []
            if known: self.sequences = sequences
        def __len__(self): return len(self.all)
        def __getitem__(self, i):
            self.read.append(i)
            if i == 7: raise FeatsdError("damaged")
            return O(i=i, sequence=self.all[i])
    def chosen(clips): return [other_clip(clips, i, s).i for i, s in enumerate(clips.all)]
    clips = Clips(["a"] * 4 + ["b"] * 6 + ["c"] * 4)
    got = chosen(clips)
    assert all(clips.all[j] != s for j, s in zip(got, clips.all)) and len(set(got)) > 8
    assert len(clips.read) == len(got) + clips.read.count(7)
    assert chosen(Clips(list("abcdef"))) == [1, 2, 3, 4, 5, 0] # the built-in world: each clip is a sequence
    # a data set that does not say: read until it shows
    assert all(clips.all[j] != s for j, s in zip(chosen(Clips(clips.all, known=False)), clips.all))
    with pytest.raises(FeatsdError, match="at least two sequences"): other_clip(Clips(["a"] * 3), 0, "a")


def test_more_clips_later_extend_the_store(whole, tmp_path):
    for n in (4, 8):
        code, _, err = run("--output_dir", tmp_path, "--max_samples", n, *FLAGS)
        assert code == 0, err
    assert chunks(tmp_path/"chunked_test_1s_fp32") == chunks(whole)


def test_single_file_with_the_studys_keys(tmp_path):
    code, out, err = run("--output_dir", tmp_path, "--max_samples", 3, "--max_questions", 2, "--quant", "fp32",
                         "--checkpoint_name", "mine.pt")
    assert code == 0, err
    file = torch.load(tmp_path/"mine.pt", weights_only=True)
    assert {"egpt_hidden", "vl_hidden", "seq_lens", "metadata", "config"} <= set(file)
    assert file["egpt_hidden"].shape == file["vl_hidden"].shape and file["egpt_hidden"].dtype == torch.float32
    assert len(open_states(tmp_path/"mine.pt")) == len(file["seq_lens"])


@pytest.mark.parametrize("args,said", [
    (["--dataset_dir", "nowhere"], "no such data set folder"),
    (["--quant", "3bit"], "expected one of"),
    (["--split", "../up"], "part of a file name"),
    (["--pair", "bucket"], "expected 'pocket'"),
    (["--pair", "draft=nowhere,target=nowhere"], "no such checkpoint folder"),
    (["--max_samples", "0"], "no clip"),
    (["--chunk_size", "0", "--chunked"], "at least 1"),
    (["--checkpoint_name", "../up.pt", "--max_samples", "1", "--max_questions", "1"], "part of a file name"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, args, said):
    code, out, err = run("--output_dir", tmp_path/"out", *({"--quant": "fp32"} if "--quant" not in args else ()),
                         *(["fp32"] if "--quant" not in args else []), *args)
    assert code == 2 and said in err, err
    assert len(err.strip().splitlines()) == 1 or "pair/s" in err, err
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_settings_in_the_same_folder_are_refused(whole):
    code, _, err = run("--output_dir", whole.parent, "--max_samples", 8, *FLAGS, "--max_new_tokens", 7)
    assert code == 2 and "max_new_tokens" in err
    assert np.all([len(v) > 0 for v in chunks(whole).values()])


# ---- devices

WEIGHTS = Path(__file__).parents[1]/"featsd"/"models"/"pocket_weights"


def test_devices_are_recorded_and_decide_nothing(whole, tmp_path):
    assert open_states(whole).manifest["devices"] == {"target": "cpu", "draft": "cpu"}
    pair = f"draft={WEIGHTS}/draft?device=cpu,target={WEIGHTS}/target?device=cpu"
    args = ["--output_dir", tmp_path, "--max_samples", 2, *FLAGS, "--pair", pair]
    assert run(*args)[0] == 0
    store = tmp_path/"chunked_test_1s_fp32"
    m, before = json.loads((store/"manifest.json").read_text()), chunks(store)
    # begun on another machine
    (store/"manifest.json").write_text(json.dumps(m | {"devices": {"target": "cuda:0", "draft": "cuda:1"}}))
    (store/"chunks/chunk_000000.json").unlink()
    code, _, err = run(*args)
    assert code == 0 and chunks(store) == before, err
    assert open_states(store).manifest["devices"]["draft"] == "cuda:1" # the record of the run that began it


def test_options_reach_each_model_of_a_pair(tmp_path):
    "Tiny checkpoints of the two real models, each with its own options, through the command"
    from test_commands import run as typed # in this process: a start costs seconds
    from tiny_checkpoints import write_eventgpt, write_videollava
    write_eventgpt(tmp_path/"draft")
    write_videollava(tmp_path/"target")
    args = ["--output_dir", tmp_path/"out", "--max_samples", 1, "--quant", "fp32", "--split", "test", "--chunked",
            "--max_questions", 1, "--max_new_tokens", 3]
    draft = f"{tmp_path}/draft?device=cpu&frames=1&max_duration_us=none"
    target = f"{tmp_path}/target?device=cpu&frame_rule=arange"
    code, _, err = typed("featsd_extract", *args, "--pair", f"draft={draft},target={target}")
    assert code == 0, err
    m = open_states(tmp_path/"out/chunked_test_1s_fp32").manifest
    assert m["devices"] == {"target": "cpu", "draft": "cpu"} and m["draft"]["name"] == "draft (frames=1)"
    assert m["target"]["name"] == "target (frame_rule=arange)"
    for option, said in (("device=cuda:7", "GPUs here"), ("device=tpu", "expected auto, cpu, cuda"),
                         ("devise=cpu", "option 'devise'")):
        for draft, target in ((option, "device=cpu"), ("device=cpu", option)):
            code, _, err = typed("featsd_extract", *args, "--pair",
                                 f"draft={tmp_path}/draft?{draft},target={tmp_path}/target?{target}")
            assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_draft_on_the_cpu_and_a_target_on_the_gpu(tmp_path):
    from featsd.extract import extract
    path = extract(tmp_path, pair=f"draft={WEIGHTS}/draft?device=cpu,target={WEIGHTS}/target?device=cuda:0",
                   split="test", quant="fp32", max_samples=2, progress=False)
    assert open_states(path).manifest["devices"] == {"target": "cuda:0", "draft": "cpu"}


def test_time_foretold_from_a_smaller_extraction(tmp_path):
    (tmp_path/"timings.jsonl").write_text('{"start": 0, "pairs": 10, "compute_ms": 9000, "write_ms": 1000}\n{"start": '
                                          '10, "pairs": 10, "compute_ms": 900, "write_ms": 100}\n{"start": '
                                          '20, "pairs": 20, "compute_ms": 2900, "write_ms": 100}\n{"start": 40, "pa')
    # without the first chunk, which also warmed up, and a torn line
    assert foretold_seconds(tmp_path, 300) == (300 * 4 / 30, 30)
    (tmp_path/"timings.jsonl").write_text('{"start": 0, "pairs": 10, "compute_ms": 900, "write_ms": 100}\n')
    assert foretold_seconds(tmp_path, 30) == (3., 10)
    for text in ("", "[]\nnull\n{}", '{"pairs": -1, "compute_ms": 1, "write_ms": 1}'):
        (tmp_path/"timings.jsonl").write_text(text)
        with pytest.raises(FeatsdError, match="expected the times of one chunk or more, found none"):
            foretold_seconds(tmp_path, 30)
    (tmp_path/"timings.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(FeatsdError, match="expected the times of an extraction"): foretold_seconds(tmp_path, 30)
