"""The pair explorer: change labels, temperature and sets; matrix, counts, loss and forces follow.

`ExplorerState` knows the mathematics and no widget; `picture` and `summary` write a state as SVG
and HTML in a few milliseconds, by explorer.html; `explore` puts controls on top. Where nobody can
touch a control, `draw_state` makes a still picture of the same.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor

from conki_lib.config import near_names
from conki_lib.losses import FORMS, contrastive_loss
from conki_lib.pairs import (
    N1_READINGS,
    REPS,
    SETS,
    PairMasks,
    check_sets,
    pair_masks,
    row_names,
    sentiment_class,
)
from conki_lib.plots.pairs import FILL, MATRIX_COLORS, draw_matrix, set_codes
from conki_lib.plots.plane import POINT_SIZES, RING, draw_plane, rep_legend
from conki_lib.plots.style import INK, MUTED, PAIR_COLORS, PAIR_NAMES, REP_COLORS, REP_MARKERS

START_DEGREES = (
    (20, 70, 120, 35, 90, 105),
    (55, 100, 150, 40, 80, 170),
    (130, 185, 215, 145, 165, 230),
    (240, 275, 310, 255, 290, 330),
    (300, 340, 15, 285, 325, 5),
    (65, 140, 200, 75, 155, 190),
)
SAMPLES = (3, 6)
SMALLEST_TAU = 0.005  # as in the run configuration
LONGEST_ARROW = 0.5  # radians


def plane(angles: Float[Tensor, "*S"]) -> Float[Tensor, "*S 2"]:
    """Unit vectors of the plane from their angles in radians."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


@dataclass
class ExplorerState:
    """A batch in the plane and the settings of the loss; everything shown follows from them.

    Attributes:
        y: three to six labels.
        tau: temperature, 0.005 or more.
        form: "released" or "paper".
        n1: "symmetric" or "literal".
        without: sets that are switched off.
        anchor: the row whose pairs are listed, e.g. ``"O_t^1"``.
    """

    y: tuple[float, ...] = (1.2, 0.8, -2.0)
    tau: float = 0.2
    form: str = "released"
    n1: str = "symmetric"
    without: tuple[str, ...] = ()
    anchor: str = "O_t^1"

    def __post_init__(self) -> None:
        if not SAMPLES[0] <= len(self.y) <= SAMPLES[1]:
            raise ValueError(f"y holds {len(self.y)} labels: give {SAMPLES[0]} to {SAMPLES[1]}")
        if not SMALLEST_TAU <= self.tau < math.inf:
            raise ValueError(f"tau={self.tau}: give {SMALLEST_TAU} or more")
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}{near_names(self.form, FORMS)}: known are {FORMS}")
        check_sets(self.n1, self.without)
        if self.anchor not in self.rows:
            near = near_names(self.anchor, self.rows)
            raise ValueError(f"anchor={self.anchor!r}{near}: it must be a row such as 'O_t^1'")
        self.masks: PairMasks = pair_masks(self.y, n1=self.n1, without=self.without)
        self.codes: np.ndarray = set_codes(self.masks)
        self.restart()

    def restart(self) -> None:
        """Put all vectors back to where they started."""
        start = torch.tensor(START_DEGREES[: len(self.y)], dtype=torch.float64)
        self.angles: Tensor = start.deg2rad()

    def update(self, **changes: Any) -> None:
        """Change settings, all or none; vectors stay where they are, new samples bring theirs.

        Raises:
            ValueError: a value that does not fit; nothing has changed.
            TypeError: an unknown setting, or a value of the wrong kind; likewise.
        """
        if self.anchor not in row_names(len(changes.get("y", self.y))):
            changes = {"anchor": row_names(1)[0]} | changes
        changed = replace(self, **changes)
        kept = self.angles[: len(changed.y)]
        changed.angles = torch.cat([kept, changed.angles[len(kept) :]])
        vars(self).update(vars(changed))

    @property
    def rows(self) -> list[str]:
        """Names of all rows, in order."""
        return row_names(len(self.y))

    @property
    def counts(self) -> pd.DataFrame:
        """Members of each set: unordered as the paper counts, ordered as the loss uses them."""
        counts = {"unordered": self.masks.counts(ordered=False), "ordered": self.masks.counts()}
        return pd.DataFrame(counts, index=list(SETS))

    def pairs_of(self, anchor: str | None = None) -> dict[str, list[str]]:
        """Names that stand with an anchor in each set, as its row of the matrix reads."""
        rows = self.rows
        mates: dict[str, list[str]] = {name: [] for name in SETS}
        for name, code in zip(rows, self.codes[rows.index(anchor or self.anchor)], strict=True):
            if code:
                mates[SETS[code - 1]].append(name)
        return mates

    def loss_and_slope(self) -> tuple[float, Float[Tensor, "B K"]]:
        """The loss, and its derivative by each angle."""
        angles = self.angles.clone().requires_grad_()
        settings = {"tau": self.tau, "form": self.form, "n1": self.n1, "without": self.without}
        loss = contrastive_loss(plane(angles), self.y, method="dense", gather=False, **settings)
        (slope,) = torch.autograd.grad(loss, angles)
        return loss.item(), slope

    def forces(self) -> Float[Tensor, "B K"]:
        """Where descent turns each vector, in radians; the longest arrow has a fixed length."""
        slope = self.loss_and_slope()[1]
        return -LONGEST_ARROW * slope / slope.abs().max().clamp(min=1e-9)

    def descend(self, steps: int = 1) -> None:
        """Turn every vector downhill; the step is in proportion to tau, so that it stays gentle."""
        share = len(self.y) * len(REPS) if self.form == "released" else len(REPS)
        for _ in range(steps):
            self.angles = self.angles - 0.25 * self.tau * share * self.loss_and_slope()[1]


# ---- pictures of a state ------------------------------------------------------------------------


@cache
def _page() -> Any:
    """The macros of explorer.html, and what they draw by."""
    known = dict(
        SETS=SETS, PAIR_NAMES=PAIR_NAMES, PAIR_COLORS=PAIR_COLORS, MATRIX_COLORS=MATRIX_COLORS,
        REP_COLORS=REP_COLORS, REP_MARKERS=REP_MARKERS, POINT_SIZES=POINT_SIZES, RING=RING,
        FILL=FILL, INK=INK, MUTED=MUTED, cos=math.cos, sin=math.sin, degrees=math.degrees,
    )  # fmt: skip
    text = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    blank = Environment(trim_blocks=True, finalize=lambda x: f"{x:.4g}" if type(x) is float else x)
    return blank.from_string(text, globals=known).module


def picture(state: ExplorerState) -> str:
    """Write matrix and plane as SVG; a row of the matrix under the pointer lists its pairs."""
    names, rows = state.rows, []
    for name, codes in zip(names, state.codes, strict=True):
        ends = np.flatnonzero(np.diff(codes, prepend=-1, append=-1))
        runs = np.stack([ends[:-1], np.diff(ends), codes[ends[:-1]]], axis=1).tolist()
        rows.append((name, state.pairs_of(name), runs))
    turns = (x.flatten().tolist() for x in (state.angles, state.forces()))
    vectors = sorted(zip(names, *turns, strict=True), key=lambda v: -POINT_SIZES[v[0][:3]])
    return _page().picture(rows, names.index(state.anchor), vectors)


def summary(state: ExplorerState) -> str:
    """Write counts, loss and the anchor's pairs by name as HTML."""
    loss, counts = state.loss_and_slope()[0], state.masks.counts(ordered=False)
    classes = ", ".join(f"{v:+d}" for v in sentiment_class(state.y).tolist())
    return _page().summary(loss, classes, state.anchor, counts, state.pairs_of())


def draw_state(state: ExplorerState) -> Figure:
    """Draw a state as a still figure: matrix, and plane with the forces."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11.6, 6), width_ratios=(1.15, 1))
    counts = ", ".join(f"{name} {n}" for name, n in state.counts["unordered"].items())
    draw_matrix(state.masks, title=counts, ax=left)
    title = f"$L_{{con}}$ = {state.loss_and_slope()[0]:.3f} at τ = {state.tau:g}"
    draw_plane(state.angles, arrows=state.forces(), title=title, ax=right)
    rep_legend(fig, loc="outside lower right", ncol=len(REPS))
    return fig


# ---- controls -----------------------------------------------------------------------------------


class Explorer:
    """Controls on top of a state. Every control writes to the state, then all is shown anew.

    Attributes:
        state: what is shown.
        panel: the widget to display.
    """

    def __init__(self, state: ExplorerState) -> None:
        self.state, self._busy = state, False
        self.svg, self.text = widgets.HTML(), widgets.HTML()
        self._make_controls()
        for control in (*self.labels, self.samples, *self.settings.values(), *self.switches):
            control.observe(self._changed, names="value")
        self.step.on_click(lambda _: self._move(lambda: self.state.descend(5)))
        self.again.on_click(lambda _: self._move(self.state.restart))
        self.panel = widgets.VBox(self._layout())
        self.show()

    def _make_controls(self) -> None:
        state, wide = self.state, {"description_width": "70px"}
        buttons = wide | {"button_width": "92px"}
        given = (*state.y, *(0.5, 2.0, -1.0))[: SAMPLES[1]]
        self.labels = [
            widgets.FloatSlider(v, min=-3, max=3, step=0.1, description=f"y of {i + 1}",
                                readout_format="+.1f", style=wide)
            for i, v in enumerate(given)
        ]  # fmt: skip
        self.samples = widgets.IntSlider(
            len(state.y), min=SAMPLES[0], max=SAMPLES[1], description="samples", style=wide
        )
        self.settings = {
            "tau": _tau_slider(state.tau, description="tau", style=wide),
            "n1": widgets.ToggleButtons(
                options=N1_READINGS, value=state.n1, description="N1", style=buttons
            ),
            "form": widgets.ToggleButtons(
                options=FORMS, value=state.form, description="form", style=buttons
            ),
            "anchor": widgets.Dropdown(
                options=state.rows, value=state.anchor, description="row", style=wide
            ),
        }
        self.switches = [
            widgets.Checkbox(name not in state.without, description=name, indent=False,
                             layout={"width": "60px"})
            for name in SETS
        ]  # fmt: skip
        self.step = widgets.Button(description="descend 5 steps", icon="play")
        self.again = widgets.Button(description="start again", icon="undo")

    def _layout(self) -> list[widgets.Widget]:
        left = widgets.VBox([self.samples, *self.labels])
        lines = [widgets.HBox(self.switches), widgets.HBox([self.step, self.again])]
        right = widgets.VBox([*self.settings.values(), *lines])
        return [widgets.HBox([left, right]), self.text, self.svg]

    def _changed(self, _change: Any) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self._read_controls()
        finally:
            self._busy = False
        self.show()

    def _read_controls(self) -> None:
        y = tuple(slider.value for slider in self.labels[: self.samples.value])
        without = tuple(s.description for s in self.switches if not s.value)
        anchor = self.settings["anchor"]
        rows = row_names(len(y))
        if list(anchor.options) != rows:
            kept = anchor.value if anchor.value in rows else rows[0]
            anchor.options, anchor.value = rows, kept
        values = {name: control.value for name, control in self.settings.items()}
        values["tau"] = max(values["tau"], SMALLEST_TAU)  # the slider's end may miss a last digit
        self.state.update(y=y, without=without, **values)

    def _move(self, action: Any) -> None:
        action()
        self.show()

    def show(self) -> None:
        """Write the present state into the panel."""
        for i, slider in enumerate(self.labels):
            slider.layout.display = "flex" if i < len(self.state.y) else "none"
        self.svg.value, self.text.value = picture(self.state), summary(self.state)


def _tau_slider(tau: float, **look: Any) -> widgets.FloatLogSlider:
    """A slider whose steps hit the given value exactly: browsers snap to the steps."""
    step, start = 0.05, math.log10(tau)
    down = int((start - math.log10(SMALLEST_TAU)) / step)
    return widgets.FloatLogSlider(
        tau, min=start - down * step, max=start + 18 * step, step=step, **look
    )


def explore(*, static: bool = False, **settings: Any) -> widgets.Widget | Figure:
    """Show the explorer, or its still picture where nobody can touch a control.

    Args:
        static: give the still figure, e.g. ``static=headless()``.
        settings: fields of `ExplorerState` to start from, e.g. ``tau=0.1``.
    """
    state = ExplorerState(**settings)
    return draw_state(state) if static else Explorer(state).panel
