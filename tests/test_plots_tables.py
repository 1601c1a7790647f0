"""Tables ready to paste, figures of runs, maps and numbers, and the list of figures."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from conki_lib import statistics  # noqa: E402
from conki_lib.config import ROOT  # noqa: E402
from conki_lib.plots import embedding as maps  # noqa: E402
from conki_lib.plots import reasons  # noqa: E402
from conki_lib.plots import tables as plots  # noqa: E402
from conki_lib.plots.index import figure_index  # noqa: E402
from conki_lib.plots.style import footnote, save_figure  # noqa: E402

METRICS = ["mae", "acc2_non0"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def runs() -> pd.DataFrame:
    lines = [
        ("full", "components", 0, 0.70, 0.85), ("full", "components", 1, 0.72, 0.87),
        ("w/o N1", "parts of C4", 0, 0.75, 0.80),
    ]  # fmt: skip
    table = pd.DataFrame(lines, columns=["variant", "group", "seed", *METRICS])
    return table.assign(code=["older", "current", "current"])


@pytest.fixture
def differences() -> pd.DataFrame:
    lines = [
        ("w/o N1", "mae", 0.05, 0.01, 0.09, 0.01, 0.02),
        ("w/o N1", "acc2_non0", -0.02, -0.05, -0.01, 0.04, 0.08),
        ("TFN", "mae", -0.05, -0.09, -0.01, 0.0001, 0.02),
        ("TFN", "acc2_non0", 0.02, 0.01, 0.03, 0.01, 0.02),
    ]
    columns = ["variant", "metric", "difference", "low", "high", "p", "p_holm"]
    return pd.DataFrame(lines, columns=columns).assign(seeds=2, utterances=50)


def test_cells():
    assert plots.show("mae", 0.7412, 0.0061) == "0.741 ± 0.006"
    assert plots.show("acc7", 0.4567, np.nan) == "45.7"
    assert plots.show("corr", np.nan) == ""


def test_main_table_leaves_cells_without_a_source_empty(runs):
    coverage = pd.DataFrame(
        {"variant": ["full", "w/o N1", "t"], "n": [2, 1, 0], "reason": ["", "", "not run"]}
    )
    summary = statistics.summarise(runs, METRICS)
    table = plots.main_table(summary, coverage, METRICS, statistics.published("mosi-open"))
    table = table.set_index("row")
    assert table.loc["full", ["n", "MAE", "note"]].tolist() == [
        2, "0.710 ± 0.014", "1 of 2 by older code"]  # fmt: skip
    assert table.loc["w/o N1", "Acc-2 non0 (%)"] == "80.0"
    assert table.loc["t", ["MAE", "note"]].tolist() == ["", "not run"]
    paper = table.loc["ConKI (paper)"]
    assert paper["MAE"] == "" and "no source" in paper["note"]
    assert table.loc["TFN (MMSA)", "MAE"] == "0.947"
    assert "MMSA" in table.loc["TFN (MMSA)", "note"]


def test_main_table_of_sims_and_of_a_corpus_nobody_published():
    none = pd.DataFrame({"variant": ["full"], "n": [0], "reason": ["not run"]})
    empty = pd.DataFrame()
    metrics = statistics.METRICS["sims"]
    table = plots.main_table(empty, none, metrics, statistics.published("sims")).set_index("row")
    assert table.loc["LMF (MMSA)", "Acc-3 (%)"] == "64.7"
    assert len(plots.main_table(empty, none, metrics, statistics.published("synthetic"))) == 1


def test_difference_table(differences):
    table = plots.difference_table(differences, METRICS).set_index("row")
    assert table.loc["w/o N1", "MAE"] == "+0.050 [+0.010, +0.090]"
    assert table.loc["TFN", "Acc-2 non0 (points)"] == "+2.0 [+1.0, +3.0]"
    assert table.loc["TFN", ["p (MAE)", "p Holm (MAE)"]].tolist() == ["<0.001", "0.020"]
    assert table.loc["w/o N1", "p Holm (Acc-2 non0)"] == "0.080"
    grouped = plots.difference_table(differences.assign(p_group=differences["p"]), METRICS)
    assert grouped["p Holm in group (MAE)"].tolist() == ["0.010", "<0.001"]
    shown = ["row", "seeds", "MAE", "p (MAE)", "p Holm (MAE)", "p Holm in group (MAE)"]
    assert list(plots.brief(grouped.assign(meaning=""))) == [*shown, "Acc-2 non0 (points)"]


def test_written_tables_say_the_same(tmp_path, differences):
    table = plots.difference_table(differences, METRICS).assign(meaning=["no N1 pairs", ""])
    paths = plots.write_tables(table, "d", tmp_path / "toy" / "tables", caption="100 % & more")
    assert pd.read_csv(paths["csv"], dtype=str, keep_default_na=False).equals(table.astype(str))
    tex = paths["tex"].read_text()
    for part in (
        r"\toprule",
        r"\bottomrule",
        r"100 \% \& more",
        "[$-$0.090",
        "Acc-2 non0 (points)",
    ):
        assert part in tex
    assert "N1 pairs" not in tex and tex.count(r"\\") == 3 and "tab:toy-d" in tex
    text = paths["md"].read_text()
    assert text.startswith("100 % & more\n") and "| +0.050 [+0.010, +0.090]" in text
    assert text.endswith("|\n\n- `w/o N1`: no N1 pairs\n")
    before = {p: p.read_bytes() for p in paths.values()}
    plots.write_tables(table, "d", tmp_path / "toy" / "tables", caption="100 % & more")
    assert all(p.read_bytes() == old for p, old in before.items())


def test_every_run_is_a_point(runs):
    ax = plots.runs_figure(runs, METRICS).axes[0]
    points = np.concatenate([c.get_offsets()[:, 0] for c in ax.collections if c.get_offsets().size
                             and hasattr(c, "get_sizes") and len(c.get_sizes())])  # fmt: skip
    assert {0.70, 0.72, 0.75} <= set(np.round(points, 3))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["full  (n = 2)", "w/o N1  (n = 1)"]


def test_devices_are_named_where_they_differ(runs):
    here = runs.assign(device="cpu")
    assert plots.devices(here) == "" == plots.devices(here[:0])
    told = plots.devices(runs.assign(device=["cpu", "NVIDIA H200", "cpu"]))
    assert told.startswith(" On NVIDIA H200, not CPU, rows and seeds: full 1; their differences")


def test_colours_of_differences_know_which_way_is_better(differences):
    fig = plots.difference_figure(differences, METRICS)
    look = [[line.get_color() for line in ax.lines if line.get_marker() in "os"] for ax in fig.axes]
    assert look == [[plots.WORSE, plots.BETTER], [plots.OPEN, plots.BETTER]]  # by Holm's p alone
    ways = [ax.get_xlabel().splitlines()[1] for ax in fig.axes]
    assert ways == ["left is better", "right is better"]


def test_a_row_far_outside_does_not_set_the_axis(differences):
    mae = differences[differences["metric"] == "mae"]
    near = [mae.assign(variant=f"row {k}") for k in range(4)]
    far = mae.iloc[:1].assign(variant="w/o C3", difference=1.5, low=1.4, high=1.6)
    ax = plots.difference_figure(pd.concat([*near, far]), ["mae"]).axes[0]
    assert ax.get_xlim()[1] < 0.5 and [t.get_text() for t in ax.texts] == ["+1.50 [+1.40, +1.60]"]
    cut = mae.iloc[:1].assign(variant="wide", difference=0.05, low=-0.9, high=0.06)
    ax = plots.difference_figure(pd.concat([*near, cut]), ["mae"]).axes[0]
    ends = [line.get_xdata()[0] for line in ax.lines if line.get_marker() in ("<", ">")]
    assert ends == [ax.get_xlim()[0]]


def test_other_figures_draw_what_they_are_given(runs, differences):
    changes = pd.DataFrame({"variant": ["w/o N1"] * 2, "group": ["-1", "0"], "p": [0.01, 0.9],
                            "utterances": [30, 40], "difference": [0.2, -0.001]})  # fmt: skip
    for seen, star in (({}, "*"), ({"utterances": 19}, ""), ({"p": np.nan}, "")):
        ax = reasons.change_heatmap(changes.assign(**seen), ("-1", "0", "+1")).axes[0]
        assert [t.get_text() for t in ax.texts] == [f"+0.20{star}", "0"]  # one seed has no p
        colours = np.ma.getmaskarray(ax.images[0].get_array()).tolist()
        assert colours == [[True, True, True] if "utterances" in seen else [False, False, True]]
        assert ax.get_xticklabels()[2].get_text() == "+1\nn = 0"
    gradients = pd.DataFrame({"cosine": [0.1, -0.2, 0.3], "ratio": [0.1, 0.2, 9.0]})
    gradients = gradients.assign(moment="start", group="text backbone")
    bars = [ax.lines[1].get_xdata().tolist() for ax in reasons.conflict_figure(gradients).axes]
    assert bars == [[0.1], [0.2]]
    ours = {"full": ([0.7, 0.72], [0.85, 0.87])}
    fig = plots.published_figure(ours, statistics.published("mosi"), ("mae", "acc2_non0"))
    assert {t.get_text() for t in fig.axes[0].texts} >= {"TFN", "MulT"}
    assert footnote(fig, "n = 2").get_supxlabel() == "n = 2"


def test_rows_far_outside_do_not_hide_the_others():
    rng = np.random.default_rng(0)
    rows = [("full", 0.80), ("w/o C1", 0.81), ("w/o C4", 0.79), ("w/o C3", 1.5), ("w/o N1", 0.8)]
    runs = pd.DataFrame(
        [{"variant": row, "group": "components", "seed": k, "mae": mae + rng.uniform(-0.01, 0.01)}
         for row, mae in rows for k in range(5)])  # fmt: skip

    def drawn(some: pd.DataFrame) -> tuple[list[str], int]:
        ax = plots.runs_figure(some, ["mae"]).axes[0]
        points = [c for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes())]
        assert ax.get_xlim()[1] < 1 or not ax.texts
        return [t.get_text() for t in ax.texts], sum(len(c.get_offsets()) for c in points)

    assert drawn(runs) == (["1.50 (1.49 to 1.51)"], 20)
    (text,), points = drawn(runs[runs["seed"] == 0])  # one seed has no range
    assert text.startswith("1.") and "to" not in text and points == 4
    assert drawn(runs[runs["variant"] != "w/o C3"]) == ([], 20)
    near = runs["mae"].where((runs["variant"] != "w/o C3") | (runs["seed"] > 0), 0.8)
    assert drawn(runs.assign(mae=near)) == ([], 25)  # one of its runs lies among the others
    same = runs.assign(mae=1.0).drop_duplicates("variant")  # one run of a row has no range
    assert drawn(same) == ([], 5)


def test_lines_of_labels_do_not_cross():
    table = statistics.published("mosi")
    ax = plots.published_figure({}, table, ("mae", "acc2_non0")).axes[0]
    lines = [(np.array(t.xy), np.array(t.xyann)) for t in ax.texts]

    def side(a, b, c):
        return np.sign(np.linalg.det([b - a, c - a]))

    for k, (a, b) in enumerate(lines):
        for c, d in lines[:k]:
            assert side(a, b, c) == side(a, b, d) or side(c, d, a) == side(c, d, b)


def test_a_sweep_joins_the_seeds_that_every_value_has():
    swept = pd.DataFrame({
        "lam": [0.0, 0.01, 0.1] * 2 + [0.01], "seed": [0, 0, 0, 1, 1, 1, 2],
        "mae": [1.0, 0.8, 0.9, 0.8, 0.6, 0.9, 9.0],
    })  # fmt: skip
    ax = plots.sweep_figure(swept, "lam", ["mae"], own=0.01).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.01", "0.1"]
    one, other, mean, profile = (list(line.get_ydata()) for line in ax.lines)
    assert (one, other) == ([1.0, 0.8, 0.9], [0.8, 0.6, 0.9])
    assert np.allclose(mean, [0.9, 0.7, 0.9]) and len(profile) == 2
    with pytest.raises(ValueError, match="no seed was run with every value of lam"):
        plots.sweep_figure(swept.drop_duplicates("lam").assign(seed=[0, 1, 2]), "lam", ["mae"])


def test_figures_of_representations():
    from conki_lib.embedding import MOMENTS

    rng = np.random.default_rng(0)
    names = ("O_t", "O_a", "A_t", "A_a")
    lines = [(v, m, s, 0, f"u{i}", r, float(i - 3), *rng.normal(size=2))
             for v in ("full", "w/o C4") for m in ("t-SNE", "UMAP") for s in (5, 30)
             for i in range(6) for r in names]  # fmt: skip
    columns = ["variant", "method", "setting", "seed", "id", "rep", "y", "x1", "x2"]
    table = pd.DataFrame(lines, columns=columns)
    main = table[table["setting"] == 30]
    for color in ("representation", "sentiment"):
        fig = maps.map_figure(main, color)
        assert sum(len(c.get_offsets()) for ax in fig.axes[:4] for c in ax.collections) == len(main)
    assert len(maps.grid_figure(table, "UMAP").axes) == 4
    numbers = pd.DataFrame([{"variant": "full", "moment": m, **dict.fromkeys(maps.NUMBERS, 0.5)}
                            for m in MOMENTS])  # fmt: skip
    shown = [ax for ax in maps.numbers_figure(numbers).axes if ax.get_visible()]
    assert len(shown) == len(maps.NUMBERS)
    probes = [{"variant": "full", "moment": m, "rep": r, "value": 0.4} for m in MOMENTS
              for r in names]  # fmt: skip
    assert len(maps.probes_figure(pd.DataFrame(probes)).axes) == 1
    fig = maps.cka_figure(dict.fromkeys("ab", (names, np.eye(4).tolist())))
    assert sum(ax.get_visible() for ax in fig.axes) == 3  # two maps and the scale


# ---- the list of figures ------------------------------------------------------------------------


def test_the_list_names_the_notebook_in_the_file(tmp_path):
    fig = plt.figure()
    for name, producer in (("02_x", "02_contrastive_pairs"), ("05_y", "05_ablation_table")):
        save_figure(fig, name, "toy", producer=producer, folder=tmp_path / "figures" / "toy")
    lines = figure_index(tmp_path).splitlines()
    assert "[toy/02_x](toy/02_x.png) | [02_contrastive_pairs]" in lines[-2]
    assert lines[-2].endswith("none: corpora, settings, formulas, toys |")
    assert "[05_ablation_table]" in lines[-1] and "results/toy/records.jsonl" in lines[-1]


def test_the_committed_list_is_the_generated_one():
    path = ROOT / "figures" / "README.md"
    assert path.read_text() == figure_index()


# ---- the whole way, from a generated MMSA file to a table ---------------------------------------


def mmsa_file(path, limit: float, widths: dict[str, int]):
    """Write a small file of MMSA's schema whose vision features know the label a little."""
    import pickle

    content = {}
    for k, (split, n) in enumerate((("train", 24), ("valid", 6), ("test", 12))):
        rng = np.random.default_rng(k)
        y = np.clip(rng.normal(0, limit / 2, n), -limit, limit).round(1).astype(np.float32)
        frames = {m: rng.normal(size=(n, 4, d)).astype(np.float32) for m, d in widths.items()}
        frames["vision"][:, :, 0] += 2 * y[:, None] / limit
        content[split] = {
            "raw_text": np.array([f"film {i}" for i in range(n)]),
            "id": np.array([f"{split}{i}$_$1" for i in range(n)]),
            "regression_labels": y,
            **frames,
            **{f"{m}_lengths": np.full(n, 4) for m in frames},
        }
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


@pytest.mark.parametrize(
    ("corpus", "limit", "widths", "column"),
    [
        ("mosi", 3.0, {"vision": 20, "audio": 5}, "Acc-2 non0 (%)"),
        ("mosei", 3.0, {"vision": 35, "audio": 74}, "Acc-2 has0 (%)"),
        ("sims", 1.0, {"vision": 709, "audio": 33}, "Acc-3 (%)"),
    ],
)
def test_main_table_of_a_generated_mmsa_file(tmp_path, corpus, limit, widths, column):
    from conki_lib.data import convert, open_store
    from conki_lib.probes import clip_means, ridge_predict

    source = mmsa_file(tmp_path / "file.pkl", limit, widths)
    store = open_store(
        convert(source, tmp_path / corpus, name=corpus, language="en", label_range=(-limit, limit))
    )
    metrics = "sims" if corpus == "sims" else "mosi"
    train, test = store["train"], store["test"]
    y_hat = ridge_predict(clip_means(train, "v"), train.y, clip_means(test, "v"))
    lines = pd.DataFrame({"id": test.table["id"], "y": test.y, "y_hat": y_hat})
    lines = lines.assign(key="k", fold="standard", variant="full", seed=0, split="test")
    runs = statistics.recompute(lines, metrics=metrics)
    names = statistics.METRICS[metrics]
    coverage = pd.DataFrame({"variant": ["full"], "n": [1], "reason": [""]})
    table = plots.main_table(
        statistics.summarise(runs, names), coverage, names, statistics.published(corpus)
    ).set_index("row")
    assert all(table.loc["full", plots.METRIC_NAMES[name]] for name in names)
    assert 0 < float(table.loc["full", column]) <= 100
    assert table.loc["TFN (MMSA)", column] and table.loc["ConKI (paper)", column] == ""
