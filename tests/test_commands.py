"Commands as a user types them: --help teaches, bad input is one line and exit status 2, nothing is left half-written"
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from patience import HANG

import featsd.commands as commands
from featsd.adapters import create_adapter
from featsd.data.store import open_states
from featsd.extract import extract
from featsd.models.backbone import load_pair

ROOT = Path(__file__).parents[1]


def declared(room="featsd."):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    lines = config["DEFAULT"]["console_scripts"].split()
    return sorted(line.split("=")[0].strip() for line in lines if f"={room}" in line)


def run(name, *args):
    "Exit status, stdout and stderr of a command"
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    script = {"__name__": "__main__", "__file__": "script.py", "command": getattr(commands, name)}
    sys.argv = [name, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            # as a console script calls it: fastcore reads the arguments only there
            exec(compile("command()", "script.py", "exec"), script)
        code = 0
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv
    return code, out.getvalue(), err.getvalue()


SMALL = dict(pair="pocket", split="test", quant="fp32", max_samples=4, max_questions=3, progress=False)
LITTLE = ["--num_epochs", 2, "--no-progress", "--val_split", .25]
RUN = {"config.json", "best_model.pt", "final_model.pt", "history.json", "training_curves.png"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return extract(folder, **SMALL)


class Evil:
    def __reduce__(self): return exec, ("import pathlib; pathlib.Path('ran').touch()",)


@pytest.mark.parametrize("name", declared("featsd.commands:"))
def test_help_explains_every_flag(name):
    code, out, _ = run(name, "--help")
    assert code == 0 and len(out.splitlines()) > 5
    import inspect
    flags = [p for p in inspect.signature(getattr(commands, name)).parameters]
    assert flags and all(f in out for f in flags)


def by_name(*args):
    return subprocess.run([sys.executable, "-m", "featsd", *args], capture_output=True, text=True, timeout=HANG,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"})


def test_commands_are_found_by_name(monkeypatch):
    "python -m featsd NAME"
    listed = by_name()
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == declared()
    unknown = by_name("bench_press")
    assert unknown.returncode == 2 and len(unknown.stderr.strip().splitlines()) == 1
    assert all(name.removeprefix("featsd_") in unknown.stderr for name in declared())
    monkeypatch.setenv("COLUMNS", "100")
    helped = run("featsd_size", "--help")[1]
    assert by_name("size", "--help").stdout == by_name("featsd_size", "--help").stdout == helped


def test_unknown_flag_is_status_2():
    code, _, err = run("featsd_size", "--nonsense", "1")
    assert code == 2 and "nonsense" in err


def test_a_checkpoint_s_path_may_hold_a_comma(tmp_path):
    create_adapter(1, hidden_dim=128).save_checkpoint(tmp_path/"a,b@2.pt")
    asked = ["--drafter", "aligned", "--max_new_tokens", "2"]
    code, out, err = run("featsd_decode", "--adapter", tmp_path/"a,b@2.pt", *asked)
    assert code == 0 and "same ids" in out, err


def test_more_memory_than_there_is_is_one_line(capsys):
    from featsd.base.core import command
    @command
    def featsd_hungry(n:int): bytearray(n)
    with pytest.raises(SystemExit): featsd_hungry(n=2**62)
    assert capsys.readouterr().err.startswith("featsd_hungry: more memory than there is")


def test_numbers_are_read_once_and_by_their_kind():
    assert commands.numbers("1,1, 2,", "gammas") == [1, 2] and commands.numbers(".5,1", "rtt", float) == [.5, 1.]
    for text, kind in (("1_0", int), ("1.5", int), ("inf", float), ("nan", float)):
        with pytest.raises(ValueError, match="numbers with commas between"): commands.numbers(text, "x", kind)


def bad_cases(store, tmp):
    tmp.mkdir(exist_ok=True)
    torch.save(Evil(), tmp/"evil.pt")
    (tmp/"empty").mkdir(exist_ok=True)
    create_adapter(1, hidden_dim=32).save_checkpoint(tmp/"narrow.pt")
    create_adapter(1, hidden_dim=128, head_hash="f" * 64).save_checkpoint(tmp/"other_head.pt")
    broken = create_adapter(1, hidden_dim=128)
    with torch.no_grad(): next(broken.parameters()).fill_(float("nan"))
    broken.save_checkpoint(tmp/"nan.pt")
    return [
        ("featsd_train", ["--train_data", tmp/"nowhere"], "nowhere"),
        ("featsd_train", ["--train_data", tmp/"empty"], "empty"),
        ("featsd_train", ["--train_data", tmp/"evil.pt"], "evil.pt"),
        ("featsd_train", ["--train_data", store, "--adapter_level", "7"], "7"),
        ("featsd_train", ["--train_data", store, "--loss", "hinge"], "hinge"),
        ("featsd_train", ["--train_data", store, "--stream", "draft_wrong"], "draft_wrong"),
        ("featsd_measure", ["--checkpoint", tmp/"nowhere.pt", "--test_data", store], "nowhere.pt"),
        ("featsd_measure", ["--checkpoint", tmp/"evil.pt", "--test_data", store], "evil.pt"),
        ("featsd_measure", ["--checkpoint", tmp/"narrow.pt", "--test_data", store], "32"),
        ("featsd_measure", ["--checkpoint", tmp/"other_head.pt", "--test_data", store], "ffff"),
        ("featsd_measure", ["--checkpoint", tmp/"nan.pt", "--test_data", store], "nan.pt"),
        ("featsd_measure", ["--checkpoint", tmp/"narrow.pt", "--test_data", tmp/"evil.pt"], "evil.pt"),
        ("featsd_verify", [tmp/"nowhere"], "nowhere"),
        ("featsd_size", ["--dtype", "int3"], "int3"),
        ("featsd_size", ["--pairs", "0"], "--pairs 0: expected at least 1; give 1 or more"),
        ("featsd_size", ["--chunk_size", "0"], "--chunk_size 0"),
        ("featsd_extract", ["--save_interval", "0"], "--save_interval 0"),
        ("featsd_compare", ["--batch_clips", "0"], "--batch_clips 0: expected at least 1"),
        ("featsd_compare", ["--plain_runs", "0"], "--plain_runs 0"),
        ("featsd_compare", ["--gammas", ","], "--gammas: expected at least one γ"),
        ("featsd_compare", ["--drafters", ","], "--drafters ',': expected names with commas between, found none"),
        ("featsd_compare", ["--drafters", "ngram+aligned"], "drafter 'ngram+aligned': no adapter given"),
        ("featsd_replay", ["--answers", tmp/"x", "--nodes", "4,four"],
         "--nodes: expected whole numbers with commas between, found '4,four'"),
        ("featsd_adapters", ["--hidden_dim", "-1"], "-1"),
        ("featsd_demo", ["--clips", "1"], "at least 4"),
        ("featsd_timeline", ["--pair", "bucket"], "bucket"),
        ("featsd_size", ["--tokens", "inf"], "--tokens inf: expected a finite number"),
        ("featsd_size", ["--draft_dim", "-1"], "--draft_dim -1: expected at least 0"),
        ("featsd_extract", ["--max_samples", "-7"], "--max_samples -7: expected at least -1"),
        ("featsd_extract", ["--max_samples", "999999999999"], "the built-in world has 1000000"),
        ("featsd_bench", ["--seed", "-1"], "--seed -1"),
        ("featsd_compare", ["--rtt", "nan"], "--rtt: expected numbers with commas between"),
        ("featsd_compare", ["--gammas", "99999999999"], "expected an integer, 1 to 4096"),
        ("featsd_compare", ["--clips", "1", "--drafters", "lookup", "--short_list", "999999"], "expected 1 to"),
        ("featsd_timeline", ["--clips", "0"], "--clips 0"),
        ("featsd_decode", ["--top_k", "5"], "temperature 0.0: expected > 0"),
        ("featsd_decode", ["--tau", ".5"], "for --mode lossy alone"),
        ("featsd_decode", ["--mode", "lossy", "--tau", "1.5"], "expected a cosine"),
        ("featsd_decode", ["--min_confidence", "2"], "expected a probability"),
        ("featsd_decode", ["--question", "99"], "question 99: the clip has 10 questions, 0 to 9"),
    ]


@pytest.mark.parametrize("case", range(39))
def test_bad_input_is_one_line_and_status_2(store, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    name, args, said = bad_cases(store, tmp_path/"in")[case]
    before = sorted(p for p in tmp_path.rglob("*"))
    to = ["--output_dir", tmp_path/"out"] if name in ("featsd_train", "featsd_measure") else []
    code, _, err = run(name, *to, *args)
    assert code == 2, (code, err)
    assert said in err and len([line for line in err.splitlines() if line.strip()]) == 1, err
    assert not (tmp_path/"ran").exists()
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p not in before]
    assert not written, written


def test_train_measure_verify_from_the_command_line(store, tmp_path):
    code, out, err = run("featsd_train", "--train_data", store, "--output_dir", tmp_path/"ck", *LITTLE)
    assert code == 0, err
    folder = Path(out.strip().splitlines()[-1])
    assert RUN <= {p.name for p in folder.iterdir()}
    code, out, err = run("featsd_measure", "--checkpoint", folder/"best_model.pt", "--test_data", store,
                         "--output_dir", tmp_path/"m")
    assert code == 0, err
    assert (tmp_path/"m"/"acceptance_metrics.json").exists() and (tmp_path/"m"/"position_stats.json").exists()
    code, out, err = run("featsd_verify", store)
    assert code == 0 and "0 wrong" in out
    chunk = next((store/"chunks").glob("*.safetensors"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    copy = tmp_path/"copy"
    shutil.copytree(store, copy)
    (copy/"chunks"/chunk.name).write_bytes(data)
    code, out, _ = run("featsd_verify", copy)
    assert code == 1 and chunk.name in out
    assert len(open_states(store)) == 12


# ---- featsd_verify

def harm(store, tmp, start=0, at=.5):
    "A copy of the store with one flipped byte in a chunk"
    copy = shutil.copytree(store, tmp/"copy", dirs_exist_ok=True)
    chunk = sorted((copy/"chunks").glob("*.safetensors"))[start]
    data = bytearray(chunk.read_bytes())
    data[int(len(data) * at)] ^= 1
    chunk.write_bytes(data)
    return copy, chunk


def test_repair_says_what_it_dropped_and_what_is_left_is_valid(store, tmp_path):
    args = SMALL | dict(chunk_size=5)
    whole = extract(tmp_path/"a", **args)
    good = {f.name: f.read_bytes() for f in (whole/"chunks").iterdir()}
    copy, chunk = harm(whole, tmp_path, 1)
    (copy/"chunks/chunk_000000.json.7.tmp").touch()
    assert run("featsd_verify", copy)[0] == 1
    code, out, _ = run("featsd_verify", copy, "--repair")
    said = dict(line.split(None, 1) for line in out.splitlines())
    of_chunk = said[f"chunks/{chunk.name}"]
    assert code == 0 and of_chunk.startswith("dropped: ") and "sha256" in of_chunk
    assert said["chunks/chunk_000000.json.7.tmp"].startswith("dropped: ")
    assert "0 wrong, 2 dropped; what is left is valid, run the extraction again" in out and not chunk.exists()
    code, out, _ = run("featsd_verify", copy) # a gap between chunks is seen, and is for the extraction to close
    assert code == 1 and "missing: pairs 5 to 9" in out
    assert run("featsd_verify", copy, "--repair")[0] == 0
    shutil.move(copy, tmp_path/"b"/whole.name)
    again = extract(tmp_path/"b", **args)
    assert {f.name: f.read_bytes() for f in (again/"chunks").iterdir()} == good
    assert run("featsd_verify", again, "--repair")[1].splitlines()[-1].endswith("0 wrong, 0 dropped")
    assert "again" in run("featsd_verify", "--help")[1]


def test_repair_cannot_mend_a_head_or_a_manifest(store, tmp_path):
    copy, _ = harm(store, tmp_path)
    head = copy/"head.safetensors"
    head.write_bytes(head.read_bytes()[:-8] + b"\0" * 8)
    code, out, _ = run("featsd_verify", copy, "--repair")
    assert code == 1 and "1 wrong, 1 dropped" in out and "run the extraction again" not in out
    (copy/"manifest.json").write_text("{")
    assert run("featsd_verify", copy, "--repair")[0] == 1


def test_verify_against_a_pair(store, tmp_path):
    own = load_pair("pocket")
    code, out, err = run("featsd_verify", store, "--pair", "pocket")
    lines = dict((line[:18].strip(), line[19:]) for line in out.splitlines()[-12:])
    assert code == 0 and len(lines) == 12 and all(v.startswith("equal") for v in lines.values()), (out, err)
    code, out, _ = run("featsd_verify", store, "--pair", "pocket", "--quant", "bf16")
    assert code == 1 and "target quant       differs: fp32 in the file, bf16 in the pair" in out
    assert "draft dtype        differs: float32 in the file, bfloat16 in the pair" in out
    assert "target head        differs: " in out
    assert "target tokenizer   equal" in out and "target width       equal" in out
    m = json.loads((store/"manifest.json").read_text())
    copy = shutil.copytree(store, tmp_path/"copy")
    m["draft"]["hash"], m["target"]["tokenizer_hash"] = "0" * 64, None
    (copy/"manifest.json").write_text(json.dumps(m))
    code, out, _ = run("featsd_verify", copy, "--pair", "pocket")
    assert code == 1 and "target tokenizer   not recorded" in out
    assert f"draft model        differs: {'0' * 64} in the file, {own.draft.model_hash} in the pair" in out
    made = lambda **kw: create_adapter(1, hidden_dim=128, **kw)
    for name, adapter, code, said in (
            ("a.pt", made(head_hash=own.target.head.hash), 0, "target head        equal"),
            ("b.pt", made(), 0, "target head        not recorded"),
            ("c.pt", made(head_hash="f" * 64), 1, f"target head        differs: {'f' * 64}"),
            ("d.pt", create_adapter(2, hidden_dim=64), 1,
             "draft width        differs: 64 in the file, 128 in the pair")):
        adapter.save_checkpoint(tmp_path/name)
        found, out, _ = run("featsd_verify", tmp_path/name, "--pair", "pocket")
        assert found == code and said in out, out
    for dest in ("one.pt", "folder"): # what became the study's file still knows its models
        assert run("featsd_convert", store, tmp_path/dest)[0] == 0
        code, out, _ = run("featsd_verify", tmp_path/dest, "--pair", "pocket")
        assert code == 0 and out.count("equal: ") == 12
    d = torch.load(tmp_path/"one.pt", weights_only=True)
    d["config"]["store"] = dict(target=torch.ones(2), draft=dict(hash=torch.ones(2), quant="4bit"))
    torch.save(d, tmp_path/"two.pt")
    code, out, _ = run("featsd_verify", tmp_path/"two.pt", "--pair", "pocket")
    assert code == 1 and out.count("not recorded") == 9
    assert "draft quant        differs: 4bit in the file, fp32 in the pair" in out
    pair = f"draft={ROOT}/featsd/models/pocket_weights/target,target={ROOT}/featsd/models/pocket_weights/target"
    code, out, _ = run("featsd_verify", store, "--pair", pair) # a pair of two other models
    assert code == 1 and "draft model        differs" in out and "target model       equal" in out
    code, _, err = run("featsd_verify", store, "--pair", "bucket")
    assert code == 2 and "bucket" in err and len(err.strip().splitlines()) == 1


def test_verify_a_run_folder(store, tmp_path):
    code, out, err = run("featsd_train", "--train_data", store, "--output_dir", tmp_path/"ck", *LITTLE)
    folder = Path(out.strip().splitlines()[-1])
    code, out, _ = run("featsd_verify", folder, "--pair", "pocket")
    said = dict(line.split(None, 1) for line in out.splitlines()[:5])
    assert code == 0 and set(said) == RUN and "target head        equal" in out
    assert said["best_model.pt"].startswith("ok: L1, 128 → 128") and ", head " in said["best_model.pt"]
    assert said["history.json"] == "ok: 2 epochs"
    other = create_adapter(1, hidden_dim=128, bottleneck_dim=7)
    def cut(n): return lambda f: f.write_bytes(f.read_bytes()[:n])
    for name, break_it, says in (
            ("history.json", lambda f: f.write_text('{"val_loss": [1, NaN]}'), "finite numbers in val_loss"),
            ("training_curves.png", cut(99), "not a readable PNG"), ("final_model.pt", cut(999), "adapter checkpoint"),
            ("best_model.pt", other.save_checkpoint, "config.json says"),
            ("config.json", lambda f: f.write_text("[]"), "expected an object"),
            ("best_model.pt", Path.unlink, "missing")):
        copy = shutil.copytree(folder, tmp_path/"copy")
        break_it(copy/name)
        code, out, _ = run("featsd_verify", copy)
        assert code == 1 and "5 files, 1 wrong" in out, out
        assert says in next(line for line in out.splitlines() if line.startswith(name)), out
        shutil.rmtree(copy)


def test_verify_tables_and_heads(tmp_path):
    import numpy as np
    from safetensors.torch import save_file

    from featsd.models.words import NGramTable
    own = load_pair("pocket")
    NGramTable([np.arange(5)], 2, own.target.tokenizer_hash).save(tmp_path/"t.safetensors")
    NGramTable([np.arange(5)], 2, "0" * 64).save(tmp_path/"other.safetensors")
    own.target.head.save(tmp_path/"head.safetensors")
    w = own.target.head.lm_head.weight.clone()
    torch.save(dict(lm_head_weight=w, vocab_size=len(w), hidden_dim=128, model_id="m"), tmp_path/"vl_lm_head.pt")
    for name, code, says in (
            ("t.safetensors", 0, "order 2"), ("other.safetensors", 1, "target tokenizer   differs"),
            ("head.safetensors", 0, "target ids         equal"), ("vl_lm_head.pt", 0, "without the final norm")):
        found, out, err = run("featsd_verify", tmp_path/name, "--pair", "pocket")
        assert found == code and says in out, out + err
    data = (tmp_path/"t.safetensors").read_bytes()
    (tmp_path/"t.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    w[3, 4] = float("inf")
    torch.save(dict(lm_head_weight=w, vocab_size=9), tmp_path/"bad.pt")
    torch.save(dict(lm_head_weight=w), tmp_path/"inf.pt")
    save_file({"a": torch.ones(1)}, tmp_path/"none.safetensors")
    (tmp_path/"torn.safetensors").write_bytes(data[:50])
    torch.save(Evil(), tmp_path/"evil.pt")
    for name, code, says in (
            ("t.safetensors", 1, "digest"), ("bad.pt", 1, "vocab_size 9"), ("inf.pt", 1, "infinity"),
            ("none.safetensors", 1, "something else"), ("torn.safetensors", 2, "damage"),
            ("evil.pt", 1, "nothing of it was run")):
        found, out, err = run("featsd_verify", tmp_path/name)
        assert found == code and says in out + err, out + err
    assert run("featsd_verify", tmp_path/"head.safetensors", "--repair")[0] == 2 and not Path("ran").exists()
