"""What every committed notebook looks like: order, cells, outputs. Nothing is executed."""

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from conki_lib.notebook import notebook_parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.<>/])/(?:wo[r]k|ro[o]t|h[o]me/\w+|U[s]ers/\w+|t[m]p)/[\w.]")


def cells(path: Path, kind: str = "") -> list:
    found = nbformat.read(path, as_version=4).cells
    return [cell for cell in found if kind in cell.cell_type]


def outputs(path: Path) -> list:
    return [output for cell in cells(path, "code") for output in cell.outputs]


def heads(path: Path) -> str:
    return "\n".join(cell.source for cell in cells(path, "markdown"))


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {"01", "03", "04"} <= {path.stem[:2] for path in NOTEBOOKS}


@each
def test_it_is_valid_and_small(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size <= 2_000_000
    sizes = [len(str(data)) for o in outputs(path) for data in o.get("data", {}).values()]
    assert max(sizes) <= 400_000  # in base64 even, so no picture has more
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@each
def test_it_opens_with_its_question_and_closes_with_references(path):
    first, text = cells(path)[0], heads(path)
    assert first.cell_type == "markdown" and first.source.startswith(f"# {path.stem[:2]}")
    for word in ("question", "paper", "minute|second", "cpu|cores", "needs", "produces"):
        assert re.search(word, first.source.lower()), word
    wanted = ("## What we saw", "docs/AUDIT.md", "## Exercises", "## References")
    places = [text.find(word) for word in wanted]
    assert -1 not in places and places[0] < places[2] < places[3], places
    assert 2 <= text.count("<details>") <= 4


@each
def test_it_has_one_cell_of_annotated_parameters_and_checks_them(path):
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    declared = notebook_parameters(path)
    assert 1 <= len(declared) <= 10
    assert all("  # " in line for line in tagged[0].source.splitlines()), "a comment for each"
    code = cells(path, "code")
    after = code[code.index(tagged[0]) + 1].source
    assert "profile" in declared and "RunConfig" in after
    assert not [c for c in cells(path) if "injected-parameters" in c.metadata.get("tags", [])]


@each
def test_prose_stands_before_code(path):
    found = cells(path)
    bare = [i for i, c in enumerate(found) if c.cell_type == "code"]
    assert not [i for i in bare if found[i - 1].cell_type != "markdown"]


@each
def test_cells_are_short_and_define_no_class(path):
    lengths = [len(cell.source.splitlines()) for cell in cells(path, "code")]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 25
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "pass", cell.source, flags=re.M))):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 20, f"{node.name} belongs in the library"


@each
def test_a_figure_or_table_comes_by_cell_10(path):
    early = [o for c in cells(path)[:10] if c.cell_type == "code" for o in c.outputs]
    shown = [kind for o in early for kind in o.get("data", {})]
    assert {"image/png", "text/html"} & set(shown)


@each
def test_outputs_are_committed_whole_and_without_traces(path):
    counts = [cell.execution_count for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    found = outputs(path)
    assert not [o for o in found if o.output_type == "error"]
    assert not [o for o in found if o.get("name") == "stderr"]
    text = path.read_text()
    assert not MACHINE.search(text), MACHINE.search(text)
    assert '"widgets"' not in text and '"papermill"' not in text


def test_every_figure_has_one_producer():
    produced: dict[str, str] = {}
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "pass", cell.source, flags=re.M))):
                func = node.func if isinstance(node, ast.Call) else None
                named = getattr(func, "id", getattr(func, "attr", ""))
                assert named not in ("save_figure", "savefig"), "figures go through figure_keeper"
                if named == "figure_keeper":
                    assert node.args[1].value == path.stem
                elif named.startswith("keep_") and isinstance(node.args[1], ast.Constant):
                    name = node.args[1].value  # executing shows the others
                    if name.startswith(path.stem[:2]):
                        assert produced.setdefault(name, path.stem) == path.stem, name
                    else:
                        assert named == "keep_table", name
    assert produced
