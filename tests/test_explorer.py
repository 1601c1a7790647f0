"""The explorer: its state without a widget, its panel without a browser."""

import math
import re
import time
from collections.abc import Callable

import pytest
import torch

from conki_lib.config import RunConfig
from conki_lib.explorer import (
    SMALLEST_TAU,
    START_DEGREES,
    Explorer,
    ExplorerState,
    draw_state,
    explore,
    picture,
    plane,
    summary,
)
from conki_lib.losses import FORMS, contrastive_loss
from conki_lib.pairs import N1_READINGS, REPS, pair_table


def test_the_appendix_example_is_the_start() -> None:
    state = ExplorerState()
    assert state.counts["unordered"].to_dict() == {"P1": 18, "P2": 18, "N1": 81, "N2": 36}
    assert state.counts["ordered"].to_dict() == {"P1": 36, "P2": 36, "N1": 162, "N2": 72}


@pytest.mark.parametrize("n1", ["symmetric", "literal"])
def test_a_row_lists_the_pairs_of_the_table(n1: str) -> None:
    state = ExplorerState(y=(1.2, 0.8, -2.0, 0.1), n1=n1, without=("P2",))
    table = pair_table(state.y, n1=n1, without=("P2",))
    for anchor in ("O_v^2", "A_a^4"):
        rows = table[table["p"] == anchor]
        assert state.pairs_of(anchor) == {
            name: rows.loc[rows["set"] == name, "q"].tolist() for name in ("P1", "P2", "N1", "N2")
        }


def test_loss_and_slope_are_those_of_the_library() -> None:
    state = ExplorerState(tau=0.3, form="paper", without=("N2",))
    loss, slope = state.loss_and_slope()
    settings = {"tau": 0.3, "form": "paper", "without": ("N2",)}
    assert loss == pytest.approx(contrastive_loss(plane(state.angles), state.y, **settings).item())
    step = 1e-6 * torch.ones_like(state.angles)
    ahead = contrastive_loss(plane(state.angles + step * slope.sign()), state.y, **settings).item()
    assert (ahead - loss) / 1e-6 == pytest.approx(slope.abs().sum().item(), rel=1e-3)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_descent_lowers_the_loss_and_restart_undoes_it(form: str) -> None:
    state = ExplorerState(form=form)
    before = state.loss_and_slope()[0]
    state.descend(10)
    assert state.loss_and_slope()[0] < before
    state.restart()
    assert state.loss_and_slope()[0] == before


def test_forces_point_downhill_and_the_longest_has_a_fixed_length() -> None:
    state = ExplorerState()
    slope, force = state.loss_and_slope()[1], state.forces()
    assert ((slope * force) <= 0).all()
    assert force.abs().max().item() == pytest.approx(0.5)


def test_forces_are_finite_when_no_pair_is_left() -> None:
    state = ExplorerState(without=("P1", "P2"))
    assert state.loss_and_slope()[0] == 0
    assert (state.forces() == 0).all()


def test_more_samples_bring_vectors_and_keep_a_row_that_still_exists() -> None:
    state = ExplorerState(anchor="A_t^3")
    state.update(y=(1.0, 2.0, 3.0, 0.0))
    assert state.angles.shape == (4, len(REPS)) and state.anchor == "A_t^3"
    state.update(anchor="O_a^4")
    state.update(y=(1.0, 2.0, 3.0))
    assert state.anchor == "O_t^1" and state.angles.shape == (3, len(REPS))


def test_a_change_of_labels_leaves_moved_vectors_where_they_are() -> None:
    state = ExplorerState()
    state.descend(3)
    moved = state.angles
    state.update(y=(1.2, 2.8, -2.0))
    assert torch.equal(state.angles, moved)
    assert state.counts.loc["P2", "unordered"] == 0


def test_another_number_of_samples_keeps_moved_vectors_and_new_ones_start_at_their_place() -> None:
    state = ExplorerState()
    state.descend(3)
    moved, start = state.angles, ExplorerState(y=(0.0,) * 5).angles
    state.update(y=(1.2, 0.8, -2.0, 0.5, 2.0))
    assert torch.equal(state.angles, torch.cat([moved, start[3:]]))
    state.descend(1)
    state.update(y=(1.2, 0.8, -2.0, 0.5))
    assert state.angles.shape == (4, len(REPS)) and not torch.equal(state.angles, start[:4])
    state.restart()
    assert torch.equal(state.angles, start[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": (1.0, 2.0)}, "give 3 to 6"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"form": "papper"}, "did you mean 'paper'"),
        ({"n1": "lyteral"}, "did you mean 'literal'"),
        ({"without": ("N3",)}, "unknown set 'N3'"),
        ({"anchor": "O_t^9"}, "anchor='O_t^9'"),
        ({"taw": 0.1}, "argument 'taw'"),
        ({"tau": 0.5, "n1": "no"}, "n1='no'"),
        ({"y": (1.0, math.nan, 0.0)}, "nan"),
        ({"tau": "x"}, "'x'"),  # under test the types are checked before
        ({"y": 1.0, "tau": 0.5}, "has no len()"),
    ],
)
def test_bad_changes_are_refused_whole(change: dict, message: str) -> None:
    state = ExplorerState()
    before = vars(state).copy()
    with pytest.raises((ValueError, TypeError), match=f"(?i){re.escape(message)}"):
        state.update(**change)
    after = vars(state)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert state == ExplorerState() and state.counts["unordered"].sum() == 153


def test_start_positions_cover_the_largest_batch() -> None:
    assert len(START_DEGREES) == 6 and all(len(row) == len(REPS) for row in START_DEGREES)


# ---- what is shown ------------------------------------------------------------------------------


def test_the_picture_has_every_row_vector_and_the_anchor() -> None:
    state = ExplorerState(anchor="A_v^2")
    svg = picture(state)
    assert svg.count('class="row"') == 18
    titles = re.findall(r"<title>(.*?)</title>", svg, re.S)
    assert len(titles) == 36  # a row of the matrix and a point of the plane each
    assert "A_v^2\nP1: A_t^2, A_a^2\nP2: A_t^1, A_v^1, A_a^1\n" in titles[10]


def test_the_summary_names_the_anchors_pairs_and_the_loss() -> None:
    state = ExplorerState()
    html = summary(state)
    assert f"L_con = {state.loss_and_slope()[0]:.4f}" in html
    assert "O_v^1, O_a^1" in html and ">81<" in html and "+1, +1, -2" in html


def test_controls_write_to_the_state_and_all_is_shown_anew() -> None:
    explorer = Explorer(ExplorerState())
    loss = explorer.text.value
    explorer.settings["tau"].value = 1.0
    assert explorer.state.tau == pytest.approx(1.0) and explorer.text.value != loss
    explorer.labels[1].value = -2.0
    assert explorer.state.y == (1.2, -2.0, -2.0)
    explorer.switches[2].value = False
    assert explorer.state.without == ("N1",) and explorer.state.counts.loc["N1", "ordered"] == 0
    explorer.settings["n1"].value = "literal"
    explorer.settings["form"].value = "paper"
    assert (explorer.state.n1, explorer.state.form) == ("literal", "paper")
    assert explorer.svg.value == picture(explorer.state)


def test_the_number_of_samples_changes_rows_and_sliders() -> None:
    explorer = Explorer(ExplorerState())
    explorer.samples.value = 5
    anchor = explorer.settings["anchor"]
    assert len(anchor.options) == 30 and explorer.svg.value.count('class="row"') == 30
    assert [slider.layout.display for slider in explorer.labels] == ["flex"] * 5 + ["none"]
    anchor.value = "A_a^5"
    assert explorer.state.anchor == "A_a^5"
    explorer.samples.value = 3
    assert anchor.value == explorer.state.anchor == "O_t^1"


def test_buttons_descend_and_start_again() -> None:
    explorer = Explorer(ExplorerState())
    start = explorer.svg.value
    explorer.step.click()
    assert explorer.svg.value != start
    explorer.again.click()
    assert explorer.svg.value == start


def test_every_update_costs_less_than_a_tenth_of_a_second_of_processor_time() -> None:
    # processor time, the least of several: a budget that load on the machine cannot break
    explorer = Explorer(ExplorerState())
    explorer.samples.value = 6
    settings, switch = explorer.settings, explorer.switches[2]
    changes = {
        "samples": lambda k: setattr(explorer.samples, "value", 5 + k % 2),
        "label": lambda k: setattr(explorer.labels[1], "value", k - 2.0),
        "tau": lambda k: setattr(settings["tau"], "value", 0.1 + 0.1 * k),
        "N1": lambda k: setattr(settings["n1"], "value", N1_READINGS[k % 2]),
        "form": lambda k: setattr(settings["form"], "value", FORMS[k % 2]),
        "row": lambda k: setattr(settings["anchor"], "value", ("A_a^5", "O_t^2")[k % 2]),
        "switch": lambda k: setattr(switch, "value", not switch.value),
        "descend": lambda k: explorer.step.click(),
        "again": lambda k: explorer.again.click(),
    }
    costs = {name: min(_cost(change, k) for k in range(4)) for name, change in changes.items()}
    assert max(costs.values()) < 0.1, costs
    assert len(explorer.state.y) == 6


def _cost(change: Callable[[int], None], k: int) -> float:
    start = time.process_time()
    change(k)
    return time.process_time() - start


def test_static_gives_a_figure_and_otherwise_a_widget() -> None:
    figure = explore(static=True, tau=0.1)
    titles = ["".join(ax.get_title(loc=loc) for loc in ("left", "center")) for ax in figure.axes]
    assert titles[0] == "P1 18, P2 18, N1 81, N2 36" and "τ = 0.1" in titles[1]
    assert hasattr(explore(), "children")
    assert draw_state(ExplorerState(y=(0.0,) * 4)).axes


def test_the_explorer_takes_every_temperature_that_the_configuration_takes() -> None:
    assert RunConfig(tau=SMALLEST_TAU).contrast.tau == SMALLEST_TAU
    with pytest.raises(ValueError, match="tau"):
        RunConfig(tau=0.999 * SMALLEST_TAU)
    state = ExplorerState(tau=SMALLEST_TAU)
    state.descend(3)
    assert math.isfinite(state.loss_and_slope()[0]) and draw_state(state).axes
    explorer = Explorer(ExplorerState())
    slider = explorer.settings["tau"]
    slider.value = 10**slider.min
    assert explorer.state.tau == pytest.approx(SMALLEST_TAU, rel=0.12)
    Explorer(state).settings["tau"].value = SMALLEST_TAU * (1 - 1e-12)
    assert state.tau == SMALLEST_TAU


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.07, 0.2, 1.0])
def test_the_temperature_slider_has_a_step_at_its_start(tau: float) -> None:
    # a browser snaps to the steps, and would change the loss before anybody touched it
    slider = Explorer(ExplorerState(tau=tau)).settings["tau"]
    steps = (math.log10(tau) - slider.min) / slider.step
    assert steps == pytest.approx(round(steps), abs=1e-9)
    assert 10**slider.min >= 0.999 * SMALLEST_TAU and slider.value == pytest.approx(tau)


def test_an_update_is_taken_whole_or_not_at_all() -> None:
    state = ExplorerState()
    before = vars(state).copy()
    for changes in ({"y": ()}, {"y": (1.0,) * 40}, {"tau": 0.0}, {"y": (1.0, 2.0), "form": "new"}):
        with pytest.raises(ValueError):
            state.update(**changes)
        assert vars(state) == before
