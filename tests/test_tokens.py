"Which token is said, and after which one nothing more: every path gives the ids of transformers' own `generate`"
import hashlib

import pytest
import torch
import transformers as T
from closeness import near, off
from safetensors import safe_open

from featsd.adapters import create_adapter
from featsd.base.core import FeatsdError, log
from featsd.data.head import Head
from featsd.data.store import open_states
from featsd.decode import (
    NullDraft, OracleDraft, Prompt, certify, plain_decode, speculative_decode, speculative_decode_batch, wide_decode)
from featsd.drafters import FreeRunDraft, StandardDraft, RawDraft
from featsd.extract import extract
from featsd.files import verify_files
from featsd.generate import assisted_generate
from featsd.models.backbone import Backbone, Pair, Prefix, fitted_head, load_backbone
from featsd.models.lean import lean
from featsd.race import run_transformers
from tiny_checkpoints import small_tokenizer, write_eventgpt, write_videollava

SIZES = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=.15, bos_token_id=1, eos_token_id=2)


def heard(m, ids): # a prompt for target and draft alike
    p = Prefix(m.embed(torch.tensor([ids])).detach(), 1, str(ids))
    return Prompt(p, p)


def model(cls=T.LlamaForCausalLM, config=T.LlamaConfig, seed=3, **more):
    torch.manual_seed(seed)
    lm = cls(config(**{**SIZES, **more})).eval().requires_grad_(False)
    return lm, lambda: Backbone(lm, lm.model, small_tokenizer(), "words")


def generated(lm, prefix, n=16, **more): # transformers' ids
    x = prefix.embeds
    return lm.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), max_new_tokens=n,
                       do_sample=False, pad_token_id=0, **more)[0].tolist()


def paths(m, prompts, n=16): # name → ids per prompt
    "Every way to a greedy answer"
    out = {"generate": [m.generate([p.target], n)[0].ids.tolist() for p in prompts],
           "batch": [a.ids.tolist() for a in m.generate([p.target for p in prompts], n)],
           "plain": [plain_decode(m, p, max_new_tokens=n).ids for p in prompts],
           "wide": [wide_decode(m, p, 3, n) for p in prompts]}
    drafters = dict(null=NullDraft, oracle=lambda: OracleDraft(m, n), own=lambda: StandardDraft(m),
                    careful=lambda: StandardDraft(m, min_confidence=1e-6), raw=lambda: RawDraft(m),
                    free=lambda: FreeRunDraft(m, m.head, then=StandardDraft(m)))
    for name, make in drafters.items():
        done = [speculative_decode(m, make(), p, 4, max_new_tokens=n) for p in prompts]
        out[name] = [d.ids for d in done]
        if name not in ("null", "free"): # who thinks like the target is never refused
            assert all(d.accepted == d.drafted for d in done), name
    batch = speculative_decode_batch(m, [StandardDraft(m) for _ in prompts], prompts, 4, max_new_tokens=n)
    return out | {"engine in a batch": [d.ids for d in batch]}


@pytest.mark.parametrize("form", ["as it is", "lean"])
def test_of_equal_logits_the_first_is_said_as_transformers_does(form):
    lm, make = model()
    lm.lm_head.weight[1::2] = lm.lm_head.weight[::2] # every logit twice
    m = make() if form == "as it is" else lean(make())
    prompts = [heard(m, [1, 17 + i, 40, 99]) for i in range(4)]
    z = m.head.logits(m.prefill([prompts[0].target]).h)[0]
    assert (z == z.max()).sum() == 2 # the tie is real
    want = [generated(lm, p.target) for p in prompts]
    for name, ids in paths(m, prompts).items(): assert ids == want, name


@pytest.mark.parametrize("form", ["as it is", "lean"])
def test_an_answer_ends_at_each_of_several_end_tokens(form):
    lm, make = model(seed=5)
    probe = make()
    starts = [[1, 17 + i, 40, 99] for i in range(6)]
    said = [generated(lm, heard(probe, s).target, eos_token_id=None) for s in starts]
    ends = [2, said[0][3], said[1][5], said[2][7]] # each of them ends some answer
    lm.generation_config.eos_token_id = ends
    m = make() if form == "as it is" else lean(make())
    assert m.eos_ids == tuple(dict.fromkeys(ends))
    prompts = [heard(m, s) for s in starts]
    want = [generated(lm, p.target) for p in prompts]
    want = [ids[:next((i + 1 for i, t in enumerate(ids) if t in ends), len(ids))] for ids in want] # without its padding
    assert len({ids[-1] for ids in want} & set(ends)) > 1
    for name, ids in paths(m, prompts).items(): assert ids == want, name
    theirs = [assisted_generate(lm, StandardDraft(m), p, 4, 16, eos_token_id=m.eos_ids) for p in prompts]
    assert theirs == want
    assert [run_transformers(m, p, 16)[0] for p in prompts] == want
    certificate = certify(m, StandardDraft(m), prompts, 4, 16)
    assert certificate.verdict == "identical" and certificate.cut_short == []


def test_ends_come_from_where_generate_takes_them():
    lm, make = model()
    lm.generation_config.eos_token_id = None
    lm.config.eos_token_id = 7
    assert make().eos_ids == (7,) and make().eos_id == 7
    lm.config.eos_token_id = None
    assert make().eos_ids == (2,) # the tokenizer's
    lm.generation_config.eos_token_id = [9, 2, 9]
    assert make().eos_ids == (9, 2)


@pytest.mark.parametrize("cls, config, more", [
    (T.MistralForCausalLM, T.MistralConfig, dict(sliding_window=6)),
    (T.Gemma2ForCausalLM, T.Gemma2Config, dict(sliding_window=6, head_dim=8, layer_types=["sliding_attention",
                                                                                          "full_attention"]))])
def test_a_window_holds_in_batches_of_unequal_prompts(cls, config, more):
    "Alone, batched, rolled back by different numbers of tokens in each row: the model's own answers and states"
    lm, make = model(cls, config, seed=7, **more)
    m = make()
    prompts = [heard(m, [1, *range(20, 20 + n)]) for n in (3, 9, 14, 5)]
    want = [generated(lm, p.target, 12) for p in prompts]
    for name, ids in paths(m, prompts, 12).items(): assert ids == want, name
    state = m.prefill([p.target for p in prompts])
    start, more = state.lengths, torch.randint(4, 300, (4, 5), generator=torch.Generator().manual_seed(0))
    m.step(state, more)
    m.rollback(state, start + torch.tensor([0, 5, 2, 3]))
    m.step(state, more[:, :3], torch.tensor([3, 0, 1, 2]))
    m.rollback(state, state.lengths - torch.tensor([1, 0, 1, 0]))
    h = m.step(state, torch.full((4, 1), 9))[:, 0]
    kept = [[*more[0, :2]], [*more[1]], [*more[2, :2]], [*more[3, :3], *more[3, :2]]]
    for b, tokens in enumerate(kept):
        tail = m.embed(torch.tensor([[*map(int, tokens), 9]]))
        whole = lm.model(inputs_embeds=torch.cat([prompts[b].target.embeds, tail], 1)).last_hidden_state[0, -1]
        near(h[b], whole, 14 * 64, what=f"row {b}")


FORMED = {"bias": (T.PhiForCausalLM, T.PhiConfig, {}), "scale": (T.CohereForCausalLM, T.CohereConfig, {}),
          "divided": (T.GraniteForCausalLM, T.GraniteConfig, dict(logits_scaling=8.)),
          "cap": (T.Gemma2ForCausalLM, T.Gemma2Config, dict(head_dim=8, final_logit_softcapping=3.))}


@pytest.mark.parametrize("what", FORMED)
def test_the_head_is_the_models_own_law(what, tmp_path):
    lm, _ = model(*FORMED[what][:2], **FORMED[what][2])
    if what == "bias": torch.nn.init.normal_(lm.lm_head.bias, std=.1)
    head = fitted_head(lm, getattr(lm.model, "norm", None), what)
    ids = torch.randint(4, 300, (1, 9))
    h, own = lm.model(ids).last_hidden_state, lm(ids).logits
    near(head.logits(h), own, 32)
    bare = Head(head.norm, torch.nn.Linear(*h.shape[2:], 320, bias=False).requires_grad_(False))
    bare.lm_head.weight.copy_(lm.lm_head.weight)
    assert off(bare.logits(h), own) > 1e-2 and head.hash != bare.hash
    near(head.restricted(300).logits(h), own[..., :300], 32)
    head.save(tmp_path/"head.safetensors")
    again = Head.load(tmp_path/"head.safetensors")
    assert again.hash == head.hash and torch.equal(again.logits(h), head.logits(h))
    assert [v[:2] for _, v in verify_files(tmp_path/"head.safetensors")] == ["ok"]
    adapter = create_adapter(1, 32).eval() # its last matrix may be folded into a plain head only
    near(adapter.folded(head)(h), head.logits(adapter(h)), 10 * 32)


def test_a_plain_head_keeps_its_hash_and_its_file(tmp_path):
    lm, make = model()
    head = make().head
    weights = (lm.model.norm.weight, lm.lm_head.weight)
    old = hashlib.sha256(b"".join(f"{tuple(w.shape)} {w.dtype}".encode() + w.numpy().tobytes() for w in weights))
    assert head.plain and head.hash == old.hexdigest()
    head.save(tmp_path/"head.safetensors")
    with safe_open(tmp_path/"head.safetensors", "pt") as f:
        assert set(f.keys()) == {"norm.weight", "lm_head.weight"} and set(f.metadata()) == {"eps"}


def test_a_law_that_is_no_known_form_is_refused():
    lm, make = model()
    lm.lm_head.register_forward_hook(lambda module, args, out: out) # may be watched
    forward = lm.forward
    def bent(*args, **kw):
        out = forward(*args, **kw)
        out.logits = out.logits.sin()
        return out
    lm.forward = bent
    with pytest.raises(FeatsdError, match="words: probe 'head'"): make()


def test_what_would_bend_a_greedy_answer_is_taken_out_and_said(caplog):
    lm, make = model()
    lm.generation_config.repetition_penalty, lm.generation_config.eos_token_id = 1.3, [2, 9]
    log.disabled, before = False, log.level
    log.setLevel("WARNING")
    try: m = make()
    finally: log.setLevel(before)
    assert m.eos_ids == (2, 9) and lm.generation_config.repetition_penalty in (None, 1.)
    p = heard(m, [1, 17, 40, 99])
    assert plain_decode(m, p, max_new_tokens=16).ids == generated(lm, p.target, eos_token_id=[2, 9])


def test_a_token_that_only_the_target_has(tmp_path):
    "The target says an id that the draft's matrix has no row for: it is read as unknown, and extraction goes on"
    class Seeing(Backbone):
        def see(self, clip): return torch.ones(1, 2, 32) * float(clip.frames.mean()) / 255
        def prompt(self, q): return [1], self.tokenizer.encode(q, add_special_tokens=False)
    big, _ = model(vocab_size=322, seed=5)
    big.lm_head.weight[321] = 3 * big.lm_head.weight[100] # is said often
    target = Seeing(big, big.model, small_tokenizer(("<a>", "<b>")), "target")
    small, _ = model(seed=4)
    pair = Pair(Seeing(small, small.model, small_tokenizer(), "draft"), target, "mine")
    store = extract(tmp_path, "pocket", pair, "test", quant="fp32", max_samples=2, max_questions=3, max_new_tokens=12,
                    progress=False)
    assert any(int(open_states(store).target_ids(i).max()) == 321 for i in range(6))


@pytest.mark.parametrize("write", [write_videollava, write_eventgpt])
def test_control_tokens_in_a_question_are_refused(write, tmp_path):
    write(tmp_path/"m")
    m = load_backbone(tmp_path/"m")
    added = ["<image>", "<video>", "<pad>"] * (write is write_videollava)
    for token in ["</s>", "<s>", "<unk>", *added]:
        for q in (f"{token} what is this?", f"what is {token} this?"):
            with pytest.raises(FeatsdError, match=f"expected no {token}"): m.prompt(q)
            with pytest.raises(FeatsdError, match=f"expected no {token}"): m.encode(None, q)
    assert m.prompt("what <b> is this?")
