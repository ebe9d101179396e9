"Tiny random checkpoints of the two real models, with the official tensor names, config fields and file layouts"
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (AddedToken, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, VideoLlavaConfig,
                          VideoLlavaForConditionalGeneration)

from featsd.data.frames import Clip
from featsd.data.events import Events
from featsd.models.checkpoint import quiet_transformers

# Ids of the real Llama tokenizer for EventGPT's prompt around "What are the key elements in this scene?"
QUESTION = "What are the key elements in this scene?"
GOLDEN_BEFORE = [1, 319, 13563, 1546, 263, 12758, 5199, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444,
                 29892, 13173, 29892, 322, 1248, 568,
                 6089, 304, 278, 5199, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 529, 5750, 29918, 2962, 29958]
GOLDEN_AFTER = [529, 5750, 29918, 355, 29958, 13, 5618, 526, 278, 1820, 3161, 297, 445, 9088, 29973, 319, 1799, 9047,
                13566, 29901]
PIECES = {319: "▁A", 13563: "▁chat", 1546: "▁between", 263: "▁a", 12758: "▁curious", 5199: "▁human", 322: "▁and",
          385: "▁an", 23116: "▁artificial",
          21082: "▁intelligence", 20255: "▁assistant", 29889: ".", 450: "▁The", 4076: "▁gives", 8444: "▁helpful",
          29892: ",", 13173: "▁detailed", 1248: "▁pol",
          568: "ite", 6089: "▁answers", 304: "▁to", 278: "▁the", 29915: "'", 29879: "s", 5155: "▁questions",
          3148: "▁US", 1001: "ER", 29901: ":",
          529: "▁<", 5750: "ev", 29918: "_", 2962: "start", 29958: ">", 355: "end", 5618: "What", 526: "▁are",
          1820: "▁key", 3161: "▁elements", 297: "▁in",
          445: "▁this", 9088: "▁scene", 29973: "?", 1799: "SS", 9047: "IST", 13566: "ANT"}
SMALL = 320 # pieces of the small vocabulary


def llama_tokenizer(pieces, size, added=()): # pieces: id → piece, ids from 259 on
    "A tokenizer of Llama's layout: three specials, 256 bytes, then pieces; a dummy prefix; bytes for the rest"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    names += [pieces.get(i, f"\ue000{i}") for i in range(len(names), size)]
    t = Tokenizer(models.Unigram([(n, -1.) for n in names], unk_id=0, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if added: tokenizer.add_tokens([AddedToken(a, special=True, normalized=False) for a in added])
    return tokenizer


def small_tokenizer(added=(), size=SMALL):
    return llama_tokenizer(dict(enumerate([*sorted(PIECES.values()), "▁"], 259)), size, added)


def golden_tokenizer(added=()): return llama_tokenizer(PIECES, 32000, added)


LLAMA = dict(vocab_size=SMALL, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, rms_norm_eps=1e-5)
VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1, image_size=28,
              patch_size=14)


def eventgpt_tensors(seed=0, vision_prefix=True, position_ids=False, tower=True): # name → tensor, official names
    torch.manual_seed(seed)
    lm, clip = LlamaForCausalLM(LlamaConfig(**LLAMA)), CLIPVisionModel(CLIPVisionConfig(**VISION))
    out = dict(lm.state_dict())
    inner = "model.visual_tower.visual_tower." + ("vision_model." if vision_prefix else "")
    if tower: out |= {inner + k: v for k, v in clip.state_dict().items() if not k.endswith("position_ids")}
    if position_ids: out[inner + "embeddings.position_ids"] = torch.arange(5)[None]
    D, C = LLAMA["hidden_size"], VISION["hidden_size"]
    for name, shape in (("visual_projector.0", (D, C)), ("visual_projector.2", (D, D)), ("feature_adaptor", (D, D))):
        out[f"model.{name}.weight"], out[f"model.{name}.bias"] = torch.randn(shape) / 8, torch.randn(shape[0]) / 8
    return {k: v.detach().contiguous() for k, v in out.items()}


def write_tensors(folder, tensors, kind="safetensors", shards=1):
    "One file, or shards with an index, as the hub has them"
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    if shards == 1: return save(tensors, folder/f"{stem}.{kind}")
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}"
        part = {k: tensors[k] for k in names[i::shards]}
        save(part, folder/file)
        where |= dict.fromkeys(part, file)
    (folder/f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def write_eventgpt(folder, kind="safetensors", shards=1, seed=0, vision_prefix=True, position_ids=False, tower=True,
                   **fields):
    "An EventGPT checkpoint folder; returns its tensors. Without `tower`, that lies in `folder/tower`, as saved"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = eventgpt_tensors(seed)
    tensors = eventgpt_tensors(seed, vision_prefix, position_ids, tower)
    write_tensors(folder, tensors, kind, shards)
    named = "openai/clip-vit-large-patch14-336"
    if not tower:
        prefix = "model.visual_tower.visual_tower.vision_model."
        clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
        clip.load_state_dict({k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)},
                             strict=False)
        with quiet_transformers(): clip.save_pretrained(folder/"tower")
        named = str(folder/"tower")
    config = {**LLAMA, "model_type": "EventChat_llama", "architectures": ["EventChatModel"], "mm_visual_tower": named,
              "event_feature_adaptor": True,
              "mm_hidden_size": VISION["hidden_size"], "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
              **fields}
    (folder/"config.json").write_text(json.dumps(config))
    small_tokenizer().save_pretrained(folder)
    return whole


def hub_name(name): # today's name of a tensor → the hub's older one
    "Video-LLaVA's tensors as the published checkpoint names them"
    name = name.removeprefix("model.")
    for tower in ("video_tower.", "image_tower."):
        if name.startswith(tower) and not name.startswith(tower + "vision_model."):
            name = tower + "vision_model." + name.removeprefix(tower)
    if name.startswith("language_model.") and not name.startswith("language_model.model."):
        name = "language_model.model." + name.removeprefix("language_model.")
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name


def write_videollava(folder, names="transformers", seed=1, position_ids=False):
    "A Video-LLaVA checkpoint folder: as `transformers` saves it, with the `hub`'s names, or with `today`'s modules'"
    folder = Path(folder)
    torch.manual_seed(seed)
    config = VideoLlavaConfig(vision_config={"model_type": "clip_vision_model", **VISION},
                              text_config={"model_type": "llama", **LLAMA, "vocab_size": SMALL + 32},
                              image_token_index=SMALL, video_token_index=SMALL + 1, pad_token_id=SMALL + 2)
    lm = VideoLlavaForConditionalGeneration(config)
    with quiet_transformers(): lm.save_pretrained(folder)
    if names == "today":
        (folder/"model.safetensors").unlink()
        write_tensors(folder, {k: v.contiguous() for k, v in lm.state_dict().items() if not k.endswith("position_ids")})
    if names == "hub":
        (folder/"model.safetensors").unlink()
        tensors = {hub_name(k): v.contiguous() for k, v in lm.state_dict().items() if not k.endswith("position_ids")}
        if position_ids: tensors["video_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        write_tensors(folder, tensors, shards=2)
    small_tokenizer(("<image>", "<video>", "<pad>")).save_pretrained(folder)
    return lm.eval()


def random_events(seed=0, n=600, duration_us=90_000, h=24, w=33):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, duration_us, n))
    t[0], t[-1] = 0, duration_us
    return Events(rng.integers(0, w, n).astype(np.int32), rng.integers(0, h, n).astype(np.int32), t,
                  rng.integers(0, 2, n).astype(np.uint8))


def random_clip(seed=0, frames=10, **kw):
    rng = np.random.default_rng(seed)
    return Clip(f"clip{seed}", rng.integers(0, 256, (frames, 26, 35, 3), dtype=np.uint8), random_events(seed, **kw),
                f"sequence{seed}")
