"What is written is short: lines of 120 columns, cells of 40, modules of 500, functions of ten parameters"
import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS, CELL, MODULE, PARAMETERS = 120, 40, 500, 10
LONGER = {"adapters": 700} # levels, losses and checkpoints in one room that imports nothing of featsd
MODULES = [p for p in sorted((ROOT/"featsd").rglob("*.py")) if p.stem != "_modidx"]
NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(i, "".join(c["source"])) for i, c in enumerate(cells) if c["cell_type"] == "code"]


def full(text): return [line for line in text.splitlines() if line.strip()]


def long_lines(text): # (number, columns); the list of names that nbdev writes has a width of its own
    text = re.sub(r"(?ms)^__all__ = \[.*?\]$", lambda m: "\n" * m[0].count("\n"), text)
    return [(i, len(line)) for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


def decorated(node, name): return any(name in ast.unparse(d) for d in node.decorator_list)


def greedy_functions(text): # (name, parameters besides self); a command's flags are its user's
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or decorated(node, "call_parse"): continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if (n := len([a for a in names if a not in ("self", "cls")])) > PARAMETERS: yield node.name, n


def public_names(text): # defined at the top of a module; a method patched into a class is none of them
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found = [] if decorated(node, "patch") else [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)]
        else: continue
        yield from (n for n in set(found) if not n.startswith("_"))


@pytest.mark.parametrize("path", [*MODULES, ROOT/"setup.py", ROOT/".ci"/"readme.py"], ids=lambda p: p.name)
def test_lines_are_short(path): assert not long_lines(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_cells_are_short(path):
    cells = code_cells(path)
    assert not [(i, line) for i, text in cells for line in long_lines(text)]
    assert not [(i, n) for i, text in cells if text.startswith("#| export") and (n := len(full(text))) > CELL]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
def test_a_reader_without_a_kernel_sees_what_it_shows(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = [bool(c["outputs"]) for c in cells if c["cell_type"] == "code" and not "".join(c["source"]).startswith("#|")]
    assert 2 * sum(shown) >= len(shown)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_are_short_and_functions_take_few_parameters(path):
    text = path.read_text(encoding="utf-8")
    assert len(full(text)) <= LONGER.get(path.stem, MODULE) and not list(greedy_functions(text))


def test_a_name_is_defined_once():
    found = Counter(n for p in MODULES for n in public_names(p.read_text(encoding="utf-8")))
    assert not [n for n, k in found.items() if k > 1 and n != "__version__"]


def test_what_is_too_long_is_found():
    eleven = ", ".join(f"a{i}" for i in range(11))
    assert long_lines("x" * 121 + "\n" + "x" * 120) == [(1, 121)]
    assert list(greedy_functions(f"class C:\n    def f(self, {eleven}): pass")) == [("f", 11)]
    assert not list(greedy_functions(f"@call_parse\ndef f({eleven}): pass\ndef g(self, {eleven[4:]}): pass"))
    text = "A, (B, c) = 1, (2, 3)\n_d = 1\n@patch\ndef m(self:C): pass\ndef f(): x = 1\nclass C: pass\ne: int = 1"
    assert sorted(public_names(text)) == ["A", "B", "C", "c", "e", "f"]


def test_pages_that_read_the_demos_result_show_that_run():
    claims = json.loads((ROOT/"figures"/"demo.json").read_text(encoding="utf-8"))["claims"]
    plain, own = (f"{r['value']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]" for r in (claims[k]["ratio"] for k in
                  ("over_plain", "over_own")))
    for name in ("index", "07_report", "lab/tour", "lab/study_reproduced"):
        cells = json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        shown = json.dumps([c.get("outputs") for c in cells], ensure_ascii=False)
        said = [plain] if name == "lab/study_reproduced" else [plain, own, claims["pays"]]
        assert all(x in shown for x in said), f"nbs/{name}.ipynb: shows another run; execute it again"
