"""Pictures of why a component helps or does not: errors by group, gradients of both losses."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from conki_lib.plots.style import INK


def change_heatmap(
    changes: pd.DataFrame, groups: Sequence[str], base: str = "full", xlabel: str = ""
) -> Figure:
    """Draw where rows err more (red) or less (blue) than the base row; a star marks p < 0.05.

    Not corrected. A group below 20 utterances is too small for any test: its numbers stand on
    white, without a star, as do those of a row with one seed; an empty group has none.

    Args:
        changes: from `conki_lib.reasons.error_changes`.
        groups: across, in order.
        base: the row that others are compared with.
        xlabel: what the groups are.
    """
    rows, groups = list(dict.fromkeys(changes["variant"])), list(groups)
    table = changes.pivot(index="variant", columns="group").reindex(rows)
    value, p = (table[c].reindex(columns=groups) for c in ("difference", "p"))
    n = changes.groupby("group")["utterances"].first().reindex(groups, fill_value=0)
    many = value * np.where(n >= 20, 1, np.nan)
    finite = np.abs(many.to_numpy()[np.isfinite(many)])
    limit = max(float(np.quantile(finite, 0.9)) if finite.size else 0, 1e-6)
    fig, ax = plt.subplots(figsize=(2.6 + 0.92 * len(groups), max(2.4, 1.5 + 0.34 * len(rows))))
    image = ax.imshow(many, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto")
    for i, j in np.ndindex(value.shape):
        x = value.iloc[i, j]
        if np.isfinite(x):
            star = "*" if p.iloc[i, j] < 0.05 and n.iloc[j] >= 20 else ""
            text = f"{x:+.2f}{star}" if abs(x) >= 0.005 else f"0{star}"
            dark = "white" if abs(many.iloc[i, j]) > 0.6 * limit else INK
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=dark)
    ax.set_xticks(range(len(groups)), [f"{textwrap.fill(str(g), 12)}\nn = {n[g]}" for g in groups])
    ax.set_yticks(range(len(rows)), rows)
    ax.set(title=f"mean |error|, row minus {base} (red: worse)", xlabel=xlabel)
    ax.grid(visible=False)
    fig.colorbar(image, ax=ax, label=f"mean |error|, row minus {base}", pad=0.02, extend="both")
    return fig


def conflict_figure(gradients: pd.DataFrame) -> Figure:
    """Draw cosine and size of the contrastive gradient against the task's, a point per batch.

    Bars are medians: of a ratio, whose axis is logarithmic, a mean says little.

    Args:
        gradients: from `conki_lib.reasons.gradient_conflict`, with a column moment (at most two).
    """
    groups, moments = (list(dict.fromkeys(gradients[c])) for c in ("group", "moment"))
    fig, axes = plt.subplots(1, 2, figsize=(9.4, 1.7 + 0.5 * len(groups)), sharey=True)
    for k, moment in enumerate(moments):
        part = gradients[gradients["moment"] == moment]
        color, marker = ("#2166AC", "o") if k == 0 else ("#D9730D", "s")
        y = part["group"].map(groups.index) + 0.2 * (2 * k - 1)
        for ax, column in zip(axes, ("cosine", "ratio"), strict=True):
            ax.plot(part[column], y, marker, color=color, alpha=0.55, ms=5, mew=0, label=moment)
            median = part.groupby("group")[column].median()
            at = [groups.index(g) + 0.2 * (2 * k - 1) for g in median.index]
            ax.plot(median, at, "|", color=INK, ms=15, mew=2)
    axes[0].axvline(0, color=INK, lw=1)
    axes[0].set(
        title="direction",
        xlim=(-1, 1),
        xlabel=r"cosine of $\nabla L_{\mathrm{task}}$ and $\nabla L_{\mathrm{con}}$",
    )
    axes[1].set(
        title="size",
        xscale="log",
        xlabel=r"$\lambda|\nabla L_{\mathrm{con}}|\,/\,|\nabla L_{\mathrm{task}}|$",
    )
    for axis in (axes[1].xaxis.set_major_formatter, axes[1].xaxis.set_minor_formatter):
        axis(FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "13" else ""))
    axes[1].tick_params(axis="x", which="both", length=0, pad=4, labelsize=9)
    axes[0].set_yticks(range(len(groups)), groups)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig
