"README.md is what nbs/index.ipynb says: `python .ci/readme.py`; with --check it only compares"
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

TOP = Path(__file__).parents[1]


def shown_by(cell):
    "What a cell shows: Markdown as it is, what it prints as a block of text"
    shown = ["".join(o.data["text/markdown"]) for o in cell.outputs if "text/markdown" in o.get("data", {})]
    printed = "".join(o.get("text", "") for o in cell.outputs).rstrip()
    return new_markdown_cell("\n\n".join(shown) or f"```\n{printed}\n```")


def readme_text(notebook):
    "A notebook as Markdown; of a cell with `#| echo: false` only what it shows, of one with `#| hide` nothing"
    nb = nbformat.read(notebook, as_version=4)
    cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    nb.cells = [shown_by(c) if c.source.startswith("#| echo: false") else c for c in cells]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


if __name__ == "__main__":
    text, out = readme_text(TOP/"nbs"/"index.ipynb"), TOP/"README.md"
    if "--check" in sys.argv[1:]:
        if not out.is_file() or out.read_text(encoding="utf-8") != text:
            sys.exit(f"{out.name}: not what nbs/index.ipynb says; run python .ci/readme.py and commit the result")
    else: out.write_text(text, encoding="utf-8")
