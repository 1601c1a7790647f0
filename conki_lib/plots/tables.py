"""Tables ready to paste (CSV, Markdown, LaTeX) and the pictures that show every run behind them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from conki_lib.plots.style import INK, MUTED
from conki_lib.records import write_text
from conki_lib.statistics import SMALLER_IS_BETTER

METRIC_NAMES = {
    "mae": "MAE", "corr": "Corr", "acc7": "Acc-7 (%)", "acc5": "Acc-5 (%)", "acc3": "Acc-3 (%)",
    "acc2": "Acc-2 (%)", "f1": "F1 (%)", "acc2_has0": "Acc-2 has0 (%)", "f1_has0": "F1 has0 (%)",
    "acc2_non0": "Acc-2 non0 (%)", "f1_non0": "F1 non0 (%)",
}  # fmt: skip
GROUP_COLORS = {
    "components": "#0B6B3A", "parts of C4": "#C1272D", "modalities": "#2166AC",
    "controls": "#8A6D00", "readings": "#5B2A86", "sweeps": "#5B6770",
    "switches": "#00736B",
}  # fmt: skip
GROUP_MARKERS = {"components": "o", "parts of C4": "s", "modalities": "^", "controls": "D",
                 "readings": "v", "sweeps": "P", "switches": "X"}  # fmt: skip
BETTER, WORSE, OPEN = "#2166AC", "#C1272D", "#8A8A8A"

# ---- tables -------------------------------------------------------------------------------------


def is_share(metric: str) -> bool:
    """Is a metric shown in percent?"""
    return metric.startswith(("acc", "f1"))


def show(metric: str, mean: float, sd: float = np.nan) -> str:
    """Write one cell: ``85.9 ± 0.4`` (percent) or ``0.741 ± 0.006``; empty where undefined."""
    if not np.isfinite(mean):
        return ""
    scale, digits = (100, 1) if is_share(metric) else (1, 3)
    spread = f" ± {sd * scale:.{digits}f}" if np.isfinite(sd) else ""
    return f"{mean * scale:.{digits}f}{spread}"


def main_table(
    summary: pd.DataFrame,
    coverage: pd.DataFrame,
    metrics: Sequence[str],
    published: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The main table as text: every row of ours, those without a run too, then published ones.

    Args:
        summary: from `conki_lib.statistics.summarise`.
        coverage: rows in order, with the reason where a row has no run.
        metrics: columns of the table.
        published: from `conki_lib.statistics.published`.

    Returns:
        Columns row, n, the metrics under their printed names, note.
    """
    lines = []
    for row in coverage.itertuples():
        line: dict[str, object] = {"row": row.variant, "n": row.n or ""}
        note = row.reason
        if row.n:
            found = summary.loc[row.variant]
            line |= {METRIC_NAMES[m]: show(m, found[m], found[f"{m}_sd"]) for m in metrics}
            older = int(found.get("older", 0))
            note = f"{older} of {row.n} by older code" if older else ""
        lines.append(line | {"note": note})
    published = pd.DataFrame() if published is None else published
    if len(published):  # a corpus of the paper
        note = "the paper's figures: no source to check here"
        lines.append({"row": "ConKI (paper)", "note": note})
    for model, row in published.iterrows():
        note = f"published average of 5 seeds, MMSA, {row['alignment']} features"
        line = {"row": f"{model} (MMSA)", "n": 5, "note": note}
        lines.append(line | {METRIC_NAMES[m]: show(m, row[m]) for m in metrics if m in row})
    columns = ["row", "n", *(METRIC_NAMES[m] for m in metrics), "note"]
    return pd.DataFrame(lines).reindex(columns=columns).astype(object).fillna("")


def difference_table(differences: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Paired differences as text: ``+0.012 [-0.003, +0.027]``; after the MAE's its p, corrected.

    Args:
        differences: from `conki_lib.statistics.paired_differences`.
        metrics: columns of the table.
    """
    lines = []
    for name, part in differences.groupby("variant", sort=False):
        part = part.set_index("metric")
        line = {"row": name, "seeds": int(part["seeds"].iloc[0])}
        for m in metrics:
            k, digits = (100, 1) if is_share(m) else (1, 3)
            d, low, high = (part.loc[m, c] * k for c in ("difference", "low", "high"))
            shown = f"{d:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            line[METRIC_NAMES[m].replace("(%)", "(points)")] = shown if np.isfinite(d) else ""
            if m == "mae":
                line |= {"p (MAE)": _p(part.loc[m, "p"])}
                line |= {"p Holm (MAE)": _p(part.loc[m, "p_holm"])}
        lines.append(line)
    return pd.DataFrame(lines)


def _p(p: float) -> str:
    return "" if not np.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "<": "$<$"}


def latex(table: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """Write a table of text as LaTeX with booktabs rules, ready to paste."""

    def line(values: Iterable[object]) -> str:
        cells = ["".join(_LATEX.get(c, c) for c in str(v)) for v in values]
        cells = [re.sub(r"(?<![\w.])-(?=\d)", "$-$", cell) for cell in cells]
        return " & ".join(cells) + r" \\"

    body = [line(row) for row in table.itertuples(index=False)]
    head = [r"\begin{table}", r"\centering", rf"\caption{{{line([caption])[:-3]}}}"]
    head += [rf"\label{{{label}}}"] if label else []
    head += [rf"\begin{{tabular}}{{l{'r' * (table.shape[1] - 1)}}}", r"\toprule"]
    rules = [line(table.columns), r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*head, *rules, r"\end{tabular}", r"\end{table}", ""])


def write_tables(
    table: pd.DataFrame, name: str, folder: Path, *, caption: str = ""
) -> dict[str, Path]:
    """Write one table as CSV, Markdown and LaTeX, each in one step.

    Args:
        table: cells of text or numbers, index not written.
        name: file name without ending.
        folder: such as ``results/<profile>/tables``.
        caption: what the table shows: corpus, seeds, n.

    Returns:
        Ending -> path.
    """
    markdown = table.to_markdown(index=False, disable_numparse=True)
    texts = {
        "csv": table.to_csv(index=False),
        "md": f"{caption}\n\n{markdown}\n" if caption else f"{markdown}\n",
        "tex": latex(table, caption, f"tab:{folder.parent.name}-{name}"),
    }
    return {ending: write_text(folder / f"{name}.{ending}", text) for ending, text in texts.items()}


# ---- figures ------------------------------------------------------------------------------------


def footnote(fig: Figure, text: str) -> Figure:
    """Write corpus, seeds and n under a figure, so that they travel with its file."""
    fig.supxlabel(text, fontsize=8, color=MUTED, x=0.01, ha="left")
    return fig


def runs_figure(runs: pd.DataFrame, metrics: Sequence[str], base: str = "full") -> Figure:
    """Draw every run as a point, the mean of a row as a bar; the line is the mean of `base`.

    A row far outside stands in a grey box at the border, with the range of its runs, which is the
    box's scale; so the others are told apart.

    Args:
        runs: one line per run: variant, group, seed and the metrics; in the tables' order.
        metrics: one panel each.
        base: the row that others are compared with.
    """
    rows = list(dict.fromkeys(runs["variant"]))
    group_of = dict(zip(runs["variant"], runs["group"], strict=True))
    fig, axes = plt.subplots(
        1, len(metrics), figsize=(2.4 * len(metrics) + 1.7, 1.7 + 0.27 * len(rows)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax, metric in zip(axes[0], metrics, strict=True):
        scale = 100 if is_share(metric) else 1
        by_row = [runs.loc[runs["variant"] == row, metric].to_numpy() * scale for row in rows]
        far = _far_outside(by_row)
        for y, (row, values) in enumerate(zip(rows, by_row, strict=True)):
            color, marker = GROUP_COLORS[group_of[row]], GROUP_MARKERS[group_of[row]]
            across = ax.transData
            if far[y]:
                text = [f"{x:.{1 if is_share(metric) else 2}f}" for x in (min(values), max(values))]
                values = _into_box(ax, y, " to ".join(dict.fromkeys(text)), values, far[y], color)
                across = ax.get_yaxis_transform()
            spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
            ax.scatter(values, y + np.asarray(spread), s=26, color=color, alpha=0.8,
                       marker=marker, lw=0, zorder=4, transform=across)  # fmt: skip
            ax.vlines(values.mean(), y - 0.36, y + 0.36, color=INK, lw=1.6, zorder=3,
                      transform=across)  # fmt: skip
        if base in rows:
            mean = runs.loc[runs["variant"] == base, metric].mean(skipna=False) * scale
            ax.axvline(mean, color=MUTED, ls="--", lw=1, zorder=1)
        ax.set(title=METRIC_NAMES[metric], xlabel=_direction(metric))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    counts = runs["variant"].value_counts()
    axes[0, 0].set_yticks(range(len(rows)), [f"{row}  (n = {counts[row]})" for row in rows])
    _group_legend(fig, list(dict.fromkeys(runs["group"])), base)
    return fig


def _far_outside(by_row: Sequence[np.ndarray]) -> np.ndarray:
    """-1, 0 or 1 for each row: is its mean far below or above where most rows and runs lie?"""
    means = np.array([np.nanmean(values) for values in by_row])
    apart = means - np.median(means)
    usual = max(np.median(np.abs(apart)), np.median([np.ptp(values) for values in by_row]))
    return np.sign(apart) * (np.abs(apart) > 6 * usual) if usual > 0 else 0 * apart


def _into_box(
    ax: Axes, y: int, text: str, values: np.ndarray, side: float, color: str
) -> np.ndarray:
    """Draw a grey box at a border, and say its range; places in it, as shares of the width."""
    left = 0.82 if side > 0 else 0.0
    ax.add_patch(Rectangle((left, y - 0.4), 0.18, 0.8, fc="#E4E4E4", lw=0, zorder=1,
                           transform=ax.get_yaxis_transform()))  # fmt: skip
    ax.annotate(text, (left if side > 0 else 0.18, y), (-4 * side, 0), fontsize=8, color=color,
                xycoords=ax.get_yaxis_transform(), textcoords="offset points", va="center",
                ha="right" if side > 0 else "left", zorder=5,
                bbox={"fc": "white", "lw": 0, "pad": 0.6})  # fmt: skip
    spread = np.ptp(values)
    share = (values - values.min()) / spread if spread > 0 else np.full(len(values), 0.5)
    return left + 0.03 + 0.12 * share


def _direction(metric: str) -> str:
    return "smaller is better" if metric in SMALLER_IS_BETTER else "larger is better"


def _group_legend(fig: Figure, groups: Sequence[str], base: str) -> None:
    look = dict(linestyle="none", ms=6)
    handles = [Line2D([], [], marker=GROUP_MARKERS[g], color=GROUP_COLORS[g], label=g, **look)
               for g in groups]  # fmt: skip
    handles += [Line2D([], [], color=INK, marker="|", ms=11, mew=2, ls="none", label="mean"),
                Line2D([], [], color=MUTED, ls="--", label=f"mean of {base}")]  # fmt: skip
    fig.legend(handles=handles, loc="outside upper center", ncols=4)


def difference_figure(
    differences: pd.DataFrame, metrics: Sequence[str], base: str = "full", xlabel: str = ""
) -> Figure:
    """Draw paired differences with their intervals, one panel per metric.

    Blue circles: better than the base row; red squares: worse, both at p < 0.05 after Holm's
    correction; hollow grey: not told apart from chance, as always with one seed. A row far outside
    stands at the border, in numbers; an interval that goes on outside ends in an arrow.

    Args:
        differences: from `conki_lib.statistics.paired_differences`.
        metrics: one panel each.
        base: what the rows are compared with.
        xlabel: what is subtracted from what, if it is not a row minus the base.
    """
    rows = list(dict.fromkeys(differences["variant"]))
    fig, axes = plt.subplots(
        1, len(metrics), figsize=(2.4 * len(metrics) + 1.7, 1.7 + 0.27 * len(rows)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax, metric in zip(axes[0], metrics, strict=True):
        part = differences[differences["metric"] == metric].set_index("variant").loc[rows]
        ends = part[["low", "high"]].abs().max(axis=1)
        limit = min(ends.max(), 4 * ends.median()) * 1.08 * (100 if is_share(metric) else 1)
        for y, row in enumerate(part.itertuples()):
            _draw_difference(ax, y, row, metric, limit)
        if np.isfinite(limit) and limit > 0:
            ax.set_xlim(-limit, limit)
        ax.axvline(0, color=INK, lw=1)
        unit = ", points" if is_share(metric) else ""
        title = METRIC_NAMES[metric].replace(" (%)", "")
        ax.set(title=title, xlabel=(xlabel or f"row minus {base}") + unit)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_ylim(len(rows) - 0.5, -0.5)
    counts = differences.drop_duplicates("variant").set_index("variant")["seeds"]
    axes[0, 0].set_yticks(range(len(rows)), [f"{row}  (n = {int(counts[row])})" for row in rows])
    looks = [
        (f"better than {base} (Holm p < 0.05)", "o", BETTER, BETTER),
        (f"worse than {base}", "s", WORSE, WORSE),
        ("not told apart from chance", "o", OPEN, "white"),
    ]
    handles = [Line2D([], [], marker=marker, color=color, mfc=fill, label=label, lw=2)
               for label, marker, color, fill in looks]  # fmt: skip
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return fig


def _draw_difference(ax: Axes, y: int, row, metric: str, limit: float) -> None:
    scale = 100 if is_share(metric) else 1
    sure, better = row.p_holm < 0.05, (row.difference < 0) == (metric in SMALLER_IS_BETTER)
    color = (BETTER if better else WORSE) if sure else OPEN
    marker = "s" if sure and not better else "o"
    x, low, high = (value * scale for value in (row.difference, row.low, row.high))
    if abs(x) > 0.95 * limit:
        side, digits = np.sign(x), 1 if is_share(metric) else 2
        text = f"{x:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        ax.annotate(text, (side * limit, y), (0.8 * side * limit, y), fontsize=8,
                    color=color, ha="right" if side > 0 else "left", va="center",
                    bbox={"fc": "white", "lw": 0, "pad": 0.6},
                    arrowprops={"arrowstyle": "->", "color": color})  # fmt: skip
        return
    ax.hlines(y, max(low, -limit), min(high, limit), color=color, lw=1.8)
    for end, arrow in ((low, "<"), (high, ">")):
        if abs(end) > limit:
            ax.plot(np.sign(end) * limit, y, arrow, ms=5, color=color, clip_on=False)
    ax.plot(x, y, marker, ms=4.5, color=color, mfc=color if sure else "white")


def sweep_figure(
    runs: pd.DataFrame, setting: str, metrics: Sequence[str], own: float | None = None
) -> Figure:
    """Draw metrics over the values of a setting: a thin line per seed, a thick one for their mean.

    Args:
        runs: one line per run with its seed and a column of the setting's value; seeds that some
            value lacks are left out, since means over different seeds cannot be compared.
        setting: ``"lam"``, ``"tau"`` or ``"batch_size"``.
        metrics: one panel each.
        own: the profile's value, marked.

    Raises:
        ValueError: no seed was run with every value.
    """
    units = {"lam": r"$\lambda$", "tau": r"$\tau$", "batch_size": "utterances in a batch"}
    fig, axes = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics), 3.0), squeeze=False)
    for ax, metric in zip(axes[0], metrics, strict=True):
        scale = 100 if is_share(metric) else 1
        lines = runs.pivot(index=setting, columns="seed", values=metric).dropna(axis=1) * scale
        if lines.empty:
            raise ValueError(f"no seed was run with every value of {setting}")
        ax.set_xscale("symlog", linthresh=float(lines.index[lines.index > 0].min()))
        ax.plot(lines.index, lines, "o-", color=GROUP_COLORS["sweeps"], alpha=0.5, ms=4, lw=0.8)
        ax.plot(lines.index, lines.mean(axis=1), "_-", color=INK, ms=14, mew=1.6, lw=1.6)
        if own is not None:
            ax.axvline(own, color=MUTED, ls="--", lw=1, zorder=1)
        ax.set_xticks(list(lines.index), [f"{x:g}" for x in lines.index], fontsize=8)
        ax.minorticks_off()
        ax.set(title=METRIC_NAMES[metric], xlabel=units[setting], ylabel=_direction(metric))
    return fig


def _spread_labels(ax: Axes, x: pd.Series, y: pd.Series) -> None:
    """Write names to the right of each cluster of points, from the lowest up, none over another."""
    wide, step = x.max() - x.min(), 0.065 * (y.max() - y.min())  # a line of text
    taken: list[tuple[float, float]] = []
    for model in y.sort_values().index:
        right = float(x[(x - x[model]).abs() < 0.1 * wide].max()) + 0.03 * wide
        near = [height for at, height in taken if abs(at - right) < 0.25 * wide]
        height = max([float(y[model]), *(h + step for h in near)])
        taken.append((right, height))
        place = (right, height)
        ax.annotate(model, (x[model], y[model]), place, fontsize=8, va="center", zorder=5,
                    bbox={"fc": "white", "lw": 0, "pad": 0.2},
                    arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6})  # fmt: skip
    ax.margins(x=0.2)


def published_figure(
    ours: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    published: pd.DataFrame,
    metrics: tuple[str, str],
) -> Figure:
    """Draw every run of ours and published averages in the plane of two metrics.

    Args:
        ours: row -> its runs' values of both metrics.
        published: from `conki_lib.statistics.published`.
        metrics: across, up.
    """
    fig, ax = plt.subplots(figsize=(6.6, 4.2))
    scale = [100 if is_share(m) else 1 for m in metrics]
    for k, (row, values) in enumerate(ours.items()):
        x, y = (np.asarray(v) * s for v, s in zip(values, scale, strict=True))
        color, marker = list(GROUP_COLORS.values())[k % 6], list(GROUP_MARKERS.values())[k % 6]
        ax.scatter(x, y, s=34, color=color, marker=marker, alpha=0.75, lw=0, zorder=3,
                   label=f"{row} (ours, n = {len(x)})")  # fmt: skip
    x, y = (published[m] * s for m, s in zip(metrics, scale, strict=True))
    ax.scatter(x, y, s=30, facecolor="white", edgecolor=INK, zorder=6,
               label="published average (MMSA)")  # fmt: skip
    _spread_labels(ax, x, y)
    ax.set(xlabel=f"{METRIC_NAMES[metrics[0]]}, {_direction(metrics[0])}",
           ylabel=f"{METRIC_NAMES[metrics[1]]}, {_direction(metrics[1])}")  # fmt: skip
    fig.legend(loc="outside upper center", ncols=2)
    return fig
