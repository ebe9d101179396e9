"EventGPT-Plus and EventFlash: bins, pictures, towers, prompts, answers and folders against the published algorithm"
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closeness import near
from families import write_vision
from PIL import Image
from test_eventgpt import plain_pixels
from test_generic import whole_chain
from tiny_checkpoints import QUESTION, write_tensors
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM)

from featsd.base.core import FeatsdError
from featsd.data.bins import Binned, canvas_of, draw_bin, read_stream, time_bins
from featsd.data.clips import FolderClips, open_clips
from featsd.data.events import Events
from featsd.data.frames import Clip
from featsd.data.store import open_states, verify_store
from featsd.decode import encode_prompt, plain_decode, speculative_decode
from featsd.drafters import Kit, make_drafter
from featsd.extract import extract
from featsd.models.backbone import Pair, load_backbone, load_pair
from featsd.models.eventgpt_plus import merge_squares, plus_prompt, read_qwen

C, D, S, P = 64, 64, 56, 14 # widths of tower and decoder, picture, patch: 4 × 4 patches
VISION = dict(hidden_size=C, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=S,
              patch_size=P, hidden_act="quick_gelu")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>") # ids 258 to 260
ROWS, CANVAS = 272, "50x70"
QWEN = dict(vocab_size=ROWS, hidden_size=D, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096)
TOWER, DENSITY = "model.event_tower.vision_tower.vision_model.", "model.density_compressor."


def tensors_of(tied=True, density=0): # official names
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(**QWEN, tie_word_embeddings=tied))
    tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
    out = {k: v for k, v in lm.state_dict().items() if not (tied and k == "lm_head.weight")}
    for k in out:
        if k.endswith("_proj.bias"): out[k] = torch.randn_like(out[k]) / 8 # transformers begins with zeros
        if k.endswith("_proj.weight"): out[k] = 12 * out[k] # so that answers vary
    out |= {TOWER + k: v for k, v in tower.state_dict().items() if not k.endswith("position_ids")}
    shapes = {"model.event_projector.0": (D, C), "model.event_projector.2": (D, D)}
    if density:
        out[DENSITY + "query_embed"] = torch.randn(density, C)
        shapes |= {DENSITY + "key_proj": (C, C), DENSITY + "value_proj": (C, C),
                   DENSITY + "density_encoder.0": (2 * C, 1), DENSITY + "density_encoder.2": (1, 2 * C)}
    for k, shape in shapes.items():
        out[k + ".weight"], out[k + ".bias"] = torch.randn(shape) / math.sqrt(shape[1]), torch.randn(shape[0]) / 8
    return {k: v.detach().clone().contiguous() for k, v in out.items()}


def write_tokenizer(folder, form="files"):
    "Bytes and two merges, as Qwen's files: vocab.json and merges.txt, or tokenizer.json"
    from transformers import Qwen2Tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {c: i for i, c in enumerate([*letters, "Ġt", "Ġth"])}, [("Ġ", "t"), ("Ġt", "h")]
    (folder/"vocab.json").write_text(json.dumps(vocab))
    (folder/"merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    no = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(258 + i): dict(content=s, special=True, **no) for i, s in enumerate(SPECIAL)}
    (folder/"added_tokens.json").write_text(json.dumps({s: 258 + i for i, s in enumerate(SPECIAL)}))
    (folder/"tokenizer_config.json").write_text(json.dumps(
        dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None,
             add_prefix_space=False, unk_token=None, added_tokens_decoder=added)))
    if form == "json":
        Qwen2Tokenizer.from_pretrained(folder).save_pretrained(folder)
        for gone in ("vocab.json", "merges.txt", "added_tokens.json"): (folder/gone).unlink(missing_ok=True)


def write_plus(folder, tensors=None, form="files", density=0, generation=True, **fields):
    "A checkpoint folder; returns its tensors"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tied = fields.get("tie_word_embeddings", True)
    tensors = tensors_of(tied, density) if tensors is None else tensors
    write_tensors(folder, tensors)
    write_tokenizer(folder, form)
    config = QWEN | dict(model_type="eventgpt_plus_qwen", architectures=["EventGPTPlusQwenCausalLM"],
                         tie_word_embeddings=tied, event_tower="tower", event_tower_type="CLIP", rope_scaling=None,
                         event_projector_type="mlp", torch_dtype="bfloat16", mm_use_ev_patch_token=False) | fields
    (folder/"config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    if generation:
        (folder/"generation_config.json").write_text(json.dumps(
            dict(eos_token_id=[260, 258], repetition_penalty=1.1, top_k=20, top_p=.8, temperature=.7)))
    return tensors


def stream(seed, span, n=3000, h=50, w=70, bursts=True):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, span + 1, n)
    if bursts: t[:n // 2] = np.clip(rng.normal(rng.integers(0, span), span / 60, n // 2), 0, span)
    t[0], t[1] = 0, span
    t = np.sort(t.astype(np.int64)) + 5_000_000_000
    return Events(rng.integers(0, w, n).astype(np.int32), rng.integers(0, h, n).astype(np.int32), t,
                  rng.integers(0, 2, n).astype(np.uint8))


def clip_of(events, name="a"): return Clip(name, np.zeros((0, 1, 1, 3), np.uint8), events, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plus")/"tiny"
    write_plus(path)
    return path


@pytest.fixture(scope="module")
def model(folder): return load_backbone(f"{folder}?event_data_type={CANVAS}")


# ---- the published way from events to pictures, slowly: one event at a time ----

def plain_bins(e):
    t = e.t.tolist()
    first, last, order = min(t), max(t), sorted(range(len(t)), key=lambda i: e.t[i])
    span = last - first
    n = 4 if span <= 100_000 else 8 if span <= 4_000_000 else 16 if span <= 16_000_000 else 32
    out = []
    for k in range(n):
        if n == 4:
            a, b = (float(np.linspace(first, last, 5)[j]) for j in (k, k + 1))
            out.append([i for i in order if a <= t[i] < b])
            continue
        a, b = first + k * span / n, first + (k + 1) * span / n
        bin_ = [i for i in order if a <= t[i] <= b]
        if bin_:
            ms = [int((t[i] - t[bin_[0]]) / 1000) for i in bin_]
            count = [0] * (ms[-1] + 2)
            for m in ms: count[m] += 1
            sums = [sum(count[s:s + 25]) for s in range(max(1, len(count) - 24))]
            s = sums.index(max(sums))
            bin_ = [i for i, m in zip(bin_, ms) if s <= m < s + 25]
        out.append(bin_)
    return out


def plain_picture(e, chosen, h, w):
    image = np.full((h, w, 3), 255, np.uint8)
    for color, p in (((0, 0, 255), 0), ((255, 0, 0), 1)):
        for i in chosen:
            if e.p[i] == p: image[e.y[i], e.x[i]] = color
    return image


@pytest.mark.parametrize("span", [1, 50_000, 100_000, 100_001, 1_000_000, 4_000_000, 4_000_001, 16_000_000, 16_000_001])
@pytest.mark.parametrize("seed", [0, 1])
def test_bins_and_pictures_of_the_published_code(seed, span):
    e = stream(seed, span, 400)
    want, got = plain_bins(e), time_bins(e)
    assert [len(b) for b in got] == [len(b) for b in want]
    for b, chosen in zip(got, want):
        assert sorted(zip(b.t.tolist(), b.x.tolist(), b.y.tolist())) == sorted((e.t[i], e.x[i], e.y[i]) for i in chosen)
        assert np.array_equal(draw_bin(b, (50, 70)), plain_picture(e, chosen, 50, 70))


def test_an_event_on_an_edge_is_in_two_bins_and_the_last_of_a_short_stream_in_none():
    def of(t): return Events(*(np.zeros(len(t), np.int32),) * 2, np.array(t, np.int64), np.ones(len(t), np.uint8))
    assert [len(b) for b in time_bins(of([0, 400_000, 800_000]))] == [1, 0, 0, 1, 1, 0, 0, 1]
    assert [len(b) for b in time_bins(of([0, 40, 80]))] == [1, 0, 1, 0]
    shuffled = of([800_000, 0, 400_000])
    assert [b.t.tolist() for b in time_bins(shuffled)][3] == [400_000]


def test_unsorted_streams_are_sorted_as_the_published_code_does():
    e = stream(3, 2_000_000, 300)
    order = np.random.default_rng(0).permutation(len(e))
    for a, b in zip(time_bins(e), time_bins(e[order])):
        assert np.array_equal(draw_bin(a, (50, 70)), draw_bin(b, (50, 70)))


def test_canvas_comes_from_the_name_not_from_the_data(folder):
    assert canvas_of("dsec_n_imagenet") == (480, 640) and canvas_of("casual_reasoning") == (260, 346)
    with pytest.raises(FeatsdError, match="expected them within 240x320"):
        draw_bin(Events(*(np.array([320], np.int32),) * 2, np.zeros(1), np.ones(1)), canvas_of("v2e"))
    with pytest.raises(FeatsdError, match="event_data_type None"): load_backbone(folder)
    a, b = (load_backbone(f"{folder}?event_data_type={k}") for k in ("v2e", "kinetics"))
    assert a.model_hash == b.model_hash != load_backbone(f"{folder}?event_data_type=event_ocr").model_hash
    assert a.name == "tiny (canvas=240x320)" # the same canvas: the same model


# ---- tower, projector, merging ----

def plain_features(w, e, h=50, wide=70): # [T, s², C] of transformers' own tower
    config = CLIPVisionConfig(**VISION)
    tower = CLIPVisionModel(config).eval()
    tower.load_state_dict({k.removeprefix(TOWER): v for k, v in w.items() if k.startswith(TOWER)}, strict=False)
    cut = isinstance(e, Binned)
    bins = [list(range(a, b)) for a, b in zip(e.starts[:-1], e.starts[1:])] if cut else plain_bins(e)
    pixels = np.stack([plain_pixels(plain_picture(e, b, h, wide), S) for b in bins]).astype(np.float32)
    pixels = torch.from_numpy(pixels)
    with torch.no_grad(): return tower(pixels).last_hidden_state[:, 1:].double(), pixels


def plain_projector(w, x):
    p = {k: v.double() for k, v in w.items() if "projector" in k}
    x = F.gelu(x @ p["model.event_projector.0.weight"].T + p["model.event_projector.0.bias"])
    return x @ p["model.event_projector.2.weight"].T + p["model.event_projector.2.bias"]


@pytest.mark.parametrize("span,T", [(60_000, 4), (700_000, 8), (5_000_000, 16)])
def test_event_tokens(folder, model, span, T):
    w, e = tensors_of(), stream(5, span)
    y = plain_projector(w, plain_features(w, e)[0])
    want = [(y[t, 4 * i + j] + y[t, 4 * i + j + 1] + y[t, 4 * i + 4 + j] + y[t, 4 * i + 5 + j]) / 4
            for t in range(T) for i in (0, 2) for j in (0, 2)]
    got = model.see(clip_of(e))[0]
    assert got.shape == (4 * T, D)
    near(got, torch.stack(want), 64 * 64)
    swapped = merge_squares(y.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)).flatten(0, 1)
    assert (got - swapped).abs().max() > 1e-3 # columns before rows: another order


def plain_sparse(w, x, pixels, share):
    "The published batch: padded, masked, and one softmax over what is left"
    g = lambda k: w[DENSITY + k]
    out = []
    for h, image in zip(x.float(), pixels):
        dense = torch.tensor([image[:, i:i + P, j:j + P].abs().sum() for i in range(0, S, P) for j in range(0, S, P)])
        dense = dense / dense.max()
        bias = F.relu(dense[:, None] @ g("density_encoder.0.weight").T + g("density_encoder.0.bias"))
        bias = (bias @ g("density_encoder.2.weight").T + g("density_encoder.2.bias"))[:, 0]
        keys = h @ g("key_proj.weight").T + g("key_proj.bias")
        score = torch.stack([torch.softmax(keys @ q / math.sqrt(C) + bias, 0) for q in g("query_embed")]).max(0).values
        k = max(1, int(len(h) * share))
        best = sorted(sorted(range(len(h)), key=lambda i: -score[i])[:k])
        out += [h[i].double() for i in best]
    return plain_projector(w, torch.stack(out))


@pytest.mark.parametrize("sparse,share,n", [(None, None, 16), (False, None, 16), (True, None, 1), (True, .4, 6)])
def test_event_flash(tmp_path, sparse, share, n):
    fields = {k: v for k, v in (("use_event_sparsification", sparse), ("density_threshold", share)) if v is not None}
    w = write_plus(tmp_path/"x", density=5, model_type="eventgpt_v2_qwen", **fields)
    flash, e = load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}"), stream(6, 900_000)
    x, pixels = plain_features(w, e)
    want = plain_sparse(w, x, pixels, share or .1) if sparse else plain_projector(w, x).flatten(0, 1)
    got = flash.see(clip_of(e))[0]
    assert got.shape == (8 * n, D)
    near(got, want, 64 * 64)


def test_event_flash_without_its_density(tmp_path):
    write_plus(tmp_path/"x", model_type="eventgpt_v2_qwen")
    assert load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}").see(clip_of(stream(1, 9000))).shape == (1, 64, D)
    write_plus(tmp_path/"y", model_type="eventgpt_v2_qwen", use_event_sparsification=True)
    with pytest.raises(FeatsdError, match="no tensor model.density_compressor"):
        load_backbone(f"{tmp_path/'y'}?event_data_type={CANVAS}")


# ---- prompt ----

GOLDEN = ("151644 8948 198 2610 525 264 10950 17847 13 1446 525 3330 518 264 2518 31654 41048 315 279 3665 9203 13 "
          "5209 4226 279 3405 3118 21063 389 279 9124 1946 13 3155 537 1281 31846 476 7942 7797 1128 374 39535 624 "
          "151645 198 151644 872 198", "198 3838 525 279 1376 5424 304 419 6109 30 151645 198 151644 77091 198")
WORDS = ("system Ċ You Ġare Ġa Ġhelpful Ġassistant . ĠYou Ġare Ġlooking Ġat Ġa Ġred -blue Ġvisualization Ġof Ġthe "
         "ĠEvent ĠStream . ĠPlease Ġanswer Ġthe Ġquestion Ġbased Ġsolely Ġon Ġthe Ġvisual Ġinput . ĠDo Ġnot Ġmake "
         "Ġassumptions Ġor Ġguess Ġbeyond Ġwhat Ġis Ġobservable .Ċ <|im_end|> Ċ <|im_start|> user Ċ "
         "Ċ What Ġare Ġthe Ġkey Ġelements Ġin Ġthis Ġscene ? <|im_end|> Ċ <|im_start|> assistant Ċ").split()


def test_golden_prompt_ids():
    "Qwen's own ids: its pre-tokenizer, and the pieces of this prompt at their real places"
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
    ids = [int(i) for part in GOLDEN for i in part.split()]
    vocab = dict(zip(["<|im_start|>", *WORDS], ids, strict=True)) | {"<unk>": 0}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t)
    tokenizer.add_tokens([AddedToken(s, special=True) for s in ("<|im_start|>", "<|im_end|>")])
    before, after = plus_prompt(tokenizer, QUESTION)
    assert [before, after] == [[int(i) for i in part.split()] for part in GOLDEN]


def test_a_second_event_in_the_question_splits_and_vanishes(model):
    t = lambda text: model.tokenizer.encode(text, add_special_tokens=False)
    before, after = model.prompt("What <event> that?")
    assert after == t("\nWhat ") + t(" that?<|im_end|>\n<|im_start|>assistant\n")
    assert before == model.prompt("x")[0]
    with pytest.raises(FeatsdError, match="im_end"): model.encode(clip_of(stream(1, 9000)), "What<|im_end|>")


def test_prompts_are_cut_from_the_end(folder, model, tmp_path):
    clip, long = clip_of(stream(1, 9000)), "Why? " * 300
    whole = model.encode(clip, long)
    write_plus(tmp_path/"x", tokenizer_model_max_length=500)
    for limited in (load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}"),
                    load_backbone(f"{folder}?event_data_type={CANVAS}&limit=500")):
        with pytest.warns(UserWarning, match="cut to 500"): short = limited.encode(clip, long)
        assert torch.equal(short.embeds, whole.embeds[:, :500])
    with pytest.raises(FeatsdError, match="so that the question fits"):
        load_backbone(f"{folder}?event_data_type={CANVAS}&limit=100").encode(clip, "Why?")


# ---- answers ----

def reference(w, rows=ROWS): # transformers' own model
    config = QWEN | {"vocab_size": rows, "tie_word_embeddings": "lm_head.weight" not in w}
    lm = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    own = {k: v[:rows] if "embed" in k or "lm_head" in k else v for k, v in w.items()
           if not k.startswith(("model.event", "model.density"))}
    lm.load_state_dict(own, strict="lm_head.weight" in w)
    return lm


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("answers", ["argmax", "own"])
def test_answers_are_those_of_transformers(tmp_path, tied, answers):
    "Plain first choices, or the checkpoint's own penalty over the new tokens only; each end token ends"
    w = write_plus(tmp_path/"x", tie_word_embeddings=tied)
    m, lm = load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}&answers={answers}"), reference(w)
    clips = [clip_of(stream(s, span), str(s)) for s, span in ((1, 60_000), (2, 300_000))]
    prefixes = [m.encode(clip, q) for clip in clips for q in ("Why?", "x")]
    got = m.generate(prefixes, 40)
    for p, a in zip(prefixes, got):
        own = lm.generate(inputs_embeds=p.embeds, max_new_tokens=40, do_sample=False, pad_token_id=258,
                          eos_token_id=[260, 258], repetition_penalty=1.1 if answers == "own" else 1.)[0]
        assert a.ids.tolist() == own.tolist()
    assert len({tuple(a.ids.tolist()) for a in got}) > 1 and m.eos_ids == (260, 258)
    end = next(t for t in got[0].ids[3:].tolist() if t not in got[0].ids[:3])
    said = dict(eos_token_id=[260, end], repetition_penalty=1.1)
    (tmp_path/"x"/"generation_config.json").write_text(json.dumps(said))
    m = load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}&answers={answers}")
    cut = got[0].ids.tolist()
    assert m.generate(prefixes[:1], 40)[0].ids.tolist() == cut[:cut.index(end) + 1]
    if tied: assert m.lm.lm_head.weight is m.embed.weight


def test_what_is_stored_says_which_answers(folder, model):
    own = load_backbone(f"{folder}?event_data_type={CANVAS}&answers=own")
    assert own.penalty == 1.1 and "answers=own" in own.name and own.model_hash != model.model_hash
    assert model.penalty == 1 and model.generation["repetition_penalty"] == 1.1
    assert model.generate([model.encode(clip_of(stream(1, 9000)), "x")], 30)[0].ids.tolist() != \
        own.generate([own.encode(clip_of(stream(1, 9000)), "x")], 30)[0].ids.tolist()
    with pytest.raises(FeatsdError, match="repetition penalty"): Pair(model, own)
    Pair(own, model)


@pytest.mark.parametrize("quant,kind", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt"), ("bf16", "Linear")])
def test_quantised_on_the_cpu(tmp_path, quant, kind):
    write_plus(tmp_path/"x", density=5, model_type="eventgpt_v2_qwen", use_event_sparsification=True)
    path, clip = f"{tmp_path/'x'}?event_data_type={CANVAS}&device=cpu", clip_of(stream(1, 9000))
    small, whole = load_backbone(path, quant), load_backbone(path)
    for part in (small.decoder.layers[0].mlp.up_proj, small.tower.encoder.layers[0].mlp.fc1, small.projector[0]):
        assert type(part).__name__ == kind
    assert type(small.head.lm_head) is type(small.density.key_proj) is torch.nn.Linear
    cos = F.cosine_similarity(small.see(clip).float(), whole.see(clip), dim=-1)
    assert cos.mean() > .7 and 1 <= len(small.generate([small.encode(clip, "x")], 4)[0].ids) <= 4


@pytest.mark.parametrize("fields,rows", [({}, 262), ({"mm_use_ev_start_end": True}, 264),
                                         ({"mm_use_ev_patch_token": False}, ROWS),
                                         ({"mm_use_ev_patch_token": False, "mm_use_ev_start_end": True}, 263)])
def test_tokens_that_the_config_adds_cut_the_vocabulary(tmp_path, fields, rows):
    w = write_plus(tmp_path/"x", **{"mm_use_ev_patch_token": "absent"} | fields)
    m = load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}")
    assert m.head.vocab_size == m.embed.weight.shape[0] == rows and len(m.tokenizer) == (261 if rows == ROWS else rows)
    p = m.encode(clip_of(stream(1, 9000)), "Why?")
    own = reference(w, rows).generate(inputs_embeds=p.embeds, max_new_tokens=12, do_sample=False, pad_token_id=258,
                                      eos_token_id=[260, 258])[0]
    assert m.generate([p], 12)[0].ids.tolist() == own.tolist()


# ---- folders ----

def test_both_forms_of_the_tokenizer_are_one(tmp_path, model):
    write_plus(tmp_path/"x", form="json")
    other = load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}")
    assert other.tokenizer_hash == model.tokenizer_hash and len(model.tokenizer) == 261
    assert model.tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [258, 259, 260]
    assert other.prompt(QUESTION) == model.prompt(QUESTION)


def write_tower(folder, w, plus=0.):
    config = CLIPVisionConfig(**VISION)
    tower = CLIPVisionModel(config)
    tower.load_state_dict({k.removeprefix(TOWER): v + plus for k, v in w.items() if k.startswith(TOWER)}, strict=False)
    tower.save_pretrained(folder)


def test_the_tower_s_places(tmp_path, model):
    "The checkpoint's own weights win; else the file of its config; else the tower's folder"
    w, clip = tensors_of(), clip_of(stream(2, 9000))
    bare = {k: v for k, v in w.items() if not k.startswith(TOWER)}
    want = model.see(clip)
    def seen(**kw):
        return load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}").see(clip)
    write_plus(tmp_path/"x")
    write_tower(tmp_path/"x"/"tower", w, 1.)
    assert torch.equal(seen(), want)
    write_plus(tmp_path/"x", bare)
    write_tower(tmp_path/"x"/"tower", w)
    assert torch.equal(seen(), want)
    write_tower(tmp_path/"far", w)
    write_plus(tmp_path/"x", bare, event_tower=str(tmp_path/"far"))
    assert torch.equal(seen(), want)
    write_plus(tmp_path/"x", bare, event_tower="gone", pretrained_event_tower="tower.bin")
    torch.save({k: v for k, v in w.items() if k.startswith(TOWER)}, tmp_path/"x"/"tower.bin")
    assert torch.equal(seen(), want)
    write_plus(tmp_path/"x", bare, event_tower="gone")
    with pytest.raises(FileNotFoundError, match="holds no event tower"): seen()


def test_the_tower_s_processor_must_be_clip_s(tmp_path):
    write_plus(tmp_path/"x")
    write_tower(tmp_path/"x"/"tower", tensors_of())
    usual = dict(size={"shortest_edge": S}, crop_size={"height": S, "width": S}, resample=3,
                 image_mean=[.48145466, .4578275, .40821073], image_std=[.26862954, .26130258, .27577711])
    for more, fine in (({}, True), ({"image_mean": [.5, .5, .5]}, False), ({"crop_size": 48}, False)):
        (tmp_path/"x"/"tower"/"preprocessor_config.json").write_text(json.dumps(usual | more))
        if fine: load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}")
        else:
            with pytest.raises(FeatsdError, match="as CLIP's own"):
                load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}")


def changed(**more): return lambda: dict(tensors_of(), **more)
def without(start): return lambda: {k: v for k, v in tensors_of().items() if not k.startswith(start)}


REFUSED = {
    "SigLIP": (dict(event_tower_type="SigLIP"), None, "event_tower_type 'SigLIP'"),
    "SigLIP by default": (dict(event_tower_type="absent"), None, "drops a patch for a class token"),
    "no tower": (dict(event_tower="absent"), None, "no event_tower"),
    "Q-Former": (dict(event_projector_type="Q-Former"), None, "event_projector_type 'Q-Former', expected mlp"),
    "linera": (dict(event_projector_type="linera"), None, "'linera'"),
    "sliding": (dict(use_sliding_window=True), None, "use_sliding_window"),
    "quantised": (dict(quantization_config={"load_in_4bit": True}), None, "quantised already"),
    "temporal module": ({}, changed(**{"model.temporal_aggregator.weight": torch.zeros(2)}),
                        "tensor model.temporal_aggregator.weight"),
    "point clouds": ({}, changed(**{"model.point_cloud_projector.0.weight": torch.zeros(2)}), "point_cloud_projector"),
    "density": ({}, changed(**{DENSITY + "query_embed": torch.zeros(2, C)}), "an EventFlash?"),
    "no projector": ({}, without("model.event_projector"), "not an EventGPT-Plus checkpoint"),
    "a tensor missing": ({}, without("model.layers.1.self_attn.k_proj.bias"), "1 tensors missing"),
    "half a tower": ({}, without(TOWER + "encoder.layers.1.mlp.fc1"), "tensors missing"),
    "another width": ({}, changed(**{"model.event_projector.0.weight": torch.zeros(D, 48)}), "another size"),
    "small table": (dict(vocab_size=256), changed(**{"model.embed_tokens.weight": torch.zeros(256, D)}),
                    "tokenizer of 261 pieces"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(tmp_path, case):
    fields, tensors, says = REFUSED[case]
    write_plus(tmp_path/"x", tensors and tensors(), **fields)
    with pytest.raises((FeatsdError, FileNotFoundError), match=says) as e:
        load_backbone(f"{tmp_path/'x'}?event_data_type={CANVAS}")
    assert "\n" not in str(e.value)


# ---- bins that come cut ----

def write_bins(path, bins, kind="fields"):
    row = np.empty(len(bins), object)
    for k, b in enumerate(bins):
        if kind == "fields":
            row[k] = np.zeros(len(b), [("p", "u1"), ("t", "i8"), ("x", "u2"), ("y", "u2")])
            for c in "xytp": row[k][c] = getattr(b, c)
        else: row[k] = {c: getattr(b, c) for c in "xyp"}
    np.savez_compressed(path, event_bins=row)


@pytest.mark.parametrize("kind", ["fields", "dict"])
def test_bins_are_taken_as_they_come(tmp_path, model, kind):
    e = stream(4, 80_000, 900)
    parts = [e[k * 300:(k + 1) * 300] for k in range(3)]
    write_bins(tmp_path/"b.npz", parts, kind)
    got = read_stream(tmp_path/"b.npz")
    assert isinstance(got, Binned) and len(got.bins()) == 3 and len(got) == 900
    for a, b in zip(got.bins(), parts): assert np.array_equal(draw_bin(a, (50, 70)), draw_bin(b, (50, 70)))
    w = tensors_of()
    want = merge_squares(plain_projector(w, plain_features(w, got)[0]))
    near(model.see(clip_of(got))[0], want.flatten(0, 1), 64 * 64)


def test_a_data_set_of_bins(tmp_path, model):
    e = stream(4, 80_000, 900)
    (tmp_path/"event_npy").mkdir()
    (tmp_path/"video"/"a").mkdir(parents=True)
    write_bins(tmp_path/"event_npy"/"a.npz", [e[:400], e[400:]])
    for i in range(2): Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/"video"/"a"/f"{i}.png")
    listing = [dict(id="a", event_data="a.npz", video_data="a")]
    (tmp_path/"EventGPT_Instruction_Subset.json").write_text(json.dumps(listing))
    assert model.see(FolderClips(tmp_path)[0]).shape == (1, 2 * 4, D)


def test_darker_events_written_as_minus_one_are_not_drawn(model):
    e = stream(1, 9000)
    signed = Events(e.x, e.y, e.t, e.p, "polarity -1/1 mapped to 0/1")
    with pytest.warns(UserWarning, match="not drawn"): got = model.pictures(signed)
    red = Events(*(c[e.p == 1] for c in (e.x, e.y, e.t, e.p)))
    edges = np.linspace(e.t[0], e.t[-1], 5)
    bins = [red[np.flatnonzero((red.t >= a) & (red.t < b))] for a, b in zip(edges[:-1], edges[1:])]
    near(got, np.stack([plain_pixels(draw_bin(b, (50, 70)), S) for b in bins]), 16)


# ---- as a draft ----

def test_a_draft_of_another_tokenizer_whose_store_says_which_answers(tmp_path):
    "EventGPT-Plus beside the built-in target: words through text, lossless; penalised answers are named in the store"
    write_plus(tmp_path/"x", mm_use_ev_patch_token=True)
    target = Path(load_backbone.__code__.co_filename).parent/"pocket_weights"/"target"
    for answers, penalty in (("argmax", None), ("own", 1.1)):
        pair = load_pair(f"draft={tmp_path/'x'}?event_data_type=128x128&answers={answers},target={target}")
        store = extract(tmp_path/answers, "pocket", pair, max_samples=2, max_questions=2, max_new_tokens=8, quant="fp32",
                        dtype="fp32", progress=False)
        m, states = open_states(store).manifest, open_states(store)
        assert m.get("draft_repetition_penalty") == penalty and ("answers=own" in m["draft"]["name"]) == bool(penalty)
        assert m["alignment"] == "text" and all(v == "ok" for _, v in verify_store(store))
        assert states.length(0, "draft_forced") == len(states.target_ids(0))
    clips = open_clips("pocket", "test", 1)
    prompt = encode_prompt(pair, clips[0], clips.questions[0])
    want = plain_decode(pair.target, prompt, max_new_tokens=12).ids
    for name in ("standard", "raw"):
        assert speculative_decode(pair.target, make_drafter(name, Kit(pair)), prompt, 4, max_new_tokens=12).ids == want


def test_the_whole_chain_beside_a_model_of_transformers(tmp_path):
    "Extract, train, measure, compare, over two tokenizers that share the bytes"
    write_plus(tmp_path/"d", mm_use_ev_patch_token=True)
    write_vision("qwen2_5_vl", tmp_path/"t", seed=2)
    pair = f"draft={tmp_path}/d?event_data_type=128x128,target={tmp_path}/t?sensor=frames&frames=2"
    assert whole_chain(pair, tmp_path).made[0].shared_vocab == 256


def test_penalised_answers_within_one_vocabulary(tmp_path, model):
    "The head is not asked whether it says what a penalty made of its law"
    write_plus(tmp_path/"x")
    draft = load_backbone(f"{tmp_path/'x'}?event_data_type=128x128&answers=own")
    pair = Pair(draft, load_backbone(f"{tmp_path/'x'}?event_data_type=128x128"))
    store = extract(tmp_path/"s", "pocket", pair, max_samples=1, max_questions=1, max_new_tokens=30, quant="fp32",
                    dtype="fp32", progress=False)
    m = open_states(store).manifest
    assert m["draft_repetition_penalty"] == 1.1 and m["shared_vocab"] == 261 and "alignment" not in m


@pytest.mark.skipif("FEATSD_EVENTGPT_PLUS" not in os.environ, reason="name a checkpoint in FEATSD_EVENTGPT_PLUS")
def test_golden_prompt_ids_with_the_real_tokenizer():
    folder = Path(os.environ["FEATSD_EVENTGPT_PLUS"])
    before, after = plus_prompt(read_qwen(folder, json.loads((folder/"config.json").read_text())), QUESTION)
    assert [before, after] == [[int(i) for i in part.split()] for part in GOLDEN]
