"""One figure style: theme, colours, markers, and the one way a figure reaches the disk.

Colours carry meaning everywhere. Representations: greens are pan-knowledge (O), purples are
knowledge-specific (A); text is darkest, audio palest; circles are O, squares are A, so that
nothing rests on colour alone. Pairs: red pulls together, blue pushes apart; strong for P1 and N1,
which the paper frames, pale for P2 and N2. Both scales stay apart for colour-blind eyes.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
import matplotlib.pyplot as plt
from IPython.display import Image as DisplayImage
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from conki_lib.config import ROOT, RunConfig
from conki_lib.disk import in_one_step
from conki_lib.pairs import REPS
from conki_lib.plots.index import figure_producer

REP_COLORS = {
    "O_t": "#0B6B3A",
    "O_v": "#41AB5D",
    "O_a": "#A5D66F",
    "A_t": "#5B2A86",
    "A_v": "#9A6BBF",
    "A_a": "#D3B5E5",
}
REP_MARKERS = {name: "o" if name.startswith("O") else "s" for name in REPS}
FAMILY_COLORS = {"O": "#41AB5D", "A": "#9A6BBF"}
FAMILY_NAMES = {"O": "pan-knowledge", "A": "knowledge-specific"}
PAIR_COLORS = {"P1": "#C1272D", "P2": "#F4A582", "N1": "#2166AC", "N2": "#A6CEE3"}
PAIR_NAMES = {
    "P1": "same sample, same kind: together",
    "P2": "other sample, same class: together",
    "N1": "O against A: apart",
    "N2": "other sample, other class: apart",
}
INK = "#222222"
MUTED = "#8A8A8A"

_RC = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 1.25,
    "axes.prop_cycle": plt.cycler(color=list(REP_COLORS.values())),
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.bottom": False,
    "xtick.labelsize": 9,
    "xtick.major.size": 6,
    "xtick.major.width": 1.25,
    "ytick.left": False,
    "ytick.labelsize": 9,
    "ytick.major.size": 6,
    "ytick.major.width": 1.25,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 1,
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
}


def use_style() -> None:
    """Set the project's theme for all figures drawn after this call."""
    plt.style.use(["seaborn-v0_8-whitegrid", _RC])


def rep_label(name: str) -> str:
    """Write a representation or row name as mathematics: ``"O_t^1"`` becomes :math:`O_t^1`."""
    return f"${name}$"


def panel_grid(
    n: int, columns: int, panel: tuple[float, float], more: tuple[float, float] = (0.0, 0.0)
) -> tuple[Figure, list[Axes]]:
    """A figure of n panels in lines of at most so many columns; the last line may be shorter.

    Args:
        n: number of panels, at least 1.
        columns: most panels in a line.
        panel: width and height of one, in inches.
        more: width and height of the figure beyond its panels.
    """
    columns = min(n, columns)
    lines = -(-n // columns)
    size = (panel[0] * columns + more[0], panel[1] * lines + more[1])
    fig, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:n])


def figures_dir(profile: str) -> Path:
    """The folder of a profile's final figures, ``figures/<profile>/``."""
    return ROOT / "figures" / profile


def data_label(profile: str) -> str:
    """Name a profile under a figure of its data; generated data are called so."""
    from conki_lib.data import CORPORA  # loads PyTorch

    corpus = CORPORA.get(RunConfig.from_profile(profile).data.target)
    return profile + " (generated data)" * (corpus is not None and corpus.kind == "embedded")


def footnote(fig: Figure, text: str) -> Figure:
    """Write under a figure what is needed to read its file alone, in lines as wide as the figure.

    Legends of such a figure stand above it: below, they would share the footnote's place.
    """
    lines = fill(text, int(16 * fig.get_figwidth()))  # at this size an inch takes 16 letters
    fig.supxlabel(lines, fontsize=8, color=MUTED, x=0.01, ha="left")
    return fig


def save_figure(
    fig: Figure,
    name: str,
    profile: str,
    *,
    producer: str,
    folder: Path | None = None,
) -> Path:
    """Write a figure as PNG and SVG; drawn again from the same data, the files are the same bytes.

    Args:
        fig: the finished figure; its layout is fixed from here on: call `footnote` before.
        name: file name without ending, e.g. ``"02_matrix"``.
        profile: names the folder ``figures/<profile>/``.
        producer: stem of the one notebook that writes this figure; kept in the files' metadata.
        folder: another folder, for tests.

    Returns:
        The PNG's path.

    Raises:
        ValueError: the name has an ending, or another notebook already writes this figure.
    """
    if Path(name).name != name or Path(name).suffix:
        raise ValueError(f"figure name {name!r}: give a bare file name without ending")
    folder = folder or figures_dir(profile)
    target = folder / f"{name}.png"
    if target.exists() and figure_producer(target) not in (None, producer):
        raise ValueError(
            f"{target.name} of profile {profile!r} is written by {figure_producer(target)!r}: "
            f"{producer!r} must choose another name, or delete the old file"
        )
    unsaid = {".png": "Software", ".svg": "Date"}
    with mpl.rc_context({"svg.hashsalt": "conki"}):
        for ending, field in unsaid.items():
            with in_one_step(target.with_suffix(ending)) as path:
                fig.savefig(path, format=ending[1:], metadata={field: None, "Source": producer})
            fig.set_layout_engine("none")  # laid out once, which takes longer than drawing
    return target


def compact(fig: Figure, path: Path | None = None) -> DisplayImage:
    """Show a figure in few bytes.

    Args:
        fig: the finished figure; it is closed, so that the notebook does not show it twice.
        path: the file that it was written to, if any: then it is not drawn again.
    """
    small = BytesIO()
    if path is None:
        fig.savefig(path := BytesIO(), metadata={"Software": None})
    plt.close(fig)
    with Image.open(path) as image:
        # of 256 colours; the default method would merge the few points of a legend with others
        palette = image.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE, dither=0)
        palette.save(small, "PNG", optimize=True)
    return DisplayImage(small.getvalue())


def figure_keeper(
    profile: str, producer: str, *, of_data: bool = True, write: bool = True
) -> Callable[..., None]:
    """How a notebook keeps its figures: with a footnote, as files, and shown below the cell.

    Args:
        profile: names the folder, and where `of_data` the data, see `data_label`.
        producer: the notebook's stem.
        of_data: false: the figures show made-up numbers, and their notes say so.
        write: false: they are shown only, as with settings that are not the profile's own.

    Returns:
        ``keep_figure(figure, name, note)``; a note names split, n, seed, and what the marks mean.
    """
    label = data_label(profile) if of_data else ""

    def keep_figure(fig: Figure, name: str, note: str = "") -> None:
        footnote(fig, ", ".join(filter(None, (label, note))))
        path = save_figure(fig, name, profile, producer=producer) if write else None
        display(compact(fig, path))

    return keep_figure
