"Two tokenizers: an answer of one told in another's tokens, states, proposals, stores; and what is lossless stays so"
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closeness import near
from tiny_checkpoints import small_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from featsd.adapters import create_adapter
from featsd.data.chunk import StoreError
from featsd.data.feed import rows_in_memory
from featsd.data.store import open_states, verify_store
from featsd.decode import (
    Prompt, Sampled, Sampling, certify, encode_prompt, plain_decode, speculative_decode, speculative_decode_batch)
from featsd.drafters import AlignedDraft, Kit, RawDraft, StandardDraft, make_drafter
from featsd.extract import extract, pair_states
from featsd.models.align import Retold, Telling, backend, unheard
from featsd.models.backbone import Backbone, Pair, Prefix
from featsd.models.lean import early_exit, lean

TEXT = "the red car turns left.\n\nThe  road is wet, über Ångström 车の👩‍🚗 the car is red and the road turns"
WORDS = "the The red car turns left road is wet and".split()


def byte_tokenizer(*merges, shift=0): # other ids for the same bytes
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = letters[shift:] + letters[:shift]
    vocab = {c: i for i, c in enumerate(["<e>", *letters, *dict.fromkeys(a + b for a, b in merges)])}
    t = Tokenizer(models.BPE(vocab, list(merges)))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<e>")


def whole_words(words):
    out = []
    for w in [v for word in words for v in (word, "Ġ" + word)]: out += [(w[:k], w[k]) for k in range(1, len(w))]
    return list(dict.fromkeys(out))


TOKENIZERS = {
    "bytes": byte_tokenizer(), "bytes, other ids": byte_tokenizer(shift=7),
    "words": byte_tokenizer(*whole_words(WORDS), shift=9),
    "pairs of letters": byte_tokenizer(*[(a, b) for a in "Ġtrcliwa" for b in "theroadsniul"], shift=11),
    "sentencepiece": small_tokenizer()}


class Tiny(Backbone):
    "A text model of random weights"
    def __init__(self, tokenizer, seed=0, width=16, layers=2):
        torch.manual_seed(seed)
        self.seed = seed
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, initializer_range=.5,
                             num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
                             max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id)
        lm = LlamaForCausalLM(config)
        lm.requires_grad_(False)
        super().__init__(lm, lm.model, tokenizer, f"tiny {seed}", str(seed))
    def see(self, clip): return self.embed(torch.tensor([[len(clip.id) % 7]]))
    def prompt(self, question): return [1], self.tokenizer.encode(question, add_special_tokens=False)


def pair_of(draft, target, width=16): return Pair(Tiny(TOKENIZERS[draft], 1), Tiny(TOKENIZERS[target], 2, width))
CLIP = SimpleNamespace(id="a")


def texts_of(tokenizer, ids): # n + 1 texts: after 0, 1, … tokens, of whole characters; and whether each ends with one
    "A run of byte tokens that ends inside a character decodes to nothing but replacement signs"
    out = [("", True)]
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=True)
        out.append((out[-1][0], False) if text.endswith("\ufffd") else (text, True))
    return out


# ---- text ----

@pytest.mark.parametrize("source", TOKENIZERS)
@pytest.mark.parametrize("listener", [t for t in TOKENIZERS if t != "bytes, other ids"])
def test_told_as_if_the_whole_text_were_tokenised(source, listener):
    "Token by token, with a window; taken back and told again; characters in pieces are waited for"
    a, b = TOKENIZERS[source], TOKENIZERS[listener]
    ids, whole = a.encode(TEXT * 2, add_special_tokens=False), backend(b)
    telling, seen = Telling(backend(a), whole), []
    for t, (text, complete) in zip(ids, texts_of(a, ids)[1:]):
        mark = telling.say(t)
        assert mark.whole == complete and telling.text == text
        assert list(mark.ids) == whole.encode(telling.text, add_special_tokens=False).ids
        seen.append(mark)
    assert telling.text == TEXT * 2
    rng = np.random.default_rng(0)
    for n in rng.integers(0, len(ids), 5).tolist():
        telling.forget(n)
        for t, mark in zip(ids[n:], seen[n:]): assert telling.say(t) == mark


def test_long_answers_are_tokenised_in_windows():
    "The work for a token does not grow with the answer, and the tokens are the same"
    a, b, length = TOKENIZERS["bytes"], backend(TOKENIZERS["words"]), []
    class Counting:
        def encode(self, text, **kw): length.append(len(text)); return b.encode(text, **kw)
    telling = Telling(backend(a), Counting())
    for t in a.encode("the red car turns left and " * 60): telling.say(t)
    assert list(telling.now.ids) == b.encode(telling.text).ids
    assert max(length[-500:]) < 60 < len(telling.text)


def test_control_tokens_are_no_text():
    a = byte_tokenizer()
    a.add_special_tokens({"additional_special_tokens": ["<x>"]})
    telling = Telling(backend(a), backend(TOKENIZERS["words"]))
    for t in a.encode("the<x> red<x>"): mark = telling.say(t)
    assert telling.text == "the red" and list(mark.ids) == TOKENIZERS["words"].encode("the red")
    assert telling.say(10**6).ids == mark.ids # an id that the tokenizer does not have


# ---- states ----

def slow_states(model, prefix, listener, source, ids): # the draft reads each text anew
    out = []
    for text, _ in texts_of(source, ids)[:-1]:
        state = model.prefill([prefix])
        told = listener.encode(text, add_special_tokens=False)
        if told: model.step(state, torch.tensor([told]))
        out.append(state.h[0])
    return torch.stack(out)


@pytest.mark.parametrize("form", [lambda m: m, lean], ids=["plain", "lean"])
@pytest.mark.parametrize("source,listener", [("bytes", "words"), ("words", "bytes"), ("pairs of letters", "words"),
                                             ("sentencepiece", "pairs of letters"), ("words", "sentencepiece")])
def test_states_are_those_of_a_draft_that_read_the_text_up_to_there(source, listener, form):
    pair = pair_of(listener, source)
    draft, plain = form(pair).draft, pair.draft.inner
    a, b = pair.target.tokenizer, plain.tokenizer
    answers = [torch.tensor(a.encode(t, add_special_tokens=False)) for t in (TEXT, "the car", "über")]
    prefixes = [draft.encode(SimpleNamespace(id=c), "who?") for c in ("a", "a", "bb")]
    want = [slow_states(plain, p, b, a, x.tolist()) for p, x in zip(prefixes, answers)]
    for got, w in zip(draft.forced(prefixes, answers), want): near(got, w, 256)
    for p, x, w in zip(prefixes, answers, want): # token by token, as in decoding, with a look ahead that is taken back
        state, rows = draft.prefill([p]), []
        for n in range(len(x)):
            rows.append(state.h[0])
            draft.step(state, torch.tensor([[3, 4]]))
            draft.rollback(state, [state.base[0] + n])
            draft.step(state, x[None, n:n + 1])
        near(torch.stack(rows), w, 256)


def steps_of(pair, answer): # forwards of the draft along an answer
    count, step = [], pair.draft.inner.step
    pair.draft.inner.step = lambda state, ids, *a: count.append(ids.shape[1]) or step(state, ids, *a)
    pair.draft.forced([pair.draft.encode(CLIP, "who?")], [answer])
    return count


def test_where_every_boundary_agrees_and_where_few_do(capsys):
    "One forward where both cut alike; the share of tokens without a state of their own is that of split characters"
    alike, other = pair_of("bytes, other ids", "bytes"), pair_of("words", "bytes")
    ids = TOKENIZERS["bytes"].encode(TEXT)
    split = sum(not whole for _, whole in texts_of(TOKENIZERS["bytes"], ids)[:-1])
    plain = torch.tensor(TOKENIZERS["bytes"].encode("the red car turns left and the road is wet"))
    assert steps_of(alike, plain) == [len(plain) - 1] and len(steps_of(other, plain)) > 5
    reads = alike.draft.alignment(plain.tolist())
    assert reads.tolist() == list(range(len(plain))) and unheard([reads]) == (0, len(plain))
    few = other.draft.alignment(plain.tolist())
    whole = TOKENIZERS["words"].encode("the red car turns left and the road is wet")
    ends = {len(TOKENIZERS["words"].decode(whole[:n])) for n in range(len(whole) + 1)}
    assert len(ends & set(range(len(plain)))) < .45 * len(plain) # few of the target's boundaries are the draft's
    for pair in (alike, other):
        bad, n = unheard([pair.draft.alignment(ids)])
        print(f"{pair.draft.name}: {bad} of {n} target tokens without a state of their own")
        assert bad == split and bad / n < .25
    assert unheard([few]) == (0, len(plain)) and "without a state" in capsys.readouterr().out


def test_rows_leave_a_batch():
    pair = pair_of("words", "bytes")
    draft, ids = pair.draft, [torch.tensor(TOKENIZERS["bytes"].encode(t)) for t in ("the red car", "a wet road", "left")]
    prefixes = [draft.encode(CLIP, q) for q in ("who?", "where is it?", "x")]
    want = draft.forced(prefixes, ids)
    state = draft.prefill(prefixes)
    draft.step(state, torch.stack([x[:3] for x in ids]))
    draft.select(state, torch.tensor([0, 1]))
    h = draft.step(state, torch.stack([x[3:6] for x in ids[:2]]))
    near(h, torch.stack([w[4:7] for w in want[:2]]), 256)
    assert state.lengths.tolist() == [b + 6 for b in state.base]


# ---- proposals ----

class Scripted:
    "A model that writes one text in its own tokens, whatever it is told"
    penalty, name, model_hash, device, dtype = 1., "scripted", "", "cpu", torch.float32
    def __init__(self, tokenizer, text):
        self.tokenizer = tokenizer
        self.script = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        self.eos_ids, self.head, self.vocab_size, self.hidden_size = (tokenizer.eos_token_id,), self, len(tokenizer), 1
    def logits(self, h): # h: [..., 1] tokens read
        n = h[..., 0].long().clamp(0, len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[n], self.vocab_size).float()
    def encode(self, clip, question): return Prefix(torch.zeros(1, 1, 1), 1, "a")
    def prompt(self, question): return [], []
    def decode_text(self, ids): return self.tokenizer.decode(ids, skip_special_tokens=True)
    def prefill(self, prefixes):
        B = len(prefixes)
        return SimpleNamespace(lengths=torch.zeros(B, dtype=torch.long), h=torch.zeros(B, 1))
    def step(self, state, ids, lengths=None):
        h = (state.lengths[:, None] + 1 + torch.arange(ids.shape[1]))[..., None].float()
        state.lengths = state.lengths + (ids.shape[1] if lengths is None else lengths)
        state.h = h[:, -1]
        return h
    def rollback(self, state, lengths, h=None): state.lengths = torch.tensor([int(n) for n in lengths])


@pytest.mark.parametrize("target", TOKENIZERS)
@pytest.mark.parametrize("draft", TOKENIZERS)
def test_a_draft_that_writes_the_same_text_is_accepted_whole(draft, target):
    "Own words and own answer through text; the end token too"
    if draft == target: return
    t, text = Scripted(TOKENIZERS[target], TEXT), TEXT
    d = Retold(Scripted(TOKENIZERS[draft], TEXT), t)
    prompt = Prompt(t.encode(CLIP, ""), d.encode(CLIP, ""))
    for drafter in (StandardDraft(d), RawDraft(d)):
        out = speculative_decode(t, drafter, prompt, 5, max_new_tokens=400)
        assert out.ids == t.script and t.decode_text(out.ids) == text
        assert out.tau > 3 and sum(out.accepted) > .6 * len(out.ids)


DRAFTERS = ["null", "oracle", "adversarial", "standard", "raw", "aligned", "free", "lookup", "lookup+aligned"]


@pytest.mark.parametrize("draft,target", [("words", "bytes"), ("bytes", "words"), ("sentencepiece", "pairs of letters"),
                                          ("bytes, other ids", "bytes")])
def test_every_drafter_is_lossless(draft, target):
    pair = lean(pair_of(draft, target, 24))
    assert isinstance(pair.draft, Retold) and pair.shared_vocab is None and "through text" in repr(pair)
    adapter = create_adapter(1, 16, 24, bottleneck_dim=8).eval()
    kit = Kit(pair, adapter, max_new_tokens=16)
    asked = ("a", "who?"), ("bb", "the red car")
    prompts = [encode_prompt(pair, SimpleNamespace(id=c), q) for c, q in asked]
    want = [plain_decode(pair.target, p, max_new_tokens=16).ids for p in prompts]
    for name in DRAFTERS:
        d = make_drafter(name, kit)
        for p, ids in zip(prompts, want):
            done = speculative_decode(pair.target, d, p, 4, max_new_tokens=16)
            assert done.ids == ids, name
            assert min(done.draft_ms) > -1e-6 and done.overhead_ms >= 0
            if name == "oracle": assert done.tau > 3
        each = [make_drafter(name, kit) for _ in prompts]
        many = speculative_decode_batch(pair.target, each, prompts, 4, max_new_tokens=16)
        assert [d.ids for d in many] == want, name
    assert certify(pair.target, make_drafter("aligned", kit), prompts, 4, 16).verdict == "identical"
    looks_back = create_adapter(4, 16, 24, num_layers=1, num_heads=2).eval()
    d = AlignedDraft(pair.draft, pair.target.head, looks_back)
    assert [speculative_decode(pair.target, d, p, 4, max_new_tokens=16).ids for p in prompts] == want
    rule = Sampled(Sampling(temperature=.7, seed=3))
    for d in (StandardDraft(pair.draft), AlignedDraft(pair.draft, pair.target.head, adapter)):
        assert len(speculative_decode(pair.target, d, prompts[0], 3, rule, 12).ids) <= 12


def test_the_aligned_drafter_says_what_head_and_adapter_say():
    "Its proposals are those of the slow states under the target's head, also across word boundaries"
    pair = pair_of("words", "bytes", 24)
    adapter, p = create_adapter(1, 16, 24, bottleneck_dim=8).eval(), encode_prompt(pair, CLIP, "who?")
    d = AlignedDraft(pair.draft, pair.target.head, adapter)
    d.start(p)
    said = TOKENIZERS["bytes"].encode("the red c")
    d.accept(said[:-1], said[-1])
    got, text = d.propose(6).ids, list(said)
    for token in got:
        h = slow_states(pair.draft.inner, p.draft, TOKENIZERS["words"], TOKENIZERS["bytes"], [*text, 0])[-1:]
        assert token == int(pair.target.head.logits(adapter(h[None])[0]).argmax())
        text.append(token)


def test_what_text_costs_is_overhead():
    "Time between two tokenizers is in no draft step"
    pair = pair_of("words", "bytes", 16)
    slow = pair.draft.listener
    class Slow:
        def encode(self, *a, **kw):
            import time
            time.sleep(.002)
            return slow.encode(*a, **kw)
        def decode(self, *a, **kw): return slow.decode(*a, **kw)
    p, d = encode_prompt(pair, CLIP, "who?"), AlignedDraft(pair.draft, pair.target.head)
    pair.draft.listener = Slow()
    before = pair.draft.words_ms
    done = speculative_decode(pair.target, d, p, 4, max_new_tokens=16)
    spent = pair.draft.words_ms - before
    assert spent >= 2 * done.cycles and done.overhead_ms >= .9 * spent


# ---- models ----

def test_forms_of_the_draft_stay_told():
    pair = pair_of("words", "bytes")
    short = early_exit(pair.draft, 1)
    assert isinstance(short, Retold) and len(short.decoder.layers) == 1 and short.name.endswith("1of2")
    assert isinstance(lean(short), Retold) and lean(short).inner is not short.inner
    again = Pair(pair.draft, pair.target)
    assert not isinstance(again.draft.inner, Retold)
    assert Pair(pair.draft.inner, Tiny(TOKENIZERS["words"], 5)).shared_vocab == len(TOKENIZERS["words"])


def test_own_answers_come_in_the_target_s_tokens():
    pair = pair_of("words", "bytes")
    prefix = pair.draft.encode(CLIP, "who?")
    own, said = pair.draft.inner.generate([prefix], 12)[0], pair.draft.generate([prefix], 12, states=True)[0]
    text = TOKENIZERS["words"].decode(own.ids, skip_special_tokens=True).rstrip("\ufffd")
    assert TOKENIZERS["bytes"].decode(said.ids, skip_special_tokens=True) == text[:len(said.ids)] or len(said.ids) == 12
    assert said.states.shape == (len(said.ids), 16) and len(said.margins) == len(said.ids)
    near(said.states, pair.draft.forced([prefix], [said.ids])[0], 64)


# ---- stores ----

@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "A pair of two tokenizers over the built-in world, extracted"
    out, pair = tmp_path_factory.mktemp("store"), pair_of("words", "bytes", 24)
    how = dict(max_samples=3, max_questions=2, max_new_tokens=12, chunk_size=2, quant="fp32", dtype="fp32",
               progress=False)
    return pair, how, extract(out, "pocket", pair, **how)


def bytes_of(path): return {f.name: f.read_bytes() for f in sorted((path/"chunks").iterdir())}


def test_the_store_holds_the_alignment(stored):
    pair, how, path = stored
    states = open_states(path)
    assert states.manifest["alignment"] == "text" and states.manifest["shared_vocab"] is None
    assert all(v == "ok" for _, v in verify_store(path))
    for i in range(len(states)):
        ids = states.target_ids(i)
        assert states.target_reads(i).tolist() == pair.draft.alignment(ids.tolist()).tolist()
        assert states.draft_ids(i).max() < len(TOKENIZERS["bytes"])
        assert pair.target.decode_text(states.draft_ids(i)) == states.pairs[i].draft_text
    rows = rows_in_memory(states, "draft_forced")
    assert rows.h_draft.shape == (len(rows.ids), 16) and rows.h_target.shape == (len(rows.ids), 24)


def test_resume_gives_the_same_bytes(stored, tmp_path):
    pair, how, path = stored
    again = extract(tmp_path, "pocket", pair_of("words", "bytes", 24), **how)
    assert bytes_of(again) == bytes_of(path)
    for f in sorted((again/"chunks").iterdir())[-3:]: f.unlink()
    os.truncate(next((again/"chunks").glob("*.safetensors")), 100)
    assert bytes_of(extract(tmp_path, "pocket", pair, **how)) == bytes_of(path)


def test_another_tokenizer_is_another_store(stored, tmp_path):
    pair, how, path = stored
    with pytest.raises(StoreError, match="tokenizer_hash|draft"):
        extract(path.parent, "pocket", pair_of("pairs of letters", "bytes", 24), **how)


def test_batches_of_clips_store_the_same_states(stored):
    pair, how, path = stored
    from featsd.data.clips import open_clips
    clips = [open_clips("pocket", "train", 3)[i] for i in range(3)]
    together = pair_states(pair, clips, ["who?", "what is it?"], 12)
    alone = [p for c in clips for p in pair_states(pair, [c], ["who?", "what is it?"], 12)]
    for a, b in zip(together, alone):
        assert a.target_ids.tolist() == b.target_ids.tolist() and a.reads.tolist() == b.reads.tolist()
        for s in a.streams: near(a.streams[s], b.streams[s], 256)
