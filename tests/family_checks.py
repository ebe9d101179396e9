"""What every family must pass, and the table of it: `python tests/family_checks.py` writes figures/families.json

ids: of `generate`, 3 prompts (two clips of other picture sizes), equal/all · wide: largest |Δlogit| of a step of five tokens
against five of one · back: the same after two rollbacks, against a fresh state and against one forward of prompt and answer ·
turns: ids of two answers in turns, with a `generate` in between · shared: |Δlogit| of a prompt whose pictures are shared ·
head: |Δlogit| of `head.logits(state)` against the model's own · batch: ids of three prompts together · ragged: |Δlogit| of
rows that forget and read different numbers of tokens · ends: where a second end token stopped both · engine: prompts
identical under the null, oracle and adversarial drafter, and the certificate"""
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from families import E, TEXT, VISION, write_text, write_vision

from featsd.base.core import FeatsdError
from featsd.data.clips import Clip
from featsd.data.events import Events
from featsd.decode import AdversarialDraft, NullDraft, OracleDraft, Prompt, certify, speculative_decode
from featsd.models.generic import Generic

N = 12 # tokens of an answer
FAR = 1e-4 # of logits: float32, another order of sums
QUESTIONS = ("what is it?", "where is the car, and how fast?")
COLUMNS = ("ids", "wide", "back", "turns", "shared", "head", "batch", "ragged", "ends", "engine")
REFUSED = {"recurrent_gemma": "probe 'isolated'", "rwkv": "probe 'memory'"} # family → what says so
if importlib.util.find_spec("torchvision") is None: REFUSED |= dict.fromkeys(("mistral3", "pixtral"), "torchvision")
SUFFIX = {"paligemma": 1} # token type of an answer, where it is not 0
NO_TEMPLATE = "{pictures}{question} "


def a_clip(seed, height, width):
    g = np.random.default_rng(seed)
    x, y, p = (g.integers(0, n, 400).astype(np.int32) for n in (width, height, 2))
    frames = g.integers(0, 256, (6, height, width, 3), dtype=np.uint8)
    return Clip(f"clip{seed}", frames, Events(x, y, np.arange(400) * 100, p.astype(np.uint8)), f"sequence{seed}")


def load(name, folder, **options):
    "The family's tiny checkpoint, loaded as any"
    if name in TEXT: write_text(name, folder)
    else:
        write_vision(name, folder)
        options = dict(frames=2, template=None if VISION[name][4] else NO_TEMPLATE) | options
    return Generic.from_pretrained(folder, **options)


def equal(ours, own): # "36/36": tokens alike of all
    same = sum(sum(a == b for a, b in zip(x, y)) if len(x) == len(y) else 0 for x, y in zip(ours, own))
    return f"{same}/{sum(map(len, own))}"


def far(a, b): return float((a - b).abs().max())


class Checks:
    "One family's model with three prompts of two clips, and what `generate` says to them"
    questions = QUESTIONS

    def __init__(self, m):
        self.m, self.clips = m, (a_clip(1, 40, 48), a_clip(2, 48, 64))
        self.ps = [*m.encode_all(self.clips[0], QUESTIONS), m.encode(self.clips[1], QUESTIONS[0])]
        self.own = [m.theirs(p, N) for p in self.ps]
        self.more = torch.randint(97, 122, (3, 8), generator=torch.Generator().manual_seed(3)).to(m.device)

    def tensor(self, x): return torch.tensor(x, device=self.m.device)
    def logits(self, h): return self.m.head.logits(h)
    def whole(self, p, ids): # [n, V] the model's own logits of one forward, without a cache: which token follows each of ids
        inputs = {k: v for k, v in p.inputs.items() if k != "input_ids"}
        ids, n = torch.cat([p.inputs["input_ids"], ids], 1), ids.shape[1]
        for k in ("token_type_ids", "mm_token_type_ids"):
            if k in inputs: inputs[k] = torch.nn.functional.pad(inputs[k], (0, n), value=SUFFIX.get(self.m.kind, 0))
        if "cross_attention_mask" in inputs:
            x = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([x, x[:, -1:].expand(-1, ids.shape[1] - x.shape[1], -1, -1)], 1)
        if "position_ids" in self.m.takes: inputs["position_ids"] = self.m.positions({"input_ids": ids, **inputs})
        return self.m.lm(input_ids=ids, use_cache=False, **inputs).logits[0].float()

    def ids(self): return equal([self.m.generate([p], N)[0].ids.tolist() for p in self.ps], self.own)
    def batch(self): return equal([a.ids.tolist() for a in self.m.generate(self.ps, N)], self.own)

    def head(self):
        p, more = self.ps[2], self.more[:1, :5]
        state = self.m.prefill([p])
        h = torch.cat([state.h[:, None], self.m.step(state, more)], 1)[0]
        return far(self.logits(h), self.whole(p, more)[-6:])

    def wide(self):
        one, five = self.m.prefill(self.ps[2:]), self.m.prefill(self.ps[2:])
        narrow = torch.cat([self.m.step(one, self.more[:1, k:k + 1]) for k in range(5)], 1)
        return far(self.logits(narrow), self.logits(self.m.step(five, self.more[:1, :5])))

    def back(self):
        "Two rollbacks, one inside the answer and one to its start"
        m, p, more = self.m, self.ps[2], self.more[:1]
        state = m.prefill([p])
        n = int(state.lengths[0])
        m.step(state, more[:, :5]); m.rollback(state, [n + 2]); m.step(state, more[:, 5:8]); m.rollback(state, [n])
        m.step(state, more[:, :3]); m.rollback(state, [n + 1])
        again = self.logits(m.step(state, more[:, 1:6]))[0]
        fresh = m.prefill([p])
        once = self.logits(m.step(fresh, more[:, :6]))[0, 1:]
        return max(far(again, once), far(again, self.whole(p, more[:, :6])[-5:]))

    def turns(self):
        m, some = self.m, self.ps[1:]
        states, said = [m.prefill([p]) for p in some], [[], []]
        for k in range(N):
            for state, ids in zip(states, said):
                if ids and (ids[-1] in m.eos_ids): continue
                ids.append(int(self.logits(state.h)[0].argmax()))
                m.step(state, self.tensor([ids[-1:]]))
            if k == 3: m.theirs(self.ps[0], 4)
        return equal(said, self.own[1:])

    def shared(self):
        if not self.ps[0].inputs.keys() & {"pixel_values"}: return None
        both = [self.m.prefill([p]).h for p in self.ps[:2]]
        alone = [self.m._begin(p.inputs, p.position).h for p in self.ps[:2]]
        return far(self.logits(torch.cat(both)), self.logits(torch.cat(alone))) if self.ps[0].shared else "not shared"

    def ragged(self):
        m, more, rows = self.m, self.more, []
        if m.together: return "in turn"
        state = m.prefill(self.ps)
        start = state.lengths
        m.step(state, more[:, :4])
        m.rollback(state, start + self.tensor([0, 3, 1]))
        m.step(state, more[:, 4:7], self.tensor([3, 0, 2]))
        m.rollback(state, state.lengths - self.tensor([1, 0, 0]))
        h = self.logits(m.step(state, more[:, 7:8]))[:, 0]
        for b, kept in enumerate(([*more[0, 4:6]], [*more[1, :3]], [*more[2, :1], *more[2, 4:6]])):
            alone = m.prefill([self.ps[b]])
            rows.append(self.logits(m.step(alone, self.tensor([[*map(int, kept), int(more[b, 7])]])))[0, -1])
        return far(h, torch.stack(rows))

    def ends(self):
        "A second end token, which generate said itself"
        long = max(self.own, key=lambda ids: len(set(ids)))
        p, at = self.ps[self.own.index(long)], next((i for i, t in enumerate(long) if i >= 2 and t not in long[:i]), None)
        if at is None: return None
        before = self.m.eos_ids
        self.m.eos_ids = (E, long[at])
        try: ours, theirs = self.m.generate([p], N)[0].ids.tolist(), self.m.theirs(p, N)
        finally: self.m.eos_ids = before
        return at + 1 if ours == theirs == long[:at + 1] else f"ours {len(ours)}, theirs {len(theirs)}"

    def engine(self):
        m, prompts, same = self.m, [Prompt(p) for p in self.ps], 0
        for d in (NullDraft(), OracleDraft(m, N), AdversarialDraft(m, N)):
            same += sum(speculative_decode(m, d, p, 3, max_new_tokens=N).ids == ids for p, ids in zip(prompts, self.own))
        return f"{same}/{3 * len(prompts)} {certify(m, OracleDraft(m, N), prompts[1:2], 3, N).verdict}"


@torch.no_grad()
def row(name, only=COLUMNS)->dict:
    "One family's line of the table"
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try: m = load(name, folder)
        except FeatsdError as e: return {"family": name, "refused": str(e).split(": ", 1)[1]}
        c = Checks(m)
        head = m.head.form + (f" {m.head.value:g}" if m.head.form != "plain" else "")
        return {"family": name, "class": type(m.lm).__name__, "form": head, "seconds": round(time.perf_counter() - began, 2),
                **{what: getattr(c, what)() for what in only}}


def failed(r): # names of the columns that are no pass
    def bad(v):
        if isinstance(v, float): return not v <= FAR
        if isinstance(v, str) and "/" in v:
            a, b = v.split()[0].split("/")
            return a != b or v.endswith("broken")
        return v not in (None, "not shared", "in turn") and not isinstance(v, int)
    return [k for k in COLUMNS if k in r and bad(r[k])]


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*VISION, *TEXT]
    rows = []
    for name in names:
        rows.append(row(name))
        print(json.dumps(rows[-1]), failed(rows[-1]) or "", flush=True)
    if not sys.argv[1:]:
        out = Path(__file__).parents[1]/"figures"/"families.json"
        for r in rows: r.pop("seconds", None)
        about = {"transformers": __import__("transformers").__version__, "torch": torch.__version__, "tokens": N}
        out.write_text(json.dumps({"about": about, "columns": COLUMNS, "rows": rows}, indent=1) + "\n")
        n, lost = sum("refused" in r for r in rows), sum(bool(failed(r)) for r in rows)
        print(f"{len(rows)} families, {n} refused, {lost} failed → {out}")
