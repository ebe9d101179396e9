"""Adapters: exact architecture, no look into the future, losses that keep their laws, files that are data only"""
import ast
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import near, tol
from patience import HANG, until
from test_hostile import bounded
import torch.nn.functional as F

import featsd.adapters as A
import featsd.own  # noqa: F401, its levels register themselves

D = 32
CHAIN = 10 * D # the longest chain of operations of any level here: ten products of width D
SMALL = {1: dict(bottleneck_dim=8), 2: dict(bottleneck_dim=8), 3: dict(bottleneck_dim=12),
         4: dict(num_heads=4, ffn_dim=24)}
def small(level, **kw): return A.create_adapter(level, D, **(SMALL[level] | kw))

def randomised(level, seed=0, **kw):
    "An adapter none of whose weights is at its starting value"
    f, g = small(level, **kw), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in f.parameters(): p.copy_(torch.randn(p.shape, generator=g) * .3)
    return f.eval()

class Head:
    hash, hidden_size = "f" * 64, D
    def __init__(self, V=50): self.W = torch.randn(V, D, generator=torch.Generator().manual_seed(3))
    def logits(self, h): return h.float() @ self.W.T


# --- architecture ---------------------------------------------------------------------------------------------------

def norm(name, n): return {f"{name}.weight": (n,), f"{name}.bias": (n,)}
def block(name, n=4096, b=256):
    return {f"{name}.alpha_param": (), f"{name}.down_proj.weight": (b, n),
            f"{name}.up_proj.weight": (n, b)} | norm(f"{name}.layer_norm", n)

def expected_keys(level, blocks=None):
    n, out = 4096, {}
    if level == 1: return block("layers.0") | norm("final_norm", n)
    if level == 2:
        for i in range(3): out |= block(f"blocks.{i}")
        return out | norm("final_norm", n)
    if level == 3:
        for i in range(blocks or 2):
            out |= {f"blocks.{i}.0.weight": (1024, n), f"blocks.{i}.4.weight": (n, 1024),
                    f"alphas.{i}": ()} | norm(f"blocks.{i}.1", 1024)
        return out | norm("input_norm", n) | norm("final_norm", n)
    out = {"alpha": (), "layers.0.attn.in_proj_weight": (3 * n, n), "layers.0.attn.in_proj_bias": (3 * n,)}
    for name, i, o in (("layers.0.attn.out_proj", n, n), ("layers.0.ffn.0", n, 2048), ("layers.0.ffn.3", 2048, n),
                       ("output_proj.1", n, n)):
        out |= {f"{name}.weight": (o, i), f"{name}.bias": (o,)}
    return out | norm("layers.0.attn_norm", n) | norm("layers.0.ffn_norm", n) | norm("output_proj.0", n)

@pytest.mark.parametrize("level,blocks,count", [(1, None, 2_113_537), (2, None, 6_324_227), (3, None, 16_797_698),
                                                (3, 3, 25_188_355), (4, None, 100_714_497)])
def test_names_shapes_and_counts_at_4096(level, blocks, count):
    with torch.device("meta"): f = A.create_adapter(level, num_blocks=blocks)
    assert {k: tuple(v.shape) for k, v in f.state_dict().items()} == expected_keys(level, blocks)
    assert f.get_num_parameters() == count

def by_formula(level, w, h):
    "The same maps written a second time, from the names of the weights"
    ln = lambda x, name: F.layer_norm(x, (w[f"{name}.weight"].shape[0],), w[f"{name}.weight"], w[f"{name}.bias"])
    skip = lambda x: x @ w["residual_proj.weight"].T if "residual_proj.weight" in w else x
    if level in (1, 2):
        x, name = h, "layers" if level == 1 else "blocks"
        for i in range(1 if level == 1 else 3):
            p = f"{name}.{i}"
            y = F.gelu(ln(x, f"{p}.layer_norm") @ w[f"{p}.down_proj.weight"].T) @ w[f"{p}.up_proj.weight"].T
            x = (x if i else skip(x)) + w[f"{p}.alpha_param"] * y
        return ln(x, "final_norm")
    if level == 3:
        x = ln(h, "input_norm")
        for i in range(2):
            y = F.gelu(ln(x @ w[f"blocks.{i}.0.weight"].T, f"blocks.{i}.1")) @ w[f"blocks.{i}.4.weight"].T
            x = (x if i else skip(x)) + w[f"alphas.{i}"] * y
        return ln(x, "final_norm")
    p, T, H = "layers.0", h.shape[-2], 4
    lin = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    q, k, v = (ln(h, f"{p}.attn_norm") @ w[f"{p}.attn.in_proj_weight"].T + w[f"{p}.attn.in_proj_bias"]).split(D, -1)
    heads = []
    for s in range(0, D, D // H):
        score = q[..., s:s + D // H] @ k[..., s:s + D // H].transpose(-1, -2) / (D // H) ** .5
        score = score.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        heads.append(score.softmax(-1) @ v[..., s:s + D // H])
    x = h + lin(torch.cat(heads, -1), f"{p}.attn.out_proj")
    x = x + lin(F.gelu(lin(ln(x, f"{p}.ffn_norm"), f"{p}.ffn.0")), f"{p}.ffn.3")
    return skip(h) + w["alpha"] * (lin(ln(x, "output_proj.0"), "output_proj.1") - skip(h))

@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("residual", ["identity", "linear"])
def test_forward_is_the_formula(level, residual):
    f, h = randomised(level, residual=residual), torch.randn(2, 5, D)
    near(f(h), by_formula(level, f.state_dict(), h), CHAIN)

@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_where_training_starts(level):
    f, h = small(level), torch.randn(2, 4, D)
    w = f.state_dict()
    if level == 4: assert torch.equal(w["output_proj.1.weight"], torch.eye(D)) and not w["output_proj.1.bias"].any()
    else: assert not any(v.any() for k, v in w.items() if k.endswith(("up_proj.weight", ".4.weight")))
    if level < 3: near(f.eval()(h), F.layer_norm(h, (D,)), D)
    assert all(v == torch.tensor(.1) for k, v in w.items() if "alpha" in k)

@pytest.mark.parametrize("bad,words", [(dict(level=0), "expected one of 1, 2, 3, 4"),
    (dict(level="five"), "expected one of"),
    (dict(level=1, hidden_dim=-4), "positive integer"), (dict(level=1, hidden_dim=4.0), "positive integer"),
    (dict(level=4, hidden_dim=30), "multiple"),
    (dict(level=2, num_heads=4), "takes no num_heads"), (dict(level=1, residual="twisted"), "'identity' or 'linear'"),
    (dict(level=3, alpha=float("nan")), "finite"), (dict(level=1, target_dim=0), "positive integer"),
    (dict(level=4, causal=1), "True or False")])
def test_bad_arguments_are_one_line(bad, words):
    with pytest.raises(ValueError, match=words) as e: A.create_adapter(**bad)
    assert "\n" not in str(e.value)


# --- time: nothing sees the future, and cutting a sequence changes nothing ------------------------------------------

@pytest.mark.parametrize("level,causal", [(1, None), (2, None), (3, None), (4, True), (4, False)])
def test_perturbing_j_leaves_earlier_outputs(level, causal):
    f, T = randomised(level, **({} if causal is None else dict(causal=causal))), 12
    for j in range(1, T):
        h = torch.randn(1, T, D)
        h2 = h.clone()
        h2[:, j] += torch.randn(D)
        change, rounding = (f(h2) - f(h)).abs().amax(-1)[0], tol(CHAIN) * f(h).abs().max()
        assert change[j] > rounding
        if causal is False: assert change[:j].min() > rounding        # the mutant: sees the future
        else: assert change[:j].max() == 0

@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("K", [1, 3])
def test_steps_equal_the_full_pass(level, K):
    f, h = randomised(level, **(dict(num_layers=2) if level == 4 else {})), torch.randn(2, 10, D)
    with torch.no_grad():
        cache, out = None, []
        for i in range(0, 10, K):
            y, cache = f.step(h[:, i:i + K], cache)
            out.append(y)
        near(torch.cat(out, 1), f(h), CHAIN)

@pytest.mark.parametrize("level", [1, 4])
def test_rollback_forgets_rejected_states(level):
    f, h, rng = randomised(level), torch.randn(1, 30, D), np.random.default_rng(0)
    with torch.no_grad():
        full, cache, n = f(h), None, 0
        while n < 30:
            K = int(rng.integers(1, 6))
            wrong = torch.cat([h[:, n:n + 1], torch.randn(1, K, D)], 1)  # one right state, K rejected ones
            y, after = f.step(wrong, cache)
            near(y[:, 0], full[:, n], CHAIN)
            n += 1
            cache = f.crop(after, n)
            assert cache is None if level == 1 else cache.length == n
    if level == 4:
        with pytest.raises(ValueError, match="holds 30"): cache.crop(31)

def test_a_step_never_changes_the_cache_it_was_given():
    f, h = randomised(4), torch.randn(1, 4, D)
    _, cache = f.step(h)
    before = [t.clone() for kv in cache.kv for t in kv]
    f.step(h, cache)
    now = [t for kv in cache.kv for t in kv]
    assert cache.length == 4 and all(torch.equal(a, b) for a, b in zip(before, now, strict=True))

def test_the_noncausal_one_refuses_to_decode():
    with pytest.raises(ValueError, match="sees the future"): small(4, causal=False).step(torch.randn(1, 1, D))

@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_leak_in(causal):
    f, h = randomised(4, causal=causal), torch.randn(2, 6, D)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    rows = f.rows(h.masked_fill(~mask[..., None], float("nan")), mask)
    alone = torch.cat([f(h[:1, :3])[0], f(h[1:, 2:])[0]])
    near(rows, alone, CHAIN)


# --- losses ---------------------------------------------------------------------------------------------------------

def test_feature_loss_against_plain_formula():
    f, h, t = randomised(2), torch.randn(3, 5, D), torch.randn(3, 5, D)
    mask = torch.rand(3, 5) > .4
    L, y = f.compute_loss(h, t, mask, weights=(.5, 2.)), f(h)
    mse = sum(((y[i, j] - t[i, j]) ** 2).mean() for i in range(3) for j in range(5) if mask[i, j]) / mask.sum()
    cos = sum(F.cosine_similarity(y[i, j], t[i, j], dim=0) for i in range(3) for j in range(5)
              if mask[i, j]) / mask.sum()
    near(L["mse_loss"], mse, CHAIN + 15 * D)
    near(L["cos_sim"], cos, CHAIN + 15 * D, size=1)
    near(L["total_loss"], .5 * mse + 2 * (1 - cos), CHAIN + 15 * D)

def test_default_weights_are_1_and_a_half():
    L = randomised(1).compute_loss(torch.randn(1, 4, D), torch.randn(1, 4, D))
    near(L["total_loss"], L["mse_loss"] + .5 * L["cos_loss"], 3)

@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_batches_stay_finite(level, dtype):
    f, h, t = small(level).to(dtype).train(), torch.randn(2, 4, D, dtype=dtype), torch.randn(2, 4, D, dtype=dtype)
    part = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    dirty = h.masked_fill(part[..., None] == 0, float("nan"))
    for a, b, m in ((dirty, dirty, part), (h, t, torch.zeros(2, 4)), (h[:, :0], t[:, :0], None),
                    (h[:0], t[:0], part[:0]),
                    (torch.zeros_like(h), torch.zeros_like(t), None)):
        f.zero_grad()
        for loss in (f.compute_loss(a, b, m)["total_loss"],
                     *(A.head_loss(k, f.rows(a, torch.ones(a.shape[:2]).bool() if m is None else m.bool()),
                                   b[torch.ones(a.shape[:2]).bool() if m is None else m.bool()], None, Head())
                       for k in A.HEAD_LOSSES)):
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            loss.backward(retain_graph=True)
            assert all(torch.isfinite(p.grad).all() for p in f.parameters() if p.grad is not None)
            if a.numel() == 0 or (m is not None and not m.any()): assert loss == 0

def test_head_losses_by_enumeration():
    head, a, t = Head(7), torch.randn(2, 3, D) * .2, torch.randn(2, 3, D) * .2
    mask, ids = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[4, 0, -1], [6, -1, -1]])
    want = dict.fromkeys(A.HEAD_LOSSES, 0.)
    for i, j in mask.nonzero().tolist():
        p, q = (x.double().softmax(-1).tolist() for x in (head.logits(t[i, j]), head.logits(a[i, j])))
        beta = sum(map(min, p, q))
        want["ce"] -= np.log(q[ids[i, j]]) / 3
        want["kl"] += sum(x * np.log(x / y) for x, y in zip(p, q, strict=True)) / 3
        want["tv"] += .5 * sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 3
        want["nla"] -= np.log(beta) / 3
    for k, v in want.items():
        # logarithms of 50 sums of D terms
        near(A.head_loss(k, a, t, mask, head, ids=ids), v, D * 50, size=max(v, 1), what=k)
    own = head.logits(t).argmax(-1)
    near(A.head_loss("ce", a, t, mask, head), A.head_loss("ce", a, t, mask, head, ids=own), 50)

def test_head_losses_train_the_adapter_and_leave_the_target_alone():
    f, head = randomised(1), Head()
    t = torch.randn(1, 6, D, requires_grad=True)
    for k in A.HEAD_LOSSES:
        f.zero_grad()
        A.head_loss(k, f(torch.randn(1, 6, D)), t, None, head).backward()
        assert f.layers[0].up_proj.weight.grad.abs().sum() > 0 and t.grad is None

def test_wrong_shapes_name_both():
    f = small(1, target_dim=40)
    with pytest.raises(ValueError, match="width 16, expected 32"): f(torch.randn(1, 2, 16))
    with pytest.raises(ValueError, match=r"expected \[..., T, 32\], \[..., T, 40\]"):
        f.compute_loss(torch.randn(1, 2, D), torch.randn(1, 2, D))
    assert f.compute_loss(torch.randn(1, 2, D), torch.randn(1, 2, 40))["total_loss"] > 0


# --- to disk and back -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("kw", [{}, dict(residual="linear", target_dim=40, head_hash="e" * 64)])
def test_round_trips(level, kw, tmp_path):
    f, h, path = randomised(level, **kw), torch.randn(2, 3, D), tmp_path/"best_model.pt"
    f.save_checkpoint(path, torch.optim.AdamW(f.parameters()), 7, {"val": {"cos": np.float32(.5), "n": [1, 2]}})
    raw = torch.load(path, weights_only=True)
    assert raw["epoch"] == 7 and raw["metrics"] == {"val": {"cos": .5, "n": [1, 2]}}
    assert raw["adapter_type"].startswith(f"L{level}_")
    assert {"model_state_dict", "config", "optimizer_state_dict"} <= set(raw) and type(raw["config"]) is dict
    g, ckpt = A.load_any_adapter(path)
    assert type(g) is type(f) and g.config == f.config == ckpt["config"] and not g.training and torch.equal(g(h), f(h))
    torch.optim.AdamW(g.parameters()).load_state_dict(ckpt["optimizer_state_dict"])
    f.save_pretrained(tmp_path/"hub")
    g = type(f).from_pretrained(tmp_path/"hub")
    assert g.config == f.config and torch.equal(g(h), f(h))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["README.md", "best_model.pt", "config.json", "hub",
                                                           "model.safetensors"]

def test_same_adapter_same_bytes(tmp_path):
    f = randomised(1)
    for name in ("a.pt", "b.pt"): f.save_checkpoint(tmp_path/name, epoch=1, metrics={"x": 1})
    assert (tmp_path/"a.pt").read_bytes() == (tmp_path/"b.pt").read_bytes()

STUDY_MODULE = """
from dataclasses import dataclass
@dataclass
class HiddenAdapterConfig:
    hidden_dim: int = 32
    bottleneck_dim: int = 8
    num_layers: int = 2
    dropout: float = 0.1
    alpha: float = 0.1
    use_layer_norm: bool = True
    use_gelu: bool = True
"""

def study_l1(tmp_path, module, state, **fields):
    "An L1 checkpoint as the study wrote it: config is a pickled dataclass of a module that this process does not have"
    package = tmp_path/"src"/Path(*module.split(".")[:-1])
    package.mkdir(parents=True, exist_ok=True)
    (package/f"{module.split('.')[-1]}.py").write_text(STUDY_MODULE)
    torch.save(state, tmp_path/"state.pt")
    code = f"""
        import torch
        from {module} import HiddenAdapterConfig
        state, config = torch.load("state.pt"), HiddenAdapterConfig(**{fields!r})
        torch.save({{"model_state_dict": state, "config": config, "epoch": 44}}, "study.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": str(tmp_path/"src")})
    return tmp_path/"study.pt"

def test_study_l1_loads_without_its_class(tmp_path):
    f, h = randomised(1, num_layers=2), torch.randn(1, 3, D)
    path = study_l1(tmp_path, "feasible.feature_alignment.hidden_adapter", f.state_dict())
    with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)
    g, ckpt = A.HiddenStateAdapter.load_checkpoint(path)
    assert torch.equal(g(h), f(h)) and ckpt["epoch"] == 44
    assert ckpt["config"]["bottleneck_dim"] == 8 and g.config["num_layers"] == 2
    assert "feasible.feature_alignment.hidden_adapter" not in sys.modules
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)     # the permission ended with the call

def test_study_l1_with_other_claims_or_another_module_is_refused(tmp_path):
    state = randomised(1, num_layers=2).state_dict()
    with pytest.raises(ValueError, match="says hidden_dim 64 over weights that say 32"):
        A.load_any_adapter(study_l1(tmp_path, "pkg.hidden_adapter", state, hidden_dim=64))
    with pytest.raises(ValueError, match="without LayerNorm or GELU"):
        A.load_any_adapter(study_l1(tmp_path, "pkg.hidden_adapter", state, use_gelu=False))
    with pytest.raises(ValueError, match="names pkg.other.HiddenAdapterConfig"):
        A.load_any_adapter(study_l1(tmp_path, "pkg.other", state))

@pytest.mark.parametrize("level,kind,config", [
    (2, "L2_MultiLayerBottleneck", dict(hidden_dim=D, bottleneck_dim=8, num_blocks=3)),
    (3, "L3_WideBottleneck", dict(hidden_dim=D, bottleneck_dim=12, num_blocks=3)),
    (4, "L4_Attention", dict(hidden_dim=D, num_heads=4, ffn_dim=24, num_layers=1))])
def test_study_l2_l3_l4_load(level, kind, config, tmp_path):
    f = randomised(level, **(dict(num_blocks=3) if level == 3 else dict(causal=False) if level == 4 else {}))
    ckpt = dict(model_state_dict=f.state_dict(), adapter_type=kind, config=config, epoch=1)
    torch.save(ckpt, tmp_path/"s.pt")
    h = torch.randn(1, 5, D)
    g, _ = A.load_any_adapter(tmp_path/"s.pt")
    assert torch.equal(g(h), f(h)) and g.config.get("causal", False) is False
    if level == 4: return                                             # num_heads does not show in a shape
    torch.save(dict(model_state_dict=f.state_dict()), tmp_path/"s.pt")  # level and sizes from the weights alone
    assert torch.equal(A.load_any_adapter(tmp_path/"s.pt")[0](h), f(h))


# --- files that lie -------------------------------------------------------------------------------------------------

class Call:
    "Pickles as a call"
    def __init__(self, fn, *args): self.fn, self.args = fn, args
    def __reduce__(self): return self.fn, self.args

@pytest.mark.parametrize("where", ["config", "metrics", "model_state_dict"])
@pytest.mark.parametrize("fn", [os.system, eval, subprocess.check_output, "pathlib"])
def test_malicious_pickles_never_run(where, fn, tmp_path):
    mark, path = tmp_path/"ran", tmp_path/"evil.pt"
    if fn == "pathlib": call = Call(Path.touch, mark)
    elif fn is eval: call = Call(fn, f"open({str(mark)!r}, 'w')")
    elif fn is os.system: call = Call(fn, f"touch {mark}")
    else: call = Call(fn, ["touch", str(mark)])
    torch.save({"model_state_dict": small(1).state_dict(), "config": {}, where: call}, path)
    with pytest.raises(ValueError, match="nothing of it was run") as e: A.load_any_adapter(path)
    assert not mark.exists() and str(path) in str(e.value) and "\n" not in str(e.value)
    torch.load(path, weights_only=False)                              # the trap is live: it does run where it is let
    assert mark.exists()

def test_plain_pickle_and_other_files(tmp_path):
    mark = tmp_path/"ran"
    (tmp_path/"a.pt").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
    (tmp_path/"b.pt").write_bytes(b"")
    (tmp_path/"c.pt").write_text("hello")
    torch.save([1, 2], tmp_path/"d.pt")
    with zipfile.ZipFile(tmp_path/"e.pt", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("x/data.pkl", b"\0" * 10**6)
    # a checkpoint packed so that it unpacks to more than its size
    small(1).save_checkpoint(tmp_path/"good.pt")
    with zipfile.ZipFile(tmp_path/"good.pt") as src, zipfile.ZipFile(tmp_path/"f.pt", "w", zipfile.ZIP_DEFLATED) as z:
        for i in src.infolist():
            z.writestr(i.filename, bytes(len(src.read(i))) if "/data/" in i.filename else src.read(i))
    for name in "abcdef":
        with pytest.raises(ValueError, match="expected an adapter checkpoint") as e:
            A.load_any_adapter(tmp_path/f"{name}.pt")
        assert f"{name}.pt" in str(e.value) and "\n" not in str(e.value)
    for missing in (tmp_path/"none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"): A.load_any_adapter(missing)
    assert not mark.exists()

def lie(change):
    "A valid L2 checkpoint after `change(ckpt)`"
    ckpt = dict(model_state_dict=dict(randomised(2).state_dict()), adapter_type="L2_MultiLayerBottleneck",
                config=dict(small(2).config), epoch=0)
    change(ckpt)
    return ckpt
def put(key, fn): return lambda c: c["model_state_dict"].__setitem__(key, fn(c["model_state_dict"].get(key)))

LIES = {
    "config that says hidden_dim 64": lambda c: c["config"].update(hidden_dim=64),
    "config that says num_blocks 2": lambda c: c["config"].update(num_blocks=2),
    "config that says target_dim 10": lambda c: c["config"].update(target_dim=10**12),
    "config that says level 3": lambda c: c.update(adapter_type="L3_WideBottleneck", config={}),
    "adapter of type L5_EAGLE": lambda c: c.update(adapter_type="L5_EAGLE"),
    "expected L1, L2, L3": lambda c: c.update(adapter_type="L9_Novel"),
    "config that says level 5": lambda c: c.update(adapter_type="L5_EAGLE", config={}),
    "config that says level 'own'": lambda c: c.update(adapter_type="own_OwnStateHead", config={}),
    "dropout is 7": lambda c: c["config"].update(dropout=7),
    "head_hash is 3": lambda c: c["config"].update(head_hash=3),
    "final_norm.bias holds NaN": put("final_norm.bias", lambda t: t * float("nan")),
    "blocks.1.up_proj.weight holds NaN or inf": put("blocks.1.up_proj.weight",
                                                    lambda t: t.index_fill(0, torch.tensor([3]), float("inf"))),
    "final_norm.bias missing": lambda c: c["model_state_dict"].pop("final_norm.bias"),
    "'?extra'? unknown": put("extra", lambda t: torch.zeros(3)),
    "blocks.2.up_proj.weight of shape": put("blocks.2.up_proj.weight", lambda t: t[:, :4].clone()),
    "no weight final_norm.weight": put("final_norm.weight", lambda t: torch.tensor(1.)),
    "is not a tensor of floating": put("final_norm.bias", lambda t: torch.zeros(D, dtype=torch.int64)),
    "'final_norm.bias' is not a tensor": put("final_norm.bias", lambda t: t.to("meta")),
    "'final_norm.weight' is not a tensor": put("final_norm.weight", lambda t: torch.eye(D).to_sparse()),
    "'final_norm' is not a tensor": put("final_norm", lambda t: "text"),
    "bytes in a file of": put("huge", lambda t: torch.zeros(1).expand(10**13)),
    "of no known level": lambda c: c.update(model_state_dict={}, adapter_type=""),
}
@pytest.mark.parametrize("words", LIES)
def test_files_that_lie_are_refused(words, tmp_path):
    torch.save(lie(LIES[words]), tmp_path/"lie.pt")
    with pytest.raises(ValueError, match=words) as e, bounded(2**30):
        A.load_any_adapter(tmp_path/"lie.pt") # refused before memory is asked for
    assert "lie.pt" in str(e.value) and "\n" not in str(e.value)

def test_the_unchanged_one_loads(tmp_path):
    torch.save(lie(lambda c: None), tmp_path/"true.pt")
    assert A.load_any_adapter(tmp_path/"true.pt")[0].level == 2
    with pytest.raises(ValueError, match="found a MultiLayerBottleneckAdapter .L2., expected a AttentionAdapter .L4."):
        A.AttentionAdapter.load_checkpoint(tmp_path/"true.pt")
    with pytest.raises(ValueError, match="not available here"): A.load_any_adapter(tmp_path/"true.pt", device="warp:9")

def test_damaged_files_give_an_error_or_finite_weights(tmp_path):
    path, rng, errors = tmp_path/"f.pt", np.random.default_rng(0), 0
    A.create_adapter(1, 4, bottleneck_dim=2).save_checkpoint(path)
    good = path.read_bytes()
    for i in range(150):
        data = bytearray(good)
        if i % 3 == 0: data = data[:rng.integers(len(data))]
        else:
            for at in rng.integers(0, len(data), 1 + i % 40): data[at] = rng.integers(256)
        path.write_bytes(data)
        try: f, _ = A.load_any_adapter(path)
        except ValueError as e:
            errors += 1
            assert str(path) in str(e) and "\n" not in str(e)
        else: assert all(p.isfinite().all() for p in f.parameters())
    assert errors > 50

def test_a_folder_that_lies(tmp_path):
    f = randomised(3)
    f.save_pretrained(tmp_path)
    (tmp_path/"config.json").write_text('{"hidden_dim": 64}')
    with pytest.raises(ValueError, match="says hidden_dim 64"): A.WideBottleneckAdapter.from_pretrained(tmp_path)
    (tmp_path/"config.json").write_text("[]")
    with pytest.raises(ValueError, match="no dictionary"): A.Adapter.from_pretrained(tmp_path)
    (tmp_path/"config.json").write_text("{}")
    (tmp_path/"model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="use a folder of save_pretrained"): A.Adapter.from_pretrained(tmp_path)
    (tmp_path/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): A.Adapter.from_pretrained(tmp_path)

def test_the_hub_is_asked_only_for_what_is_no_folder(tmp_path, monkeypatch):
    import huggingface_hub
    f, asked = randomised(1), []
    f.save_pretrained(tmp_path)
    def fake(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(tmp_path/name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    A.Adapter.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"): A.Adapter.from_pretrained(tmp_path/"a"/"b")
    assert not asked
    assert torch.equal(A.Adapter.from_pretrained("someone/adapter", revision="v1")(h := torch.randn(1, 2, D)), f(h))
    assert asked == [("someone/adapter", "config.json", "v1"), ("someone/adapter", "model.safetensors", "v1")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: 1 / 0)
    with pytest.raises(FileNotFoundError, match="the hub did not give it"): A.Adapter.from_pretrained("someone/adapter")

def test_another_head_is_named(tmp_path):
    small(1, head_hash="1" * 64).save_checkpoint(tmp_path/"a.pt")
    f, _ = A.load_any_adapter(tmp_path/"a.pt")
    with pytest.raises(ValueError, match="1111111111111111.*ffffffffffffffff"): A.check_head(f, Head())
    assert A.check_head(small(1, head_hash=Head.hash), Head()) and not A.check_head(small(1), Head())
    with pytest.raises(ValueError, match="width 40, head of width 32"): A.check_head(small(1, target_dim=40), Head())


# --- whole or absent ------------------------------------------------------------------------------------------------

def test_a_failed_save_keeps_the_old_file(tmp_path):
    f, path = small(1), tmp_path/"a.pt"
    f.save_checkpoint(path, epoch=1)
    with pytest.raises(ValueError, match="metrics.x: object, expected numbers"):
        f.save_checkpoint(path, epoch=2, metrics={"x": object()})
    with pytest.raises(Exception, match="pickle|Can't"): f.save_checkpoint(path, optimizer={"x": lambda: 0}, epoch=2)
    assert A.load_any_adapter(path)[1]["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]

def test_killed_while_saving(tmp_path):
    path, rng, first = tmp_path/"a.pt", np.random.default_rng(0), 10**6
    f = A.create_adapter(1, 256)
    f.save_checkpoint(path, epoch=0)
    for k in range(1, 9):
        before, pid = path.stat().st_ino, os.fork()
        if pid == 0:
            for epoch in range(first): f.save_checkpoint(path, epoch=k * first + epoch)
            os._exit(0)
        until(lambda: path.stat().st_ino != before)  # noqa: B023
        time.sleep(.1 * rng.random())                                # any instant will do
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # files were being replaced, and the one found is whole
        assert A.load_any_adapter(path)[1]["epoch"] // first == k


# --- the rest -------------------------------------------------------------------------------------------------------

def test_this_room_imports_nothing_of_featsd():
    tree = ast.parse(Path(A.__file__).read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not [n for n in names if n.split(".")[0] in ("featsd", "")]

@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("kw", [{}, dict(residual="linear"), dict(target_dim=24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_form_says_the_same(level, kw, dtype):
    "Folded into the head or, in half precision, called as it is: the logits of the plain way"
    f = randomised(level, **kw).to(dtype)
    class Linear:
        lm_head = torch.nn.Linear(f.target_dim, 30, bias=False).to(dtype)
        def logits(self, h): return self.lm_head(h)
    h, head = torch.randn(5, D).to(dtype), Linear()
    with torch.no_grad(): plain, folded, other = head.logits(f(h)), f.folded(head)(h), f.folded(Head(7))
    assert torch.equal(folded, plain) if dtype == torch.bfloat16 else near(folded, plain, 10 * D)
    if not kw.get("target_dim"):
        assert torch.equal(other(h), Head(7).logits(f(h))) # a head without a matrix to fold into

def test_summary_as_a_program():
    out = subprocess.run([sys.executable, "-m", "featsd.adapters"], capture_output=True, text=True, check=True,
                         timeout=HANG)
    lines = out.stdout.splitlines()
    assert [ln.split()[2] for ln in lines[1:5]] == ["2,113,537", "6,324,227", "16,797,698", "100,714,497"]
    assert [ln.split()[3] for ln in lines[1:5]] == ["8.1", "24.1", "64.1", "384.2"] and not out.stderr
    assert all(float(ln.split()[4]) > 0 and float(ln.split()[5]) > 0 for ln in lines[1:5])
