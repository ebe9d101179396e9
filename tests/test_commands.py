"Commands as a user types them: --help teaches, bad input is one line and exit status 2, nothing is left half-written"
import contextlib
import io
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

import featsd.commands as commands
from featsd.adapters import create_adapter
from featsd.data.store import open_states
from featsd.extract import extract
from featsd.models.backbone import load_pair

ROOT = Path(__file__).parents[1]


def declared():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    return sorted(line.split("=")[0].strip() for line in config["DEFAULT"]["console_scripts"].split() if "featsd.commands" in line)


def run(name, *args):
    "Exit status, stdout and stderr of a command"
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = [name, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            # as a console script calls it: fastcore reads the arguments only there
            exec(compile("command()", "script.py", "exec"), {"__name__": "__main__", "__file__": "script.py", "command": getattr(commands, name)})
        code = 0
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return extract(folder, pair=load_pair("pocket"), split="test", quant="fp32", max_samples=4, max_questions=3, progress=False)


class Evil:
    def __reduce__(self): return exec, ("import pathlib; pathlib.Path('ran').touch()",)


@pytest.mark.parametrize("name", declared())
def test_help_explains_every_flag(name):
    code, out, _ = run(name, "--help")
    assert code == 0 and len(out.splitlines()) > 5
    import inspect
    flags = [p for p in inspect.signature(getattr(commands, name)).parameters]
    assert flags and all(f in out for f in flags)


def test_unknown_flag_is_status_2():
    code, _, err = run("featsd_size", "--nonsense", "1")
    assert code == 2 and "nonsense" in err


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
        ("featsd_adapters", ["--hidden_dim", "-1"], "-1"),
        ("featsd_demo", ["--clips", "1"], "at least 4"),
        ("featsd_timeline", ["--pair", "bucket"], "bucket"),
    ]


@pytest.mark.parametrize("case", range(17))
def test_bad_input_is_one_line_and_status_2(store, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    name, args, said = bad_cases(store, tmp_path/"in")[case]
    before = sorted(p for p in tmp_path.rglob("*"))
    code, _, err = run(name, *(["--output_dir", tmp_path/"out"] if name in ("featsd_train", "featsd_measure") else []), *args)
    assert code == 2, (code, err)
    assert said in err and len([line for line in err.splitlines() if line.strip()]) == 1, err
    assert not (tmp_path/"ran").exists()
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p not in before]
    assert not written, written


def test_train_measure_verify_from_the_command_line(store, tmp_path):
    code, out, err = run("featsd_train", "--train_data", store, "--num_epochs", 2, "--output_dir", tmp_path/"ck", "--no-progress", "--val_split", .25)
    assert code == 0, err
    folder = Path(out.strip().splitlines()[-1])
    assert {"best_model.pt", "final_model.pt", "config.json", "history.json", "training_curves.png"} <= {p.name for p in folder.iterdir()}
    code, out, err = run("featsd_measure", "--checkpoint", folder/"best_model.pt", "--test_data", store, "--output_dir", tmp_path/"m")
    assert code == 0, err
    assert (tmp_path/"m"/"acceptance_metrics.json").exists() and (tmp_path/"m"/"position_stats.json").exists()
    code, out, err = run("featsd_verify", store)
    assert code == 0 and "0 wrong" in out
    chunk = next((store/"chunks").glob("*.safetensors"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    copy = tmp_path/"copy"
    import shutil
    shutil.copytree(store, copy)
    (copy/"chunks"/chunk.name).write_bytes(data)
    code, out, _ = run("featsd_verify", copy)
    assert code == 1 and chunk.name in out
    assert len(open_states(store)) == 12
