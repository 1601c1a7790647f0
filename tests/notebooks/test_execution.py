"""Every notebook runs from its first cell to its last, headless, with a tiny model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TINY = dict(
    target="synthetic", external="synthetic-external", modalities="tva", d=16, encoder_heads=2,
    encoder_ff=16, adapter_width=8, adapter_heads=2, adapter_ff=8, adapter_text_layers=[0, 1],
    max_tokens=24, stage1_epochs=1, epochs=2, precision="fp32", device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_tiny_bert) -> Path:
    """A project root whose default profile is tiny; nothing of the checkout is written."""
    place = tmp_path_factory.mktemp("project")  # notebook 01 fetches the corpora
    (place / "configs").mkdir()
    shutil.copytree(ROOT / "docs", place / "docs")  # notebook 07 reads the audit's rows there
    profile = {**TINY, "text_backbone": make_tiny_bert()}
    (place / "configs/synthetic.yml").write_text(yaml.safe_dump(profile))
    return place


def test_they_run_headless_and_write_only_their_own_figures(place):
    # one test: 05 to 07 read the runs of 03 and 04, and workers in parallel would part them
    for path in NOTEBOOKS:
        run_headless(place, path)


def run_headless(place, path):
    figures = place / "figures/synthetic"
    before = set(figures.glob("*")) if figures.is_dir() else set()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("CONKI_")},
        "CONKI_HOME": str(place), "CONKI_DATA": str(place / "data"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    out = place / "out" / path.name
    command = [sys.executable, "-m", "conki_lib.cli", "run", str(path), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [c for c in nbformat.read(out, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    new = set(figures.glob("*")) - before if figures.is_dir() else set()
    assert new and all(figure.name.startswith(path.stem[:3]) for figure in new), new
