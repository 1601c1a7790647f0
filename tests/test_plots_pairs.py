"""The style and the pictures of pairs and plane: what they show; files are reproducible."""

import itertools
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path as Curve
from PIL import Image

from conki_lib.config import ROOT
from conki_lib.pairs import REPS, SETS, pair_masks
from conki_lib.plots import pairs as pictures
from conki_lib.plots import plane as planes
from conki_lib.plots import style
from conki_lib.plots.index import figure_producer
from conki_lib.plots.style import (
    PAIR_COLORS,
    REP_COLORS,
    REP_MARKERS,
    compact,
    figure_keeper,
    figures_dir,
    footnote,
    save_figure,
    use_style,
)

Y = (1.2, 0.8, -2.0)
ANGLES = torch.linspace(0, 6, 18).view(3, 6)


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    matplotlib.use("Agg")
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close("all")


# ---- style --------------------------------------------------------------------------------------


def _seen_by_deuteranope(color: str) -> np.ndarray:
    """Machado et al. 2009, full deuteranopia, on linear RGB."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("palette", [REP_COLORS, PAIR_COLORS, pictures.MATRIX_COLORS])
def test_colours_differ_for_colour_blind_eyes(palette: dict[str, str]) -> None:
    for a, b in itertools.combinations(palette.values(), 2):
        assert np.linalg.norm(_seen_by_deuteranope(a) - _seen_by_deuteranope(b)) > 0.15, (a, b)


def test_every_representation_has_a_colour_and_its_kinds_marker() -> None:
    assert tuple(REP_COLORS) == REPS and tuple(PAIR_COLORS) == SETS
    assert {REP_MARKERS[r] for r in REPS[:3]} == {"o"}
    assert {REP_MARKERS[r] for r in REPS[3:]} == {"s"}


def test_a_figure_drawn_twice_is_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for k in (1, 2):
        figure = planes.draw_plane(ANGLES, title="same")
        path = save_figure(figure, "x", "p", producer="nb", folder=tmp_path / str(k))
        written.append((path.read_bytes(), path.with_suffix(".svg").read_bytes()))
    assert written[0] == written[1]


def test_a_figure_has_one_producer(tmp_path: Path) -> None:
    figure = plt.figure()
    path = save_figure(figure, "x", "p", producer="02_pairs", folder=tmp_path)
    assert figure_producer(path) == "02_pairs"
    save_figure(figure, "x", "p", producer="02_pairs", folder=tmp_path)
    with pytest.raises(ValueError, match="written by '02_pairs'.*'06_other' must choose another"):
        save_figure(figure, "x", "p", producer="06_other", folder=tmp_path)


def test_a_figure_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    assert figure_producer(tmp_path / "x.png") is None
    path = save_figure(plt.figure(), "x", "p", producer="02_pairs", folder=tmp_path)
    assert figure_producer(path) == "02_pairs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png", "x.svg"]


def test_a_compact_figure_keeps_the_colours_of_its_legend() -> None:
    figure, ax = plt.subplots()
    ax.imshow(np.random.default_rng(0).random((60, 60)))  # all the colours of a scale
    for name, colour in REP_COLORS.items():
        ax.plot([], [], "s", color=colour, label=name)
    ax.legend()
    with Image.open(BytesIO(compact(figure).data)) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in REP_COLORS.values():
        wanted = 255 * np.array(to_rgb(colour))
        assert np.abs(pixels - wanted).max(1).min() < 16, colour


def test_a_kept_figure_is_written_and_its_file_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(style, "ROOT", tmp_path)
    monkeypatch.setattr(style, "display", lambda picture: shown.append(picture.data))
    for write in (False, True):
        figure, ax = plt.subplots()
        ax.plot([0, 1], color=REP_COLORS["O_t"])
        figure_keeper("synthetic", "nb", write=write)(figure, "x", "test split, 3 clips")
        below = figure._supxlabel.get_text()
        assert below == "synthetic (generated data), test split, 3 clips"
        assert (tmp_path / "figures/synthetic/x.svg").is_file() == write
        assert not plt.get_fignums()
    written = tmp_path / "figures/synthetic/x.png"
    pictures = [np.asarray(Image.open(f).convert("RGB")) for f in (*map(BytesIO, shown), written)]
    assert np.abs(pictures[1].astype(int) - pictures[2]).max() < 16
    assert pictures[0].shape == pictures[1].shape
    figure_keeper("synthetic", "nb", of_data=False, write=False)(figure := plt.figure(), "x", "toy")
    assert figure._supxlabel.get_text() == "toy"


def test_figures_go_to_the_profiles_folder() -> None:
    assert figures_dir("mosi-open") == ROOT / "figures" / "mosi-open"


def test_a_note_stands_under_its_figure_in_lines_no_wider_than_it() -> None:
    figure = plt.figure(figsize=(4, 3))
    written = footnote(figure, "word " * 40)._supxlabel
    figure.canvas.draw()
    assert written.get_text().split() == ["word"] * 40
    assert written.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", ["x.png", "a/b"])
def test_a_figure_name_is_bare(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bare file name"):
        save_figure(plt.figure(), name, "p", producer="nb", folder=tmp_path)


# ---- pairs --------------------------------------------------------------------------------------


def _frames(ax: plt.Axes, color: str) -> list[Rectangle]:
    return [
        p for p in ax.patches if isinstance(p, Rectangle) and p.get_edgecolor()[:3] == to_rgb(color)
    ]


@pytest.mark.parametrize(("n1", "blue"), [("symmetric", 18), ("literal", 9)])
def test_the_matrix_frames_p1_red_and_n1_blue(n1: str, blue: int) -> None:
    ax = pictures.draw_matrix(pair_masks(Y, n1=n1)).axes[0]
    assert len(_frames(ax, PAIR_COLORS["P1"])) == 6
    assert len(_frames(ax, PAIR_COLORS["N1"])) == blue


@pytest.mark.parametrize("n1", ["symmetric", "literal"])
def test_the_matrix_writes_one_for_positive_and_zero_for_negative(n1: str) -> None:
    masks = pair_masks(Y, n1=n1)
    ax = pictures.draw_matrix(masks).axes[0]
    written = np.full((18, 18), "", dtype=object)
    for text in ax.texts:
        q, p = text.get_position()
        written[p, q] = text.get_text()
    assert ((written == "1") == masks.positive.numpy()).all()
    assert ((written == "0") == (masks.N1 | masks.N2).numpy()).all()
    assert (written[np.eye(18, dtype=bool)] == "·").all()


def test_the_matrix_takes_any_subset_of_representations() -> None:
    ax = pictures.draw_matrix(pair_masks(Y, ("O_t", "A_v")), reps=("O_t", "A_v")).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()][:3] == ["$O_t^1$", "$A_v^1$", "$O_t^2$"]
    assert not _frames(ax, PAIR_COLORS["P1"])  # one modality has no P1


def test_the_anchor_is_linked_to_each_other_row_in_its_sets_colour() -> None:
    figure = pictures.draw_anchor(pair_masks(Y), Y, "O_t^1")
    links = [p for p in figure.axes[0].patches if isinstance(p, FancyArrowPatch)]
    colors = [link.get_edgecolor()[:3] for link in links]
    counts = {name: colors.count(to_rgb(color)) for name, color in PAIR_COLORS.items()}
    assert counts == {"P1": 2, "P2": 3, "N1": 9, "N2": 3}


@pytest.mark.parametrize("anchor", ["O_t^1", "O_a^2", "A_v^2", "A_a^3"])
def test_no_line_from_the_anchor_passes_behind_another_marker(anchor: str) -> None:
    figure = pictures.draw_anchor(pair_masks(Y), Y, anchor)
    figure.canvas.draw()
    ax = figure.axes[0]
    spots = np.array([ax.transData.transform(c.get_offsets()[0]) for c in ax.collections])
    half = ax.collections[0].get_sizes()[0] ** 0.5 / 2 * figure.dpi / 72
    for link in (p for p in ax.patches if isinstance(p, FancyArrowPatch)):
        line = ax.transData.transform(_along(link.get_path()))
        away = np.abs(line[:, None] - spots).max(-1).min(0)  # of each marker, as a square
        assert (away < half).sum() == 2, anchor  # the two ends, nobody else
        assert line[:, 1].min() > spots[:, 1].min() - 1.5 * half, "a line through the labels"


def _along(path: Curve) -> np.ndarray:
    """Points along a path of curves, in order."""
    curves = [segment for segment, _ in path.iter_bezier()]
    return np.concatenate([curve(np.linspace(0, 1, 200)) for curve in curves])


def test_the_matrix_and_its_legend_have_the_same_colours_and_frames() -> None:
    figure = pictures.draw_matrix(pair_masks(Y))
    pictures.pair_legend(figure, matrix=True)
    image = figure.axes[0].images[0]
    shown = image.to_rgba(image.get_array(), alpha=image.get_alpha())
    for name, swatch in zip(SETS, figure.legends[0].get_patches(), strict=True):
        p, q = getattr(pair_masks(Y), name).nonzero()[0].tolist()
        np.testing.assert_allclose(swatch.get_facecolor(), shown[p, q], atol=1e-6)
        framed = swatch.get_edgecolor()[:3] == to_rgb(PAIR_COLORS[name])
        assert framed == (name in ("P1", "N1")), name
    pictures.pair_legend(figure.axes[0])
    swatches = figure.axes[0].get_legend().get_patches()
    assert [s.get_facecolor()[:3] for s in swatches] == [to_rgb(c) for c in PAIR_COLORS.values()]


def test_comparisons_shares_and_temperature_have_one_panel_each() -> None:
    masks = pair_masks(Y)
    assert len(pictures.compare_matrices({"a": masks, "b": masks}).axes) == 2
    share = torch.full((18, 18), 1 / 18)
    panels = pictures.draw_shares({"row": share, "sample": share}, {"row": 1, "sample": 6}).axes
    assert [len(_frames(ax, pictures.FRAME)) for ax in panels[:2]] == [18, 3]
    even = torch.full((4,), 0.25)
    names = ["O_v^1", "O_a^1", "A_t^1", "A_v^1"]
    figure = pictures.draw_temperature(
        torch.tensor([0.9, 0.5, 0.1, -0.5]), {1.0: even, 0.1: even}, names, ["P1", "P1", "N1", "N1"]
    )
    assert "4.0 of 4 candidates" in figure.axes[1].texts[0].get_text()


# ---- plane --------------------------------------------------------------------------------------


def test_points_lie_at_their_angle_on_their_samples_ring() -> None:
    ax = planes.draw_plane(ANGLES).axes[0]
    places = {tuple(np.round(xy, 6)) for c in ax.collections for xy in c.get_offsets()}
    radii = 1 + planes.RING * np.arange(3)[:, None]
    x, y = radii * np.cos(ANGLES.numpy()), radii * np.sin(ANGLES.numpy())
    assert places == {tuple(np.round(xy, 6)) for xy in zip(x.flat, y.flat, strict=True)}


def test_an_arrow_ends_where_the_vector_would_turn() -> None:
    arrows = torch.zeros(3, 6)
    arrows[1, 2] = 0.4
    ax = planes.draw_plane(ANGLES, arrows=arrows).axes[0]
    heads = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    end, radius = float(ANGLES[1, 2]) + 0.4, 1 + planes.RING
    assert len(heads) == 1
    np.testing.assert_allclose(heads[0].xy, [radius * np.cos(end), radius * np.sin(end)], atol=1e-6)


def test_smaller_markers_lie_above_larger_ones() -> None:
    sizes = [c.get_sizes()[0] for c in planes.draw_plane(ANGLES).axes[0].collections]
    assert sizes == sorted(sizes, reverse=True)


def test_strip_and_grid_have_a_panel_per_stage() -> None:
    paths = {"with": torch.stack([ANGLES] * 5), "without": torch.stack([ANGLES] * 5)}
    strip = planes.draw_descent(paths, (0, 2, 4))
    assert sum(len(part.axes) for part in strip.subfigs) == 6
    grid = planes.draw_planes({str(k): ANGLES for k in range(3)}, columns=2)
    assert len(grid.axes) == 4
    assert planes.draw_gaps({"a": torch.arange(3.0), "b": torch.arange(3.0)}).axes
    four = {"O_t^1": 0, "O_v^1": 60, "A_v^1": 120, "A_t^1": 180}
    assert len(planes.draw_vectors(four).axes[0].texts) == 8  # an arrow and a label each


def test_the_player_carries_all_steps_and_a_sentence_for_pages_without_scripts() -> None:
    path = torch.stack([ANGLES + 0.1 * k for k in range(9)])
    html = planes.animate_descent({"with N1": path, "without N1": path}).data
    data = json.loads(re.search(r"const D = (\{.*?\}), host", html).group(1))
    assert np.shape(data["paths"]) == (2, 9, 3, 6)
    np.testing.assert_allclose(data["paths"][0][8], (ANGLES + 0.8).numpy(), atol=5e-4)
    still = html.split("<script>")[0]
    assert "still pictures" in still and "http" not in html
