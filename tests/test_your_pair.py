"The lines that `nbs/lab/your_pair.ipynb` tells a user to write, on other pairs: they run, no drafter changes a token"
import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from featsd.adapters import load_any_adapter
from featsd.fit import word_experts
from featsd.data.clips import open_clips
from featsd.data.store import open_states, verify_store
from featsd.decode import (
    AdversarialDraft, Sampled, Sampling, drafter_classes, encode_prompt, plain_decode, speculative_decode)
from featsd.drafters import Kit, make_drafter
from featsd.models.backbone import Pair
from featsd.models.checkpoint import quiet_transformers
from featsd.data.answers import answers_of

NOTEBOOK = Path(__file__).parents[1]/"nbs"/"lab"/"your_pair.ipynb"
CELLS = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
         if c["cell_type"] == "code"]


def cell(name): # the notebook's own lines
    (source,) = [c for c in CELLS if c.startswith(f"# your pair: {name}\n")]
    return source


def checkpoint(folder, seed, added=(), **sizes):
    "A random Llama model with the bytes-and-pieces tokenizer of the 7B models, in small"
    tokenizer = small_tokenizer(added)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, initializer_range=.15, **sizes)
    with quiet_transformers(): LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PAIRS = {"narrow draft": (dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                               num_key_value_heads=4), ()),
         "wide draft, own added token": (dict(hidden_size=96, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=1), ("<event>",))}
TARGET = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module", params=list(PAIRS))
def ran(request, tmp_path_factory):
    "Names after the notebook's run"
    out = tmp_path_factory.mktemp("mine")
    sizes, added = PAIRS[request.param]
    names = {"out": out, "questions": open_clips("pocket", "test", 1).questions,
             "draft_folder": checkpoint(out/"d", 11, added, **sizes),
             "target_folder": checkpoint(out/"t", 12, **TARGET)}
    for source in (CELLS[0], cell("the class"), cell("the check"),
                   cell("the run")): exec(compile(source, str(NOTEBOOK), "exec"), names)
    return names


def test_the_run_is_lossless(ran):
    compared = ran["compared"]
    assert {r.name for r in compared.rows} == {"raw", "template", "ngram", "standard", "aligned", "fused", "oracle"}
    assert all(r.identical == r.prompts == 8 and not r.broken for r in compared.rows)
    assert all(r.tau > 1.5 for r in compared.rows if r.name == "oracle")


def test_every_drafter_gives_the_targets_own_ids(ran):
    pair, clips = ran["pair"], open_clips("pocket", "test", 2)
    asked = ran["questions"][:2]
    tables, templates = word_experts(answers_of(open_states(ran["train"])), asked, pair.target.tokenizer_hash)
    adapter = load_any_adapter(ran["run"]["best_model"])[0]
    prompts = [encode_prompt(pair, clips[i], q) for i in range(2) for q in asked]
    with torch.no_grad():
        def theirs(p): # transformers' answer
            mask = torch.ones(p.target.embeds.shape[:2], dtype=torch.long)
            return pair.target.lm.generate(inputs_embeds=p.target.embeds, attention_mask=mask, max_new_tokens=20,
                                           do_sample=False, eos_token_id=2, pad_token_id=0)[0].tolist()
        own = [theirs(p) for p in prompts]
    have = {"adapter", "ngram", "template"} # an own-state head is trained and tried in test_own
    for name in [n for n, c in drafter_classes().items() if c.__module__.startswith("featsd.") and set(c.needs) <= have]:
        drafter = make_drafter(name, Kit(pair, adapter, tables, templates, max_new_tokens=20))
        for gamma in (1, 3, 8):
            said = [speculative_decode(pair.target, drafter, p, gamma, max_new_tokens=20).ids for p in prompts]
            assert said == own, (name, gamma)
    assert own == [plain_decode(pair.target, p, max_new_tokens=20).ids for p in prompts]


def test_a_decoder_that_ignores_the_target_is_found(ran):
    "The comparison above can fail: an engine that keeps what an adversary drafts does not give these ids"
    pair, prompt = ran["pair"], encode_prompt(ran["pair"], open_clips("pocket", "test", 1)[0], ran["questions"][0])
    adversary = AdversarialDraft(pair.target, 20)
    adversary.start(prompt)
    assert adversary.propose(8).ids[:4] != plain_decode(pair.target, prompt, max_new_tokens=20).ids[:4]
    plain = plain_decode(pair.target, prompt, max_new_tokens=20).ids
    assert speculative_decode(pair.target, adversary, prompt, 4, max_new_tokens=20).ids == plain
    hot = [speculative_decode(pair.target, adversary, prompt, 4, Sampled(Sampling(2., seed=s)), 20).ids for s in (0, 1)]
    assert hot[0] != hot[1] # sampling really samples


def test_the_check_finds_states_before_the_norm(ran):
    "The notebook's check passes for the class, and fails for a decoder whose states lack the final norm"
    clip, q = open_clips("pocket", "test", 1)[0], ran["questions"][0]
    target = ran["Mine"](ran["target_folder"], lambda clip: clip.frames[::2])
    with torch.no_grad(): target.head.norm.weight.copy_(torch.linspace(.1, 3., len(target.head.norm.weight)))
    assert ran["says_the_same"](target, clip, q)
    class Raw(torch.nn.Module):
        def __init__(self, decoder): super().__init__(); self.decoder, self.norm = decoder, decoder.norm
        def forward(self, **kw):
            self.decoder.norm = torch.nn.Identity()
            try: return self.decoder(**kw)
            finally: self.decoder.norm = self.norm
    target.decoder = Raw(target.decoder)
    assert not ran["says_the_same"](target, clip, q)


def test_one_begin_token_whatever_the_tokenizer_adds(ran, tmp_path):
    "Llama's own tokenizers put <s> in front of every text; the class's prompt has one all the same"
    folder = checkpoint(tmp_path/"m", 14, **TARGET)
    tokens = json.loads((folder/"tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens["post_processor"] = {"type": "TemplateProcessing", "single": list(begin), "pair": list(begin),
                                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    (folder/"tokenizer.json").write_text(json.dumps(tokens))
    mine, clip = ran["Mine"](folder, lambda clip: clip.frames[::2]), open_clips("pocket", "test", 1)[0]
    assert mine.tokenizer.encode("a").count(1) == 1 # it does add one
    before, after = mine.prompt("what is this?")
    assert (before + after).count(1) == 1 and before[0] == 1 and ran["says_the_same"](mine, clip, "what is this?")
    mine.prompt = lambda question: ([1, *before], after)
    assert not ran["says_the_same"](mine, clip, "what is this?")


def test_stores_and_vocabularies(ran):
    for path in (ran["train"], ran["test"]): assert all(v == "ok" for _, v in verify_store(path))
    assert open_states(ran["test"]).manifest["streams"][-1] == "draft_wrong"
    assert ran["pair"].shared_vocab == len(ran["target"].tokenizer)
    draft = ran["draft"]
    assert draft.see(open_clips("pocket", "test", 1)[0]).shape == (1, 3, draft.head.hidden_size)


def test_words_of_another_tokenizer_go_through_text(ran, tmp_path):
    other = checkpoint(tmp_path/"o", 13, **TARGET)
    tokens = json.loads((other/"tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    vocab[3:150] = vocab[3:150][::-1]
    (other/"tokenizer.json").write_text(json.dumps(tokens))
    mine = ran["Mine"](other, lambda clip: clip.frames)
    assert Pair(mine, ran["target"]).shared_vocab is None # words go through text
