"""Pictures of corpora and probes: what they show is what the data hold."""

from collections.abc import Iterator

import matplotlib
import numpy as np
import pandas as pd
import pytest
from layouts import write_synthetic

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from conki_lib.data import open_store  # noqa: E402
from conki_lib.data.inspection import audit  # noqa: E402
from conki_lib.data.store import write_store  # noqa: E402
from conki_lib.plots import data as plots  # noqa: E402
from conki_lib.plots import probes as probe_plots  # noqa: E402
from conki_lib.plots.style import save_figure  # noqa: E402
from conki_lib.probes import probe_modalities, score_groups  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def store(make_tiny_store):
    return open_store(make_tiny_store(sizes=(30, 8, 12)))


def write(path, texts, y, v, language="en"):
    n = len(texts)
    table = pd.DataFrame(
        {
            "id": [f"u{i}" for i in range(n)],
            "video": "video",
            "clip": "1",
            "text": texts,
            "y": y,
            "standard": ["train"] * (n - 2) + ["valid", "test"],
        }
    )
    write_store(path, table, {"v": v}, name="toy", language=language, label_range=(-3.0, 3.0))
    return open_store(path)


def test_text_length_is_words_or_characters(tmp_path):
    frames = [np.ones((3, 2), np.float32)] * 4
    texts = ["it was fine", "很 喜欢", "a", "b c"]
    english = write(tmp_path / "en", texts, [0.0] * 4, frames)
    chinese = write(tmp_path / "zh", texts, [0.0] * 4, frames, language="zh")
    assert plots.lengths(english["train"], "t").tolist() == [3, 2]
    assert plots.lengths(chinese["train"], "t").tolist() == [9, 3]
    assert plots.lengths(english["train"], "v").tolist() == [3, 3]


def test_ties_are_exactly_halfway():
    y = np.array([0.5, -0.5, 1.5, 2.5, 0.0, 1.0, 0.4, 1.51], dtype=np.float32)
    assert plots.is_tie(y).tolist() == [True] * 4 + [False] * 4


def test_label_bars_hold_every_utterance_once(store):
    figure = plots.label_figure({"toy": store})
    left, right = figure.axes[:2]
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(50)
    for bars in right.containers:  # the classes' shares of one split
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    ties = int(plots.is_tie(store.utterances["y"].to_numpy(np.float32)).sum())
    assert f"50 labels, {ties} ties" in left.get_title(loc="left") + left.get_title()


def test_feature_ranges_are_those_of_the_train_frames(store):
    table = plots.feature_ranges(store)
    assert table.groupby("modality").size().to_dict() == {"audio": 3, "vision": 5}
    frames = np.concatenate([u.inputs["v"].numpy() for u in store["train"]])
    vision = table[table["modality"] == "vision"]
    assert np.allclose(vision["min"], frames.min(axis=0))
    assert np.allclose(vision["max"], frames.max(axis=0))
    assert np.allclose(vision["std"], store.stats("v")[1], atol=1e-5)
    assert (vision["furthest"] > 1).all() and (vision["zeros"] == 0).all()


def test_large_splits_are_sampled_by_seed(store, monkeypatch):
    whole = plots.feature_ranges(store)
    monkeypatch.setattr(plots, "MOST_FRAMES", 20)
    few, again = plots.feature_ranges(store), plots.feature_ranges(store)
    assert few.equals(again) and not few.equals(whole)


def test_silent_steps_are_masked_and_others_standardised():
    frames = np.array([[1.0, 3.0], [0.0, 0.0], [3.0, 1.0]], dtype=np.float32)
    ax = plt.figure().gca()
    mean, std = np.array([1.0, 1.0], np.float32), np.array([2.0, 1.0], np.float32)
    drawn = plots.draw_frames(ax, frames, mean, std).get_array()
    assert drawn.mask.tolist() == [[False, True, False], [False, True, False]]
    assert drawn[:, 0].tolist() == [0, 2] and drawn[:, 2].tolist() == [1, 0]
    assert frames[1].tolist() == [0, 0]  # the input was not changed


def test_audit_figure_says_what_was_found_what_not_and_what_was_not_checked(tmp_path, store):
    frames = [np.zeros((2, 2), np.float32), *[np.ones((3, 2), np.float32)] * 3]
    broken = write(tmp_path / "broken", ["", "a", "b", "c"], [0.0] * 4, frames)
    figure = plots.audit_figure({"toy": audit(store), "broken": audit(broken)})
    left, right = ([text.get_text() for text in ax.texts] for ax in figure.axes)
    assert set(left) == {"none"}
    assert "not there" in right and "1 of 4" in right and "2 of 2" in right
    assert all(ax.get_xlim() == (0, 1) for ax in figure.axes)
    silent = write(tmp_path / "silent", [""] * 4, [0.0] * 4, frames)
    assert "texts that are empty" not in set(audit(silent)["check"])  # it has no text at all


def test_lengths_leave_out_the_step_that_stands_for_no_frames(tmp_path):
    frames = [np.zeros((0, 2), np.float32), *[np.ones((k, 2), np.float32) for k in (1, 3, 5)]]
    store = write(tmp_path / "toy", ["a"] * 4, [0.0] * 4, frames)
    assert plots.is_placeholder(store["train"], "v").tolist() == [True, False]
    assert plots.is_placeholder(store["train"], "t").tolist() == [False, False]
    vision = plots.length_figure({"toy": store}).axes[1]
    assert "1 without it left out" in vision.get_title() + vision.get_title(loc="left")


def test_correlations_equal_numpys_and_constants_give_zero(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.normal(size=12).round(2)
    frames = [np.column_stack([rng.normal(v, 1, 4), np.full(4, 7.0)]).astype("f4") for v in y]
    view = write(tmp_path / "toy", ["x"] * 12, y, frames)["train"]
    r = probe_plots.feature_correlations(view, "v")
    means = np.array([f[:, 0].mean() for f in frames[:10]])
    assert r[0] == pytest.approx(np.corrcoef(means, y[:10])[0, 1], abs=1e-5) and r[1] == 0


def test_courses_show_the_feature_that_moves_with_the_label(tmp_path):
    rng = np.random.default_rng(0)
    y = np.tile([-2.0, 2.0, 0.0], 10)
    rise = np.linspace(0, 1, 6)[:, None]
    frames = [rng.normal(0, 0.1, (6, 3)) + rise * [0, v, 0] for v in y]
    figure = probe_plots.course_figure(write(tmp_path / "t", ["x"] * 30, y, frames)["train"], {})
    (ax,) = figure.axes
    assert "feature 1" in ax.get_title(loc="left") + ax.get_title()
    end = {line.get_label().split()[0]: line.get_ydata()[-1] for line in ax.lines}
    assert end["positive"] > 1.5 and end["negative"] < -1.5 and abs(end["weak"]) < 0.3


def test_probe_figure_has_one_marker_per_group_and_modality(store):
    test = store["test"]
    groups = {"all": np.ones(12, bool), "first / half": np.arange(12) < 6}
    tables = [
        score_groups(p, test.y, groups, test.columns["video"], draws=20).assign(modality=m)
        for m, p in probe_modalities(store).items()
    ]
    figure = probe_plots.probe_figure(pd.concat(tables))
    accuracy = figure.axes[0]
    assert len(accuracy.containers) == 3  # text, vision, audio
    assert [t.get_text() for t in accuracy.get_xticklabels()] == ["all", "first\nhalf"]
    drawn = accuracy.containers[0].lines[0].get_ydata()
    assert np.allclose(drawn, 100 * tables[0]["acc2_non0"])


def test_pictures_of_generated_corpora(tmp_path):
    from conki_lib.data import synthetic

    store = open_store(write_synthetic(tmp_path / "s", sizes=(60, 20, 30)))
    slang = probe_plots.slang_figure({"test": store["test"]}, synthetic.DOMAIN_WORDS)
    said = (store["test"].table["domain_word"] != "").sum()
    assert sum(bar.get_height() for bar in slang.axes[0].patches) == said
    cues = probe_plots.cue_figure(store["test"].table.head(2))
    widths = [bar.get_width() for bar in cues.axes[0].patches]
    assert widths == pytest.approx(
        store["test"].table.loc[0, ["said", "shown", "sounded"]].tolist()
    )
    scores = {
        "oracle": {"acc2_non0": 0.9, "corr": 0.8},
        "median": {"acc2_non0": 0.5, "corr": np.nan},
    }
    texts = [t.get_text() for ax in probe_plots.ceilings_figure(scores).axes for t in ax.texts]
    assert texts == ["90.0", "50.0", "0.800", "undefined"]


def test_all_pictures_of_a_corpus_can_be_saved_and_are_equal_bytes(store, tmp_path):
    def draw():
        yield "labels", plots.label_figure({"toy": store})
        yield "lengths", plots.length_figure({"toy": store})
        yield "ranges", plots.range_figure({"toy": plots.feature_ranges(store)})
        yield "examples", plots.example_figure(store, [store["train"][i] for i in (0, 1)])

    for name, figure in draw():
        saved = [
            save_figure(figure, name, "toy", producer="test", folder=tmp_path).read_bytes()
            for _ in range(2)
        ]
        assert saved[0] == saved[1]


def test_one_vector_per_utterance_is_said_not_drawn(tmp_path):
    frames = [np.ones((1, 2), np.float32) * i for i in range(4)]
    store = write(tmp_path / "toy", ["", "", "", ""], [0.0, 1.0, 2.0, 3.0], frames)
    text, vision, audio = plots.length_figure({"toy": store}).axes
    assert [ax.texts[0].get_text().split("\n")[0] for ax in (text, vision, audio)] == [
        "no text", "one vector", "no audio"
    ]  # fmt: skip


def test_texts_that_the_font_cannot_write_are_named_by_their_id(tmp_path):
    frames = [np.ones((3, 2), np.float32)] * 4
    store = write(tmp_path / "zh", ["很喜欢", "fine", "a", "b"], [0.5] * 4, frames, language="zh")
    figure = plots.example_figure(store, [store["train"][0], store["train"][1]])
    said = [ax.get_title() + ax.get_title(loc="left") for ax in figure.axes[:2]]
    assert "utterance u0" in said[0] and "\u201cfine\u201d" in said[1]
    figure.canvas.draw()  # a missing glyph would warn, and warnings are errors here
