"""The strict runner, on tiny notebooks made here."""

import errno
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from conki_lib import config, disk, notebook
from conki_lib.notebook import NotebookError, check_parameters, notebook_parameters, run_notebook

PARAMETERS = """
profile: str = "synthetic"  # which configs/<profile>.yml
lam: float = 0.01  # weight of the contrastive loss
seed: int = 0  # of everything
fast: bool = False  # fewer points
fold: str = None  # None: the profile's
variant: str = "full"  # row of the tables
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project root of its own: configs, notebooks and runs."""
    for name in ("configs", "notebooks"):
        (tmp_path / name).mkdir()
    (tmp_path / "configs/synthetic.yml").write_text("tau: 0.1\n")
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    monkeypatch.setattr(notebook, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    return tmp_path


def write(project: Path, *cells: str, stem: str = "01_toy", parameters: str = PARAMETERS) -> Path:
    tagged = new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    book = new_notebook(cells=[new_markdown_cell("# Toy"), tagged, *map(new_code_cell, cells)])
    path = project / "notebooks" / f"{stem}.ipynb"
    nbformat.write(book, path)
    return path


def text_of(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_run_takes_parameters_profile_and_assignments_in_this_order(project):
    write(
        project, "print(profile, lam, seed, fast, fold)", "from conki_lib.notebook import headless"
    )
    (project / "configs/mine.yml").write_text(yaml.safe_dump({"lam": 0.5, "seed": 7, "epochs": 3}))
    path = run_notebook("01_toy", profile="mine", parameters={"seed": 8}, assignments=["fast=true"])
    assert path == project / "runs/notebooks/mine/01_toy.ipynb"
    assert text_of(path) == "mine 0.5 8 True None\n"
    assert not list((project / "runs/notebooks/failed").iterdir())


def test_the_kernel_is_headless_in_the_project_root_and_leaves_no_trace(project, monkeypatch):
    monkeypatch.delenv("CONKI_HEADLESS", raising=False)
    code = "import os\nfor _ in range(2): print(os.environ['CONKI_HEADLESS'], flush=True)"
    path = write(project, code, "import pathlib; print(pathlib.Path('configs').is_dir())")
    out = run_notebook(path, output=project / "elsewhere/out.ipynb")
    assert text_of(out) == "1\n1\nTrue\n"
    assert "CONKI_HEADLESS" not in os.environ and not notebook.headless()
    raw = out.read_text()
    assert str(project) not in raw and "papermill" not in raw and '"widgets"' not in raw
    streams = [len(c.get("outputs", [])) for c in nbformat.read(out, as_version=4).cells]
    assert max(streams) == 1  # coalesced


def test_a_notebook_executed_twice_is_equal(project):
    styled = "pd.DataFrame({'a': [1]}).style.hide()"
    path = write(
        project, f"import pandas as pd\n{styled}", f"display({styled})\n{styled}", "object()"
    )
    first, second = (run_notebook(path, output=project / f"{k}.ipynb") for k in "ab")
    assert first.read_text() == second.read_text()
    tables = [o.data["text/html"] for c in nbformat.read(first, as_version=4).cells
              for o in c.get("outputs", []) if "text/html" in o.get("data", {})]  # fmt: skip
    assert len(set(tables)) == 3  # the tables of a page, and of a cell, have their own ids


def test_a_failing_notebook_reports_its_cell_and_is_kept(project, capfd):
    path = write(project, "print('before')", "raise ValueError('no such thing')")
    with pytest.raises(
        NotebookError, match=r"01_toy.ipynb, cell \d+ .*ValueError: no such thing"
    ) as e:
        run_notebook(path, output=project / "out.ipynb")
    kept = Path(str(e.value).rsplit(": ", 1)[1])
    assert kept.parent == project / "runs/notebooks/failed" and "before" in text_of(kept)
    assert not (project / "out.ipynb").exists()
    assert "before" in capfd.readouterr().out


def test_a_failing_run_leaves_the_earlier_result(project):
    out = project / "out.ipynb"
    run_notebook(write(project, "print('first')"), output=out)
    with pytest.raises(NotebookError):
        run_notebook(write(project, "import os; os._exit(1)"), output=out)
    assert text_of(out) == "first\n"


def test_two_runs_side_by_side_do_not_meet(project):
    path = write(project, "import time; time.sleep(1); print(seed)")
    outs = [project / f"{seed}.ipynb" for seed in (1, 2)]
    with ThreadPoolExecutor() as pool:
        code = "import sys; from conki_lib.notebook import run_notebook as run; "
        code += "run(sys.argv[1], parameters={'seed': int(sys.argv[2])}, output=sys.argv[3])"
        calls = [
            [sys.executable, "-c", code, str(path), str(i), str(o)] for i, o in enumerate(outs)
        ]
        done = list(pool.map(lambda c: subprocess.run(c, cwd=project, check=False), calls))
    assert [d.returncode for d in done] == [0, 0]
    assert [text_of(out) for out in outs] == ["0\n", "1\n"]
    assert not list(project.glob("*ipc*"))


@pytest.mark.parametrize(
    ("given", "assignments", "said"),
    [
        ({"sede": 1}, (), r"no parameter 'sede'; did you mean 'seed'"),
        ({}, ("lamda=0.1",), r"no parameter 'lamda'; did you mean 'lam'"),
        ({"seed": "1"}, (), r"'seed' cannot be '1'"),
        ({"seed": True}, (), r"'seed' cannot be True"),
        ({"seed": 1.5}, (), r"'seed' cannot be 1.5"),
        ({"seed": None}, (), r"'seed' cannot be None"),
        ({"lam": "1e-3"}, (), r"'lam' cannot be '1e-3'"),
        ({"fast": 1}, (), r"'fast' cannot be 1"),
        ({"fold": [1, 2]}, (), r"'fold' cannot be \[1, 2\]"),
        ({}, ("seed=[1,2]",), r"'seed' cannot be '\[1,2\]'"),
        ({}, ("fast=maybe",), r"'fast' cannot be 'maybe'"),
        ({}, ("seed",), r"write -p name=value"),
        ({}, ("lam=inf",), r"'lam' cannot be 'inf'"),
        ({"seed": -1}, (), r"seed\n.*greater than or equal to 0"),
        ({}, ("variant=w/o C5",), r"unknown variant 'w/o C5'; did you mean"),
    ],
)
def test_wrong_parameters_stop_before_anything_runs(project, given, assignments, said):
    path = write(project, "open('ran', 'w')")
    with pytest.raises(ValueError, match=said):
        run_notebook(path, parameters=given, assignments=assignments)
    assert not (project / "ran").exists() and not (project / "runs").exists()


def test_where_nothing_can_be_written_nothing_runs(project, monkeypatch):
    path = write(project, "open('ran', 'w')")
    with pytest.raises(ValueError, match=r"output: .*configs is a folder"):
        run_notebook(path, output=project / "configs")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(disk.DiskError, match=r"read-only for the executed notebook .*-o or CONKI"):
        run_notebook(path)
    assert not (project / "ran").exists()


def test_what_is_no_notebook_is_named(project):
    for text in ("[1]", "{}", "word"):
        (project / "notebooks/02_odd.ipynb").write_text(text)
        with pytest.raises(ValueError, match=r"02_odd.ipynb is no notebook"):
            run_notebook("02_odd")


def test_only_files_are_written_and_links_are_followed(project):
    path = write(project, "print(profile)")
    link, real = project / "link.ipynb", project / "real.ipynb"
    link.symlink_to(real)
    notebook.run_notebook(path, output=link)
    assert link.is_symlink() and "synthetic" in text_of(real)
    os.mkfifo(project / "pipe")
    with pytest.raises(ValueError, match="is a folder or a device"):
        notebook.run_notebook(path, output=project / "pipe")


def test_magic_among_the_parameters_is_named(project):
    path = write(project, parameters="%matplotlib inline\nlam: float = 0.1")
    with pytest.raises(ValueError, match="parameters cell is no plain Python"):
        notebook.notebook_parameters(path)


def test_texts_become_the_declared_type(project):
    path = write(project)
    texts = ["lam=1e-3", "seed=3", "fast=false", "profile=3", "fold=none"]
    values = check_parameters(path, {}, texts)
    assert values == {"lam": 0.001, "seed": 3, "fast": False, "profile": "3", "fold": None}
    assert isinstance(check_parameters(path, {"lam": 1})["lam"], float)


def test_a_profile_key_that_nobody_knows_is_an_error(project):
    path = write(project)
    (project / "configs/mine.yml").write_text("lamda: 0.1\n")
    with pytest.raises(ValueError, match=r"mine.yml: unknown setting 'lamda'; did you mean 'lam'"):
        run_notebook(path, profile="mine")
    with pytest.raises(FileNotFoundError, match=r"no profile 'mien'.*did you mean 'mine'"):
        run_notebook(path, profile="mien")
    (project / "configs/mine.yml").write_text("lam: [0.1\n")
    with pytest.raises(ValueError, match=r"(?s)mine.yml is no YAML: .*line 2"):
        run_notebook(path, profile="mine")


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_setting_is_a_finite_number(project, value):
    path = write(project)
    (project / "configs/mine.yml").write_text(f"tau: {value}\n")
    with pytest.raises(ValueError, match="tau"):
        run_notebook(path, profile="mine")


def test_a_profile_value_of_another_type_is_an_error(project):
    path = write(project)
    (project / "configs/mine.yml").write_text("lam: 1e-3  # YAML reads a text here\n")
    with pytest.raises(ValueError, match=r"'lam' cannot be '1e-3'"):
        run_notebook(path, assignments=["profile=mine"])


@pytest.mark.parametrize(
    "line", ["fold: str | None = None", "seed = 0", "seeds: list[int] = [0]", "seed: Seed = 0"]
)
def test_parameters_are_annotated_scalars(project, line):
    path = write(project, parameters=line)
    with pytest.raises(ValueError, match=f"(?s){re.escape(line)}.*one of int, float, str, bool"):
        notebook_parameters(path)


def test_a_default_may_be_computed_and_a_comment_may_hold_anything(project):
    path = write(project, parameters="seed: int = -(2**3)\nlam: float = 0.1  # lam = 0: w/o C4")
    assert check_parameters(path, {}, ["seed=1", "lam=2"]) == {"seed": 1, "lam": 2.0}
    with pytest.raises(ValueError, match="'seed' cannot be None"):
        check_parameters(path, {"seed": None})


def test_a_misspelt_notebook_names_the_near_one(project):
    write(project)
    with pytest.raises(FileNotFoundError, match=r"did you mean '01_toy'"):
        run_notebook("01_toi")


def test_show_source_holds_the_source_dedented():
    shown = notebook.show_source(notebook.headless)
    assert shown.data.startswith("def headless()") and "def headless()" in str(shown)
    method = notebook.show_source(config.RunConfig.replace).data
    assert method.startswith("def replace(self") and "\n    return RunConfig(" in method
