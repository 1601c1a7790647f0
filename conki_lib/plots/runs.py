"""Pictures of runs: learning curves, predictions, errors by group, probes, cosines of pairs."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from conki_lib.config import MODALITIES, MODALITY_NAMES
from conki_lib.plots.style import FAMILY_COLORS, INK, MUTED, PAIR_COLORS, panel_grid
from conki_lib.statistics import draw_units

Point = tuple[float | int, float | int]
RUN_COLORS = ("#D9730D", "#5B6770", "#B8860B", "#A23B72")
RUN_STYLES = ("-", "--", ":", "-.")
RUN_MARKERS = ("o", "s", "^", "D")
FEWEST = 20  # utterances of a group that has an interval
TERM_NAMES = {
    "loss": "$L$",
    "loss_task": r"$L_{\mathrm{task}}$ (train)",
    "loss_con": r"$L_{\mathrm{con}}$ (train)",
    "valid_mae": "MAE (validation)",
    "valid_corr": "correlation (validation)",
    "gradient_norm": "gradient norm before clipping",
}
STATE_NAMES = {
    "O": "$O_m$: the backbone, frozen",
    "A before": "$A_m$ before stage 1",
    "A after": "$A_m$ after stage 1",
}
PART_COLORS = {
    "backbones: frozen": "#DDDDDD",
    "adapters: learn": FAMILY_COLORS["A"],
    "heads: learn": RUN_COLORS[0],
}
ABSENT = "#FFFFFF"  # a modality that the external corpus does not hold
STATE_COLORS = {"O": FAMILY_COLORS["O"], "A before": "#D9CBE3", "A after": FAMILY_COLORS["A"]}


def run_look(k: int) -> dict[str, str]:
    """Colour, line and marker of the k-th of up to four runs."""
    k %= 4
    return {"color": RUN_COLORS[k], "linestyle": RUN_STYLES[k], "marker": RUN_MARKERS[k]}


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, float | int]]],
    terms: Sequence[str],
    best: Mapping[str, int] | None = None,
) -> Figure:
    """Draw one panel per term over the epochs, one line per run; a ring marks the chosen epoch.

    Args:
        histories: run -> `Record.history`; a term that a run lacks is left out.
        terms: keys of a history's rows.
        best: run -> `Record.best_epoch`.
    """
    columns = 3 if len(terms) <= 3 else 2
    fig, axes = panel_grid(len(terms), columns, (3.6, 2.6), more=(0.0, 0.4))
    for ax, term in zip(axes, terms, strict=True):
        for k, (run, history) in enumerate(histories.items()):
            rows = {row["epoch"]: row[term] for row in history if term in row}
            ax.plot(list(rows), list(rows.values()), ms=4, **run_look(k))
            chosen = (best or {}).get(run)
            if chosen in rows:
                ring = {"ms": 11, "mfc": "none", "mec": RUN_COLORS[k % 4], "clip_on": False}
                ax.plot(chosen, rows[chosen], "o", **ring)
        ax.set(title=TERM_NAMES.get(term, term), xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    _legend_of_runs(fig, list(histories), ring=bool(best))
    return fig


def _legend_of_runs(fig: Figure, runs: Sequence[str], *, ring: bool = False) -> None:
    handles = [Line2D([], [], ms=4, label=run, **run_look(k)) for k, run in enumerate(runs)]
    if ring:
        look = dict(marker="o", ms=10, mfc="none", mec=INK, linestyle="none")
        handles.append(Line2D([], [], label="epoch chosen on validation", **look))
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def prediction_scatter(
    tables: Mapping[str, pd.DataFrame], label_range: tuple[float, float] = (-3.0, 3.0)
) -> Figure:
    """Draw predictions over truth, one panel per run; points in grey quadrants have the wrong sign.

    Predictions beyond the frame are drawn as crosses on its edge, and counted.

    Args:
        tables: run -> table with columns y and y_hat.
        label_range: smallest and largest label.
    """
    low, high = label_range[0] * 1.1, label_range[1] * 1.1
    size = (3.9 * len(tables), 3.9)
    fig, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False, sharey=True)
    for k, (ax, (run, table)) in enumerate(zip(axes[0], tables.items(), strict=True)):
        for x, y in ((low, 0), (0, low)):  # the quadrants where signs differ
            ax.add_patch(plt.Rectangle((x, y), -low, -low, color="#EFEFEF", zorder=0))
        ax.plot([low, high], [low, high], color=MUTED, lw=1)
        alpha = float(np.clip(120 / max(len(table), 1), 0.15, 0.7))
        look = dict(s=16, alpha=alpha, color=RUN_COLORS[k % 4], marker=RUN_MARKERS[k % 4], lw=0)
        y, shown = table["y"], table["y_hat"].clip(low, high)
        beyond = shown != table["y_hat"]
        ax.scatter(y, shown, **look)
        ax.scatter(y[beyond], shown[beyond], marker="x", color=INK, lw=1, s=16, clip_on=False)
        mae = (table["y_hat"] - table["y"]).abs().mean()
        ax.set(title=f"{run}: MAE {mae:.3f}", xlim=(low, high))
        ax.set(ylim=(low, high), aspect="equal")
        ax.set_xlabel(f"truth $y$ (x: {beyond.sum():,} beyond)" if beyond.any() else "truth $y$")
    axes[0, 0].set_ylabel(r"prediction $\hat y$")
    return fig


def mean_errors(
    tables: Mapping[str, pd.DataFrame], groups: Mapping[str, np.ndarray], videos: Sequence[str]
) -> pd.DataFrame:
    """Mean absolute error of each run in each group of utterances, with a 95 % interval.

    Utterances of one video are alike: of the videos that a group stands in, whole ones are drawn
    with replacement, and the middle 95 % of the errors make the interval.

    Args:
        tables: run -> table with columns y and y_hat; all in the same order of utterances.
        groups: name -> which rows (bool).
        videos: the video of each row.

    Returns:
        Columns run, group, n, mae, low, high (NaN below `FEWEST` utterances or half as many
        videos).
    """
    rows = []
    for run, table in tables.items():
        for group, chosen in groups.items():
            error = (table["y_hat"] - table["y"]).abs().to_numpy()[chosen]
            n, names = len(error), np.asarray(videos)[chosen]
            low, high = np.nan, np.nan
            if min(n, 2 * len(set(names))) >= FEWEST:
                drawn = draw_units(np.random.default_rng(0), names, 2000)
                means = drawn.sums(error[None]) / drawn.sums(np.ones((1, n)))
                low, high = np.quantile(means[1:], [0.025, 0.975])
            mae = error.mean() if n else np.nan
            rows.append({"run": run, "group": group, "n": n, "mae": mae, "low": low, "high": high})
    return pd.DataFrame(rows)


def grouped_errors(errors: pd.DataFrame, title: str = "", xlabel: str = "") -> Figure:
    """Draw `mean_errors` as bars, runs side by side in each group, with n under its name."""
    groups, runs = list(errors["group"].unique()), list(errors["run"].unique())
    fig, ax = plt.subplots(figsize=(max(5.0, 1.15 * len(groups) + 1), 3.3))
    places, width = np.arange(len(groups)), 0.8 / len(runs)
    for k, run in enumerate(runs):
        part = errors[errors["run"] == run].set_index("group").loc[groups]
        x = places + (k - (len(runs) - 1) / 2) * width
        hatch = ("", "//", "..", "xx")[k % 4]
        ax.bar(x, part["mae"], 0.92 * width, color=RUN_COLORS[k % 4], hatch=hatch,
               edgecolor="white", label=run,
               yerr=[part["mae"] - part["low"], part["high"] - part["mae"]],
               error_kw={"ecolor": INK, "elinewidth": 1})  # fmt: skip
    n = errors[errors["run"] == runs[0]].set_index("group")["n"]
    ax.set_xticks(places, [f"{group}\nn = {n[group]}" for group in groups])
    ax.set(title=title, xlabel=xlabel, ylabel="mean absolute error")
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside right upper")
    return fig


def probe_bars(scores: pd.DataFrame) -> Figure:
    """Draw what a linear probe reads of the sentiment in O_m, and in A_m before and after stage 1.

    Args:
        scores: columns rows (which utterances: one panel each), modality, state (a key of
            `STATE_NAMES`), n and corr.
    """
    panels = list(scores["rows"].unique())
    modalities = [m for m in MODALITIES if m in set(scores["modality"])]
    size = (6.6, 0.8 + 2.1 * len(panels))
    fig, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, sharey=True)
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        part = scores[scores["rows"] == panel]
        for k, (state, color) in enumerate(STATE_COLORS.items()):
            values = part[part["state"] == state].set_index("modality")["corr"].reindex(modalities)
            x = np.arange(len(modalities)) + (k - 1) * 0.26
            bars = ax.bar(x, values, 0.24, color=color, label=STATE_NAMES[state])
            ax.bar_label(bars, fmt="%.2f", fontsize=7.5, padding=1)
        ax.set_xticks(range(len(modalities)), [MODALITY_NAMES[m] for m in modalities])
        ax.set_title(f"{panel}: {part['n'].max()} utterances", fontsize=10)
        ax.axhline(0, color=MUTED, lw=1)
        ax.grid(visible=False)  # the numbers stand on the bars
        ax.spines["bottom"].set_visible(False)
        ax.margins(y=0.15)
        ax.set_ylabel("correlation")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def pair_cosines(cosines: pd.DataFrame) -> Figure:
    """Draw the mean cosine of the pairs of each set, one marker per run, joined by a line.

    Args:
        cosines: columns run, set (P1, P2, N1, N2) and cosine.
    """
    runs = list(cosines["run"].unique())
    fig, ax = plt.subplots(figsize=(6.4, 2.6))
    for place, (name, color) in enumerate(PAIR_COLORS.items()):
        values = cosines[cosines["set"] == name].set_index("run")["cosine"].reindex(runs)
        ax.plot(values, [place] * len(runs), color=color, lw=2, zorder=1)
        for k, value in enumerate(values):
            fill = color if k == 0 else "white"
            ax.plot(value, place, RUN_MARKERS[k % 4], ms=9, mfc=fill, mec=color, mew=1.8)
    told = [f"{k}  {'pull together' if k.startswith('P') else 'push apart'}" for k in PAIR_COLORS]
    ax.set_yticks(range(len(PAIR_COLORS)), told)
    ax.set(ylim=(len(PAIR_COLORS) - 0.5, -0.5), xlim=(-1.05, 1.05), xlabel="mean cosine")
    ax.axvline(0, color=MUTED, lw=1)
    handles = [
        Line2D([], [], color=INK, marker=RUN_MARKERS[k % 4], mfc=INK if k == 0 else "white",
               linestyle="none", ms=8, label=run)
        for k, run in enumerate(runs)
    ]  # fmt: skip
    fig.legend(handles=handles, loc="outside right upper")
    return fig


# --- the architecture as a drawing --------------------------------------------------------------


def architecture(
    n_layers: Mapping[str, int],
    plugged: Mapping[str, Sequence[int]],
    reached: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw stage 1: backbones, adapters outside them, and fusion.

    Args:
        n_layers: modality -> number of layers of its backbone.
        plugged: modality -> layers before which the adapter's modules are plugged in.
        reached: modalities that the external corpus holds; the others are drawn in dashes.
        title: a heading.
    """
    count, top = len(n_layers), max(n_layers.values())
    fig, ax = plt.subplots(figsize=(1.6 + 2.5 * count, 1.6 + 0.44 * (top + 4)))
    middle, height = 3.1 * (count - 1) / 2 + 0.85, top + 3.3
    for k, m in enumerate(n_layers):
        colors = PART_COLORS if m in reached else dict.fromkeys(PART_COLORS, ABSENT)
        _column(ax, 3.1 * k, m, n_layers[m], plugged.get(m, ()), top, colors)
        style = "-" if m in reached else ":"
        _arrow(ax, (3.1 * k + 0.85, top + 2.55), (middle, height - 0.25), style=style)
    _box(ax, middle, height, 2.4, r"gate, MLP $\rightarrow\ \hat y$", PART_COLORS["heads: learn"])
    ax.set(xlim=(-0.9, 3.1 * count - 0.6), ylim=(-1.6, height + 0.6), aspect="equal", title=title)
    ax.axis("off")
    handles = [Patch(fc=color, label=part) for part, color in PART_COLORS.items()]
    if set(n_layers) - set(reached):
        handles += [Patch(fc=ABSENT, ec=MUTED, ls="--", label="not in stage 1")]
    fig.legend(handles=handles, loc="outside upper center", ncols=2)
    return fig


def _column(
    ax: Axes, x: float, m: str, layers: int, plugged: Sequence[int], top: int, colors: Mapping
) -> None:
    """One modality: the backbone at x, the adapter beside it, the fully connected layer on top."""
    right, (backbone, adapter, head) = x + 1.7, colors.values()
    style, path = ("-", adapter) if adapter != ABSENT else (":", MUTED)
    ax.text(x, -1.3, f"$I_{m}$  {MODALITY_NAMES[m]}", ha="center")
    _arrow(ax, (x, -1.05), (x, -0.3), style=style)
    for i in range(layers):
        _box(ax, x, i, 1.1, f"layer {i}", backbone)
        end = i + 0.75 if i + 1 < layers else top + 0.75
        _arrow(ax, (x, i + 0.25), (x, end), style=style)
    for before, i in zip((None, *plugged), plugged, strict=False):
        _arrow(ax, (x, i - 0.45), (right - 0.6, i), path, style)
        _box(ax, right, i, 1.15, "module", adapter)
        if before is not None:
            _arrow(ax, (right, before + 0.25), (right, i - 0.27), path, style)
    ax.text(x, top + 1, f"$O_{m}$", ha="center", va="center", fontsize=13)
    _arrow(ax, (x, top + 1.25), (x + 0.6, top + 2.05), style=style)
    if plugged:
        _arrow(ax, (right, plugged[-1] + 0.25), (right, top + 0.75), path, style)
        ax.text(right, top + 1, f"$A_{m}$", ha="center", va="center", fontsize=13)
        _arrow(ax, (right, top + 1.25), (right - 0.6, top + 2.05), style=style)
    _box(ax, x + 0.85, top + 2.3, 1.9, f"FC [$A_{m}$; $O_{m}$]", head)


def _box(ax: Axes, x: float, y: float | int, width: float, text: str, color: str) -> None:
    edge = dict(ec=MUTED, ls="--") if color == ABSENT else dict(ec="white")
    ax.add_patch(plt.Rectangle((x - width / 2, y - 0.25), width, 0.5, fc=color, zorder=2, **edge))
    ink = INK if color in (ABSENT, PART_COLORS["backbones: frozen"]) else "white"
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5, color=ink)


def _arrow(ax: Axes, start: Point, end: Point, color: str = MUTED, style: str = "-") -> None:
    look = {"arrowstyle": "-|>", "color": color, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, "ls": style}
    ax.annotate("", end, start, arrowprops=look)
