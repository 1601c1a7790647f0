"""Pictures of the pair sets, of the softmax over pairs, and of the temperature."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.path import Path
from torch import Tensor

from conki_lib.pairs import REPS, SETS, PairMasks, row_names
from conki_lib.plots.style import (
    FAMILY_NAMES,
    INK,
    MUTED,
    PAIR_COLORS,
    PAIR_NAMES,
    REP_COLORS,
    REP_MARKERS,
    rep_label,
)

FRAME = "#D08A00"
FILL = 0.62  # how strong a matrix's squares are, so that their figures stay legible
MATRIX_COLORS = {
    name: to_hex(FILL * np.array(to_rgb(color)) + 1 - FILL) for name, color in PAIR_COLORS.items()
}
PAIR_COLORMAP = ListedColormap(["#FFFFFF", *(MATRIX_COLORS[name] for name in SETS)])


def set_codes(masks: PairMasks) -> np.ndarray:
    """Number each ordered pair by its set: 1 to 4 for P1, P2, N1, N2, and 0 for none."""
    return sum((k + 1) * getattr(masks, name).int() for k, name in enumerate(SETS)).cpu().numpy()


def _names(masks: PairMasks, reps: Sequence[str]) -> list[str]:
    return row_names(len(masks.P1) // len(reps), reps)


def pair_legend(target: Axes | Figure, *, matrix: bool = False, **where: object) -> None:
    """Explain the colours of the pair sets in words.

    Args:
        target: figure or axes that gets the legend.
        matrix: show each set as a square of `draw_matrix`, filled and framed as there.
        where: place and columns, as for matplotlib's legend.
    """
    handles = []
    for name in SETS:
        look = {"color": PAIR_COLORS[name]}
        if matrix:
            edge = PAIR_COLORS[name] if name[1] == "1" else MATRIX_COLORS[name]
            look = {"fc": MATRIX_COLORS[name], "ec": edge, "lw": 1.8}
        handles.append(Patch(label=f"{name}  {PAIR_NAMES[name]}", **look))
    target.legend(handles=handles, **where)


# ---- pairs --------------------------------------------------------------------------------------


def draw_anchor(masks: PairMasks, y: Sequence[float], anchor: str) -> Figure:
    """Draw a batch as one anchor sees it: a line to every other row, coloured by the pair's set."""
    names = _names(masks, REPS)
    places = {name: _place(name) for name in names}
    fig, ax = plt.subplots(figsize=(9.2, 4.1))
    codes = set_codes(masks)[names.index(anchor)]
    for name, code in zip(names, codes, strict=True):
        if code:
            _link(ax, places[anchor], places[name], SETS[code - 1])
    for name, (x, height) in places.items():
        rep = name.split("^")[0]
        edge = {"edgecolor": INK, "linewidth": 2.4} if name == anchor else {"edgecolor": "white"}
        ax.scatter(x, height, s=760, c=REP_COLORS[rep], marker=REP_MARKERS[rep], zorder=3, **edge)
        ink = INK if rep.endswith("a") else "white"
        ax.text(x, height, rep_label(name), ha="center", va="center", color=ink, zorder=4)
    for i, label in enumerate(y):
        text = f"sample {i + 1},  y = {float(label):+.1f}"
        ax.text(4 * i + 1, -0.75, text, ha="center", weight="bold")
    for height, family in ((1.6, "O"), (0, "A")):
        ax.text(-0.8, height, FAMILY_NAMES[family], ha="right", va="center", color=MUTED)
    ax.set(xlim=(-3.2, 4 * len(y) - 1), ylim=(-0.95, 2.75))
    ax.axis("off")
    pair_legend(fig, loc="outside upper center", ncol=2)
    return fig


def _place(name: str) -> tuple[float, float]:
    rep, sample = name.split("^")
    column = [r for r in REPS if r[0] == rep[0]].index(rep)
    return 4.0 * (int(sample) - 1) + column, 1.6 if rep[0] == "O" else 0.0


def _link(ax: Axes, p: tuple[float, float], q: tuple[float, float], name: str) -> None:
    """A line from p to q that passes over or between the markers on its way, never behind one."""
    style = {"color": PAIR_COLORS[name], "linewidth": 2.2 if name[1] == "1" else 1.8}
    style |= {"arrowstyle": "-", "zorder": 1}
    dx, dy = q[0] - p[0], q[1] - p[1]
    if dy:  # leave and arrive steeply, cross the gap between the two rows in the middle
        bends = [(p[0] + 0.25 * dx, p[1] + 0.56 * dy), (q[0] - 0.12 * dx, q[1] - 0.56 * dy)]
        codes = [Path.MOVETO, *[Path.CURVE4] * 3]
        ax.add_patch(FancyArrowPatch(path=Path([p, *bends, q], codes), **style))
    else:  # an arc above the row; the nearer, the rounder
        bend = -np.copysign(0.25 + 0.4 / abs(dx), dx)
        ax.add_patch(FancyArrowPatch(p, q, connectionstyle=f"arc3,rad={bend}", **style))


def draw_matrix(
    masks: PairMasks, *, reps: Sequence[str] = REPS, title: str = "", ax: Axes | None = None
) -> Figure:
    """Draw all pairs as the paper does: 1 positive, 0 negative; P1 framed red, N1 framed blue."""
    names, codes = _names(masks, reps), set_codes(masks)
    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 7.5))
    ax.imshow(codes, cmap=PAIR_COLORMAP, vmin=0, vmax=4)
    for p, q in np.ndindex(codes.shape):
        code = codes[p, q]
        text = "·" if p == q else "" if not code else "1" if code <= 2 else "0"
        ax.text(q, p, text, ha="center", va="center", fontsize=7.5)
    _frame_blocks(ax, codes, names)
    _label_rows(ax, names, len(reps))
    ax.set_title(title, pad=8)
    return ax.get_figure(root=True)


def _frame_blocks(ax: Axes, codes: np.ndarray, names: Sequence[str]) -> None:
    """Frame the blocks (sample and kind) x (sample and kind) that belong to P1 or N1."""
    keys = [(name.split("^")[1], name[0]) for name in names]
    runs = [[i for i, _ in run] for _, run in groupby(enumerate(keys), key=lambda item: item[1])]
    for rows in runs:
        for columns in runs:
            found = set(codes[np.ix_(rows, columns)].flat) - {0}
            if found in ({1}, {3}):
                color = PAIR_COLORS[SETS[found.pop() - 1]]
                corner = (columns[0] - 0.43, rows[0] - 0.43)
                size = (len(columns) - 0.14, len(rows) - 0.14)
                ax.add_patch(Rectangle(corner, *size, fill=False, ec=color, lw=2.2))


def _label_rows(ax: Axes, names: Sequence[str], K: int) -> None:
    labels = [rep_label(name) for name in names]
    ax.set_xticks(range(len(names)), labels)
    ax.set_yticks(range(len(names)), labels)
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=2)
    for edge in np.arange(0, len(names) + 1, K) - 0.5:
        ax.axhline(edge, color=INK, lw=1.1)
        ax.axvline(edge, color=INK, lw=1.1)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def compare_matrices(masks: Mapping[str, PairMasks]) -> Figure:
    """Draw several matrices side by side under their titles."""
    fig, axes = plt.subplots(1, len(masks), figsize=(6 * len(masks), 7.5))
    for ax, (title, one) in zip(np.atleast_1d(axes), masks.items(), strict=True):
        draw_matrix(one, title=title, ax=ax)
    pair_legend(fig, matrix=True, loc="outside upper center", ncol=2)
    return fig


def draw_shares(shares: Mapping[str, Float[Tensor, "R R"]], blocks: Mapping[str, int]) -> Figure:
    """Draw softmax shares f / denominator as matrices; the shares inside a frame sum to 1.

    Args:
        shares: one matrix per title.
        blocks: per title, how many rows one softmax spans.
    """
    fig, axes = plt.subplots(1, len(shares), figsize=(5.8 * len(shares), 5.6))
    for ax, (title, share) in zip(np.atleast_1d(axes), shares.items(), strict=True):
        names = row_names(len(share) // len(REPS), REPS)
        image = ax.imshow(share.detach().numpy(), cmap="Greys", vmin=0, vmax=float(share.max()))
        _label_rows(ax, names, len(REPS))
        for top in range(0, len(names), blocks[title]):
            frame = Rectangle((-0.5, top - 0.5), len(names), blocks[title], fill=False, lw=2)
            frame.set(edgecolor=FRAME, clip_on=False, zorder=4)
            ax.add_patch(frame)
        ax.set_title(title)
        fig.colorbar(image, ax=ax, shrink=0.75, label="share of the softmax")
    return fig


def draw_temperature(
    scores: Float[Tensor, " n"],
    shares: Mapping[float, Float[Tensor, " n"]],
    labels: Sequence[str],
    sets: Sequence[str],
) -> Figure:
    """Draw how the temperature divides one anchor's softmax among its candidates.

    Args:
        scores: cosine of the anchor with each candidate, highest first.
        shares: per temperature, the candidates' shares; each sums to 1.
        labels: the candidates' names.
        sets: the candidates' pair sets, for the colours.
    """
    fig, axes = plt.subplots(1, len(shares), figsize=(10.8, 6), sharex=True, sharey=True)
    places, colors = np.arange(len(scores)), [PAIR_COLORS[name] for name in sets]
    ticks = [f"{rep_label(n)}  {float(c):+.2f}" for n, c in zip(labels, scores, strict=True)]
    for ax, (tau, share) in zip(np.atleast_1d(axes), shares.items(), strict=True):
        ax.barh(places, share.numpy(), color=colors, height=0.78)
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        text = f"as if spread evenly over\n{float(entropy.exp()):.1f} of {len(share)} candidates"
        ax.text(0.97, 0.08, text, transform=ax.transAxes, ha="right", color=MUTED)
        ax.set(title=f"τ = {tau:g}", xlabel="share of the softmax")
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(places, ticks)
    axes[0].invert_yaxis()
    axes[0].set(ylabel="candidate, and its cosine with the anchor")
    axes[0].set_xlim(0, 1.08 * max(float(share.max()) for share in shares.values()))
    pair_legend(fig, loc="outside upper center", ncol=2)
    return fig
