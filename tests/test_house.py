"The plan of the house: base ← data ← models ← story, the story's rooms in the order of their numbers"
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ("base", "data", "models") # then the story; each stands on those before it
NUMBERED = re.compile(r"(\d\d[a-z]?)_(\w+)")


def told(stem): # what a notebook of the story exports
    name = NUMBERED.fullmatch(stem)[2]
    return "__main__" if name == "main" else name


def rooms(nbs=ROOT/"nbs")->dict:
    "module → its place: (0..2, '') in a wing, (3, number) in the story, read from the notebooks' file names"
    out = {}
    for p in sorted(nbs.rglob("*.ipynb")):
        folder = p.parent.relative_to(nbs).as_posix()
        if folder in WINGS: out[f"{folder}.{p.stem}"] = (WINGS.index(folder), "")
        elif folder == "." and NUMBERED.fullmatch(p.stem): out[told(p.stem)] = (3, p.stem.split("_")[0])
    return out


def imported(source, here, names):
    "featsd modules that a text imports anywhere: in functions, in guards, under `if`"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join(["featsd", *here.split(".")[:-node.level], *([base] if base else [])])
            found = [base if base.removeprefix("featsd.") in names else f"{base}.{a.name}" for a in node.names]
        else: continue
        yield from (f.removeprefix("featsd.") for f in found if f.startswith("featsd."))


def cells(path):
    "the code cells of a notebook that are run, each as a text"
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if c["cell_type"] == "code":
            lines = "".join(c["source"]).splitlines()
            yield "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def back_arrows(nbs=ROOT/"nbs", package=ROOT/"featsd")->list:
    "Imports that the rule forbids, of modules (all imports) and of lessons (visible and hidden cells alike)"
    names, wrong = rooms(nbs), []
    texts = [(m, (package/f"{m.replace('.', '/')}.py").read_text(encoding="utf-8"), False) for m in names]
    for p in sorted(nbs.rglob("*.ipynb")):
        m = f"{p.parent.name}.{p.stem}" if p.parent != nbs else told(p.stem) if NUMBERED.fullmatch(p.stem) else p.stem
        if m in names: texts += [(m, c, True) for c in cells(p)]
    for here, text, lesson in texts:
        for there in imported(text, here, names):
            if there not in names:
                if there != "__version__": wrong.append(f"{here} → {there}: no such room")
            elif there != here and (names[there][0] > names[here][0] or names[there] >= names[here] > (3,)):
                wrong.append(f"{here} → {there}" + " in a cell" * lesson)
    return sorted(set(wrong))


def circles(package=ROOT/"featsd", names=None)->list:
    "Rooms from which imports lead back to themselves"
    names = names or rooms()
    texts = {m: (package/f"{m.replace('.', '/')}.py").read_text(encoding="utf-8") for m in names}
    goes = {m: set(imported(text, m, names)) & set(names) - {m} for m, text in texts.items()}
    def reach(m):
        seen, todo = set(), [m]
        while todo:
            for n in goes[todo.pop()] - seen: seen.add(n); todo.append(n)
        return seen
    return sorted(m for m in goes if m in reach(m))


def test_one_arrow(): assert not back_arrows()
def test_no_circle(): assert not circles()


def test_every_module_has_its_notebook():
    there = [p.relative_to(ROOT/"featsd").with_suffix("").parts for p in (ROOT/"featsd").rglob("*.py")]
    assert {".".join(parts) for parts in there if parts[-1] not in ("__init__", "_modidx")} == set(rooms())


@pytest.fixture
def house(tmp_path):
    "A house of three rooms, each a module with its notebook"
    def build(**text):
        nbs, package = tmp_path/"nbs", tmp_path/"featsd"
        plain = {"base/core": "x = 1", "01_extract": "import featsd.base.core",
                 "02_train": "from featsd.base.core import x"}
        for place, source in (plain | text).items():
            (nbs/place).parent.mkdir(parents=True, exist_ok=True)
            name = place.split("_", 1)[1] if "_" in place else place
            (package/name).parent.mkdir(parents=True, exist_ok=True)
            (package/f"{name}.py").write_text(source)
            (nbs/f"{place}.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "source": source}]}))
        return nbs, package
    return build


@pytest.mark.parametrize("text", [
    "from featsd.train import x", "import featsd.train", "from featsd import train", "from .train import x",
    "from . import train",
    "def f():\n    from featsd.train import x", "if __name__ == '__main__':\n    import featsd.train as t",
    "try: from featsd.train import x\nexcept ImportError: pass"])
def test_a_planted_back_arrow_is_found(house, text):
    assert back_arrows(*house()) == []
    assert back_arrows(*house(**{"01_extract": text}))[0].startswith("extract → train")


def test_a_lesson_s_arrow_a_wing_s_arrow_and_a_circle_are_found(house):
    nbs, package = house()
    cell = {"cell_type": "code", "source": ["%matplotlib inline\n", "from featsd.train import x"]}
    (nbs/"01_extract.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert back_arrows(nbs, package) == ["extract → train in a cell"]
    nbs, package = house(**{"base/core": "from featsd.extract import x"})
    assert back_arrows(nbs, package)[0].startswith("base.core → extract")
    assert circles(package, rooms(nbs)) == ["base.core", "extract"]
