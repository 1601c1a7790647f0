"""Pictures of what the inputs know of the label: courses over time, probes, ceilings."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.store import SplitView
from conki_lib.plots.data import INPUT_COLORS, INPUT_MARKERS, SIGNS, SPLIT_COLORS
from conki_lib.plots.style import INK, MUTED

CUES = {"said": "t", "shown": "v", "sounded": "a"}


def feature_correlations(view: SplitView, m: str) -> Float[np.ndarray, " d_in"]:
    """Pearson correlation of each feature's mean over the clip with the label; 0 for constants."""
    x = np.array(
        [view.store.frames(m, row).mean(axis=0, dtype=np.float64) for row in view.rows.tolist()]
    )
    x, y = x - x.mean(axis=0), view.y - view.y.mean()
    norm = np.sqrt((x**2).sum(axis=0) * (y**2).sum())
    return np.where(norm > 0, x.T @ y / np.where(norm > 0, norm, 1), 0.0)


def course_figure(view: SplitView, names: Mapping[str, Sequence[str]], bins: int = 10) -> Figure:
    """Draw how the feature that moves most with the label runs through a clip, by sentiment.

    Steps are put on a clock from 0 (start) to 1 (end); silent steps are left out. Bands are two
    standard errors over utterances.

    Args:
        view: a split, normally train.
        names: ``"v"``, ``"a"`` -> names of the features, where they are known.
        bins: points of the clock.
    """
    low, high = view.store.info.label_range
    third = (high - low) / 6
    groups = {"negative": (low, -third), "neutral": (-third, third), "positive": (third, high)}
    fig, axes = plt.subplots(1, len(view.store.info.widths), figsize=(10, 3.1), squeeze=False)
    for m, ax in zip(view.store.info.widths, axes[0], strict=True):
        r = feature_correlations(view, m)
        k = int(np.abs(r).argmax())
        clocks = np.stack(
            [_clock(view.store.frames(m, row), k, bins) for row in view.rows.tolist()]
        )
        for (group, (least, most)), tone in zip(groups.items(), (-1, 0, 1), strict=True):
            inside = (view.y > least) & (view.y < most) if tone == 0 else (view.y * tone >= third)
            _draw_course(ax, clocks[inside], f"{group} label ({inside.sum():,})", tone)
        label = names.get(m, ())
        ax.set_title(
            f"{MODALITY_NAMES[m]}: {label[k] if len(label) else f'feature {k}'}, r = {r[k]:+.2f}"
        )
        ax.set(xlabel="time in the clip (0 start, 1 end)", ylabel="raw value")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(groups))
    return fig


def _clock(frames: np.ndarray, k: int, bins: int) -> np.ndarray:
    heard = frames.any(axis=1)
    time = np.minimum((np.arange(len(frames)) + 0.5) / len(frames) * bins, bins - 1).astype(int)
    total = np.bincount(time[heard], frames[heard, k], bins)
    count = np.bincount(time[heard], minlength=bins)
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
    inputs = [m for m in "tva" if m in set(scores["modality"])]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, metric in zip(axes, ("acc2_non0", "corr"), strict=True):
        for k, m in enumerate(inputs):
            part = scores[scores["modality"] == m].set_index("group").loc[groups]
            place = np.arange(len(groups)) + 0.22 * (k - (len(inputs) - 1) / 2)
            whiskers = [part[metric] - part[f"{metric}_low"], part[f"{metric}_high"] - part[metric]]
            ax.errorbar(place, part[metric], np.maximum(whiskers, 0), fmt=INPUT_MARKERS[m], ms=8,
                        color=INPUT_COLORS[m], mec=INK, mew=0.6,
                        label=MODALITY_NAMES[m])  # fmt: skip
        ax.set_xticks(np.arange(len(groups)), [g.replace(" / ", "\n") for g in groups])
        ax.set_xlim(-0.5, len(groups) - 0.5)
        ax.grid(axis="x", visible=False)
    majority = scores.drop_duplicates("group")["majority"]
    axes[0].hlines(
        majority, np.arange(len(groups)) - 0.4, np.arange(len(groups)) + 0.4, color=INK, lw=1
    )
    axes[0].set(title="Acc-2 non0 (line: majority class)", ylim=(0.25, 1))
    axes[1].axhline(0, color=INK, lw=1)
    axes[1].set(title="correlation (line: 0)", ylim=(-0.5, 1))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


# --- the generated corpora ---------------------------------------------------------------------


def ceilings_figure(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw what readers with more or less insight reach on a generated corpus.

    Args:
        scores: from `conki_lib.data.synthetic.ceilings`.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 0.9 + 0.28 * len(scores)), sharey=True)
    place = np.arange(len(scores))
    colors = [_ceiling_color(name) for name in scores]
    for ax, metric, title in zip(
        axes, ("acc2_non0", "corr"), ("Acc-2 non0", "correlation"), strict=True
    ):
        values = np.array([row[metric] for row in scores.values()])
        ax.barh(place, np.nan_to_num(values), color=colors)
        for y, value in zip(place, values, strict=True):
            text = "undefined" if np.isnan(value) else f"{value:.2f}"
            ax.text(np.nan_to_num(value) + 0.01, y, text, va="center", fontsize=8)
        ax.set(title=title, xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1])
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(place, list(scores), fontsize=9)
    axes[0].invert_yaxis()
    return fig


def _ceiling_color(name: str) -> str:
    if name.startswith("oracle"):
        return SPLIT_COLORS["test"]
    return INPUT_COLORS["v"] if name.startswith("ridge") else SPLIT_COLORS["train"]


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
