"""Pictures of what the loss does to vectors in the plane: directions, gradients, descent.

Plane vectors are given by their angles: ``angles[i, k]`` in radians is the direction of
representation k of sample i. The loss sees directions only, so pictures are free to use the radius:
each sample has a ring of its own, the first innermost. Markers are nested by size, so that
coinciding points stay visible.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from conki_lib.pairs import REPS
from conki_lib.plots.style import INK, MUTED, REP_COLORS, REP_MARKERS, panel_grid, rep_label

RING = 0.15  # distance between the rings of two samples
POINT_SIZES = {"A_t": 170, "O_t": 110, "A_v": 84, "O_v": 52, "A_a": 42, "O_a": 24}


def rep_legend(target: Axes | Figure, **where: object) -> None:
    """Explain the markers of the representations."""
    handles = [
        Line2D([], [], ls="", marker=REP_MARKERS[r], color=REP_COLORS[r], label=rep_label(r))
        for r in REPS
    ]
    target.legend(handles=handles, **where)


def draw_plane(
    angles: Float[Tensor, "B K"],
    *,
    arrows: Float[Tensor, "B K"] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """Draw plane vectors on one ring per sample, with arrows along the circle if given.

    Args:
        angles: directions in radians.
        arrows: how far to turn each vector, in radians; the motion that descent asks for.
        title: a heading.
        ax: where to draw; a new figure if None.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(4.6, 4.9))
    _rings(ax, len(angles))
    radii, angles = 1 + RING * np.arange(len(angles)), angles.detach().numpy()
    for k, name in sorted(enumerate(REPS), key=lambda item: -POINT_SIZES[item[1]]):
        x, height = radii * np.cos(angles[:, k]), radii * np.sin(angles[:, k])
        look = {"marker": REP_MARKERS[name], "color": REP_COLORS[name], "s": POINT_SIZES[name]}
        ax.scatter(x, height, zorder=3, edgecolor="white", linewidth=0.6, **look)
        for i in range(len(angles) if arrows is not None else 0):
            _turn(ax, float(radii[i]), float(angles[i, k]), float(arrows[i, k]), REP_COLORS[name])
    ax.set_title(title)
    return ax.get_figure(root=True)


def _rings(ax: Axes, B: int) -> None:
    circle = np.linspace(0, 2 * np.pi, 120)
    for i in range(B):
        radius = 1 + RING * i
        ax.plot(radius * np.cos(circle), radius * np.sin(circle), color="#DDDDDD", lw=0.8, zorder=0)
        ax.text(0, -radius, f"{i + 1}", color=MUTED, fontsize=7, ha="center", va="center")
    ax.plot(0, 0, "+", color=MUTED, ms=7)
    edge = 1 + RING * (B - 1) + 0.14
    ax.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
    ax.axis("off")


def _turn(ax: Axes, radius: float, theta: float, by: float, color: str) -> None:
    """An arrow along the ring from theta to theta + by."""
    if abs(by) < 0.05:
        return
    arc = theta + np.linspace(0, by, 12)
    x, height = radius * np.cos(arc), radius * np.sin(arc)
    ax.plot(x[:-1], height[:-1], color=color, lw=2, zorder=2)
    look = {"arrowstyle": "-|>", "color": color, "lw": 1.5, "mutation_scale": 11, "shrinkA": 0}
    ax.annotate("", (x[-1], height[-1]), (x[-3], height[-3]), arrowprops=look, zorder=4)


def draw_planes(
    planes: Mapping[str, Float[Tensor, "B K"]],
    *,
    arrows: Mapping[str, Float[Tensor, "B K"]] | None = None,
    columns: int = 5,
) -> Figure:
    """Draw several planes under their titles, in rows of `columns`."""
    size = 12 / max(min(columns, len(planes)), 3)
    fig, axes = panel_grid(len(planes), columns, (size, size + 0.3), more=(0.0, 0.4))
    for ax, (title, angles) in zip(axes, planes.items(), strict=True):
        turn = None if arrows is None else arrows[title]
        draw_plane(angles, arrows=turn, title=title, ax=ax)
    rep_legend(fig, loc="outside upper center", ncol=len(REPS))
    return fig


def draw_vectors(angles: Mapping[str, int | float], *, title: str = "") -> Figure:
    """Draw a few named unit vectors with their angles in degrees."""
    fig, ax = plt.subplots(figsize=(5.4, 3.6))
    for name, degrees in angles.items():
        x, height = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        rep = name.split("^")[0]
        arrow = {"arrowstyle": "-|>", "color": REP_COLORS[rep], "lw": 2.4, "mutation_scale": 16}
        ax.annotate("", (x, height), (0, 0), arrowprops=arrow)
        ax.plot(x, height, marker=REP_MARKERS[rep], color=REP_COLORS[rep], ms=9)
        text = f"{rep_label(name)}  at {degrees:.0f}°"
        ax.text(1.42 * x, 1.15 * height, text, ha="center", va="center")
    arc = np.linspace(0, np.pi, 100)
    ax.plot(np.cos(arc), np.sin(arc), color="#DDDDDD", lw=1, zorder=0)
    ax.set(xlim=(-1.85, 1.85), ylim=(-0.2, 1.3), aspect="equal", title=title)
    ax.axis("off")
    return fig


# ---- descent ------------------------------------------------------------------------------------


def draw_descent(paths: Mapping[str, Float[Tensor, "S B K"]], steps: Sequence[int]) -> Figure:
    """Draw stages of descent as a strip: one line of planes per title, one column per step."""
    size = 2.75
    fig = plt.figure(figsize=(size * len(steps), (size + 0.45) * len(paths) + 0.4))
    rep_legend(fig, loc="outside upper center", ncol=len(REPS))
    for strip, (title, path) in zip(
        np.atleast_1d(fig.subfigures(len(paths), 1)), paths.items(), strict=True
    ):
        strip.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        for ax, step in zip(strip.subplots(1, len(steps)), steps, strict=True):
            draw_plane(path[step], ax=ax)
            ax.set_title(f"step {step}", loc="center", fontsize=9, weight="normal")
    return fig


def animate_descent(paths: Mapping[str, Float[Tensor, "S B K"]]) -> HTML:
    """Make a small player of descent in the plane: play, pause, drag to any step.

    Where scripts do not run, on GitHub for instance, a sentence points at the strip instead.

    Args:
        paths: per title, the angles after each step.
    """
    data = {
        "titles": list(paths),
        "paths": [np.round(path.numpy(), 3).tolist() for path in paths.values()],
        "colors": [REP_COLORS[r] for r in REPS],
        "square": [REP_MARKERS[r] == "s" for r in REPS],
        "radius": [round(0.6 * POINT_SIZES[r] ** 0.5, 2) for r in REPS],
        "order": sorted(range(len(REPS)), key=lambda k: -POINT_SIZES[REPS[k]]),
        "ring": RING,
    }
    player = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    return HTML(player.replace("DATA", json.dumps(data, separators=(",", ":"))))


def draw_gaps(gaps: Mapping[str, Float[Tensor, " S"]]) -> Figure:
    """Draw the smallest angle between an O and an A, in degrees, over the steps of descent."""
    fig, ax = plt.subplots(figsize=(6.6, 2.8))
    for (title, gap), color, ls in zip(gaps.items(), (INK, MUTED), ("-", "--"), strict=False):
        ax.plot(gap.numpy(), label=title, color=color, ls=ls, lw=2.2)
    ax.set(xlabel="step", ylabel="smallest O–A angle (°)", ylim=(-3, None))
    ax.legend()
    return fig
