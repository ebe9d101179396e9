"Tiny random checkpoints of many families of transformers: their own classes and key names, small tokenizers and processors"
from pathlib import Path

import torch
import transformers as T
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from featsd.models.checkpoint import quiet_transformers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
WORDS_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                  "{% if add_generation_prompt %}assistant: {% endif %}")
PICTURES_TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
                     "{% if part['type'] == 'image' %}PLACE{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
                     "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


NEVER = "ÀÁõö÷øùúûüýþÿ" # bytes that no text holds
PAIRS = [(a, b) for a, b in ("th", "he", "in", "er", "wh", "at", "is", "it", "an", "re", "on", "ar", "Ġt")]

def tokenizer(specials=(), other=False, **named):
    "Every byte a piece, then control tokens; ids in this order. `other`: other ids, pairs of letters in place of some bytes"
    pieces, pairs = sorted(pre_tokenizers.ByteLevel.alphabet()), PAIRS if other else []
    if other: pieces = [c for c in reversed(pieces) if c not in NEVER] + [a + b for a, b in pairs]
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(pieces)}, pairs))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (BEGIN, END, PAD, *specials)])
    return T.PreTrainedTokenizerFast(tokenizer_object=t, bos_token=BEGIN, eos_token=END, pad_token=PAD, **named)


B, E, P = 256, 257, 258 # ids of begin, end, padding
SIZES = dict(vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=.15, bos_token_id=B,
             eos_token_id=E, pad_token_id=P, tie_word_embeddings=False)
GPT = dict(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=B, eos_token_id=E, pad_token_id=P,
           initializer_range=.15, tie_word_embeddings=False)
MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
LINEAR = dict(linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
              linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"])
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_local_experts=4)
MAMBA = dict(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=B, eos_token_id=E,
             pad_token_id=P, initializer_range=.15, tie_word_embeddings=False)
ROPE = dict(rope_theta=10000.)
TEXT = { # family → config, settings
    "llama_linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2., **ROPE))),
    "llama_dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2., **ROPE))),
    "llama_3": ("Llama", dict(rope_parameters=dict(rope_type="llama3", factor=2., low_freq_factor=1., high_freq_factor=4.,
                                                   original_max_position_embeddings=64, **ROPE))),
    "llama_yarn": ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=2., original_max_position_embeddings=256,
                                                      **ROPE))),
    "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", {}), "mistral": ("Mistral", dict(sliding_window=8)),
    "gemma2": ("Gemma2", dict(final_logit_softcapping=3., **MIXED)), "gemma3_text": ("Gemma3Text", dict(MIXED)),
    "phi3": ("Phi3", dict(hidden_size=32)), "phi": ("Phi", {}), "olmo2": ("Olmo2", {}), "starcoder2": ("Starcoder2", {}),
    "stablelm": ("StableLm", {}), "smollm3": ("SmolLM3", {}), "glm": ("Glm", {}), "granite": ("Granite", dict(logits_scaling=4.)),
    "cohere": ("Cohere", dict(logit_scale=.3)), "gpt_neox": ("GPTNeoX", {}), "gpt2": ("GPT2", GPT),
    "opt": ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32)), "bloom": ("Bloom", dict(n_layer=2, n_head=4)),
    "mpt": ("Mpt", dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=512)),
    "gpt_oss": ("GptOss", dict(MOE, **MIXED)), "mixtral": ("Mixtral", dict(MOE)),
    "qwen3_moe": ("Qwen3Moe", dict(MOE)), "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention"])),
    "mamba": ("Mamba", MAMBA), "mamba2": ("Mamba2", dict(MAMBA, num_heads=8, head_dim=8, n_groups=1, expand=2)),
    "qwen3_next": ("Qwen3Next", dict(MOE, shared_expert_intermediate_size=32, **LINEAR)),
    "falcon_h1": ("FalconH1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
                                   lm_head_multiplier=.5)),
    "deepseek_v3": ("DeepseekV3", dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
                                       n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1,
                                       topk_group=1, first_k_dense_replace=1, num_key_value_heads=4)),
    "recurrent_gemma": ("RecurrentGemma", dict(num_hidden_layers=3, lru_width=32, attention_window_size=16)),
    "rwkv": ("Rwkv", dict(attention_hidden_size=32)),
}


def write_text(name, folder, seed=0, template=WORDS_TEMPLATE):
    "A language model with its tokenizer"
    kind, more = TEXT[name]
    torch.manual_seed(seed)
    config = getattr(T, f"{kind}Config")(**({**SIZES, **more} if more.get("vocab_size") is None else more))
    lm = T.AutoModelForCausalLM.from_config(config)
    return _saved(lm, folder, tokenizer(), template)


def _saved(lm, folder, words, template):
    with torch.no_grad(): # lively answers: many families begin with small weights
        for p in lm.parameters():
            if p.ndim >= 2 and 0 < p.std() < .05: p.mul_(.12 / p.std())
    lm.generation_config = T.GenerationConfig(bos_token_id=B, eos_token_id=E, pad_token_id=P)
    words.chat_template = template
    with quiet_transformers():
        lm.save_pretrained(folder)
        words.save_pretrained(folder)
    return Path(folder)


SPECIALS = ("<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<img>", "</img>",
            "<IMG_CONTEXT>", "<|image|>", "<|python_tag|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<boi>", "<eoi>",
            "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|image_start|>", "<|image_end|>",
            "<|img_thumbnail|>", "<|video|>", "<|audio|>")
ID = {s: 259 + i for i, s in enumerate(SPECIALS)}
TEXT_VL = {**SIZES, "vocab_size": 296}
LLAMA = dict(model_type="llama", **TEXT_VL)
EYE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
CLIP, SIGLIP = dict(model_type="clip_vision_model", **EYE), dict(model_type="siglip_vision_model", vision_use_head=False, **EYE)
SQUARE = dict(size=dict(height=28, width=28))
CROP = dict(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
GRID = [[28, 28], [28, 56], [56, 28]]
MROPE = dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.))
QWEN_EYE = dict(depth=2, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
QWEN_IDS = dict(image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"],
                vision_start_token_id=ID["<|vision_start|>"], vision_end_token_id=ID["<|vision_end|>"])
QWEN_EYES = ("Qwen2VL", dict(min_pixels=28 * 28, max_pixels=4 * 28 * 28, patch_size=14))
QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN3_EYE = dict(hidden_size=32, intermediate_size=64, out_hidden_size=32, num_position_embeddings=16, **QWEN_EYE)
IDEFICS = dict(scale_factor=2, image_token_id=ID["<image>"], vision_config=EYE, text_config=LLAMA, tie_word_embeddings=False)
IDEFICS_EYES = ("Idefics3", dict(size=dict(longest_edge=28), max_image_size=dict(longest_edge=28), do_image_splitting=False))
VISION = { # family → config, settings, image processor and its settings, processor and its settings, placeholder
    "llava": ("Llava", dict(vision_config=CLIP, text_config=LLAMA, image_token_id=ID["<image>"]), ("CLIP", CROP),
              ("Llava", dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)), "<image>"),
    "llava_mistral": ("Llava", dict(vision_config=CLIP, text_config=dict(model_type="mistral", sliding_window=8, **TEXT_VL),
                                    image_token_id=ID["<image>"]), ("CLIP", CROP),
                      ("Llava", dict(patch_size=14, vision_feature_select_strategy="default",
                                     num_additional_image_tokens=1)), "<image>"),
    "vipllava": ("VipLlava", dict(vision_config=CLIP, text_config=LLAMA, image_token_id=ID["<image>"],
                                  vision_feature_layers=[-1, -2]), ("CLIP", CROP),
                 ("Llava", dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)),
                 "<image>"),
    "llava_next": ("LlavaNext", dict(vision_config=CLIP, text_config=LLAMA, image_token_id=ID["<image>"],
                                     image_grid_pinpoints=GRID),
                   ("LlavaNext", dict(image_grid_pinpoints=GRID, **CROP)),
                   ("LlavaNext", dict(patch_size=14, vision_feature_select_strategy="default",
                                      num_additional_image_tokens=1)), "<image>"),
    "llava_onevision": ("LlavaOnevision", dict(vision_config=SIGLIP, text_config=dict(model_type="qwen2", **TEXT_VL),
                                               image_token_id=ID["<image>"], video_token_id=ID["<video>"],
                                               image_grid_pinpoints=GRID, vision_aspect_ratio="anyres_max_9"),
                        ("LlavaOnevision", dict(image_grid_pinpoints=GRID, **SQUARE)),
                        ("LlavaOnevision", dict(num_image_tokens=4, vision_feature_select_strategy="full")), "<image>"),
    "qwen2_vl": ("Qwen2VL", dict(vision_config=dict(embed_dim=32, hidden_size=32, mlp_ratio=2, **QWEN_EYE),
                                 text_config=dict(TEXT_VL, **MROPE), **QWEN_IDS), QWEN_EYES, ("Qwen2VL", {}), QWEN_PLACE),
    "qwen2_5_vl": ("Qwen2_5_VL", dict(vision_config=dict(hidden_size=32, intermediate_size=64, out_hidden_size=32,
                                                         fullatt_block_indexes=[1], window_size=56, **QWEN_EYE),
                                      text_config=dict(TEXT_VL, **MROPE), **QWEN_IDS), QWEN_EYES, ("Qwen2_5_VL", {}), QWEN_PLACE),
    "qwen3_vl": ("Qwen3VL", dict(vision_config=dict(deepstack_visual_indexes=[0, 1], **QWEN3_EYE),
                                 text_config=dict(TEXT_VL, num_hidden_layers=3, **MROPE), **QWEN_IDS), QWEN_EYES,
                 ("Qwen3VL", {}), QWEN_PLACE),
    "qwen3_vl_moe": ("Qwen3VLMoe", dict(vision_config=dict(deepstack_visual_indexes=[0, 1], **QWEN3_EYE),
                                        text_config=dict(TEXT_VL, **MOE, **MROPE), **QWEN_IDS), QWEN_EYES, ("Qwen3VL", {}),
                     QWEN_PLACE),
    "qwen3_5": ("Qwen3_5", dict(vision_config=QWEN3_EYE, text_config=dict(
        TEXT_VL, **LINEAR, rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.,
                                                partial_rotary_factor=1.)), **QWEN_IDS), QWEN_EYES, ("Qwen3VL", {}), QWEN_PLACE),
    "internvl": ("InternVL", dict(vision_config=dict(EYE, image_size=[28, 28], patch_size=[14, 14]),
                                  text_config=dict(model_type="qwen2", **TEXT_VL), image_token_id=ID["<IMG_CONTEXT>"],
                                  image_seq_length=1),
                 ("GotOcr2", dict(crop_to_patches=False, **SQUARE)), ("InternVL", dict(image_seq_length=1)), "<IMG_CONTEXT>"),
    "idefics3": ("Idefics3", IDEFICS, IDEFICS_EYES, ("Idefics3", dict(image_seq_len=1)), "<image>"),
    "smolvlm": ("SmolVLM", IDEFICS, ("SmolVLM", IDEFICS_EYES[1]), ("SmolVLM", dict(image_seq_len=1)), "<image>"),
    "gemma3": ("Gemma3", dict(vision_config=SIGLIP, text_config=dict(TEXT_VL, **MIXED), mm_tokens_per_image=4,
                              boi_token_index=ID["<boi>"], eoi_token_index=ID["<eoi>"], image_token_index=ID["<image>"]),
               ("Gemma3", SQUARE), ("Gemma3", dict(image_seq_length=4)), "<boi>"),
    "paligemma": ("PaliGemma", dict(vision_config=SIGLIP, projection_dim=32, text_config=dict(model_type="gemma2", **TEXT_VL,
                                                                                             **MIXED, final_logit_softcapping=3.),
                                    image_token_index=ID["<image>"]), ("Siglip", dict(image_seq_length=4, **SQUARE)),
                  ("PaliGemma", {}), None),
    "mllama": ("Mllama", dict(
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, attention_heads=2, num_global_layers=1,
                           image_size=28, patch_size=14, intermediate_layers_indices=[0], max_num_tiles=2,
                           vision_output_dim=64, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]]),
        text_config=dict(TEXT_VL, num_hidden_layers=3, cross_attention_layers=[1],
                         rope_parameters=dict(rope_type="default", **ROPE)), image_token_index=ID["<|image|>"]),
        ("Mllama", dict(max_image_tiles=2, **SQUARE)), ("Mllama", {}), "<|image|>"),
    "mistral3": ("Mistral3", dict(vision_config=dict(model_type="pixtral", **EYE), text_config=dict(model_type="mistral", **TEXT_VL),
                                  image_token_index=ID["[IMG]"], spatial_merge_size=1),
                 ("Pixtral", dict(size=dict(longest_edge=28), patch_size=14)), ("Pixtral", dict(patch_size=14)), "[IMG]"),
    "pixtral": ("Llava", dict(vision_config=dict(model_type="pixtral", **EYE), text_config=dict(model_type="mistral", **TEXT_VL),
                              image_token_index=ID["[IMG]"], vision_feature_select_strategy="full", vision_feature_layer=-1),
                ("Pixtral", dict(size=dict(longest_edge=28), patch_size=14)), ("Pixtral", dict(patch_size=14)), "[IMG]"),
    "aya_vision": ("AyaVision", dict(vision_config=SIGLIP, text_config=dict(model_type="cohere2", **TEXT_VL, **MIXED),
                                     image_token_index=ID["<IMG_CONTEXT>"], downsample_factor=2, alignment_intermediate_size=64),
                   ("GotOcr2", dict(crop_to_patches=False, **SQUARE)),
                   ("AyaVision", dict(patch_size=14, img_size=28, downsample_factor=2, img_patch_token="<IMG_CONTEXT>")), "<image>"),
    "glm4v": ("Glm4v", dict(vision_config=dict(hidden_size=32, out_hidden_size=32, intermediate_size=64, depth=2, num_heads=2,
                                               image_size=28, patch_size=14, spatial_merge_size=2, temporal_patch_size=2),
                            text_config=dict(TEXT_VL, **MROPE), image_token_id=ID["<|image_pad|>"],
                            video_token_id=ID["<|video_pad|>"], image_start_token_id=ID["<|vision_start|>"],
                            image_end_token_id=ID["<|vision_end|>"], video_start_token_id=ID["<img>"],
                            video_end_token_id=ID["</img>"]),
              ("Glm4v", dict(size=dict(shortest_edge=28 * 28, longest_edge=4 * 28 * 28), patch_size=14)), ("Glm4v", {}), QWEN_PLACE),
    "qwen3_5_moe": ("Qwen3_5Moe", dict(vision_config=QWEN3_EYE, text_config=dict(
        TEXT_VL, **LINEAR, **MOE, shared_expert_intermediate_size=32,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000., partial_rotary_factor=1.)),
        **QWEN_IDS), QWEN_EYES, ("Qwen3VL", {}), QWEN_PLACE),
    "idefics2": ("Idefics2", dict(vision_config=EYE, perceiver_config=dict(
        hidden_size=32, resampler_n_latents=2, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8, num_key_value_heads=1),
        text_config=dict(model_type="mistral", **TEXT_VL), image_token_id=ID["<image>"]),
        ("Idefics2", dict(size=dict(longest_edge=28, shortest_edge=28), do_image_splitting=False)),
        ("Idefics2", dict(image_seq_len=2)), "<image>"),
}
NAMED = { # what tokenizers of some families call their control tokens
    "InternVL": dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                     video_token="<video>"),
    "Gemma3": dict(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>"),
    "PaliGemma": dict(image_token="<image>"), "Glm4v": dict(image_token="<|image_pad|>", video_token="<|video_pad|>")}


def write_vision(name, folder, seed=0, other=False):
    "A vision-language model with its processor, built without torchvision"
    import json
    import transformers.models.smolvlm.processing_smolvlm as smol
    smol.num2words = smol.num2words or str # says the number of frames in words; no video is shown here
    kind, settings, (eyes, seen), (processor, said), place = VISION[name]
    torch.manual_seed(seed)
    config = getattr(T, f"{kind}Config")(**settings, bos_token_id=B, eos_token_id=E, pad_token_id=P,
                                               **({} if "tie_word_embeddings" in settings else dict(tie_word_embeddings=False)))
    lm = T.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad(): # a fresh picture must matter to an answer
        for n, p in lm.named_parameters():
            if ("vision" in n or "visual" in n or "projector" in n) and p.ndim >= 2: p.mul_(4.)
            if n.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")): p.fill_(1.)
    named = NAMED.get(processor, {})
    words = tokenizer(SPECIALS, other, **(dict(extra_special_tokens=named) if named else {}))
    template = PICTURES_TEMPLATE.replace("PLACE", place) if place else None
    _saved(lm, folder, words, template)
    getattr(T, f"{eyes}ImageProcessor")(**seen).save_pretrained(folder)
    (Path(folder)/"processor_config.json").write_text(json.dumps({"processor_class": f"{processor}Processor", **said}))
    return Path(folder)
