"""Pictures of what the inputs know of the label: courses over time, probes, ceilings."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.store import SplitView
from conki_lib.plots.data import INPUT_COLORS, INPUT_MARKERS, SIGNS, SPLIT_COLORS
from conki_lib.plots.style import INK, MUTED
from conki_lib.plots.tables import METRIC_NAMES, is_share, show
from conki_lib.probes import clip_means

CUES = {"said": "t", "shown": "v", "sounded": "a"}
READERS = {
    "cues": ("constant, or cues as meant", SPLIT_COLORS["train"]),
    "oracle": ("knows the felt sentiment", SPLIT_COLORS["test"]),
    "ridge": ("simple models of the raw data", INPUT_COLORS["v"]),
}
BINS = 10  # points of a clip's clock


def feature_correlations(view: SplitView, m: str) -> Float[np.ndarray, " d_in"]:
    """Pearson correlation of each feature's mean over the clip with the label; 0 for constants."""
    x, y = clip_means(view, m), view.y - view.y.mean()
    x = x - x.mean(axis=0)
    norm = np.sqrt((x**2).sum(axis=0) * (y**2).sum())
    return np.where(norm > 0, x.T @ y / np.where(norm > 0, norm, 1), 0.0)


def course_figure(view: SplitView, names: Mapping[str, Sequence[str]]) -> Figure:
    """Draw how the feature that moves most with the label runs through a clip, by sentiment.

    Steps are put on a clock from 0 (start) to 1 (end); silent steps are left out. Bands are two
    standard errors over utterances.

    Args:
        view: a split, normally train.
        names: ``"v"``, ``"a"`` -> names of the features, where they are known.
    """
    third = np.ptp(view.store.info.label_range) / 6
    groups = {
        f"negative (y ≤ −{third:.2g})": view.y <= -third,
        f"weak (−{third:.2g} < y < {third:.2g})": np.abs(view.y) < third,
        f"positive (y ≥ {third:.2g})": view.y >= third,
    }
    fig, axes = plt.subplots(1, len(view.store.info.widths), figsize=(10, 3.4), squeeze=False)
    for m, ax in zip(view.store.info.widths, axes[0], strict=True):
        r = feature_correlations(view, m)
        k = int(np.abs(r).argmax())
        clocks = np.stack([_clock(view.store.frames(m, row), k) for row in view.rows.tolist()])
        for (group, inside), tone in zip(groups.items(), (-1, 0, 1), strict=True):
            _draw_course(ax, clocks[inside], f"{group}: {inside.sum():,}", tone)
        feature = names[m][k] if m in names else f"feature {k}"
        ax.set_title(f"{MODALITY_NAMES[m]}: {feature}, r = {r[k]:+.2f}")
        ax.set(xlabel="time in the clip (0 start, 1 end)", ylabel="raw value")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def _clock(frames: np.ndarray, k: int) -> np.ndarray:
    heard = frames.any(axis=1)
    time = np.minimum((np.arange(len(frames)) + 0.5) / len(frames) * BINS, BINS - 1).astype(int)
    total = np.bincount(time[heard], frames[heard, k], BINS)
    count = np.bincount(time[heard], minlength=BINS)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _draw_course(ax: Axes, clocks: np.ndarray, label: str, tone: int) -> None:
    if len(clocks) == 0:
        return
    color = MUTED if tone == 0 else colormaps[SIGNS](0.5 + 0.4 * tone)
    n = np.maximum((~np.isnan(clocks)).sum(axis=0), 1)
    mean = np.nansum(clocks, axis=0) / n
    error = 2 * np.sqrt(np.nansum((clocks - mean) ** 2, axis=0) / n / n)
    time = (np.arange(len(mean)) + 0.5) / len(mean)
    ax.plot(time, mean, color=color, label=label, ls="--" if tone == 0 else "-")
    ax.fill_between(time, mean - error, mean + error, color=color, alpha=0.2, lw=0)


# --- what linear probes find -------------------------------------------------------------------


def probe_figure(scores: pd.DataFrame) -> Figure:
    """Draw Acc-2 and correlation of linear probes by part of the test split and modality.

    Whiskers: the middle 95 % over videos drawn with replacement. Black lines: Acc-2 of always
    saying the commoner sign.

    Args:
        scores: rows of `conki_lib.probes.score_groups` with a column modality (t, v, a).
    """
    groups = list(dict.fromkeys(scores["group"]))
    places = np.arange(len(groups))
    inputs = [m for m in "tva" if m in set(scores["modality"])]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, metric, scale in zip(axes, ("acc2_non0", "corr"), (100, 1), strict=True):
        for k, m in enumerate(inputs):
            part = scores[scores["modality"] == m].set_index("group").loc[groups]
            place = places + 0.22 * (k - (len(inputs) - 1) / 2)
            mid, low, high = (scale * part[metric + end] for end in ("", "_low", "_high"))
            ax.errorbar(place, mid, np.maximum([mid - low, high - mid], 0),
                        fmt=INPUT_MARKERS[m], ms=8, color=INPUT_COLORS[m], mec=INK, mew=0.6,
                        label=MODALITY_NAMES[m])  # fmt: skip
        ax.set_xticks(places, [g.replace(" / ", "\n") for g in groups])
        ax.set_xlim(-0.5, len(groups) - 0.5)
        ax.grid(axis="x", visible=False)
    majority = scores.drop_duplicates("group")["majority"]
    axes[0].hlines(100 * majority, places - 0.4, places + 0.4, color=INK, lw=1)
    axes[0].set(title="Acc-2 non0 (%; line: majority class)", ylim=(25, 100))
    axes[1].axhline(0, color=INK, lw=1)
    axes[1].set(title="correlation (line: 0)", ylim=(-0.5, 1))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


# --- the generated corpora ---------------------------------------------------------------------


def ceilings_figure(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw what readers with more or less insight reach on a generated corpus.

    Args:
        scores: from `conki_lib.data.synthetic.ceilings`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 0.9 + 0.28 * len(scores)), sharey=True)
    place = np.arange(len(scores))
    colors = [READERS.get(name.split(":")[0], READERS["cues"])[1] for name in scores]
    for ax, metric in zip(axes, ("acc2_non0", "corr"), strict=True):
        values = np.array([row[metric] for row in scores.values()])
        most = 100 if is_share(metric) else 1
        ax.barh(place, most * np.nan_to_num(values), color=colors)
        for y, value in zip(place, values, strict=True):
            text = show(metric, value) or "undefined"
            ax.text(most * (np.nan_to_num(value) + 0.01), y, text, va="center", fontsize=8)
        ticks = most * np.array([0, 0.25, 0.5, 0.75, 1])
        ax.set(title=METRIC_NAMES[metric], xlim=(0, 1.14 * most), xticks=ticks)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(place, list(scores), fontsize=9)
    axes[0].invert_yaxis()
    handles = [Patch(label=label, color=color) for label, color in READERS.values()]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def cue_figure(table: pd.DataFrame) -> Figure:
    """Draw what is said, shown and sounded in utterances of a generated corpus, and the label.

    Args:
        table: rows of its utterance table, one panel each.
    """
    fig, axes = plt.subplots(len(table), 1, figsize=(10, 0.5 + 1.25 * len(table)), sharex=True)
    for ax, (_, u) in zip(np.atleast_1d(axes), table.iterrows(), strict=True):
        values = [u[cue] for cue in CUES]
        ax.barh(list(CUES), values, color=[INPUT_COLORS[m] for m in CUES.values()], height=0.7)
        ax.axvline(u["y"], color=INK, lw=2)
        ax.axvline(0, color=MUTED, lw=0.8)
        kind = f"conflict: {u['conflict_cue']}" if u["conflict"] else "no conflict"
        ax.set_title(f"{kind}, y = {u['y']:+.1f}   \u201c{u['text']}\u201d", fontsize=9.5)
        ax.set_xlim(-3.2, 3.2)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    np.atleast_1d(axes)[-1].set_xlabel("sentiment (black line: the label)")
    return fig


def slang_figure(views: Mapping[str, SplitView], words: Mapping[str, float]) -> Figure:
    """Draw how often each domain word stands in the texts of some splits.

    Args:
        views: title -> split of a generated corpus; one panel each.
        words: word -> polarity; negative ones are brown, positive ones teal.
    """
    order = sorted(words, key=words.__getitem__)
    fig, axes = plt.subplots(len(views), 1, figsize=(10, 1 + 1.5 * len(views)), sharex=True)
    for (title, view), ax in zip(views.items(), np.atleast_1d(axes), strict=True):
        counts = view.table["domain_word"].value_counts().reindex(order, fill_value=0)
        colors = [colormaps[SIGNS](0.1 if words[word] < 0 else 0.9) for word in order]
        ax.bar(order, counts, color=colors)
        ax.set(title=f"{title}: {counts.sum():,} of {len(view):,} texts hold a domain word")
        ax.set_ylabel("texts")
        ax.grid(axis="x", visible=False)
    np.atleast_1d(axes)[-1].tick_params(axis="x", rotation=60)
    return fig
