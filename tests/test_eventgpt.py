"EventGPT: official checkpoints in every layout, its mathematics and prompt, and what may be wrong with a folder"
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import HANG
from closeness import near, off, tol
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (GOLDEN_AFTER, GOLDEN_BEFORE, LLAMA, QUESTION, SMALL, VISION, eventgpt_tensors,
                              golden_tokenizer, random_clip, random_events,
                              small_tokenizer, write_eventgpt, write_tensors)
from transformers import LlamaConfig

from featsd.base.core import FeatsdError
from featsd.data.events import save_events
from featsd.models.backbone import load_backbone, memory_report
from featsd.models.eventgpt import EventGPT, check_tensors, event_prompt, infer_tower, our_name, pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("eventgpt")/"tiny"
    write_eventgpt(path)
    return path


@pytest.fixture(scope="module")
def model(folder): return EventGPT.from_pretrained(folder)


# ---- a slow, plain statement of the whole forward path: float64, loops, nothing of featsd or transformers ----

def plain_picture(x, y, p, blue_last):
    image = np.full((max(y) + 1, max(x) + 1, 3), 255, np.uint8)
    for polarities in ((1, 0),) if not blue_last else ((1,), (0,)):
        for i in range(len(x)):
            if p[i] in polarities: image[y[i], x[i]] = (255, 0, 0) if p[i] else (0, 0, 255)
    return image


def plain_pixels(image, S):
    h, w = image.shape[:2]
    new = (S, int(S * w / h)) if h <= w else (int(S * h / w), S)
    big = np.array(Image.fromarray(image).resize((new[1], new[0]), Image.BICUBIC))
    top, left = (new[0] - S) // 2, (new[1] - S) // 2
    out = np.zeros((3, S, S))
    mean, std = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
    for c in range(3): out[c] = (big[top:top + S, left:left + S, c] / 255 - mean[c]) / std[c]
    return out


def layer_norm(x, w, b): return np.array([(r - r.mean()) / math.sqrt(r.var() + 1e-5) for r in x]) * w + b


def attention(q, k, v, heads, causal):
    n, d = len(q), q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(n):
            m = i + 1 if causal else n
            s = np.array([q[i, part] @ k[j, part] for j in range(m)]) / math.sqrt(d)
            a = np.exp(s - s.max())
            out[i, part] = (a / a.sum()) @ v[:m, part]
    return out


CHAIN = 8 * 7 * 64 # layers of tower, projector and decoder, the products in each, their width


def plain_tower(w, x): # [3, S, S] → [P+1, C]
    g = lambda k: w["model.visual_tower.visual_tower.vision_model." + k]
    P, S = VISION["patch_size"], VISION["image_size"]
    kernel = g("embeddings.patch_embedding.weight")
    rows = [g("embeddings.class_embedding")]
    for i in range(S // P):
        for j in range(S // P): rows.append((kernel * x[:, i * P:(i + 1) * P, j * P:(j + 1) * P]).sum((1, 2, 3)))
    h = np.array(rows) + g("embeddings.position_embedding.weight")
    h = layer_norm(h, g("pre_layrnorm.weight"), g("pre_layrnorm.bias"))
    for n in range(VISION["num_hidden_layers"]):
        e = lambda k: g(f"encoder.layers.{n}.{k}") # noqa: B023
        lin = lambda x, k: x @ e(k + ".weight").T + e(k + ".bias") # noqa: B023
        y = layer_norm(h, e("layer_norm1.weight"), e("layer_norm1.bias"))
        y = attention(lin(y, "self_attn.q_proj"), lin(y, "self_attn.k_proj"), lin(y, "self_attn.v_proj"),
                      VISION["num_attention_heads"], False)
        h = h + lin(y, "self_attn.out_proj")
        y = lin(layer_norm(h, e("layer_norm2.weight"), e("layer_norm2.bias")), "mlp.fc1")
        h = h + lin(y / (1 + np.exp(-1.702 * y)), "mlp.fc2")
    return h


def plain_see(w, events, frames, twice, blue_last):
    lin = lambda x, k: x @ w[f"model.{k}.weight"].T + w[f"model.{k}.bias"]
    gelu = np.vectorize(lambda v: .5 * v * (1 + math.erf(v / math.sqrt(2))))
    k, seen = len(events) // frames, []
    for i in range(frames):
        part = slice(i * k, (i + 1) * k if i < frames - 1 else len(events))
        image = plain_picture(events.x[part].tolist(), events.y[part].tolist(), events.p[part].tolist(), blue_last)
        seen.append(lin(lin(gelu(lin(plain_tower(w, plain_pixels(image, VISION["image_size"])), "visual_projector.0")),
                            "visual_projector.2"), "feature_adaptor"))
    tokens = [sum(s) / len(s) for s in seen] # time first: one token per picture
    tokens += [sum(s[j] for s in seen) / frames for j in range(len(seen[0]))] # then space: one per patch
    return lin(np.array(tokens), "feature_adaptor") if twice else np.array(tokens)


def plain_decoder(w, h): # [L, D] → [L, D] after the final norm
    norm = lambda x, k: np.array([r / math.sqrt((r * r).mean() + 1e-5) for r in x]) * w[k]
    H = LLAMA["num_attention_heads"]
    d = LLAMA["hidden_size"] // H
    def turn(x):
        out = x.copy()
        for t in range(len(x)):
            for i in range(H):
                for j in range(d // 2):
                    a = t / 10000 ** (2 * j / d)
                    u, v = x[t, i * d + j], x[t, i * d + j + d // 2]
                    out[t, i * d + j] = u * math.cos(a) - v * math.sin(a)
                    out[t, i * d + j + d // 2] = v * math.cos(a) + u * math.sin(a)
        return out
    for n in range(LLAMA["num_hidden_layers"]):
        lin = lambda x, k: x @ w[f"model.layers.{n}.{k}.weight"].T # noqa: B023
        y = norm(h, f"model.layers.{n}.input_layernorm.weight")
        y = attention(turn(lin(y, "self_attn.q_proj")), turn(lin(y, "self_attn.k_proj")), lin(y, "self_attn.v_proj"), H,
                      True)
        h = h + lin(y, "self_attn.o_proj")
        y = norm(h, f"model.layers.{n}.post_attention_layernorm.weight")
        gate = lin(y, "mlp.gate_proj")
        h = h + lin(gate / (1 + np.exp(-gate)) * lin(y, "mlp.up_proj"), "mlp.down_proj")
    return norm(h, "model.norm.weight")


@pytest.mark.parametrize("options",
                         [{}, {"frames": 1, "adaptor_twice": True}, {"frames": 3, "polarity_order": "blue_last"}],
                         ids=str)
def test_plain_statement_of_the_forward_path(folder, options):
    w = {k: v.double().numpy() for k, v in eventgpt_tensors().items()}
    model, clip = EventGPT.from_pretrained(folder, **options), random_clip(3)
    seen = plain_see(w, clip.events, options.get("frames", 5), options.get("adaptor_twice", False),
                     options.get("polarity_order") == "blue_last")
    assert model.see(clip)[0].shape == seen.shape == (options.get("frames", 5) + 4 + 1, 64)
    near(model.see(clip)[0], seen, CHAIN)
    before, after = model.prompt("Why?")
    table = w["model.embed_tokens.weight"]
    h = plain_decoder(w, np.concatenate([table[before], seen, table[after]]))
    state = model.prefill([model.encode(clip, "Why?")])
    near(state.h[0], h[-1], CHAIN)
    near(model.head.logits(state.h)[0], w["lm_head.weight"] @ h[-1], CHAIN)


def test_the_statement_notices_each_part(folder, model):
    "Mutants: without the adaptor, with the layer before the tower's last, with tokens in the other order: others"
    clip = random_clip(3)
    x = model.pictures(clip.events)
    right, out = model.see(clip)[0], model.tower(x, output_hidden_states=True)
    y = model.adaptor(model.projector(out.last_hidden_state))
    near(pool(y), right, CHAIN)
    for wrong in (pool(model.projector(out.last_hidden_state)),
                  pool(model.adaptor(model.projector(out.hidden_states[-2]))),
                  torch.cat([y.mean(0), y.mean(1)]), pool(y.flip(0))):
        assert off(wrong, right) > 100 * tol(CHAIN)


@pytest.mark.parametrize("T,P", [(5, 576), (1, 576), (2, 4), (3, 9)])
def test_pooling_gives_T_and_P_plus_1_tokens_in_order(T, P):
    x = torch.randn(T, P + 1, 6)
    y = pool(x)
    assert y.shape == (T + P + 1, 6)
    for t in range(T): near(y[t], x[t].mean(0), P + 1, size=x.abs().max())
    for s in range(P + 1): near(y[T + s], x[:, s].mean(0), T, size=x.abs().max())


# ---- prompt ----

def test_golden_prompt_ids():
    before, after = event_prompt(golden_tokenizer(), QUESTION)
    assert before == GOLDEN_BEFORE and after == GOLDEN_AFTER


def test_prompt_structure(model):
    "A begin token on the first part only, a dummy prefix on both, no end token, no blank at the end"
    t = model.tokenizer
    before, after = model.prompt(QUESTION)
    assert before[0] == t.bos_token_id and t.bos_token_id not in before[1:] + after
    assert t.eos_token_id not in before + after
    assert t.convert_ids_to_tokens(before[1:2]) == ["▁A"]
    assert t.convert_ids_to_tokens(before[-5:]) == ["▁<", "ev", "_", "start", ">"]
    assert t.convert_ids_to_tokens(after[:6]) == ["▁<", "ev", "_", "end", ">", "<0x0A>"]
    assert t.convert_ids_to_tokens(after[-1:]) == [":"]
    assert "<unk>" not in t.convert_ids_to_tokens(before + after)


@pytest.mark.skipif("FEATSD_EVENTGPT" not in os.environ, reason="name an official checkpoint in FEATSD_EVENTGPT")
def test_golden_prompt_ids_with_the_real_tokenizer():
    from featsd.models.checkpoint import read_tokenizer
    before, after = event_prompt(read_tokenizer(os.environ["FEATSD_EVENTGPT"]), QUESTION)
    assert before == GOLDEN_BEFORE and after == GOLDEN_AFTER


def test_prompts_end_at_the_limit(folder, model):
    clip, long = random_clip(1), "Why? " * 1000
    with pytest.warns(UserWarning, match="limited to 2048"): prefix = model.encode(clip, long)
    assert prefix.embeds.shape[1] == 2048
    whole = EventGPT.from_pretrained(folder, limit=100_000).encode(clip, long)
    assert torch.equal(whole.embeds[:, :2048], prefix.embeds)


# ---- layouts ----

LAYOUTS = [dict(kind=k, shards=s) for k in ("safetensors", "bin") for s in (1, 3)]
LAYOUTS += [dict(vision_prefix=False), dict(position_ids=True, kind="bin"), dict(tower=False),
            dict(tower=False, kind="bin", shards=2, position_ids=False)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_is_the_same_model(tmp_path, model, layout):
    write_eventgpt(tmp_path/"x", **layout)
    other, clip = load_backbone(tmp_path/"x"), random_clip(2)
    assert isinstance(other, EventGPT)
    a, b = model.encode(clip, QUESTION), other.encode(clip, QUESTION)
    assert torch.equal(a.embeds, b.embeds)
    assert torch.equal(model.generate([a], 6)[0].ids, other.generate([b], 6)[0].ids)
    assert torch.equal(model.head.lm_head.weight, other.head.lm_head.weight)


@pytest.mark.parametrize("whole", [False, True])
def test_a_separate_tower_in_a_whole_clip(tmp_path, model, whole):
    "The tower's folder may hold both halves of CLIP, with the old prefix; only the vision half is read"
    write_eventgpt(tmp_path/"x", tower=False)
    file, config = tmp_path/"x"/"tower"/"model.safetensors", tmp_path/"x"/"tower"/"config.json"
    weights = {f"vision_model.{k}": v for k, v in load_file(file).items()}
    if whole:
        weights |= {"text_model.final_layer_norm.weight": torch.zeros(3), "logit_scale": torch.zeros(1),
                    "visual_projection.weight": torch.zeros(2, 64)}
        config.write_text(json.dumps({"model_type": "clip", "vision_config": json.loads(config.read_text()),
                                      "text_config": {}}))
    save_file(weights, file)
    assert torch.equal(EventGPT.from_pretrained(tmp_path/"x").see(random_clip(1)), model.see(random_clip(1)))


def test_tied_weights_and_the_hash_of_a_separate_tower(tmp_path):
    tensors = write_eventgpt(tmp_path/"x", tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    write_tensors(tmp_path/"x", tensors)
    assert torch.equal(EventGPT.from_pretrained(tmp_path/"x").head.lm_head.weight, tensors["model.embed_tokens.weight"])
    write_eventgpt(tmp_path/"y", tower=False)
    first = EventGPT.from_pretrained(tmp_path/"y").model_hash
    file = tmp_path/"y"/"tower"/"model.safetensors"
    weights = load_file(file)
    weights = {k: v + 1 if k.endswith("class_embedding") else v for k, v in weights.items()}
    save_file(weights, file)
    assert EventGPT.from_pretrained(tmp_path/"y").model_hash != first


def official_shapes(): # name → shape
    "Tensors of the published 7B checkpoint"
    D, C, F, M = 4096, 1024, 11008, 4096
    out = {"model.embed_tokens.weight": (32000, D), "model.norm.weight": (D,), "lm_head.weight": (32000, D)}
    for i in range(32):
        out |= {f"model.layers.{i}.self_attn.{k}_proj.weight": (D, D) for k in "qkvo"}
        out |= {f"model.layers.{i}.mlp.{k}_proj.weight": (F, D)
                for k in ("gate", "up")} | {f"model.layers.{i}.mlp.down_proj.weight": (D, F)}
        out |= {f"model.layers.{i}.{k}_layernorm.weight": (D,) for k in ("input", "post_attention")}
    v = "model.visual_tower.visual_tower.vision_model."
    out |= {v + "embeddings.class_embedding": (C,), v + "embeddings.patch_embedding.weight": (C, 3, 14, 14),
            v + "embeddings.position_embedding.weight": (577, C),
            v + "embeddings.position_ids": (1, 577)}
    sized = lambda name, n, m=None: {f"{name}.weight": (n,) if m is None else (n, m), f"{name}.bias": (n,)}
    out |= sized(v + "pre_layrnorm", C) | sized(v + "post_layernorm", C)
    for i in range(24):
        e = f"{v}encoder.layers.{i}."
        for k in ("q", "k", "v", "out"): out |= sized(f"{e}self_attn.{k}_proj", C, C)
        out |= sized(e + "layer_norm1", C) | sized(e + "layer_norm2", C)
        out |= sized(e + "mlp.fc1", M, C) | sized(e + "mlp.fc2", C, M)
    out |= sized("model.visual_projector.0", D, C) | sized("model.visual_projector.2", D, D)
    return out | sized("model.feature_adaptor", D, D)


def test_the_7B_checkpoint_fits_without_its_weights():
    "Its names and shapes alone: nothing missing, nothing left over, and the tower is CLIP ViT-L/14-336"
    shapes = {our_name(k): v for k, v in official_shapes().items() if our_name(k)}
    vision = infer_tower(shapes)
    assert vision == dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                          image_size=336, patch_size=14, hidden_act="quick_gelu")
    check_tensors("7B",
                  LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                              num_attention_heads=32, vision=vision), shapes)


# ---- answers ----

def test_only_the_answer_comes_back_and_it_is_that_of_transformers(model):
    prefixes = [model.encode(random_clip(s), q) for s in (1, 2) for q in (QUESTION, "Why?")]
    for p, a in zip(prefixes, model.generate(prefixes, 10)):
        own = model.lm.generate(inputs_embeds=p.embeds, max_new_tokens=10, do_sample=False, eos_token_id=2,
                                pad_token_id=0)[0]
        assert a.ids.tolist() == own[:len(a.ids)].tolist() and len(a.ids) <= 10
        assert isinstance(model.decode_text(a.ids), str)


@pytest.mark.parametrize("quant,kind",
                         [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt"), ("bf16", "Linear"), ("fp16", "Linear")])
def test_quantised_on_the_cpu(folder, model, quant, kind):
    small, clip = EventGPT.from_pretrained(folder, quant, device="cpu"), random_clip(1)
    for part in (small.decoder.layers[0].mlp.up_proj, small.tower.encoder.layers[0].mlp.fc1, small.adaptor):
        assert type(part).__name__ == kind
    assert type(small.head.lm_head) is torch.nn.Linear
    assert small.head.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
    assert 1 <= len(small.generate([small.encode(clip, QUESTION)], 6)[0].ids) <= 6
    cos = torch.nn.functional.cosine_similarity(small.see(clip).float(), model.see(clip), dim=-1)
    assert cos.min() > (.9 if quant == "4bit" else .999)
    report, whole = memory_report(small), memory_report(model)
    assert report["decoder"]["bytes"] < .6 * whole["decoder"]["bytes"]
    assert report["total"]["bytes"] < .6 * whole["total"]["bytes"]
    assert set(report) == {"head", "embed", "tower", "projector", "adaptor", "decoder", "total"}


def test_memory_report_counts_every_parameter(model):
    lm = sum(p.numel() for m in (model.lm, model.tower, model.projector, model.adaptor) for p in m.parameters())
    report = memory_report(model)
    assert report["total"]["parameters"] == lm
    assert report["total"]["bytes"] >= 4 * lm and report["decoder"]["devices"] == ["cpu"]


def test_variants_have_their_own_names_and_hashes(folder):
    kinds = [{}, {"frames": 1}, {"adaptor_twice": True}, {"polarity_order": "blue_last"}]
    models = [EventGPT.from_pretrained(folder, **k) for k in kinds]
    assert len({m.model_hash for m in models}) == len({m.name for m in models}) == 4
    assert EventGPT.from_pretrained(folder, max_duration_us=None).model_hash == models[0].model_hash


def test_long_streams_are_refused_until_the_check_is_off(folder, model):
    clip = random_clip(1, duration_us=1_000_000)
    with pytest.raises(FeatsdError, match="max_duration_us=None") as e: model.encode(clip, QUESTION)
    assert "100000" in str(e.value) and "\n" not in str(e.value)
    assert load_backbone(f"{folder}?max_duration_us=none").see(clip).shape[1] == 10


@pytest.mark.parametrize("n,found", [(0, "0 events"), (4, "4 events")])
def test_streams_too_short(model, n, found):
    clip = random_clip(1)
    clip.events = clip.events[:n]
    with pytest.raises(FeatsdError, match=found): model.see(clip)


# ---- wrong folders: one line each ----

def broken(folder, tmp_path, change):
    path = tmp_path/"broken"
    shutil.copytree(folder, path)
    change(path)
    return path


def edit(**fields):
    def change(path):
        config = json.loads((path/"config.json").read_text())
        (path/"config.json").write_text(json.dumps({k: v for k, v in {**config, **fields}.items() if v is not None}))
    return change


def weights(f, **layout):
    def change(path):
        (path/"model.safetensors").unlink()
        write_tensors(path, f(eventgpt_tensors()), **layout)
    return change


def shard_gone(path):
    weights(lambda t: t, shards=3)(path)
    (path/"model-00002-of-00003.safetensors").unlink()


def escaping_index(path):
    weights(lambda t: t, shards=2)(path)
    index = json.loads((path/"model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    (path/"model.safetensors.index.json").write_text(json.dumps(index))


class Boom:
    def __reduce__(self): return (os.system, ("touch boom-was-here",))


def malicious(path):
    (path/"model.safetensors").unlink()
    torch.save({"model.norm.weight": Boom()}, path/"pytorch_model.bin")


def tower_of_another_size(path):
    from transformers import CLIPVisionConfig, CLIPVisionModel
    CLIPVisionModel(CLIPVisionConfig(**{**VISION, "hidden_size": 128,
                                        "num_attention_heads": 2})).save_pretrained(path/"tower")
    edit(mm_visual_tower=str(path/"tower"))(path)


def without(prefix): return lambda t: {k: v for k, v in t.items() if not k.startswith(prefix)}


BROKEN = {
    "wrong kind": (edit(model_type="llama"), "model_type 'llama', expected 'EventChat_llama'"),
    "no kind": (edit(model_type=None), "model_type None"),
    "qformer": (edit(use_event_qformer=True), "use_event_qformer"),
    "already quantised": (edit(quantization_config={"load_in_4bit": True}), "quantised already"),
    "config not json": (lambda p: (p/"config.json").write_text("{"), "expected JSON"),
    "no weights": (lambda p: (p/"model.safetensors").unlink(), "no weights"),
    "cut short": (lambda p: (p/"model.safetensors").write_bytes(b"\x10"), "not a safetensors file"),
    "shard gone": (shard_gone, "model-00002-of-00003.safetensors: shard named in"),
    "index leaves the folder": (escaping_index, "expected a file of this folder"),
    "malicious pickle": (malicious, "refused by the restricted reader"),
    "language model only": (weights(without("model.visual_projector")), "not an EventGPT checkpoint"),
    "a tensor missing": (weights(without("model.layers.1.mlp.up_proj")),
                         "1 tensors missing, such as lm.model.layers.1.mlp.up_proj.weight"),
    "a tensor left over": (weights(lambda t: {**t, "model.event_qformer.weight": torch.zeros(2)}),
                           "1 tensors left over"),
    "tower of another size": (tower_of_another_size, "the vision tower is of another size"),
    "decoder of another size": (edit(intermediate_size=64), "config.json and weights do not fit"),
    "tower nowhere": (lambda p: (weights(without("model.visual_tower"))(p), edit(mm_visual_tower="/no/such/tower")(p)),
                      "names another: /no/such/tower"),
    "no tower named": (lambda p: (weights(without("model.visual_tower"))(p), edit(mm_visual_tower=None)(p)),
                       "no mm_visual_tower"),
    "tokenizer of another vocabulary": (lambda p: small_tokenizer(size=SMALL - 1).save_pretrained(p),
                                        f"tokenizer of {SMALL - 1} pieces, the model has {SMALL}"),
    "no tokenizer": (lambda p: (p/"tokenizer.json").unlink(), "no tokenizer, expected"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_folders(folder, tmp_path, name):
    change, expected = BROKEN[name]
    path = broken(folder, tmp_path, change)
    with pytest.raises((FeatsdError, FileNotFoundError)) as e: EventGPT.from_pretrained(path)
    assert expected in str(e.value) and "\n" not in str(e.value) and str(path) in str(e.value)
    assert not Path("boom-was-here").exists()


def test_hub_names(folder, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append(name) or str(folder))
    assert load_backbone("someone/event-model").name == "event-model" and asked == ["someone/event-model"]
    def no_network(name, **kw): raise OSError("no route to host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    both_ways_out = "no route to host.*give a folder.*or check the name and the network"
    with pytest.raises(FileNotFoundError, match=both_ways_out): load_backbone("someone/event-model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the network"))
    for path in ("nowhere", "/abs/nowhere", "./a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such checkpoint folder"): load_backbone(path)


def run(*args):
    return subprocess.run([sys.executable, "-m", "featsd.models.eventgpt", *map(str, args)], capture_output=True,
                          text=True, timeout=HANG)


def test_answers_from_the_shell(folder, model, tmp_path):
    clip = random_clip(4)
    save_events(tmp_path/"stream.npz", clip.events)
    got = run(folder, "--events", tmp_path/"stream.npz", "--question", "Why?", "--max_new_tokens", 5)
    clip.id = "stream"
    expected = model.decode_text(model.generate([model.encode(clip, "Why?")], 5)[0].ids)
    assert got.returncode == 0 and got.stdout.strip() == expected and got.stderr == "", got
    save_events(tmp_path/"long.npz", random_events(duration_us=200_000))
    got = run(folder, "--events", tmp_path/"long.npz")
    assert got.returncode == 2 and got.stderr.count("\n") == 1 and "PATH?max_duration_us=none" in got.stderr, got
