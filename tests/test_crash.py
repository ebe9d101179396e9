"Killed at any instant, out of space, out of rights: what is on disk stays right, the same command makes the same bytes"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import HANG, gone, until

from featsd.base.core import FeatsdError
from featsd.data.clips import LISTING
from featsd.data.events import save_events
from featsd.data.store import StoreLock, open_states
from featsd.base.processes import Heartbeat, heartbeat_file, read_heartbeat, watch
from featsd.data.world import QUESTIONS, make_clip

HERE = Path(__file__).parent
ENV = (os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                     "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))})


def server(*args, timeout=HANG):
    "One parent with the pair loaded, that forks the runs (see crash_server.py)"
    r = subprocess.run([sys.executable, HERE/"crash_server.py", *map(str, args)], env=ENV, capture_output=True,
                       text=True, timeout=timeout)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
    return json.loads(r.stdout.splitlines()[-1])


def told(what, got): print(f"\n{what}: " + ", ".join(f"{v} {k}" for k, v in got.items()))


# ---- signals

@pytest.mark.parametrize("name,n", [("SIGKILL", 40), ("SIGTERM", 6), ("SIGINT", 6)])
def test_stopped_at_random_instants(tmp_path, name, n):
    got = server("kills", tmp_path, n, 0, name)
    told(name, got)
    assert got["signals"] >= n and got["identical"] == got["finished"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name,n", [("SIGKILL", 220), ("SIGTERM", 40), ("SIGINT", 40)])
def test_stopped_at_many_random_instants(tmp_path, name, n):
    got = server("kills", tmp_path, n, 1, name, timeout=HANG)
    told(name, got)
    assert got["signals"] >= n and got["identical"] == got["finished"] >= 1


@pytest.mark.parametrize("n", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_training_killed_at_random_instants(tmp_path, n):
    got = server("train", tmp_path, n, 0)
    told("SIGKILL, training", got)
    assert got["signals"] >= n and got["identical"] == got["finished"] >= 1


# ---- mishaps

MISHAPS = {"truncated": 0, "no sidecar": 0, "stale index": 0, "left over": 0, "flipped": 0, "size limit": 2, "nan": 2,
           "read-only": 2}


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mishaps")
    for p in (folder, *folder.parents[:3]): # the read-only case gives up root's rights and must still get here
        if p.stat().st_uid == os.geteuid() and "pytest" in p.name: p.chmod(0o755)
    return server("mishaps", folder, *MISHAPS)


@pytest.mark.parametrize("name", MISHAPS)
def test_mishaps(mishaps, name):
    got = mishaps[name]
    last = got["said"].strip().splitlines()[-1]
    assert got["code"] == MISHAPS[name] and "Traceback" not in got["said"], got
    assert got["again"] == 0 and got["identical"], got
    says = {"size limit": "chunk_000006.safetensors: could not be written (File too large)",
            "nan": "expected finite states, found 1", "read-only": "cannot write here"}
    if got["code"]: assert last.startswith("featsd_extract: ") and says[name] in last, last
    if name == "flipped": assert len(got["verdicts"]) == 1 and "sha256" in got["verdicts"][0]
    assert got["more"] == {"size limit": 0, "nan": 1, "read-only": 0, "no sidecar": 4}.get(name, 3)


def test_full_disk(tmp_path):
    got = server("full", tmp_path)
    if "skip" in got: pytest.skip(got["skip"])
    last = got["said"].strip().splitlines()[-1]
    assert got["code"] == 2 and "No space left on device" in last and "make room" in last, got
    assert "Traceback" not in got["said"], got
    assert got["again"] == 0 and got["identical"], got


# ---- clips that cannot be read

@pytest.fixture
def dataset(tmp_path):
    "Four clips; the events of one are cut short, the pictures of another are no pictures"
    from PIL import Image
    root, listing = tmp_path/"data", []
    for i in range(4):
        clip, name = make_clip("test", i), f"s{i}/clip"
        (root/"event_npy"/f"s{i}").mkdir(parents=True)
        (root/"video"/name).mkdir(parents=True)
        save_events(root/"event_npy"/f"{name}.npz", clip.events)
        for k, frame in enumerate(clip.frames): Image.fromarray(frame).save(root/"video"/name/f"{k}.png")
        listing.append(dict(id=f"clip{i}", split="test", event_data=f"{name}.npz", video_data=name))
    (root/LISTING).write_text(json.dumps(listing))
    # the built-in pair knows no others
    (root/"questions.json").write_text(json.dumps([dict(question=q, count=9) for q in QUESTIONS]))
    f = root/"event_npy/s1/clip.npz"
    f.write_bytes(f.read_bytes()[:-300])
    for f in (root/"video/s2/clip").iterdir(): f.write_text("<script>alert(1)</script>")
    return root


def command(*args):
    return subprocess.run([sys.executable, "-m", "featsd", "extract", *map(str, args)], env=ENV, capture_output=True,
                          text=True, timeout=HANG)


def test_unreadable_clips_are_skipped_counted_and_listed(dataset, tmp_path):
    args = ["--dataset_dir", dataset, "--split", "test", "--quant", "fp32", "--chunked", "--chunk_size", 4,
            "--max_questions", 2, "--max_new_tokens", 4]
    r = command("--output_dir", tmp_path/"out", *args)
    assert r.returncode == 0, r.stderr
    store = tmp_path/"out/chunked_test_1s_fp32"
    assert open_states(store).clips == ["clip0", "clip3"]
    assert json.loads((store/"index.json").read_text())["skipped"] == 2
    skipped = [s for f in sorted(store.glob("chunks/*.json")) for s in json.loads(f.read_text())["skipped"]]
    assert [s["clip_id"] for s in skipped] == ["clip1", "clip2"] and "damaged" in skipped[0]["reason"]
    assert "not a readable PNG" in skipped[1]["reason"]
    assert not any(str(tmp_path) in s["reason"] for s in skipped) # no machine's path in a store's bytes
    r = command("--output_dir", tmp_path/"strict", *args, "--strict")
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode == 2 and "clip clip1 cannot be read" in last and "--strict" in last
    assert "Traceback" not in r.stderr
    # its first chunk holds the bad clip
    with pytest.raises(FeatsdError, match="found none"): open_states(tmp_path/"strict/chunked_test_1s_fp32")


# ---- training: one at a time

HOLD = ("import sys; from featsd.data.store import StoreLock; lock = StoreLock(sys.argv[1]); print('held', "
        "flush=True); sys.stdin.read()")


def test_a_second_training_of_a_run_is_refused(tmp_path):
    from test_train import Killed, make_store

    import featsd.train as T
    store, kw = make_store(tmp_path/"store"), dict(num_epochs=3, output_dir=tmp_path/"runs", progress=False,
                                                   val_split=.2)
    real = T.Run.__call__
    def dies(self, trainer): real(self, trainer); raise Killed
    with pytest.MonkeyPatch.context() as m:
        m.setattr(T.Run, "__call__", dies)
        with pytest.raises(Killed): T.train_adapter(store, **kw)
    run, = (tmp_path/"runs").iterdir()
    (run/"last.pt.77.tmp").write_bytes(b"half")
    p = subprocess.Popen([sys.executable, "-c", HOLD, run], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
    try:
        assert p.stdout.readline() == "held\n"
        before = {f.name: f.read_bytes() for f in run.iterdir()}
        for resume in (True, run):
            with pytest.raises(FeatsdError, match=f"process {p.pid} holding") as e:
                T.train_adapter(store, resume=resume, **kw)
            assert str(run) in str(e.value) and "\n" not in str(e.value)
        assert {f.name: f.read_bytes() for f in run.iterdir()} == before
    finally: p.kill(); p.wait()
    r = T.train_adapter(store, resume=True, **kw) # a killed holder lets go
    assert r["folder"] == str(run) and r["epochs"] == 3
    assert sorted(f.name for f in run.iterdir()) == ["best_model.pt", "config.json", "final_model.pt", "history.json",
                                                     "training_curves.png"]
    StoreLock(run).close() # nothing is held after the end


# ---- the heart and the watcher

def test_heartbeat_is_whole_at_any_instant(tmp_path):
    began = time.time()
    with Heartbeat(tmp_path/"s", 10, every_s=.0005) as heart:
        seen = []
        def looked():
            beat = json.loads(heart.file.read_text())
            assert beat.keys() == {"pid", "done", "total", "time"} and beat["pid"] == os.getpid()
            assert beat["total"] == 10
            if beat["time"] not in seen: seen.append(beat["time"])
            heart(1)
            return len(seen) > 200
        while not looked(): pass
        assert seen == sorted(seen) and began - 1e-3 <= seen[0] and seen[-1] <= time.time() + 1e-3
        assert heart.file == tmp_path/"s.heartbeat.json" == heartbeat_file(f"{tmp_path}/s/")
    assert not list(tmp_path.iterdir())


def test_the_default_beat_is_under_ten_seconds(tmp_path): assert Heartbeat(tmp_path/"s").every_s <= 10


def test_a_heart_on_a_disk_that_cannot_be_written_stops_nobody(tmp_path):
    with Heartbeat(tmp_path/"absent/s") as heart: heart.beat()


def kid(body): return [sys.executable, "-c", "import json, os, signal, sys, time\n" + body]


def looked_after(tmp_path, body, **kw):
    said = []
    kw = dict(backoff_s=.01, poll_s=.02, say=said.append) | kw
    return watch(kid(body), tmp_path/"s.heartbeat.json", **kw), said


class Clock:
    "Stands still until a child has said that it hangs, and again once that was noticed: no load makes a child late"
    def __init__(self, folder): self.hangs, self.said, self.now = folder/"hangs", [], 1000.
    def __call__(self):
        self.now += self.hangs.exists() and not self.said # a second a look
        return self.now


def hung_at(monkeypatch, tmp_path, body, **kw):
    "`watch` by such a clock; `HANG()` in the body says that it hangs"
    clock = Clock(tmp_path)
    monkeypatch.setattr(time, "monotonic", clock)
    body = (f"def HANG(): signal.alarm({HANG}); open({str(clock.hangs)!r}, 'w').close()\n" +
            COUNT.format(str(tmp_path/"n")) + BEAT.format(str(tmp_path/"s.heartbeat.json")) + body)
    code = watch(kid(body), tmp_path/"s.heartbeat.json", backoff_s=0, poll_s=.02, say=clock.said.append, **kw)
    monkeypatch.undo()
    return code, clock.said


COUNT = "f = open({!r}, 'a+'); f.write('.'); f.flush(); f.seek(0); n = len(f.read())\n"
BEAT = ("def beat(done): open({0!r} + '.x', 'w').write(json.dumps(dict(pid=os.getpid(), done=done, total=9, "
        "time=time.time()))); os.replace({0!r} + '.x', {0!r})\n")


@pytest.mark.parametrize("crash", ["sys.exit(1)", "os.abort()", "os.kill(os.getpid(), signal.SIGKILL)",
                                   "raise RuntimeError"])
def test_two_crashes_then_success(tmp_path, crash):
    code, said = looked_after(tmp_path, COUNT.format(str(tmp_path/"n")) + f"if n < 3: {crash}\n")
    assert code == 0 and [line.split("; ")[1] for line in said] == ["restart 1 of 10 in 0.01 s",
                                                                    "restart 2 of 10 in 0.02 s"], said


def test_always_crashing_is_given_up(tmp_path):
    code, said = looked_after(tmp_path, COUNT.format(str(tmp_path/"n")) + "os.abort()", max_restarts=3)
    assert code == 134 and (tmp_path/"n").read_text() == "...." and "gave up after 3 restarts" in said[-1]
    assert len(said) == 4
    assert looked_after(tmp_path, "sys.exit(7)",
                        max_restarts=0) == (7, ["watch: ended with status 7; gave up after 0 restarts. "
                                                "What is done is safe, the same command goes on"])
    with pytest.raises(FeatsdError, match="max_restarts -1"): looked_after(tmp_path, "", max_restarts=-1)


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_ends_that_no_restart_would_change(tmp_path, code):
    assert looked_after(tmp_path, f"sys.exit({code})") == (code, [])


def test_a_heart_that_stops_is_a_restart(tmp_path, monkeypatch):
    "The first child beats and then stands still, with a child of its own; both are killed"
    body = ("if n == 1:\n beat(1)\n if os.fork() == 0:\n  with open({0!r}, 'w') as f: f.write(str(os.getpid()))\n  "
            "HANG(); signal.pause()\n signal.pause()\nfor k in range(5): beat(k); "
            "time.sleep(.05)\nos.unlink({1!r})").format(str(tmp_path/"grandchild"), str(tmp_path/"s.heartbeat.json"))
    code, said = hung_at(monkeypatch, tmp_path, body, stale_s=30)
    assert code == 0 and len(said) == 1 and "no heartbeat for 3" in said[0] and "killed; restart 1" in said[0], said
    until(lambda: gone(int((tmp_path/"grandchild").read_text())))


def test_a_frozen_child_is_a_restart(tmp_path, monkeypatch):
    code, said = hung_at(monkeypatch, tmp_path, "beat(0)\nif n == 1: HANG(); os.kill(os.getpid(), signal.SIGSTOP)",
                         stale_s=30)
    assert code == 0 and len(said) == 1, said


def test_a_heart_that_beats_without_a_pair_is_a_restart(tmp_path, monkeypatch):
    code, said = hung_at(monkeypatch, tmp_path, "beat(0)\nif n == 1: HANG()\nwhile n == 1: beat(0); time.sleep(.001)",
                         stale_s=1e9, hung_s=60)
    assert code == 0 and len(said) == 1 and "no pair for 6" in said[0], said


def test_a_stale_file_of_another_process_is_not_the_childs(tmp_path):
    (tmp_path/"s.heartbeat.json").write_text(json.dumps(dict(pid=1, done=3, total=9, time=1.5)))
    assert looked_after(tmp_path, "time.sleep(.6)", stale_s=.1) == (0, [])
    (tmp_path/"s.heartbeat.json").write_text("[" * 5000)
    assert looked_after(tmp_path, "time.sleep(.3)", stale_s=.1) == (0, [])
    assert read_heartbeat(tmp_path/"s.heartbeat.json") == {}


def test_signals_are_passed_on_once_and_end_the_watch(tmp_path):
    body = ("signal.signal(signal.{0}, lambda *a: (open({1!r}, 'a').write('.'), sys.exit({2})))\nprint('ready', "
            "flush=True)\nwhile True: time.sleep(.1)")
    for name, code in (("SIGTERM", 143), ("SIGINT", 130), ("SIGINT", 1)): # whatever the child makes of it
        got = tmp_path/f"{name}{code}"
        script = ("import sys\nfrom featsd.base.processes import watch\n"
                  f"sys.exit(watch({kid(body.format(name, str(got), code))!r}, {str(tmp_path/'h')!r}))")
        p = subprocess.Popen([sys.executable, "-c", script], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, start_new_session=True)
        assert p.stdout.readline() == "ready\n"
        os.killpg(p.pid, getattr(signal, name)) # as Ctrl-C on a terminal: all of the group
        assert p.wait(timeout=HANG) == code and got.read_text() == "." and not p.stderr.read()


def test_a_signal_while_waiting_ends_the_watch(tmp_path):
    script = (f"import sys\nfrom featsd.base.processes import watch\nsys.exit(watch({kid('sys.exit(1)')!r}, "
              f"{str(tmp_path/'h')!r}, backoff_s=300))")
    p = subprocess.Popen([sys.executable, "-c", script], env=ENV, stderr=subprocess.PIPE, text=True)
    assert "restart 1 of 10 in 300 s" in p.stderr.readline()
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=HANG) == 143


def test_a_child_that_ignores_the_signal_is_killed(tmp_path):
    child = kid("signal.signal(15, signal.SIG_IGN)\nprint(1, flush=True); signal.pause()")
    script = ("import sys\nfrom featsd.base.processes import watch\n"
              f"sys.exit(watch({child!r}, {str(tmp_path/'h')!r}, patience_s=.3, poll_s=.05))")
    p = subprocess.Popen([sys.executable, "-c", script], env=ENV, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "1\n"
    p.send_signal(signal.SIGTERM)
    assert p.wait(timeout=HANG) == 137


def test_no_child_outlives_its_watcher(tmp_path):
    script = ("import sys\nfrom featsd.base.processes import "
              f"watch\nwatch({kid('print(os.getpid(), flush=True); signal.pause()')!r}, {str(tmp_path/'h')!r})")
    p = subprocess.Popen([sys.executable, "-c", script], env=ENV, stdout=subprocess.PIPE, text=True)
    child = int(p.stdout.readline())
    p.kill(), p.wait()
    until(lambda: gone(child))


def test_the_command_is_watched_through_a_kill(tmp_path):
    "featsd_extract --watch, its child killed once: it ends well, and the store is whole"
    args = ["--output_dir", tmp_path, "--split", "test", "--quant", "fp32", "--max_samples", 8, "--max_questions", 2,
            "--max_new_tokens", 6, "--chunked", "--chunk_size", 2]
    store = tmp_path/"chunked_test_1s_fp32"
    p = subprocess.Popen([sys.executable, "-m", "featsd", "extract", *map(str, args), "--watch"], env=ENV,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: list(store.glob("chunks/*.json")) or p.poll() is not None)
    beat = read_heartbeat(heartbeat_file(store))
    assert beat["pid"] != p.pid and beat["total"] == 16
    os.kill(beat["pid"], signal.SIGKILL)
    out, err = p.communicate(timeout=HANG)
    assert p.returncode == 0 and "watch: ended with status 137; restart 1 of 10 in 5 s" in err and out.strip() == str(
        store), err
    assert len(open_states(store)) == 16 and not heartbeat_file(store).exists() and not list(tmp_path.glob("*.tmp"))
