"How near two ways to the same number must come: as near as rounding lets them, on any processor"
import math

import numpy as np
import torch

DOUBLE = torch.float64


def tol(terms=1, dtype=torch.float32)->float:
    "Relative: each of n operations rounds by half an eps at most, either way, they walk √n far; eight times that is no chance"
    return 4 * torch.finfo(dtype).eps * math.sqrt(terms)


def off(got, want, size=None)->float:
    "Largest difference over the largest of `want`, or over `size` where large numbers cancel; inf where shapes or NaN differ"
    tensor = lambda x: x if isinstance(x, torch.Tensor) else torch.as_tensor(np.asarray(x))
    a, b = (tensor(x).detach().double() for x in (got, want))
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()): return math.inf
    a, b = a.nan_to_num(), b.nan_to_num()
    if torch.equal(a, b): return 0.
    size = b.abs().max().item() if size is None else size
    return (a - b).abs().max().item() / size if size else math.inf


def near(got, want, terms=1, dtype=torch.float32, size=None, what=""):
    "An assertion that both are equal up to the rounding of `terms` operations of `dtype`"
    apart, allowed = off(got, want, size), tol(terms, dtype)
    assert apart <= allowed, f"{what or 'the two'} differ by {apart:.1e} of their size, rounding explains {allowed:.1e}"
    return True
