"The shipped weights of the built-in pair: accuracy floors, and a language null as strong as that of the real answers"
import numpy as np
import pytest
import torch

from featsd.data.answers import agreement, tau, top1
from featsd.models.words import NGramTable
from featsd.data.world import PocketClips, QUESTIONS
from featsd.models.backbone import load_pair
from featsd.models.pocket import TrainingBar, record_clips, see_all, token_accuracy

# On the real answers, first half fits, second half tests (`nbs/lab/real_answers.ipynb` computes them).
REAL_TOP1, REAL_TAU = .68, {3: 2.34, 5: 2.60, 8: 2.86}


@pytest.fixture(scope="module")
def pair(): return load_pair("pocket")


def test_weights_fit_the_package(pair):
    from pathlib import Path

    import featsd.models.pocket as module
    size = sum(f.stat().st_size for f in (Path(module.__file__).parent/"pocket_weights").rglob("*") if f.is_file())
    print(f"shipped weights: {size / 1e6:.1f} MB")
    assert size <= 25e6


@pytest.mark.parametrize("role,floor", [("target", .95), ("draft", .93)])
def test_held_out_token_accuracy(pair, role, floor):
    model = getattr(pair, role)
    images, _, scenes = record_clips(model.sensor, PocketClips("test", 60), TrainingBar("", quiet=True))
    accuracy = token_accuracy(model, see_all(model.tower, images), scenes)
    print(role, accuracy)
    assert accuracy["all"] >= floor


def answers_of(model, question, n, split="train", batch=100):
    "Greedy answers of a model to one question on n clips"
    clips, out = PocketClips(split, n), []
    for start in range(0, n, batch):
        some = range(start, min(start + batch, n))
        out += [a.ids.tolist() for a in model.generate([model.encode(clips[i], question) for i in some])]
    return out


def check_null(pair, question):
    answers = answers_of(pair.target, QUESTIONS[question], 1100)
    table = NGramTable(answers[:550], order=7)
    got = {"top1": top1(table.next, answers[550:]), **{g: tau(table.propose, answers[550:], g) for g in REAL_TAU}}
    print(f"question {question}: n-gram top-1 {got['top1']:.3f}, tau " + " / ".join(f"{got[g]:.2f}" for g in REAL_TAU))
    assert abs(got["top1"] - REAL_TOP1) <= .04
    for g, real in REAL_TAU.items(): assert abs(got[g] / real - 1) <= .10


@pytest.mark.parametrize("question", [0])
def test_language_null_is_as_strong_as_the_real_one(pair, question): check_null(pair, question)


@pytest.mark.slow
@pytest.mark.parametrize("question", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_language_null_of_every_question(pair, question): check_null(pair, question)


def test_raw_tokens_agree_nowhere(pair):
    clips = PocketClips("test", 20)
    prompts = [(clips[i], q) for i in range(20) for q in QUESTIONS[:3]]
    said = [a.ids.tolist() for a in pair.draft.generate([pair.draft.encode(c, q) for c, q in prompts])]
    meant = [a.ids.tolist() for a in pair.target.generate([pair.target.encode(c, q) for c, q in prompts])]
    assert agreement(said, meant).consecutive == 0


def test_two_loads_are_one_pair(pair):
    again = load_pair("pocket")
    assert again.target.model_hash == pair.target.model_hash and again.target.head.hash == pair.target.head.hash
    clip = PocketClips("test", 1)[0]
    a, b = (p.target.prefill([p.target.encode(clip, QUESTIONS[0])]).h for p in (pair, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize("quant", ["bf16", "8bit", "4bit"])
def test_quantised_pairs_answer(quant):
    pair, clip = load_pair("pocket", quant=quant), PocketClips("test", 1)[0]
    for model in (pair.draft, pair.target):
        answer = model.generate([model.encode(clip, QUESTIONS[0])], 8)[0]
        assert len(answer.ids) == 8 and np.isfinite(answer.margins.numpy()).all()
        assert model.head.lm_head.weight.dtype == torch.bfloat16 # heads are never quantised


def test_second_sensor_is_worth_its_points(pair, tmp_path):
    "The aligned draft beats itself with another clip's events by 10 points of token top-1, and words alone by 8"
    from featsd.data.store import open_states
    from featsd.extract import extract
    from featsd.nulls import measure
    from featsd.train import train_adapter
    common = dict(output_dir=tmp_path, pair=pair, quant="fp32", progress=False)
    train = open_states(extract(split="train", max_samples=50, **common))
    test = open_states(extract(split="test", max_samples=20, wrong_clip=True, **common))
    run = train_adapter(train, adapter_level=1, loss="kl", num_epochs=8, output_dir=str(tmp_path/"ck"), progress=False)
    m = measure(run["best_model"], test, train, streams=("draft_forced",), n_boot=100)
    top1_of = lambda name: m.row(name).values["token_top1"].value
    right, wrong = top1_of(m.name), top1_of("wrong-clip sensor")
    words = max(top1_of("n-gram table"), top1_of("n-gram table by question"))
    print(f"token top-1: right clip {right:.3f}, another clip's events {wrong:.3f}, n-gram table {words:.3f}")
    assert right >= wrong + .10 and right >= words + .08
