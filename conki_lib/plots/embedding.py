"""Pictures of the representations: maps, grids of maps, numbers along training, similarities."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from conki_lib.embedding import MOMENTS, SETTINGS
from conki_lib.plots.runs import run_look
from conki_lib.plots.style import INK, MUTED, REP_COLORS, REP_MARKERS, panel_grid, rep_label

SIGNS = "PuOr"
NUMBERS = {
    "silhouette_kind": ("silhouette, O against A", "larger: own kind nearer than the other"),
    "silhouette_class": ("silhouette by class", "larger: classes apart"),
    "alignment_P1": ("alignment of P1", "smaller: a sample's views agree"),
    "alignment_P2": ("alignment of P2", "smaller: a class's samples agree"),
    "uniformity": ("uniformity", "smaller: spread over the sphere"),
}


def map_figure(coordinates: pd.DataFrame, color: str = "representation") -> Figure:
    """Draw one map per method (down) and row of the tables (across); one joint fit per panel.

    Args:
        coordinates: from `conki_lib.embedding.maps`, one setting and seed per method, with a
            column variant.
        color: ``"representation"`` or ``"sentiment"``.
    """
    methods, variants = (list(dict.fromkeys(coordinates[c])) for c in ("method", "variant"))
    fig, axes = plt.subplots(
        len(methods), len(variants), figsize=(4.3 * len(variants), 3.9 * len(methods)),
        squeeze=False,
    )  # fmt: skip
    limit = float(coordinates["y"].abs().max())
    for (i, j), ax in np.ndenumerate(axes):
        chosen = (coordinates["method"] == methods[i]) & (coordinates["variant"] == variants[j])
        part = coordinates[chosen]
        _draw_map(ax, part, color, limit)
        setting = f"{SETTINGS[methods[i]]} {part['setting'].iloc[0]}"
        ax.set_title(f"{variants[j]}: {methods[i]}, {setting}", fontsize=10)
    _map_legend(fig, axes, coordinates, color, limit)
    return fig


def _draw_map(ax: Axes, part: pd.DataFrame, color: str, limit: float, size: float = 16.0) -> None:
    for name in dict.fromkeys(part["rep"]):
        rows = part[part["rep"] == name]
        look = dict(s=size, marker=REP_MARKERS[name], lw=0.25, edgecolor="white", alpha=0.85)
        if color == "sentiment":
            look |= dict(c=rows["y"], cmap=SIGNS, norm=TwoSlopeNorm(0, -limit, limit),
                         edgecolor=MUTED)  # fmt: skip
        else:
            look["color"] = REP_COLORS[name]
        ax.scatter(rows["x1"], rows["x2"], **look)
        if color == "sentiment":  # which cloud this is, at the point nearest to its middle
            xy = rows[["x1", "x2"]]
            place = xy.loc[(xy - xy.median()).pow(2).sum(axis=1).idxmin()]
            ax.annotate(rep_label(name), place, fontsize=11, ha="center", va="center",
                        path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(True)


def _map_legend(fig: Figure, axes, coordinates: pd.DataFrame, color: str, limit: float) -> None:
    names = dict.fromkeys(coordinates["rep"])
    if color == "sentiment":
        scale = ScalarMappable(TwoSlopeNorm(0, -limit, limit), SIGNS)
        fig.colorbar(scale, ax=axes, label="sentiment $y$", shrink=0.6, pad=0.02)
        first = {n[0]: n for n in reversed(names)}
        labels = {first[kind]: f"${kind}_m$" for kind in "OA" if kind in first}
    else:
        labels = {n: rep_label(n) for n in names}
    handles = [
        Line2D([], [], marker=REP_MARKERS[n], ls="none", ms=7, label=label,
               color=INK if color == "sentiment" else REP_COLORS[n])
        for n, label in labels.items()
    ]  # fmt: skip
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def grid_figure(coordinates: pd.DataFrame, method: str) -> Figure:
    """Draw small maps of one method: settings across, rows of the tables and seeds down.

    Args:
        coordinates: from `conki_lib.embedding.maps`, with a column variant.
        method: ``"t-SNE"`` or ``"UMAP"``.
    """
    part = coordinates[coordinates["method"] == method]
    down = list(part[["variant", "seed"]].drop_duplicates().itertuples(index=False, name=None))
    across = sorted(part["setting"].unique())
    fig, axes = plt.subplots(
        len(down), len(across), figsize=(2.5 * len(across) + 0.4, 2.2 * len(down) + 0.5),
        squeeze=False,
    )  # fmt: skip
    for (i, j), ax in np.ndenumerate(axes):
        (variant, seed), setting = down[i], across[j]
        chosen = (part["variant"] == variant) & (part["seed"] == seed)
        _draw_map(ax, part[chosen & (part["setting"] == setting)], "representation", 1.0, size=7.0)
        if i == 0:
            ax.set_title(f"{method}, {SETTINGS[method]} {setting}", fontsize=9.5)
        if j == 0:
            ax.set_ylabel(f"{variant}\nlayout seed {seed}", fontsize=9)
    _map_legend(fig, axes, part, "representation", 1.0)
    return fig


def numbers_figure(numbers: pd.DataFrame) -> Figure:
    """Draw the separability numbers along training, one panel per number, one line per row.

    Args:
        numbers: columns variant, moment and the keys of `NUMBERS`.
    """
    fig, axes = panel_grid(len(NUMBERS), 3, (2.5, 2.5), more=(0.9, 0.6))
    moments = [m for m in MOMENTS if m in set(numbers["moment"])]
    for ax, (name, (title, direction)) in zip(axes, NUMBERS.items(), strict=True):
        for k, (variant, part) in enumerate(numbers.groupby("variant", sort=False)):
            x = [moments.index(m) for m in part["moment"]]
            ax.plot(x, part[name], label=variant, **run_look(k))
        ax.set_xticks(range(len(moments)), [m.replace(" ", "\n", 1) for m in moments], fontsize=8)
        ax.set_xlim(-0.3, len(moments) - 0.7)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(direction, fontsize=8.5)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def probes_figure(probes: pd.DataFrame) -> Figure:
    """Draw what a linear probe reads of the sentiment in each representation, along training.

    Args:
        probes: columns variant (one panel each, downward), moment, rep and value (correlation).
    """
    variants, reps = (list(dict.fromkeys(probes[c])) for c in ("variant", "rep"))
    moments = [m for m in MOMENTS if m in set(probes["moment"])]
    down, size = len(variants), (1.6 + 1.05 * len(reps), 1.3 + 2.3 * len(variants))
    fig, axes = plt.subplots(down, 1, figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, variant in zip(axes[:, 0], variants, strict=True):
        part = probes[probes["variant"] == variant]
        for k, moment in enumerate(moments):
            value = part[part["moment"] == moment].set_index("rep")["value"].reindex(reps)
            x = np.arange(len(reps)) + 0.29 * (k - (len(moments) - 1) / 2)
            bars = ax.bar(x, value, 0.27, color=[REP_COLORS[r] for r in reps], edgecolor=INK,
                          alpha=(0.3, 0.6, 1.0)[k], lw=0.6)  # fmt: skip
            ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
        ax.set_xticks(range(len(reps)), [rep_label(r) for r in reps])
        ax.set_title(variant)
        ax.margins(y=0.16)
        ax.set_ylabel("correlation")
        ax.axhline(0, color=MUTED, lw=1)
        ax.grid(axis="x", visible=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=INK, alpha=(0.3, 0.6, 1.0)[k], label=moment)
               for k, moment in enumerate(moments)]  # fmt: skip
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return fig


def cka_figure(panels: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]]) -> Figure:
    """Draw how alike the representations are: one heat map of linear CKA per panel.

    Args:
        panels: title -> names and matrix.
    """
    columns = 2 if len(panels) == 4 else 3
    fig, axes = panel_grid(len(panels), columns, (3.3, 3.2), more=(0.8, 0.0))
    for ax, (title, (names, matrix)) in zip(axes, panels.items(), strict=True):
        values = np.asarray(matrix, float)
        image = ax.imshow(values, cmap="cividis", vmin=0, vmax=1)
        for i, j in np.ndindex(values.shape):
            dark = INK if values[i, j] > 0.6 else "white"
            ax.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color=dark)
        ticks = [rep_label(name) for name in names]
        ax.set_xticks(range(len(names)), ticks)
        ax.set_yticks(range(len(names)), ticks)
        ax.set_title(title, fontsize=9.5)
        ax.grid(visible=False)
    fig.colorbar(image, ax=axes, label="linear CKA", shrink=0.7)
    return fig
