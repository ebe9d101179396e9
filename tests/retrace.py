"A training that keeps to the weights of another, step by step: over steps rounding grows, within one it cannot"
import contextlib
import hashlib
import json
import os
import runpy
import sys
from pathlib import Path

import torch
from closeness import off

FILE, START = "RETRACE", "RETRACE_START" # in the environment: what to keep to, and how many of its steps are done


def flat(tensors): return torch.cat([t.detach().flatten() for t in tensors])


@contextlib.contextmanager
def stepping(then):
    "Inside, each step of AdamW calls `then` with its parameters and the gradient it was given"
    real = torch.optim.AdamW.step
    def step(self, *args, **kw):
        ps = [p for g in self.param_groups for p in g["params"]]
        grad = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in ps)
        out = real(self, *args, **kw)
        with torch.no_grad(): then(ps, grad)
        return out
    torch.optim.AdamW.step = step
    try: yield
    finally: torch.optim.AdamW.step = real


@contextlib.contextmanager
def recorded(file):
    "What trains inside leaves gradient and new weights of each step"
    steps = []
    with stepping(lambda ps, grad: steps.append((grad, flat(ps)))): yield steps
    torch.save(steps, file)


def keep_to(file, start, said): # a context
    "Each step says in `said` how far its gradient is off and which weights it made; then they are those of `file`"
    steps = iter(torch.load(file, weights_only=True)[start:])
    def then(ps, grad):
        want, weights = next(steps)
        sizes = [p.numel() for p in ps]
        each = zip(grad.split(sizes), want.split(sizes), strict=True)
        apart = max(off(g, w) for g, w in each) # each tensor by its own size
        made = hashlib.sha256(flat(ps).numpy().tobytes()).hexdigest()
        with open(said, "a") as f: f.write(json.dumps([apart, made]) + "\n")
        for p, w in zip(ps, weights.split(sizes), strict=True): p.copy_(w.view_as(p))
    return stepping(then)


def told(file, ranks): # of each step: how far off, the worst of all processes
    "The processes made the same weights, to the bit"
    steps = [[json.loads(line) for line in Path(f"{file}.{r}").read_text().splitlines()] for r in range(ranks)]
    assert all(len(s) == len(steps[0]) for s in steps)
    assert all(len({made for _, made in step}) == 1 for step in zip(*steps))
    return [max(apart for apart, _ in step) for step in zip(*steps)]


if __name__ == "__main__":
    file, rank = os.environ[FILE], os.environ.get("RANK") # without a rank this one only starts the others
    with keep_to(file, int(os.environ.get(START, 0)), f"{file}.{rank}") if rank else contextlib.nullcontext():
        sys.argv.insert(1, "train")
        runpy.run_module("featsd", run_name="__main__", alter_sys=True)
