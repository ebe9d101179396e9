"""What needs an accelerator: `pytest -m gpu`; skipped without one. Writes figures/gpu.json

The family table's smallest and largest member, the kernels of 4 and 8 bit, and a decoder of 7B shape with random weights:
cost of a wide step, of a prefill, memory, and how much of a step is launching."""
import json
import time
from pathlib import Path

import pytest
import torch
import transformers as T
from family_checks import Checks, failed, load, row
from tiny_checkpoints import small_tokenizer

from featsd.batches import fit_steps
from featsd.decode import AdversarialDraft, NullDraft, OracleDraft, Prompt, plain_decode
from featsd.models.backbone import Backbone, Prefix, memory_report
from featsd.models.lean import lean
from featsd.race import step_facts
from featsd.serve import serve_queue

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
OUT, FIGURES = Path(__file__).parents[1]/"figures"/"gpu.json", {}


@pytest.fixture(scope="module", autouse=True)
def written():
    yield
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": T.__version__}
    OUT.write_text(json.dumps({"about": about, **FIGURES}, indent=1) + "\n")


@pytest.mark.parametrize("name", ["bloom", "qwen3_5_moe"])
def test_the_smallest_and_the_largest_family(name):
    r = row(name)
    assert not failed(r), r
    FIGURES[name] = r


@pytest.mark.parametrize("quant", ["4bit", "8bit", "bf16"])
@torch.no_grad()
def test_kernels_of_low_precision(quant, tmp_path):
    "Ids are those of generate with the same kernels, up to ties"
    m = load("llava", tmp_path/"m", quant=quant, device="cuda")
    FIGURES[f"ids_{quant}"] = ids = Checks(m).ids()
    same, all_ = map(int, ids.split("/"))
    assert same >= .9 * all_


@torch.no_grad()
def test_a_queue_in_rows_says_what_one_at_a_time_says(tmp_path):
    m = load("qwen2", tmp_path/"m", device="cuda")
    prompts = [Prompt(p) for p in Checks(m).ps * 2]
    alone = [plain_decode(m, p, max_new_tokens=12).ids for p in prompts]
    for drafter, gamma in ((None, 0), (NullDraft(), 3), (OracleDraft(m, 12), 3), (AdversarialDraft(m, 12), 3)):
        assert serve_queue(m, prompts, 2, drafter, gamma, 12).ids == alone


def ms(*fs, runs=40, warm=10):
    "Medians of wall time of things done in turns, the device at rest before and after each"
    took = [[] for _ in fs]
    for _ in range(runs + warm):
        for f, t in zip(fs, took):
            torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            torch.cuda.synchronize()
            t.append(1e3 * (time.perf_counter() - start))
    return [sorted(t[warm:])[runs // 2] for t in took]


@torch.no_grad()
def test_a_decoder_of_7b_shape():
    config = T.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                           num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048)
    with torch.device("cuda"): lm = T.LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    slow = Backbone(lm, lm.model, small_tokenizer(), "7B shape")
    x = Prefix(torch.randn(1, 600, 4096, device="cuda", dtype=torch.bfloat16) / 64, 0, "c")
    figures = {"parameters": memory_report(slow)["total"]["parameters"], "bytes": memory_report(slow)["total"]["bytes"]}
    assert 6.7e9 < figures["parameters"] < 6.8e9 and figures["bytes"] >= 2 * figures["parameters"]
    for name, m in (("transformers", slow), ("lean", lean(slow))):
        state = m.prefill([x])
        def step(k, m=m, state=state):
            m.step(state, torch.full((1, k), 7, device="cuda"))
            m.rollback(state, [600])
        wide = (*range(1, 10), 22)
        took = ms(*(lambda k=k: step(k) for k in wide)) # one after the other, so that all see the same clocks
        prefill, = ms(lambda m=m: m.prefill([x]), runs=5)
        figures[name] = {"prefill_ms": prefill, "step_ms": took[0], "v": {k: t / took[0] for k, t in zip(wide, took)}}
    points, fast = [], lean(slow)
    for rows in (1, 4, 16):
        state = fast.prefill([x] * rows)
        def wide(k, rows=rows, state=state):
            fast.step(state, torch.full((rows, k), 7, device="cuda"))
            fast.rollback(state, [600] * rows)
        ks = (1, 2, 4, 8)
        took = ms(*(lambda k=k: wide(k) for k in ks), runs=20)
        points += [(1, rows * k, rows * (600 + k), t) for k, t in zip(ks, took)]
    fit = fit_steps(points)
    figures["steps"] = {"points": [[n, k, t] for _, k, n, t in points], "fit": str(fit)}
    figures |= step_facts(fast)
    assert figures["device"].startswith("cuda") and figures["copy_gb_s"] > 100
    busy = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with busy: step(1)
    on_device = sum(e.device_time_total for e in busy.key_averages()) / 1e3 # ms
    figures["launch_bound_share"] = max(0., 1 - on_device / figures["lean"]["step_ms"])
    FIGURES["7B shape, bf16"] = figures
