"The doctor names each planted cause, none in a healthy run, and says what could not be looked at, whatever a file holds"
import copy
import json

import numpy as np
import pytest

from featsd import commands
from featsd.base.core import FeatsdError, write_json
from featsd.data.acceptance import acceptance_of
from featsd.doctor import consult, diagnoses, doctor, gap_by_clip, places, step_in, tail
from featsd.traces import ArmSeen, read_run

GAMMAS, PROMPTS, STEP = (3, 5, 8), 24, 10. # a target step takes so many ms
GOOD = dict(alphas=[.9 * .98 ** i for i in range(8)], wrong=.5, c=.08, o=.03, v=lambda n: 1 + .03 * (n - 1))


def decoded(rng, alphas, gamma, tokens=40): # accepted and drafted of each cycle of an answer
    accepted, drafted = [], []
    while tokens > 0:
        k = min(gamma, tokens - 1)
        n = int((rng.random(k) < alphas[:k]).cumprod().sum())
        accepted, drafted, tokens = [*accepted, n], [*drafted, k], tokens - n - 1
    return accepted, drafted


def comparison(folder, seed=0, **how):
    "A comparison's folder as `Comparison.save` writes it, of a drafter with these rates and costs"
    how, rng, rows, lines = GOOD | how, np.random.default_rng(seed), [], []
    for name, alphas in (("aligned", how["alphas"]), ("aligned, wrong clip", [how["wrong"]] * 8)):
        for g in GAMMAS:
            runs = [decoded(rng, np.array(alphas), g) for _ in range(PROMPTS)]
            for p, (a, d) in enumerate(runs):
                read = [STEP * how["v"](k + 1) * rng.uniform(.97, 1.03) for k in d]
                lines.append(dict(drafter=name, gamma=g, prompt=p, accepted=a, drafted=d, verify_ms=read,
                                  draft_ms=[STEP * how["c"] * k for k in d], cycle_ms=[x + STEP for x in read]))
            n, k = (np.concatenate([r[i] for r in runs]) for i in (0, 1))
            tau, cost = 1 + n.mean(), k.mean() * how["c"] + np.mean([how["v"](x + 1) for x in k]) + how["o"]
            speed, tried = float(tau / cost), np.minimum(n + 1, k).sum()
            rows.append(dict(name=name, gamma=g, kind="sensor" if name == "aligned" else "control", tau=float(tau),
                             alpha=float(n.sum() / tried), drafted=float(k.mean()), c=how["c"], o=how["o"], exact=speed,
                             v=float(np.mean([how["v"](x + 1) for x in k])), broken=False,
                             measured=dict(value=speed, low=speed - .05, high=speed + .05, groups=PROMPTS)))
    folder.mkdir(exist_ok=True)
    about = dict(target_token_ms=STEP, device=how.get("device", "cpu"), step_bytes=10**9, copy_gb_s=200.)
    write_json(folder/"compare.json", dict(about=about, rows=rows, prompts=[dict(clip=f"c{p // 2}") for p in range(PROMPTS)]))
    (folder/"cycles.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def measurement(folder, top1=.9, wrong=.6, agree=1.):
    near = lambda x: {"token_top1": dict(value=x, low=x - .02, high=x + .02, groups=30)}
    nulls = [dict(name="L1", stream="draft_forced", kind="adapter", values=near(top1)),
             dict(name="wrong-clip sensor", stream="draft_wrong", kind="sensor", values=near(wrong))]
    folder.mkdir(exist_ok=True)
    says = dict(rows=1000, exact=int(agree * 1000), agree=int(agree * 1000))
    write_json(folder/"acceptance_metrics.json", dict(total_valid_positions=3000, nulls=nulls, target_says=says))
    return folder


def causes(*paths): return [f.cause for f in doctor(*paths).found]


def test_a_healthy_run_has_no_cause_and_everything_is_looked_at(tmp_path):
    said = doctor(comparison(tmp_path/"c"), measurement(tmp_path/"m"))
    assert not said.found and "Nothing found" in str(said) and len(said.looked) == len(diagnoses()) - 1
    assert [n for n, _ in said.lost] == ["launch-bound on a GPU"] and "is cpu, not a GPU" in str(said)
    assert not causes(comparison(tmp_path/"gpu", device="cuda:0"), measurement(tmp_path/"m"))
    assert not causes(comparison(tmp_path/"s", alphas=[.9, .82, .74, .68, .62, .57, .53, .5]), measurement(tmp_path/"n", .8))


PLANTED = {
    "a cliff in acceptance": dict(alphas=[.9] * 4 + [.1] * 4),
    "good offline, bad online": dict(alphas=[.5] * 8, wrong=.2),
    "c·γ dominates": dict(c=.9), "overhead per cycle": dict(o=4.),
    "verification dominates": dict(v=lambda n: 1 + 1.5 * (n - 1)),
    "too few tokens accepted": dict(alphas=[.04] * 8, wrong=0.),
    "v(n) has a step": dict(v=lambda n: 1 + .02 * n + .9 * (n >= 7)), # at least ten forwards of most widths
    "the sensor adds nothing": dict(wrong=.9)}


@pytest.mark.parametrize("cause", PLANTED)
def test_a_planted_cause_is_named_first_or_alone(tmp_path, cause):
    found = doctor(comparison(tmp_path/"c", **PLANTED[cause]), measurement(tmp_path/"m")).found
    also = cause in ("a cliff in acceptance", "too few tokens accepted") # measured, their α would promise more
    expected = {cause} | ({"good offline, bad online"} if also else set())
    assert cause in {f.cause for f in found} <= expected
    assert all(f.evidence and f.remedy for f in found)


def test_other_marks(tmp_path):
    run = comparison(tmp_path/"c")
    assert causes(run, measurement(tmp_path/"a", agree=.6)) == ["data not generated by the target"]
    assert causes(measurement(tmp_path/"b", wrong=.9)) == ["the sensor adds nothing"]
    slow = json.loads((run/"compare.json").read_text())
    slow["about"] |= dict(device="cuda:0", copy_gb_s=2000.) # .5 ms to read the weights, 10 ms a step
    write_json(run/"compare.json", slow)
    (found,) = doctor(run).found
    assert found.cause == "launch-bound on a GPU" and found.worth == pytest.approx(20)
    write_json(tmp_path/"gpu.json", dict(rows=[dict(name="eager", launch_bound_share=.8), dict(launch_bound_share=.1)]))
    assert [f.where for f in doctor(tmp_path/"gpu.json").found] == ["rows.0.launch_bound_share"]
    study = dict(target_token_ms=15., verify={2: 4.45, 6: 4.53, 22: 4.26})
    write_json(tmp_path/"timing.json", study)
    (found,) = doctor(tmp_path/"timing.json").found
    assert dict(found.evidence)["step at n"] == 2 and "long blocks" in found.remedy


def test_own_outputs_are_told_from_wrong_states(tmp_path):
    late = doctor(comparison(tmp_path/"c", alphas=[.9] + [.3] * 7), measurement(tmp_path/"m")).found
    assert {"a cliff in acceptance", "good offline, bad online"} == {f.cause for f in late}
    assert "own outputs" in next(f.remedy for f in late if f.cause.startswith("good"))
    all_bad = doctor(comparison(tmp_path/"d", alphas=[.4] * 8, wrong=.1), measurement(tmp_path/"m")).found
    assert "final norm" in all_bad[0].remedy


def test_the_cliff_is_at_one_place_for_all(tmp_path):
    (found, *_) = doctor(comparison(tmp_path/"c", alphas=[.9] * 4 + [.1] * 4)).found
    said = dict(found.evidence)
    assert "accepted at 4" in said and said["γ that show it"] == "5, 8" and said["chance"] < 1e-4 and found.worth > 1.5


def test_an_engines_record_alone_shows_a_cliff_and_ends_of_answers_do_not(tmp_path):
    rng = np.random.default_rng(0)
    def log(alphas, name):
        with open(tmp_path/name, "w") as f:
            for _ in range(80):
                r = acceptance_of(*decoded(rng, np.array(alphas), 8, 30), 8)
                f.write(json.dumps({"model": "m", "data": r}) + "\n")
        return tmp_path/name
    assert causes(log([.9] * 8, "good.jsonl")) == [] == causes(log([1.] * 8, "perfect.jsonl"))
    assert causes(log([.9] * 3 + [.1] * 5, "bad.jsonl")) == ["a cliff in acceptance"]


def test_places_by_hand_and_against_the_exact_tail():
    arm = ArmSeen("x", 3, cycles=[dict(accepted=[3, 1, 0, 1], drafted=[3, 3, 3, 1])])
    assert [x.tolist() for x in places(arm)] == [[4, 2, 1], [3, 1, 1]]
    from math import comb
    assert tail(30, 11, .4) == pytest.approx(sum(comb(30, k) * .4**k * .6**(30 - k) for k in range(12)))


def test_few_clips_decide_nothing_and_noise_is_no_step(tmp_path):
    run = comparison(tmp_path/"c", wrong=.9)
    d = json.loads((run/"compare.json").read_text()) | {"prompts": [{"clip": "one"}] * PROMPTS}
    write_json(run/"compare.json", d)
    said = doctor(run)
    assert "the sensor adds nothing" in dict(said.lost) and "1 clips" in dict(said.lost)["the sensor adds nothing"]
    rng = np.random.default_rng(1)
    noisy = [{n: 1 + .1 * n + rng.normal(0, .1) for n in range(1, 10)} for _ in range(200)]
    assert sum(step_in(v) is not None for v in noisy) == 0
    counts = np.tile([8., 10, 8, 10], (12, 1))
    gap, rates = gap_by_clip(counts, [str(i) for i in range(12)])
    assert gap[:3] == (0, 0, 0) and rates == (.8, .8)


def test_what_lacks_is_said_never_silent(tmp_path):
    run = comparison(tmp_path/"c", c=.9)
    whole = json.loads((run/"compare.json").read_text())
    for value in (None, "2", [], {}, True, float("1e300")):
        d = copy.deepcopy(whole)
        for r in d["rows"]: r["tau"] = value
        (run/"compare.json").write_text(json.dumps(d))
        said = doctor(run)
        assert "c·γ dominates" in dict(said.lost) and "tau" in dict(said.lost)["c·γ dominates"]
        names = {n for n, _ in said.lost} | set(said.looked)
        assert names == {d.name for d in diagnoses()}
    (run/"cycles.jsonl").unlink()
    d = copy.deepcopy(whole)
    for r in d["rows"]: del r["c"], r["measured"], r["exact"]
    (run/"compare.json").write_text(json.dumps(d))
    with pytest.raises(FeatsdError, match="no diagnosis could be looked at"): doctor(run)


HOSTILE = {"compare.json": ["", "[1]", "{}", "[" * 100_000, '{"rows": 3, "about": []}', '{"about": {}, "rows": [1, {"name": 2}]}',
                            '{"about": {"verify_ms": {"x": 1}}, "rows": [{"name": "a", "gamma": 99999999999999999999}]}', "NaN"],
           "cycles.jsonl": ["x", "[]", "{}", '{"drafter": "a", "gamma": 1, "prompt": 0, "accepted": [2], "drafted": [1], '
                            '"draft_ms": [0], "verify_ms": [0], "cycle_ms": [0]}', '{"drafter": 1}',
                            '{"drafter": "a", "gamma": -1, "prompt": 0, "accepted": [], "drafted": []}'],
           "acceptance.jsonl": ['{"acceptance_histogram": [1e99], "num_spec_tokens": 2}', "{", '{"a": NaN}'],
           "acceptance_metrics.json": ["null", '{"nulls": [1, null, {"values": 3, "kind": "adapter"}], '
                                       '"total_valid_positions": "x"}'],
           "timing.json": ['{"target_token_ms": 1, "verify": {"²": 3}}', '{"timing": {"verify": 3}}']}


@pytest.mark.parametrize("name, text", [(k, t) for k, ts in HOSTILE.items() for t in ts], ids=lambda x: str(x)[:24])
def test_hostile_files_are_one_line(tmp_path, capsys, name, text):
    (tmp_path/name).write_text(text)
    with pytest.raises(SystemExit) as e: commands.featsd_doctor([str(tmp_path)])
    assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_writes_json_and_says_which_folders(tmp_path, capsys):
    run = comparison(tmp_path/"threads_1", c=.9)
    commands.featsd_doctor([str(run)], json=str(tmp_path/"x.json"))
    d = json.loads((tmp_path/"x.json").read_text())
    assert "c·γ dominates" in capsys.readouterr().out and d["found"][0]["cause"] == "c·γ dominates"
    assert {f["reason"] for f in d["not_looked_at"]} and d["files"] == ["compare.json", "cycles.jsonl"]
    with pytest.raises(FeatsdError, match="folders threads_1"): read_run(tmp_path)
    other = comparison(tmp_path/"threads_2")
    with pytest.raises(FeatsdError, match="threads_2: .* of a second run; give one comparison"): read_run(run, other)
    lines = (other/"cycles.jsonl").read_text().splitlines()
    (other/"cycles.jsonl").write_text("\n".join([*lines, lines[3]]))
    with pytest.raises(FeatsdError, match="prompt 3 of aligned at γ . a second time"): read_run(other)
    (tmp_path/"big.json").write_bytes(b"")
    with open(tmp_path/"big.json", "r+b") as f: f.truncate(2**29)
    with pytest.raises(FeatsdError, match="expected at most"): read_run(tmp_path/"big.json")


def test_the_committed_demo_is_healthy():
    from pathlib import Path
    said = doctor(Path(__file__).parents[1]/"figures"/"demo.json")
    assert not said.found and "the sensor adds nothing" in said.looked


def test_a_small_real_comparison_shows_no_fault_of_the_drafter(pair, tmp_path):
    from featsd.compare import compare
    from featsd.data.clips import open_clips
    from featsd.decode import plain_decode, encode_prompt
    from featsd.drafters import Kit, make_drafter
    from featsd.models.words import NGramTable
    from featsd.race import Procedure
    clips = open_clips("pocket", "test", 12)
    q = clips.questions[0]
    said = [plain_decode(pair.target, encode_prompt(pair, clips[i], q)).ids for i in range(6, 12)]
    kit = Kit(pair, ngram=NGramTable([np.array(x) for x in said], 7))
    compare(pair, [clips[i] for i in range(6)], {"ngram": make_drafter("ngram", kit)}, [q],
            Procedure((2, 4), plain_runs=1, transformers=False, n_boot=20)).save(tmp_path)
    about = json.loads((tmp_path/"compare.json").read_text())["about"]
    assert about["device"] == "cpu" and about["step_bytes"] > 1e5
    found = consult(read_run(tmp_path))
    assert not {"a cliff in acceptance", "the sensor adds nothing", "good offline, bad online"} & {f.cause for f in found.found}
    assert "c·γ dominates" in found.looked


def test_a_measurement_says_whose_words_were_stored(tmp_path):
    import torch

    from featsd.example import toy_head
    from featsd.nulls import target_says
    torch.manual_seed(0)
    head, h = toy_head(torch.randn(11, 8)), torch.randn(3, 5, 8)
    mask, own = torch.ones(3, 5, dtype=bool), head.logits(h).argmax(-1)
    mask[2, 3:] = False
    def states(ids):
        batch = type("B", (), dict(h_target=h, mask=mask, ids=ids))
        return type("S", (), dict(manifest={"streams": ["target", "draft_forced"]},
                                  batches=lambda self, stream, batch_pairs: iter([batch])))()
    assert target_says(states(own), head) == dict(rows=13, exact=13, agree=13)
    other = torch.where(torch.arange(5) < 2, own, (own + 1) % 11) # another model's words from the third token on
    assert target_says(states(other), head)["agree"] == 6 and target_says(states(None), head) is None
