"A parent that has loaded the pair once and forks children that run the real commands; it stops them at random instants"
import functools
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors import safe_open

import featsd
import featsd.commands as commands
import featsd.extract as E
from featsd.base import core
from featsd.models import backbone
from featsd.data import chunk, world
from featsd.data.chunk import VOLATILE
from featsd.data.store import open_states, verify_store
from featsd.base.processes import heartbeat_file

CLIPS, QUESTIONS = 4, 3
SETTINGS = dict(split="test", quant="fp32", max_samples=CLIPS, max_questions=QUESTIONS, max_new_tokens=4, chunked=True,
                chunk_size=2)
STORE = "chunked_test_1s_fp32"
RESUME = "run the same command again to go on"


def prepare():
    "Everything that a child would need seconds for, or could not read any more once it has given up its rights"
    for module in pkgutil.walk_packages(featsd.__path__, "featsd."):
        if module.name != "featsd.__main__": importlib.import_module(module.name)
    torch.set_num_threads(1)
    pair = backbone.load_pair("pocket", quant="fp32")
    backbone.load_pair = E.load_pair = lambda *_, **__: pair
    world.make_clip = functools.cache(world.make_clip)
    for i in range(CLIPS): world.make_clip("test", i, 0)
    return pair


def child(work, log):
    "A forked child that runs `work`, its stderr in a file; returns its pid"
    pid = os.fork()
    if pid: return pid
    code = 99
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1), os.dup2(fd, 2)
        work()
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except KeyboardInterrupt: code = 130 # before the command's own edge
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pid)->int: # exit status, -signal
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def extract(out, **kw): commands.featsd_extract(output_dir=str(out), **SETTINGS | kw)


def run(out, log, before=lambda: None, **kw):
    def work(): before(); extract(out, **kw)
    code = wait(child(work, log))
    return code, Path(log).read_text()


def content(out)->dict:
    "All that counts of a finished extraction: every file, of the manifest what decides the bytes"
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file() and
             p.name not in (".lock", "timings.jsonl")}
    m = f"{STORE}/manifest.json"
    return found | {m: {k: v for k, v in json.loads(found[m]).items() if k not in VOLATILE}}


def check_between(out):
    "After any death: whatever has its name is whole, and what the store counts is right"
    store = Path(out)/STORE
    for f in (*store.glob("chunks/*.safetensors"), *store.glob("head.safetensors")):
        with safe_open(f, "pt"): pass
    for f in store.rglob("*.json"): json.loads(f.read_text())
    if (store/"manifest.json").exists():
        wrong = [(f, v) for f, v in verify_store(store) if v != "ok" and not v.startswith(("missing", "left over"))]
        assert not wrong, wrong
        if list(store.glob("chunks/*.json")): open_states(store)


# ---- ways to die at a chosen point

class Torn:
    "A file whose write number `at` writes a part, and then the process is gone"
    def __init__(self, f, count, rng): self.f, self.count, self.rng = f, count, rng
    def __getattr__(self, name): return getattr(self.f, name)
    def __enter__(self): return self
    def __exit__(self, *a): self.f.close()
    def write(self, part):
        self.count[0] -= 1
        if self.count[0] == 0:
            part = part if isinstance(part, str) else memoryview(part).cast("B")
            self.f.write(part[:self.rng.randrange(len(part) + 1)])
            self.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.f.write(part)


def die_at(at, rng, torn):
    "In the child: SIGKILL itself in file operation (or in the middle of write) number `at`"
    count = [at]
    if torn:
        core.open = lambda *a, **kw: Torn(open(*a, **kw), count, rng)
        return
    def tick():
        count[0] -= 1
        if count[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, args):
        if event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and isinstance(args[1], str) and
                                                               set(args[1]) & set("wa+")):
            tick()
    sys.addaudithook(hook)
    real = os.fsync
    def fsync(fd): real(fd); tick()
    os.fsync = fsync


def kills(folder, n, seed, number=signal.SIGKILL)->dict:
    "At least `n` deaths by `number`, over as many extractions as that takes; every finished one must be `whole`"
    folder, rng = Path(folder), random.Random(seed)
    assert run(folder/"whole", folder/"log")[0] == 0
    whole, began = content(folder/"whole"), time.monotonic()
    assert run(folder/"again", folder/"log")[0] == 0
    usual = time.monotonic() - began
    assert content(folder/"again") == whole
    got = dict(signals=0, early=0, resumes=0, finished=0, identical=0, timer=0, operation=0, torn=0)
    while got["signals"] < n:
        out, kinds = folder/f"r{got['finished']}", ("timer", "operation",
                                                    "torn") if number == signal.SIGKILL else ("timer",)
        while True:
            how, draw = rng.choice(kinds), random.Random(rng.random())
            at = draw.randrange(1, 50 if how == "torn" else 40)
            def work():
                if how != "timer": die_at(at, draw, how == "torn")  # noqa: B023
                extract(out)  # noqa: B023
            pid = child(work, folder/"log")
            if how == "timer":
                time.sleep(draw.uniform(0, usual))
                os.kill(pid, number)
                # an impatient user
                if number != signal.SIGKILL and draw.random() < .3:
                    time.sleep(draw.uniform(0, .02)); os.kill(pid, number)
            code, log = wait(pid), (folder/"log").read_text()
            if code == 0: break
            if number == signal.SIGKILL: assert code == -number, (code, log)
            elif code == -number or (code == 128 + number and RESUME not in log): # before the command had begun
                assert not log or "Traceback" not in log, log
                got["early"] += 1
            else: assert code == 128 + number and RESUME in log and "Traceback" not in log, (code, log)
            got["signals"], got["resumes"], got[how] = got["signals"] + 1, got["resumes"] + 1, got[how] + 1
            check_between(out)
        got["finished"] += 1
        got["identical"] += content(out) == whole
        shutil.rmtree(out)
    return got


# ---- other mishaps of an extraction

def limited(bytes_): resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def half(out, log):
    "An extraction that was killed after its third chunk"
    real = E.log_chunk
    def before():
        def die(path, start, *a):
            if start == 4: os.kill(os.getpid(), signal.SIGKILL)
            real(path, start, *a)
        E.log_chunk = die
    assert run(out, log, before)[0] == -signal.SIGKILL
    assert len(list((out/STORE).glob("chunks/*.json"))) == 3


def mishap(folder, name, pair)->dict:
    "One mishap on a half-made store: how the command ends, what it says, whether the next run gives the whole store"
    folder = Path(folder)
    out, log = folder/"out", folder/"log"
    assert run(folder/"whole", log)[0] == 0
    half(out, log)
    store, kw, before = out/STORE, {}, lambda: None
    f = chunk.chunk_file(store, 2)
    if name == "truncated": os.truncate(f, 700)
    if name == "no sidecar": f.with_suffix(".json").unlink()
    if name == "stale index": (store/"index.json").write_text('{"chunks": [], "pairs": 99}')
    if name == "left over":
        for left in (store/"manifest.json.1.tmp", store/"chunks/chunk_000006.json.1.tmp",
                     Path(f"{heartbeat_file(store)}.tmp"), heartbeat_file(store)):
            left.write_bytes(b"half")
    if name == "size limit": before = lambda: limited(f.stat().st_size - 1)
    if name == "nan":
        def before():
            real, calls = pair.draft.forced, [0]
            def forced(*a):
                calls[0] += 1
                streams = real(*a)
                if calls[0] == 2: streams[0][0, 3] = float("nan")
                return streams
            pair.draft.forced = forced
    if name == "read-only":
        for p in (out, store, store/"chunks"): p.chmod(0o555)
        (store/".lock").chmod(0o444)
        def before():
            if os.geteuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)
    if name == "flipped":
        b = bytearray(f.read_bytes())
        b[len(b) // 2] ^= 1
        f.write_bytes(b)
    chunks = len(list(store.glob("chunks/*.json")))
    code, said = run(out, log, before, **kw)
    for p in (out, store, store/"chunks"): p.chmod(0o755)
    (store/".lock").chmod(0o644)
    result = dict(code=code, said=said, more=len(list(store.glob("chunks/*.json"))) - chunks)
    if name == "flipped": result["verdicts"] = [v for _, v in verify_store(store, repair=True) if v != "ok"]
    if list(store.glob("chunks/*.json")): open_states(store)
    result["again"], _ = run(out, log)
    result["identical"] = content(out) == content(folder/"whole")
    return result


def full_disk(folder)->dict:
    "The same on a small file system of its own"
    folder = Path(folder)
    small, log = folder/"small", folder/"log"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=256k tmpfs '{small}' 2>/dev/null"):
        return dict(skip="no right to mount a small file system here")
    try:
        assert run(folder/"whole", log)[0] == 0
        need = sum(p.stat().st_size for p in (folder/"whole").rglob("*") if p.is_file())
        code = os.system(f"mount -o remount,size={need // 1024 - 24}k '{small}'")
        code, said = run(small/"out", log)
        done = len(list((small/"out"/STORE).glob("chunks/*.json")))
        if done: open_states(small/"out"/STORE)
        os.system(f"mount -o remount,size=64m '{small}'")
        again, _ = run(small/"out", log)
        return dict(code=code, said=said, done=done, again=again,
                    identical=content(small/"out") == content(folder/"whole"))
    finally: os.system(f"umount '{small}'")


def train_kills(folder, n, seed)->dict:
    "At least `n` SIGKILLs of trainings, each gone on with --resume: history, weights and curves as uninterrupted"
    from test_train import make_store

    import featsd.adapters as A
    from featsd.train import train_adapter
    folder, rng = Path(folder), random.Random(seed)
    store = make_store(folder/"store")
    def train(out):
        train_adapter(store, adapter_level=1, num_epochs=8, early_stopping=0, output_dir=out, progress=False,
                      val_split=.2, resume=True)
    def product(out):
        run, = (p for p in Path(out).glob("L1_*") if (p/"config.json").exists())
        assert sorted(p.name for p in run.iterdir()) == ["best_model.pt", "config.json", "final_model.pt",
                                                         "history.json", "training_curves.png"]
        weights = {k: v for name in ("best_model", "final_model")
                   for k, v in A.read_checkpoint(run/f"{name}.pt")["model_state_dict"].items()}
        return (run/"history.json").read_text(), (run/"training_curves.png").read_bytes(), weights
    train(folder/"warm") # here, so that the children find every import done
    began = time.monotonic()
    assert wait(child(lambda: train(folder/"whole"), folder/"log")) == 0, (folder/"log").read_text()
    usual, whole = time.monotonic() - began, product(folder/"whole")
    got = dict(signals=0, finished=0, identical=0, timer=0, operation=0, torn=0)
    while got["signals"] < n:
        out = folder/f"r{got['finished']}"
        while True:
            how, draw = rng.choice(("timer", "operation", "torn")), random.Random(rng.random())
            def work():
                if how != "timer": # noqa: B023
                    at = draw.randrange(1, 45) # noqa: B023
                    die_at(at, draw, how == "torn") # noqa: B023
                    A.open = core.__dict__.get("open", open)
                train(out)  # noqa: B023
            pid = child(work, folder/"log")
            if how == "timer": time.sleep(draw.uniform(0, usual)); os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            if code == 0: break
            assert code == -signal.SIGKILL, (folder/"log").read_text()
            got["signals"], got[how] = got["signals"] + 1, got[how] + 1
            for f in out.rglob("*.pt"): A.read_checkpoint(f)
            for f in out.rglob("*.json"): json.loads(f.read_text())
        a = product(out)
        got["finished"] += 1
        got["identical"] += a[:2] == whole[:2] and all(torch.equal(a[2][k], v) for k, v in whole[2].items())
    return got


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "train":
        print(json.dumps(train_kills(folder, int(rest[0]), int(rest[1]))))
        raise SystemExit
    pair = prepare()
    if what == "kills": out = kills(folder, int(rest[0]), int(rest[1]), signal.Signals[rest[2]])
    elif what == "mishaps":
        out = {name: mishap(Path(folder, name.replace(" ", "_")), name, pair) for name in rest
               if not Path(folder, name.replace(" ", "_")).mkdir()}
    elif what == "full": out = full_disk(folder)
    print(json.dumps(out))
