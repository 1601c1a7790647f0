"""Pictures of corpora: labels, lengths, ranges of features, example sequences, defects."""

from collections.abc import Mapping, Sequence
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Integer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.store import FeatureStore, SplitView, Utterance
from conki_lib.pairs import sentiment_class
from conki_lib.plots.style import INK, MUTED

# data belong to no representation and to no pair set: neither greens and purples nor red and blue
SPLIT_COLORS = {"train": "#BDBDBD", "valid": "#6E6E6E", "test": "#00798C"}
INPUT_COLORS = {"t": "#5C3D1E", "v": "#B07D2B", "a": "#E3C16F"}
INPUT_MARKERS = {"t": "o", "v": "s", "a": "^"}
SIGNS = "BrBG"  # brown: negative, below the mean; teal: positive, above the mean
SILENT = "#D6D6D6"
NEUTRAL = "#C9C9C9"
FOUND = "#D9730D"
MOST_FRAMES = 200_000
_FIRST_CJK = 0x2E80  # from here on the font of the figures has no characters
_STEP = 0.1  # labels are drawn in bins of this width


# --- numbers behind the pictures ---------------------------------------------------------------


def lengths(view: SplitView, m: str) -> Integer[np.ndarray, " N"]:
    """How long each utterance is: words of ``"t"``, steps of ``"v"`` and ``"a"``.

    Chinese writes no spaces between words: there, characters are counted.
    """
    if m != "t":
        return view.lengths(m)
    texts = view.columns["text"]
    if view.store.info.language == "zh":
        return np.array([len(text.replace(" ", "")) for text in texts])
    return np.array([len(text.split()) for text in texts])


def is_placeholder(view: SplitView, m: str) -> Bool[np.ndarray, " N"]:
    """Which utterances have no frames of ``"v"`` or ``"a"``: a store holds one zero step there."""
    short = view.lengths(m) == 1 if m != "t" else np.zeros(len(view), bool)
    rows = view.rows[short].tolist()
    short[short] = [not view.store.frames(m, row).any() for row in rows]
    return short


def feature_ranges(store: FeatureStore) -> pd.DataFrame:
    """Describe every vision and audio feature of the train split, one row each, raw values.

    Utterances are drawn until `MOST_FRAMES` frames are reached; smaller splits are read whole.

    Args:
        store: any corpus.

    Returns:
        Columns modality, feature, min, q01, median, q99, max, mean, std, zeros (share of exact
        zeros), furthest (the largest distance from the mean, in deviations).
    """
    view, lines = store["train"], []
    for m in store.info.widths:
        order = np.random.default_rng(0).permutation(len(view))
        few = order[: np.searchsorted(np.cumsum(view.lengths(m)[order]), MOST_FRAMES) + 1]
        frames = [store.frames(m, row) for row in view.rows[few].tolist()]
        x = np.concatenate(frames, dtype=np.float64)
        q = np.quantile(x, [0, 0.01, 0.5, 0.99, 1], axis=0)
        mean, std = x.mean(0), x.std(0)
        table = {"modality": MODALITY_NAMES[m], "feature": np.arange(x.shape[1])}
        table |= dict(zip(["min", "q01", "median", "q99", "max"], q, strict=True))
        table |= {"mean": mean, "std": std, "zeros": (x == 0).mean(0)}
        table["furthest"] = np.abs((q[[0, -1]] - mean) / np.where(std > 0, std, 1)).max(0)
        lines.append(pd.DataFrame(table))
    return pd.concat(lines, ignore_index=True) if lines else pd.DataFrame()


def is_tie(y: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Which labels lie halfway between two classes; r(.) rounds them to the even one."""
    return np.abs(y - np.trunc(y)) == 0.5


def _color_of(label: float, label_range: tuple[float, float]) -> ColorType:
    """From the range's low end (brown) to its high end (teal), the palest middle left out."""
    low, high = label_range
    place = 2 * (label - low) / (high - low) - 1
    if np.isclose(place, 0):
        return NEUTRAL
    return colormaps[SIGNS](0.5 + 0.4 * place + 0.08 * np.sign(place))


# --- labels and lengths ------------------------------------------------------------------------


def label_figure(stores: Mapping[str, FeatureStore]) -> Figure:
    """Draw per corpus the labels, coloured by class r(y), and the classes' shares per split.

    Labels halfway between two classes, which r(.) rounds to the even one, are hatched.

    Args:
        stores: title -> corpus; one row of panels each.
    """
    fig, axes = plt.subplots(len(stores), 2, figsize=(10, 2.9 * len(stores)), squeeze=False)
    for (title, store), (left, right) in zip(stores.items(), axes, strict=True):
        inside = store.utterances[store.utterances[store.fold].notna()]
        y = inside["y"].to_numpy(np.float32, copy=True)
        ties = _draw_labels(left, y, store.info.label_range)
        left.set(
            title=f"{title}: {len(y):,} labels, {ties:,} ties", xlabel="y", ylabel="utterances"
        )
        _draw_classes(right, {s: store[s].y for s in store.splits})
        right.set(title="classes r(y) per split", xlabel="class r(y)", ylabel="share of the split")
    _split_legend(fig, Patch(fc="white", ec=INK, hatch="////", label="tie, e.g. 0.5 and 1.5"))
    return fig


def _split_legend(fig: Figure, *more: Patch) -> None:
    handles = [Patch(facecolor=c, label=split) for split, c in SPLIT_COLORS.items()]
    fig.legend(handles=[*more, *handles], loc="outside upper center", ncols=len(more) + 3)


def _draw_labels(ax: Axes, y: np.ndarray, label_range: tuple[float, float]) -> int:
    low, high = label_range
    edges = np.arange(np.floor(low / _STEP) - 0.5, high / _STEP + 1) * _STEP
    classes = sentiment_class(y).numpy()
    tie = is_tie(y)
    bottom = np.zeros(len(edges) - 1)
    for c in np.unique(classes):
        color = _color_of(float(c), label_range)
        for halfway in (False, True):
            height, _ = np.histogram(y[(classes == c) & (tie == halfway)], edges)
            k = np.flatnonzero(height)
            look = dict(hatch="//////", edgecolor=INK) if halfway else dict(edgecolor="white")
            ax.bar(edges[k], height[k], _STEP, bottom[k], align="edge", color=color, lw=0.3, **look)
            bottom += height
    for boundary in np.arange(np.ceil(low) - 0.5, high + 0.5):
        if low < boundary < high:
            ax.axvline(boundary, color=MUTED, lw=0.8, ls=":")
    ax.grid(axis="x", visible=False)
    ax.set_xlim(low - 2 * _STEP, high + 2 * _STEP)
    return int(tie.sum())


def _draw_classes(ax: Axes, labels: Mapping[str, np.ndarray]) -> None:
    found = {split: sentiment_class(y).numpy() for split, y in labels.items()}
    classes = np.unique(np.concatenate(list(found.values())))
    width = 0.8 / len(found)
    for k, (split, c) in enumerate(found.items()):
        share = [(c == one).mean() for one in classes]
        place = classes + (k - (len(found) - 1) / 2) * width
        ax.bar(place, share, width, color=SPLIT_COLORS[split])
    ax.set_xticks(classes)
    ax.grid(axis="x", visible=False)


def length_figure(stores: Mapping[str, FeatureStore]) -> Figure:
    """Draw how long texts and sequences are: per corpus one row, per modality one panel.

    Args:
        stores: title -> corpus.
    """
    fig, axes = plt.subplots(len(stores), 3, figsize=(10, 2.4 * len(stores)), squeeze=False)
    for (title, store), row in zip(stores.items(), axes, strict=True):
        words = "characters" if store.info.language == "zh" else "words"
        for m, ax in zip("tva", row, strict=True):
            name = f"{title}: {MODALITY_NAMES[m]}" if m == "t" else MODALITY_NAMES[m]
            ax.set_title(name)
            if m not in store.info.modalities:
                _say(ax, f"no {MODALITY_NAMES[m]}\nin this corpus")
                continue
            unit = words if m == "t" else "steps"
            found = {s: lengths(store[s], m) for s in store.splits}
            kept = {s: ~is_placeholder(store[s], m) for s in store.splits}
            _draw_lengths(ax, {s: x[kept[s]] for s, x in found.items() if kept[s].any()}, unit)
            if left_out := sum(int((~k).sum()) for k in kept.values()):
                ax.set_title(f"{name} ({left_out:,} without it left out)")
    _split_legend(fig)
    return fig


def _draw_lengths(ax: Axes, found: Mapping[str, np.ndarray], unit: str) -> None:
    most = max((int(x.max()) for x in found.values()), default=1)
    if most == 1:
        _say(ax, "one vector\nper utterance")
        return
    edges = np.arange(0.5, most + 1) if most <= 40 else np.linspace(0, most, 41)
    for split, x in found.items():
        filled = split == "train"
        ax.hist(x, edges, density=True, histtype="stepfilled" if filled else "step",
                color=SPLIT_COLORS[split], lw=1.5)  # fmt: skip
    ax.set(xlabel=unit, yticks=[])
    ax.set_ylabel("density")


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)


# --- features ----------------------------------------------------------------------------------


def range_figure(ranges: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw every feature's range: thin from least to greatest, thick for the middle 98 %.

    Args:
        ranges: title -> table from `feature_ranges`; a column of panels each.
    """
    found = set().union(*(table["modality"] for table in ranges.values()))
    modalities = [m for m in INPUT_COLORS if MODALITY_NAMES[m] in found]
    fig, axes = plt.subplots(
        len(modalities), len(ranges), figsize=(10, 2.6 * len(modalities)), squeeze=False
    )
    for (title, table), column in zip(ranges.items(), axes.T, strict=True):
        for m, ax in zip(modalities, column, strict=True):
            name, rows = MODALITY_NAMES[m], table[table["modality"] == MODALITY_NAMES[m]]
            _draw_ranges(ax, rows, INPUT_COLORS[m])
            ax.set_title(f"{title}\n{len(rows)} {name} features")
    return fig


def _draw_ranges(ax: Axes, rows: pd.DataFrame, color: str) -> None:
    ax.vlines(rows["feature"], rows["min"], rows["max"], color=MUTED, lw=0.8)
    ax.vlines(rows["feature"], rows["q01"], rows["q99"], color=color, lw=3)
    ax.plot(rows["feature"], rows["median"], ".", color=INK, ms=5)
    narrow = rows[["min", "max"]].abs().max(axis=None) < 20
    ax.set_yscale("symlog", linthresh=1, subs=[2, 5] if narrow else None)
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis("{x:g}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="feature", ylabel="value (symlog)", xlim=(-0.5, len(rows) - 0.5))
    ax.grid(axis="x", visible=False)


def example_figure(store: FeatureStore, utterances: Sequence[Utterance]) -> Figure:
    """Draw utterances: what is said, and the vision and audio sequences, standardised.

    Args:
        store: the corpus, whose train mean and deviation are used.
        utterances: one row of panels each.
    """
    names = list(store.info.widths)
    longest = {m: max(len(u.inputs[m]) for u in utterances) for m in names}
    fig, axes = plt.subplots(
        len(utterances), len(names), figsize=(10, 0.4 + 2.3 * len(utterances)), squeeze=False
    )
    for u, row in zip(utterances, axes, strict=True):
        for m, ax in zip(names, row, strict=True):
            picture = draw_frames(ax, u.inputs[m].numpy(), *store.stats(m))
            ax.set_xlim(-0.5, longest[m] - 0.5)
            ax.set_ylabel(f"{MODALITY_NAMES[m]} feature")
        said = f"\u201c{u.text}\u201d" if u.text else "(no text in this corpus)"
        if any(ord(c) >= _FIRST_CJK for c in u.text):
            said = f"(utterance {u.id})"
        title = shorten(f"y = {u.y:+.1f}: {said}", 100, placeholder=" ...")
        row[0].set_title(title, fontsize=9.5)
    for ax in axes[-1]:
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    fig.colorbar(picture, ax=axes, shrink=0.6, pad=0.01, label="deviations from the train mean")
    return fig


def draw_frames(
    ax: Axes,
    frames: Float[np.ndarray, "l d_in"],
    mean: Float[np.ndarray, " d_in"],
    std: Float[np.ndarray, " d_in"],
) -> object:
    """Draw one sequence as a picture, features upward, steps rightward; silent steps are grey."""
    x = (frames - mean) / std
    x[~frames.any(axis=1)] = np.nan
    cmap = colormaps[SIGNS].with_extremes(bad=SILENT)
    picture = ax.imshow(x.T, cmap=cmap, vmin=-3, vmax=3, aspect="auto", origin="lower",
                        interpolation="nearest")  # fmt: skip
    ax.grid(visible=False)
    return picture


# --- defects -----------------------------------------------------------------------------------


def audit_figure(audits: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw every check of an audit and the share of what it found; clean checks say so.

    A check that one corpus does not have, such as that of texts where there are none, is "not
    there".

    Args:
        audits: title -> table with columns check, found, of, share.
    """
    checks = list(dict.fromkeys(check for table in audits.values() for check in table["check"]))
    height = 0.8 + 0.27 * len(checks)
    fig, axes = plt.subplots(1, len(audits), figsize=(10, height), sharey=True, squeeze=False)
    for (title, table), ax in zip(audits.items(), axes[0], strict=True):
        found = table.set_index("check").reindex(checks)
        ax.barh(np.arange(len(checks)), found["share"].fillna(0), color=FOUND)
        for y, (count, of, share) in enumerate(found[["found", "of", "share"]].to_numpy(float)):
            text = "not there" if np.isnan(count) else f"{count:,.0f} of {of:,.0f}"
            text, color = (text, INK) if count > 0 else (text if of != of else "none", MUTED)
            end = np.nan_to_num(share)
            x, ha = (end - 0.02, "right") if end > 0.5 else (end + 0.02, "left")
            ax.text(x, y, text, ha=ha, va="center", fontsize=8, color=color)
        ax.set(title=title, xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="share of those checked")
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(np.arange(len(checks)), checks, fontsize=8)
    axes[0, 0].invert_yaxis()
    return fig
