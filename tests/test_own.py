"A head on the target's own states: it is told them, learns from them, drafts from them, and changes no token"
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from closeness import near
from test_train import make_store

import featsd.train as T
from featsd.adapters import check_head, create_adapter, load_any_adapter
from featsd.base.core import FeatsdError
from featsd.data.answers import answers_of
from featsd.data.clips import open_clips
from featsd.data.feed import Feed
from featsd.data.head import Head, RMSNorm
from featsd.data.store import open_states
from featsd.decode import (
    Cosine, Draft, Drafter, Prompt, Sampled, Sampling, certify, encode_prompt, plain_decode, speculative_decode,
    speculative_decode_batch)
from featsd.drafters import Cascade, Kit, make_drafter
from featsd.files import verify_files
from featsd.fit import adapters_of
from featsd.generate import assisted_generate
from featsd.models.words import NGramTable, frequent_ids
from featsd.nulls import measure
from featsd.own import HeadSteps, shorter
from featsd.train import evaluate, objective, train_adapter


@pytest.fixture(scope="module")
def prompts(pair):
    clips = open_clips("pocket", "test", 3)
    return [encode_prompt(pair, clips[i], clips.questions[i]) for i in range(3)]


@pytest.fixture(scope="module")
def plain(pair, prompts): return [plain_decode(pair.target, p).ids for p in prompts]

# ---- what a drafter is told ------------------------------------------------------------------------------------------


class Listener(Drafter):
    "Right at first, wrong from the third token of a block on; keeps the states it is given"
    def __init__(self, answer): self.answer = answer
    def start(self, prompt, sampling=None): super().start(prompt, sampling); self.heard = []
    def propose(self, gamma):
        here = len(self.ids)
        return Draft([t if i < 2 else (t + 1) % 100 for i, t in enumerate(self.answer[here:here + gamma])])
    def accept(self, ids, next_id, states=None):
        super().accept(ids, next_id, states)
        assert len(states) == len(ids) + 1
        self.heard.append(states.clone())


@pytest.mark.parametrize("engine", ["lean", "library", "batch", "transformers", "cascade"])
def test_the_drafter_is_told_the_state_that_chose_each_token(engine, pair, slow_pair, prompts, plain):
    model = slow_pair if engine in ("library", "transformers") else pair
    heard = [Listener(ids) for ids in plain]
    for gamma in (1, 4):
        if engine == "batch": speculative_decode_batch(model.target, heard, prompts, gamma)
        for d, p, ids in zip(heard, prompts, plain):
            if engine == "transformers":
                assert assisted_generate(model.target.lm, d, p, gamma, eos_token_id=model.target.eos_id) == ids
            elif engine != "batch":
                speculative_decode(model.target, Cascade([d]) if engine == "cascade" else d, p, gamma)
            want = model.target.forced([p.target], [torch.tensor(ids)])[0]
            got = torch.cat(d.heard)
            near(got[:len(ids)], want[:len(got)], 16 * 7 * 128)
            assert len(got) >= len(ids) - 5 * (engine == "transformers") # it is not told of its last block

# ---- levels ----------------------------------------------------------------------------------------------------------

D, V = 16, 30


def head_of(seed=0, D=D):
    lm = torch.nn.Linear(D, V, bias=False)
    with torch.no_grad(): lm.weight.copy_(torch.randn(V, D, generator=torch.Generator().manual_seed(seed)))
    return Head(RMSNorm(torch.ones(D), 1e-6), lm)


def randomised(level, *dims, **kw):
    "None of its weights at its starting value"
    f, g = create_adapter(level, *dims, **(dict(num_heads=4, ffn_dim=24) | kw)).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in f.parameters(): p.copy_(torch.randn(p.shape, generator=g) * .3)
    return f


def lin(x, w, name): return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
def norm(x, w, name): return F.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"])


def layer_by_formula(x, w, p, heads, last=4, past=None):
    "The layer written a second time: position by position, head by head; keys and values of x, or of `past`"
    T, W = x.shape
    three = lambda x: norm(x, w, f"{p}.attn_norm") @ w[f"{p}.attn.in_proj_weight"].T + w[f"{p}.attn.in_proj_bias"]
    (q, *_), (_, k, v) = (three(y).split(W, -1) for y in (x, x if past is None else past))
    y = torch.zeros_like(x)
    for t in range(T):
        for s in range(0, W, W // heads):
            at = slice(s, s + W // heads)
            y[t, at] = (q[t, at] @ k[:t + 1, at].T / (W // heads) ** .5).softmax(-1) @ v[:t + 1, at]
    x = x + lin(y, w, f"{p}.attn.out_proj")
    return x + lin(F.gelu(lin(norm(x, w, f"{p}.ffn_norm"), w, f"{p}.ffn.0")), w, f"{p}.ffn.3")


@pytest.mark.parametrize("level, count", [(5, 102_819_841), ("5F", 169_936_897)])
def test_the_studys_levels_have_its_sizes(level, count):
    with torch.device("meta"): assert create_adapter(level).get_num_parameters() == count


def test_l5_is_the_formula():
    f, h = randomised(5, D), torch.randn(7, D)
    w = f.state_dict()
    x = layer_by_formula(norm(h, w, "input_norm") + w["pos_embed"][0, :7], w, "layers.0", 4)
    near(f(h[None])[0], h + w["alpha"] * (lin(norm(x, w, "output_norm"), w, "output_proj") - h), 20 * D)
    cache, rows = None, []
    for a in (0, 3, 4):
        y, cache = f.step(h[None, a:(3, 4, 7)[len(rows)]], cache)
        rows.append(y)
    near(torch.cat(rows, 1)[0], f(h[None])[0], 20 * D)
    with pytest.raises(ValueError, match="513 positions, expected at most 512"): f(torch.randn(1, 513, D))


def test_l5f_is_the_formula():
    f, e, v = randomised("5F", D), torch.randn(6, D), torch.randn(6, D)
    w, both = f.state_dict(), torch.cat([e, v], -1)
    g = lin(both, w, "gate.0").sigmoid()
    x = norm(g * e + (1 - g) * v + lin(both, w, "fusion_proj"), w, "fusion_norm") + w["pos_embed"][0, :6]
    x = layer_by_formula(x, w, "layers.0", 4)
    near(f(e[None], v[None])[0], v + w["alpha"] * (lin(norm(x, w, "output_norm"), w, "output_proj") - v), 20 * D)


@pytest.mark.parametrize("level, kw", [("own", {}), ("own+event", dict(bottleneck_dim=8)),
                                       ("own+event", dict(bottleneck_dim=8, cross=True))])
def test_passes_are_what_a_decoder_would_see(level, kw):
    "Slow reference: for every start true states up to it, then own outputs, each time a whole forward from nothing"
    head, T, steps = head_of(), 7, 3
    f = randomised(level, 12 if level != "own" else D, D, inner_dim=24, **kw)
    check_head(f, head)
    h, ids, e = torch.randn(1, T, D), torch.randint(V, (1, T)), torch.randn(1, T, 12)
    w = f.state_dict()
    with torch.no_grad():
        told, passes = f.inputs(ids, e)[0], list(f.passes(h, ids, steps, e))
        def out(states): # [n, D] of positions 0..n-1
            x, past = lin(states, w, "from_state") + told[:len(states)], None
            if f.cross: x, past = f.from_event(f.event(e[0, :len(states)])), x
            x = layer_by_formula(x, w, "layers.0", 4, past=past)
            return lin(norm(x, w, "out_norm"), w, "out")
        for start in range(T):
            states = h[0, :start + 1]
            for s in range(min(steps + 1, T - start)):
                y = out(states)[-1:]
                near(passes[s][0, start + s], y[0], 30 * D)
                states = torch.cat([states, y])


def test_tokens_in_a_row_are_counted_as_a_decoder_counts():
    head, f = head_of(), randomised("own", D)
    check_head(f, head)
    mask = torch.arange(9) < torch.tensor([[9], [5], [2]])
    h, ids = torch.randn(int(mask.sum()), D), torch.randint(3, (int(mask.sum()),))
    with torch.no_grad():
        head.lm_head.weight[3:] = -10 * head.lm_head.weight[:1] # few tokens, so that some are right
        f.tie(head)
        got, want, at = f.in_a_row(None, mask, h, ids, gamma=4).tolist(), [], 0
        for n in mask.sum(1).tolist():
            y, x = ids[at:at + n], h[at:at + n]
            for i in range(n - 1):
                steps, k = HeadSteps(f, head), 0
                z = steps.read(x[:i + 1], y[:i + 1])[-1:]
                while k < 4 and i + k + 1 < n and int(steps.logits(z).argmax()) == int(y[i + k + 1]):
                    z, k = steps.go_on(z, y[i + k + 1:i + k + 2]), k + 1
                want.append(k)
            at += n
    assert got == want and max(want) > 0


@pytest.mark.parametrize("level, kw", [(5, {}), (5, dict(vlm_only=True)), ("5F", {}), ("own", {}),
                                       ("own+event", dict(bottleneck_dim=8)), ("own", dict(inner_dim=24, num_layers=2)),
                                       ("own+event", dict(bottleneck_dim=8, cross=True))])
def test_they_come_back_from_their_files(level, kw, tmp_path):
    dims = (12, D) if level == "own+event" else (D,)
    f = randomised(level, *dims, head_hash=head_of().hash, **kw)
    f.save_checkpoint(tmp_path/"a.pt")
    f.save_pretrained(tmp_path/"hub")
    mask = torch.ones(2, 5, dtype=torch.bool)
    batch = torch.randn(2, 5, dims[0]), mask, torch.randn(10, D), torch.randint(V, (10,))
    for g in (load_any_adapter(tmp_path/"a.pt")[0], load_any_adapter(tmp_path/"hub")[0]):
        assert type(g) is type(f) and g.config == f.config and g.reads == f.reads
        for x in (f, g): check_head(x, head_of())
        assert torch.equal(g.of_states(*batch).nan_to_num(7), f.of_states(*batch).nan_to_num(7))
    card = (tmp_path/"hub"/"README.md").read_text()
    assert f"{f.get_num_parameters():,}" in card and f"from featsd.own import {type(f).__name__}\n" in card
    assert any(v == "ok" or v.startswith("ok") for _, v in verify_files(tmp_path/"a.pt"))
    if level != 5: return
    ckpt = torch.load(tmp_path/"a.pt") # as the study writes it: no level, and what B1 is stands in its config.json alone
    sizes = {k: f.config[k] for k in ("hidden_dim", "num_heads", "ffn_dim", "num_layers")} | {"use_token_embed": False}
    torch.save(ckpt | {"config": sizes}, tmp_path/"study.pt")
    (tmp_path/"config.json").write_text(json.dumps({"vlm_only": bool(kw)}))
    g = load_any_adapter(tmp_path/"study.pt")[0]
    assert g.level == 5 and g.reads == f.reads
    (tmp_path/"config.json").write_text("[" * 9999)
    assert load_any_adapter(tmp_path/"study.pt")[0].reads == ("draft",)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory): return make_store(tmp_path_factory.mktemp("own")/"store")


@pytest.mark.parametrize("level", ["own", "own+event", "5", "5F"])
def test_they_are_trained_resumed_and_kept_at_their_best(level, store, tmp_path, monkeypatch):
    kw = dict(adapter_level=level, num_epochs=4, val_split=.2, progress=False, early_stopping=0)
    r = train_adapter(store, output_dir=tmp_path/"a", **kw)
    h = r["history"]
    assert h["train_loss"][-1] < h["train_loss"][0] and load_any_adapter(r["best_model"])[0].level == r["level"]
    if "own" in level:
        assert r["best_epoch"] == h["val_in_a_row"].index(max(h["val_in_a_row"])) + 1 and r["loss"] == "kl"
    else: assert r["loss"] == ".5*align+.5*pred" and len(h["val_next_top1"]) == 4
    real = T.HiddenAdapterTrainer.train_epoch
    def dies(self, epoch, *a):
        if epoch == 3: raise KeyboardInterrupt
        return real(self, epoch, *a)
    monkeypatch.setattr(T.HiddenAdapterTrainer, "train_epoch", dies)
    with pytest.raises(KeyboardInterrupt): train_adapter(store, output_dir=tmp_path/"b", **kw)
    monkeypatch.setattr(T.HiddenAdapterTrainer, "train_epoch", real)
    again = train_adapter(store, output_dir=tmp_path/"b", resume=True, **kw)
    assert again["history"] == h


@pytest.mark.parametrize("loss", ["ce", "tv", "nla", "mse_cos"])
def test_every_loss_teaches_the_own_state_head(loss, store, tmp_path):
    h = train_adapter(store, adapter_level="own", loss=loss, num_epochs=4, val_split=.2, progress=False,
                      output_dir=tmp_path)["history"]
    assert h["train_loss"][-1] < h["train_loss"][0]


def test_the_loss_is_a_sum_over_rows_so_that_shares_of_processes_add_up(store):
    "The gradient of a batch is that of its parts, each weighed by its positions"
    head, f = head_of(), randomised("own", D, steps=2)
    check_head(f, head)
    mask = torch.arange(6) < torch.tensor([[6], [4], [3]])
    h, ids = torch.randn(13, D), torch.randint(V, (13,))
    def loss(m, h, y): return sum(x.weight * objective([(1., "kl")], *x.beside(head)) for x in f.lessons(None, m, h, y))
    whole, parts = loss(mask, h, ids), loss(mask[:1], h[:6], ids[:6]) * 6 / 13 + loss(mask[1:], h[6:], ids[6:]) * 7 / 13
    near(parts, whole, 20 * D)


@pytest.mark.parametrize("kw, says", [
    (dict(adapter_level=1, loss="pred"), "'pred' is of levels 5 and 5F, found L1"),
    (dict(adapter_level="own", steps=-1), "steps -1, expected 0 to 64"),
    (dict(adapter_level="own", residual="linear"), "residual 'linear', expected 'identity'"),
    (dict(adapter_level="own", inner_dim=10), "inner_dim 10 is not a multiple of num_heads")])
def test_bad_settings_are_one_line(kw, says, store, tmp_path):
    with pytest.raises(ValueError, match=says) as e: train_adapter(store, output_dir=tmp_path/"x", progress=False, **kw)
    assert "\n" not in str(e.value) and not (tmp_path/"x").exists()


def test_losses_over_a_short_list_are_those_of_the_laws_over_it(store, tmp_path):
    states, head = open_states(store), open_states(store).head()
    ids = torch.from_numpy(frequent_ids(answers_of(states), 9, head.vocab_size))
    said = torch.bincount(torch.cat([torch.as_tensor(a) for a in answers_of(states).target_ids]), minlength=head.vocab_size)
    assert len(set(ids.tolist())) == 9 and said[ids].min() >= said[[i for i in range(len(said)) if i not in ids]].max()
    a, t = torch.randn(2, 7, head.hidden_size, generator=torch.Generator().manual_seed(0))
    p, q = (head.logits(x)[:, ids].log_softmax(-1) for x in (t, a))
    near(objective([(1., "kl")], a, t, shorter(head, states, 9, "kl")), (p.exp() * (p - q)).sum(-1).mean(), 64)
    assert shorter(head, states, 0, "ce") is head
    kw = dict(adapter_level="own", num_epochs=1, val_split=.2, progress=False, output_dir=tmp_path, short_list=9)
    run = train_adapter(store, loss="kl", **kw)
    assert json.loads((Path(run["folder"])/"config.json").read_text())["training"]["short_list"] == 9
    with pytest.raises(FeatsdError, match="short_list 9: expected a loss between two laws"):
        train_adapter(store, loss="kl+.1*ce", **kw)
    with pytest.raises(FeatsdError, match="fewer than the vocabulary has"):
        train_adapter(store, loss="kl", **kw | {"short_list": 10**6})


@pytest.mark.parametrize("level", [5, "5F"])
def test_measuring_says_whether_an_output_names_the_next_token(level, store):
    states = open_states(store)
    f = randomised(level, states.manifest["target_dim"], head_hash=states.head().hash)
    r = measure(f, states, n_boot=20, streams=("draft_forced",)).row(f"L{level}, next token")
    kept = Feed(states, "draft_forced", 7, True)
    assert r.kind == "adapter"
    near(r.values["token_top1"].value, evaluate(f, kept, [(1., "mse_cos")], states.head())["val_next_top1"], 64)


def test_a_store_without_head_is_refused(tmp_path):
    bare = make_store(tmp_path/"s", keep_head=False)
    with pytest.raises(FeatsdError, match="own with loss mse_cos needs the target's head, found none"):
        train_adapter(bare, adapter_level="own", loss="mse_cos", output_dir=tmp_path, progress=False)

# ---- drafting --------------------------------------------------------------------------------------------------------


def heads(pair, **kw):
    made = lambda level, **more: randomised(level, 128, 128, head_hash=pair.target.head.hash, **more)
    return {"own": made("own"), "event": made("own+event", **kw)}


@pytest.mark.parametrize("field, kw", [("own", {}), ("event", {}), ("event", dict(cross=True))])
def test_its_memory_follows_what_stands(field, kw, pair, prompts, plain):
    "After every cycle its law is the one of a fresh head that reads only true states"
    f = heads(pair, **kw)[field]
    drafter = make_drafter({"own": "own", "event": "own+event"}[field], Kit(pair, **{field: f}))
    for gamma in (1, 4):
        assert speculative_decode(pair.target, drafter, prompts[0], gamma).ids == plain[0]
        ids = drafter.ids
        h = pair.target.forced([prompts[0].target], [torch.tensor(ids)])[0]
        e = pair.draft.forced([prompts[0].draft], [torch.tensor([*ids, 0])])[0][1:]
        fresh = HeadSteps(f, pair.target.head)
        want = fresh.logits(fresh.read(h, torch.tensor(ids), e)[-1:])
        near(drafter.law(drafter.reader.at(ids)), want, 16 * 7 * 128)
    assert (drafter.calls > 0) == (field == "event") # forwards of the draft model


@pytest.mark.parametrize("name", ["own", "own+event"])
def test_the_law_it_hands_over_is_the_one_it_draws_from(name, pair, prompts):
    "Sampled decoding with a head is exact only if q is right: compared with a fresh forward for each drafted token"
    f = heads(pair)["own" if name == "own" else "event"]
    drafter = make_drafter(name, Kit(pair, **{"own" if name == "own" else "event": f}))
    warm = Sampling(.7, top_k=20, seed=3)
    a, b = (speculative_decode(pair.target, drafter, prompts[0], 4, Sampled(Sampling(.7, top_k=20, seed=3)), 16).ids
            for _ in range(2))
    assert a == b
    h = pair.target.forced([prompts[0].target], [torch.tensor(a[:4])])[0]
    drafter.start(prompts[0], warm)
    drafter.accept(a[:2], a[2], h[:3])
    draft = drafter.propose(3)
    fresh, e = HeadSteps(f, pair.target.head), None
    text = [*a[:3], *draft.ids]
    e = pair.draft.forced([prompts[0].draft], [torch.tensor([*text, 0])])[0][1:]
    z = fresh.read(h[:3], torch.tensor(a[:3]), e[:3])[-1:]
    for i, t in enumerate(draft.ids):
        near(draft.probs[i], warm.law(fresh.logits(z))[0], 16 * 7 * 128)
        z = fresh.go_on(z, torch.tensor([t]), e[3 + i:4 + i])


@pytest.mark.parametrize("name", ["aligned", "own", "fused-event"])
def test_a_short_list_changes_the_law_and_no_token(name, pair, prompts, plain):
    table = {p.question: NGramTable([ids]) for p, ids in zip(prompts, plain)}
    adapter = create_adapter(1, 128, bottleneck_dim=8, head_hash=pair.target.head.hash)
    kit = Kit(pair, adapter, table, **heads(pair))
    ids = torch.tensor([5, 3, *range(40, 60)])
    whole, short = make_drafter(name, kit), make_drafter(name, replace(kit, short=ids))
    assert speculative_decode(pair.target, short, prompts[0], 4).ids == plain[0]
    for d in (whole, short): d.start(prompts[0], Sampling(1., seed=0))
    h = pair.target.forced([prompts[0].target], [torch.tensor(plain[0][:3])])[0]
    for d in (whole, short): d.accept(plain[0][:2], plain[0][2], h)
    text = plain[0][:3]
    z, few = (d.logits(d.reader.at(text), text) for d in (whole, short))
    near(few[:, ids], z[:, ids], 16 * 7 * 128)
    rest = torch.ones(z.shape[1], dtype=torch.bool).index_fill(0, ids, False)
    assert few[:, rest].eq(-torch.inf).all() and short.weights_read() < whole.weights_read()
    draft = short.propose(3)
    assert set(draft.ids) <= set(ids.tolist()) and draft.probs[:, rest].eq(0).all()


def test_it_stops_where_it_is_unsure_and_has_states_for_the_lossy_mode(pair, prompts, plain):
    f = heads(pair)["own"]
    sure = make_drafter("own", Kit(pair, own=f, min_confidence=1.1))
    assert speculative_decode(pair.target, sure, prompts[0], 4).drafted == [0] * len(plain[0])
    drafter = make_drafter("own", Kit(pair, own=f))
    drafter.states = True
    assert speculative_decode(pair.target, drafter, prompts[0], 4, Cosine(.9999)).ids == plain[0]


def test_what_cannot_draft_is_refused_in_one_line(pair, prompts, tmp_path):
    hash, target = pair.target.head.hash, pair.target.head
    for adapter, says in ((randomised("5F", 128), "L5F reads the target's state of the index it is to draft"),
                          (randomised(5, 128, vlm_only=True), "it can be measured; to draft, train level own"),
                          (randomised("own", 128), "decode with the drafter 'own'")):
        with pytest.raises(FeatsdError, match=says) as e: make_drafter("aligned", Kit(pair, adapter))
        assert "\n" not in str(e.value)
    randomised("5F", 128).save_checkpoint(tmp_path/"f.pt")
    with pytest.raises(FeatsdError, match="L5F reads the target's state"): adapters_of([tmp_path/"f.pt"])
    with pytest.raises(ValueError, match=f"trained against head 000000.*{hash[:16]}"):
        make_drafter("own", Kit(pair, own=randomised("own", 128, head_hash="0" * 64)))
    with pytest.raises(ValueError, match="width 64, head of width 128"):
        make_drafter("own", Kit(pair, own=randomised("own", 64)))
    with pytest.raises(FeatsdError, match="draft states of width 64, .* has width 128"):
        make_drafter("own+event", Kit(pair, event=randomised("own+event", 64, 128)))
    with pytest.raises(FeatsdError, match="drafter 'own' needs an own-state head"): make_drafter("own", Kit(pair))
    event = make_drafter("own+event", Kit(pair, event=heads(pair)["event"]))
    with pytest.raises(FeatsdError, match="own.event.* asks the draft model, and the prompt has no part for it"):
        speculative_decode(pair.target, event, Prompt(prompts[0].target), 3)
    alone = make_drafter("own", Kit(pair, own=heads(pair)["own"]))
    assert speculative_decode(pair.target, alone, Prompt(prompts[0].target), 3).ids # no second model is asked
    alone.start(prompts[0])
    with pytest.raises(FeatsdError, match="hands over no states of the target"): alone.accept([], 5)
    assert target.vocab_size == alone.head.vocab_size


def test_certificates(pair, prompts):
    for name, field in (("own", "own"), ("own+event", "event")):
        c = certify(pair.target, make_drafter(name, Kit(pair, **{field: heads(pair)[field]})), prompts[:2], 3, 20)
        assert c.verdict == "identical" and c.drafter == name
