"The plan of the house: who may import whom, and that what is exported is what the notebooks say"
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT/"featsd"
FLOOR = {"core"}
SPINE = ["adapters", "extract", "verify", "train", "metrics", "nulls", "calibration", "timeline", "decode", "drafters", "makers", "assist", "compare", "replay", "report", "explore", "bench"]
TOP = {"commands", "docs", "__main__"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports_of(path):
    "featsd modules that a file imports anywhere, also inside functions; the `__main__` guard aside"
    tree, here = ast.parse(path.read_text(encoding="utf-8")), module_name(path).split(".")
    guarded = {n for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if node in guarded: continue
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("featsd.") for a in node.names if a.name.startswith("featsd."))
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join(["featsd", *here[:len(here) - node.level], *([base] if base else [])])
            if base == "featsd": yield from (a.name for a in node.names)
            elif base in ("featsd.data", "featsd.models"): yield from (f"{base.removeprefix('featsd.')}.{a.name}" for a in node.names)
            elif base.startswith("featsd."): yield base.removeprefix("featsd.")


def allowed(name, imported):
    wing = lambda m: m.startswith(("data.", "models."))
    if name in TOP: return True
    if name == "adapters" or name in FLOOR: return False
    if imported in FLOOR or wing(imported): return True
    if wing(name) or name not in SPINE or imported not in SPINE: return False
    return SPINE.index(imported) < SPINE.index(name)


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.stem not in ("_modidx",)]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_room_reaches_back(path):
    name = module_name(path)
    wrong = [m for m in imports_of(path) if m.split(".")[0] != "__version__" and not allowed(name, m)]
    assert not wrong, f"featsd.{name} imports {wrong}"


def test_the_rule_finds_a_breach(tmp_path):
    assert not allowed("data.store", "train") and not allowed("adapters", "core") and not allowed("train", "report")
    assert allowed("report", "metrics") and allowed("metrics", "data.store")


def test_every_room_is_known():
    rooms = {module_name(p) for p in PACKAGE.glob("*.py")} - {"", "_modidx"}
    assert rooms <= set(SPINE) | FLOOR | TOP, "a new room: give it its place in this test and in the README's house"


def test_modules_are_short():
    "A module over 500 lines of code is two modules"
    long = {module_name(p): n for p in MODULES if (n := sum(1 for line in p.read_text().splitlines() if line.strip())) > 600}
    assert not long, long
