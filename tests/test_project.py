"""The project as a whole: floors, sizes, layout, environments, and what must not be in it."""

import ast
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "conki_lib"

# an import goes downward, or sideways without a cycle
FLOORS = {
    "anew": 5, "cli": 5, "notebook": 5, "pipeline": 5,
    "ablation": 4, "audit": 4, "embedding": 4, "explorer": 4, "plots": 4, "probes": 4, "reasons": 4,
    "statistics": 4, "tables": 4,
    "training": 3, "fitting": 3, "records": 3, "states": 3,
    "model": 2, "baselines": 2,
    "adapters": 1, "data": 1, "encoders": 1, "losses": 1, "tiles": 1,
    "config": 0, "disk": 0, "metrics": 0, "pairs": 0,
}  # fmt: skip
MODULE_LINES, ALL_LINES = 330, 8640  # data/ and plots/ are more than half of it
CONDA_NAMES = {
    "torch": "pytorch",
    "huggingface-hub": "huggingface_hub",
    "playwright": "playwright-python",
    "snakemake": "snakemake-minimal",
}


@cache
def modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def floor(module: str) -> int:
    return FLOORS[module.split(".")[1]] if "." in module.removesuffix(".__init__") else 0


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {n for n in names if n in modules() or f"{n}.__init__" in modules()}
            found |= inner or {node.module}
    ours = {name for name in found if name.split(".")[0] == "conki_lib"}
    return frozenset(n if n in modules() else f"{n}.__init__" for n in ours) - {module}


@cache
def code_lines(path: Path) -> int:
    """Lines of code: docstrings, comments and blank lines do not count."""
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings |= set(range(value.lineno, value.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines = set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in silent:
                lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@cache
def tracked() -> list[Path]:
    """Files that git tracks or would track; without git, everything outside ignored folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        skipped = {".venv", "runs", ".snakemake", "__pycache__", ".git"}
        found = (p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts))
    else:
        found = (ROOT / line for line in listed.stdout.splitlines())
    return [path for path in found if path.is_file()]


# ---- the library --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", modules())
def test_module_has_a_floor_and_imports_downward(module):
    if "." in module.removesuffix(".__init__"):
        assert module.split(".")[1] in FLOORS, f"{module} needs a floor in {Path(__file__).name}"
    above = {other: floor(other) for other in imports(module) if floor(other) > floor(module)}
    assert not above, f"{module} stands on floor {floor(module)} and imports upward: {above}"


def test_no_import_cycles():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            path.append(module)
            for other in sorted(imports(module)):
                visit(other)
            path.pop()
            done.add(module)

    for module in modules():
        visit(module)
    assert done == set(modules())


@pytest.mark.parametrize("module", modules())
def test_module_size(module):
    assert code_lines(modules()[module]) <= MODULE_LINES


def test_library_size():
    sizes = {module: code_lines(path) for module, path in modules().items()}
    assert sum(sizes.values()) <= ALL_LINES, sorted(sizes.items(), key=lambda x: -x[1])[:8]


@pytest.mark.parametrize("module", modules())
def test_public_things_are_documented(module):
    tree = ast.parse(modules()[module].read_text())
    kinds = ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef
    scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    public = [n for s in scopes for n in s.body if isinstance(n, kinds) and n.name[0] != "_"]
    bare = [n.name for n in public if not ast.get_docstring(n)]
    assert not bare and (module.endswith("__init__") or ast.get_docstring(tree))


def test_the_command_answers_without_loading_torch():
    code = "import sys, conki_lib.cli; print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_every_job_and_kernel_begins_with_is_light(tmp_path):
    work = """
import sys
import conki_lib.notebook
import conki_lib.plots.index
from conki_lib import ablation, pipeline
pipeline.state("synthetic")
pipeline.is_finished(ablation.configure("synthetic"), 2)
print({"torch", "scipy", "papermill", "nbformat", "matplotlib"} & set(sys.modules))
"""
    data = "import sys, conki_lib.data; print({'scipy', 'matplotlib'} & set(sys.modules))"
    empty = os.environ | {name: str(tmp_path / name) for name in ("CONKI_RUNS", "CONKI_DATA")}
    for code in (work, data):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=empty)
        assert done.stdout.strip() == "set()"


# ---- environments -------------------------------------------------------------------------------


def requirements() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    pairs = [re.match(r"([\w.-]+)(.*)", line).groups() for lines in lists for line in lines]
    return {name.lower(): bound for name, bound in pairs}


def test_environment_yml_equals_pyproject():
    text = (ROOT / "environment.yml").read_text()
    lines = [x for x in yaml.safe_load(text)["dependencies"] if isinstance(x, str)]
    found = dict(re.match(r"([\w.-]+)(.*)", line).groups() for line in lines)
    assert found.pop("python") == ">=3.11" and "pip" in found
    del found["pip"]
    assert found == {CONDA_NAMES.get(n, n): bound for n, bound in requirements().items()}
    entries = [line for line in text.splitlines() if re.match(r"  - [a-z][\w.-]+[>=\d.]* *", line)]
    assert all("# " in line for line in entries if "conda-forge" not in line)


def test_requirements_lock_pins_everything():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    names = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert set(requirements()) <= names
    # seconds at every start; the lock's first lines say why
    assert "jsonschema==4.24.1" in pins and "rfc3987-syntax" not in names
    assert "torch==2.13.0" in pins and not any("conki" in pin or "minilm" in pin for pin in pins)


def test_every_import_of_the_library_is_a_declared_dependency():
    names = {"sklearn": "scikit-learn", "yaml": "pyyaml", "umap": "umap-learn", "PIL": "pillow"}
    names |= {"huggingface_hub": "huggingface-hub"}
    roots = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
    foreign = roots - set(sys.stdlib_module_names) - {"conki_lib"}
    assert {names.get(name, name).lower() for name in foreign} <= set(requirements())


# ---- layout and habits --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    "README.md environment.yml pyproject.toml requirements.lock Makefile Snakefile CITATION.cff "
    "CHANGELOG.md CONTRIBUTING.md LICENSE .pre-commit-config.yaml .ci/run data/README.md".split(),
)
def test_layout(name):
    assert (ROOT / name).is_file()


def test_git_ignores_downloads_and_runs_but_not_the_library():
    lines = (ROOT / ".gitignore").read_text().split()
    assert {"/data/*", "!/data/README.md", "/runs/", ".venv/"} <= set(lines)
    assert not {"data/", "data"} & set(lines)


def test_every_page_of_the_book_is_there():
    def pages(part):
        if isinstance(part, list):
            return [page for inner in part for page in pages(inner)]
        inner = [part.get(key, []) for key in ("parts", "chapters", "sections")]
        return [part[key] for key in ("root", "file", "glob") if key in part] + pages(inner)

    found = pages(yaml.safe_load((ROOT / "docs/_toc.yml").read_text()))
    assert {"README", "notebooks/*", "docs/AUDIT"} <= set(found)
    assert all(list(ROOT.glob(f"{page}.*")) for page in found)
    config = yaml.safe_load((ROOT / "docs/_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"


def test_profiles_are_readable_and_every_line_has_its_reason():
    from conki_lib.config import RunConfig

    paths = sorted((ROOT / "configs").glob("*.yml"))
    names = {path.stem for path in paths}
    assert {"synthetic", "mosi-open", "mmmo-open", "mosi", "mosei", "sims"} <= names
    for path in paths:
        assert RunConfig.from_profile(path.stem).profile == path.stem
        settings = [x for x in path.read_text().splitlines() if x and not x.startswith("#")]
        assert all("  # " in line for line in settings), path


def test_the_readme_names_commands_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z]+)", readme))
    assert {"reproduce", "test", "lab", "ablation", "notebooks", "bench"} <= targets
    assert targets <= set(re.findall(r"^([a-z]+):", makefile, re.M))
    from conki_lib.cli import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert set(re.findall(r"`conki ([a-z]+)", readme)) <= commands


@pytest.mark.parametrize("profile", ["synthetic", "mosi-open", "mmmo-open"])
def test_what_the_readme_says_in_short_is_what_the_tables_say(profile):
    table = pd.read_csv(ROOT / "results" / profile / "tables" / "differences.csv", index_col="row")
    corrected = pd.to_numeric(table["p Holm (MAE)"], errors="coerce")  # "<0.001" is none
    assert (corrected[["w/o C4", "w/o N1"]] > 0.05).all()
    if profile == "mosi-open":
        texts = table.loc[["text-only", "text-only + external"], "MAE"]
        assert texts.str.startswith("-").all() and (corrected[texts.index] > 0.05).all()
        assert float(table.loc["text-only + external", "p (MAE)"]) < 0.05
        caption = (ROOT / "results" / profile / "tables" / "main.md").read_text().split("\n")[0]
        assert "of their own: text-only, text-only + external." in caption
        runs = re.search(
            r"that tried settings: text-only (\d+), full (\d+); other rows: none", caption
        )
        assert int(runs[1]) > int(runs[2])


def test_ci_runs_the_readmes_test_command():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")


def test_changelog_and_citation():
    assert "### Results changed" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert citation["url"].endswith("2023.findings-acl.860")
    assert [a.get("family-names") for a in citation["authors"][:2]] == ["Yu", "Zhao"]


def test_tracked_files_are_small_and_name_no_machine():
    folders = ["wo[r]k", "ro[o]t", "U[s]ers/\\w+", "h[o]me/\\w+"]
    machine = re.compile(rf"(?<![\w.<>/*$}}])/(?:{'|'.join(folders)})/[\w.]")
    for path in tracked():
        assert path.stat().st_size < 4_000_000, path  # one profile's records are the largest
        if path.suffix not in {".png", ".parquet", ".svg"}:
            found = machine.search(path.read_text(errors="replace"))
            assert not found, f"{path}: a path of one machine: {found.group()}"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", str(ROOT)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_spelling():
    files = [str(p) for p in tracked() if p.suffix in {".py", ".md", ".yml", ".yaml", ".toml"}]
    command = [sys.executable, "-m", "codespell_lib", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
