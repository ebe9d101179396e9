"Video-LLaVA: transformers' answers, pixels without torchvision, frames, prompts, and the pair with EventGPT"
import importlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from closeness import near
from patience import HANG
from tiny_checkpoints import (QUESTION, SMALL, VISION, golden_tokenizer, random_clip, small_tokenizer, write_eventgpt,
                              write_tensors,
                              write_videollava)
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from featsd.base.core import FeatsdError
from featsd.data.frames import frame_indices, read_folder, read_video
from featsd.extract import extract, pair_states
from featsd.models.backbone import Pair, load_backbone, memory_report
from featsd.models.checkpoint import read_tokenizer, tensor_shapes
from featsd.models.eventgpt import EventGPT
from featsd.models.lean import lean
from featsd.data.frames import clip_pixels
from featsd.models.videollava import VideoLLaVA, video_prompt


@pytest.fixture(scope="module")
def saved(tmp_path_factory): # folder, transformers' model
    path = tmp_path_factory.mktemp("videollava")/"tiny"
    return path, write_videollava(path)


@pytest.fixture(scope="module")
def folder(saved): return saved[0]


@pytest.fixture(scope="module")
def model(folder): return VideoLLaVA.from_pretrained(folder)


# ---- pixels ----

SIZES = [(480, 640), (720, 1280), (336, 336), (224, 224), (223, 301), (301, 223), (37, 501), (30, 31), (2, 9),
         (260, 346)]


@pytest.mark.parametrize("h,w", SIZES)
def test_pixels_are_those_of_transformers_bit_for_bit(h, w):
    y, x = np.mgrid[:h, :w]
    noise = np.random.default_rng(h).integers(0, 256, (h, w, 3), dtype=np.uint8)
    smooth = np.stack([x * 255 // w, y * 255 // h, (x + y) % 256], -1).astype(np.uint8)
    for image in (noise, smooth):
        for size in (224, 336):
            ref = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
            ref = ref(Image.fromarray(image))["pixel_values"][0]
            assert clip_pixels(image, size).tobytes() == ref.tobytes() and ref.dtype == np.float32
        module = "transformers.models.video_llava.image_processing_video_llava"
        own = importlib.import_module(module).VideoLlavaImageProcessor()
        ref = own(images=[Image.fromarray(image)], return_tensors="np",
                  return_legacy_image_output=False)["pixel_values"][0]
        assert clip_pixels(image, 224).tobytes() == ref.tobytes()


def test_no_torchvision():
    code = "import sys, featsd.models.eventgpt, featsd.models.videollava; print('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_clips_of_one_name_are_told_apart(model):
    few = [random_clip(k, frames=3) for k in (1, 2)]
    few[1].id = few[0].id
    prompts = [p for c in few for p in model.encode_all(c, ["what is it?", "where?"])]
    for m in (model, lean(model)):
        alone, together = torch.cat([m.prefill([p]).h for p in prompts]), m.prefill(prompts).h
        assert (alone - together).abs().max() < .01 * (alone[0] - alone[2]).abs().max()


# ---- frames ----

@pytest.mark.parametrize("total", [1, 3, 7, 8, 9, 20, 24, 1001])
def test_frame_rules(total):
    "`linspace` as the study's extraction: all where there are fewer; `arange` as the model's own, which then repeats"
    assert frame_indices(total) == (list(range(total)) if total < 8
                                    else np.linspace(0, total - 1, 8, dtype=int).tolist())
    assert frame_indices(total, rule="arange") == np.arange(0, total, total / 8).astype(int).tolist()


def test_few_frames_and_both_rules(folder, model):
    few = random_clip(1, frames=3)
    assert model.see(few).shape == (1, 3 * 5, 64)
    many = random_clip(2, frames=20)
    assert model.see(many).shape == (1, 8 * 5, 64)
    other = load_backbone(f"{folder}?frame_rule=arange")
    assert not torch.equal(model.see(many), other.see(many))
    assert other.see(few).shape == (1, 8 * 5, 64) # three frames, repeated
    few.frames = few.frames[[0, 0, 0, 1, 1, 1, 2, 2]]
    assert torch.equal(other.see(few), model.see(few))
    many.frames = many.frames[[int(i * 20 / 8) for i in range(8)]]
    assert torch.equal(other.see(many), model.see(many))


def test_frames_of_a_folder_and_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    frames = np.stack([np.full((32, 48, 3), 20 * i + 10, np.uint8) for i in range(12)])
    (tmp_path/"frames").mkdir()
    for i, f in enumerate(frames): Image.fromarray(f).save(tmp_path/"frames"/f"{i:06d}.png")
    got, total = read_folder(tmp_path/"frames")
    assert total == 12 and (got == frames[frame_indices(12)]).all()
    for name in ("clip.mp4", "clip.avi"):
        with av.open(str(tmp_path/name), "w") as out:
            stream = out.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for f in frames: out.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
            out.mux(stream.encode())
        got, total = read_video(tmp_path/name, 12)
        assert total == 12 and got.shape == frames.shape and np.abs(got.astype(int) - frames).max() < 12
        assert (read_video(tmp_path/name, 8, "arange")[0] == got[frame_indices(12, 8, "arange")]).all()


# ---- prompts ----

def test_prompts(model):
    t = model.tokenizer
    before, after = model.prompt(QUESTION)
    assert before[0] == 1 and t.decode(before[1:]) == "USER: "
    assert t.decode(after) in (f"\n{QUESTION} ASSISTANT:", f" \n{QUESTION} ASSISTANT:")
    _, newline = video_prompt(t, model.video_id, QUESTION, "newline")
    assert t.decode(newline).endswith("scene?\nASSISTANT:")
    for tokens in (before, after, newline): assert 1 not in tokens[1:] and 2 not in tokens and max(tokens) < SMALL
    for bad in ("<video>", "what <video> is it"):
        with pytest.raises(FeatsdError, match="expected no <video>"): model.prompt(bad)


def test_prompts_are_those_of_the_class_that_the_checkpoint_names(tmp_path):
    write_videollava(tmp_path)
    file = tmp_path/"tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer"})) # as on the hub
    own, study = load_backbone(tmp_path), load_backbone(f"{tmp_path}?prompt=study")
    text = f"USER: <video>\n{QUESTION} ASSISTANT:"
    for m, t in ((own, AutoTokenizer.from_pretrained(tmp_path)), (study, read_tokenizer(tmp_path))):
        before, after = m.prompt(QUESTION)
        assert [*before, m.video_id, *after] == [1, *t.encode(text, add_special_tokens=False)]
    assert own.prompt(QUESTION) != study.prompt(QUESTION)
    assert own.name == tmp_path.name and study.name.endswith("(prompt=study)") and own.model_hash != study.model_hash
    assert own.tokenizer_hash == study.tokenizer_hash


def test_real_ids_and_real_counts():
    "At the real sizes a question costs 8 x 257 placeholder ids"
    before, after = video_prompt(golden_tokenizer(("<image>", "<video>", "<pad>")), 32001, QUESTION)
    assert before[:4] == [1, 3148, 1001, 29901] and after[-5:] == [319, 1799, 9047, 13566, 29901]
    assert 8 * ((224 // 14) ** 2 + 1) == 2056


# ---- the model ----

def by_transformers(lm, model, clip, question, n=10):
    "Answer of transformers' own generate to expanded placeholders, told to say words only"
    before, after = model.prompt(question)
    pixels = model.pictures(clip.frames)[None]
    per_frame = (VISION["image_size"] // VISION["patch_size"]) ** 2 + 1
    ids = torch.tensor([[*before, *[model.video_id] * (per_frame * pixels.shape[1]), *after]])
    out = lm.generate(input_ids=ids, pixel_values_videos=pixels, max_new_tokens=n, do_sample=False, eos_token_id=2,
                      pad_token_id=0,
                      suppress_tokens=list(range(SMALL, SMALL + 32)))
    return out[0, ids.shape[1]:].tolist()


def test_answers_are_those_of_transformers(saved, model):
    clips = [random_clip(1), random_clip(2, frames=4)]
    prefixes = [model.encode(c, q) for c in clips for q in (QUESTION, "Why?")]
    answers = model.generate(prefixes, 10)
    for (c, q), a in zip([(c, q) for c in clips for q in (QUESTION, "Why?")], answers):
        assert a.ids.tolist() == by_transformers(saved[1], model, c, q)[:len(a.ids)] and len(a.ids) <= 10


@pytest.mark.parametrize("names,position_ids,present", [
    ("hub", False,
     ["language_model.lm_head.weight", "language_model.model.norm.weight",
      "video_tower.vision_model.pre_layrnorm.weight"]),
    ("hub", True, ["video_tower.vision_model.embeddings.position_ids"]),
    ("today", False, ["lm_head.weight", "model.language_model.norm.weight", "model.video_tower.pre_layrnorm.weight"])])
def test_every_naming_is_the_same_model(tmp_path, model, names, position_ids, present):
    write_videollava(tmp_path/"other", names, position_ids=position_ids)
    assert set(present) <= tensor_shapes(tmp_path/"other").keys()
    other, clip = load_backbone(tmp_path/"other"), random_clip(3)
    a, b = model.encode(clip, QUESTION), other.encode(clip, QUESTION)
    assert torch.equal(a.embeds, b.embeds) and torch.equal(model.generate([a], 6)[0].ids, other.generate([b], 6)[0].ids)


@pytest.mark.parametrize("quant,kind", [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt")])
def test_quantised_on_the_cpu(folder, model, quant, kind):
    small, clip = VideoLLaVA.from_pretrained(folder, quant, device="cpu"), random_clip(1)
    for part in (small.decoder.layers[0].mlp.up_proj, small.tower.encoder.layers[0].mlp.fc1):
        assert type(part).__name__ == kind
    assert type(small.head.lm_head) is torch.nn.Linear
    assert small.head.lm_head.weight.dtype == small.dtype == torch.float16
    assert 1 <= len(small.generate([small.encode(clip, QUESTION)], 6)[0].ids) <= 6
    close = torch.nn.functional.cosine_similarity(small.see(clip).float(), model.see(clip), dim=-1)
    assert close.min() > (.9 if quant == "4bit" else .999)
    assert memory_report(small)["total"]["bytes"] < .6 * memory_report(model)["total"]["bytes"]


def test_the_head_ends_before_the_placeholders(folder, model):
    whole = VideoLLaVA.from_pretrained(folder, all_ids=True)
    assert model.head.vocab_size == SMALL and whole.head.vocab_size == SMALL + 32
    h = torch.randn(3, 64)
    assert near(model.head.logits(h), whole.head.logits(h)[:, :SMALL], 64) and model.head.hash != whole.head.hash != ""
    assert memory_report(model)["total"]["parameters"] == sum(p.numel() for p in model.lm.parameters()) < 2e6


# ---- wrong folders ----

def edit(path, **fields):
    config = json.loads((path/"config.json").read_text())
    (path/"config.json").write_text(json.dumps({**config, **fields}))


def drop(path, name):
    from safetensors.torch import load_file
    tensors = load_file(path/"model.safetensors")
    assert name in tensors
    write_tensors(path, {k: v for k, v in tensors.items() if k != name})


def config_of(path, part): return json.loads((path/"config.json").read_text())[part]


BROKEN = {
    "wrong kind": (lambda p: edit(p, model_type="llava"), "model_type 'llava', expected 'video_llava'"),
    "already quantised": (lambda p: edit(p, quantization_config={"load_in_4bit": True}), "quantised already"),
    "no weights": (lambda p: (p/"model.safetensors").unlink(), "no weights"),
    "another model": (lambda p: write_tensors(p, {"lm_head.weight": torch.zeros(2, 2)}),
                      "not a Video-LLaVA checkpoint"),
    "a tensor missing": (lambda p: drop(p, "multi_modal_projector.linear_2.bias"), "1 tensors missing"),
    "tower of another size": (lambda p: edit(p, vision_config={**config_of(p, "vision_config"), "hidden_size": 128}),
                              "tower, decoder or config of another model"),
    "other picture size": (lambda p: edit(p, vision_config={**config_of(p, "vision_config"), "image_size": 42}),
                           "config.json says (10, 64)"),
    "tokenizer without <video>": (lambda p: small_tokenizer().save_pretrained(p), "<video> at"),
    "tokenizer of another vocabulary": (
        lambda p: small_tokenizer(("<image>", "<video>", "<pad>"), SMALL - 1).save_pretrained(p),
        f"<video> at {SMALL}"),
    "no tokenizer": (lambda p: (p/"tokenizer.json").unlink(), "no tokenizer, expected"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_folders(folder, tmp_path, name):
    change, expected = BROKEN[name]
    path = tmp_path/"broken"
    shutil.copytree(folder, path)
    change(path)
    with pytest.raises((FeatsdError, FileNotFoundError)) as e: VideoLLaVA.from_pretrained(path)
    assert expected in str(e.value) and "\n" not in str(e.value) and str(path) in str(e.value)


# ---- the pair ----

def test_extraction_with_the_pair(folder, model, tmp_path):
    write_eventgpt(tmp_path/"draft")
    pair = Pair(EventGPT.from_pretrained(tmp_path/"draft"), model, "tiny")
    assert pair.shared_vocab == SMALL == pair.draft.head.vocab_size == pair.target.head.vocab_size
    clips, questions = [random_clip(s, frames=5 + s) for s in range(3)], [QUESTION, "Why?"]
    out = pair_states(pair, clips, questions, 6)
    assert len(out) == 6
    for i, p in enumerate(out):
        one = model.generate([model.encode(clips[i // 2], questions[i % 2])], 6)[0]
        assert p.target_ids.tolist() == one.ids.tolist() and max(p.target_ids) < SMALL
        assert p.streams["target"].shape == p.streams["draft_forced"].shape == (len(one.ids), 64)
        assert torch.equal(model.head.logits(p.streams["target"]).argmax(-1), one.ids)
        assert torch.equal(pair.draft.head.logits(p.streams["draft_free"]).argmax(-1), torch.from_numpy(p.draft_ids))


def test_a_whole_extraction(folder, tmp_path, monkeypatch):
    "The room that writes stores takes the pair as it takes the built-in one"
    from featsd.data.store import open_states
    write_eventgpt(tmp_path/"draft")

    class Clips(list):
        name, split, questions = "made", "test", [QUESTION, "Why?"]
        @property
        def clip_ids(self): return [c.id for c in self]
    monkeypatch.setattr(importlib.import_module("featsd.extract"), "open_clips", lambda *a,
                        **k: Clips(random_clip(s, duration_us=300_000) for s in range(3)))
    path = extract(tmp_path/"out",
                   pair=f"draft={tmp_path/'draft'}?max_duration_us=none&frames=1,target={folder}?frames=4",
                   split="test", quant="fp32",
                   max_new_tokens=5, chunk_size=4, progress=False)
    states = open_states(path)
    assert len(states) == 6 and states.manifest["draft"]["name"] == "draft (frames=1)"
    assert states.manifest["target"]["name"] == "tiny (frames=4)"
    assert states.manifest["shared_vocab"] == SMALL


def test_answers_from_the_shell(folder, model, tmp_path):
    clip = random_clip(4)
    for i, f in enumerate(clip.frames): Image.fromarray(f).save(tmp_path/f"{i:06d}.png")
    run = lambda *a: subprocess.run([sys.executable, "-m", "featsd.models.videollava", *map(str, a)],
                                    capture_output=True, text=True, timeout=HANG)
    got = run(folder, "--video", tmp_path, "--question", "Why?", "--max_new_tokens", 5)
    assert got.returncode == 0, got
    assert got.stdout.strip() == model.decode_text(model.generate([model.encode(clip, "Why?")], 5)[0].ids), got
    got = run(folder, "--video", tmp_path/"none.mp4")
    assert got.returncode == 2 and got.stderr.count("\n") == 1 and "no such video file" in got.stderr, got


@pytest.mark.parametrize("how", ["playlist", "hls", "text", "empty", "cut"])
def test_a_video_leads_to_no_other_file(folder, tmp_path, monkeypatch, how):
    "FFmpeg would open what a playlist names; the answering command opens one container and nothing else"
    av = pytest.importorskip("av")
    from featsd.models.videollava import ask_videollava
    with av.open(str(tmp_path/"good.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * i, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    ask_videollava(str(folder), str(tmp_path/"good.mp4"), "Why?", max_new_tokens=2)
    good = (tmp_path/"good.mp4").read_bytes()
    content = {"playlist": b"ffconcat version 1.0\nfile good.mp4\n",
               "hls": b"#EXTM3U\n#EXTINF:2,\ngood.mp4\n#EXT-X-ENDLIST\n", "text": b"hello " * 99, "empty": b"",
               "cut": good[:100]}
    (tmp_path/"bad.mp4").write_bytes(content[how])
    opened = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda file, *a, **kw: opened.append((file, kw)) or real(file, *a, **kw))
    with pytest.raises(FeatsdError) as e: ask_videollava(str(folder), str(tmp_path/"bad.mp4"), "Why?", max_new_tokens=2)
    assert str(tmp_path/"bad.mp4") in str(e.value) and "\n" not in str(e.value)
    assert opened and all(hasattr(f, "read") and kw["format"] == "mov" for f, kw in opened) # bytes, and no guessing
