"""The lesson of pairs keeps its promises: folded solutions are right, wrong answers are not."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from conki_lib.plots import pairs as pictures
from conki_lib.plots import plane as planes

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_contrastive_pairs.ipynb"
LESSON = nbformat.read(NOTEBOOK, as_version=4).cells
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```", re.S)
SOLUTIONS = [found for c in LESSON for found in SOLUTION.findall(c.source)]
CHECK = re.compile(r"check\(answer_(\d)")


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The lesson's names after all its sums, without a picture, up to the exercises."""
    for module in (pictures, planes):
        for name in vars(module).copy():
            if name.startswith(("draw_", "compare_", "animate_", "pair_legend")):
                monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setenv("CONKI_HEADLESS", "1")
    names: dict[str, Any] = {}
    for cell in LESSON:
        if cell.cell_type != "code" or CHECK.search(cell.source):
            continue
        source = cell.source.replace("torch.rand(20, 3, 6", "torch.rand(2, 3, 6")
        source = re.sub(r"^(?:keep_figure|display)\(.*$", "", source, flags=re.M)
        exec(source.replace("figure = draw_state", "draw_state"), names)
    return names


def test_solutions_are_right_and_wrong_answers_are_not(
    lesson: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    exercises = [c.source for c in LESSON if c.cell_type == "code" and CHECK.search(c.source)]
    assert len(exercises) == len(SOLUTIONS) == 4
    try:
        for number, (cell, solution) in enumerate(zip(exercises, SOLUTIONS, strict=True), 1):
            blank = re.compile(rf"^answer_{number} = None.*$", re.M)
            assert blank.search(cell)
            capsys.readouterr()
            said = []
            for answer in (f"answer_{number} = None", f"answer_{number} = -1.5", solution):
                exec(blank.sub(lambda _, a=answer: a, cell), lesson)
                said.append(capsys.readouterr().out.split(":")[0].strip())
            assert said == ["still open", "not yet", "right"], number
    finally:
        torch.set_default_dtype(torch.float32)
