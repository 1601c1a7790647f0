"""The `conki` command: errors without tracebacks, and what each command passes on."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from conki_lib.cli import app

HTML = "<!DOCTYPE html><html><title>Quota exceeded</title></html>"


@pytest.fixture
def conki(tmp_path, monkeypatch):
    """A function that calls the command in an empty place and returns its result."""
    monkeypatch.setenv("CONKI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CONKI_DEBUG", raising=False)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def failed(result, *words: str) -> bool:
    """Did the command stop with one readable message?"""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output and result.stderr.startswith("Error: ")
    return all(word in result.stderr for word in words)


def test_help_lists_the_commands_of_the_readme(conki):
    result = conki("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("fetch", "convert", "inspect", "run", "doctor"))


def test_train_runs_one_row_and_prints_its_metrics(conki, monkeypatch):
    from types import SimpleNamespace

    from conki_lib import training

    asked = []

    def run(config):
        asked.append((config.variant, config.runtime.seed, config.data.fold))
        return SimpleNamespace(metrics={"valid": {"mae": 0.5}, "test": {"mae": 0.75}})

    monkeypatch.setattr(training, "fine_tune", run)
    options = ("--profile", "mosi-open", "--variant", "w/o N1")
    result = conki("train", *options, "--seed", 3)
    conki("train", *options, "--fold", "speakers62")
    assert asked == [("w/o N1", 3, "standard"), ("w/o N1", 0, "speakers62")]
    assert result.exit_code == 0 and "0.75" in result.stdout
    assert failed(conki("train", "--variant", "w/o N3"), "w/o N1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("batch_size=0.5", "stage2.batch_size cannot be 0.5: Input should be a valid integer"),
        ("tau=0.001", "contrast.tau cannot be 0.001: Input should be greater"),
    ],
)
def test_a_value_that_a_setting_cannot_have_is_one_line(conki, row, words):
    for command in (("train", "--variant", row), ("pipeline", "--rows", f"full,{row}")):
        result = conki(*command)
        assert failed(result, words) and result.stderr.count("\n") == 1


def test_run_executes_a_notebook_with_typed_parameters(conki, tmp_path):
    path = tmp_path / "toy.ipynb"
    cell = new_code_cell("seed: int = 0  # of everything", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell, new_code_cell("print(seed + 1)")]), path)
    result = conki("run", path, "-p", "seed=41", "-o", tmp_path / "out.ipynb")
    assert result.exit_code == 0, result.output
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text == "42\n"
    assert failed(conki("run", path, "-p", "sead=1"), "'sead'", "did you mean 'seed'")
    assert failed(conki("run", path, "-p", "seed=[1,2]"), "'seed' cannot be '[1,2]'")
    assert failed(conki("run", path, "--profile", "synthetik"), "did you mean 'synthetic'")
    assert failed(conki("run", "99_nothing"), "no notebook '99_nothing'")


def test_fetch_names_the_near_corpus(conki):
    assert failed(conki("fetch", "mosi-opn"), "mosi-opn", "mosi-open")


def test_convert_refuses_a_web_page_and_writes_nothing(conki, tmp_path):
    page = tmp_path / "unaligned_50.pkl"
    page.write_text(HTML)
    assert failed(conki("convert", page, tmp_path / "store"), "unaligned_50.pkl")
    assert not (tmp_path / "store").exists()
    assert failed(conki("convert", tmp_path / "absent.pkl", tmp_path / "x/store"), "absent.pkl")
    assert not (tmp_path / "x").exists()


def test_inspect_recognises_a_web_page(conki, tmp_path):
    page = tmp_path / "unaligned_50.pkl"
    page.write_text(HTML)
    result = conki("inspect", page)
    assert "html" in result.output.lower() and "Traceback" not in result.output


def test_inspect_shows_a_store(conki, make_tiny_store):
    result = conki("inspect", make_tiny_store("toy"))
    assert result.exit_code == 0 and "toy" in result.stdout


def test_doctor_says_device_corpora_and_backbone(conki):
    result = conki("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "device", "precision", "mosi-open", "missing", "text backbone"):
        assert word in result.stdout
    for line in result.stdout.splitlines():
        assert len(line) <= 80 or max(line.split(), key=len).startswith(("/", "`/")), line


def test_a_reader_that_has_seen_enough_is_no_error():
    call = [sys.executable, "-m", "conki_lib.cli", "doctor"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as conki:
        conki.stdout.close()  # before anything is written
        assert conki.stderr.read() == ""


def test_merge_and_results_of_a_profile_without_runs(conki, tmp_path, monkeypatch):
    from conki_lib import pipeline, records

    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    result = conki("merge", "synthetic")
    assert result.exit_code == 0
    assert Path(result.stdout.strip()) == tmp_path / "results/synthetic/records.jsonl"
    assert not (tmp_path / "results").exists()
    assert failed(conki("results", "synthetic"), "no runs of 'synthetic' yet", "make reproduce")
    for command in ("merge", "results"):
        assert failed(conki(command, "synthetc"), "did you mean 'synthetic'")
    assert not (tmp_path / "results/synthetc").exists()


def test_pipeline_rejects_an_unknown_profile_before_anything(conki, tmp_path):
    assert failed(conki("pipeline", "--profile", "mosi-opn"), "did you mean 'mosi-open'")
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(conki, monkeypatch):
    monkeypatch.setenv("CONKI_DEBUG", "1")
    assert isinstance(conki("run", "99_nothing").exception, FileNotFoundError)


def test_convert_passes_on_roles_folds_and_range(conki, tmp_path, monkeypatch):
    from conki_lib import data

    asked = {}
    monkeypatch.setattr(data, "convert", lambda *paths, **options: asked.update(options))
    conki("convert", "x", "y", "--folds", "f.json", "--role", "v=a.csd", "--role", "a=b.csd",
          "--label-range", "-4", "4", "--number-duplicates")  # fmt: skip
    assert asked["folds"] == Path("f.json") and asked["roles"] == {"v": "a.csd", "a": "b.csd"}
    assert asked["label_range"] == (-4, 4) and asked["number_duplicates"]
    conki("convert", "x", "y")
    assert asked["folds"] is asked["roles"] is None and not asked["number_duplicates"]
