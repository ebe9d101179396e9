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

from featsd.models.backbone import Backbone, Prefix, memory_report
from featsd.models.lean import lean

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


def ms(f, runs=20):
    "Median of wall time, the device at rest before and after"
    took = []
    for _ in range(runs + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - start))
    return sorted(took[3:])[runs // 2]


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
        one = ms(lambda: step(1))
        figures[name] = {"prefill_ms": ms(lambda m=m: m.prefill([x]), 5), "step_ms": one,
                         "v": {k: ms(lambda k=k: step(k)) / one for k in (*range(1, 10), 22)}}
    busy = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with busy: step(1)
    on_device = sum(e.device_time_total for e in busy.key_averages()) / 1e3 # ms
    figures["launch_bound_share"] = max(0., 1 - on_device / figures["lean"]["step_ms"])
    FIGURES["7B shape, bf16"] = figures
