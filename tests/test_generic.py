"Any model of transformers as a backbone: the family table, mutants that it must see, what is refused, the whole chain"
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import TEXT, VISION, write_text, write_vision
from family_checks import FAR, REFUSED, Checks, a_clip, failed, load, row
from patience import HANG, until

import featsd.models.cache as C
from featsd.base.core import FeatsdError
from featsd.compare import Fitting, HeldOut, run_comparison
from featsd.data.store import open_states, verify_store
from featsd.extract import extract
from featsd.models.backbone import Backbone, load_backbone, load_pair
from featsd.models.generic import Generic
from featsd.models.lean import Lean, lean, shortened, why_as_it_is
from featsd.nulls import measure
from featsd.race import Procedure
from featsd.train import train_adapter


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_every_family(name):
    r = row(name)
    if name in REFUSED: assert REFUSED[name] in r["refused"]; return
    assert "refused" not in r and not failed(r), r
    assert (r["shared"] == "not shared") == (name == "paligemma") # its prefix attends both ways
    assert r["form"].split()[0] == {"gemma2": "cap", "paligemma": "cap", "granite": "over", "cohere": "times",
                                    "falcon_h1": "over"}.get(name, "plain")


def test_the_committed_table_names_every_family():
    table = json.loads((Path(__file__).parents[1]/"figures"/"families.json").read_text())
    rows = {r["family"]: r for r in table["rows"]}
    assert set(rows) == {*VISION, *TEXT} and not any(failed(r) for r in rows.values())
    passed = [n for n in rows if "refused" not in rows[n]]
    assert sum(n in VISION for n in passed) >= 17 and sum(n in TEXT for n in passed) >= 25


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "mistral", "gemma2", "mllama"])
def checked(request, tmp_path_factory):
    with torch.no_grad(): return request.param, Checks(load(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama"])
def test_clips_of_one_name_are_told_apart(name, tmp_path):
    m, a = load(name, tmp_path), a_clip(1, 48, 64)
    b = replace(a, frames=255 - a.frames)
    prompts = [p for c in (a, b) for p in m.encode_all(c, ["what is it?", "where?"])]
    assert prompts[0].clip_id == prompts[2].clip_id and all(p.shared for p in prompts)
    alone, together = torch.cat([m.prefill([p]).h for p in prompts]), m.prefill(prompts).h
    assert (alone - together).abs().max() < .01 * (alone[0] - alone[2]).abs().max()


def shifted_positions(monkeypatch):
    real = Generic._forward
    monkeypatch.setattr(Generic, "_forward", lambda self, state, x, position, mask, **more:
                        real(self, state, x, position + 1, mask, **more))


def keys_off_by_one(monkeypatch):
    import featsd.models.backbone as B
    def drop(state, n):
        if n: C.drop_columns(state, n - 1); state.position, state.ids = state.position[..., :-1], state.ids[:, :-1]
    monkeypatch.setattr(B, "drop_columns", drop)


def lost_window(monkeypatch):
    "Every column of a batch seen by every layer, as a mask of four dimensions has it"
    real = Generic._forward
    def forward(self, state, x, position, mask, **more):
        if mask is not None:
            T, K = mask.shape[1], x.shape[1]
            at = torch.arange(T)
            seen = mask.bool()[:, None] & (at <= at[T - K:, None])
            mask = torch.zeros(seen.shape).masked_fill(~(seen | (at == at[T - K:, None])), -1e30)[:, None]
        return real(self, state, x, position, mask, **more)
    monkeypatch.setattr(Generic, "_forward", forward)


def lost_cap(monkeypatch):
    import featsd.data.head as H
    monkeypatch.setitem(H.TAILS, "cap", lambda z, v: z)


MUTANTS = {shifted_positions: ("wide", "back", "head", "ids", "ragged", "turns"), keys_off_by_one: ("back", "ragged"),
           lost_window: ("batch", "ragged"), lost_cap: ("head",)}
MEANT = {lost_window: {"mistral", "gemma2"}, lost_cap: {"gemma2"}}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_mutant_is_seen(mutant, checked, monkeypatch):
    name, c = checked
    if name not in MEANT.get(mutant, {name}): pytest.skip("has nothing to lose")
    assert not failed({k: getattr(c, k)() for k in MUTANTS[mutant]})
    mutant(monkeypatch)
    seen = []
    for k in MUTANTS[mutant]:
        try: seen += failed({k: getattr(c, k)()})
        except Exception: seen.append(k) # shapes that no longer fit are seen too
    assert seen


def test_in_half_precision_the_ids_are_generates_own(tmp_path):
    for name in ("qwen2", "gemma2", "qwen2_5_vl"):
        c = Checks(load(name, tmp_path/name, quant="bf16"))
        assert c.ids().split("/")[0] == c.ids().split("/")[1]


EARLY = {"llava", "qwen2_vl", "qwen3_vl", "gemma2", "gpt2", "bloom", "mpt", "opt", "qwen3_next"}


@pytest.mark.parametrize("name", sorted(EARLY))
def test_an_early_exit_is_a_really_cut_model(name, tmp_path):
    m = load(name, tmp_path/"m")
    if name == "qwen3_next": # of its two layers the first is recurrent: a cut model has no attention
        with pytest.raises(FeatsdError, match="early exit"): m.early_exit(3)
        return
    short = m.early_exit(1)
    assert short.depth == 1 and short.name.endswith(f"-1of{m.depth}") and m.early_exit(m.depth) is m
    c = Checks(short)
    assert not failed({k: getattr(c, k)() for k in ("ids", "wide", "back", "batch")})
    whole, cut = m.theirs(c.ps[0], 12), c.own[0]
    assert whole != cut and m.generate([c.ps[0]], 12)[0].ids.tolist() == whole # the whole model is as it was
    layers = [p for n, p in short.lm.named_parameters() if ".0." in n]
    assert layers and all(any(p is q for q in m.lm.parameters()) for p in layers) # weights are shared
    assert short.head.hash == m.head.hash
    for k in (0, m.depth + 1):
        with pytest.raises(FeatsdError, match=f"early exit after layer {k}, expected 1 to {m.depth}"): m.early_exit(k)


LEAN = {"llava", "llava_mistral", "llava_onevision", "internvl", "llama_yarn", "qwen2", "qwen3", "mistral", "gemma3_text"}
AS_IT_IS = {"qwen2_vl": "Qwen2VLTextModel", "gemma3": "more than embeddings", "gemma2": "capped", "llama_dynamic": "length"}


@pytest.mark.parametrize("name", sorted(LEAN | set(AS_IT_IS)))
@torch.no_grad()
def test_lean_where_embeddings_are_all_the_decoder_gets(name, tmp_path):
    m = load(name, tmp_path/"m")
    fast = lean(m)
    if name in AS_IT_IS: assert fast is m and AS_IT_IS[name] in why_as_it_is(m); return
    c = Checks(m)
    assert isinstance(fast, Lean) and fast.sees == m.sees
    ps = [*fast.encode_all(c.clips[0], c.questions), fast.encode(c.clips[1], c.questions[0])]
    alone, batch = [fast.generate([p], 12)[0].ids.tolist() for p in ps], [a.ids.tolist() for a in fast.generate(ps, 12)]
    assert alone == batch == c.own
    states = fast.prefill(ps[2:]), m.prefill(c.ps[2:])
    for a, b in ((fast, states[0]), (m, states[1])): a.step(b, c.more[:1, :5]); a.rollback(b, [int(b.lengths[0]) - 3])
    h, own = fast.step(states[0], c.more[:1, 5:8]), m.step(states[1], c.more[:1, 5:8])
    assert (m.head.logits(h) - m.head.logits(own)).abs().max() < FAR
    fast.prove(c.clips[0], c.questions)


def pair_of(folder, draft, target, other=False): # other: the draft has a tokenizer of its own
    "A pair by its two folders, in one line as a command takes it"
    for name, where, seed in ((draft, "d", 1), (target, "t", 2)):
        own = {"other": True} if other and where == "d" else {}
        (write_text if name in TEXT else write_vision)(name, folder/where, seed=seed, **own)
    asked = lambda name, options: f"?{options}" if name in VISION else ""
    shown = dict(draft="sensor=events&pictures=2", target="sensor=frames&frames=2")
    return f"draft={folder}/d{asked(draft, shown['draft'])},target={folder}/t{asked(target, shown['target'])}"


def whole_chain(pair, out, draft_layers=None):
    "Extract, train, measure, compare: what is compared is the target's own"
    some = dict(dataset_dir="pocket", pair=pair, output_dir=out/"states", quant="fp32", max_questions=2, max_new_tokens=10,
                progress=False, draft_layers=draft_layers)
    train = extract(split="train", max_samples=8, **some)
    test = extract(split="test", max_samples=4, wrong_clip=True, **some)
    assert all(v == "ok" for path in (train, test) for _, v in verify_store(path))
    run = train_adapter(train, adapter_level=1, loss="kl", num_epochs=2, output_dir=out/"run", progress=False)
    assert measure(run["best_model"], open_states(test), open_states(train)).rows
    names = ("raw", "ngram", "standard", "aligned", "fused", "oracle", "lookup")
    compared = run_comparison(pair, names, HeldOut(clips=2, questions=2),
                              Fitting([run["best_model"]], words=train, val_clips=2, dynamic=False),
                              Procedure(gammas=(3,), max_new_tokens=10, plain_runs=1), out=out/"comparison", progress=False,
                              say=lambda text: None)
    assert {r.name for r in compared.rows} == set(names)
    assert all(r.identical == r.prompts == 4 and not r.broken for r in compared.rows)
    assert compared.transformers["identical"] == 4
    return compared


CHAINS = [("qwen2_vl", "qwen2_5_vl", None), ("gpt2", "qwen2", None),
          *(pytest.param(*c, marks=pytest.mark.slow) for c in (
              ("idefics3", "llava_onevision", "other"), ("qwen3_vl", "qwen3_vl", 1), ("gemma3", "mllama", None),
              ("qwen2", "qwen2_5_vl", None), ("mamba", "qwen3_5", None)))]


@pytest.mark.parametrize("draft, target, how", CHAINS) # how: layers of the draft, or another tokenizer
def test_the_whole_chain(draft, target, how, tmp_path):
    other = how == "other"
    compared = whole_chain(pair_of(tmp_path, draft, target, other), tmp_path, None if other else how)
    assert (compared.made[0].shared_vocab is None) == other


@pytest.mark.slow
def test_a_file_of_prompts_from_answers_to_a_comparison(tmp_path):
    "A data set without sensors: each prompt asks its own text, by category, with a head over a short list"
    file, pair = tmp_path/"prompts.jsonl", pair_of(tmp_path, "qwen2", "qwen2")
    rows = [{"question_id": i, "category": f"c{i % 2}", "turns": [f"What is {i} and {i + 1}?"]} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    train = extract(tmp_path/"states", file, pair, quant="fp32", max_new_tokens=8, progress=False, draft_layers=1)
    made = open_states(train)
    assert len(made) == 14 and made.pairs[3].clip_id == "c1/3"
    run = train_adapter(made, None, "own", num_epochs=1, short_list=50, output_dir=tmp_path/"run", progress=False)
    c = run_comparison(pair, ("lookup", "own"), HeldOut(file, clips=2),
                       Fitting([run["best_model"]], words=train, dynamic=False, short_list=50),
                       Procedure(gammas=(3,), max_new_tokens=8, plain_runs=1), out=tmp_path/"comparison", progress=False,
                       say=lambda text: None)
    assert {r.name for r in c.rows} == {"lookup", "own", "own, short"} and all(r.identical == 2 for r in c.rows)
    assert set(c.questions) == {"c0", "c1"} and c.transformers["lookup"]["identical"] == 2
    assert any("own prompt lookup, γ 3" in line for line in c.verdict())
    model = c.made[0].target
    asked = model.encode(None, "What is 3 and 4?").inputs["input_ids"]
    own = model.lm.generate(asked, max_new_tokens=8, do_sample=False)[0, asked.shape[1]:]
    assert made.target_ids(3).tolist() == own.tolist()


def test_killed_and_resumed_the_bytes_are_the_same(tmp_path):
    pair = pair_of(tmp_path, "qwen2_vl", "qwen2_5_vl")
    def start(out): return subprocess.Popen(
        [Path(sys.executable).parent/"featsd_extract", "--pair", pair, "--output_dir", tmp_path/out, "--max_samples", "6",
         *"--quant fp32 --split test --chunked --chunk_size 4 --max_questions 2 --max_new_tokens 8".split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    def finish(p):
        _, err = p.communicate(timeout=HANG)
        assert p.returncode == 0, err
    stores = [tmp_path/out/"chunked_test_1s_fp32" for out in ("whole", "killed")]
    finish(start("whole"))
    p = start("killed")
    until(lambda: list(stores[1].glob("chunks/*.json")) or p.poll() is not None)
    p.send_signal(signal.SIGKILL)
    p.communicate(timeout=HANG)
    finish(start("killed"))
    whole, killed = ({f.name: f.read_bytes() for f in (s/"chunks").iterdir()} for s in stores)
    assert whole == killed and len(whole) == 6
    told = json.loads((stores[0]/"manifest.json").read_text())["target"]["sees"]
    assert told["class"] == "Qwen2_5_VLForConditionalGeneration" and told["frames"] == 2
    assert told["processor"] == "Qwen2_5_VLProcessor" and told["image_processor"] and len(told["template"]) == 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("folders")
    return {name: (write_text if name in TEXT else write_vision)(name, at/name) for name in ("llava", "qwen2", "paligemma")}


BAD = { # what is asked of a copy of which folder, what the one line says
    "unknown option": ("llava", "?speed=2", ["option 'speed'", "sensor", "pictures"]),
    "unknown sensor": ("llava", "?sensor=radar", ["option sensor=radar", "none, frames, events, voxel, time_surface"]),
    "too many": ("llava", "?frames=9999", ["option frames=9999", "from 1 to 512"]),
    "no number": ("llava", "?frames=many", ["option frames=many", "whole number"]),
    "other sensor's number": ("llava", "?sensor=events&frames=3", ["option frames=3: not of sensor=events"]),
    "video without a video side": ("llava", "?how=video", ["how=video", "how=pictures"]),
    "template without question": ("llava", "?template=hello", ["option template=hello", "{question}"]),
    "no template": ("paligemma", "", ["no chat template", "?template={pictures}{question}"]),
    "pictures for words": ("qwen2", "?sensor=frames", ["no processor", "sensor=none"]),
    "device": ("qwen2", "?device=tpu", ["device 'tpu'"])}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_option_is_one_line(what, folders):
    name, options, said = BAD[what]
    with pytest.raises(FeatsdError) as e: load_backbone(f"{folders[name]}{options}")
    assert all(s in str(e.value) for s in said) and "\n" not in str(e.value)


BROKEN = {
    "no processor": ("llava", lambda at: (at/"processor_config.json").unlink() or (at/"preprocessor_config.json").unlink(),
                     ["no processor", "fetch"]),
    "broken processor": ("llava", lambda at: (at/"preprocessor_config.json").write_text("{"), ["processor cannot be read"]),
    "encoder and decoder": ("qwen2", lambda at: (at/"config.json").write_text(json.dumps({"model_type": "t5"})),
                            ["encoder–decoder"]),
    "no kind": ("qwen2", lambda at: (at/"config.json").write_text("{}"), ["model_type None"]),
    "code of its own": ("qwen2", lambda at: edit(at, model_type="mine", auto_map={"AutoConfig": "boom.Boom"}),
                        ["brings code of its own, which is never run"]),
    "quantised already": ("qwen2", lambda at: edit(at, quantization_config={"quant_method": "bitsandbytes"}),
                          ["quantised already"]),
    "a tensor gone": ("qwen2", lambda at: edit(at, num_hidden_layers=3, layer_types=None), ["tensors missing", "fetch"]),
    "a tensor too many": ("qwen2", lambda at: edit(at, num_hidden_layers=1, layer_types=None), ["tensors left over"]),
    "no tokenizer": ("qwen2", lambda at: [f.unlink() for f in at.glob("tokenizer*")], ["tokenizer cannot be read"]),
    "no weights": ("qwen2", lambda at: (at/"model.safetensors").unlink(), ["fetch"])}


def edit(at, **fields):
    d = json.loads((at/"config.json").read_text()) | fields
    (at/"config.json").write_text(json.dumps({k: v for k, v in d.items() if v is not None}))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_line(what, folders, tmp_path):
    name, spoil, said = BROKEN[what]
    at = shutil.copytree(folders[name], tmp_path/"m")
    (at/"boom.py").write_text("raise SystemExit('this code ran')")
    spoil(at)
    with pytest.raises((FeatsdError, FileNotFoundError)) as e: load_backbone(at)
    assert all(s in str(e.value) for s in said) and "\n" not in str(e.value)


def test_bad_prompts_are_one_line(folders):
    m, clip = load_backbone(f"{folders['llava']}?frames=2"), a_clip(1, 40, 48)
    for q, said in (("what is <image> this?", "expected no <image>"), ("what <|end|>", "expected no <|end|>"),
                    ("why? " * 120, "the model holds 512")):
        with pytest.raises(FeatsdError, match=said) as e: m.encode(clip, q)
        assert "\n" not in str(e.value)
    clip.frames = clip.frames[:, :1].repeat(40, 2)
    with pytest.raises(FeatsdError, match="its sensor is no line"): m.encode(clip, "what?")
    m.wording.processor.image_processor.size = {"shortest_edge": 0} # a processor that resizes to nothing
    with pytest.raises(FeatsdError, match="its processor cannot take 2 pictures") as e: m.encode(a_clip(1, 40, 48), "what?")
    assert "\n" not in str(e.value)
    text = load_backbone(folders["qwen2"])
    with pytest.raises(FeatsdError, match="the model holds 512"): text.encode(clip, "why? " * 120)
    state = text.prefill([text.encode(clip, "why?")])
    with pytest.raises(FeatsdError, match="at most 512"): text.step(state, torch.full((1, 500), 97))


def test_a_dropped_picture_is_seen(folders, monkeypatch):
    m = load_backbone(f"{folders['llava']}?frames=2")
    kind = type(m.wording.processor)
    real = kind.__call__
    def blind(self, *args, **kw):
        out = real(self, *args, **kw)
        return {k: v for k, v in out.items() if not k.startswith("pixel")}
    monkeypatch.setattr(kind, "__call__", blind)
    with pytest.raises(FeatsdError, match="dropped the pictures without a word"): m.encode(a_clip(1, 40, 48), "what?")


def test_an_extraction_begins_with_a_proof(folders, monkeypatch, tmp_path):
    "A model whose steps are not those of its generate never fills a store"
    pair = f"draft={folders['qwen2']},target={folders['llava']}?frames=2"
    assert load_pair(pair).draft.watching.sensor == "none" # the question alone
    shifted_positions(monkeypatch)
    monkeypatch.setattr(Generic, "probe", lambda self: None)
    monkeypatch.setattr(Generic, "shares", False)
    with pytest.raises(FeatsdError, match="probe 'generate'"):
        extract(tmp_path, "pocket", pair, "test", quant="fp32", max_samples=2, max_questions=2, progress=False)
    assert not list(tmp_path.glob("*/chunks/*"))


def test_what_a_side_watches_by_default(folders):
    pair = load_pair(f"draft={folders['llava']},target={folders['llava']}")
    assert (pair.draft.watching.sensor, pair.draft.watching.count) == ("events", 5)
    assert (pair.target.watching.sensor, pair.target.watching.count) == ("frames", 8)
    assert pair.draft.model_hash != pair.target.model_hash and "sensor=events" in pair.draft.name
    short = shortened(pair, 1)
    assert short.draft.depth == 1 and isinstance(short.draft, Backbone)
    same = load_pair(f"draft={folders['llava']}?sensor=voxel,target={folders['llava']}?sensor=time_surface&pictures=3")
    clip = a_clip(1, 40, 48)
    seen = [m.encode(clip, "what?").inputs["pixel_values"] for m in (pair.draft, same.draft, same.target)]
    assert [len(s) for s in seen] == [5, 5, 3] and FAR < (seen[0] - seen[1]).abs().max()
