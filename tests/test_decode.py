"Lossless, whatever the drafter: exact laws, identical ids, equal caches, certificates, mutants that must be caught"
import inspect
import io
import json
import os
import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from closeness import near, off, tol

from featsd.adapters import create_adapter, load_any_adapter
from featsd.commands import featsd_decode
from featsd.generate import Asking, Recipe, assisted_generate, decode_clips
from featsd.base.core import FeatsdError
from featsd.models.words import template_ids
from featsd.data.clips import open_clips
from featsd.models.words import NGramTable
from featsd.decode import (
    AdversarialDraft, Cosine, Draft, Drafter, EveryChoice, Greedy, NullDraft, OracleDraft, Prompt, Sampled, Sampling,
    certify, drafter_classes, encode_prompt, exact_law, plain_decode, residual, rule_of, speculative_decode,
    speculative_decode_batch)
from featsd.drafters import AlignedDraft, Kit, make_drafter
from featsd.extract import extract
from featsd.fit import Calibrated
from featsd.models.backbone import load_pair
from featsd.models.lean import early_exit, lean
from featsd.train import train_adapter

# ---- rung 0: exact laws ----------------------------------------------------------------------------------------------


@dataclass
class TableState:
    ids: list
    h: torch.Tensor
    @property
    def lengths(self): return torch.tensor([len(self.ids)])


class TableTarget:
    "A random law over V tokens for every context; states are logits"
    def __init__(self, seed=0, V=3, eos=None):
        self.seed, self.V, self.eos_ids = seed, V, () if eos is None else (eos,)
        self.head = type("H", (), {"logits": staticmethod(lambda h: h), "vocab_size": V})
    def logits(self, ids):
        g = torch.Generator().manual_seed(self.seed * 7919 + zlib.crc32(bytes(ids)))
        return 1.5 * torch.randn(self.V, generator=g, dtype=torch.float64)
    def prefill(self, prefixes): return TableState([], self.logits([])[None])
    def step(self, state, ids):
        out = []
        for t in ids[0].tolist():
            state.ids.append(t)
            out.append(self.logits(state.ids))
        return torch.stack(out)[None]
    def rollback(self, state, lengths): state.ids = state.ids[:lengths[0]]


class TableDraft(Drafter):
    def __init__(self, table, certain=False, most=99): self.table, self.certain, self.most = table, certain, most
    def propose(self, gamma):
        ids, laws = [], []
        for _ in range(min(gamma, self.most)):
            q = self.sampling.law(self.table.logits(self.ids + ids))
            laws.append(q)
            ids.append(int(q.argmax()) if self.certain else self.sampling.draw(q))
        return Draft(ids, None if self.certain or not ids else torch.stack(laws))


def own_law(target, sampling, L):
    "The target's law of answers, by the chain rule"
    law = {(): 1.}
    for _ in range(L):
        more = {}
        for k, w in law.items():
            if k and k[-1] in target.eos_ids: more[k] = w
            else: more.update({k + (t,): w * p for t, p in enumerate(sampling.law(target.logits(k)).tolist()) if p > 0})
        law = more
    return law


PATHS = 1000 # choices that lead to an answer, each a product of double-precision probabilities that add up to 1
EXACT = tol(PATHS, torch.float64)


def distance(p, q): return sum(abs(p.get(k, 0) - q.get(k, 0)) for k in {*p, *q}) / 2
def engine_law(target, drafter, sampling, gamma=2, L=3):
    return exact_law(lambda s: speculative_decode(target, drafter, Prompt(None), gamma, Sampled(s), L).ids, sampling)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("gamma", [1, 2, 3, 5])
@pytest.mark.parametrize("warp", [(1., 0, 1.), (.7, 2, 1.), (1.5, 0, .8)])
@pytest.mark.parametrize("eos", [None, 1])
def test_the_law_is_the_targets_exactly(certain, gamma, warp, eos):
    target = TableTarget(5, eos=eos)
    law = engine_law(target, TableDraft(TableTarget(6), certain), EveryChoice(*warp), gamma)
    near(sum(law.values()), 1., PATHS, torch.float64)
    assert distance(law, own_law(target, EveryChoice(*warp), 3)) <= EXACT


def test_exact_with_empty_proposals_and_equal_laws():
    target = TableTarget(5)
    for drafter in (NullDraft(), TableDraft(TableTarget(6), most=0), TableDraft(TableTarget(6), most=1),
                    TableDraft(TableTarget(5))):
        assert distance(engine_law(target, drafter, EveryChoice()), own_law(target, EveryChoice(), 3)) <= EXACT


def mutated(chance=lambda p, q: p / q, refused=residual, extra=lambda p, q: p, certain_q=1.):
    def accept(self, p, draft, h=None):
        x, q, s = draft.ids, draft.probs, self.sampling
        if not x: return 0, s.draw(p[0])
        if q is None: q = torch.nn.functional.one_hot(torch.tensor(x), 3).double() * certain_q
        n = s.survivors(torch.stack([chance(p[i, t], q[i, t]) for i, t in enumerate(x)]))
        return n, s.draw(refused(p[n], q[n]) if n < len(x) else extra(p[n], q[-1]))
    return accept


MUTANTS = {
    "residual forgotten": dict(refused=lambda p, q: p),
    "p > q": dict(chance=lambda p, q: (p > q).double()),
    "extra token from q": dict(extra=lambda p, q: q),
    "residual not clamped": dict(refused=lambda p, q: (p - q).abs() / (p - q).abs().sum()),
    "always accepted": dict(chance=lambda p, q: p * 0 + 1),
    "ratio upside down": dict(chance=lambda p, q: q / p),
    "accepted by p alone": dict(chance=lambda p, q: p)}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_acceptance_rule_are_killed(name, monkeypatch):
    target = TableTarget(5)
    monkeypatch.setattr(Sampled, "accept", mutated(**MUTANTS[name]))
    law = engine_law(target, TableDraft(TableTarget(6)), EveryChoice())
    assert distance(law, own_law(target, EveryChoice(), 3)) > .01


def test_the_unmutated_copy_survives(monkeypatch):
    monkeypatch.setattr(Sampled, "accept", mutated())
    law = engine_law(TableTarget(5), TableDraft(TableTarget(6)), EveryChoice())
    assert distance(law, own_law(TableTarget(5), EveryChoice(), 3)) <= EXACT


def test_a_drafter_that_lies_about_its_law_is_seen():
    class Liar(TableDraft):
        def propose(self, gamma):
            d = super().propose(gamma)
            if d.probs is not None: d.probs = torch.full_like(d.probs, 1 / 3)
            return d
    law = engine_law(TableTarget(5), Liar(TableTarget(6)), EveryChoice())
    assert distance(law, own_law(TableTarget(5), EveryChoice(), 3)) > .01


def test_sampling_is_seeded_and_checked():
    target, drafter = TableTarget(5), TableDraft(TableTarget(6))
    a, b, c = (speculative_decode(target, drafter, Prompt(None), 3, Sampled(Sampling(1., seed=s)), 20).ids
               for s in (0, 0, 1))
    assert a == b != c
    for bad in (dict(temperature=0), dict(temperature=-1.), dict(temperature=float("nan")), dict(top_k=-1),
                dict(top_p=0.), dict(top_p=1.1)):
        with pytest.raises(FeatsdError): Sampling(**bad)

# ---- rung 1: identical ids on the built-in pair ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(): return open_clips("pocket", "test", 12)


@pytest.fixture(scope="module")
def kit(pair):
    "Prompts of every question, plain answers, and what the drafters need; the adapter is untrained on purpose"
    train = open_clips("pocket", "train", 6)
    known = {}
    for q in train.questions:
        said = pair.target.generate([pair.target.encode(train[i], q) for i in range(6)])
        known[q] = [a.ids.numpy() for a in said]
    torch.manual_seed(0)
    adapter = create_adapter(1, pair.draft.head.hidden_size, pair.target.head.hidden_size, bottleneck_dim=16,
                             head_hash=pair.target.head.hash)
    own, event = (create_adapter(k, 128, 128, num_heads=4, head_hash=pair.target.head.hash).eval()
                  for k in ("own", "own+event"))
    tables = {q: NGramTable(a, tokenizer_hash=pair.target.tokenizer_hash) for q, a in known.items()}
    template = {q: template_ids(a) for q, a in known.items()}
    even = [0., 1.], [0., 1.] # confidence taken at its word; where the table is unsure both experts are asked
    choice = Calibrated(even, ([0., 1.], [.8, .8]), even, worth=2.)
    return Kit(pair, adapter, tables, template, own=own, event=event, calibration=choice)


@pytest.fixture(scope="module")
def prompts(pair, clips): return [encode_prompt(pair, clips[i], clips.questions[i % 10]) for i in range(5)]


@pytest.fixture(scope="module")
def plain(pair, prompts): return [plain_decode(pair.target, p).ids for p in prompts]


OURS = [n for n, c in drafter_classes().items() if c.__module__.startswith("featsd.")]
NAMES = [*OURS, "lookup+ngram", "template+gated", "lookup+own+event"]


@pytest.mark.parametrize("name", NAMES)
def test_identical_ids(name, pair, kit, prompts, plain):
    drafter = make_drafter(name, kit)
    for gamma in (1, 2, 5, 8):
        for p, want in zip(prompts[:3], plain):
            done = speculative_decode(pair.target, drafter, p, gamma)
            assert done.ids == want and len(done.from_draft) == len(want)
            assert sum(n + 1 for n in done.accepted) >= len(want) >= sum(n for n in done.accepted)
            if name == "oracle": assert done.cycles == -(-len(want) // (gamma + 1)) and done.acceptance == 1
            if name in ("null", "adversarial"): assert done.cycles == len(want) and not any(done.from_draft)


@pytest.mark.parametrize("name", ["aligned", "gated", "ngram", "free"])
def test_identical_ids_on_the_librarys_forward(name, slow_pair, kit, prompts, plain):
    drafters = [make_drafter(name, replace(kit, pair=slow_pair)) for _ in range(2)]
    assert [speculative_decode(slow_pair.target, d, p, 4).ids for d, p in zip(drafters, prompts)] == plain[:2]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10])
def test_limits_inside_a_block(limit, pair, prompts, plain):
    for gamma in (1, 3, 8, 60):
        done = speculative_decode(pair.target, OracleDraft(pair.target), prompts[0], gamma, max_new_tokens=limit)
        assert done.ids == plain[0][:limit] and done.cycles == -(-limit // (gamma + 1))
        assert max(done.drafted) <= max(limit - 1, 0)


def test_end_token_inside_a_block(pair, prompts, plain):
    eos = pair.target.eos_id
    beyond = OracleDraft(pair.target, answer=plain[0] + [7, 7, 7, 7, 7, 7])
    early = OracleDraft(pair.target, answer=plain[0][:4] + [eos] + plain[0][5:])
    for gamma in range(1, 9):
        done = speculative_decode(pair.target, beyond, prompts[0], gamma)
        assert done.ids == plain[0] and done.ids.count(eos) == 1 and done.ids[-1] == eos
        assert speculative_decode(pair.target, early, prompts[0], gamma).ids == plain[0]


def test_a_proposal_may_be_longer_than_gamma_or_empty(pair, prompts, plain):
    class Moody(OracleDraft):
        def propose(self, gamma): return Draft(self.known[len(self.ids):len(self.ids) + len(self.ids) % 4 * 5])
    done = speculative_decode(pair.target, Moody(pair.target), prompts[1], 3)
    assert done.ids == plain[1] and 0 in done.drafted and max(done.drafted) > 3


CHAIN = 16 * 7 * 128 # of the built-in target: 16 layers of seven products, of width 128 and more


class Spy:
    "A target whose cache is compared with a fresh one after every rollback"
    def __init__(self, target, prompt):
        self.t, self.prompt, self.worst, self.looked, self.tokens = target, prompt, 0., 0, []
    def __getattr__(self, name): return getattr(self.t, name)
    def step(self, state, ids, *rest):
        self.tokens = self.tokens + ids[0].tolist()
        return self.t.step(state, ids, *rest)
    def rollback(self, state, lengths):
        self.t.rollback(state, lengths)
        self.tokens = self.tokens[:lengths[0] - self.prompt.target.embeds.shape[1]]
        fresh = self.t.prefill([self.prompt.target])
        for t in self.tokens: self.t.step(fresh, torch.tensor([[t]]))
        assert state.lengths.tolist() == fresh.lengths.tolist()
        if hasattr(state, "kv"): pairs = [(state.kv[..., :state.n[0], :], fresh.kv[..., :state.n[0], :])]
        else:
            layers = zip(state.cache.layers, fresh.cache.layers)
            pairs = [ab for x, y in layers for ab in ((x.keys, y.keys), (x.values, y.values))]
        self.worst = max([self.worst, *(off(a, b) for a, b in pairs)])
        self.looked += 1


@pytest.mark.parametrize("form", ["lean", "library"])
def test_the_cache_equals_a_fresh_one_after_every_cycle(form, pair, slow_pair, kit, prompts, plain):
    target = (pair if form == "lean" else slow_pair).target
    for name in ("oracle", "adversarial", "ngram"):
        spy = Spy(target, prompts[0])
        assert speculative_decode(spy, make_drafter(name, kit), prompts[0], 4, max_new_tokens=16).ids == plain[0][:16]
        assert spy.looked >= 4 and spy.worst <= tol(CHAIN)


def test_a_forgotten_rollback_is_caught(pair, prompts, plain, monkeypatch):
    monkeypatch.setattr(type(pair.target), "rollback", lambda self, state, lengths, h=None: None)
    assert speculative_decode(pair.target, AdversarialDraft(pair.target), prompts[0], 3).ids != plain[0]


@pytest.mark.parametrize("level", [1, 4])
def test_the_drafts_memory_follows_the_targets_words(level, pair, prompts, plain):
    torch.manual_seed(1)
    own = dict(bottleneck_dim=8) if level == 1 else dict(num_heads=4, ffn_dim=32)
    adapter = create_adapter(level, pair.draft.head.hidden_size, pair.target.head.hidden_size, **own).eval()
    for w in adapter.parameters(): w.data = w.data + .05 * torch.randn_like(w)
    drafter = AlignedDraft(pair.draft, pair.target.head, adapter, pair.shared_vocab)
    for gamma in (1, 4):
        assert speculative_decode(pair.target, drafter, prompts[0], gamma).ids == plain[0]
        with torch.no_grad():
            fresh = pair.draft.forced([prompts[0].draft], [torch.tensor(plain[0] + [0])])[0]
            want, got = pair.target.head.logits(adapter(fresh)[-1:]), drafter.law(drafter.reader.at(plain[0]))
        near(got, want, CHAIN)


def test_batch_rows_are_the_single_ones(pair, slow_pair, kit, prompts, plain):
    names = ["oracle", "own+event", "ngram", "gated-own", "null"]
    for p in (pair, slow_pair):
        for gamma in (1, 4):
            drafters = [make_drafter(n, replace(kit, pair=p)) for n in names]
            done = speculative_decode_batch(p.target, drafters, prompts, gamma)
            assert [d.ids for d in done] == plain
            for d, n, x in zip(done, names, prompts):
                assert d.accepted == speculative_decode(pair.target, make_drafter(n, kit), x, gamma).accepted
    known = [OracleDraft(pair.target) for _ in prompts]
    short = speculative_decode_batch(pair.target, known, prompts, 4, max_new_tokens=8)
    assert [d.ids for d in short] == [ids[:8] for ids in plain]
    with pytest.raises(FeatsdError, match="1 drafters for 5 prompts"):
        speculative_decode_batch(pair.target, [NullDraft()], prompts)


def test_early_exit_drafts_for_the_whole_model(pair, prompts, plain):
    short = early_exit(pair.target, 4) # the target's own first layers as draft model
    p = Prompt(prompts[0].target, prompts[0].target, prompts[0].question, prompts[0].ids)
    done = speculative_decode(pair.target, AlignedDraft(short, pair.target.head), p, 3)
    assert done.ids == plain[0] and sum(done.accepted) > 0
    with pytest.raises(FeatsdError, match="early exit after layer 0"): early_exit(pair.target, 0)


@pytest.fixture(scope="module")
def able(pair, kit, tmp_path_factory):
    "The kit with an adapter that has learned something: some drafts stand, some fall"
    folder = tmp_path_factory.mktemp("able")
    store = extract(folder, pair=pair, split="train", quant="fp32", max_samples=20, progress=False)
    run = train_adapter(store, adapter_level=1, loss="kl", num_epochs=12, output_dir=str(folder), progress=False)
    own, event = (load_any_adapter(train_adapter(store, adapter_level=k, num_epochs=8, output_dir=str(folder),
                                                 progress=False)["best_model"])[0] for k in ("own", "own+event"))
    return replace(kit, adapter=load_any_adapter(run["best_model"])[0].eval(), own=own, event=event)


PROMPTS = int(os.environ.get("FEATSD_PROMPTS", "1000"))
FEW = min(10, PROMPTS // 4)


@pytest.fixture(scope="module")
def thousand(pair):
    "1,000 prompts (or FEATSD_PROMPTS) in blocks of 200, with the target's greedy answers, whole"
    many, out = open_clips("pocket", "test", 100), []
    for at in range(0, PROMPTS, 200):
        block = [encode_prompt(pair, many[i // 10], many.questions[i % 10]) for i in range(at, min(at + 200, PROMPTS))]
        out.append((block, [a.ids.tolist() for a in pair.target.generate([p.target for p in block])]))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OURS, "lookup+gated"])
def test_a_thousand_prompts(name, pair, able, thousand):
    "1,000 prompts × γ 1..8 in batches, the first 20 tokens of each answer; a few of them one by one as well, to the end"
    torch.set_num_threads(1)
    stood, fell, knows = 0, 0, {"oracle": OracleDraft, "adversarial": AdversarialDraft}.get(name)
    for k, (block, want) in enumerate(thousand):
        for gamma in range(1, 9):
            drafters = [knows(pair.target, answer=w) if knows else make_drafter(name, able) for w in want]
            done = speculative_decode_batch(pair.target, drafters, block, gamma, max_new_tokens=20)
            assert [d.ids for d in done] == [w[:20] for w in want]
            stood += sum(sum(d.accepted) for d in done)
            fell += sum(sum(d.drafted) - sum(d.accepted) for d in done)
            if k: continue
            alone = [speculative_decode(pair.target, d, p, gamma).ids for d, p in zip(drafters[:FEW], block)]
            assert alone == want[:FEW]
    if name in ("aligned", "fused", "gated", "ngram", "template", "lookup+gated", "own+event"): # both paths were walked
        assert min(stood, fell) > 5 * PROMPTS
    print(f"{name}: {8 * PROMPTS:,} answers identical, {stood} drafted tokens stood, {fell} fell")

# ---- drafters by name ------------------------------------------------------------------------------------------------


def test_a_class_from_outside_is_found_by_its_name(kit, pair, prompts, plain):
    class Toy(Drafter):
        "Copies a template it was told of, position by position"
        name, kind, needs = "toy", "sensor", ("template",)
        def __init__(self, template): self.template = template
        @classmethod
        def make(cls, kit): return cls(kit.template)
        def propose(self, gamma):
            here = len(self.ids)
            return Draft(self.template[self.prompt.question][here:here + gamma].tolist())

    class Quiet(Toy): "A subclass without a name of its own"
    assert drafter_classes()["toy"] is Toy and Quiet not in drafter_classes().values()
    drafter, both = make_drafter("toy", kit), make_drafter("ngram+toy", kit)
    done = speculative_decode(pair.target, drafter, prompts[0], 4)
    assert done.ids == plain[0] and sum(done.accepted) > 0 and isinstance(drafter, Toy)
    assert speculative_decode(pair.target, both, prompts[0], 4).ids == plain[0]
    assert (both.name, both.kind, both.weights_read(), both.calls) == ("ngram+toy", "sensor", 0, 0)
    with pytest.raises(FeatsdError, match="'toy' needs a template"): make_drafter("toy", Kit(pair))
    with pytest.raises(FeatsdError, match="drafter 'magic': expected one of null, .*gated, .*toy"):
        make_drafter("toy+magic", kit)


def test_what_a_cascade_is_follows_from_its_parts(kit):
    for name, kind in (("lookup+ngram", "null"), ("template+gated", "sensor"), ("lookup+oracle", "limit"),
                       ("standard+oracle", "limit"), ("own", "own"), ("own+event", "sensor"), ("lookup+own", "own"),
                       ("own+event+lookup", "sensor")):
        assert make_drafter(name, kit).kind == kind
    assert make_drafter("lookup+ngram", kit).remote and not make_drafter("lookup+free", kit).remote
    read = {name: make_drafter(name, kit).weights_read() for name in ("gated", "lookup+gated", "lookup+ngram")}
    assert read["lookup+gated"] == read["gated"] > 0 == read["lookup+ngram"]

# ---- rungs 2 to 4: the certificate -----------------------------------------------------------------------------------


def test_certificate_of_an_honest_decoder(pair, kit, prompts, tmp_path):
    c = certify(pair.target, make_drafter("ngram", kit), prompts[:3], 4)
    assert c.verdict == "identical" and c.identical == 3 and c.control_divergences == 0
    assert not c.divergences and c.worst_deficit <= 2 * c.band
    c.save(tmp_path/"c.json")
    saved = json.loads((tmp_path/"c.json").read_text())
    assert saved["verdict"] == "identical" and saved["dtype"] == "float32" and saved["versions"]["torch"]


def test_certificate_in_half_precision(kit, clips):
    half = lean(load_pair("pocket", quant="bf16"))
    asked = [encode_prompt(half, clips[i], clips.questions[i]) for i in range(6)]
    c = certify(half.target, OracleDraft(half.target), asked, 5)
    assert c.lossless and c.dtype == "bfloat16" and c.band > tol(CHAIN)
    assert all(d["gap"] <= 2 * c.band for d in c.divergences)


def test_certificate_with_four_bits(clips):
    pytest.importorskip("bitsandbytes")
    quant = load_pair("pocket", quant="4bit")
    asked = [encode_prompt(quant, clips[i], clips.questions[i]) for i in range(2)]
    assert certify(quant.target, AdversarialDraft(quant.target), asked, 3, max_new_tokens=12).lossless


class Slips:
    "Takes one wrong token in `every` for right"
    def __init__(self, every): self.every, self.seen, self.slips = every, 0, 0
    def __call__(self, best, draft, h=None):
        n = 0
        while n < len(draft.ids):
            self.seen += 1
            if draft.ids[n] != best[n]:
                if self.seen < self.every: break
                self.seen, self.slips = 0, self.slips + 1
            n += 1
        return n, best[n]


def test_a_broken_verifier_is_caught(pair, kit, clips, monkeypatch):
    "One wrong token in 500 drafted ones"
    slips = Slips(500)
    monkeypatch.setattr(Greedy, "accept", slips)
    asked = [encode_prompt(pair, clips[i % 12], clips.questions[i % 10]) for i in range(20)]
    drafter = make_drafter("ngram", kit)
    c = certify(pair.target, drafter, asked, 8)
    assert slips.slips >= 1 and c.verdict == "broken" and not c.lossless


def test_an_answer_cut_short_is_caught(pair, kit, prompts):
    def cut(*args):
        done = speculative_decode(*args)
        done.ids = done.ids[:9]
        return done
    with pytest.raises(FeatsdError, match="0 prompts to certify"): certify(pair.target, NullDraft(), [])
    c = certify(pair.target, NullDraft(), prompts[:2], 4, decode=cut)
    assert c.verdict == "broken" and c.cut_short == [0, 1]

# ---- the lossy mode, transformers, the terminal ----------------------------------------------------------------------


def shown(pair, out=None, gamma=5, temperature=0., mode="lossless", max_new_tokens=50, **flags):
    "`decode_clips`, from a command's words"
    asking = Asking(**{k: flags.pop(k) for k in ("clip", "question") if k in flags})
    rule = rule_of(mode, sampling=Sampling(temperature) if temperature else None)
    return decode_clips(pair, asking, Recipe(**flags), gamma, rule, max_new_tokens, out=out or io.StringIO())


def test_lossy_is_never_the_default_and_says_so(pair, kit, prompts, plain):
    assert inspect.signature(speculative_decode).parameters["rule"].default == Greedy() and Greedy.mode == "lossless"
    assert decode_clips(pair, recipe=Recipe("null"), out=io.StringIO()).mode == "lossless"
    assert inspect.signature(featsd_decode.__wrapped__).parameters["mode"].default == "lossless"
    drafter = make_drafter("aligned", kit)
    drafter.states = True
    strict = speculative_decode(pair.target, drafter, prompts[0], 4, Cosine(.9999))
    assert strict.mode == "lossy" and strict.ids == plain[0] and not sum(strict.accepted)
    loose = speculative_decode(pair.target, drafter, prompts[0], 4, Cosine(-1.))
    assert loose.mode == "lossy" and loose.ids != plain[0] and loose.agreement < 1 and loose.acceptance == 1
    with pytest.raises(FeatsdError, match="no states"):
        speculative_decode(pair.target, make_drafter("ngram", kit), prompts[0], 4, Cosine())
    with pytest.raises(FeatsdError, match="greedy"): rule_of("lossy", sampling=Sampling())
    out = io.StringIO()
    shown(pair, drafter="null", mode="lossy", out=out)
    assert "LOSSY" in out.getvalue()


@pytest.mark.parametrize("name", ["oracle", "adversarial", "ngram", "standard", "aligned", "own", "own+event", "gated-own"])
def test_transformers_generate_takes_the_drafters(name, pair, kit, prompts, plain):
    lm, eos = pair.target.lm, pair.target.eos_ids
    def assisted(*how): return assisted_generate(lm, make_drafter(name, kit), prompts[0], *how, eos_token_id=eos)
    for gamma in (1, 5): assert assisted(gamma) == plain[0]
    assert assisted(5, 9) == plain[0][:9]


def test_the_terminal_shows_the_answer(pair, clips, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    want = plain_decode(pair.target, encode_prompt(pair, clips[1], clips.questions[2]))
    for no_color, Out in ((None, Terminal), ("1", Terminal), (None, io.StringIO)):
        if no_color is None: monkeypatch.delenv("NO_COLOR", raising=False)
        else: monkeypatch.setenv("NO_COLOR", no_color)
        out = Out()
        done = shown(pair, clip=1, question=2, drafter="oracle", gamma=3, out=out)
        assert done.ids == want.ids
        colored = Out is Terminal and no_color is None
        assert ("\033[" in out.getvalue()) == colored
        text, line = out.getvalue().rstrip("\n").split("\n")
        if not colored: assert text == pair.target.decode_text(want.ids)
        assert "same ids" in line and "x plain decoding" in line and "τ" in line


BAD = [
    (dict(gamma=0), "gamma 0"), (dict(gamma=-3), "gamma -3"), (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(drafter="magic"), "expected one of null"), (dict(drafter="aligned"), "needs an adapter"),
    (dict(drafter="own"), "needs an own-state head"),
    (dict(drafter="ngram"), "needs an n-gram table"), (dict(drafter="aligned", adapter="nowhere.pt"), "nowhere.pt"),
    (dict(drafter="ngram", words="nowhere"), "nowhere"), (dict(clip=-1), "clip -1"),
    (dict(question="How are you ?"), "How are you"), (dict(temperature=-1.), "temperature"),
    (dict(mode="fast"), "'lossless' or 'lossy'"), (dict(pair="draft=a"), "draft=FOLDER,target=FOLDER")]


@pytest.mark.parametrize("bad,message", BAD)
def test_bad_input_is_one_line(bad, message, pair):
    with pytest.raises((ValueError, OSError)) as e: shown(**{"pair": pair, "drafter": "null", **bad})
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_foreign_adapter_or_table_names_both_sides(pair, kit, tmp_path):
    with pytest.raises(ValueError, match=f"trained against head 000000.*{pair.target.head.hash[:16]}"):
        foreign = create_adapter(1, pair.draft.head.hidden_size, bottleneck_dim=8, head_hash="0" * 64)
        make_drafter("aligned", Kit(pair, foreign))
    NGramTable([[5, 6, 7]], tokenizer_hash="f" * 64).save(tmp_path/"t.safetensors")
    with pytest.raises(FeatsdError, match=f"table of tokenizer ffff.*{pair.target.tokenizer_hash[:16]}"):
        shown(pair, drafter="ngram", words=tmp_path/"t.safetensors")
    (tmp_path/"torn.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(FeatsdError, match="expected an n-gram table"):
        shown(pair, drafter="ngram", words=tmp_path/"torn.safetensors")
