"""Pictures of runs show the numbers they were given."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from conki_lib.plots import runs
from conki_lib.plots.style import PAIR_COLORS

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def _lines(ax) -> dict[str, list]:
    """The curves of an axis by colour, single points (rings) left out."""
    return {li.get_color(): list(li.get_ydata()) for li in ax.lines if len(li.get_ydata()) > 1}


def test_curves_draw_each_run_and_ring_the_chosen_epoch():
    full = [{"epoch": 1, "loss_task": 2.0, "valid_mae": 0.9}, {"epoch": 2, "loss_task": 1.0,
            "valid_mae": 0.8}, {"epoch": 3, "loss_task": 0.5, "valid_mae": 0.85}]  # fmt: skip
    other = [{"epoch": 1, "loss_task": 3.0}, {"epoch": 2, "loss_task": 2.5}]
    fig = runs.learning_curves({"full": full, "w/o C4": other}, ["loss_task", "valid_mae"],
                               {"full": 2, "w/o C4": 2})  # fmt: skip
    task, mae = fig.axes
    assert _lines(task) == {runs.RUN_COLORS[0]: [2.0, 1.0, 0.5], runs.RUN_COLORS[1]: [3.0, 2.5]}
    assert _lines(mae)[runs.RUN_COLORS[0]] == [0.9, 0.8, 0.85]  # the other run has no such term
    rings = [(li.get_xdata()[0], li.get_ydata()[0]) for li in mae.lines if len(li.get_xdata()) == 1]
    assert rings == [(2, 0.8)]


def test_scatter_shows_every_utterance_and_keeps_wild_predictions_in_view():
    table = pd.DataFrame({"y": [-1.0, 0.0, 2.0], "y_hat": [-0.5, 0.5, 50.0]})
    fig = runs.prediction_scatter({"full": table, "w/o C4": table * 0})
    points = fig.axes[0].collections[0].get_offsets()
    assert len(points) == 3
    assert points[2][1] == pytest.approx(3.3)  # drawn at the border, counted as it is
    crosses = fig.axes[0].collections[1].get_offsets()
    assert len(crosses) == 1 and crosses[0][1] == pytest.approx(3.3)
    assert [ax.get_xlabel().endswith("(x: 1 beyond)") for ax in fig.axes] == [True, False]
    assert "MAE 16.333" in fig.axes[0].get_title(loc="left") + fig.axes[0].get_title()


@pytest.mark.parametrize("bounds", [(-3.0, 3.0), (-1.0, 1.0)])
def test_grey_quadrants_are_those_of_a_wrong_sign(bounds):
    table = pd.DataFrame({"y": [0.5], "y_hat": [0.5]})
    ax = runs.prediction_scatter({"full": table}, bounds).axes[0]
    grey = [p for p in ax.patches if isinstance(p, Rectangle)]
    edge = 1.1 * bounds[1]
    corners = sorted((*p.get_xy(), p.get_width(), p.get_height()) for p in grey)
    assert corners == [(-edge, 0, edge, edge), (0, -edge, edge, edge)]


def test_mean_errors_by_hand():
    table = pd.DataFrame({"y": [0.0, 0.0, 1.0, 1.0], "y_hat": [1.0, -3.0, 1.0, 0.5]})
    groups = {"0": np.array([True, True, False, False]), "1": np.array([False, False, True, True]),
              "none": np.zeros(4, bool)}  # fmt: skip
    errors = runs.mean_errors({"full": table}, groups, list("abcd")).set_index("group")
    assert errors.loc["0", "mae"] == 2.0 and errors.loc["1", "mae"] == 0.25
    assert errors.loc["none", "n"] == 0 and np.isnan(errors.loc["none", "mae"])
    assert errors[["low", "high"]].isna().all(axis=None)  # too few for an interval


def test_intervals_of_errors_are_over_videos():
    """Clips of a video that are all alike count as one, so the interval is as wide as theirs."""
    rng = np.random.default_rng(0)
    one = pd.DataFrame({"y": 0.0, "y_hat": rng.normal(size=40)})
    everyone = {"all": np.ones(40, bool)}
    (alone,) = runs.mean_errors({"full": one}, everyone, list(map(str, range(40)))).itertuples()
    four = pd.concat([one] * 4, ignore_index=True)
    videos = [str(k % 40) for k in range(160)]
    (repeated,) = runs.mean_errors({"full": four}, {"all": np.ones(160, bool)}, videos).itertuples()
    assert repeated.n == 160
    assert (repeated.mae, repeated.low, repeated.high) == pytest.approx(
        (alone.mae, alone.low, alone.high)
    )
    half = 1.96 * one["y_hat"].abs().std() / 40**0.5
    assert alone.high - alone.low == pytest.approx(2 * half, rel=0.1)
    few = runs.mean_errors({"full": one}, everyone, [str(k % 9) for k in range(40)])
    assert np.isnan(few["low"]).all()  # nine videos


def test_grouped_errors_stand_side_by_side_with_their_counts():
    table = pd.DataFrame({"y": [0.0, 0.0, 1.0], "y_hat": [1.0, 0.0, 3.0]})
    groups = {"0": np.array([True, True, False]), "1": np.array([False, False, True])}
    errors = runs.mean_errors({"a": table, "b": table.assign(y_hat=0.0)}, groups, list("abc"))
    ax = runs.grouped_errors(errors, "title").axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.5, 2.0, 0.0, 1.0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0\nn = 2", "1\nn = 1"]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert centres[0] < centres[2] < centres[1] < centres[3]


def test_probe_bars_put_each_state_where_its_modality_is():
    rows = [
        {"rows": "target", "modality": m, "state": s, "n": 9, "corr": corr}
        for m, values in {"t": (0.1, 0.2, 0.3), "a": (0.4, 0.5, 0.6)}.items()
        for s, corr in zip(runs.STATE_NAMES, values, strict=True)
    ]
    ax = runs.probe_bars(pd.DataFrame(rows)).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["text", "audio"]
    assert [b.get_height() for b in ax.patches] == [0.1, 0.4, 0.2, 0.5, 0.3, 0.6]


def test_pair_cosines_mark_every_run_and_leave_gaps_for_empty_sets():
    rows = [{"run": r, "set": s, "cosine": c} for r, s, c in
            [("full", "P1", 0.5), ("w/o C4", "P1", 0.1), ("full", "N1", float("nan"))]]  # fmt: skip
    ax = runs.pair_cosines(pd.DataFrame(rows)).axes[0]
    assert [t.get_text()[:2] for t in ax.get_yticklabels()] == list(PAIR_COLORS)
    points = {float(li.get_xdata()[0]) for li in ax.lines if len(li.get_xdata()) == 1}
    assert {0.5, 0.1} <= points


@pytest.mark.parametrize("n_layers", [{"t": 6, "v": 2, "a": 2}, {"v": 2, "a": 2}, {"t": 12}])
def test_architecture_has_a_box_per_layer_and_module(n_layers):
    plugged = {"t": (0, 2, 4), "v": (1,)}
    fig = runs.architecture(n_layers, plugged, reached=tuple(n_layers))
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert sum(t.startswith("layer") for t in texts) == sum(n_layers.values())
    assert texts.count("module") == sum(len(plugged.get(m, ())) for m in n_layers)
    names = [t.get_text() for t in fig.legends[0].get_texts()]
    assert names == ["backbones: frozen", "adapters: learn", "heads: learn"]
    fig.canvas.draw()


def test_architecture_sets_apart_what_the_external_corpus_does_not_reach():
    fig = runs.architecture({"t": 6, "a": 2}, {"t": (0, 2, 4), "a": (1,)}, reached=("t",))
    dashed = [p for p in fig.axes[0].patches if p.get_linestyle() == "--"]
    assert len(dashed) == 4  # two layers, a module, the fully connected layer
    assert all(p.get_x() > 1.8 for p in dashed)
    assert fig.legends[0].get_texts()[-1].get_text() == "not in stage 1"
