"The bench: every row runs and is well formed, both ways do the same work, nothing is left behind; none sees a speed"
import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from dataclasses import asdict

import numpy as np
import pytest
import torch
from closeness import near

import featsd.bench as B
import featsd.commands as commands
import featsd.state_goals as S
import featsd.token_goals as T
from featsd.base.core import FeatsdError
from featsd.data.clips import open_clips
from featsd.extract import pair_states
from featsd.metrics import compute_all_metrics_parallel
from featsd.models.backbone import load_pair
from featsd.models.lean import lean

FIELDS = {"name", "goal", "value", "low", "high", "n", "unit", "at_least", "at_most", "note", "met", "broken", "bench",
          "verdict"}


def run(*args):
    "Exit status, stdout and stderr of featsd_bench"
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["featsd_bench", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(compile("command()", "script.py", "exec"),
                 {"__name__": "__main__", "__file__": "script.py", "command": commands.featsd_bench})
        code = 0
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def fake(monkeypatch, rows=None, act=lambda b: None, name="fake"):
    "A bench of our own in place of all others"
    def job(b):
        act(b)
        return rows or [B.Goal.of_rounds("r", "a goal", [1., 2., 3.], at_least=5)]
    monkeypatch.setattr(B, "BENCHES", {name: B.Bench(job, 1, 1)})


def well_formed(result, tmp):
    for r in result["rows"]:
        assert set(r) == FIELDS and r["goal"]
        assert r["verdict"] in ("ran", "not built", "pass", "falls short", "reported")
        if r["low"] is not None: assert r["low"] <= r["value"] <= r["high"] and r["n"] >= 1
        assert r["value"] is None or np.isfinite(r["value"])
    assert len({r["name"] for r in result["rows"]}) == len(result["rows"])
    assert not list(tmp.iterdir())


def test_a_quick_run_prints_one_table_and_writes_json(tmp_path):
    (tmp_path/"scratch").mkdir()
    code, out, err = run("--quick", "--only", "metrics,store,startup", "--out", tmp_path/"scratch",
                         "--json", tmp_path/"b.json")
    assert code == 0 and out.count("goal  ") == 1 and "left" in err
    result = json.loads((tmp_path/"b.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} in JSON"))
    well_formed(result, tmp_path/"scratch")
    assert {r["bench"] for r in result["rows"]} == {"metrics", "store", "startup"}
    assert all(r["goal"] in out and r["verdict"] == "ran" for r in result["rows"])
    assert result["machine"]["cores"] == os.cpu_count() and result["machine"]["cpu"]
    assert result["settings"]["threads"] == 1
    assert f"{B.bench_table(result)}\n" == out


@pytest.mark.slow
def test_every_bench_runs_quickly(tmp_path):
    result = B.run_bench(quick=True, out=tmp_path)
    well_formed(result, tmp_path)
    assert {r["bench"] for r in result["rows"]} == set(B.BENCHES) and result["seconds"] < 180


def test_what_falls_short_is_reported_with_status_0(monkeypatch, tmp_path):
    fake(monkeypatch)
    code, out, _ = run("--out", tmp_path)
    assert code == 0 and "falls short" in out and "1 fall short" in out


@pytest.mark.parametrize("row, verdict", [
    (dict(value=8., at_least=8), "pass"), (dict(value=7.99, at_least=8), "falls short"),
    (dict(value=2., at_most=2), "pass"), (dict(value=2.01, at_most=2), "falls short"),
    (dict(value=.98, at_least=.9, at_most=1.1), "pass"), (dict(value=1.2, at_least=.9, at_most=1.1), "falls short"),
    (dict(value=3., at_least=1, met=False), "falls short"), (dict(value=3.), "reported"), (dict(), "not built"),
    (dict(value=9., at_least=1, broken=True), "BROKEN")])
def test_verdicts(row, verdict):
    g = B.Goal("n", "some goal", **row)
    assert g.verdict == verdict and verdict in str(B.goals_table([asdict(g) | {"verdict": g.verdict}]))


def test_arms_take_turns_and_warm_up_is_not_counted():
    seen = []
    arms = {k: B.timed(lambda r, k=k: seen.append((k, r)) or (k, r)) for k in "AB"}
    seconds, results = B.Turns()(arms, 3, warmup=2, on_cpu=False)
    assert seen == [(k, r) for r in range(-2, 3) for k in "AB"]
    assert results["A"] == [("A", 0), ("A", 1), ("A", 2)] and len(seconds["B"]) == 3
    assert B.over([4., 9.], [2., 3.]) == [2., 3.]


# Equal work: each comparison notices when one side does less

def test_unequal_work_is_broken_and_status_1(monkeypatch, tmp_path):
    fake(monkeypatch, act=lambda b: B.same(False, "other ids"))
    code, out, _ = run("--out", tmp_path)
    assert code == 1 and "BROKEN" in out and "other ids" in out


@pytest.mark.parametrize("name, lie", [
    ("metrics", ("study_metrics", lambda real: lambda *a: real(*a) | {"accept_90": .5})),
    ("decoding", ("bare_decode", lambda real: lambda *a: (1., [1, 2, 3]))),
    ("extraction", ("answer_alone", lambda real: lambda *a: (lambda ids, h: (ids, h + 1e-3))(*real(*a)))),
    ("store", ("plain_read", lambda real: lambda *a: iter([(np.zeros(8, np.uint8),) * 2])))])
def test_a_side_that_does_other_work_is_found_out(monkeypatch, tmp_path, name, lie):
    side, other = lie
    room = S if hasattr(S, side) else T
    monkeypatch.setattr(room, side, other(getattr(room, side)))
    rows = B.run_bench([name], quick=True, out=tmp_path)["rows"]
    assert [r["verdict"] for r in rows] == ["BROKEN"] and rows[0]["value"] is None and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def pair(): return load_pair("pocket")


def test_one_pair_at_a_time_gives_the_same_ids_and_states(pair):
    data = open_clips("pocket", "val", 2)
    clips, asked = [data[0], data[1]], data.questions[3:5]
    for k, p in enumerate(pair_states(pair, clips, asked)):
        for model, ids, stream in ((pair.target, p.target_ids, "target"), (pair.draft, p.draft_ids, "draft_free")):
            alone, h = S.answer_alone(model, clips[k // 2], asked[k % 2])
            assert alone == ids.tolist() and near(h, p.streams[stream], 16 * 7 * 128) # layers, products in each, width


def test_bare_loop_is_plain_decoding(pair):
    for fast in (lean(pair.target), lean(pair.draft)):
        for p in T.prompts_of(pair, 2, 2):
            prefix = p.target if fast.name == pair.target.name else p.draft
            for n in (1, 7, 50):
                assert T.bare_decode(fast, prefix, n)[1] == fast.generate([prefix], n)[0].ids.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_studys_metrics_are_ours(seed):
    data = S.known_cosines(30, 24, 96, seed)
    theirs, ours = S.study_metrics(*data), compute_all_metrics_parallel(data)
    assert len(theirs) > 40 and set(theirs) <= set(ours)
    for k, v in theirs.items():
        size = max(1., np.abs(v).max())
        near(np.asarray(ours[k], float), np.asarray(v, float), data[2].numel(), size=size, what=k)


def test_plain_read_reads_the_same_bytes(tmp_path):
    states = S.made_up(tmp_path/"s", 25, 64, chunk_size=10)
    raw = list(S.plain_read(tmp_path/"s", ("target", "draft_forced"), 1000))
    for side, name in ((0, "h_target"), (1, "h_draft")):
        batches = states.batches("draft_forced", 4, dtype=torch.bfloat16, flat=True)
        ours = torch.cat([getattr(b, name) for b in batches])
        assert np.array_equal(np.concatenate([r[side] for r in raw]), ours.view(torch.uint8).flatten().numpy())


def test_made_up_stores_are_whole_and_seeded(tmp_path):
    from featsd.data.store import verify_store
    a, b = (S.made_up(tmp_path/n, 12, 32, chunk_size=5) for n in "ab")
    assert [p.n_target for p in a.pairs] == [p.n_target for p in b.pairs]
    assert all(25 <= p.n_target <= 75 for p in a.pairs)
    assert all(v == "ok" for _, v in verify_store(tmp_path/"a"))


def test_peak_memory_is_what_was_held():
    code = ("import json, numpy as np; from featsd.bench import peak_rss; a = peak_rss(); x = np.ones(2**25); "
            "print(json.dumps([a, peak_rss()]))")
    before, after = json.loads(B.elsewhere("-c", code))
    assert 2**27 < before and 2**28 <= after - before + 2**22 <= 2**29


def test_a_child_that_fails_is_an_error():
    code = "import sys; print('too bad', file=sys.stderr); sys.exit(3)"
    with pytest.raises(FeatsdError, match="status 3.*too bad"): B.elsewhere("-c", code)


# Bad input, full disks, signals

@pytest.mark.parametrize("args, says", [
    (["--only", "metrics,speed"], "'speed'"), (["--only", ","], "found none"), (["--threads", "0"], "threads"),
    (["--big_gb", "0"], "big_gb"), (["--big_gb", "nan"], "big_gb"), (["--json", "nowhere/b.json"], "nowhere"),
    (["--out", __file__], "test_bench.py")])
def test_bad_input_is_one_line_and_status_2(monkeypatch, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 2 and out == "" and says in err and err.startswith("featsd_bench: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(10**12, 10**12 - 10**9, 10**9))
    code, _, err = run("--only", "memory", "--big_gb", "8", "--out", tmp_path)
    assert code == 2 and "8.5 GB of free disk, found 1.0" in err and not list(tmp_path.iterdir())


def test_a_bench_that_fails_is_a_row_and_costs_no_other(monkeypatch, tmp_path):
    def act(b):
        (b.scratch/"big").write_bytes(b"x")
        raise RuntimeError("no")
    fake(monkeypatch, act=act)
    (tmp_path/"scratch").mkdir()
    result = B.run_bench(out=tmp_path/"scratch", json_file=tmp_path/"bench.json")
    assert [(r["verdict"], r["note"]) for r in result["rows"]] == [("BROKEN", "RuntimeError: no")]
    assert not list((tmp_path/"scratch").iterdir())
    assert json.loads((tmp_path/"bench.json").read_text()) == json.loads(json.dumps(result))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_scratch_goes_away_on_a_signal(monkeypatch, tmp_path, number, code):
    def act(b):
        (b.scratch/"big").write_bytes(b"x")
        os.kill(os.getpid(), number)
    fake(monkeypatch, act=act)
    assert run("--out", tmp_path)[0] == code and not list(tmp_path.iterdir())
