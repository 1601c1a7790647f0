"""The pair explorer: change labels, temperature and sets; matrix, counts, loss and forces follow.

`ExplorerState` knows the mathematics and no widget; `picture` and `summary` write a state as SVG
and HTML in a few milliseconds; `explore` puts controls on top. Where nobody can touch a control,
`draw_state` makes a still picture of the same.
"""

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
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
        self._settle()
        self.restart()

    def _settle(self) -> None:
        """Check the settings and build the pair sets, once per change."""
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

    def restart(self) -> None:
        """Put all vectors back to where they started."""
        start = torch.tensor(START_DEGREES[: len(self.y)], dtype=torch.float64)
        self.angles: Tensor = start.deg2rad()

    def update(self, **changes: object) -> None:
        """Change settings, all or none; vectors stay where they are, new samples bring theirs.

        Raises:
            ValueError: an unknown setting, or a value that does not fit; nothing has changed.
            TypeError: a value of the wrong kind, such as text for a number; likewise.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"unknown setting {name!r}{near_names(name, known)}")
        changed = copy(self)
        vars(changed).update(changes)
        if changed.anchor not in changed.rows and "anchor" not in changes:
            changed.anchor = next(iter(changed.rows), self.anchor)
        changed._settle()
        changed.restart()
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

_SIDE, _EDGE, _PLANE = 470.0, 34.0, 400.0  # of the matrix, of its labels, of the plane, in pixels


def picture(state: ExplorerState) -> str:
    """Write matrix and plane as SVG; a row of the matrix under the pointer lists its pairs."""
    width, height = _EDGE + _SIDE + 20 + _PLANE, _EDGE + _SIDE + 4
    parts = [*_matrix_svg(state), *_plane_svg(state)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" style="background:white">'
        "<style>.row:hover rect{fill-opacity:1}</style>"
        f"{''.join(parts)}</svg>"
    )


def _label_svg(name: str, x: float, y: float, size: float, anchor: str) -> str:
    rep, sample = name.split("^")
    small = f'font-size="{0.72 * size:.1f}"'
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">'
        f'{rep[0]}<tspan dy="3" {small}>{rep[2]}</tspan>'
        f'<tspan dy="-7" {small}>{sample}</tspan></text>'
    )


def _matrix_svg(state: ExplorerState) -> Iterator[str]:
    rows, codes = state.rows, state.codes.tolist()
    R, cell = len(rows), _SIDE / len(rows)
    size = 11.0 if R <= 24 else 8.0
    for p, name in enumerate(rows):
        top = _EDGE + p * cell
        middle = top + cell / 2 + 3
        lists = "\n".join(f"{k}: {', '.join(v) or '-'}" for k, v in state.pairs_of(name).items())
        yield f'<g class="row"><title>{name}\n{lists}</title>'
        yield f'<rect x="0" y="{top:.1f}" width="{_EDGE}" height="{cell:.1f}" fill="white"/>'
        for code, run in groupby(range(R), key=lambda q, row=codes[p]: row[q]):
            columns = list(run)
            fill = PAIR_COLORS[SETS[code - 1]] if code else "white"
            yield (
                f'<rect x="{_EDGE + columns[0] * cell:.1f}" y="{top:.1f}" '
                f'width="{len(columns) * cell:.1f}" height="{cell:.1f}" '
                f'fill="{fill}" fill-opacity="{FILL}"/>'
            )
        yield _label_svg(name, _EDGE - 4, middle, size, "end") + "</g>"
        yield _label_svg(name, _EDGE + (p + 0.5) * cell, _EDGE - 8, size, "middle")
    for k in range(0, R + 1, len(REPS) // 2):
        at, end = _EDGE + k * cell, _EDGE + _SIDE
        stroke = INK if k % len(REPS) == 0 else "white"
        look = f'stroke="{stroke}" pointer-events="none"'
        yield f'<path d="M{at:.1f} {_EDGE}V{end}M{_EDGE} {at:.1f}H{end}" {look}/>'
    yield (
        f'<rect x="{_EDGE}" y="{_EDGE + rows.index(state.anchor) * cell:.1f}" width="{_SIDE}" '
        f'height="{cell:.1f}" fill="none" stroke="{INK}" stroke-width="2.5" pointer-events="none"/>'
    )


def _plane_svg(state: ExplorerState) -> Iterator[str]:
    B, middle = len(state.y), (_EDGE + _SIDE + 20 + _PLANE / 2, _EDGE + _SIDE / 2)
    unit = (_PLANE / 2 - 8) / (1 + RING * (B - 0.5))
    radii = unit * (1 + RING * np.arange(B))
    angles, forces = state.angles.numpy(), state.forces().numpy()
    yield f'<g transform="translate({middle[0]:.1f} {middle[1]:.1f})">'
    for i, radius in enumerate(radii):
        yield f'<circle r="{radius:.1f}" fill="none" stroke="#ddd"/>'
        yield f'<text y="{radius + 4:.1f}" font-size="10" fill="{MUTED}">{i + 1}</text>'
    for k in sorted(range(len(REPS)), key=lambda k: -POINT_SIZES[REPS[k]]):
        for i in range(B):
            yield _turn_svg(radii[i], angles[i, k], forces[i, k], REP_COLORS[REPS[k]])
            yield _point_svg(radii[i], angles[i, k], REPS[k], f"{REPS[k]}^{i + 1}", state.anchor)
    yield "</g>"


def _turn_svg(radius: float, theta: float, by: float, color: str) -> str:
    if abs(by) < 0.02:
        return ""
    arc = theta + by * np.linspace(0, 1, 7)
    line = " ".join(f"{radius * np.cos(a):.1f},{-radius * np.sin(a):.1f}" for a in arc)
    tip, back = theta + by + np.sign(by) * 5 / radius, arc[-1] - np.sign(by) * 4 / radius
    head = " ".join(
        f"{r * np.cos(a):.1f},{-r * np.sin(a):.1f}"
        for r, a in ((radius, tip), (radius - 4, back), (radius + 4, back))
    )
    return (
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
        f'<polygon points="{head}" fill="{color}"/>'
    )


def _point_svg(radius: float, theta: float, rep: str, name: str, anchor: str) -> str:
    x, y, half = radius * np.cos(theta), -radius * np.sin(theta), 0.55 * POINT_SIZES[rep] ** 0.5
    edge = f'stroke="{INK}" stroke-width="2.5"' if name == anchor else 'stroke="white"'
    look = f'fill="{REP_COLORS[rep]}" {edge}><title>{name}</title>'
    if REP_MARKERS[rep] == "o":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{1.1 * half:.1f}" {look}</circle>'
    side = f'width="{2 * half:.1f}" height="{2 * half:.1f}"'
    return f'<rect x="{x - half:.1f}" y="{y - half:.1f}" {side} {look}</rect>'


def summary(state: ExplorerState) -> str:
    """Write counts, loss and the anchor's pairs by name as HTML."""
    lines, counts, mates_of = [], state.masks.counts(ordered=False), state.pairs_of()
    for name in SETS:
        mates = ", ".join(mates_of[name]) or "–"
        swatch = f'<span style="color:{MATRIX_COLORS[name]}">&#9632;</span>'
        lines.append(
            f'<tr style="vertical-align:top"><td style="white-space:nowrap">'
            f"{swatch} <b>{name}</b></td>"
            f'<td style="white-space:nowrap">{PAIR_NAMES[name]}</td>'
            f'<td style="text-align:right">{counts[name]}</td>'
            f'<td style="padding-left:1.5em">{mates}</td></tr>'
        )
    loss = state.loss_and_slope()[0]
    classes = ", ".join(f"{v:+d}" for v in sentiment_class(state.y).tolist())
    return (
        f"<b>L_con = {loss:.4f}</b> &nbsp; classes r(y): {classes}"
        '<table style="line-height:1.5"><tr><th>set</th><th></th><th>pairs</th>'
        f"<th>with {state.anchor}</th></tr>{''.join(lines)}</table>"
    )


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
