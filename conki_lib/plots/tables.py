"""Tables ready to paste (CSV, Markdown, LaTeX) and the pictures that show every run behind them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.optimize import linear_sum_assignment

from conki_lib.plots.style import INK, MUTED
from conki_lib.records import write_text
from conki_lib.statistics import SMALLER_IS_BETTER

METRIC_NAMES = {
    "mae": "MAE", "corr": "Corr", "acc7": "Acc-7 (%)", "acc5": "Acc-5 (%)", "acc3": "Acc-3 (%)",
    "acc2": "Acc-2 (%)", "f1": "F1 (%)", "acc2_has0": "Acc-2 has0 (%)", "f1_has0": "F1 has0 (%)",
    "acc2_non0": "Acc-2 non0 (%)", "f1_non0": "F1 non0 (%)",
}  # fmt: skip
GROUP_LOOKS = {  # colour and marker
    "components": ("#0B6B3A", "o"), "parts of C4": ("#C1272D", "s"), "modalities": ("#2166AC", "^"),
    "controls": ("#8A6D00", "D"), "readings": ("#5B2A86", "v"), "sweeps": ("#5B6770", "P"),
    "switches": ("#00736B", "X"),
}  # fmt: skip
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
    published: pd.DataFrame,
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
        differences: from `conki_lib.statistics.paired_differences`; a column p_group, where there
            is one, is the p corrected within a row's group.
        metrics: columns of the table; Holm's p of others than the MAE stands last, see `brief`.
    """
    lines = []
    for name, part in differences.groupby("variant", sort=False):
        part = part.set_index("metric")
        line, last = {"row": name, "seeds": int(part["seeds"].iloc[0])}, {}
        for m in metrics:
            k, digits = (100, 1) if is_share(m) else (1, 3)
            d, low, high = (part.loc[m, c] * k for c in ("difference", "low", "high"))
            shown = f"{d:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            line[METRIC_NAMES[m].replace("(%)", "(points)")] = shown if np.isfinite(d) else ""
            if m == "mae":
                names = {"p": "p", "p_holm": "p Holm", "p_group": "p Holm in group"}
                line |= {f"{p} (MAE)": _p(part.loc[m, c]) for c, p in names.items() if c in part}
            else:
                last[f"p Holm ({METRIC_NAMES[m].replace(' (%)', '')})"] = _p(part.loc[m, "p_holm"])
        lines.append(line | last)
    return pd.DataFrame(lines)


def _p(p: float) -> str:
    return "" if not np.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


_LATEX = str.maketrans({"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "<": "$<$"})


def latex(table: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """Write a table of text as LaTeX with booktabs rules, ready to paste."""
    columns = "l" + "r" * (table.shape[1] - 1)
    return table.rename(columns=_tex).style.hide().format(_tex).to_latex(
        column_format=columns, position_float="centering", hrules=True, caption=_tex(caption),
        label=label or None,
    )  # fmt: skip


def _tex(value: object) -> str:
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", str(value).translate(_LATEX))


def brief(table: pd.DataFrame) -> pd.DataFrame:
    """A table without what its CSV alone holds: meanings of rows, Holm's p of other metrics."""
    return table.loc[:, ~table.columns.str.match(r"meaning|p Holm \((?!MAE)")]


def devices(runs: pd.DataFrame) -> str:
    """Say for a caption which runs were made on another device than most; empty if none was.

    Args:
        runs: from `conki_lib.ablation.run_table`, those that are shown.
    """
    where = runs["device"].replace("cpu", "CPU")
    usual, told = next(iter(where.mode()), ""), ""
    for device, part in runs[where != usual].groupby(where):
        rows = part.groupby("variant", sort=False)["seed"].agg(lambda s: " ".join(map(str, s)))
        told += f" On {device}, not {usual}, rows and seeds: {'; '.join(rows.index + ' ' + rows)}; "
        told += f"their differences to {usual} runs include that of the device."
    return told


def write_tables(
    table: pd.DataFrame, name: str, folder: Path, *, caption: str = ""
) -> dict[str, Path]:
    """Write one table as CSV, Markdown and LaTeX, each in one step.

    Args:
        table: cells of text or numbers, index not written; see `brief` for what the CSV alone has.
            Meanings of rows, in a column of that name, stand below the Markdown table.
        name: file name without ending.
        folder: such as ``results/<profile>/tables``.
        caption: what the table shows: corpus, seeds, n.

    Returns:
        Ending -> path.
    """
    shown, rows = brief(table), table[table["meaning"] != ""] if "meaning" in table else table[:0]
    legend = "\n".join(f"- `{row['row']}`: {row['meaning']}" for _, row in rows.iterrows())
    parts = [caption, shown.to_markdown(index=False, disable_numparse=True), legend]
    texts = {
        "csv": table.to_csv(index=False),
        "md": "\n\n".join(part for part in parts if part) + "\n",
        "tex": latex(shown, caption, f"tab:{folder.parent.name}-{name}"),
    }
    return {ending: write_text(folder / f"{name}.{ending}", text) for ending, text in texts.items()}


# ---- figures ------------------------------------------------------------------------------------


def _panels(counts: Mapping[str, int], metrics: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """One panel per metric, a line per row of a table with its name and number of seeds."""
    size = (2.4 * len(metrics) + 1.7, 1.7 + 0.27 * len(counts))
    fig, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    names = [f"{row}  (n = {n})" for row, n in counts.items()]
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    return fig, list(axes[0])


def _at_border(ax: Axes, y: int, side: float, text: str, color: str) -> None:
    """Write numbers of a row that lies outside, with an arrow to the side where it lies."""
    ax.annotate(text, (0.5 + 0.5 * side, y), (0.5 + 0.4 * side, y), fontsize=8, color=color,
                xycoords=ax.get_yaxis_transform(), ha="right" if side > 0 else "left", va="center",
                bbox={"fc": "white", "lw": 0, "pad": 0.6}, zorder=5,
                arrowprops={"arrowstyle": "->", "color": color})  # fmt: skip


def runs_figure(runs: pd.DataFrame, metrics: Sequence[str], base: str = "full") -> Figure:
    """Draw every run as a point, the mean of a row as a bar; the line is the mean of `base`.

    A row whose runs all lie far outside stands at the border, in numbers, so that the others are
    told apart.

    Args:
        runs: one line per run: variant, group, seed and the metrics; in the tables' order.
        metrics: one panel each.
        base: the row that others are compared with.
    """
    counts = runs["variant"].value_counts(sort=False).to_dict()
    group_of = dict(zip(runs["variant"], runs["group"], strict=True))
    fig, axes = _panels(counts, metrics)
    for ax, metric in zip(axes, metrics, strict=True):
        scale, digits = (100, 1) if is_share(metric) else (1, 2)
        by_row = [runs.loc[runs["variant"] == row, metric].to_numpy() * scale for row in counts]
        far = _far_outside(by_row)
        for y, (row, values) in enumerate(zip(counts, by_row, strict=True)):
            color, marker = GROUP_LOOKS[group_of[row]]
            if far[y]:
                low, mean, high = (f"{f(values):.{digits}f}" for f in (np.min, np.mean, np.max))
                text = f"{mean} ({low} to {high})" if len(values) > 1 else mean
                _at_border(ax, y, far[y], text, color)
                continue
            spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
            ax.scatter(values, y + np.asarray(spread), s=26, color=color, alpha=0.8,
                       marker=marker, lw=0, zorder=4)  # fmt: skip
            ax.vlines(values.mean(), y - 0.36, y + 0.36, color=INK, lw=1.6, zorder=3)
        if base in counts:
            mean = runs.loc[runs["variant"] == base, metric].mean(skipna=False) * scale
            ax.axvline(mean, color=MUTED, ls="--", lw=1, zorder=1)
        ax.set(title=METRIC_NAMES[metric], xlabel=_direction(metric))
        ax.xaxis.set_major_locator(MaxNLocator(4))
    _group_legend(fig, list(dict.fromkeys(runs["group"])), base)
    return fig


def _far_outside(by_row: Sequence[np.ndarray]) -> np.ndarray:
    """-1, 0 or 1 for each row: is its mean far below or above most rows, and each run beyond?"""
    means = np.array([np.nanmean(values) for values in by_row])
    apart = means - np.median(means)
    usual = max(np.median(np.abs(apart)), np.median([np.ptp(values) for values in by_row]))
    far = np.where((np.abs(apart) > 6 * usual) & (usual > 0), np.sign(apart), 0)
    for _ in by_row:  # a row that is taken in may reach up to another
        near = np.concatenate([x for x, side in zip(by_row, far, strict=True) if not side])
        far = far * [min(x) > np.nanmax(near) or max(x) < np.nanmin(near) for x in by_row]
    return far


def _direction(metric: str) -> str:
    return "smaller is better" if metric in SMALLER_IS_BETTER else "larger is better"


def _group_legend(fig: Figure, groups: Sequence[str], base: str) -> None:
    handles = []
    for group in groups:
        color, marker = GROUP_LOOKS[group]
        handles.append(Line2D([], [], color=color, marker=marker, ls="none", ms=6, label=group))
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
    counts = differences.groupby("variant", sort=False)["seeds"].first().to_dict()
    fig, axes = _panels(counts, metrics)
    for ax, metric in zip(axes, metrics, strict=True):
        part = differences[differences["metric"] == metric].set_index("variant").loc[[*counts]]
        ends = part[["low", "high"]].abs().max(axis=1)
        limit = min(ends.max(), 4 * ends.median()) * 1.08 * (100 if is_share(metric) else 1)
        for y, row in enumerate(part.itertuples()):
            _draw_difference(ax, y, row, metric, limit)
        if np.isfinite(limit) and limit > 0:
            ax.set_xlim(-limit, limit)
        ax.axvline(0, color=INK, lw=1)
        unit = ", points" if is_share(metric) else ""
        unit += f"\n{'left' if metric in SMALLER_IS_BETTER else 'right'} is better"
        title = METRIC_NAMES[metric].replace(" (%)", "")
        ax.set(title=title, xlabel=(xlabel or f"row minus {base}") + unit)
        ax.xaxis.set_major_locator(MaxNLocator(4))
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
    if abs(x) > 0.85 * limit:
        digits = 1 if is_share(metric) else 2
        text = f"{x:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        return _at_border(ax, y, np.sign(x), text, color)
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
        ax.plot(lines.index, lines, "o-", color=GROUP_LOOKS["sweeps"][0], alpha=0.5, ms=4, lw=0.8)
        ax.plot(lines.index, lines.mean(axis=1), "_-", color=INK, ms=14, mew=1.6, lw=1.6)
        if own is not None:
            ax.axvline(own, color=MUTED, ls="--", lw=1, zorder=1)
        ax.set_xticks(list(lines.index), [f"{x:g}" for x in lines.index], fontsize=8)
        ax.minorticks_off()
        ax.set(title=METRIC_NAMES[metric], xlabel=units[setting], ylabel=_direction(metric))
    return fig


def _spread_labels(ax: Axes, x: pd.Series, y: pd.Series) -> None:
    """Write names to the right of each cluster of points, none over another, no lines crossed.

    Lines of the least total length do not cross.
    """
    wide, high = np.ptp(x) or 1, np.ptp(y) or 1
    step = 0.065 * high * np.arange(len(x))  # a line of text
    for _, part in x.sort_values().groupby((x.sort_values().diff() > 0.1 * wide).cumsum()):
        at, right = y[part.index], part.max() + 0.03 * wide
        free = np.maximum.accumulate(np.sort(at) - step[: len(at)]) + step[: len(at)]
        across, up = (right - part) / wide, np.subtract.outer(at.to_numpy(), free) / high
        for i, k in zip(*linear_sum_assignment(np.hypot(across.to_numpy()[:, None], up)),
                        strict=True):  # fmt: skip
            ax.annotate(part.index[i], (part.iloc[i], at.iloc[i]), (right, free[k]), fontsize=8,
                        va="center", zorder=5, bbox={"fc": "white", "lw": 0, "pad": 0.2},
                        arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.6,
                                    "relpos": (0, 0.5)})  # fmt: skip
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
        color, marker = list(GROUP_LOOKS.values())[k % 6]
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
