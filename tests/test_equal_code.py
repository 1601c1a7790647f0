"""What bench/equal_code.py calls equal, and that its page shows what was shown."""

import json

import equal_code
import pytest

from conki_lib import records


def outcome(**changes) -> dict:
    return {"metrics": {"test": {"mae": 1.0}}, "history": [], "best epoch": 1,
            "predictions": "p", "weights": "w"} | changes  # fmt: skip


@pytest.mark.parametrize(
    ("now", "different"),
    [
        ({"full": {"full": outcome()}}, []),
        ({"full": {"full": outcome(weights="v")}}, ["full, full: weights"]),
        ({"full": {"full": outcome(metrics={}, history=[1])}},
         ["full, full: metrics", "full, full: history"]),
        ({"full": {"full": outcome(), "stage 1": outcome(best=2)}}, 5),
        ({}, 5),
        ({"full": {"full": outcome()}, "w/o C1": {"w/o C1": outcome()}}, 5),
    ],
)  # fmt: skip
def test_runs_are_equal_if_all_of_them_is(now, different):
    found = equal_code.compared({"full": {"full": outcome()}}, now)
    assert found == different or len(found) == different


def test_every_row_and_switch_is_a_case_and_the_page_is_of_today():
    names = [name for name, *_ in equal_code.cases()]
    assert len(names) == len(set(names))
    assert {"full", "w/o C4", "padding=released", "precision=bf16", "mosi-open"} <= set(names)
    shown = json.loads(records.EQUAL_CODE.read_text())
    assert equal_code.page(shown).strip() == equal_code.PAGE.read_text().strip()
