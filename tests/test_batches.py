"Many answers at once: plain decoding's ids whoever drafts, rows that come and go, planted costs found again, bad input"
import copy
import json
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace as NS

import numpy as np
import pytest
import torch

from featsd import batches as B
from featsd import trees as T
from featsd.adapters import create_adapter
from featsd.base.core import FeatsdError
from featsd.base.stats import Interval
from featsd.commands import featsd_compare
from featsd.data.clips import open_clips
from featsd.decode import (
    AdversarialDraft, Draft, Drafter, NullDraft, OracleDraft, encode_prompt, plain_decode, speculative_decode)
from featsd.drafters import Kit, make_drafter
from featsd.models.words import NGramTable
from featsd.race import Procedure
from featsd.serve import Apart, Cycle, Desk, Served, Together, group_of, serve_queue

N = 16 # tokens at most: some answers end by themselves, some here


def ending(model, ids):
    "The same model with further end tokens"
    out = copy.copy(model)
    out.eos_ids = (*model.eos_ids, *ids)
    return out


@pytest.fixture(scope="module")
def world(pair):
    "Six prompts, a word that ends some of the answers early, at different places, and the answers, one at a time"
    data = open_clips("pocket", "test", 4)
    prompts = [encode_prompt(pair, data[i], q) for i in range(3) for q in data.questions[:2]]
    whole = [plain_decode(pair.target, p, max_new_tokens=N).ids for p in prompts]
    cut = lambda ids, end: ids[:ids.index(end) + 1] if end in ids else ids
    end = max({t for a in whole for t in a}, key=lambda t: (len({len(cut(a, t)) for a in whole} | {N}), t))
    return prompts, (end,), [cut(a, end) for a in whole]


@pytest.fixture(scope="module")
def two(pair, world): return NS(target=ending(pair.target, world[1]), draft=pair.draft, shared_vocab=pair.shared_vocab)


@pytest.fixture(scope="module")
def asked(world): return world[0], world[2]


class Uneven(Drafter):
    "Right for a while, silent for a while, differently in every row"
    def __init__(self, target): self.oracle = OracleDraft(target, N)
    def start(self, prompt, sampling=None):
        super().start(prompt)
        self.oracle.start(prompt)
    def propose(self, gamma):
        self.oracle.ids = self.ids
        n = (len(self.ids) * 7 + sum(self.oracle.known)) % (gamma + 2)
        return Draft([t + (i == 2) for i, t in enumerate(self.oracle.propose(min(n, gamma)).ids)])


def drafters(pair):
    torch.manual_seed(0)
    kit = Kit(pair, create_adapter(1, hidden_dim=128).eval())
    return {"plain": None, "null": NullDraft(), "oracle": OracleDraft(pair.target, N),
            "adversarial": AdversarialDraft(pair.target, N), "uneven": Uneven(pair.target),
            **{n: make_drafter(n, kit) for n in ("aligned", "standard", "lookup+standard")}}


def test_ids_are_those_of_one_answer_at_a_time(two, asked):
    prompts, alone = asked
    assert len({len(a) for a in alone}) > 2 and any(len(a) < N for a in alone)
    for name, d in drafters(two).items():
        for rows in (1, 3, 4) if name in ("oracle", "null", "adversarial", "aligned") else (3,):
            done = serve_queue(two.target, prompts, rows, d, 4 * (d is not None), N)
            assert done.ids == alone, (name, rows)
            assert max(c.rows for c in done.cycles) == rows and len(done.full()) >= 3
            assert sum(x[3] for c in done.cycles for x in c.said) == sum(len(a) - 1 for a in alone)
    assert done.cycles[-1].rows < 4 # the queue ran dry


@pytest.mark.parametrize("rows", [1, 3])
def test_the_librarys_own_forward_refills_too(slow_pair, world, rows):
    prompts, ends, alone = world
    slow = NS(target=ending(slow_pair.target, ends), draft=slow_pair.draft, shared_vocab=slow_pair.shared_vocab)
    d = drafters(slow)
    for name in ("plain", "uneven", "standard"):
        done = serve_queue(slow.target, prompts, rows, d[name], 3 * (name != "plain"), N)
        assert done.ids == alone, name


def test_one_forward_drafts_for_all_rows_and_says_what_a_single_drafter_says(two, asked):
    prompts, alone = asked
    d = drafters(two)
    assert isinstance(group_of(d["standard"]), Together) and isinstance(group_of(d["lookup+standard"]), Apart)
    many = serve_queue(two.target, prompts, 3, d["standard"], 4, N)
    apart = Desk(two.target, prompts, 3, d["standard"], 4, N)
    apart.group = Apart(d["standard"])
    apart.admit()
    while apart.rows:
        apart.out.cycles.append(apart.cycle())
        apart.admit()
    stood = lambda done: sorted((x[0], x[2]) for c in done.cycles for x in c.said)
    assert stood(many) == stood(apart.out)
    assert all(c.draft[0] == 4 for c in many.full()) and all(c.draft[0] == 1 for c in apart.out.full())
    assert all(c.draft[1] in (c.rows * 4, c.rows * 5) for c in many.full()) # a whole block stood somewhere: one more


def test_a_wrong_row_in_a_refill_is_seen(two, asked, monkeypatch):
    "The mutant: a newcomer keeps the length of the one before"
    prompts, alone = asked
    put = type(two.target).put
    def forgetful(self, state, at, new):
        before = list(state.n)
        state = put(self, state, at, new)
        state.n = before
        return state
    monkeypatch.setattr(type(two.target), "put", forgetful)
    assert serve_queue(two.target, prompts, 3, None, 0, N).ids != alone


def test_planted_costs_are_found_and_so_is_the_crossing():
    rng = np.random.default_rng(1)
    a, b, d = 5., .2, .004
    points = [(f, k, n, f * a + b * k + d * n) for f, k, n in rng.integers(1, [9, 300, 5000], (40, 3))]
    fit = B.fit_steps(points)
    assert np.allclose((fit.a, fit.b, fit.d), (a, b, d), rtol=1e-9) and fit.residual < 1e-9 and fit.points == 40
    free = B.fit_steps([(f, k, n, f * a + d * n) for f, k, n, _ in points])
    assert free.b == 0 and np.isclose(free.d, d)
    flips = rng.random((20_000, 8)) < .75
    stood = {g: flips[:, :g].cumprod(1).sum(1).tolist() for g in (2, 4, 8)}
    tau = {g: 1 + float(np.mean(r)) for g, r in stood.items()}
    drafting = B.Drafting(tau, stood, {g: [g] * len(r) for g, r in stood.items()}, together=False)
    model = B.BatchModel({"many": B.StepFit(a, b, 0, 0, 9)}, {"many": B.StepFit(0, .1, 0, 0, 9)}, {1: (50,) * 3}, drafting)
    # τ(a + bB) = a + bB(γ + 1) + .1·B·γ, solved for B
    crossing = max((tau[g] - 1) * a / (b * (g + 1) + .1 * g - b * tau[g]) for g in stood)
    assert model.stops_at() == int(np.floor(crossing)) + 1
    plan = B.schedule_of(lambda rows: model.best(rows)[0], 64)
    assert plan[0][0] == 1 and plan[-1][1:] == [64, 0] and all(p[1] + 1 == q[0] for p, q in zip(plan, plan[1:]))
    assert [g for *_, g in plan] == sorted({g for *_, g in plan}, reverse=True)
    said = json.loads(B.for_vllm(plan))
    assert said["num_speculative_tokens"] == plan[0][2] and said["num_speculative_tokens_per_batch_size"] == plan
    assert [*B.for_sglang(plan)] == [str(p[0]) for p in plan] and "--speculative-adaptive-config" in B.sglang_flags(plan)
    one = replace(model, target={**model.target, "one": B.StepFit(1., 0, 0, 0, 3)})
    assert one.cycle_ms(1, 0) == 1 and one.cycle_ms(2, 0) == a + 2 * b


def planted_run(batch, gamma, law, tau, cycles=60):
    out = Served([], batch, gamma)
    for i in range(cycles):
        k, n = batch * (gamma + 1), batch * (40 + i)
        said = [((i + r) % 8, gamma, tau - 1, tau) for r in range(batch)]
        draft = (gamma, batch * (gamma + 1), 0)
        out.cycles.append(Cycle(batch, k, n, draft, .1 * gamma + .001 * draft[1], law(k, n), said))
    return out


def test_steps_that_follow_the_law_are_foretold_at_every_batch():
    "Also at batches that the fit has not seen"
    law = lambda k, n: 3. + .15 * k + .001 * n
    clocked = {(b, g): planted_run(b, g, law, 1 + (g > 0) * 2) for b in (2, 4, 16, 64) for g in (0, 4)}
    drafting = B.Drafting({4: 3.}, {4: [2, 4, 0]}, {4: [4, 4, 4]})
    drafting.work = lambda gamma, rows, columns: (gamma, rows * (gamma + 1), 0)
    model, clips = B.model_of(clocked, drafting), [f"c{i}" for i in range(8)]
    fit = model.target["many"]
    assert np.allclose((fit.a, fit.b, fit.d), (3., .15, .001), rtol=1e-6) and "one" not in model.target
    for b in (2, 4, 16, 64):
        measured = B.speedup_of(clocked[b, 0], clocked[b, 4], clips)
        assert abs(model.speed(b, 4) / measured.value - 1) < .01
        assert abs(B.model_of(clocked, drafting, without=b).speed(b, 4) / measured.value - 1) < .02
        assert measured.low <= measured.value <= measured.high and measured.groups == 8
    assert model.speed(2, 4) > 1 > model.speed(64, 4) and 16 <= model.stops_at() <= 64


def test_only_cycles_of_all_rows_count():
    s = planted_run(4, 2, lambda k, n: 1., 2)
    s.cycles.append(replace(s.cycles[0], rows=1, target_ms=1e6))
    assert len(s.full()) == 60 and B.by_clip(s, [f"c{i}" for i in range(8)])[:, 1].sum() < 100
    assert all(p[3] < 10 for p in B.step_points(s, "target"))


@pytest.mark.parametrize("measured,said", [
    ({1: (2, 1.9, 2.1), 8: (1.2, 1.1, 1.3)}, "Within the measured list it always pays: 1.20x [1.10, 1.30] at batch 8."),
    ({1: (.9, .8, .95), 8: (.7, .6, .8)}, "Within the measured list it never pays: 0.90x"),
    ({1: (2, 1.9, 2.1), 8: (1, .9, 1.1), 16: (.7, .6, .8)}, "From batch 16 on it does not pay: 0.70x [0.60, 0.80]; it pays up "
     "to batch 1 (2.00x [1.90, 2.10]). Not decided: batch 8 (1.00x [0.90, 1.10])."),
    ({1: (1, .9, 1.1)}, "At no batch it pays for sure. Not decided: batch 1")])
def test_what_is_said_of_the_crossing(measured, said):
    assert B.where_it_stops({b: Interval(*v, 9) for b, v in measured.items()}).startswith(said)


def test_wrong_ids_are_counted_and_claim_nothing(pair, asked):
    prompts, alone = asked
    some = [NS(clip_id=f"c{i}", prompt=p, answer=None) for i, p in enumerate(prompts[:3])]
    class Liar(type(pair.target)):
        "A target that says something else to the widest block"
        def step(self, state, ids, lengths=None):
            h = super().step(state, ids, lengths)
            return h if ids.shape[1] < 5 else -h
    liar = Liar.__new__(Liar)
    liar.__dict__.update(pair.target.__dict__)
    drafting = B.Drafting({4: 4.}, {4: [3, 3]}, {4: [4, 4]}, False)
    for target, broken in ((pair.target, False), (liar, True)):
        two, how = NS(target=target, draft=pair.draft, name="two"), Procedure(max_new_tokens=8, n_boot=20)
        found = B.batches(two, some, OracleDraft(pair.target, 8), drafting, [4], B.Load((2,), 4), how, name="oracle")
        assert (found.rows[0].identical < found.rows[0].answers) == broken == ("BROKEN" in str(found.table()))
        assert any(line.startswith("BROKEN") for line in found.verdict()) == broken
        assert found.rows[0].answers == 32 and found.rows[0].unseen is None # eight a row, of both arms


@pytest.mark.parametrize("text,said", [
    ("0", "--batches 0: expected at least 1"), ("4,-2", "--batches -2: expected at least 1"),
    ("1,x", "--batches: expected whole numbers with commas between, found '1,x'"),
    ("1.5", "--batches: expected whole numbers"), (",", "--batches: expected at least one number"),
    ("1,3000000", "--batches 3000000: as many answers at once take about 1.")])
def test_bad_batches_are_one_line_before_any_work(tmp_path, capsys, text, said):
    with pytest.raises(SystemExit) as stopped: featsd_compare(batches=text, clips=2, out=str(tmp_path/"out"))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and said in err and not (tmp_path/"out").exists()


def test_room_is_counted_for_what_is_really_set_aside(pair, asked):
    prompts, _ = asked
    state = pair.target.prefill([p.target for p in prompts])
    kept, rest = B.row_bytes(pair.target, 26, state.kv.shape[4] - 26)
    assert kept * len(prompts) == state.kv.numel() * state.kv.element_size() and rest > 0
    with pytest.raises(FeatsdError, match=r"0\.001 GB are free; give at most \d+$"):
        B.check_room(pair, (1, 8), 26, 50, 4, free=10**6)
    most = int(str(pytest.raises(FeatsdError, B.check_room, pair, (10**6,), 26, 50, 4, free=10**8).value).split()[-1])
    B.check_room(pair, (most,), 26, 50, 4, free=10**8)
    with pytest.raises(FeatsdError): B.check_room(pair, (most + 1,), 26, 50, 4, free=10**8)


# ---- what a tree could add -------------------------------------------------------------------------------------------


def shapes(m, gamma, nodes):
    "Every tree of so many nodes"
    paths = [p for j in range(1, gamma + 1) for p in product(range(m), repeat=j)]
    some = combinations(paths, nodes)
    return [set(t) for t in some if all(len(p) == 1 or p[:-1] in t for p in t)]


@pytest.mark.parametrize("m,gamma,nodes", [(2, 3, 3), (3, 2, 4), (2, 3, 6)])
def test_the_best_shape_is_that_of_all_shapes(m, gamma, nodes):
    rng = np.random.default_rng(nodes)
    ranks = [rng.choice(m + 1, size=n, p=np.r_[.5, np.full(m, .5 / m)]).tolist() for n in (9, 4, 1, 12)]
    def kept(tree): # counted by hand: from every place, as long as the ranks are a path
        total = 0
        for a in ranks:
            for i in range(len(a)):
                n = 0
                while n < gamma and i + n < len(a) - 1 and tuple(a[i:i + n + 1]) in tree: n += 1
                total += n
        return total
    ours = T.best_shape(ranks, gamma, nodes, m)
    assert len(ours) == nodes and kept(ours) == max(map(kept, shapes(m, gamma, nodes)))
    assert kept(ours) == sum(map(T.stands(ours), T.starts(ranks, gamma)))


def test_no_tree_passes_the_bound_and_its_cost_is_counted(tmp_path):
    rng = np.random.default_rng(3)
    ranks = [rng.choice(3, size=14, p=[.6, .25, .15]).tolist() for _ in range(5)]
    c, o, v = .2, .05, {k: 1 + .1 * (k - 1) for k in range(1, 40)}
    found = T.tree_bound(ranks, "toy", c, o, v, deep=3, m=2, nodes=(1, 2, 3, 4))
    every = [(tree, max(map(len, tree))) for n in (1, 2, 3, 4) for tree in shapes(2, 3, n)]
    speed = {i: T.tokens_per_cycle(ranks, d, T.stands(t)) / (d * c + v[len(t) + 1] + o) for i, (t, d) in enumerate(every)}
    assert found.bound >= max(speed.values()) >= max(found.shape.values()) and found.bound >= found.chain
    chains = {g: T.tokens_per_cycle(ranks, g, T.in_front(0)) / (g * c + v[g + 1] + o) for g in (1, 2, 3)}
    assert found.chain == pytest.approx(max(chains.values())) and found.gamma == max(chains, key=chains.get)
    right = T.tree_bound([[0] * 9] * 3, "oracle", c, o, v, deep=3, m=2) # no miss: nothing to add
    assert right.bound == pytest.approx(right.chain) and not any(map(sum, right.caught)) and "none" in right.line()
    assert "estimates, none was decoded" in found.line()
    found.save(tmp_path/"new"/"folder")
    kept = json.loads((tmp_path/"new"/"folder"/"tree.json").read_text())
    assert kept["estimate"] and kept["bound"] == found.bound and (tmp_path/"new"/"folder"/"tree.png").is_file()


def test_first_misses_are_counted_by_hand():
    ranks = [[0, 1, 0, 0, 4, 2, 0, 0, 1, 0]]
    # γ 3: [0 1 0] misses at 1, caught, next right; from 2 [0 0 4] misses at 2, not; from 5 [2 0 0] at 0; from 6 [0 0 1] at 2
    assert T.caught_by_place(ranks, 3, 3) == [[1, 1, 1, 1], [1, 1, 1, 1], [2, 1, 0, 0]]


def test_ranks_are_the_drafters_own_and_its_chain_is_what_is_decoded(two, asked):
    prompts, alone = asked
    kit = Kit(two, ngram=NGramTable([np.array(a) for a in alone[:3]], 3))
    for name in ("standard", "ngram"):
        d = make_drafter(name, kit)
        for p, ids in zip(prompts[:3], alone):
            ranks = T.ranks_along(d, p, ids, 4)
            assert len(ranks) == len(ids) and set(ranks) <= set(range(5))
            done = speculative_decode(two.target, d, p, 3, max_new_tokens=N)
            at = 0
            for stood, drafted in zip(done.accepted, done.drafted): # the same cycles
                assert T.in_front(0)(ranks[at:at + drafted]) == stood
                at += stood + 1
    assert not T.can_rank(make_drafter("lookup", kit)) and not T.can_rank(replace_stop(make_drafter("standard", kit)))


def replace_stop(d):
    d.min_confidence = .5
    return d
