"Several processes, launched as a user launches them: the same bytes, the same curve, what a killed launch leaves"
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from closeness import near, off, tol
from patience import HANG, until
from retrace import recorded, told

from featsd.data.chunk import VOLATILE
from featsd.data.store import open_states
from featsd.extract import extract
from featsd.train import HiddenAdapterTrainer, open_data, train_adapter

ROOT = Path(__file__).parents[1]
NAME = "chunked_test_1s_fp32"
FLAGS = "--quant fp32 --split test --chunked --chunk_size 3 --max_questions 3 --max_samples 9".split()
TRAIN = dict(val_split=.2, num_epochs=6, batch_size=4, learning_rate=3e-3)
# operations behind a gradient: ten products of width 128, added up over a batch of up to a hundred positions
CHAIN = 10 * 128 * 100


def env(**more):
    launchers = "RANK|WORLD_SIZE|LOCAL_|MASTER_|ACCELERATE_|FEATSD_LAUNCH"
    keep = {k: v for k, v in os.environ.items() if not re.match(launchers, k)}
    paths = [str(ROOT), str(ROOT/"tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return keep | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": os.pathsep.join(paths)} | {k: str(v) for k, v in more.items()}


def launch(name, *args, n=2, **more):
    module = [name] if name == "retrace" else ["featsd", name]
    command = [Path(sys.executable).parent/"accelerate", "launch", "--num_processes", n, "--cpu", "-m", *module, *args]
    return subprocess.Popen(list(map(str, command)), env=env(**more), cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


SLEEP = "[sys.executable, '-c', 'import time; time.sleep(1)']"
@pytest.mark.parametrize("how", [f"launch.supervise({SLEEP}, 2)", f"watch.watch({SLEEP}, 'beat', poll_s=.1)"])
def test_what_nohup_protects_goes_on_when_the_terminal_closes(tmp_path, how):
    script = f"""import os, signal, sys, threading
signal.signal(signal.SIGHUP, signal.SIG_IGN) # as nohup does
from pathlib import Path
from featsd.base import processes as launch, processes as watch
threading.Timer(.4, os.kill, (os.getpid(), signal.SIGHUP)).start()
sys.exit({how.replace("'beat'", "Path('beat')")})"""
    assert subprocess.run([sys.executable, "-c", script], env=env(), cwd=tmp_path, timeout=HANG).returncode == 0


def end(p):
    out, err = p.communicate(timeout=HANG)
    return p.returncode, out, err


def workers(p): # rank → process
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(p.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error): found[child.environ().get("RANK", "starter")] = child
    return found


def content(store): # every file that is part of a store; of the manifest what decides the bytes
    files = {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()
             and f.name not in (".lock", "timings.jsonl")}
    files["manifest.json"] = {k: v for k, v in json.loads(files["manifest.json"]).items() if k not in VOLATILE}
    return files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield extract(tmp_path_factory.mktemp("whole"), quant="fp32", split="test", chunk_size=3, max_questions=3,
                  max_samples=9, progress=False)
    torch.set_num_threads(threads)


def test_two_processes_write_the_store_of_one(whole, tmp_path):
    p, seen = launch("extract", "--output_dir", tmp_path, *FLAGS), {}
    while p.poll() is None: seen |= workers(p); time.sleep(.1)
    code, out, err = end(p)
    assert code == 0, err
    assert {"0", "1"} <= seen.keys()                                         # there were two
    assert content(tmp_path/NAME) == content(whole)
    assert out.split() == [str(tmp_path/NAME)]                               # one path
    assert err.count("extract test:   0%") == 1 and "27/27" in err           # one bar, and it counts all


def alone(name, *args):
    return subprocess.Popen(list(map(str, [sys.executable, "-m", "featsd", name, *args])), env=env(), cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("again", [(launch, alone), pytest.param((launch, launch), marks=pytest.mark.slow)],
                         ids=["launch and one process", "two launches"])
def test_a_worker_killed_then_two_at_once(whole, tmp_path, again):
    store = tmp_path/NAME
    p = launch("extract", "--output_dir", tmp_path, *FLAGS)
    until(lambda: list(store.glob("chunks/*.json")) or p.poll() is not None)
    crew = workers(p)
    if not {"0", "1"} <= crew.keys(): pytest.skip("the run ended before the signal came")
    crew["1"].kill()
    code, _, err = end(p)
    if code == 0: pytest.skip("the run ended before the signal came")
    assert re.search(r"process 1 of 2 \(pid \d+\) was killed by signal 9.*run the same command again", err)
    assert "pairs are safe in" in err
    assert not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in crew.values()) # nobody works on
    left = set(content(whole)) - set(content(store))
    assert any("chunks/" in f for f in left)
    both = [end(p) for p in [start("extract", "--output_dir", tmp_path, *FLAGS) for start in again]]
    assert any(code == 0 for code, *_ in both), both
    for code, _, err in both: # the second one waited, or was refused
        assert code == 0 or re.search(r"expected no other writer, found process \d+ holding it", err), err
    assert content(store) == content(whole)


def curve(folder):
    return json.loads((folder/"history.json").read_text()), json.loads((folder/"config.json").read_text())


def same_curve(ours, theirs, positions):
    "Two curves at the same weights; of the shares one position may lie within rounding of a threshold"
    (a, ca), (b, cb) = ours, theirs
    assert a.keys() == b.keys()
    for k in ("epochs", "best_epoch"): assert ca["result"][k] == cb["result"][k]
    for k in a:
        if "accept" in k or "top1" in k: assert off(b[k], a[k], size=1) < 1.5 / positions, k
        else: near(b[k], a[k], CHAIN, size=max(1., *a[k]), what=k)
    assert ca["training"] == cb["training"] and ca["data"] == cb["data"]


def retraced(file, steps, n=2):
    "Each gradient is that of one process, and all processes made the same weights of it"
    apart = told(file, n)
    assert len(apart) == len(steps) and max(apart) <= tol(CHAIN), max(apart)
    file.unlink() # it is large


def held_out(val): return sum(val.length(i, "draft_forced") for i in range(len(val)))


def flags(settings): return [x for k, v in settings.items() for x in (f"--{k}", v)]


@pytest.mark.parametrize("level,loss,more", [(1, "mse_cos", {}),
                                             (4, "kl", dict(num_epochs=12, early_stopping=2, learning_rate=1e-2))])
def test_two_processes_learn_as_one(whole, tmp_path, level, loss, more):
    s = TRAIN | more
    train, val = open_data(whole, None, s["val_split"], 0)
    lengths = [train.length(i, "draft_forced") for i in range(len(train))]
    # five batches of 4 pairs and one of 1, of many lengths: the last one is no work for two
    assert len(train) == 21 and len(set(lengths)) > 2
    with recorded(tmp_path/"steps") as steps:
        one = train_adapter(whole, adapter_level=level, loss=loss, output_dir=tmp_path/"one", progress=False, **s)
    code, out, err = end(launch("retrace", "--train_data", whole, "--output_dir", tmp_path/"two", *flags(s),
                                "--adapter_level", level, "--loss", loss, RETRACE=tmp_path/"steps"))
    assert code == 0, err
    folder, = (tmp_path/"two").iterdir()                                     # one process writes
    assert out.strip().endswith(str(folder)) and out.count("level") == 1
    retraced(tmp_path/"steps", steps)
    same_curve(curve(Path(one["folder"])), curve(folder), held_out(val))
    if level == 4: assert one["epochs"] < s["num_epochs"]                  # both stopped early, and at the same epoch
    assert {p.name for p in folder.iterdir()} == {p.name for p in Path(one["folder"]).iterdir()}
    a, b = (torch.load(f/"best_model.pt", weights_only=True)["model_state_dict"] for f in (Path(one["folder"]), folder))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse_cos", "ce", "kl", "tv", "nla", "kl+.1*mse_cos"])
def test_every_level_and_loss_by_three(whole, tmp_path, loss):
    with recorded(tmp_path/"steps") as steps:
        for level in (1, 2, 3, 4):
            train_adapter(whole, adapter_level=level, loss=loss, output_dir=tmp_path/"one", progress=False, **TRAIN)
    code, _, err = end(launch("retrace", "--train_data", whole, "--output_dir", tmp_path/"three", *flags(TRAIN),
                              "--adapter_level", "all", "--loss", loss, n=3, RETRACE=tmp_path/"steps"))
    assert code == 0, err
    retraced(tmp_path/"steps", steps, 3)
    one, three = ({(c := curve(f))[1]["adapter"]["level"]: c for f in (tmp_path/which).iterdir()}
                  for which in ("one", "three"))
    for level in (1, 2, 3, 4):
        same_curve(one[level], three[level], held_out(open_data(whole, None, TRAIN["val_split"], 0)[1]))


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two(whole, tmp_path, monkeypatch):
    s = dict(adapter_level=4, loss="kl", **TRAIN)
    with recorded(tmp_path/"steps") as steps: one = train_adapter(whole, output_dir=tmp_path/"one", progress=False, **s)
    done = 2 * len(steps) // one["epochs"]
    epoch = HiddenAdapterTrainer.train_epoch
    def stop(self, n, *a):
        if n == 3: raise RuntimeError("stop")
        return epoch(self, n, *a)
    monkeypatch.setattr(HiddenAdapterTrainer, "train_epoch", stop)
    with pytest.raises(RuntimeError, match="stop"): train_adapter(whole, output_dir=tmp_path/"two", progress=False, **s)
    folder, = (tmp_path/"two").iterdir()
    assert (folder/"last.pt").exists()
    for _ in range(2): # to the end; then it is finished, and said so
        code, out, err = end(launch("retrace", "--train_data", whole, "--output_dir", tmp_path/"two", *flags(s),
                                    "--resume", RETRACE=tmp_path/"steps", RETRACE_START=done))
        assert code == 0, err
        assert out.strip().endswith(str(folder))
    retraced(tmp_path/"steps", steps[done:])
    same_curve(curve(Path(one["folder"])), curve(folder), held_out(open_data(whole, None, s["val_split"], 0)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_launcher_leaves_nobody_and_no_lock(whole, tmp_path, number):
    store = tmp_path/NAME
    p = launch("extract", "--output_dir", tmp_path, *FLAGS)
    until(lambda: list(store.glob("chunks/*.json")) or p.poll() is not None)
    crew = workers(p)
    p.send_signal(number)
    until(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in crew.values()))
    p.communicate()
    code, _, err = end(launch("extract", "--output_dir", tmp_path, *FLAGS, n=3))
    assert code == 0, err
    assert content(store) == content(whole)


@pytest.mark.slow
def test_torchrun_and_a_packed_file(whole, tmp_path):
    packed = [f for k, f in enumerate(FLAGS) if "--chunk" not in f and FLAGS[k - 1] != "--chunk_size"]
    command = [Path(sys.executable).parent/"torchrun", "--nproc_per_node", "2", "-m", "featsd", "extract",
               "--output_dir", tmp_path, *packed, "--save_interval", "3", "--checkpoint_name", "x.pt"]
    done = subprocess.run(list(map(str, command)), env=env(), cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path/"x.pt")] and len(open_states(tmp_path/"x.pt")) == 27
    assert content(tmp_path/NAME) == content(whole)


@pytest.mark.slow
def test_bad_input_is_said_once_and_ends_all(whole, tmp_path):
    code, _, err = end(launch("train", "--train_data", tmp_path/"absent", "--output_dir", tmp_path/"x"))
    assert code != 0 and "expected a store, found nothing" in err and "process 0 of 2" in err or "process 1 of 2" in err
    code, _, err = end(launch("train", "--train_data", whole, "--output_dir", tmp_path/"x", "--resume", "--loss",
                              "mae"))
    assert code != 0 and "expected one of mse_cos" in err
